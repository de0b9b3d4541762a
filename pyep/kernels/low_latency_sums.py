"""What low-latency combines load and sum: 16 bytes of every row in a list that a warp has made in shared memory.

An entry is two words: the row's address, and the fp32 weight that it is summed with.  In the upper half of the second word a list
of what *comes* (outputs or partials) has the rank that it comes from; its sign says that the row is taken, but not added.

Four loads are under way at once, or eight: one after another, their trips to memory would add up.  All addresses are read before
the first load, so that no load waits for shared memory.
"""
from ..channels.memory import wait16
from .lang import absence, absent, f32_of, fma8, ld8_shared, ld16_nc_if, ld16_relaxed_if, lowest_bit, st16, to_bf16, zeros
from .low_latency import RANK_MAJOR, RANKS, ROW_BYTES, TOPK, WEIGHTED
from .low_latency_units import offset_of, reads_own_y
from .op import rare

NOT_ADDED = -(1 << 63)                          # the sign bit of an entry's second word


def reduces():
    """Whether what travels back is a rank's sum of several rows of y."""
    return WEIGHTED and not RANK_MAJOR


def four_words(at):
    """A word of each of four entries; at: that of the first."""
    return ld8_shared(at), ld8_shared(at + 16), ld8_shared(at + 32), ld8_shared(at + 48)


def load_four(entry, offset, left):
    """16 bytes of each of four rows of y, the list going on for `left` entries; zeros beyond them."""
    at0, at1, at2, at3 = four_words(entry)
    return (ld16_nc_if(at0 + offset, left > 0), ld16_nc_if(at1 + offset, left > 1), ld16_nc_if(at2 + offset, left > 2),
            ld16_nc_if(at3 + offset, left > 3))


def load_ahead(rows, unit, count):
    """What a lane loads first of a unit that sends listed rows: 16 bytes of each of the first four."""
    offset = offset_of(unit, 0)
    return load_four(rows, offset, count if offset < ROW_BYTES else 0)


# ---- a rank's own partial --------------------------------------------------------------------------------------------

def add_rows(total, values, entry, left):
    """Add four rows of y to a sum, weighted."""
    value0, value1, value2, value3 = values
    weight0, weight1, weight2, weight3 = four_words(entry + 8)
    if left > 0:
        total = fma8(value0, f32_of(weight0), total)
    if left > 1:
        total = fma8(value1, f32_of(weight1), total)
    if left > 2:
        total = fma8(value2, f32_of(weight2), total)
    if left > 3:
        total = fma8(value3, f32_of(weight3), total)
    return total


def partial(values, rows, count, offset):
    """16 bytes of the partial of listed rows: bf16(sum of weight * row), fp32 fma in order; `values`: of the first four."""
    total = add_rows(zeros(), values, rows, count)
    entry, left = rows + 64, count - 4
    while left > 0:
        total = add_rows(total, load_four(entry, offset, left), entry, left)
        entry += 64
        left -= 4
    return to_bf16(total)


# ---- what comes ------------------------------------------------------------------------------------------------------

def look_at_four(entry, offset, left):
    """As `load_four`, but of what comes.  A row without an address is not looked at: see `is_own`."""
    at0, at1, at2, at3 = four_words(entry)
    return (ld16_relaxed_if(at0 + offset, left > 0 and at0 != 0), ld16_relaxed_if(at1 + offset, left > 1 and at1 != 0),
            ld16_relaxed_if(at2 + offset, left > 2 and at2 != 0), ld16_relaxed_if(at3 + offset, left > 3 and at3 != 0))


def is_own(word, me):
    """Whether a row does not come at all: this rank's own experts made it.  It is in y; or it is a sum, and has no address."""
    return reads_own_y() and (word & ~NOT_ADDED) >> 32 == me


def absences(looks):
    """Which of four looks have not shown all of their row: a bit for each."""
    look0, look1, look2, look3 = looks
    return absent(look0) | absent(look1) << 1 | absent(look2) << 2 | absent(look3) << 3


@rare
def wait_for_four(watch, wait, me, entry, offset, left):
    """Wait until four rows have come; what they are.  Polls one at a time, so as not to crowd the memory; when that has come, all
    are looked at again, at once: others may have come meanwhile."""
    own = 0
    for i in range(4):
        own |= (1 if is_own(ld8_shared(entry + 16 * i + 8), me) else 0) << i
    looks = look_at_four(entry, offset, left)
    waits = 0
    while absences(looks) & ~own != 0 and waits < 4:             # four are enough, unless a wait has given up
        at = entry + 16 * lowest_bit(absences(looks) & ~own)
        wait16(watch, wait, (ld8_shared(at + 8) & ~NOT_ADDED) >> 32, ld8_shared(at) + offset)
        looks = look_at_four(entry, offset, left)
        waits += 1
    return looks


def add_listed(total, value, own, me, address, word):
    """Take 16 bytes of a row out of their slot and add them to the sum; `own`: what to add for a row without an address."""
    if not is_own(word, me):
        st16(address, absence())
    elif reduces():
        value = own
    return fma8(value, f32_of(word), total) if word >= 0 else total


def add_four(total, looks, own, watch, wait, me, entry, offset, left):
    """Add four rows, once they are there; `looks`: what first looks have shown."""
    if absences(looks) != 0:
        looks = wait_for_four(watch, wait, me, entry, offset, left)
    look0, look1, look2, look3 = looks
    word0, word1, word2, word3 = four_words(entry + 8)
    if left > 0:
        total = add_listed(total, look0, own, me, ld8_shared(entry) + offset, word0)
    if left > 1:
        total = add_listed(total, look1, own, me, ld8_shared(entry + 16) + offset, word1)
    if left > 2:
        total = add_listed(total, look2, own, me, ld8_shared(entry + 32) + offset, word2)
    if left > 3:
        total = add_listed(total, look3, own, me, ld8_shared(entry + 48) + offset, word3)
    return total


def sum_listed(entries, count, rows, num_rows, watch, wait, me, offset):
    """Sum 16 bytes of all rows in a list, in order.  While first looks at them are under way, this rank's own partial is made of
    its `rows` of y, if there are any."""
    most = RANKS if RANK_MAJOR or WEIGHTED else TOPK             # that can be listed
    eight = most > 4 and not reduces()                           # registers for eight rows, of which four may be its own
    looks = look_at_four(entries, offset, count)
    more = look_at_four(entries + 64, offset, count - 4) if eight else looks
    own = absence()
    if reduces() and reads_own_y():
        own = partial(load_four(rows, offset, num_rows), rows, num_rows, offset)
    total = add_four(zeros(), looks, own, watch, wait, me, entries, offset, count)
    if eight:
        total = add_four(total, more, own, watch, wait, me, entries + 64, offset, count - 4)
    done = 8 if eight else 4
    while done < most and done < count:
        looks = look_at_four(entries + 16 * done, offset, count - done)
        total = add_four(total, looks, own, watch, wait, me, entries + 16 * done, offset, count - done)
        done += 4
    return total
