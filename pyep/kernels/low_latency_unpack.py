"""Low latency between port peers: what came in a box is copied to where a rank that maps this memory would have stored it.

All receiving blocks do it, a part each, before they receive: no block waits for another, and the code that receives does not know
of ports.  That code puts the absence value back only into slots whose data it expects, so only what it expects may be copied.  A
box holds other things too: words of earlier operations, places of selections that go elsewhere.
"""
from ..channels.memory import report
from .basics import after, num_warps, warp_rank
from .lang import (lane, ld4_relaxed_if, ld8, ld16, num_threads, st4_relaxed, st8, st8_relaxed, st16_relaxed, thread_rank, udiv,
                   umod, warp_size)
from .low_latency import (COMBINE, COMBINE_BOX, DATA_BYTES, DISPATCH_BOX, FP8, LOCAL_EXPERTS, MAX_TOKENS, OTHER_OPERATION,
                          PER_LANE, PLACES, RANK_MAJOR, RANKS, ROW_BYTES, TOPK, WEIGHTED)
from .low_latency_announce import LOCAL_GROUPS
from .low_latency_boxes import (BOX_COUNTS, BOX_PACKETS, BOX_PLACES, BOX_ROUTES, CLAIMED, FINGERPRINT, PACKET_BYTES, PACKET_HEADER,
                                count_slot, inbox, is_port_peer)
from .low_latency_ship import SHAPE, wait_for_box


def box_from(part, watch, wait, source, expected, waited):
    """Wait for the box of a port peer: its address, or 0 if the source is no port peer, the box never came, or it is of another
    operation than `expected`.  The block calls.

    expected: what the source has told to have begun, see `tell_begun`: COMBINE, or 0 for a dispatch, of any number of tokens.
    """
    if is_port_peer(watch[0], source) == 0 or wait_for_box(part, watch, wait, source, waited) == 0:
        return 0
    box = inbox(watch, source)
    told = ld8(box + BOX_COUNTS) & 0xFFFFFFFF
    if told & COMBINE != expected or ld8(box + FINGERPRINT) != SHAPE:
        report(watch, OTHER_OPERATION, source, watch[0], expected, told)
        return 0
    return box


def packets_in(box):
    """How many packets a box has."""
    return ld8(box + CLAIMED) & 0xFFFFFFFF


def copy_rows(part, parts, half_at, box, row_bytes):
    """Copy the rows of all packets to their slots; a warp takes a slice of a row at a time."""
    slice_bytes = 16 * PER_LANE * warp_size()
    slices = udiv(row_bytes + slice_bytes - 1, slice_bytes)
    end = packets_in(box) * slices
    unit = part + parts * warp_rank()
    while unit < end:
        packet = box + BOX_PACKETS + udiv(unit, slices) * PACKET_BYTES
        slot = half_at + ld8(packet)
        for i in range(PER_LANE):
            offset = umod(unit, slices) * slice_bytes + 16 * (i * warp_size() + lane())
            if offset < row_bytes:
                st16_relaxed(slot + offset, ld16(packet + PACKET_HEADER + offset))
        unit += parts * num_warps()


def copy_scales(part, parts, half_at, box):
    """Copy the scales of all packets, 4 bytes each: not 16, as behind the last one a row may have bytes that are no scale."""
    scales = udiv(DATA_BYTES, 128)
    end = packets_in(box) * scales
    i = part * num_threads() + thread_rank()
    while i < end:
        packet, offset = box + BOX_PACKETS + udiv(i, scales) * PACKET_BYTES, DATA_BYTES + 4 * umod(i, scales)
        st4_relaxed(half_at + ld8(packet) + offset, ld4_relaxed_if(packet + PACKET_HEADER + offset, 1))
        i += parts * num_threads()


# ---- dispatch --------------------------------------------------------------------------------------------------------
# Words are few: the last threads copy them, while the first ones have rows.

def copy_counts(part, parts, watch, source, box):
    """Copy the source's counters: of its tokens, and of the rows for each group here."""
    base, _, epoch = watch
    i = (parts - part) * num_threads() - 1 - thread_rank()
    while i < 1 + LOCAL_GROUPS:
        st8_relaxed(count_slot(base, epoch, source) + 8 * i, ld8(box + BOX_COUNTS + 8 * i))
        i += parts * num_threads()


def copy_selections(part, parts, watch, me, half, source, box):
    """Copy the routes of all tokens, and the places of those selections that come here (rank-major: see `copy_headers`)."""
    slot = watch[0] + half + 8 * source * MAX_TOKENS * TOPK
    end = (ld8(box + BOX_COUNTS) & 0xFFFFFFFF) * TOPK
    i = (parts - part) * num_threads() - 1 - thread_rank()
    while i < end:
        route, place = ld8(box + BOX_ROUTES + 8 * i), ld8(box + BOX_PLACES + 8 * i)
        st8_relaxed(slot + 8 * i, route)
        expert = (route & 0xFFFFFFFF) - 1
        if not RANK_MAJOR and expert >= 0 and udiv(expert, LOCAL_EXPERTS) == me:
            st8_relaxed(slot + PLACES + 8 * i, place)
        i += parts * num_threads()


def copy_headers(part, parts, watch, half, source, box, packet_of):
    """From the packets' headers: `packet_of`, see `dispatch`.  Rank-major, where combine needs none: the places of the tokens that
    come here."""
    first_packets = packet_of + 8 * source * (MAX_TOKENS + 1)
    i = (parts - part) * num_threads() - 1 - thread_rank()
    if i == 0 and not RANK_MAJOR:
        claimed = ld8(box + CLAIMED)
        st8(first_packets + 8 * MAX_TOKENS, claimed & 0xFFFFFFFF if WEIGHTED else claimed >> 32)
    while i < packets_in(box):
        before = ld8(box + BOX_PACKETS + i * PACKET_BYTES + 8)    # the second word of the header, see `claim_row`
        token = before & 0xFFFFFFFF
        if RANK_MAJOR:
            place = ld8(box + BOX_PLACES + 8 * token * TOPK)
            st8_relaxed(watch[0] + half + PLACES + 8 * (source * MAX_TOKENS + token) * TOPK, place)
        else:
            st8(first_packets + 8 * token, i if WEIGHTED else before >> 32)
        i += parts * num_threads()


def unpack_dispatch(part, parts, watch, me, half, packet_of, wait_stats):
    """Unpack all boxes, in the order in which their ranks ship to this one."""
    for i in range(1, RANKS):
        source = after(me, RANKS - i)
        box = box_from(part, watch, DISPATCH_BOX, source, 0, wait_stats)
        if box != 0:
            copy_rows(part, parts, watch[0] + half, box, DATA_BYTES)
            if FP8:
                copy_scales(part, parts, watch[0] + half, box)
            copy_counts(part, parts, watch, source, box)
            copy_selections(part, parts, watch, me, half, source, box)
            copy_headers(part, parts, watch, half, source, box, packet_of)


# ---- combine ---------------------------------------------------------------------------------------------------------

def unpack_combine(part, parts, watch, me, half, wait_stats):
    """As `unpack_dispatch`."""
    for i in range(1, RANKS):
        source = after(me, RANKS - i)
        box = box_from(part, watch, COMBINE_BOX, source, COMBINE, wait_stats)
        if box != 0:
            copy_rows(part, parts, watch[0] + half, box, ROW_BYTES)
