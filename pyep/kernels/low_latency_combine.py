"""Low-latency combine, direct, for any number of ranks, blocks and threads.

An expert's rank sends the output for (token, k) to the token's rank, which sums them in k order.
"""
from ..channels.memory import peer, take16
from .lang import (f32_of, fma8, lane, ld16_nc, ld16_nc_if, ld16_relaxed, ld16_relaxed_if, ld4_nc_if, ld8_nc_if, ld8_shared,
                   present, shared, st16, st16_relaxed, syncwarp, to_bf16, udiv, warp_size, zeros)
from .low_latency import (COMBINE, COMBINE_CONSUMED, COMBINE_OUTPUT, INDEX_BYTES, LOCAL_EXPERTS, MAX_TOKENS, RECEIVERS, ROW_BYTES,
                          SENDERS, TOPK, begin, end_epoch, enter, num_warps, tell_begun, warp_rank)
from .low_latency_units import (add_entry, first_unit, list_bytes, list_rows, reads_own_y, slice_bytes, slice_offset, slices,
                                source_of, token_of, travels, units, wait_for_all)

NOT_ADDED = -(1 << 63)                          # the sign bit: see list_outputs

# ---- send ------------------------------------------------------------------------------------------------------------

def copy_listed(entries, count, outputs, offset):
    """Copy 16 bytes of listed rows to a token's outputs.  Four loads are under way at once."""
    i = 0
    while i < count:
        entry = entries + 16 * i
        value0 = ld16_nc(ld8_shared(entry) + offset)
        value1 = ld16_nc_if(ld8_shared(entry + 16) + offset, i + 1 < count)
        value2 = ld16_nc_if(ld8_shared(entry + 32) + offset, i + 2 < count)
        value3 = ld16_nc_if(ld8_shared(entry + 48) + offset, i + 3 < count)
        st16_relaxed(outputs + ld8_shared(entry + 8) * ROW_BYTES + offset, present(value0))
        if i + 1 < count:
            st16_relaxed(outputs + ld8_shared(entry + 24) * ROW_BYTES + offset, present(value1))
        if i + 2 < count:
            st16_relaxed(outputs + ld8_shared(entry + 40) * ROW_BYTES + offset, present(value2))
        if i + 3 < count:
            st16_relaxed(outputs + ld8_shared(entry + 56) * ROW_BYTES + offset, present(value3))
        i += 4


def send_outputs(part, parts, watch, me, lag, half, y, row_of, sent):
    """The output of every row this rank received, back to the slot of its (token, k) on the token's rank."""
    base, _, _ = watch
    rows = shared() + warp_rank() * list_bytes(TOPK)
    unit = first_unit(part, parts)
    count = list_rows(rows, source_of(unit, me), token_of(unit), travels(unit, me, sent), y, row_of, 0)
    if begin(watch, COMBINE_CONSUMED, me, lag) == 0:
        return
    tell_begun(part, watch, me, COMBINE)
    while unit < units():
        outputs = peer(base, source_of(unit, me)) + half + token_of(unit) * TOPK * ROW_BYTES
        offset = slice_offset(unit)
        end = offset + slice_bytes()
        while offset < end and offset < ROW_BYTES:
            copy_listed(rows, count, outputs, offset)
            offset += 16 * warp_size()
        syncwarp()
        unit += parts * num_warps()
        count = list_rows(rows, source_of(unit, me), token_of(unit), travels(unit, me, sent), y, row_of, 0)


# ---- receive ---------------------------------------------------------------------------------------------------------

def list_outputs(entries, half_start, me, y, topk_idx, topk_weights, selected, row_of, token):
    """One warp lists what a token is the sum of, in k order, two words each: where it is; source rank << 32 | weight.

    `selected` says what will come.  Where the caller's topk_idx has become -1 meanwhile, the second word is negative: the
    output is taken out of its slot, but not added.
    """
    count = 0
    first = 0
    while first < TOPK:
        k = first + lane()
        selection = token * TOPK + k
        expert = ld8_nc_if(selected + 8 * selection, k < TOPK)
        row = ld8_nc_if(row_of + 8 * (me * MAX_TOKENS * TOPK + selection), k < TOPK and reads_own_y())
        now = topk_idx + INDEX_BYTES * selection
        masked = ld8_nc_if(now, k < TOPK) < 0 if INDEX_BYTES == 8 else ld4_nc_if(now, k < TOPK) < 0
        weight = ld4_nc_if(topk_weights + 4 * selection, k < TOPK) & 0xFFFFFFFF
        source = udiv(expert, LOCAL_EXPERTS)
        address = y + row * ROW_BYTES if reads_own_y() and source == me else half_start + selection * ROW_BYTES
        count = add_entry(entries, count, k < TOPK and expert >= 0, address, source << 32 | weight | (NOT_ADDED if masked else 0))
        first += warp_size()
    syncwarp()
    return count


def add_output(total, look, watch, me, entry, offset):
    """Add one listed output to the sum, once it is there; `look`: what a first look at it has shown."""
    word = ld8_shared(entry + 8)
    source = (word & ~NOT_ADDED) >> 32
    if not reads_own_y() or source != me:
        look = take16(look, watch, COMBINE_OUTPUT, source, ld8_shared(entry) + offset)
    return fma8(look, f32_of(word), total) if word >= 0 else total


def sum_listed(entries, count, watch, me, offset):
    """Sum 16 bytes of all listed outputs, in order.  Four first looks are under way at once: one after another, their trips to
    memory would add up."""
    total = zeros()
    i = 0
    while i < count:
        entry = entries + 16 * i
        look0 = ld16_relaxed(ld8_shared(entry) + offset)
        look1 = ld16_relaxed_if(ld8_shared(entry + 16) + offset, i + 1 < count)
        look2 = ld16_relaxed_if(ld8_shared(entry + 32) + offset, i + 2 < count)
        look3 = ld16_relaxed_if(ld8_shared(entry + 48) + offset, i + 3 < count)
        total = add_output(total, look0, watch, me, entry, offset)
        if i + 1 < count:
            total = add_output(total, look1, watch, me, entry + 16, offset)
        if i + 2 < count:
            total = add_output(total, look2, watch, me, entry + 32, offset)
        if i + 3 < count:
            total = add_output(total, look3, watch, me, entry + 48, offset)
        i += 4
    return total


def sum_outputs(part, parts, watch, me, half, y, topk_idx, topk_weights, selected, row_of, num_tokens, out):
    """out[t] = bf16(sum over k, in order, of weight * output), in fp32 fma; a warp a slice."""
    base, _, _ = watch
    entries = shared() + warp_rank() * list_bytes(TOPK)
    unit = first_unit(part, parts)
    while unit < num_tokens * slices():
        token = udiv(unit, slices())
        count = list_outputs(entries, base + half, me, y, topk_idx, topk_weights, selected, row_of, token)
        offset = slice_offset(unit)
        end = offset + slice_bytes()
        while offset < end and offset < ROW_BYTES:
            st16(out + token * ROW_BYTES + offset, to_bf16(sum_listed(entries, count, watch, me, offset)))
            offset += 16 * warp_size()
        syncwarp()
        unit += parts * num_warps()


def combine(base, me, half_bytes, timeout, lag, y, topk_idx, topk_weights, num_tokens, wait_stats, row_of, sent,
            selected, out):
    """The kernel.  y [L, R*M, H] bf16; row_of, sent and selected as `dispatch` left them; out [T, H] bf16."""
    watch, half, sender, receiver = enter(base, lag, half_bytes, timeout)
    if SENDERS > 0:
        if sender < SENDERS:
            send_outputs(sender, SENDERS, watch, me, lag, half, y, row_of, sent)
    if RECEIVERS > 0:
        if receiver >= 0:
            wait_for_all(receiver, RECEIVERS, watch, wait_stats)
            sum_outputs(receiver, RECEIVERS, watch, me, half, y, topk_idx, topk_weights, selected, row_of, num_tokens, out)
    end_epoch(base, watch[2])
