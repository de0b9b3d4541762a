"""The addresses of what a half holds, see `pyep.layout.LowLatency`: a slot for each token and source, partials and outputs.

A slot has all that a dispatch sends of one token to one rank: words about each of its selections, and the row.  M, the most tokens
that a rank may have, is in none of the formulas, so kernels serve any M.
"""

# Template parameters, as in `low_latency`.
RANKS = TOPK = ROW_BYTES = 0
SLOT_BYTES = PLACES = LISTED = ROWS = 0         # bytes of a slot; offsets in it
ESCAPES = 0                                     # from a row on, see `low_latency_escapes`


def slot_at(half, source, token):
    """The address of a slot; half: that of the half."""
    return half + (token * RANKS + source) * SLOT_BYTES


def route_at(half, source, token, k):
    """The address of the word that says what a selection selects."""
    return slot_at(half, source, token) + 8 * k


def place_at(half, source, token, k):
    """The address of the selection's place; rank-major, for k = 0, of the token's."""
    return slot_at(half, source, token) + PLACES + 8 * k


def listed_at(half, source, token):
    """The address of the count of who has listed the token."""
    return slot_at(half, source, token) + LISTED


def row_at(half, source, token):
    """The address of the token's row."""
    return slot_at(half, source, token) + ROWS


def partial_at(half, rank, token):
    """In a combine: the address of the sum that a rank sends of a token."""
    return half + (token * RANKS + rank) * ROW_BYTES


def output_at(half, token, k):
    """In a direct combine: the address of the output for a token's k-th selection."""
    return half + (token * TOPK + k) * ROW_BYTES
