"""Low-latency combine, rank-reduced, for any number of ranks, blocks and threads.

Each rank first sums what its own experts made of a token, weighted, and rounds that to bf16: one row travels per (rank, token),
not one per selection.  The token's rank adds these *partials* in rank order.  In the rank-major layout the caller has summed and
weighted already, and the partials are the rows of y.
"""
from ..channels.memory import peer, take16
from .lang import (absence, f32_of, fma8, lane, ld16_nc, ld16_nc_if, ld16_relaxed_if, ld4_nc_if, ld8_nc, ld8_nc_if,
                   ld8_shared, present, shared, st16, st16_relaxed, syncwarp, to_bf16, udiv, umod, warp_size, zeros)
from .low_latency import (COMBINE, COMBINE_CONSUMED, COMBINE_PARTIAL, MAX_TOKENS, RANK_MAJOR, RANKS, RECEIVERS, ROW_BYTES,
                          SENDERS, TOPK, add_entry, after, begin, end_epoch, enter, first_unit, num_warps, selects,
                          slice_bytes, slice_offset, slices, tell_begun, warp_rank)
from .low_latency_combine import wait_for_all

ONE = 0x3F800000                                # 1.0 as bits of fp32


def reads_own_y():
    """Whether the receivers take this rank's own partials from y: they can while the same launch sends."""
    return SENDERS > 0 and RECEIVERS > 0


def rows_bytes():
    """Of a warp's list of rows in shared memory: two words each; looks may run past the last one."""
    return 16 if RANK_MAJOR else 16 * ((TOPK + 3) & -4)


def lists_bytes():
    """Of all lists of a warp: rows, then partials."""
    return rows_bytes() + 16 * ((RANKS + 3) & -4)


# ---- partials --------------------------------------------------------------------------------------------------------

def list_rows(rows, source, token, wanted, y, row_of, weight_of):
    """One warp lists the rows of y that a token's partial is the sum of, in k order, two words each: address, weight.  Returns how
    many; 0 unless wanted."""
    count = 0
    first = 0
    while first < (1 if RANK_MAJOR else TOPK):
        k = first + lane()
        weight = ONE
        if RANK_MAJOR:
            row = ld8_nc_if(row_of + 8 * (source * MAX_TOKENS + token), k == 0)
            hit = k == 0 and row >= 0 and wanted
        else:
            selection = (source * MAX_TOKENS + token) * TOPK + k
            row = ld8_nc_if(row_of + 8 * selection, k < TOPK and token < MAX_TOKENS)
            weight = ld4_nc_if(weight_of + 4 * selection, k < TOPK and token < MAX_TOKENS)
            hit = k < TOPK and row >= 0 and wanted
        count = add_entry(rows, count, hit, y + row * ROW_BYTES, weight)
        first += warp_size()
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

def others():
    """How many ranks a rank sends partials to: itself last, if at all."""
    return RANKS - 1 if reads_own_y() and RANKS > 1 else RANKS


# A *unit* is a (token, source, slice), in the rank-major layout a (row, source, slice): a warp's work.


def units():
    """How many there are if every token has something to send."""
    return MAX_TOKENS * others() * slices(ROW_BYTES)


def source_of(unit, me):
    """The rank that a unit goes to: where its token is from."""
    return after(me, umod(udiv(unit, slices(ROW_BYTES)), others()) + 1)


def token_of(unit):
    """A unit's token, or its row among those of its source."""
    return udiv(unit, slices(ROW_BYTES) * others())


def travels(unit, me, sent):
    """Whether a unit may have something to send."""
    source = source_of(unit, me)
    return unit < units() and token_of(unit) < ld8_nc(sent + 8 * source) and (source != me or not reads_own_y())


def send_partials(part, parts, watch, me, lag, half, y, row_of, weight_of, sent):
    """The partial of every token that has rows here, to slot [me][token] on the token's rank."""
    base, _, _ = watch
    rows = shared() + warp_rank() * lists_bytes()
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
    rows = shared() + warp_rank() * lists_bytes()
    entries = rows + rows_bytes()
    unit = first_unit(part, parts)
    while unit < num_tokens * slices(ROW_BYTES):
        token = udiv(unit, slices(ROW_BYTES))
        num_rows = list_rows(rows, me, token, 1, y, row_of, weight_of) if reads_own_y() else 0
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
