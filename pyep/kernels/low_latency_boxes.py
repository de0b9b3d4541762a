"""Where a low-latency sender stores what is for a rank: in that rank's half, or for a port peer in an *outbox*.

An outbox is in this rank's own memory.  It travels as a whole (`low_latency_ship`) into the peer's *inbox*, and the peer copies
what it holds to where a rank that maps its memory would have stored it (`low_latency_unpack`).  There is one for each port peer and
parity of the epoch, see `pyep.layout.LowLatency.dispatch_box`: words as in a half, but of one source, then *packets*, close
together so that few bytes travel: a header that names a slot, and the row for that slot.

Kernels for ranks that all map each other are compiled with PORTS = 0, and nothing of this is in them.
"""
from ..channels.memory import peer
from .lang import fetch_add8_relaxed, ld8_constant, st8
from .low_latency_slots import SLOT_BYTES, slot_at

# Template parameters, as in `low_latency`.
PORTS = 0                                       # 1: there are port peers; UNORDERED: and puts to them may overtake each other
RANKS = COUNTS = COUNTS_STRIDE = 0
BOXES = CLAIMS = 0                              # offsets of control words
BOX_WORDS = 0                                   # offset in a box of the routes and places of its tokens, in a combine of packets
WORD_BYTES = 0                                  # of a token's routes and places: 0 in a combine, which has none
PACKET_BYTES = 0                                # of a packet, its header included

UNORDERED = 2
CLAIMED, BOX_COUNTS = 0, 8                      # offsets in the header of any box
PACKET_HEADER = 16                              # as in pyep.layout


def is_port_peer(base, rank):
    """Whether this rank does not map the memory of another."""
    return 1 if PORTS and peer(base, rank) == 0 else 0


def box_entry(watch, rank):
    """Offsets in the symmetric memory, of this operation: the outbox for a port peer, the inbox from it, and its inbox for this
    rank."""
    base, _, epoch = watch
    at = base + BOXES + 32 * ((epoch & 1) * RANKS + rank)
    return ld8_constant(at), ld8_constant(at + 8), ld8_constant(at + 16)


def outbox(watch, rank):
    """The address of the box that goes to a port peer."""
    here, _, _ = box_entry(watch, rank)
    return watch[0] + here


def inbox(watch, rank):
    """The address of the box that comes from a port peer."""
    _, here, _ = box_entry(watch, rank)
    return watch[0] + here


# ---- words -----------------------------------------------------------------------------------------------------------

def count_slot(memory, epoch, source):
    """The address of the first of `source`'s counters; memory: the address of the rank's symmetric memory."""
    return memory + COUNTS + ((epoch & 1) * RANKS + source) * COUNTS_STRIDE


def counts_for(watch, rank, me):
    """The address at which this rank stores its first counter for another."""
    base, _, epoch = watch
    memory = peer(base, rank)
    if PORTS and memory == 0:
        return outbox(watch, rank) + BOX_COUNTS
    return count_slot(memory, epoch, me)


def words_for(watch, rank, me, half):
    """Where this rank stores its tokens' routes and places for another: the address of the first token's, and how far it is from
    there to the next one's.  half: the offset of the half."""
    memory = peer(watch[0], rank)
    if PORTS and memory == 0:
        return outbox(watch, rank) + BOX_WORDS, WORD_BYTES
    return slot_at(memory + half, me, 0), RANKS * SLOT_BYTES


# ---- rows ------------------------------------------------------------------------------------------------------------

def packets_in(box, num_tokens):
    """The address of the first packet in a box, behind the words of so many tokens."""
    return box + BOX_WORDS + num_tokens * WORD_BYTES


def claim_row(watch, rank, row, token, num_tokens, selections):
    """Claim a packet for the row of a token that goes to a port peer, and write its header; the address for the row.

    row: where it belongs, as an offset in the half.  num_tokens: of this rank.  selections: how many of the peer's experts the
    token selects.  The header tells how many the packets claimed before have together: in a direct combine, where an output comes
    back for each selection, that is the index of the token's first packet in the peer's box.
    """
    before = fetch_add8_relaxed(watch[0] + CLAIMS + 8 * rank, selections << 32 | 1)
    packet = packets_in(outbox(watch, rank), num_tokens) + (before & 0xFFFFFFFF) * PACKET_BYTES
    st8(packet, row)
    st8(packet + 8, before & ~0xFFFFFFFF | token)
    return packet + PACKET_HEADER
