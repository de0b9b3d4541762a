"""What kernels of all families begin with: how a launch starts, the warps of a block, the lists that a warp makes."""
from .lang import (ballot, lane, ld4_nc, ld8_nc, next_kernel_may_start, num_threads, popc, previous_kernel_done, st8_shared,
                   thread_rank, udiv, warp_size)

RANKS = 0                                       # template parameters, as everywhere
INDEX_BYTES = 8                                 # of an entry of topk_idx: 4 or 8


def start():
    """The first thing in a kernel.  Its blocks may start while the kernel before it on the stream ends; the next one's while it
    ends itself: that hides what a launch costs."""
    previous_kernel_done()
    next_kernel_may_start()


def num_warps():
    """Warps in a block."""
    return udiv(num_threads(), warp_size())


def warp_rank():
    """This thread's warp in its block."""
    return udiv(thread_rank(), warp_size())


def lanes_before(bits):
    """How many of the lanes below this one are in a ballot's result: where this lane's item goes if the warp packs its items."""
    return popc(bits & ((1 << lane()) - 1))


def list_bytes(most):
    """Of a list in shared memory, two words for each of at most so many entries; it is looked at eight entries at a time."""
    return 16 * ((most + 7) & -8)


def add_entry(entries, count, hit, first, second):
    """One warp lengthens a list in shared memory by two words for every lane that has a hit; `count` with these added."""
    hits = ballot(1 if hit else 0)
    if hit:
        entry = entries + 16 * (count + lanes_before(hits))
        st8_shared(entry, first)
        st8_shared(entry + 8, second)
    return count + popc(hits)


def after(me, i):
    """The i-th rank after `me`: all ranks start their rounds at different peers."""
    rank = me + i
    return rank - RANKS if rank >= RANKS else rank


def expert_at(topk_idx, selection):
    """The expert that a selection names; negative where it selects nothing."""
    return ld8_nc(topk_idx + 8 * selection) if INDEX_BYTES == 8 else ld4_nc(topk_idx + 4 * selection)
