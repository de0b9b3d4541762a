"""Low latency between port peers: how boxes travel.

The last block of a launch that is done with packing *ships*: to each port peer one put of all that its box holds, and behind it
on the same channel, so that it comes later, a put of a *flag*: two words for the peer's `consumed` slot of this rank.  The first is
the epoch that this rank has consumed, which `tell_all_consumed` stores to mapped peers; the second is the epoch of the box: it
has come.

What is put must not change until the proxy has read it.  An outbox and its flag are written again two operations later, after
`begin`: by then the peer has consumed the box, so the proxy has long read it.
"""
from ..channels.memory import previous_epoch, reached, wait_epoch
from ..channels.port import put, put_with_signal
from .basics import after
from .lang import (add8, clock_ns, fetch_add8, ld8, ld8_acquire, ld8_constant, ld8_relaxed, num_blocks, num_threads, st8,
                   syncthreads, syncthreads_or, thread_rank)
from .low_latency_boxes import (BOX_WORDS, CLAIMED, CLAIMS, PACKET_BYTES, PORTS, RANKS, UNORDERED, box_entry, is_port_peer)
from .op import rare

# Template parameters, as in `low_latency`.
PORT_HANDLES = CONSUMED = LINE = PACKED = TOLD = FLAGS = FAILED = 0            # offsets of control words; bytes


def consumed_here(epoch, lag):
    """The epoch that this rank has consumed when it begins operation `epoch`: that of the latest one read to the end.  `lag`: see
    `enter`."""
    before = previous_epoch(epoch)
    return previous_epoch(before) if lag > 0 else before


def flag_of(watch, rank):
    """The address at which the flag for a port peer is staged: two words, and behind them the word of `tell_consumed`."""
    base, _, epoch = watch
    return base + FLAGS + 32 * ((epoch & 1) * RANKS + rank)


def put_to(watch, wait, rank, dst, src, nbytes):
    """Put bytes from the address `src` to the offset `dst` of a port peer's memory; they are visible there before later puts."""
    base, _, _ = watch
    port = ld8_constant(base + PORT_HANDLES + 8 * rank)
    if PORTS == UNORDERED:
        put_with_signal(watch, wait, rank, port, dst, src - base, nbytes)        # nobody waits for the signal
    else:
        put(watch, wait, rank, port, dst, src - base, nbytes)


@rare
def tell_consumed(watch, wait, me, rank, consumed):
    """Put the epoch consumed here to a port peer, if the latest flag has told it too little: else all ranks may deadlock.

    To begin operation n, a rank waits until its peers have consumed n - 2.  Normally the flag of n - 1 has told that; but only
    n - 3 if a hook was still to be called when n - 1 was sent (`lag`).  If that is so on all ranks, each waits in `begin` for the
    next flag, which the others ship only after `begin`.  So each first tells here what it has consumed meanwhile.

    The word may be staged anew: the last time was two operations ago, which this rank has received since.  The peer had begun that
    operation, so the word had reached it.
    """
    base, _, epoch = watch
    told = base + TOLD + 8 * rank
    if not reached(ld8(told), previous_epoch(previous_epoch(epoch))):
        staged = flag_of(watch, rank) + 16
        st8(staged, consumed)
        st8(told, consumed)
        put_to(watch, wait, rank, CONSUMED + LINE * me, staged, 8)


# ---- send ------------------------------------------------------------------------------------------------------------

def is_last(base):
    """Whether this block is the last of the launch to call: then what all blocks stored before is visible to it, and to whatever
    it signals."""
    syncthreads()
    last = 0
    if thread_rank() == 0 and fetch_add8(base + PACKED, 1) == num_blocks() - 1:
        st8(base + PACKED, 0)
        last = 1
    return syncthreads_or(last)


def ship_box(watch, wait, me, rank, claimed, words, consumed):
    """Put the box for a port peer, then its flag.  claimed: packets in the box | in a dispatch, the selections they serve << 32.
    words: bytes of routes and places before them."""
    base, _, epoch = watch
    here, _, there = box_entry(watch, rank)
    st8(base + here + CLAIMED, claimed)
    put_to(watch, wait, rank, there, base + here, BOX_WORDS + words + (claimed & 0xFFFFFFFF) * PACKET_BYTES)
    flag = flag_of(watch, rank)
    st8(flag, consumed)
    st8(flag + 8, epoch)
    st8(base + TOLD + 8 * rank, consumed)
    put_to(watch, wait, rank, CONSUMED + LINE * me, flag, 16)


def ship(watch, wait, me, lag, claimed, words):
    """Every block of a launch that sends calls this when it has packed all its packets; the last one ships all boxes, the next
    rank's first.

    claimed: address of the words that `ship_box` wants, one for each rank.  words: as there.  After an error nothing is shipped: a
    block that gave up has not packed its part.
    """
    base, _, epoch = watch
    if is_last(base) != 0:
        i = 1 + thread_rank()
        while i < RANKS:
            rank = after(me, i)
            if is_port_peer(base, rank):
                if ld8_relaxed(base + FAILED) == 0:
                    ship_box(watch, wait, me, rank, ld8(claimed + 8 * rank), words, consumed_here(epoch, lag))
                st8(base + CLAIMS + 8 * rank, 0)
            i += num_threads()


# ---- receive ---------------------------------------------------------------------------------------------------------

def wait_for_box(part, watch, wait, source, waited):
    """The block waits until the box of a port peer has come, and may then read it: 1, or 0 if it never came.

    A peer that is one operation ahead may have sent its next box too, hence `reached` and not equality.  waited: 0, or the address
    of [R] int64 to which the first block adds the nanoseconds waited.
    """
    base, _, epoch = watch
    missing = 0
    if thread_rank() == 0:
        since, come = clock_ns(), base + CONSUMED + LINE * source + 8
        missing = 1 - wait_epoch(watch, wait, source, come, epoch)
        ld8_acquire(come)
        if waited != 0 and part == 0:
            add8(waited + 8 * source, clock_ns() - since)
    return 1 - syncthreads_or(missing)
