"""A low-latency dispatch that is *void*: a rank selects an expert that does not exist, or one for more rows than it has room for.

The rank knows before it sends, and tells all with the word that says that it has begun.  The dispatch runs to its end on every rank
all the same, with such selections left out or cut off, so that each slot is as it was before; then every host raises the same error
for it, and the next operation finds nothing amiss.

On the CPU engine the host looks at topk_idx before it launches, so there this is reached only with that look left out.
"""
from ..channels.memory import VOID_OPERATION, VOID_REASON
from .basics import expert_at
from .lang import (add4_shared, ld4_shared, ld8, num_threads, st4_shared, st8_relaxed, syncthreads, syncthreads_or, thread_rank,
                   udiv, umod)
from .low_latency import EXPERTS, RANK_MAJOR, STATUS, TOPK, VOID
from .op import rare

BAD_EXPERT, NO_ROOM = 1, 2                      # reasons


def tell_host(base, word, value):
    """Store a word for the host.  Threads that have different things to say may overwrite each other: one of them is enough."""
    st8_relaxed(ld8(base + STATUS) + 8 * word, value)


def tell_void(watch, source):
    """Tell this rank's host that a source has told that its dispatch is void."""
    base, _, epoch = watch
    tell_host(base, VOID_OPERATION, epoch << 32 | source + 1)


def may_be_void(topk_idx, num_tokens):
    """A first look by one block at all selections: 1 if one of this thread's names no expert, or the same as another of its token.

    Without the latter no expert can get more rows than there are tokens.  All loads of a selection are under way at once.
    """
    odd = 0
    i = thread_rank()
    while i < num_tokens * TOPK:
        expert, first, same = expert_at(topk_idx, i), i - umod(i, TOPK), 0
        for k in range(TOPK):
            same += 1 if expert_at(topk_idx, first + k) == expert else 0
        odd |= expert < -1 or expert >= EXPERTS or (expert >= 0 and same > 1)
        i += num_threads()
    return 1 if odd else 0


@rare
def void(counts, watch, topk_idx, num_tokens, max_tokens):
    """The block takes the closer look: VOID if the dispatch is, else 0.  counts: shared memory for 4 bytes an expert.

    One of those who find out tells the host why: the reason, the token (of BAD_EXPERT), 32 bits of the expert.
    """
    base, _, _ = watch
    i, why = thread_rank(), 0
    while i < EXPERTS:
        st4_shared(counts + 4 * i, 0)
        i += num_threads()
    syncthreads()
    i = thread_rank()
    while i < num_tokens * TOPK:
        expert = expert_at(topk_idx, i)
        if expert < -1 or expert >= EXPERTS:
            why = BAD_EXPERT << 56 | udiv(i, TOPK) << 32 | expert & 0xFFFFFFFF
        elif expert >= 0:
            add4_shared(counts + 4 * expert, 1)
        i += num_threads()
    syncthreads()
    i = thread_rank()
    while i < EXPERTS and not RANK_MAJOR:
        if ld4_shared(counts + 4 * i) > max_tokens:
            why = NO_ROOM << 56 | i
        i += num_threads()
    if why != 0:
        tell_host(base, VOID_REASON, why)
    return VOID if syncthreads_or(1 if why != 0 else 0) != 0 else 0
