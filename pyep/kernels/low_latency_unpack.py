"""Low latency between port peers: what came in a box is copied to where a rank that maps this memory would have stored it.

All receiving blocks do it, a part each, before they receive: no block waits for another, and the code that receives does not know
of ports.  That code puts the absence value back only into slots whose data it expects, so only what it expects may be copied.  A
box holds other things too: words of earlier operations, places of selections that go elsewhere.
"""
from ..channels.memory import report
from .basics import after, num_warps, warp_rank
from .lang import (lane, ld4_relaxed_if, ld8, ld16, num_threads, reserved, st4_relaxed, st8, st8_relaxed, st16_relaxed,
                   thread_rank, udiv, umod, warp_size)
from .low_latency import (COMBINE, COMBINE_BOX, DATA_BYTES, DISPATCH_BOX, FP8, LOCAL_EXPERTS, OTHER_OPERATION, PER_LANE,
                          RANK_MAJOR, RANKS, ROW_BYTES, TOKENS, TOPK, VOID, WEIGHTED, shape_bits)
from .low_latency_announce import LOCAL_GROUPS
from .low_latency_boxes import (BOX_COUNTS, BOX_WORDS, CLAIMED, PACKET_BYTES, PACKET_HEADER, WORD_BYTES, count_slot, inbox,
                                is_port_peer, packets_in)
from .low_latency_escapes import store_escaped
from .low_latency_ship import wait_for_box
from .low_latency_slots import PLACES, place_at, route_at


def box_from(part, watch, wait, source, expected, waited):
    """Wait for the box of a port peer: its address, or 0 if the source is no port peer, the box never came, or it is of another
    operation or shape than `expected`: what the source has told to have begun, but for VOID and the number of tokens.  The block
    calls."""
    if is_port_peer(watch[0], source) == 0 or wait_for_box(part, watch, wait, source, waited) == 0:
        return 0
    box = inbox(watch, source)
    told = ld8(box + BOX_COUNTS) & 0xFFFFFFFF
    if told & ~(TOKENS | VOID) != expected:
        report(watch, OTHER_OPERATION, source, watch[0], expected & COMBINE, told)
        return 0
    return box


def tokens_in(box):
    """How many tokens the source of a box has; 0 in a combine."""
    return ld8(box + BOX_COUNTS) & TOKENS


def num_packets(box):
    """How many packets a box has."""
    return ld8(box + CLAIMED) & 0xFFFFFFFF


def copy_rows(part, parts, half_at, box, row_bytes, escapes):
    """Copy the rows of all packets to their places; a warp takes a slice of a row at a time.  escapes: whether they may have
    reserved words, see `low_latency_escapes`."""
    slice_bytes = 16 * PER_LANE * warp_size()
    slices = udiv(row_bytes + slice_bytes - 1, slice_bytes)
    packets, end = packets_in(box, tokens_in(box)), num_packets(box) * slices
    unit = part + parts * warp_rank()
    while unit < end:
        packet = packets + udiv(unit, slices) * PACKET_BYTES
        slot = half_at + ld8(packet)
        for i in range(PER_LANE):
            offset = umod(unit, slices) * slice_bytes + 16 * (i * warp_size() + lane())
            if offset < row_bytes:
                value = ld16(packet + PACKET_HEADER + offset)
                if escapes and reserved(value) != 0:
                    store_escaped(slot, offset, packet + PACKET_HEADER + offset)
                else:
                    st16_relaxed(slot + offset, value)
        unit += parts * num_warps()


def copy_scales(part, parts, half_at, box):
    """Copy the scales of all packets, 4 bytes each: not 16, as behind the last one a row may have bytes that are no scale."""
    scales = udiv(DATA_BYTES, 128)
    packets, end = packets_in(box, tokens_in(box)), num_packets(box) * scales
    i = part * num_threads() + thread_rank()
    while i < end:
        packet, offset = packets + udiv(i, scales) * PACKET_BYTES, DATA_BYTES + 4 * umod(i, scales)
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
    half_at, end = watch[0] + half, tokens_in(box) * TOPK
    i = (parts - part) * num_threads() - 1 - thread_rank()
    while i < end:
        token, k = udiv(i, TOPK), umod(i, TOPK)
        words = box + BOX_WORDS + token * WORD_BYTES + 8 * k
        route = ld8(words)
        st8_relaxed(route_at(half_at, source, token, k), route)
        expert = (route & 0xFFFFFFFF) - 1
        if not RANK_MAJOR and expert >= 0 and udiv(expert, LOCAL_EXPERTS) == me:
            st8_relaxed(place_at(half_at, source, token, k), ld8(words + PLACES))
        i += parts * num_threads()


def copy_headers(part, parts, watch, half, source, box, packet_of):
    """From the packets' headers: `packet_of`, see `dispatch`.  Rank-major, where combine needs none: the places of the tokens that
    come here."""
    i = (parts - part) * num_threads() - 1 - thread_rank()
    if i == 0 and not RANK_MAJOR:
        claimed = ld8(box + CLAIMED)
        st8(packet_of + 8 * source, claimed & 0xFFFFFFFF if WEIGHTED else claimed >> 32)
    while i < num_packets(box):
        # The second word of the header, see `claim_row`.
        before = ld8(packets_in(box, tokens_in(box)) + i * PACKET_BYTES + 8)
        token = before & 0xFFFFFFFF
        if RANK_MAJOR:
            place = ld8(box + BOX_WORDS + token * WORD_BYTES + PLACES)
            st8_relaxed(place_at(watch[0] + half, source, token, 0), place)
        else:
            st8(packet_of + 8 * ((1 + token) * RANKS + source), i if WEIGHTED else before >> 32)
        i += parts * num_threads()


def unpack_dispatch(part, parts, watch, me, half, max_tokens, packet_of, wait_stats):
    """Unpack all boxes, in the order in which their ranks ship to this one."""
    for i in range(1, RANKS):
        source = after(me, RANKS - i)
        box = box_from(part, watch, DISPATCH_BOX, source, shape_bits(max_tokens), wait_stats)
        if box != 0:
            copy_rows(part, parts, watch[0] + half, box, DATA_BYTES, not FP8)
            if FP8:
                copy_scales(part, parts, watch[0] + half, box)
            copy_counts(part, parts, watch, source, box)
            copy_selections(part, parts, watch, me, half, source, box)
            copy_headers(part, parts, watch, half, source, box, packet_of)


# ---- combine ---------------------------------------------------------------------------------------------------------

def unpack_combine(part, parts, watch, me, half, max_tokens, wait_stats):
    """As `unpack_dispatch`."""
    for i in range(1, RANKS):
        source = after(me, RANKS - i)
        box = box_from(part, watch, COMBINE_BOX, source, COMBINE | shape_bits(max_tokens), wait_stats)
        if box != 0:
            copy_rows(part, parts, watch[0] + half, box, ROW_BYTES, False)
