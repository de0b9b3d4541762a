"""Device half of MSCCL++'s MemoryChannel, from its handle: put, signal and wait through memory that this rank maps.

The operations of pyep store into peers' memory directly (see `memory`); this is for kernels that speak MSCCL++'s interface.
`channel` is the address of a handle, `Transport.channels[rank]`; offsets are in bytes of the symmetric memory.
"""
from ..kernels.lang import add8_release, fetch_add8_relaxed, ld8_constant, ld16, st16
from .handles import DST, EXPECTED, INBOUND, REMOTE_INBOUND, SRC
from .memory import wait_number

AT_ONCE = 4                                     # pieces of 16 bytes that a thread has under way


def put(channel, dst, src, nbytes, thread, threads):
    """Copy bytes of this rank's memory into the peer's: `threads` threads do it, of which this is number `thread`.

    dst, src, nbytes: multiples of 16.  All these threads must meet before one of them signals.
    """
    to, source = ld8_constant(channel + DST) + dst, ld8_constant(channel + SRC) + src
    at, step = 16 * thread, 16 * threads
    while at + (AT_ONCE - 1) * step < nbytes:
        first, second = ld16(source + at), ld16(source + at + step)
        third, fourth = ld16(source + at + 2 * step), ld16(source + at + 3 * step)
        st16(to + at, first)
        st16(to + at + step, second)
        st16(to + at + 2 * step, third)
        st16(to + at + 3 * step, fourth)
        at += AT_ONCE * step
    while at < nbytes:
        st16(to + at, ld16(source + at))
        at += step


def signal(channel):
    """Add one to the peer's semaphore, after all that this thread has seen or stored; one thread calls it."""
    add8_release(ld8_constant(channel + REMOTE_INBOUND), 1)


def wait(watch, wait, rank, channel):
    """Take one signal of the peer; what it had put before is visible from here on.  1, or 0 if it never came."""
    return take_signal(watch, wait, rank, ld8_constant(channel + INBOUND), ld8_constant(channel + EXPECTED))


def take_signal(watch, wait, source, inbound, expected):
    """Wait until a semaphore has had as many signals as this was called times: 1, or 0 if the last never came.

    inbound, expected: addresses of its words, see `handles`; source: the rank that signals.
    """
    goal = fetch_add8_relaxed(expected, 1) + 1
    return 1 if wait_number(watch, wait, source, inbound, goal) >= goal else 0
