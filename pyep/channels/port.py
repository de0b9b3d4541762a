"""Device half of MSCCL++'s PortChannel: put, signal, flush and wait through a proxy, for peers whose memory this rank does not map.

A thread *pushes* a trigger of 16 bytes into the FIFO of a proxy, a thread of the host, which does what it says, in the order of
the FIFO.  What of it a peer sees in that order is the transport's to say: `Transport.orders_puts`.  Everything here is for one
thread; a warp that wants one put calls from one lane, after the warp has met.

`port` is the address of a handle, `Transport.ports[rank]`; offsets and sizes are in bytes of the symmetric memory, less than 2**32.
`watch` and `wait` are as in `memory`: a full FIFO and a flush are waits too, for the peer `rank`.
"""
from ..kernels.lang import fetch_add8_relaxed, ld8_acquire, ld8_constant, ld8_relaxed, st8_relaxed, st16_release
from .handles import (COMMIT, DATA, DESTINATION_MEMORY, FLUSH, FLUSH_DONE, HEAD, KIND, MASK, MEMORIES, PORT_EXPECTED, PORT_INBOUND,
                      SEMAPHORE, SEMAPHORE_AT, SHIFT, SIGNAL, SOURCE_MEMORY, TAIL, TAIL_CACHE, TRIGGER_BYTES, TRIGGERS)
from .memory import wait_number
from .memory_channel import take_signal


def put(watch, wait, rank, port, dst, src, nbytes):
    """Have bytes of this rank's memory copied into the peer's.  They must not change before a flush, or an answer of the peer.

    A put is visible to the peer before later signals of this channel, and where `Transport.orders_puts` before later puts.  1, or 0
    if the FIFO stayed full.
    """
    return 1 if push(watch, wait, rank, port, src << 32 | nbytes, trigger(port, DATA, dst)) >= 0 else 0


def signal(watch, wait, rank, port):
    """Add one to the peer's semaphore.  1, or 0 if the FIFO stayed full."""
    return 1 if push(watch, wait, rank, port, 0, trigger(port, SIGNAL, 0)) >= 0 else 0


def put_with_signal(watch, wait, rank, port, dst, src, nbytes):
    """`put`, then `signal`, in one trigger.  1, or 0 if the FIFO stayed full."""
    return 1 if push(watch, wait, rank, port, src << 32 | nbytes, trigger(port, DATA | SIGNAL, dst)) >= 0 else 0


def flush(watch, wait, rank, port):
    """Wait until what earlier puts of this channel read may be rewritten; the peer need not see them yet.  1, or 0 if that never
    was."""
    position = push(watch, wait, rank, port, 0, trigger(port, FLUSH, 0))
    done = 0
    if position >= 0 and wait_number(watch, wait, rank, ld8_constant(port + FLUSH_DONE), position + 1) > position:
        done = 1
    return done


def wait(watch, wait, rank, port):
    """Take one signal of the peer; what it had put before is visible from here on.  1, or 0 if it never came."""
    return take_signal(watch, wait, rank, ld8_constant(port + PORT_INBOUND), ld8_constant(port + PORT_EXPECTED))


def trigger(port, kind, dst):
    """The second word of a trigger, see `handles`; the commit bit is the FIFO's to add."""
    memories = ld8_constant(port + MEMORIES)
    return ((ld8_constant(port + SEMAPHORE) & 0x3FF) << SEMAPHORE_AT | kind << KIND | (memories & 0x1FF) << DESTINATION_MEMORY
            | (memories >> 32 & 0x1FF) << SOURCE_MEMORY | dst)


def push(watch, wait, rank, port, first, second):
    """Claim a slot of the FIFO, wait until the proxy has taken the trigger of a lap ago from it, and publish this one.

    Its position, or -1 if the proxy never took that: then the slot stays empty and the proxy stops there, but so do all waits of
    this rank.
    """
    position = fetch_add8_relaxed(ld8_constant(port + HEAD), 1)
    before = position - ld8_constant(port + MASK) - 1            # the position that had this slot
    if before >= ld8_relaxed(ld8_constant(port + TAIL_CACHE)):
        tail = wait_number(watch, wait, rank, ld8_constant(port + TAIL), before + 1)
        if tail > before:
            st8_relaxed(ld8_constant(port + TAIL_CACHE), tail)
        else:
            position = -1
    if position >= 0:
        slot = ld8_constant(port + TRIGGERS) + TRIGGER_BYTES * (position & ld8_constant(port + MASK))
        commit = position >> ld8_constant(port + SHIFT) & 1 ^ 1
        st16_release(slot, first, second | commit << COMMIT)
    return position


def poll(triggers, size, shift, position, out):
    """The host's side of `push`: out [3] becomes 1 and the words of the trigger at `position`, or 0 if it was not pushed yet."""
    slot = triggers + TRIGGER_BYTES * (position & size - 1)
    second = ld8_acquire(slot + 8)
    there = second >> COMMIT & 1 ^ position >> shift & 1
    st8_relaxed(out, there)
    st8_relaxed(out + 8, ld8_relaxed(slot))
    st8_relaxed(out + 16, second)
