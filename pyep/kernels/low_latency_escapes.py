"""Rows of bf16 that have any bits at all, also those that mean "nothing has arrived": how a dispatch keeps them.

Two words are *reserved*: 0xffffffff, which means absence, and 0xfffffffe, which stands for it.  A sender that finds one of them in
16 bytes of a row, a *piece*, stores 0xfffffffe for either, and beside the row an *escape*: 4 bytes that say which words of the
piece were 0xffffffff.  A receiver that finds 0xfffffffe waits for the piece's escape.

As numbers both are two NaNs, so in rows of numbers all this hardly ever runs: a piece costs a sender and a receiver one look, which
also sees absence.  Rows of FP8 need none of it, nor do packets, which need not announce themselves.
"""
from ..channels.memory import ABSENT4, wait4, wait16
from .lang import absent, ld8, ld16, reserved, st4, st4_relaxed, st8, st8_relaxed, udiv
from .low_latency import DISPATCH_ROW
from .low_latency_slots import ESCAPES
from .op import rare

ABSENCE, STAND_IN = 0xFFFFFFFF, 0xFFFFFFFE


def escape_at(row, offset):
    """The address of the escape of the piece at `offset` of a row in a slot."""
    return row + ESCAPES + udiv(offset, 4)


def is_absence(word8, half):
    """Whether the lower (half 0) or the upper 32 bits of a word mean absence."""
    return 1 if (word8 >> 32 * half) & ABSENCE == ABSENCE else 0


def stand_in(word8):
    """A word of 8 bytes as it travels."""
    low, high = word8 & ABSENCE, (word8 >> 32) & ABSENCE
    low = STAND_IN if low == ABSENCE else low
    high = STAND_IN if high == ABSENCE else high
    return (high << 32) | low


@rare
def store_escaped(row, offset, source):
    """Store the piece at the address `source`, which has reserved words, at `offset` of a row in a slot, with its escape."""
    first, second = ld8(source), ld8(source + 8)
    which = is_absence(first, 0) | is_absence(first, 1) << 1 | is_absence(second, 0) << 2 | is_absence(second, 1) << 3
    st8_relaxed(row + offset, stand_in(first))
    st8_relaxed(row + offset + 8, stand_in(second))
    st4_relaxed(escape_at(row, offset), which)


def with_absence(word8, which):
    """The word that `stand_in` was made of; which: bit 0 for its lower half, bit 1 for the upper one."""
    return word8 | (1 if which & 1 else 0) | ((1 << 32) if which & 2 else 0)


@rare
def wait_escaped(watch, source, row, offset):
    """Wait for a piece that a first look has shown to have reserved words: what the sender meant."""
    address, escape = row + offset, escape_at(row, offset)
    value = wait16(watch, DISPATCH_ROW, source, address)
    if reserved(value) != 0 and absent(value) == 0:              # else a wait has given up
        which = wait4(watch, DISPATCH_ROW, source, escape)
        st4(escape, ABSENT4)
        st8(address, with_absence(ld8(address), which))          # in the slot, where nobody else looks any more
        st8(address + 8, with_absence(ld8(address + 8), which >> 2))
        value = ld16(address)
    return value
