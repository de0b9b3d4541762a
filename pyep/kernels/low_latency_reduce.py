"""Low-latency combine, rank-reduced, for any number of ranks, blocks and threads.

Each rank first sums what its own experts made of a token, weighted, and rounds that to bf16: one row travels per (rank, token),
not one per selection.  The token's rank adds these *partials* in rank order.  In the rank-major layout the caller has summed and
weighted already, and the partials are the rows of y.
"""
from ..channels.memory import peer, take16
from .lang import (absence, f32_of, fma8, lane, ld16_nc, ld16_nc_if, ld16_relaxed_if, ld4_nc_if, ld8_nc, ld8_shared, present,
                   shared, st16, st16_relaxed, syncwarp, to_bf16, udiv, warp_size, zeros)
from .low_latency import (COMBINE, COMBINE_CONSUMED, COMBINE_PARTIAL, MAX_TOKENS, RANK_MAJOR, RANKS, RECEIVERS, ROW_BYTES,
                          SENDERS, TOPK, begin, end_epoch, enter, num_warps, selects, tell_begun, warp_rank)
from .low_latency_units import (add_entry, first_unit, list_bytes, list_rows, reads_own_y, slice_bytes, slice_offset, slices,
                                source_of, token_of, travels, units, wait_for_all)

ONE = 0x3F800000                                # 1.0 as bits of fp32


def rows_bytes():
    """Of a warp's list of rows; that of partials is behind it."""
    return 16 if RANK_MAJOR else list_bytes(TOPK)


# ---- partials --------------------------------------------------------------------------------------------------------

def list_own(rows, me, token, y, row_of, weight_of):
    """One warp lists the rows that this rank's own partial of a token is the sum of; returns how many."""
    if not RANK_MAJOR:
        return list_rows(rows, me, token, 1, y, row_of, weight_of)
    row = ld8_nc(row_of + 8 * (me * MAX_TOKENS + token))
    count = add_entry(rows, 0, lane() == 0 and row >= 0, y + row * ROW_BYTES, ONE)
    syncwarp()
    return count


def partial(rows, count, offset):
    """16 bytes of the partial of listed rows: bf16(sum of weight * row), fp32 fma in order.  Four loads are under way at once."""
    if RANK_MAJOR:
        return ld16_nc(ld8_shared(rows) + offset)
    total = zeros()
    i = 0
    while i < count:
        entry = rows + 16 * i
        value0 = ld16_nc(ld8_shared(entry) + offset)
        value1 = ld16_nc_if(ld8_shared(entry + 16) + offset, i + 1 < count)
        value2 = ld16_nc_if(ld8_shared(entry + 32) + offset, i + 2 < count)
        value3 = ld16_nc_if(ld8_shared(entry + 48) + offset, i + 3 < count)
        total = fma8(value0, f32_of(ld8_shared(entry + 8)), total)
        if i + 1 < count:
            total = fma8(value1, f32_of(ld8_shared(entry + 24)), total)
        if i + 2 < count:
            total = fma8(value2, f32_of(ld8_shared(entry + 40)), total)
        if i + 3 < count:
            total = fma8(value3, f32_of(ld8_shared(entry + 56)), total)
        i += 4
    return to_bf16(total)


# ---- send ------------------------------------------------------------------------------------------------------------

def send_partials(part, parts, watch, me, lag, half, y, row_of, weight_of, sent):
    """The partial of every token that has rows here, to slot [me][token] on the token's rank."""
    base, _, _ = watch
    rows = shared() + warp_rank() * (rows_bytes() + list_bytes(RANKS))
    unit = first_unit(part, parts)
    count = list_rows(rows, source_of(unit, me), token_of(unit), travels(unit, me, sent), y, row_of, weight_of)
    if begin(watch, COMBINE_CONSUMED, me, lag) == 0:
        return
    tell_begun(part, watch, me, COMBINE)
    while unit < units():
        slot = peer(base, source_of(unit, me)) + half + (me * MAX_TOKENS + token_of(unit)) * ROW_BYTES
        offset = slice_offset(unit)
        end = offset + slice_bytes()
        while offset < end and offset < ROW_BYTES and count > 0:
            st16_relaxed(slot + offset, present(partial(rows, count, offset)))
            offset += 16 * warp_size()
        syncwarp()
        unit += parts * num_warps()
        count = list_rows(rows, source_of(unit, me), token_of(unit), travels(unit, me, sent), y, row_of, weight_of)


def send_rows(part, parts, watch, me, lag, half, y, src_info, sent):
    """Rank-major: every row of y to slot [me][its token] on the token's rank.  What a lane stores it loads before it knows whether
    and where to."""
    base, _, _ = watch
    unit = first_unit(part, parts)
    row = source_of(unit, me) * MAX_TOKENS + token_of(unit)
    offset = slice_offset(unit)
    value = ld16_nc_if(y + row * ROW_BYTES + offset, unit < units() and offset < ROW_BYTES)
    token = ld4_nc_if(src_info + 4 * row, unit < units())
    wanted = travels(unit, me, sent)
    if begin(watch, COMBINE_CONSUMED, me, lag) == 0:
        return
    tell_begun(part, watch, me, COMBINE)
    while unit < units():
        slot = peer(base, source_of(unit, me)) + half + (me * MAX_TOKENS + token) * ROW_BYTES
        end = offset + slice_bytes()
        while offset < end and offset < ROW_BYTES and wanted:
            st16_relaxed(slot + offset, present(value))
            offset += 16 * warp_size()
            value = ld16_nc_if(y + row * ROW_BYTES + offset, offset < end and offset < ROW_BYTES)
        unit += parts * num_warps()
        row = source_of(unit, me) * MAX_TOKENS + token_of(unit)
        offset = slice_offset(unit)
        value = ld16_nc_if(y + row * ROW_BYTES + offset, unit < units() and offset < ROW_BYTES)
        token = ld4_nc_if(src_info + 4 * row, unit < units())
        wanted = travels(unit, me, sent)


# ---- receive ---------------------------------------------------------------------------------------------------------

def list_partials(entries, half_start, selected, token):
    """One warp lists a token's partials in rank order, two words each: slot, rank.  Returns how many.  A lane for each rank."""
    count = 0
    first = 0
    while first < RANKS:
        rank = first + lane()
        hit = selects(selected, 8, token, rank) != 0
        count = add_entry(entries, count, hit, half_start + (rank * MAX_TOKENS + token) * ROW_BYTES, rank)
        first += warp_size()
    syncwarp()
    return count


def look_at(entry, offset, me, wanted):
    """A first look at a listed partial, unless it is this rank's own and need not travel."""
    return ld16_relaxed_if(ld8_shared(entry) + offset, wanted and not (reads_own_y() and ld8_shared(entry + 8) == me))


def add_partial(total, look, own, watch, me, entry, offset):
    """Add one listed partial to the sum, once it is there; `own`: this rank's own, if that need not travel."""
    rank = ld8_shared(entry + 8)
    if reads_own_y() and rank == me:
        return fma8(own, f32_of(ONE), total)
    return fma8(take16(look, watch, COMBINE_PARTIAL, rank, ld8_shared(entry) + offset), f32_of(ONE), total)


def sum_partials(entries, count, rows, num_rows, watch, me, offset):
    """Sum 16 bytes of all listed partials, in order.  First looks at four are under way while this rank's own is made."""
    total, own = zeros(), absence()
    i = 0
    while i < count:
        entry = entries + 16 * i
        look0 = look_at(entry, offset, me, 1)
        look1 = look_at(entry + 16, offset, me, i + 1 < count)
        look2 = look_at(entry + 32, offset, me, i + 2 < count)
        look3 = look_at(entry + 48, offset, me, i + 3 < count)
        if i == 0 and num_rows > 0:
            own = partial(rows, num_rows, offset)
        total = add_partial(total, look0, own, watch, me, entry, offset)
        if i + 1 < count:
            total = add_partial(total, look1, own, watch, me, entry + 16, offset)
        if i + 2 < count:
            total = add_partial(total, look2, own, watch, me, entry + 32, offset)
        if i + 3 < count:
            total = add_partial(total, look3, own, watch, me, entry + 48, offset)
        i += 4
    return total


def receive_partials(part, parts, watch, me, half, y, row_of, weight_of, selected, num_tokens, out):
    """out[t] = bf16(sum of the token's partials, in rank order), in fp32; a warp a slice."""
    base, _, _ = watch
    rows = shared() + warp_rank() * (rows_bytes() + list_bytes(RANKS))
    entries = rows + rows_bytes()
    unit = first_unit(part, parts)
    while unit < num_tokens * slices():
        token = udiv(unit, slices())
        num_rows = list_own(rows, me, token, y, row_of, weight_of) if reads_own_y() else 0
        count = list_partials(entries, base + half, selected, token)
        offset = slice_offset(unit)
        end = offset + slice_bytes()
        while offset < end and offset < ROW_BYTES:
            st16(out + token * ROW_BYTES + offset, to_bf16(sum_partials(entries, count, rows, num_rows, watch, me, offset)))
            offset += 16 * warp_size()
        syncwarp()
        unit += parts * num_warps()


# ---- the kernel ------------------------------------------------------------------------------------------------------

def combine_reduced(base, me, half_bytes, timeout, lag, y, num_tokens, wait_stats, row_of, weight_of, src_info, sent, selected,
                    out):
    """The kernel.  y [L, R*M, H] bf16, in the rank-major layout [R, M, H]; row_of, weight_of, src_info, sent and selected as
    `dispatch` left them; out [T, H] bf16."""
    watch, half, sender, receiver = enter(base, lag, half_bytes, timeout)
    if SENDERS > 0:
        if RANK_MAJOR and sender < SENDERS:
            send_rows(sender, SENDERS, watch, me, lag, half, y, src_info, sent)
        elif sender < SENDERS:
            send_partials(sender, SENDERS, watch, me, lag, half, y, row_of, weight_of, sent)
    if RECEIVERS > 0:
        if receiver >= 0:
            wait_for_all(receiver, RECEIVERS, watch, wait_stats)
            receive_partials(receiver, RECEIVERS, watch, me, half, y, row_of, weight_of, selected, num_tokens, out)
    end_epoch(base, watch[2])
