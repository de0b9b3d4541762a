"""Device half of a MemoryChannel: put, signal and wait through addresses that this rank maps.

Two kinds of waits.  A *counter* carries its epoch: it has come when the epoch is the one waited for (or a later one).  Where it
was *released*, what was stored before it has come too.  *Data* announces itself: a word or row has come when none of its 32-bit
words is the absence value; who reads it puts that value back, so that the slot is ready for the next sender.

Every wait ends.  The first thread of a rank whose wait lasts longer than the timeout writes a record for the host, and all
waits of the rank then give up: the kernel returns, with garbage for results, and the host raises.  A rank that gives up for a
reason of its own may tell its peers (`refuse`): their waits, which would last to the timeout, then end too.

`watch` is (address of the own symmetric memory, timeout in ns, epoch of the operation); `wait` is the number of what is waited for
(see `WAITS` in `pyep.low_latency` and `pyep.high_throughput`), `source` the rank that owes it.
"""
from ..kernels.lang import (absence, absent, clock_ns, ld4_relaxed_if, ld8, ld8_acquire, ld8_constant, ld8_relaxed, ld16_relaxed,
                            pause, polls_per_look, st4, st8, st8_relaxed, st8_release, st16, swap8_if, umod)
from ..kernels.op import rare

STATUS = FAILED = PEERS = 0                     # offsets in the symmetric memory, see pyep.layout.control
REFUSED = 0                                     # likewise, of a word for each rank, a line apart; 0: these kernels never refuse
RANKS = LINE = PEER_REFUSED = 0                 # of kernels that do: the ranks; bytes of a line; the number of such an end

ABSENT, ABSENT4 = -1, 0xFFFFFFFF                # a word of 8 bytes, of 4 bytes, that has not come
LAST_EPOCH = 0xFFFFFFFE                         # epochs run 1..LAST_EPOCH and start over: neither 0 nor 0xffffffff is one
HOST_WORDS = 16 + 2047                          # that kernels write for the host beside RECORD; 2047: layout.MAX_LOCAL_EXPERTS
LONG_NS = 50_000                                # how long a thread waits before it sleeps between looks (on the CPU)
RECORD = ("state", "wait", "peer", "offset", "expected", "seen", "epoch")      # the words of the status block, and behind them:
VOID_OPERATION = len(RECORD)                    # epoch << 32 | rank + 1, of an operation that all have run and nobody may use, and
#                                                 the rank that has told so; 0: none
VOID_REASON = VOID_OPERATION + 1                # why, where it was this rank
STATUS_WORDS = VOID_REASON + 1


def next_epoch(epoch):
    """The epoch after `epoch`; parity alternates across the wrap-around too."""
    return 1 if epoch >= LAST_EPOCH else epoch + 1


def previous_epoch(epoch):
    return LAST_EPOCH if epoch <= 1 else epoch - 1


def reached(epoch, goal):
    """Whether `epoch` is `goal` or later: by their distance modulo 2**32, so that wrap-around does not matter."""
    return (epoch - goal) & 0x80000000 == 0


def peer(base, rank):
    """The address at which this rank maps the symmetric memory of `rank`."""
    return ld8_constant(base + PEERS + 8 * rank)


def tell(counter, epoch, value):
    """Set a counter in any rank's memory.  Nothing is ordered by it: data announces itself."""
    st8_relaxed(counter, (epoch << 32) | value)


def release(counter, epoch):
    """Set a counter in any rank's memory, after all that this thread has seen or stored: for data that does not announce itself."""
    st8_release(counter, epoch << 32)


# ---- giving up -------------------------------------------------------------------------------------------------------

def report(watch, wait, source, address, expected, seen):
    """Write the record for the host, unless another thread was first; all waits of this rank end from now on."""
    base, _, epoch = watch
    if swap8_if(base + FAILED, 0, 1) == 0:
        status = ld8(base + STATUS)
        st8(status + 8, wait)
        st8(status + 16, source)
        st8(status + 24, address - base)
        st8(status + 32, expected)
        st8(status + 40, seen)
        st8(status + 48, epoch)
        st8_release(status, 1)


@rare
def refuse(watch, me, reason, source, expected, seen):
    """Give up for a reason of this rank's own, a number as of waits, and tell all ranks: from this epoch on they wait in vain."""
    base, _, epoch = watch
    report(watch, reason, source, base, expected, seen)
    for rank in range(RANKS):
        st8_relaxed(peer(base, rank) + REFUSED + LINE * me, epoch << 32 | reason)


def peer_has_refused(watch):
    """1 if another rank has told that it gave up, of which the host is told then; else 0."""
    base, _, epoch = watch
    refused = 0
    for rank in range(RANKS):
        word = ld8_relaxed(base + REFUSED + LINE * rank)
        if word != 0 and reached(epoch, (word >> 32) & 0xFFFFFFFF):    # what comes before it has been done
            report(watch, PEER_REFUSED, rank, base, 0, word & 0xFFFFFFFF)
            refused = 1
    return refused


def patience(deadline, watch, wait, source, address, expected, seen):
    """A waiting thread calls this now and then: its deadline (0: none set yet), or -1 when it must give up."""
    base, timeout, _ = watch
    now = clock_ns()
    if deadline == 0:
        deadline = now + timeout
    pause(1 if now - (deadline - timeout) > LONG_NS else 0)
    if ld8_relaxed(base + FAILED) != 0 or REFUSED != 0 and peer_has_refused(watch) != 0:
        return -1
    if now > deadline:
        report(watch, wait, source, address, expected, seen)
        return -1
    return deadline


# ---- waiting ---------------------------------------------------------------------------------------------------------

@rare
def wait_count(watch, wait, source, counter):
    """Wait until a counter has this operation's epoch; the count it carries."""
    epoch = watch[2]
    value = ld8_relaxed(counter)
    deadline, polls = 0, 0
    while (value >> 32) & 0xFFFFFFFF != epoch and deadline >= 0:
        polls += 1
        if umod(polls, polls_per_look()) == 0:
            deadline = patience(deadline, watch, wait, source, counter, epoch, value)
        value = ld8_relaxed(counter)
    return value & 0xFFFFFFFF if deadline >= 0 else 0


@rare
def wait_epoch(watch, wait, source, counter, goal):
    """Wait until the epoch that a counter holds has reached `goal`; 1, or 0 if it never did.

    Relaxed: what waits for it are stores, and no store is made before the branch that it depends on.
    """
    value = ld8_relaxed(counter)
    deadline, polls = 0, 0
    while not reached(value, goal) and deadline >= 0:
        polls += 1
        if umod(polls, polls_per_look()) == 0:
            deadline = patience(deadline, watch, wait, source, counter, goal, value)
        value = ld8_relaxed(counter)
    return 1 if deadline >= 0 else 0


@rare
def wait_number(watch, wait, source, counter, goal):
    """Wait until a word that only grows is `goal` or more: what was stored before it was released is visible from here on.
    What it then is, or -1 if it never was."""
    value = ld8_acquire(counter)
    deadline, polls = 0, 0
    while value < goal and deadline >= 0:
        polls += 1
        if umod(polls, polls_per_look()) == 0:
            deadline = patience(deadline, watch, wait, source, counter, goal, value)
        value = ld8_acquire(counter)
    return value if value >= goal else -1


def wait_released(watch, wait, source, counter):
    """Wait until a counter was released for this operation: what was stored before is visible from here on.  1, or 0 if never."""
    value = ld8_acquire(counter)
    if (value >> 32) & 0xFFFFFFFF != watch[2]:
        wait_count(watch, wait, source, counter)
        value = ld8_acquire(counter)
    return 1 if (value >> 32) & 0xFFFFFFFF == watch[2] else 0


@rare
def wait_word(watch, wait, source, address):
    """Poll a word of data until it has come; 0 if it never did."""
    value = ABSENT
    deadline, polls = 0, 0
    while value == ABSENT and deadline >= 0:
        polls += 1
        if umod(polls, polls_per_look()) == 0:
            deadline = patience(deadline, watch, wait, source, address, 0, value)
        value = ld8_relaxed(address)
    return value if deadline >= 0 else 0


def read_word(value, watch, wait, source, address):
    """Wait for a word of data, and leave it in its slot; 0 if it never came.  `value`: what a first look at it has shown."""
    return wait_word(watch, wait, source, address) if value == ABSENT else value


@rare
def wait4(watch, wait, source, address):
    """Poll a 4-byte word of data until it has come, or for ever in vain."""
    value = ABSENT4
    deadline, polls = 0, 0
    while value == ABSENT4 and deadline >= 0:
        polls += 1
        if umod(polls, polls_per_look()) == 0:
            deadline = patience(deadline, watch, wait, source, address, 0, value)
        value = ld4_relaxed_if(address, 1)
    return value


def take4(value, watch, wait, source, address):
    """Wait for a 4-byte word of data and take it out of its slot.  `value`: what a first look at it has shown."""
    if value == ABSENT4:
        value = wait4(watch, wait, source, address)
    st4(address, ABSENT4)
    return value


@rare
def wait16(watch, wait, source, address):
    """Poll 16 bytes of a row until they have come, or for ever in vain."""
    value = absence()
    deadline, polls = 0, 0
    while absent(value) != 0 and deadline >= 0:
        polls += 1
        if umod(polls, polls_per_look()) == 0:
            deadline = patience(deadline, watch, wait, source, address, 0, ABSENT)
        value = ld16_relaxed(address)
    return value


def take16(value, watch, wait, source, address):
    """Wait for 16 bytes of a row and take them out of their slot.  `value`: what a first look at them has shown."""
    if absent(value) != 0:
        value = wait16(watch, wait, source, address)
    st16(address, absence())
    return value
