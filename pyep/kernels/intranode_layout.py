"""The layout of a dispatch, from the experts that this rank's tokens select: how many go where.  No other rank takes part.

Each block counts its own tokens in shared memory and leaves the counts for the block that is done last, which adds them up: so
nothing must be cleared before, and there is one launch.
"""
from ..channels.memory import next_epoch, refuse
from .basics import expert_at, start
from .intranode import BAD_SELECTION, EXPERTS, HT_EPOCH, LOCAL_EXPERTS, RANKS, TOPK, is_last_block
from .lang import (add4_shared, block_rank, ld4_relaxed_if, ld4_shared, ld8, num_blocks, num_threads, shared, st1, st4, st4_shared,
                   syncthreads, thread_rank, udiv)


def groups():
    """What is counted: selections of each expert, then tokens for each rank."""
    return EXPERTS + RANKS


def clear_counts():
    """No counts yet in shared memory; the block meets."""
    i = thread_rank()
    while i < groups():
        st4_shared(shared() + 4 * i, 0)
        i += num_threads()
    syncthreads()


def is_for(topk_idx, token, rank):
    """1 if a token selects an expert of a rank, else 0.  Without a branch: all loads are under way at once."""
    hit = 0
    for k in range(TOPK):
        local = expert_at(topk_idx, token * TOPK + k) - rank * LOCAL_EXPERTS
        hit |= 1 if local >= 0 and local < LOCAL_EXPERTS else 0
    return hit


def count_selections(watch, me, topk_idx, num_tokens):
    """A thread a selection."""
    i = block_rank() * num_threads() + thread_rank()
    while i < num_tokens * TOPK:
        expert = expert_at(topk_idx, i)
        if expert < -1 or expert >= EXPERTS:
            refuse(watch, me, BAD_SELECTION, me, udiv(i, TOPK), expert)
        elif expert >= 0:
            add4_shared(shared() + 4 * expert, 1)
        i += num_blocks() * num_threads()


def mark_tokens(topk_idx, num_tokens, is_token_in_rank):
    """A thread a (token, rank)."""
    i = block_rank() * num_threads() + thread_rank()
    while i < num_tokens * RANKS:
        token = udiv(i, RANKS)
        rank = i - token * RANKS
        hit = is_for(topk_idx, token, rank)
        st1(is_token_in_rank + i, hit)
        if hit != 0:
            add4_shared(shared() + 4 * (EXPERTS + rank), 1)
        i += num_blocks() * num_threads()


def leave_counts(counts):
    """This block's counts, for the last one."""
    syncthreads()
    i = thread_rank()
    while i < groups():
        st4(counts + 4 * (block_rank() * groups() + i), ld4_shared(shared() + 4 * i))
        i += num_threads()


def count_of(counts, block, group):
    """What a block has counted; 0 past the last block."""
    return ld4_relaxed_if(counts + 4 * (block * groups() + group), block < num_blocks())


def add_up(counts, num_tokens_per_rank, num_tokens_per_expert):
    """The sums over all blocks.  Four loads of a thread are under way at once."""
    group = thread_rank()
    while group < groups():
        total = 0
        block = 0
        while block < num_blocks():
            count0, count1 = count_of(counts, block, group), count_of(counts, block + 1, group)
            count2, count3 = count_of(counts, block + 2, group), count_of(counts, block + 3, group)
            total += count0 + count1 + count2 + count3
            block += 4
        if group < EXPERTS:
            st4(num_tokens_per_expert + 4 * group, total)
        else:
            st4(num_tokens_per_rank + 4 * (group - EXPERTS), total)
        group += num_threads()


def layout(base, me, topk_idx, num_tokens, counts, num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank):
    """The kernel.  topk_idx [T, K]; counts: [blocks, E + R] int32 to work in; the results as `get_dispatch_layout` returns them."""
    start()
    clear_counts()
    count_selections((base, 0, next_epoch(ld8(base + HT_EPOCH))), me, topk_idx, num_tokens)
    mark_tokens(topk_idx, num_tokens, is_token_in_rank)
    leave_counts(counts)
    if is_last_block(base):
        add_up(counts, num_tokens_per_rank, num_tokens_per_expert)
