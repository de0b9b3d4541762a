"""What the tests of the benchmarks share: a worked example, the command, and what holds for all of its figures."""
import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import ranks

import pyep
from pyep.__main__ import main, read_once
from pyep.bench import devices

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmark.md"
SMALL = ("--tokens", "8", "--hidden", "64", "--experts-per-rank", "4", "--topk", "3",       # a shape of other tests, too
         "--iterations", "2", "--repeats", "3", "--warm-up", "1")
cpu_only = pytest.mark.skipif(os.environ.get("PYEP_DEVICE") == "cuda", reason="defaults and limits of the CPU engine")

# The worked example of docs/benchmark.md: experts 0 and 1 live on rank 0, 2 and 3 on rank 1.
EXAMPLE = [np.array([[0, 2], [2, 3], [1, -1]]), np.array([[0, 1], [3, 0], [1, 2]])]
HIDDEN = 512


def assert_worked_example(name, phase, selections, sent, received, bound_us):
    """The bytes of a phase, and the bound at 450 GB/s, are those found by hand, and the document says the same."""
    assert (phase.selections.tolist(), phase.sent.tolist(), phase.received.tolist()) == (selections, sent, received)
    assert round(phase.busiest / 450 / 1e3, 4) == bound_us
    cells = [str(cell).strip("[]") for cell in (selections, sent, received, bound_us)]
    assert " | ".join(["| " + name, *cells]) + " |" in DOCUMENT.read_text()


def bench(comm, *argv):
    """The command on ranks that are already there: exit status, stdout, stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(["bench", *argv], comm)
    return status, out.getvalue(), err.getvalue()


def command(n, *argv, module=("-m", "mpi4py"), before=()):
    """The command as a user types it: the finished process."""
    line = [*ranks.mpiexec(), *before, "-n", str(n), sys.executable, *module, "-m", "pyep", "bench", *argv]
    return subprocess.run(line, env=ranks.environment(), capture_output=True, text=True, timeout=300)


def bench_in_modes(comm, modes, *argv):
    """The JSON of the command in modes that the CPU engine does not have from its command line, of rank 0; there, too, a graph is
    a function."""
    args = read_once(["bench", *argv, "--json", "-"], comm)
    args.modes = modes
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err, \
            mock.patch.object(devices.OnCpu, "capture", lambda self, run: run, create=True):
        assert args.run(args, comm) == 0, err.getvalue()
    return json.loads(out.getvalue()) if comm.rank == 0 else None


def with_wrong(comm, operation, *argv):
    """The command where rank 1 gets the lowest bit of each value of the operation's first result wrong."""
    right = getattr(pyep.Buffer, operation)

    def wrong(self, *args, **options):
        result = right(self, *args, **options)
        if self.rank == 1:
            result[0].view("uint16")[:] ^= 1
        return result
    with mock.patch.object(pyep.Buffer, operation, wrong):
        return bench(comm, *argv)


def by_a_fake_clock(comm, operations, letter, *argv):
    """The calls of this rank, and the JSON's first result.  A repeat to warm up takes 100 s, then 1, 2 and 3; on rank 1 double.

    operations: methods of `Buffer`.  letter: a function that makes a letter of a method's name, arguments and options.
    """
    calls, ticks = [], itertools.cycle((100, 1, 2, 3))

    def recorded(operation):
        right = getattr(pyep.Buffer, operation)
        return mock.patch.object(pyep.Buffer, operation, lambda *a, **b: calls.append(letter(operation, a, b)) or right(*a, **b))

    def seconds(self, run):
        run()
        return next(ticks) * (comm.rank + 1)
    with contextlib.ExitStack() as stack:
        for patch in [*map(recorded, operations), mock.patch.object(devices.OnCpu, "seconds", seconds)]:
            stack.enter_context(patch)
        _, out, _ = bench(comm, *argv, "--json", "-")
    return "".join(calls), out and json.loads(out)["results"][0]


FAKE_LATENCY = {"max": 2e6, "avg": 1.5e6, "min": 1e6, "spread": 2e6, "by_rank": [1e6, 2e6]}     # of 2 operations, by that clock


def assert_table(out, first_cells, names):
    """The table has a row for each of these first cells, and in it for each of these operations, in this order."""
    wanted = [[*map(str, cells), name] for cells in first_cells for name in names]
    width = len(wanted[0])
    lines = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert [line[:width] for line in lines if len(line) > width and line[width - 1] in names] == wanted


def assert_latency(us, n):
    assert 0 < us["min"] <= us["avg"] <= us["max"] and us["spread"] >= 0 and len(us["by_rank"]) == n


def assert_figures(found, n):
    """The figures of one operation in the JSON: all are there, and they fit each other."""
    us, nbytes, gbps = found["latency_us"], found["bytes"], found["gbps"]
    assert_latency(us, n)
    assert sum(nbytes["sent"]) == sum(nbytes["received"]) <= sum(nbytes["selections"])
    assert gbps["wire"]["aggregate"] == pytest.approx(sum(nbytes["sent"]) / us["max"] / 1e3)
    assert gbps["selections"]["per_rank"] == pytest.approx(sum(nbytes["selections"]) / us["max"] / 1e3 / n)
    assert found["bound_us"] > 0


def assert_pair(result):
    """Its bound is that of its parts."""
    assert result["pair"]["bound_us"] == pytest.approx(result["dispatch"]["bound_us"] + result["combine"]["bound_us"])
