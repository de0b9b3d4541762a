"""High throughput with ranks that do not come, die, refuse, or do something else: every wait ends, the error says why."""
import functools
import os
import re
import time

import pytest
import ranks
from engine import down, make_high_throughput_buffer, on_gpu, up
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


# ---- a rank refuses, for a reason that only it can see -------------------------------------------------------------------

REFUSES, LONG = 1, 60                                            # the rank that does; a timeout for which nobody should wait


# By name: (what the ranks do; the others').
CALLS = {"a combine in a cached dispatch": (cached_dispatch, one_combine),
         "a cached dispatch in a combine": (one_combine, cached_dispatch),
         "a combine in an exchange": (first_dispatch, one_combine), "an exchange in a combine": (one_combine, first_dispatch),
         "rows for the worst in an exchange": (first_dispatch, worst_dispatch),
         "an exchange among rows for the worst": (worst_dispatch, first_dispatch)}


def refuse(comm, operation, other):
    """All get an error in one call, long before the timeout; the text of each."""
    buf, handle = warm_buffer(comm, LONG)
    start = time.monotonic()
    with pytest.raises(EPError) as caught:
        (other if comm.rank == REFUSES else operation)(buf, handle)
        buf._connection.engine.synchronize()
        buf._connection.check()
    assert time.monotonic() - start < 0.5 * LONG and not isinstance(caught.value, EPTimeoutError)
    assert not buf.is_available()
    comm.barrier()
    buf.destroy()
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("operation, other", CALLS.values(), ids=CALLS)
def test_ranks_make_different_calls(n, operation, other):
    """Nobody takes the one's data for the other's, and nobody waits for what does not come."""
    for name, text in ranks.run(n, refuse, operation, other):
        assert name == "EPError" and ("all ranks must make the same calls" in text or "has given up: not all ranks" in text), text


def count_wrongly(buf, handle):
    """Tell others fewer tokens than there are."""
    made = made_for(buf.group_size)
    dispatch(buf, made, num_tokens_per_rank=up(made.layout[buf.rank].num_tokens_per_rank - 1))[5].synchronize()


def count_wrongly_for_the_worst(buf, handle):
    made = made_for(buf.group_size).case.with_room(3).make()
    dispatch(buf, made, num_tokens_per_rank=up(made.layout[buf.rank].num_tokens_per_rank - 1))[5].synchronize()


def select_wrongly(buf, handle):
    """An expert that does not exist, which only the kernel sees: on the CPU the host would."""
    made = made_for(buf.group_size)
    idx = made.topk_idx[buf.rank].copy()
    idx[7, 1] = 4 * buf.group_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyep.buffer_high_throughput.check_experts", lambda *args: None)
        dispatch(buf, made, topk_idx=up(idx))[5].synchronize()


def lay_out_wrongly(buf, handle):
    """The same, for a kernel that no other rank takes part in."""
    idx = made_for(buf.group_size).topk_idx[buf.rank].copy()
    idx[3, 2] = -2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyep.buffer_high_throughput.check_experts", lambda *args: None)
        buf.get_dispatch_layout(up(idx), 4 * buf.group_size)[4].synchronize()


# By what rank 1 does: (what the others do; words of its error, of theirs).
REFUSALS = {count_wrongly: (first_dispatch, "num_tokens_per_rank of rank 1 says that .* is_token_in_rank says",
                            "its num_tokens_per_rank"),
            count_wrongly_for_the_worst: (worst_dispatch, "num_tokens_per_rank of rank 1", "its num_tokens_per_rank"),
            select_wrongly: (first_dispatch, "topk_idx of rank 1 names expert [0-9]+ for token 7", "its topk_idx names an expert"),
            lay_out_wrongly: (first_dispatch, "topk_idx of rank 1 names expert -2 for token 3", "its topk_idx names an expert")}


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("fault", REFUSALS, ids=lambda fault: fault.__name__)
def test_a_rank_refuses(n, fault):
    """All ranks raise an EPRoutingError in that call, the one with what it saw, the others with who refused and why."""
    operation, own, of_peer = REFUSALS[fault]
    results = ranks.run(n, refuse, operation, fault)
    assert {name for name, _ in results} == {"EPRoutingError"}
    for rank, (_, text) in enumerate(results):
        assert re.search(own if rank == REFUSES else f"rank 1 has given up: {of_peer}", text), text


def write_nothing(comm):
    """What other results hold stays, whoever refuses."""
    buf = make_high_throughput_buffer(comm, HEAP, timeout_s=LONG)
    made = made_for(comm.size)
    held = [dispatch(buf, made) for _ in range(3)]
    want = [down(part).copy() for got in held for part in (*got[:3], *got[4])]
    held[1] = None                                               # the next result goes between two others
    with pytest.raises(EPError):
        (count_wrongly if comm.rank == REFUSES else first_dispatch)(buf, None)
    parts = len(want) // 3
    for got, before in (held[0], want[:parts]), (held[2], want[2 * parts:]):
        for part, b in zip((*got[:3], *got[4]), before):
            assert down(part).tobytes() == b.tobytes()
    comm.barrier()
    buf.destroy()


def test_a_refusal_writes_nothing_out_of_place():
    ranks.run(2, write_nothing)


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
