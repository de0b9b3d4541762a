"""High-throughput dispatch inside one node, for any number of ranks, blocks and threads.

A token's row is loaded once and stored to every rank that it goes to, straight to its final address: where that rank wants the rows
of this operation, plus the rows of lower ranks, plus the number that the token has among this rank's (`send_rows`).
"""
from ..channels.memory import refuse
from .basics import add_entry, after, list_bytes, num_warps, warp_rank
from .intranode import (BAD_SELECTION, DISPATCH_DONE, DISPATCH_PLACE, EXPERTS, INDEX_BYTES, LOCAL_EXPERTS, RANKS,
                        ROW, ROW_BYTES, SCALES, SOURCE, TOPK, TOPK_IDX, TOPK_WEIGHTS, WEIGHTED, enter, finish,
                        load_four, tell_operation, tell_place, wait_places)
from .lang import (block_rank, lane, ld1_nc_if, ld4_nc, ld4_nc_if, ld8_nc_if, ld8_shared, ld16_nc, num_blocks, num_threads,
                   shared, st1, st4, st8, st8_shared, st16, syncthreads, syncwarp, thread_rank, udiv, warp_size)

SCALE_BYTES = 0                                 # of a row's scales; 0 where none travel
SCALE_ITEM = 4                                  # of what a lane moves of them at a time: 1, 2 or 4
SOURCES = 1                                     # 1: the source token travels; 0: a cached dispatch, its receiver knows
PART_BYTES = 16                                 # of a row that a warp takes at a time
SECTIONS = 5                                    # kinds of data in a slab, see pyep.layout.Rows


# ---- where rows go ---------------------------------------------------------------------------------------------------
# Shared memory of a block: `destinations` [R][SECTIONS], where this rank's first row on a rank goes; a list for each warp.

def destination(rank, section):
    return shared() + 8 * (rank * SECTIONS + section)


def item_bytes(section):
    """What a section has for each row."""
    if section == ROW:
        return ROW_BYTES
    if section == SOURCE:
        return 4
    if section == TOPK_IDX:
        return 8 * TOPK
    return 4 * TOPK if section == TOPK_WEIGHTS else SCALE_BYTES


def tell_places(watch, me, recv_x, recv_sources, recv_topk_idx, recv_topk_weights, recv_scales):
    """Tell all ranks where this one wants the sections."""
    tell_place(watch, me, ROW, recv_x)
    tell_place(watch, me, SOURCE, recv_sources)
    tell_place(watch, me, TOPK_IDX, recv_topk_idx)
    tell_place(watch, me, TOPK_WEIGHTS, recv_topk_weights)
    tell_place(watch, me, SCALES, recv_scales)


def skip_lower_ranks(me, rank_prefix):
    """From where a rank wants a section to where this rank's first row of it goes: behind those of lower ranks."""
    i = thread_rank()
    while i < RANKS * SECTIONS and me > 0:
        rank = udiv(i, SECTIONS)
        section = i - rank * SECTIONS
        rows = ld4_nc(rank_prefix + 4 * ((me - 1) * RANKS + rank))
        st8_shared(destination(rank, section), ld8_shared(destination(rank, section)) + rows * item_bytes(section))
        i += num_threads()
    syncthreads()


def list_destinations(entries, me, token, num_tokens, send_rows):
    """One warp lists where a token goes, the next rank first, two words each: the address of the row; the rank and, above it, the
    number of the row among this rank's rows there.  Returns how many."""
    count = 0
    first = 0
    while first < RANKS:
        i = first + lane()
        rank = after(me, i + 1 if i < RANKS else 0)
        row = ld4_nc_if(send_rows + 4 * (token * RANKS + rank), i < RANKS)
        hit = i < RANKS and row >= 0
        address = ld8_shared(destination(rank, ROW)) + row * ROW_BYTES
        count = add_entry(entries, count, hit, address, row << 32 | rank)
        first += warp_size()
    syncwarp()
    return count


# ---- send ------------------------------------------------------------------------------------------------------------

def copy_four(entries, end, row, offset, step):
    """A lane's share of four slices of a row to all listed addresses.  All loads are under way before the first store."""
    value0, value1 = ld16_nc(row + offset), ld16_nc(row + offset + step)
    value2, value3 = ld16_nc(row + offset + 2 * step), ld16_nc(row + offset + 3 * step)
    while entries < end:
        to = ld8_shared(entries) + offset
        st16(to, value0)
        st16(to + step, value1)
        st16(to + 2 * step, value2)
        st16(to + 3 * step, value3)
        entries += 16


def copy_rest(entries, end, row, offset, step, last):
    """The same of what is left up to `last`."""
    value0, value1, value2, value3 = load_four(row, offset, step, last)
    while entries < end:
        to = ld8_shared(entries) + offset
        if offset < last:
            st16(to, value0)
        if offset + step < last:
            st16(to + step, value1)
        if offset + 2 * step < last:
            st16(to + 2 * step, value2)
        if offset + 3 * step < last:
            st16(to + 3 * step, value3)
        entries += 16


def send_part(entries, end, row, first, last):
    """One warp copies the bytes from `first` up to `last` of a row to all listed addresses.  A *slice* is what it moves with one
    load of every lane."""
    step = 16 * warp_size()
    while first + 4 * step <= last:
        copy_four(entries, end, row, first + 16 * lane(), step)
        first += 4 * step
    if first < last:
        copy_rest(entries, end, row, first + 16 * lane(), step, last)


def item(entry, section, nbytes):
    """Where a listed row has its item of a section."""
    word = ld8_shared(entry + 8)
    return ld8_shared(destination(word & 0xFFFFFFFF, section)) + (word >> 32) * nbytes


def look_at_selection(topk_idx, topk_weights, token, k):
    """The expert of a selection and the bits of its weight; zeros from TOPK on."""
    at, exists = token * TOPK + k, k < TOPK
    expert = ld8_nc_if(topk_idx + 8 * at, exists) if INDEX_BYTES == 8 else ld4_nc_if(topk_idx + 4 * at, exists)
    return expert, ld4_nc_if(topk_weights + 4 * at, exists) if WEIGHTED else 0


def send_selections(entries, end, watch, me, token, topk_idx, topk_weights, expert, weight):
    """A token's selections to every rank that it goes to, a lane a k: that rank's own number of the expert and its weight; -1 and 0
    where it is another rank's.  expert, weight: of the lane's first one."""
    k = lane()
    while k < TOPK:
        if expert < -1 or expert >= EXPERTS:
            refuse(watch, me, BAD_SELECTION, me, token, expert)
        entry = entries
        while entry < end:
            local = expert - (ld8_shared(entry + 8) & 0xFFFFFFFF) * LOCAL_EXPERTS
            here = local >= 0 and local < LOCAL_EXPERTS
            st8(item(entry, TOPK_IDX, 8 * TOPK) + 8 * k, local if here else -1)
            if WEIGHTED:
                st4(item(entry, TOPK_WEIGHTS, 4 * TOPK) + 4 * k, weight if here else 0)
            entry += 16
        k += warp_size()
        expert, weight = look_at_selection(topk_idx, topk_weights, token, k)


def load_scale(scales, offset, stride):
    """The item of a token's scales that comes to lie at `offset`; 0 from SCALE_BYTES on."""
    at, exists = scales + udiv(offset, SCALE_ITEM) * stride, offset < SCALE_BYTES
    if SCALE_ITEM == 4:
        return ld4_nc_if(at, exists)
    low = ld1_nc_if(at, exists)
    return low | ld1_nc_if(at + 1, exists) << 8 if SCALE_ITEM == 2 else low


def store_scale(to, scale):
    if SCALE_ITEM == 4:
        st4(to, scale)
    else:
        st1(to, scale)
        if SCALE_ITEM == 2:
            st1(to + 1, scale >> 8)


def send_scales(entries, end, scales, stride, scale):
    """A token's scales to every rank that it goes to, a lane an item.  They may lie apart, and arrive one after another.  Words are
    loaded ahead, `scale` is the lane's first one; smaller items would take too many registers."""
    offset = SCALE_ITEM * lane()
    while offset < SCALE_BYTES:
        if SCALE_ITEM != 4:
            scale = load_scale(scales, offset, stride)
        entry = entries
        while entry < end:
            store_scale(item(entry, SCALES, SCALE_BYTES) + offset, scale)
            entry += 16
        offset += SCALE_ITEM * warp_size()
        if SCALE_ITEM == 4:
            scale = load_scale(scales, offset, stride)


def send_source(entries, count, token):
    """Which token it is, to every rank that it goes to, a lane a rank."""
    i = lane()
    while i < count:
        st4(item(entries + 16 * i, SOURCE, 4), token)
        i += warp_size()


def send_tokens(watch, me, x, x_stride, scales, scales_stride, scale_stride, topk_idx, topk_weights, num_tokens, send_rows):
    """A warp takes a part of a token's row at a time, all blocks side by side: they end together though tokens have more and less
    to send.  With the last part goes what is beside the row; it is loaded before the warp waits for anything."""
    parts = udiv(ROW_BYTES + PART_BYTES - 1, PART_BYTES)
    entries = shared() + 8 * RANKS * SECTIONS + list_bytes(RANKS) * warp_rank()
    unit = block_rank() + num_blocks() * warp_rank()
    while unit < num_tokens * parts:
        token = udiv(unit, parts)
        first = (unit - token * parts) * PART_BYTES
        is_last = first + PART_BYTES >= ROW_BYTES
        expert, weight = look_at_selection(topk_idx, topk_weights, token, lane() if is_last else TOPK)
        scale_at = scales + token * scales_stride
        scale = load_scale(scale_at, 4 * lane() if is_last else SCALE_BYTES, scale_stride) if SCALE_ITEM == 4 else 0
        count = list_destinations(entries, me, token, num_tokens, send_rows)
        end = entries + 16 * count
        if count > 0:
            send_part(entries, end, x + token * x_stride, first, ROW_BYTES if is_last else first + PART_BYTES)
        if is_last and count > 0:
            if SOURCES:
                send_source(entries, count, token)
            send_scales(entries, end, scale_at, scale_stride, scale)
            send_selections(entries, end, watch, me, token, topk_idx, topk_weights, expert, weight)
        syncwarp()
        unit += num_blocks() * num_warps()


# ---- receive ---------------------------------------------------------------------------------------------------------

def clear_tail(me, rank_prefix, room, recv_topk_idx, recv_topk_weights):
    """Where there is room for more rows than have come (num_worst_tokens), the others select nothing."""
    i = ld4_nc(rank_prefix + 4 * ((RANKS - 1) * RANKS + me)) * TOPK + block_rank() * num_threads() + thread_rank()
    while i < room * TOPK:
        st8(recv_topk_idx + 8 * i, -1)
        if WEIGHTED:
            st4(recv_topk_weights + 4 * i, 0)
        i += num_blocks() * num_threads()


# ---- the kernel ------------------------------------------------------------------------------------------------------

def dispatch(base, me, timeout, operation, x, x_stride, scales, scales_stride, scale_stride, topk_idx, topk_weights, num_tokens,
             rank_prefix, send_rows, room, recv_x, recv_sources, recv_topk_idx, recv_topk_weights, recv_scales):
    """The kernel.  operation: see `tell_operation`; x [T, ROW_BYTES], a row every x_stride bytes; scales: of a token every
    scales_stride bytes, its items every scale_stride; topk_idx [T, K], topk_weights [T, K] fp32: 0 where there is none.
    rank_prefix and send_rows as `notify` has left them.  recv_*: where this rank wants the sections, for `room` rows."""
    watch = enter(base, timeout)
    tell_places(watch, me, recv_x, recv_sources, recv_topk_idx, recv_topk_weights, recv_scales)
    if block_rank() == 0:
        tell_operation(watch, me, operation)
    if wait_places(watch, DISPATCH_PLACE, me, operation, SECTIONS, shared()) != 0:
        skip_lower_ranks(me, rank_prefix)
        send_tokens(watch, me, x, x_stride, scales, scales_stride, scale_stride, topk_idx, topk_weights, num_tokens, send_rows)
        clear_tail(me, rank_prefix, room, recv_topk_idx, recv_topk_weights)
    finish(watch, DISPATCH_DONE, me)
