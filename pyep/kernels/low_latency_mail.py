"""Low latency between port peers: how boxes travel.

The last block of a launch that is done with packing *ships*: to each port peer one put of all that its box holds, and behind it
on the same channel, so that it comes later, a *record* of two words to its `consumed` slot for this rank: the epoch that was read
here to the end, which `begin` tells other ranks directly, and the epoch of the box.

What is put must stay as it is until the proxy has read it.  An outbox, and the record behind it, is written again two operations
later, after `begin`: the peer has then read the box to the end, so it has come, so it was read here.
"""
from ..channels.memory import previous_epoch, reached, wait_epoch
from ..channels.port import put, put_with_signal
from .basics import after
from .lang import (add8, clock_ns, fetch_add8, ld8, ld8_acquire, ld8_constant, ld8_relaxed, num_blocks, num_threads, st8,
                   syncthreads, syncthreads_or, thread_rank)
from .low_latency_boxes import (BOX_PACKETS, CLAIMED, CLAIMS, FINGERPRINT, PACKET_BYTES, PORTS, RANKS, UNORDERED, box_entry,
                                is_port_peer)
from .op import rare

# Template parameters, as in `low_latency`.
PORT_HANDLES = CONSUMED = LINE = PACKED = TOLD = RECORDS = FAILED = 0            # offsets of control words; bytes
SHAPE = 0                                       # the fingerprint of the shape


def consumed_here(epoch, lag):
    """The latest operation whose data this rank has read to the end when it begins this one; `lag`: see `begin`."""
    before = previous_epoch(epoch)
    return previous_epoch(before) if lag > 0 else before


def record_of(watch, rank):
    """Where the record for a port peer is staged, and behind it the word of `tell_consumed`."""
    base, _, epoch = watch
    return base + RECORDS + 32 * ((epoch & 1) * RANKS + rank)


def put_to(watch, wait, rank, dst, src, nbytes):
    """Put bytes from an address of this rank's memory to an offset in a port peer's, before whatever is put there later."""
    base, _, _ = watch
    port = ld8_constant(base + PORT_HANDLES + 8 * rank)
    if PORTS == UNORDERED:
        put_with_signal(watch, wait, rank, port, dst, src - base, nbytes)        # nobody waits for the signal
    else:
        put(watch, wait, rank, port, dst, src - base, nbytes)


@rare
def tell_consumed(watch, wait, me, rank, consumed):
    """Tell a port peer what is consumed here, if it waits for more than it was told.

    It waits for n - 2 in operation n.  The record of operation n - 1 has told it n - 2, but only n - 3 if a hook was still to be
    called then (`lag`).  If all ranks used hooks like that, each would wait in `begin` for a record that the others ship after it.
    So each first tells here what it has consumed meanwhile, and nobody waits for more than that others have begun the operation.

    The word was staged for the last time two operations ago.  This rank has received that operation since, from a peer that had
    begun it, hence had been told.
    """
    base, _, epoch = watch
    told = base + TOLD + 8 * rank
    if not reached(ld8(told), previous_epoch(previous_epoch(epoch))):
        staged = record_of(watch, rank) + 16
        st8(staged, consumed)
        st8(told, consumed)
        put_to(watch, wait, rank, CONSUMED + LINE * me, staged, 8)


# ---- send ------------------------------------------------------------------------------------------------------------

def is_last(base):
    """Whether this block is the last one to call: then what all of them stored is visible to it, and to whom it tells of it."""
    syncthreads()
    last = 0
    if thread_rank() == 0 and fetch_add8(base + PACKED, 1) == num_blocks() - 1:
        st8(base + PACKED, 0)
        last = 1
    return syncthreads_or(last)


def ship_box(watch, wait, me, rank, claimed, consumed):
    """Ship the box for a port peer, then the record.  claimed: how many packets it has, and in a dispatch the selections."""
    base, _, epoch = watch
    here, _, there = box_entry(watch, rank)
    st8(base + here + CLAIMED, claimed)
    st8(base + here + FINGERPRINT, SHAPE)
    put_to(watch, wait, rank, there, base + here, BOX_PACKETS + (claimed & 0xFFFFFFFF) * PACKET_BYTES)
    record = record_of(watch, rank)
    st8(record, consumed)
    st8(record + 8, epoch)
    st8(base + TOLD + 8 * rank, consumed)
    put_to(watch, wait, rank, CONSUMED + LINE * me, record, 16)


def ship(watch, wait, me, lag, claimed, stride):
    """Every block of a launch that sends calls this when it has packed all its packets; the last one ships all boxes, the next
    rank's first.  claimed: address of what `ship_box` asks for, for rank 0; `stride` bytes on, for the next.

    Not after an error: a block that gave up has not packed its part.
    """
    base, _, epoch = watch
    if is_last(base) != 0:
        i = 1 + thread_rank()
        while i < RANKS:
            rank = after(me, i)
            if is_port_peer(base, rank):
                if ld8_relaxed(base + FAILED) == 0:
                    ship_box(watch, wait, me, rank, ld8(claimed + stride * rank), consumed_here(epoch, lag))
                st8(base + CLAIMS + 8 * rank, 0)
            i += num_threads()


# ---- receive ---------------------------------------------------------------------------------------------------------

def wait_for_mail(part, watch, wait, source, waited):
    """The block waits until the box of a port peer has come, and may then read it: 1, or 0 if it never came.

    A peer that is one operation ahead may have sent its next box too.  waited: 0, or [R] int64 to which the first block adds the
    wait's ns.
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
