"""Low-latency combine, direct, for any number of ranks, blocks and threads.

An expert's rank sends the output for (token, k) to the token's rank, which sums them in k order.
"""
from ..channels.memory import peer, report, take16
from .lang import (f32_of, fma8, lane, ld16_nc, ld16_nc_if, ld16_relaxed, ld16_relaxed_if, ld4_nc_if, ld8_nc, ld8_nc_if,
                   ld8_shared, num_threads, present, shared, st16, st16_relaxed, syncwarp, thread_rank, to_bf16, udiv, umod,
                   warp_size, zeros)
from .low_latency import (COMBINE, COMBINE_BEGUN, COMBINE_CONSUMED, COMBINE_OUTPUT, INDEX_BYTES, LOCAL_EXPERTS, MAX_TOKENS,
                          OTHER_OPERATION, RANKS, RECEIVERS, ROW_BYTES, SENDERS, TOPK, add_entry, after, begin, end_epoch,
                          enter, first_unit, num_warps, slice_bytes, slice_offset, slices, tell_begun, wait_begun, warp_rank)

NOT_ADDED = -(1 << 63)                          # the sign bit: see list_outputs


def list_bytes():
    """Of a warp's list in shared memory: two words for each k; looks may run past the last one."""
    return 16 * ((TOPK + 3) & -4)


# ---- send ------------------------------------------------------------------------------------------------------------

def list_rows(entries, unit, me, y, row_of, sent):
    """One warp lists the rows of y that a unit's token got, two words each: address, k.  Returns how many; 0 past the last unit."""
    pair = udiv(unit, slices(ROW_BYTES))
    token, source = udiv(pair, RANKS), after(me, umod(pair, RANKS) + 1)
    tokens = ld8_nc(sent + 8 * source)
    count = 0
    first = 0
    while first < TOPK:
        k = first + lane()
        row = ld8_nc_if(row_of + 8 * ((source * MAX_TOKENS + token) * TOPK + k), k < TOPK and token < MAX_TOKENS)
        mine = k < TOPK and row >= 0 and token < tokens
        count = add_entry(entries, count, mine, y + row * ROW_BYTES, k)
        first += warp_size()
    syncwarp()
    return count


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
    """The output of every row this rank received, back to the slot of its (token, k) on the token's rank.

    A *unit* is a (token, source, slice): a warp's work.
    """
    base, _, _ = watch
    entries = shared() + warp_rank() * list_bytes()
    unit = first_unit(part, parts)
    count = list_rows(entries, unit, me, y, row_of, sent)
    if begin(watch, COMBINE_CONSUMED, me, lag) == 0:
        return
    tell_begun(part, watch, me, COMBINE)
    while unit < MAX_TOKENS * RANKS * slices(ROW_BYTES):
        pair = udiv(unit, slices(ROW_BYTES))
        token, source = udiv(pair, RANKS), after(me, umod(pair, RANKS) + 1)
        outputs = peer(base, source) + half + token * TOPK * ROW_BYTES
        offset = slice_offset(unit)
        end = offset + slice_bytes()
        while offset < end and offset < ROW_BYTES:
            copy_listed(entries, count, outputs, offset)
            offset += 16 * warp_size()
        syncwarp()
        unit += parts * num_warps()
        count = list_rows(entries, unit, me, y, row_of, sent)


# ---- receive ---------------------------------------------------------------------------------------------------------

def list_outputs(entries, half_start, topk_idx, topk_weights, selected, token):
    """One warp lists what a token is the sum of, in k order, two words each: the slot; source rank << 32 | weight.

    `selected` says what will come.  Where the caller's topk_idx has become -1 meanwhile, the second word is negative: the
    output is taken out of its slot, but not added.
    """
    count = 0
    first = 0
    while first < TOPK:
        k = first + lane()
        selection = token * TOPK + k
        expert = ld8_nc_if(selected + 8 * selection, k < TOPK)
        now = topk_idx + INDEX_BYTES * selection
        masked = ld8_nc_if(now, k < TOPK) < 0 if INDEX_BYTES == 8 else ld4_nc_if(now, k < TOPK) < 0
        weight = ld4_nc_if(topk_weights + 4 * selection, k < TOPK) & 0xFFFFFFFF
        word = udiv(expert, LOCAL_EXPERTS) << 32 | weight | (NOT_ADDED if masked else 0)
        count = add_entry(entries, count, k < TOPK and expert >= 0, half_start + selection * ROW_BYTES, word)
        first += warp_size()
    syncwarp()
    return count


def add_output(total, look, watch, entry, offset):
    """Add one listed output to the sum, once it is there; `look`: what a first look at it has shown."""
    word = ld8_shared(entry + 8)
    value = take16(look, watch, COMBINE_OUTPUT, (word & ~NOT_ADDED) >> 32, ld8_shared(entry) + offset)
    return fma8(value, f32_of(word), total) if word >= 0 else total


def sum_listed(entries, count, watch, offset):
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
        total = add_output(total, look0, watch, entry, offset)
        if i + 1 < count:
            total = add_output(total, look1, watch, entry + 16, offset)
        if i + 2 < count:
            total = add_output(total, look2, watch, entry + 32, offset)
        if i + 3 < count:
            total = add_output(total, look3, watch, entry + 48, offset)
        i += 4
    return total


def sum_outputs(part, parts, watch, half, topk_idx, topk_weights, selected, num_tokens, out):
    """out[t] = bf16(sum over k, in order, of weight * output), in fp32 fma; a warp a slice."""
    base, _, _ = watch
    entries = shared() + warp_rank() * list_bytes()
    unit = first_unit(part, parts)
    while unit < num_tokens * slices(ROW_BYTES):
        token = udiv(unit, slices(ROW_BYTES))
        count = list_outputs(entries, base + half, topk_idx, topk_weights, selected, token)
        offset = slice_offset(unit)
        end = offset + slice_bytes()
        while offset < end and offset < ROW_BYTES:
            st16(out + token * ROW_BYTES + offset, to_bf16(sum_listed(entries, count, watch, offset)))
            offset += 16 * warp_size()
        syncwarp()
        unit += parts * num_warps()


def wait_for_all(part, parts, watch, wait_stats):
    """One warp makes sure that every rank has begun this operation, also those that have nothing for this rank."""
    rank = num_threads() - 1 - thread_rank()                     # the last of all: it has the least to sum
    while rank < RANKS and part == parts - 1:
        begun = wait_begun(watch, COMBINE_BEGUN, rank, wait_stats)
        if begun != COMBINE:
            report(watch, OTHER_OPERATION, rank, watch[0], COMBINE, begun)
        rank += num_threads()


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
            sum_outputs(receiver, RECEIVERS, watch, half, topk_idx, topk_weights, selected, num_tokens, out)
    end_epoch(base, watch[2])
