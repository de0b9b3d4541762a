"""Calls that are kept in mind: checked again when anything differs that checks look at, and not otherwise."""
from types import SimpleNamespace

import numpy as np
import pytest

from pyep.calls import Calls

CONNECTION = SimpleNamespace(engine="engine", size=3)
WORDS = np.zeros(100, np.int32)
SHAPED = WORDS[:12].reshape(3, 4)                                # NumPy begins arrays at a multiple of 16 bytes

# What differs from a call with (SHAPED, None) and the option 1: (arrays, options).
OTHERS = {
    "shape": ((WORDS[:12].reshape(4, 3), None), (1,)),
    "dtype": ((SHAPED.view(np.float32), None), (1,)),
    "strides": ((WORDS[:24].reshape(3, 8)[:, ::2], None), (1,)),
    "alignment": ((WORDS[1:13].reshape(3, 4), None), (1,)),
    "an array more": ((SHAPED, WORDS), (1,)),
    "no array": ((None, SHAPED), (1,)),
    "kind": (([[0] * 4] * 3, None), (1,)),
    "option": ((SHAPED, None), (2,)),
}


@pytest.fixture
def counting():
    """(a function that finds a call, the arguments of the checks that were made)."""
    calls, checks = Calls(CONNECTION, most=2), []

    def check(engine, num_ranks, *args):
        checks.append(args)
        return engine, num_ranks, len(checks)
    return lambda given, options=(1,): calls.find("operation", check, given, options), checks


def test_checked_once(counting):
    find, checks = counting
    call, addresses = find((SHAPED, None))
    assert call.checked == ("engine", 3, 1) and call.ready is None and list(addresses) == [WORDS.ctypes.data, 0]
    other = WORDS[16:28].reshape(3, 4)
    again, addresses = find((other, None))
    assert again is call and list(addresses) == [other.ctypes.data, 0] and len(checks) == 1


@pytest.mark.parametrize("what", OTHERS)
def test_checked_again(counting, what):
    find, checks = counting
    first, _ = find((SHAPED, None))
    other, _ = find(*OTHERS[what])
    assert other is not first and len(checks) == 2 and find((SHAPED, None))[0] is first


def test_no_more_than_the_most_are_kept(counting):
    find, checks = counting
    for n in (1, 2, 1, 3, 3, 1):                                 # the third kind makes the first two forgotten
        find((WORDS[:n],))
    assert [len(args[0]) for args in checks] == [1, 2, 3, 1]


def test_an_option_that_cannot_be_hashed(counting):
    """The check will say what it is; where it says nothing, it is asked each time."""
    find, checks = counting
    assert find((SHAPED,), ([],))[0] is not find((SHAPED,), ([],))[0] and checks == [(SHAPED, [])] * 2


def test_a_refused_call_is_not_kept():
    calls = Calls(CONNECTION, most=2)
    for _ in range(2):
        with pytest.raises(ValueError, match="refused"):
            calls.find("operation", refuse, (SHAPED,), ())


def refuse(engine, num_ranks, array):
    raise ValueError("refused")
