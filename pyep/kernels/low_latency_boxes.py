"""Where a low-latency sender stores what is for a rank: in that rank's half, or for a port peer in an *outbox*.

An outbox is in this rank's own memory.  It travels as a whole (`low_latency_ship`), and the peer then copies what it holds to where
a rank that maps its memory would have stored it (`low_latency_unpack`).  There is one for each port peer and parity of the epoch,
see `pyep.layout.LowLatency.dispatch_box`: words as in a half, but of one source, then *packets* close together, so that few bytes
travel: a header that names a slot, and the row for that slot.

Kernels for ranks that all map each other are compiled with PORTS = 0, and nothing of this is in them.
"""
from ..channels.memory import peer
from .lang import fetch_add8_relaxed, ld8_constant, st8

# Template parameters, as in `low_latency`.
PORTS = 0                                       # 1: there are port peers; UNORDERED: only signals keep puts to them in order
RANKS = MAX_TOKENS = TOPK = COUNTS = COUNTS_STRIDE = PLACES = ROWS = WIRE_BYTES = ROW_BYTES = 0
BOXES = CLAIMS = 0                              # offsets of control words
BOX_ROUTES = BOX_PLACES = BOX_PACKETS = 0        # offsets in a box of this operation
PACKET_BYTES = 0                                # of a packet, its header included

UNORDERED = 2
CLAIMED, FINGERPRINT, BOX_COUNTS = 0, 8, 16     # offsets in a box of any operation
PACKET_HEADER = 16                              # as in pyep.layout


def is_port_peer(base, rank):
    """Whether this rank does not map the memory of another."""
    return 1 if PORTS and peer(base, rank) == 0 else 0


def box_entry(watch, rank):
    """The offsets of a port peer's boxes in this operation: of its outbox here, its inbox here, this rank's inbox there."""
    base, _, epoch = watch
    at = base + BOXES + 32 * ((epoch & 1) * RANKS + rank)
    return ld8_constant(at), ld8_constant(at + 8), ld8_constant(at + 16)


def outbox(watch, rank):
    """The address of what goes to a port peer."""
    here, _, _ = box_entry(watch, rank)
    return watch[0] + here


def inbox(watch, rank):
    """The address of what comes from a port peer."""
    _, here, _ = box_entry(watch, rank)
    return watch[0] + here


# ---- words -----------------------------------------------------------------------------------------------------------

def count_slot(memory, epoch, source):
    """The first of `source`'s counters in a rank's memory."""
    return memory + COUNTS + ((epoch & 1) * RANKS + source) * COUNTS_STRIDE


def counts_for(watch, rank, me):
    """Where this rank tells another its counts: the first of them."""
    base, _, epoch = watch
    memory = peer(base, rank)
    if PORTS and memory == 0:
        return outbox(watch, rank) + BOX_COUNTS
    return count_slot(memory, epoch, me)


def routes_for(watch, rank, me, half):
    """Where this rank tells another the routes of its tokens: the first of them."""
    memory = peer(watch[0], rank)
    if PORTS and memory == 0:
        return outbox(watch, rank) + BOX_ROUTES
    return memory + half + 8 * me * MAX_TOKENS * TOPK


def places_for(watch, rank, me, half):
    """Where this rank tells another the places of its tokens: the first of them."""
    memory = peer(watch[0], rank)
    if PORTS and memory == 0:
        return outbox(watch, rank) + BOX_PLACES
    return memory + half + PLACES + 8 * me * MAX_TOKENS * TOPK


# ---- rows ------------------------------------------------------------------------------------------------------------

def packet_for(watch, rank, i):
    """The address of the i-th packet for a port peer."""
    return outbox(watch, rank) + BOX_PACKETS + i * PACKET_BYTES


def claim_row(watch, rank, slot, token, selections):
    """Where the row of a token goes for a port peer, of whose experts it has so many selections.  Each call claims a packet.

    slot: where in the half the row belongs.  The claim is told to the peer: in a direct combine, where a row comes back for every
    selection, it knows from how many were claimed before where in its box they go.
    """
    before = fetch_add8_relaxed(watch[0] + CLAIMS + 8 * rank, selections << 32 | 1)
    packet = packet_for(watch, rank, before & 0xFFFFFFFF)
    st8(packet, slot)
    st8(packet + 8, before & ~0xFFFFFFFF | token)
    return packet + PACKET_HEADER
