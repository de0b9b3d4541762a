"""The test infrastructure itself: `ranks.run` and `ranks.launch`."""
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks


@dataclass
class Point:
    """A class of a test's own: results and arguments of such classes travel too."""

    x: int


def neighbours(comm, point, scale=1):
    left = comm.sendrecv(comm.rank, (comm.rank + 1) % comm.size, source=(comm.rank - 1) % comm.size)
    return Point(point.x + scale * left), comm.size, os.getpid()


def fail_on(comm, bad):
    numbers = [comm.rank]
    if comm.rank == bad:
        assert len(numbers) == 2, "only one"
    comm.barrier()


def raise_everywhere(comm):
    raise KeyError("the same everywhere")


def exit_on(comm, bad):
    if comm.rank == bad:
        os._exit(3)
    comm.barrier()


def leave_a_message(comm):
    comm.isend("stale", (comm.rank + 1) % comm.size)
    raise ValueError("before the message was received")


def die(comm, bad, how):
    print(f"rank {comm.rank} was here")
    if comm.rank == bad:
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), how)
    time.sleep(1)  # the launcher has seen the death by now
    return comm.rank * 10


def stall(comm, bad, how):
    comm.barrier()
    if comm.rank == bad:
        os.kill(os.getpid(), signal.SIGSTOP) if how == "stop" else time.sleep(1000)
    return os.environ["COLOUR"]


def raise_on(comm, bad):
    if comm.rank == bad:
        raise ValueError("as asked")


def pid(comm):
    return os.getpid()


def wait_or_stop(comm, folder):
    Path(folder, str(os.getpid())).touch()
    if comm.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    comm.recv(source=(comm.rank + 1) % comm.size)


def within(seconds, condition):
    """Whether the condition becomes true in that time."""
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return true


def alive(pid):
    """Whether a process of that id runs (one that has ended but was not waited for does not)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextlib.contextmanager
def leaving_no_process():
    """Check that the jobs started inside have no process left at the end."""
    jobs, start = [], ranks.Job.__init__

    def remember(job, *args):
        jobs.append(job)
        start(job, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks.Job, "__init__", remember)
        yield
    assert jobs and not any(ranks.processes(job.name) for job in jobs)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_results_by_rank(n):
    results = ranks.run(n, neighbours, Point(5), scale=10)
    assert [result[:2] for result in results] == [(Point(5 + 10 * ((rank - 1) % n)), n) for rank in range(n)]
    assert len({result[2] for result in results} | {os.getpid()}) == n + 1


def test_a_pool_is_kept():
    assert ranks.run(2, pid) == ranks.run(2, pid)


def test_one_rank_raises_while_the_others_wait():
    before, start = ranks.run(3, pid), time.monotonic()
    with pytest.raises(ranks.RanksFailed) as failure:
        ranks.run(3, fail_on, 1, timeout=3)
    assert time.monotonic() - start < 20
    text = str(failure.value)
    assert "rank 1 of 3: Traceback" in text and "in fail_on" in text and "AssertionError: only one" in text
    assert "assert 1 == 2" in text  # rewritten as pytest does: the values are shown
    assert "rank 0, 2 of 3: no answer" in text
    after = ranks.run(3, pid)  # a fresh pool
    assert not set(before) & set(after)


def test_one_failure_does_not_wait_for_the_time_limit(monkeypatch):
    monkeypatch.setattr(ranks, "GRACE", 0.5)
    start = time.monotonic()
    with pytest.raises(ranks.RanksFailed, match="in fail_on"):
        ranks.run(2, fail_on, 0, timeout=1000)
    assert time.monotonic() - start < 20


def test_hanging_ranks_show_where(capsys):
    ranks.run(2, pid)  # they have imported this module
    with pytest.raises(ranks.RanksFailed, match="no answer"):
        ranks.run(2, fail_on, 0, timeout=2)
    assert "fail_on" in capsys.readouterr().err


def test_all_ranks_raise_and_the_pool_lives_on():
    before = ranks.run(2, pid)
    with pytest.raises(ranks.RanksFailed, match="rank 0, 1 of 2: Traceback(.|\n)*KeyError: 'the same everywhere'"):
        ranks.run(2, raise_everywhere)
    assert ranks.run(2, pid) == before


def test_messages_of_a_failed_call_are_not_seen_by_the_next():
    with pytest.raises(ranks.RanksFailed):
        ranks.run(2, leave_a_message)
    assert [result[0] for result in ranks.run(2, neighbours, Point(0))] == [Point(1), Point(0)]


def test_a_rank_of_a_pool_dies():
    with pytest.raises(ranks.RanksFailed, match="rank .*1.* of 2: died"):
        ranks.run(2, exit_on, 1)
    assert len(ranks.run(2, pid)) == 2


def test_only_functions_that_a_rank_can_find():
    with pytest.raises(ValueError, match="module-level"):
        ranks.run(1, lambda comm: None)


@pytest.mark.parametrize("how", ["exit", signal.SIGKILL], ids=["exit", "kill"])
def test_launch_a_rank_dies(how):
    with leaving_no_process():
        done = ranks.launch(3, die, 1, how)
    assert done.results == [0, None, 20]
    assert done.errors == {}
    assert {f"rank {rank} was here" for rank in range(3)} <= set(done.stdout.split("\n"))


@pytest.mark.parametrize("how, timeout", [("stop", 1000), ("sleep", 4)])
def test_launch_a_rank_stalls(how, timeout):
    start = time.monotonic()
    with leaving_no_process():
        done = ranks.launch(2, stall, 1, how, timeout=timeout, env={"COLOUR": "red"})
    assert done.results == ["red", None] and done.returncode == -signal.SIGKILL
    assert time.monotonic() - start < 30


def test_launch_a_rank_raises():
    done = ranks.launch(2, raise_on, 0)
    assert "ValueError: as asked" in done.results[0] and done.errors == {0: done.results[0]}
    assert done.results[1] is None


def test_launch_and_all_is_well():
    with leaving_no_process():
        done = ranks.launch(2, neighbours, Point(0))
    assert done.returncode == 0 and [result[0] for result in done.results] == [Point(1), Point(0)]


def test_ranks_end_with_pytest(tmp_path):
    """When the parent is killed its ranks end too, even those that wait in MPI or are stopped."""
    script = "import ranks, sys, test_ranks; ranks.run(3, test_ranks.wait_or_stop, sys.argv[1])"
    parent = subprocess.Popen([sys.executable, "-c", script, tmp_path], env=ranks.environment())
    try:
        assert within(60, lambda: len(list(tmp_path.iterdir())) == 3)
    finally:
        parent.kill()
        parent.wait()
    assert within(10, lambda: not any(alive(path.name) for path in tmp_path.iterdir()))
