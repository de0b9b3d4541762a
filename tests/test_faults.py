"""Ranks that die, stall or come late: every wait ends, the error says what was waited for, nothing is left behind."""
import ast
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import pytest
import ranks
from case import Case, run_round
from engine import make_buffer, on_gpu, up

from pyep import EPClosedError, EPError, EPTimeoutError

M, H, LOCAL, K = 8, 64, 4, 3  # a shape whose kernels test_low_latency.py compiles too
TIMEOUT = 2  # seconds; a rank must not be late by that only because the machine is busy
PATIENT = 10  # the same where somebody is late on purpose
SLACK = 2  # seconds that an error may come later than its timeout
BAD = 1  # the rank at fault

cpu_only = pytest.mark.skipif(on_gpu(), reason="about the shared memory of the CPU engine")


def case_of(n):
    """Every rank has tokens for every other."""
    return Case(1, M, H, LOCAL * n, K, (M,) * n)


def warm_buffer(comm, timeout_s=TIMEOUT):
    """A buffer that has done one round, the operations of epochs 1 and 2, and all ranks have received it.

    A rank that has received may not have sent yet: a proxy sends for it, and a fault now would be one of the warm-up.
    """
    buf = make_buffer(comm, M, H, LOCAL * comm.size, K, timeout_s=timeout_s)
    run_round(buf, case_of(comm.size))
    buf._connection.meet("warmed up")
    return buf


def dispatch(buf, **options):
    """Only the dispatch of a round."""
    x, topk_idx, _, _ = case_of(buf.group_size).make()
    x, topk_idx = up(x[buf.rank]), up(topk_idx[buf.rank])
    got = buf.low_latency_dispatch(x, topk_idx, M, LOCAL * buf.group_size, use_fp8=False, **options)
    got.event.synchronize()
    return got


def a_round(buf):
    run_round(buf, case_of(buf.group_size))


def hurried_round(buf):
    """A round whose combine is launched before anybody looks whether the dispatch has failed."""
    x, topk_idx, weights, y = (up(of_all[buf.rank]) for of_all in case_of(buf.group_size).make())
    handle = buf.low_latency_dispatch(x, topk_idx, M, LOCAL * buf.group_size, use_fp8=False).handle
    buf.low_latency_combine(y, topk_idx, weights, handle)[1].synchronize()


def three_dispatches(buf):
    for _ in range(3):
        dispatch(buf)


def seconds_of(function):
    """How long a call takes."""
    start = time.monotonic()
    function()
    return time.monotonic() - start


def give_up(buf, operations, timeout_s=TIMEOUT):
    """The error's text of operations that a peer has no part in; checks the time it takes and what comes after it."""
    start = time.monotonic()
    with pytest.raises(EPTimeoutError) as caught:
        operations(buf)
    assert 0.9 * timeout_s <= time.monotonic() - start < timeout_s + SLACK
    assert not buf.is_available()
    with pytest.raises(EPClosedError, match="unusable") as closed:
        a_round(buf)
    assert str(caught.value) in str(closed.value)
    assert seconds_of(buf.destroy) < 0.9 * buf._connection.timeout_s
    with pytest.raises(EPClosedError, match="destroyed"):
        a_round(buf)
    return str(caught.value)


# ---- a rank at fault, its peers' errors ------------------------------------------------------------------------------

def exits(buf):
    os._exit(3)


def is_stopped(buf):
    os.kill(os.getpid(), signal.SIGSTOP)


def exits_before_its_hook(buf):
    dispatch(buf, return_recv_hook=True)
    os._exit(0)


def never_dispatches(buf):
    pass


def skips_combine(buf):
    dispatch(buf)


def calls_no_hook(buf):
    dispatch(buf, return_recv_hook=True)
    dispatch(buf, return_recv_hook=True)


# What the others' errors say: operation, phase, slot, expected, seen, epoch of the operation.
NO_COUNTS = ("low_latency_dispatch", "receive", r"rdma_recv_count\[half 1\]\[source 1\]\[entry \d+\]",
             "epoch 3", "epoch 1", 3)
# Threads wait side by side for the begin and for outputs (where there is more than one thread): either may give up first.
NOT_BEGUN = ("low_latency_combine", "receive", r"(rdma_recv_count\[half 0\]\[source 1\]\[entry 0\]|outputs\[.+\] of half 0)",
             "(epoch 4|data)", "(epoch 2|none)", 4)
NOT_READ = ("low_latency_dispatch", "send", r"consumed\[source 1\]", "epoch 3 or later", "epoch 2", 5)
# What the bad rank does after the warm-up: (what the others do, their error).
DEADLY = {
    exits: (a_round, NO_COUNTS),
    is_stopped: (a_round, NO_COUNTS),
    exits_before_its_hook: (a_round, NOT_BEGUN),
}
HARMLESS = {
    never_dispatches: (hurried_round, NO_COUNTS),
    skips_combine: (a_round, NOT_BEGUN),
    calls_no_hook: (three_dispatches, NOT_READ),
}


def suffer(comm, fault, operations):
    """The bad rank commits the fault; each of the others returns its error's text."""
    buf = warm_buffer(comm)
    if comm.rank != BAD:
        return give_up(buf, operations)
    fault(buf)
    return None


def suffer_together(comm, fault, operations):
    """As `suffer`, but all ranks live on; the bad one stays until the others have given up."""
    text = suffer(comm, fault, operations)
    comm.barrier()
    return text


def assert_blamed(results, operation, phase, slot, expected, seen, epoch):
    """Every rank but the bad one has this error, about the bad one."""
    for rank, text in enumerate(results):
        pattern = (rf"{operation}, {phase} phase: rank {rank} waited {TIMEOUT} s for rank {BAD}: .+\. Slot {slot}: "
                   rf"expected {expected}, seen {seen} \(operation of epoch {epoch}\)\. Rank {BAD} has exited, .+")
        assert rank == BAD or re.fullmatch(pattern, text), text


@pytest.mark.parametrize("fault", DEADLY, ids=lambda fault: fault.__name__)
def test_a_rank_is_gone(fault):
    operations, error = DEADLY[fault]
    done = ranks.launch(3, suffer, fault, operations)
    assert not done.errors, done.errors
    assert_blamed(done.results, *error)


@pytest.mark.parametrize("fault", HARMLESS, ids=lambda fault: fault.__name__)
def test_a_rank_does_something_else(fault):
    operations, error = HARMLESS[fault]
    assert_blamed(ranks.run(3, suffer_together, fault, operations), *error)


def suffer_wide(comm):
    wide = Case(1, 6, 136, 3 * comm.size, 3, (6,) * comm.size)  # its kernels are those of test_low_latency.py
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_CPU_SHAPE", "2,8,4")
        buf = make_buffer(comm, wide.max_tokens, wide.hidden, wide.experts, wide.topk, timeout_s=TIMEOUT)
    run_round(buf, wide)
    text = give_up(buf, lambda buf: run_round(buf, wide)) if comm.rank != BAD else None
    comm.barrier()
    return text


@cpu_only
def test_all_threads_give_up():
    """Those that wait for data and those that wait for them at a barrier."""
    assert_blamed(ranks.run(3, suffer_wide), *NO_COUNTS)


def leave_without_a_word(comm):
    buf = warm_buffer(comm)
    if comm.rank == BAD:
        time.sleep(0.5 * TIMEOUT)
        return seconds_of(buf.destroy)
    give_up(buf, a_round)
    return 0


def test_a_rank_sleeps_and_leaves():
    """The others give up; it does not wait for them longer than its own timeout."""
    assert max(ranks.run(2, leave_without_a_word)) < TIMEOUT + SLACK


def stop_for_a_while(comm):
    pids, buf = comm.allgather(os.getpid()), warm_buffer(comm)
    if comm.rank == BAD:
        os.kill(os.getpid(), signal.SIGSTOP)
        return give_up(buf, a_round)
    text = give_up(buf, a_round)
    os.kill(pids[BAD], signal.SIGCONT)
    return text


def test_a_rank_goes_on_too_late():
    """It finds what was sent to it, then times out in turn, although its peers have freed their memory."""
    done = ranks.launch(2, stop_for_a_while)
    assert not done.errors, done.errors
    assert_blamed([done.results[0], None], *NO_COUNTS)
    assert re.match("low_latency_combine, receive phase: rank 1 waited 2 s for rank 0: ", done.results[1]), done


def differ(comm):
    """Rank 1 combines where rank 0 dispatches."""
    with pytest.raises(EPError) as caught, warm_buffer(comm) as buf:
        (three_dispatches if comm.rank == 0 else a_round)(buf)
    return str(caught.value)


def test_ranks_call_different_operations():
    """Nobody takes the one's data for the other's."""
    for rank, text in enumerate(ranks.run(2, differ)):
        here, there = ("dispatch", "combine") if rank == 0 else ("combine", "dispatch")
        assert text.startswith(f"rank {rank} called low_latency_{here} where rank {1 - rank} called low_latency_{there}"), text


def delayed(function):
    def call(*args, **kwargs):
        time.sleep(0.6 * TIMEOUT)
        return function(*args, **kwargs)
    return call


def come_late(comm):
    with warm_buffer(comm, PATIENT) as buf:
        if comm.rank == BAD:
            for operation in ("low_latency_dispatch", "low_latency_combine"):
                setattr(buf, operation, delayed(getattr(buf, operation)))
        run_round(buf, case_of(comm.size))


def test_a_late_rank_does_no_harm():
    ranks.run(3, come_late)


# ---- errors in user code, the first use, the end ---------------------------------------------------------------------

def fail_in_user_code(comm):
    buf, start = warm_buffer(comm), 0
    if comm.rank != BAD:
        return give_up(buf, a_round)
    with pytest.raises(KeyError, match="user's"):
        with buf:
            start = time.monotonic()
            raise KeyError("the user's")
    assert time.monotonic() - start < 0.9 * TIMEOUT
    return None


def test_user_code_raises_on_one_rank():
    """It leaves at once; the others get an error."""
    assert_blamed(ranks.run(3, fail_in_user_code), *NO_COUNTS)


def end_alone(comm):
    buf = warm_buffer(comm)
    if comm.rank == BAD:
        os._exit(0)
    return seconds_of(buf.destroy)


def test_destroy_without_a_peer():
    """The peer of a rank that is gone waits for it no longer than the timeout."""
    done = ranks.launch(2, end_alone)
    assert not done.errors, done.errors
    assert done.results[BAD] is None and done.results[0] < TIMEOUT + SLACK


def never_begin(comm):
    warm_buffer(comm).destroy()  # now the kernels are on disk: the time below is for waiting alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyep.connection.COMPILE_ALLOWANCE_S", 0.5)
        buf = make_buffer(comm, M, H, LOCAL * comm.size, K, timeout_s=3)
        text = give_up(buf, a_round, 3.5) if comm.rank != BAD else None
        comm.barrier()
    return text


def test_a_rank_never_makes_the_first_call():
    text = ranks.run(2, never_begin)[0]
    assert re.match(r"first use of .*: rank 0 waited 3.5 s for ranks \[1\], which have not come", text), text


# ---- nothing is left -------------------------------------------------------------------------------------------------

def mappings(pid="self"):
    """The shared memories of pyep that a process maps, as (inode, name)."""
    lines = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {(words[4], words[5]) for words in lines if words[1] == "rw-s" and "pyep" in words[5]}


def mapped_by(pid):
    """As `mappings`, of what may have ended, may be another user's, or is no process."""
    try:
        return mappings(pid)
    except OSError:
        return set()


def in_dev_shm():
    """Names in /dev/shm, without those of MPI libraries (MPICH's stay when its processes are killed)."""
    return {name for name in os.listdir("/dev/shm") if not re.match("mpich|Intel_MPI|vader|sm_segment|psm2|ucx", name)}


@pytest.fixture
def tidy(tmp_path):
    """A folder for temporary files, which must be empty at the end, as must be what is new in /dev/shm."""
    before, folder = in_dev_shm(), tmp_path / "tmp"
    folder.mkdir()
    yield folder
    assert not in_dev_shm() - before
    assert not list(folder.iterdir())


def end_in_every_way(comm):
    with warm_buffer(comm):
        assert len(mappings()) == comm.size
    assert not mappings()
    with pytest.raises(KeyError):
        with warm_buffer(comm):
            raise KeyError("on all ranks")
    assert not mappings()
    warm_buffer(comm)  # never destroyed


@cpu_only
def test_ends_that_leave_nothing(tidy):
    """After destroy, an exception, a buffer that nobody destroys."""
    done = ranks.launch(2, end_in_every_way, env={"TMPDIR": str(tidy)})
    assert done.results == [None, None] and done.returncode == 0, done


def kill_all(comm, folder):
    pids, buf = comm.allgather(os.getpid()), warm_buffer(comm, 60)
    Path(folder, str(comm.rank)).write_text(repr((os.getpid(), mappings())))
    comm.barrier()
    if comm.rank == BAD:
        time.sleep(0.3)  # the others are in the kernel now
        for pid in pids:
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    a_round(buf)


@cpu_only
def test_killed_ranks_leave_nothing(tidy, tmp_path):
    """Neither names nor memory nor processes."""
    done = ranks.launch(2, kill_all, tmp_path, env={"TMPDIR": str(tidy)})
    assert done.results == [None, None] and not done.errors, done.errors
    pids, mapped = zip(*(ast.literal_eval((tmp_path / str(rank)).read_text()) for rank in range(2)))
    assert mapped[0] == mapped[1] and len(mapped[0]) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not mapped[0] & set().union(*map(mapped_by, os.listdir("/proc")))


def run_without_memfd(comm, folder):
    def mine():
        return {mapping for mapping in mappings() if mapping[1].startswith(f"{folder}/pyep-")}
    before = mappings()                                          # of other tests' buffers
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "memfd_create")
        patch.setattr(tempfile, "tempdir", folder)
        buf = warm_buffer(comm)
    assert not os.listdir(folder)  # already
    assert len(mine()) == comm.size and mappings() - before == mine()
    a_round(buf)
    buf.destroy()
    assert not mine()


@cpu_only
def test_without_memfd(tidy):
    """Where the system has no anonymous files, a temporary one that is unlinked as soon as all have opened it."""
    ranks.run(2, run_without_memfd, str(tidy))
