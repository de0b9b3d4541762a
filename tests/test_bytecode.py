"""What CPython copies within a function is there once in a kernel: see `pyep.kernels.bytecode`.  Python 3.11 copies none of it."""
import collections
import dis
import itertools
import sys
from types import FunctionType

import pytest

from pyep.kernels import bytecode
from pyep.kernels.lang import st8, syncthreads, thread_rank
from pyep.kernels.op import CUDA, bind

calls = []


def a():
    calls.append("a")


def b():
    calls.append("b")


def end():
    calls.append("end")
    return len(calls)


def ends_with_a_call(x, y):
    if x:
        if y:
            a()
        else:
            b()
    end()


def returns_a_call(x, y):
    if x:
        if y:
            a()
        else:
            b()
    return end()


def has_three_copies(x, y):
    if x:
        if y:
            a()
        elif x > 1:
            b()
        else:
            a()
    end()


def has_two_ends(x, y):
    if x:
        if y:
            a()
        else:
            b()
        return end()
    if y:
        b()
    elif x == y:
        a()
    return end()


def far(x, y):
    """More than 255 words from the copy to the end."""
    if x:
        if y:
            a()
        else:
            b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b()
            b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b(), b()
    end()


def loops(x, y):
    """The condition of a loop is there twice as well, and has to be."""
    while end() < 3:
        a()


def most_copies(code, opcodes):
    """How often the same instruction of the source is there at most."""
    places = collections.Counter(i.positions for i in dis.get_instructions(code) if i.opname in opcodes)
    return max(places.values())


def outcome(fn, *args):
    calls.clear()
    return fn(*args), calls[:]


COPIED = ends_with_a_call, returns_a_call, has_three_copies, has_two_ends, far


@pytest.mark.parametrize("fn", COPIED, ids=lambda fn: fn.__name__)
def test_ends_are_there_once(fn):
    if sys.version_info >= (3, 12):
        assert most_copies(fn.__code__, bytecode.CALLS) > 1     # else Python no longer copies this, and `bytecode` may go
    code = bytecode.without_copies(fn.__code__)
    assert most_copies(code, bytecode.CALLS) == 1
    for args in itertools.product(range(3), range(2)):
        assert outcome(FunctionType(code, globals()), *args) == outcome(fn, *args)


@pytest.mark.parametrize("fn", [loops, outcome, test_ends_are_there_once], ids=lambda fn: fn.__name__)
def test_all_else_stays(fn):
    assert bytecode.without_copies(fn.__code__) == fn.__code__


FIRST = 0


def meets_at_its_end(base):
    if thread_rank() == 0:
        if FIRST:
            st8(base, 1)
        else:
            st8(base, 2)
    syncthreads()


def meets(base):
    """A kernel."""
    meets_at_its_end(base)
    st8(base + 8 * thread_rank(), 3)


def test_a_barrier_is_there_once():
    cuda = pytest.importorskip("pyep.kernels.cuda")
    for first in 0, 1:
        assert cuda.ptx(meets, 64, FIRST=first).count("bar.sync") == 1
    assert bind(meets_at_its_end, CUDA).__code__.co_name == "meets_at_its_end"
