"""Collectives stand in a kernel exactly as often as in its source, on every Python: see `pyep.kernels.collectives`."""
import ast
import dis
import linecache
import sys
import textwrap
import traceback
from types import FunctionType

import pytest

from pyep.kernels import collectives
from pyep.kernels.lang import ballot, st8, syncthreads, syncwarp, thread_rank
from pyep.kernels.op import CUDA, Cpu, bind, rare

TWICE = 0


@pytest.fixture(autouse=True)
def compiled_anew():
    """What was compiled is remembered, by code: not from one test to the next."""
    collectives.compiled.cache_clear()
    yield
    collectives.compiled.cache_clear()


def one(base):
    st8(base, 1)


def two(base):
    st8(base, 2)


def meet():
    syncthreads()


def ends_with_a_barrier(base):
    if thread_rank() == 0:
        if TWICE:
            one(base)
        else:
            two(base)
    syncthreads()


def ends_with_a_helper(base):
    if thread_rank() == 0:
        if TWICE:
            one(base)
        else:
            two(base)
    meet()


def returns_a_vote(base):
    if thread_rank() == 0:
        if TWICE:
            one(base)
        else:
            two(base)
    return ballot(1)


def has_many_branches(base):
    if thread_rank() == 0:
        if TWICE:
            one(base)
        elif base > 1:
            two(base)
        else:
            one(base)
    elif thread_rank() == 1:
        two(base)
    syncwarp()


def has_two_ends(base):
    if thread_rank() == 0:
        if TWICE:
            one(base)
        else:
            two(base)
        return ballot(1)
    if thread_rank() == 1:
        two(base)
    elif base == 8:
        one(base)
    return ballot(1)


def votes_to_go_on(base):
    while ballot(base < 8) != 0:
        base += 1
        if base == 4:
            continue
        one(base)
    return base


@rare
def is_rare(base, step=1):
    if thread_rank() == 0:
        if TWICE:
            one(base)
        else:
            two(base)
    syncthreads()


COPIED = [ends_with_a_barrier, ends_with_a_helper, returns_a_vote, has_many_branches, has_two_ends, votes_to_go_on, is_rare]


def calls(fn, code=None):
    """What a function calls of collectives: by name, (in the source, in the code)."""
    names = collectives.names_of_collectives(fn)
    _, in_source = collectives.compiled(fn.__code__)
    loads = [i.argval for i in dis.get_instructions(code or fn.__code__) if i.opname == "LOAD_GLOBAL"]
    return {name: (in_source[name], loads.count(name)) for name in names}


@pytest.mark.parametrize("fn", COPIED, ids=lambda fn: fn.__name__)
def test_what_is_bound_has_each_once(fn):
    for machine in CUDA, Cpu():
        found = calls(fn, bind(fn, machine).__code__)
        assert found and all(in_source == in_code for in_source, in_code in found.values())


@pytest.mark.parametrize("fn", COPIED, ids=lambda fn: fn.__name__)
def test_a_copy_is_noticed(fn, monkeypatch):
    """Without the prevention, to bind a function of which this Python makes copies is an error that names it and the collective."""
    name, in_source, in_code = next((name, *counts) for name, counts in calls(fn).items())
    if in_code == in_source:
        assert sys.version_info[:2] != (3, 12)                   # which copies all of them
        pytest.skip("this Python does not copy it")
    monkeypatch.setattr(collectives, "WithoutReasonsToCopy", ast.NodeTransformer)
    collectives.compiled.cache_clear()
    fresh = FunctionType(fn.__code__, globals(), fn.__name__)
    with pytest.raises(ValueError, match=f"{fn.__name__} .*test_collectives.py, line .* calls {name}, .*{in_source} times in its "
                                         f"source, but {in_code} times"):
        bind(fresh, CUDA)


def has_a_barrier_that_nobody_reaches():
    syncthreads()
    return 0
    syncthreads()


def calls_by_another_name(base):
    f = syncthreads
    f()


@pytest.mark.parametrize("fn", [has_a_barrier_that_nobody_reaches, calls_by_another_name], ids=lambda fn: fn.__name__)
def test_what_cannot_be_counted_is_refused(fn):
    with pytest.raises(ValueError, match=f"{fn.__name__} .*calls syncthreads, .* times in its source, but .* times"):
        bind(fn, CUDA)


def test_functions_without_collectives_stay_as_they_are():
    for fn in one, two:
        assert bind(fn, CUDA).__code__ is fn.__code__
        assert not collectives.has_collectives(fn)


def test_what_is_compiled_anew_does_the_same():
    """Loops with `continue`, values that are returned; in Python, with stand-ins for the ops."""
    def outcome(fn, code, rank, base):
        stored = []
        names = {"ballot": int, "syncthreads": lambda: stored.append("met"), "syncwarp": lambda: stored.append("met"), "TWICE": 0,
                 "thread_rank": lambda: rank, "one": stored.append, "two": stored.append, "meet": lambda: stored.append("met")}
        return FunctionType(code, names)(base, *[1] * (code.co_argcount - 1)), stored
    for fn in COPIED:
        for rank in range(3):
            for base in 0, 1, 8:
                assert outcome(fn, collectives.code_of(fn), rank, base) == outcome(fn, fn.__code__, rank, base)


def test_the_rest_of_a_function_is_kept():
    """Its name, file, lines, defaults and captured values."""
    add = 3

    def inner(base, by=2):
        syncthreads()
        return base + by + add

    bound = bind(inner, CUDA)
    assert (bound.__defaults__, bound.__closure__[0].cell_contents, bound.__name__) == ((2,), 3, "inner")
    assert (bound.__code__.co_filename, bound.__code__.co_firstlineno) == (__file__, inner.__code__.co_firstlineno)
    bound.__globals__["syncthreads"] = lambda: None
    assert bound(1) == 6
    bound.__globals__["syncthreads"] = None
    with pytest.raises(TypeError) as raised:
        bound(1)
    line = traceback.extract_tb(raised.value.__traceback__)[-1].lineno
    assert line == inner.__code__.co_firstlineno + 1


def made_by(text, name):
    """A function of a text that is in no file."""
    names = dict(syncthreads=syncthreads, st8=st8, meet=meet)
    exec(compile(textwrap.dedent(text), "<typed in>", "exec"), names)
    return names[name]


def test_without_a_source():
    """Functions that call collectives must come from a file; others need not."""
    assert bind(made_by("def store(a): st8(a, 1)", "store"), CUDA).__name__ == "store"
    for call in "syncthreads", "meet":
        with pytest.raises(ValueError, match=f"lonely .*<typed in>, line 1.* calls {call}, .*must come from a file"):
            bind(made_by(f"def lonely(a): {call}()", "lonely"), CUDA)


def test_a_source_that_has_changed(tmp_path, monkeypatch):
    """Another function at its place is not taken for it."""
    file = tmp_path / "kernels.py"
    file.write_text("from pyep.kernels.lang import syncthreads\n\n\ndef kernel(a):\n    syncthreads()\n")
    names = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    assert calls(names["kernel"], bind(names["kernel"], CUDA).__code__) == {"syncthreads": (1, 1)}
    file.write_text(file.read_text() + "    syncthreads()\n")
    linecache.checkcache(str(file))
    collectives.compiled.cache_clear()
    fresh = FunctionType(names["kernel"].__code__, names)
    with pytest.raises(ValueError, match="kernel .*was changed since it was imported"):
        bind(fresh, CUDA)


# ---- in machine code -------------------------------------------------------------------------------------------------

def meets(base):
    """A kernel."""
    ends_with_a_barrier(base)
    st8(base + 8 * thread_rank(), 3)


def test_a_barrier_is_there_once_in_ptx():
    cuda = pytest.importorskip("pyep.kernels.cuda")
    for twice in 0, 1:
        assert cuda.ptx(meets, 64, TWICE=twice).count("bar.sync") == 1
