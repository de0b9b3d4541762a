"""High throughput with ranks that do not come, die, or do something else: every wait ends, the error says what was waited for."""
import functools
import os
import re
import time

import pytest
import ranks
from engine import make_high_throughput_buffer, on_gpu, up
from high_throughput_case import Case, combine, dispatch, run_round, up_x
from test_faults import BAD, PATIENT, SLACK, TIMEOUT

from pyep import EPClosedError, EPError, EPTimeoutError

HEAP = 2**22


def made_for(n, **fields):
    """Every rank has tokens for every other."""
    return Case(1, (40,) * n, 64, 4 * n, 3, "all ranks", **fields).make()


def warm_buffer(comm, timeout_s=TIMEOUT):
    """A buffer that has done each operation once, and the handle of a dispatch; all ranks have received all of them."""
    buf = make_high_throughput_buffer(comm, HEAP, timeout_s=timeout_s)
    made = made_for(comm.size)
    run_round(buf, made.case)
    run_round(buf, made.case.with_room(3))
    _, _, _, _, handle, event = dispatch(buf, made)
    event.synchronize()
    buf._connection.meet("warmed up")
    return buf, handle


def first_dispatch(buf, handle):
    dispatch(buf, made_for(buf.group_size))[5].synchronize()


def worst_dispatch(buf, handle):
    case = made_for(buf.group_size).case
    dispatch(buf, case.with_room(3).make())[5].synchronize()


def cached_dispatch(buf, handle):
    buf.dispatch(up_x(made_for(buf.group_size).x[buf.rank]), handle)[5].synchronize()


def one_combine(buf, handle):
    combine(buf, made_for(buf.group_size), handle)[2].synchronize()


def a_layout(buf, handle):
    buf.get_dispatch_layout(up(made_for(buf.group_size).topk_idx[buf.rank]), 4 * buf.group_size)


def hurried(buf, handle):
    """A combine is launched before anybody looks whether the dispatch has failed."""
    buf.dispatch(up_x(made_for(buf.group_size).x[buf.rank]), handle)
    one_combine(buf, handle)


# What the good rank does: the operation that its error names.
OPERATIONS = {first_dispatch: "dispatch", worst_dispatch: "dispatch", cached_dispatch: "dispatch", one_combine: "combine",
              hurried: "dispatch"}


def give_up(buf, operation):
    """The error's text of an operation that a peer has no part in; checks the time it takes and what comes after it."""
    start = time.monotonic()
    with pytest.raises(EPTimeoutError) as caught:
        operation(buf)
    assert 0.9 * TIMEOUT <= time.monotonic() - start < TIMEOUT + SLACK
    assert not buf.is_available()
    with pytest.raises(EPClosedError, match="unusable") as closed:
        first_dispatch(buf, None)
    assert str(caught.value) in str(closed.value)
    with pytest.raises(EPClosedError, match="unusable"):
        a_layout(buf, None)
    start = time.monotonic()
    buf.destroy()
    assert time.monotonic() - start < 0.9 * TIMEOUT
    with pytest.raises(EPClosedError, match="destroyed"):
        first_dispatch(buf, None)
    return str(caught.value)


def suffer(comm, operation, fault):
    """The bad rank commits the fault; the other returns its error's text."""
    buf, handle = warm_buffer(comm)
    text = None
    if comm.rank != BAD:
        text = give_up(buf, functools.partial(operation, handle=handle))
    elif fault == "exits":
        os._exit(3)
    if fault == "does not come":
        comm.barrier()                                           # the bad rank stays until the other has given up
    return text


def assert_blamed(text, operation):
    """The error names the operation, the ranks, and what was waited for."""
    pattern = rf"{operation}, .+: rank 0 waited {TIMEOUT} s for rank {BAD}: .+expected .+seen .+Rank {BAD} has exited, .+"
    assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_a_rank_does_not_come(operation):
    assert_blamed(ranks.run(2, suffer, operation, "does not come")[0], OPERATIONS[operation])


@pytest.mark.parametrize("operation", [first_dispatch, one_combine], ids=lambda operation: operation.__name__)
def test_a_rank_is_gone(operation):
    done = ranks.launch(2, suffer, operation, "exits")
    assert not done.errors, done.errors
    assert_blamed(done.results[0], OPERATIONS[operation])


def suffer_wide(comm, operation):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_CPU_SHAPE", "2,8,4")
        buf, handle = warm_buffer(comm)
    text = give_up(buf, functools.partial(operation, handle=handle)) if comm.rank != BAD else None
    comm.barrier()
    return text


@pytest.mark.skipif(on_gpu(), reason="shapes of the CPU engine")
@pytest.mark.parametrize("operation", [first_dispatch, cached_dispatch, one_combine], ids=lambda operation: operation.__name__)
def test_all_threads_give_up(operation):
    """Those that wait for a peer, those that wait for them at a barrier, and those of other blocks."""
    assert_blamed(ranks.run(2, suffer_wide, operation)[0], OPERATIONS[operation])


def come_late(comm, operation):
    buf, handle = warm_buffer(comm, PATIENT)
    with buf:
        if comm.rank == BAD:
            time.sleep(0.6 * TIMEOUT)
        operation(buf, handle)
        run_round(buf, made_for(comm.size).case)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_a_late_rank_does_no_harm(operation):
    ranks.run(3, come_late, operation)


def differ(comm):
    """Rank 1 combines where rank 0 dispatches."""
    buf, handle = warm_buffer(comm)
    start = time.monotonic()
    with pytest.raises(EPError):
        (cached_dispatch if comm.rank == 0 else one_combine)(buf, handle)
        one_combine(buf, handle)
    assert time.monotonic() - start < 2 * TIMEOUT + SLACK
    comm.barrier()
    buf.destroy()


def test_ranks_call_different_operations():
    """Neither takes the one's data for the other's."""
    ranks.run(2, differ)


def fail_in_user_code(comm):
    buf, handle = warm_buffer(comm)
    if comm.rank != BAD:
        return give_up(buf, functools.partial(first_dispatch, handle=handle))
    with pytest.raises(KeyError, match="user's"):
        with buf:
            start = time.monotonic()
            raise KeyError("the user's")
    assert time.monotonic() - start < 0.9 * TIMEOUT
    return None


def test_user_code_raises_on_one_rank():
    """It leaves at once, the other gets an error."""
    assert_blamed(ranks.run(2, fail_in_user_code)[0], "dispatch")


def end_with_results(comm):
    """Results that outlive their buffer: nothing breaks, whoever is asked last."""
    buf, handle = warm_buffer(comm)
    results = [handle, *dispatch(buf, made_for(comm.size))]
    buf.destroy()
    for operation in first_dispatch, cached_dispatch, one_combine, a_layout:
        with pytest.raises(EPClosedError, match="destroyed"):
            operation(buf, handle)
    results.clear()
    del handle
    warm_buffer(comm)[0].destroy()


def test_destroyed():
    """Every operation says that the buffer was destroyed; results may be dropped after it."""
    ranks.run(2, end_with_results)
