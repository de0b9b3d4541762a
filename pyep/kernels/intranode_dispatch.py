"""High-throughput dispatch inside one node, for any number of ranks, blocks and threads.

A token's row is loaded once and stored to every rank that it goes to, straight to its final address: where that rank wants the rows
of this operation, plus the rows of lower ranks, plus the number that the token has among this rank's (`send_rows`).
"""
from ..channels.memory import report
from .intranode import (BAD_SELECTION, DISPATCH_DONE, DISPATCH_PLACE, EXPERTS, LOCAL_EXPERTS, RANKS, ROW, ROW_BYTES,
                        SCALES, SOURCE, TOPK, TOPK_IDX, TOPK_WEIGHTS, WEIGHTED, enter, finish, tell_place, wait_places)
from .lang import (block_rank, lane, ld4_nc, ld4_nc_if, ld8_shared, ld16_nc, ld16_nc_if, num_blocks, num_threads, shared, st4, st8,
                   st8_shared, st16, syncthreads, syncwarp, thread_rank, udiv, warp_size)
from .low_latency import add_entry, after, expert_at, num_warps, warp_rank

SCALE_BYTES = 0                                 # of a row's scales; 0 where none travel
SOURCES = 1                                     # 1: the source token travels; 0: a cached dispatch, its receiver knows
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


def copy_rest(entries, end, row, offset, step):
    """The same of what is left of the row, if there is anything."""
    value0, value1 = ld16_nc_if(row + offset, offset < ROW_BYTES), ld16_nc_if(row + offset + step, offset + step < ROW_BYTES)
    value2 = ld16_nc_if(row + offset + 2 * step, offset + 2 * step < ROW_BYTES)
    value3 = ld16_nc_if(row + offset + 3 * step, offset + 3 * step < ROW_BYTES)
    while entries < end:
        to = ld8_shared(entries) + offset
        if offset < ROW_BYTES:
            st16(to, value0)
        if offset + step < ROW_BYTES:
            st16(to + step, value1)
        if offset + 2 * step < ROW_BYTES:
            st16(to + 2 * step, value2)
        if offset + 3 * step < ROW_BYTES:
            st16(to + 3 * step, value3)
        entries += 16


def send_row(entries, end, row):
    """One warp copies a row to all listed addresses.  A *slice* is what it moves with one load of every lane."""
    step = 16 * warp_size()
    done = 0
    while done + 4 * step <= ROW_BYTES:
        copy_four(entries, end, row, done + 16 * lane(), step)
        done += 4 * step
    if done < ROW_BYTES:
        copy_rest(entries, end, row, done + 16 * lane(), step)


def item(entry, section, nbytes):
    """Where a listed row has its item of a section."""
    word = ld8_shared(entry + 8)
    return ld8_shared(destination(word & 0xFFFFFFFF, section)) + (word >> 32) * nbytes


def send_selections(entries, end, watch, me, token, topk_idx, topk_weights):
    """A token's selections to every rank that it goes to, a lane a k: that rank's own number of the expert and its weight; -1 and 0
    where it is another rank's."""
    k = lane()
    while k < TOPK:
        expert = expert_at(topk_idx, token * TOPK + k)
        weight = 0
        if WEIGHTED:
            weight = ld4_nc(topk_weights + 4 * (token * TOPK + k))
        if expert < -1 or expert >= EXPERTS:
            report(watch, BAD_SELECTION, me, watch[0], token, expert)
        entry = entries
        while entry < end:
            local = expert - (ld8_shared(entry + 8) & 0xFFFFFFFF) * LOCAL_EXPERTS
            here = local >= 0 and local < LOCAL_EXPERTS
            st8(item(entry, TOPK_IDX, 8 * TOPK) + 8 * k, local if here else -1)
            if WEIGHTED:
                st4(item(entry, TOPK_WEIGHTS, 4 * TOPK) + 4 * k, weight if here else 0)
            entry += 16
        k += warp_size()


def send_scales(entries, end, scales):
    """A token's scales to every rank that it goes to, a lane a scale."""
    offset = 4 * lane()
    while offset < SCALE_BYTES:
        scale = ld4_nc(scales + offset)
        entry = entries
        while entry < end:
            st4(item(entry, SCALES, SCALE_BYTES) + offset, scale)
            entry += 16
        offset += 4 * warp_size()


def send_source(entries, count, token):
    """Which token it is, to every rank that it goes to, a lane a rank."""
    i = lane()
    while i < count:
        st4(item(entries + 16 * i, SOURCE, 4), token)
        i += warp_size()


def send_tokens(watch, me, x, scales, topk_idx, topk_weights, num_tokens, send_rows):
    """A warp a token, all blocks side by side: they end together though tokens have more and less to send."""
    entries = shared() + 8 * RANKS * SECTIONS + 16 * RANKS * warp_rank()
    token = block_rank() + num_blocks() * warp_rank()
    while token < num_tokens:
        count = list_destinations(entries, me, token, num_tokens, send_rows)
        end = entries + 16 * count
        if count > 0:
            send_row(entries, end, x + token * ROW_BYTES)
            if SOURCES:
                send_source(entries, count, token)
            if SCALE_BYTES > 0:
                send_scales(entries, end, scales + token * SCALE_BYTES)
            if TOPK > 0:
                send_selections(entries, end, watch, me, token, topk_idx, topk_weights)
        syncwarp()
        token += num_blocks() * num_warps()


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

def dispatch(base, me, timeout, x, scales, topk_idx, topk_weights, num_tokens, rank_prefix, send_rows, room,
             recv_x, recv_sources, recv_topk_idx, recv_topk_weights, recv_scales):
    """The kernel.  x [T, H], scales [T, H/128] fp32, topk_idx [T, K], topk_weights [T, K] fp32: 0 where there is none.
    rank_prefix and send_rows as `notify` has left them.  recv_*: sections of this rank's slab, for `room` rows."""
    watch = enter(base, timeout)
    tell_places(watch, me, recv_x, recv_sources, recv_topk_idx, recv_topk_weights, recv_scales)
    if wait_places(watch, DISPATCH_PLACE, SECTIONS, shared()) != 0:
        skip_lower_ranks(me, rank_prefix)
        send_tokens(watch, me, x, scales, topk_idx, topk_weights, num_tokens, send_rows)
        clear_tail(me, rank_prefix, room, recv_topk_idx, recv_topk_weights)
    finish(watch, DISPATCH_DONE, me)
