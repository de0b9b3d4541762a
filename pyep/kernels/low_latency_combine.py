"""Low-latency combine (BF16, direct), for any number of ranks, blocks and threads.

An expert's rank sends the output for (token, k) to the token's rank, which sums them in k order.
"""
from ..channels.memory import peer, report, take16, wait_count
from .lang import (ballot, block_rank, f32_of, fma8, lane, ld16_nc, ld16_relaxed, ld16_relaxed_if, ld4_nc, ld8, ld8_nc,
                   ld8_shared, num_blocks, num_threads, popc, present, shared, st16, st16_relaxed, st8_shared, syncthreads,
                   thread_rank, to_bf16, udiv, umod, warp_size, zeros)
from .low_latency import (COMBINE, COMBINE_BEGUN, COMBINE_CONSUMED, COMBINE_OUTPUT, LOCAL_EXPERTS, MAX_TOKENS,
                          OTHER_OPERATION, RANKS, RECEIVERS, ROW_BYTES, SENDERS, TOPK, after, begin, count_slot, end_epoch,
                          expert_at, half_of, lanes_before, num_warps, tell_begun, this_epoch, warp_rank)

NOT_ADDED = -(1 << 63)                          # the sign bit: see list_outputs


def send_outputs(part, parts, watch, me, half, y, row_of, source_tokens):
    """The output of every row this rank received, back to the slot of its (token, k) on the token's rank."""
    base, _, _ = watch
    unit = part
    while unit < MAX_TOKENS * RANKS:
        token = udiv(unit, RANKS)
        source = after(me, umod(unit, RANKS) + 1)
        if token < ld8(source_tokens + 8 * source):
            for k in range(TOPK):
                row = ld8_nc(row_of + 8 * ((source * MAX_TOKENS + token) * TOPK + k))
                if row >= 0:
                    slot = peer(base, source) + half + (token * TOPK + k) * ROW_BYTES
                    offset = 16 * thread_rank()
                    while offset < ROW_BYTES:
                        st16_relaxed(slot + offset, present(ld16_nc(y + row * ROW_BYTES + offset)))
                        offset += 16 * num_threads()
        unit += parts


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
        expert = ld8_nc(selected + 8 * selection) if k < TOPK else -1
        hits = ballot(1 if expert >= 0 else 0)
        if expert >= 0:
            entry = entries + 16 * (count + lanes_before(hits))
            word = udiv(expert, LOCAL_EXPERTS) << 32 | ld4_nc(topk_weights + 4 * selection) & 0xFFFFFFFF
            st8_shared(entry, half_start + selection * ROW_BYTES)
            st8_shared(entry + 8, word if expert_at(topk_idx, selection) >= 0 else word | NOT_ADDED)
        count += popc(hits)
        first += warp_size()
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
    """out[t] = bf16(sum over k, in order, of weight * output), in fp32 fma.  A warp lists a token's outputs, then the block
    sums the warps' tokens."""
    base, _, _ = watch
    stride = 8 + 16 * align4(TOPK)                               # per warp: count, entries; looks may run past the last one
    warps, warp = num_warps(), warp_rank()
    first = part
    while first < num_tokens:
        token = first + warp * parts
        count = 0
        if token < num_tokens:
            count = list_outputs(shared() + warp * stride + 8, base + half, topk_idx, topk_weights, selected, token)
        if lane() == 0:
            st8_shared(shared() + warp * stride, count)
        syncthreads()
        slot = shared()
        while first < num_tokens and slot < shared() + warps * stride:
            count = ld8_shared(slot)
            offset = 16 * thread_rank()
            while offset < ROW_BYTES:
                st16(out + first * ROW_BYTES + offset, to_bf16(sum_listed(slot + 8, count, watch, offset)))
                offset += 16 * num_threads()
            slot += stride
            first += parts
        syncthreads()


def align4(n):
    return (n + 3) & -4


def wait_for_all(part, watch):
    """One block makes sure that every rank has begun this operation, also those that have nothing for this rank."""
    base, _, epoch = watch
    rank = thread_rank()
    while rank < RANKS and part == 0:
        begun = wait_count(watch, COMBINE_BEGUN, rank, count_slot(base, epoch, rank))
        if begun != COMBINE:
            report(watch, OTHER_OPERATION, rank, base, COMBINE, begun)
        rank += num_threads()


def combine(base, me, half_bytes, timeout, lag, y, topk_idx, topk_weights, num_tokens, row_of, source_tokens, selected,
            out):
    """The kernel.  y [L, R*M, H] bf16; row_of, source_tokens and selected as `dispatch` left them; out [T, H] bf16."""
    epoch = this_epoch(base, lag)
    watch = (base, timeout, epoch)
    half = half_of(epoch, half_bytes)
    sender, receiver = block_rank(), block_rank() - num_blocks() + RECEIVERS
    if SENDERS > 0:
        if begin(watch, COMBINE_CONSUMED, me, lag) != 0 and sender < SENDERS:
            tell_begun(sender, watch, me, COMBINE)
            send_outputs(sender, SENDERS, watch, me, half, y, row_of, source_tokens)
    if RECEIVERS > 0:
        if receiver >= 0:
            wait_for_all(receiver, watch)
            sum_outputs(receiver, RECEIVERS, watch, half, topk_idx, topk_weights, selected, num_tokens, out)
    end_epoch(base, epoch)
