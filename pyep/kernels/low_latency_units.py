"""What all low-latency combines share: how their work is dealt out to warps, and the lists that warps make in shared memory.

A warp works by itself.  What it does at a time is a *unit*, which ends in a slice of a row: in sending a (token, source, slice),
that is, a slice of what goes back for one token (rank-major: one row) of one source; in receiving a (token, slice).
"""
from ..channels.memory import report
from .basics import add_entry, after, warp_rank
from .lang import (lane, ld4_nc_if, ld8_nc, ld8_nc_if, num_threads, syncwarp, udiv, umod,
                   warp_size)
from .low_latency import (COMBINE, COMBINE_BEGUN, LOCAL_EXPERTS, NEIGHBOURS, OTHER_OPERATION, PER_LANE, RANKS, RECEIVERS, ROW_BYTES,
                          SENDERS, TOPK, WEIGHTED, last_first, shape_bits, wait_begun)
from .low_latency_boxes import PORTS, is_port_peer

# ---- slices and units ------------------------------------------------------------------------------------------------


def slice_bytes():
    """What a warp moves of a row at a time.  Rows are cut into slices that go to warps of different blocks, so that all blocks
    end together though tokens have more and less to send."""
    return 16 * PER_LANE * warp_size()


def slices():
    """Slices of a row."""
    return udiv(ROW_BYTES + slice_bytes() - 1, slice_bytes())


def first_unit(part, parts):
    """A warp's first unit of work; its next one is `parts * num_warps()` on.  NEIGHBOURS warps of a block take slices next to each
    other, the next ones those of the next block's: so all blocks have something to do, however few tokens there are."""
    return (part + parts * udiv(warp_rank(), NEIGHBOURS)) * NEIGHBOURS + umod(warp_rank(), NEIGHBOURS)


def offset_of(unit, piece):
    """Where in a row of bf16 a lane's `piece`-th (of PER_LANE) 16 bytes of a unit are; the row may end before."""
    return umod(unit, slices()) * slice_bytes() + 16 * (piece * warp_size() + lane())


def reads_own_y():
    """Whether receivers take from y what this rank's experts made of its own tokens: they can while the same launch sends."""
    return SENDERS > 0 and RECEIVERS > 0


def others():
    """How many ranks a rank sends to: itself last, if at all."""
    return RANKS - 1 if reads_own_y() and RANKS > 1 else RANKS


def units(max_tokens):
    """In sending: how many there are if every token has something to send."""
    return max_tokens * others() * slices()


def source_of(unit, me):
    """In sending: the rank that a unit goes to, where its token is from."""
    return after(me, umod(udiv(unit, slices()), others()) + 1)


def token_of(unit):
    """In sending: a unit's token, in the rank-major layout its row among those of its source."""
    return udiv(unit, slices() * others())


def tokens_here(unit, me, sent):
    """In sending: how many tokens a unit's source has, in the rank-major layout here."""
    return ld8_nc(sent + 8 * source_of(unit, me))


def travels(unit, me, tokens, max_tokens):
    """In sending: whether a unit may have something to send; tokens: as above."""
    return unit < units(max_tokens) and token_of(unit) < tokens and (source_of(unit, me) != me or not reads_own_y())


def first_packet(unit, me, packet_of):
    """In sending to a port peer: the index in its box of the first packet for a unit's token, see `claim_row`."""
    return ld8_nc(packet_of + 8 * ((1 + token_of(unit)) * RANKS + source_of(unit, me))) if PORTS else 0


# ---- lists -----------------------------------------------------------------------------------------------------------

def list_unit(rows, unit, me, max_tokens, y, row_of, weight_of, sent):
    """In sending: `list_rows` for the token of a unit; 0 if that does not exist or need not travel."""
    wanted = travels(unit, me, tokens_here(unit, me, sent), max_tokens)
    return list_rows(rows, source_of(unit, me), token_of(unit), wanted, max_tokens, y, row_of, weight_of)


def list_rows(rows, source, token, wanted, max_tokens, y, row_of, weight_of):
    """One warp lists the rows of y that the experts here made of a token of `source`, in k order, two words each: address; weight,
    or k if no weights came with the tokens.  Returns how many; 0 unless wanted.

    After a dispatch that has failed, `row_of` may have rows of an earlier one with a larger M: they are none of y.
    """
    end = LOCAL_EXPERTS * RANKS * max_tokens
    count = 0
    first = 0
    while first < TOPK:
        k = first + lane()
        selection = (token * RANKS + source) * TOPK + k
        exists = k < TOPK and token < max_tokens
        row = ld8_nc_if(row_of + 8 * selection, exists)
        second = ld4_nc_if(weight_of + 4 * selection, exists) if WEIGHTED else k
        count = add_entry(rows, count, exists and row >= 0 and row < end and wanted, y + row * ROW_BYTES, second)
        first += warp_size()
    syncwarp()
    return count


# ---- the end ---------------------------------------------------------------------------------------------------------

def wait_for_all(part, parts, watch, max_tokens, wait_stats):
    """One warp makes sure that every rank has begun this operation, also those that have nothing for this rank.  (Port peers: see
    `low_latency_unpack`.)"""
    rank = last_first()                                          # of the last block: it has the least to sum
    while rank < RANKS and part == parts - 1:
        expected = COMBINE | shape_bits(max_tokens)
        begun = wait_begun(watch, COMBINE_BEGUN, rank, wait_stats) if is_port_peer(watch[0], rank) == 0 else expected
        if begun != expected:
            report(watch, OTHER_OPERATION, rank, watch[0], COMBINE, begun)
        rank += num_threads()
