"""The benchmark: its byte counts by hand, its options, and the command as a user runs it; low latency.  test_bench_ht.py: what is
different in high throughput."""
import json
import sys
from unittest import mock

import numpy as np
import pytest
import ranks
from benchmark import (EXAMPLE, FAKE_LATENCY, HIDDEN, SMALL, assert_figures, assert_latency, assert_pair, assert_table,
                       assert_worked_example, bench, bench_in_modes, by_a_fake_clock, command, cpu_only, with_wrong)

from pyep.__main__ import read
from pyep.bench import figures, inputs, low_latency, options, plot, timing, traffic

ROWS = "dispatch", "combine", "pair"
LL = ("ll", *SMALL)
#                        selections    sent          received      bound, us
BY_HAND = {
    "dispatch, bf16":   ([5120, 6144], [2048, 3072], [3072, 2048], 0.0068),
    "dispatch, fp8":    ([2640, 3168], [1056, 1584], [1584, 1056], 0.0035),
    "combine, reduced": ([5120, 6144], [3072, 2048], [2048, 3072], 0.0068),
    "combine, direct":  ([5120, 6144], [4096, 3072], [3072, 4096], 0.0091),
}


# -- figures ----------------------------------------------------------------------------------------------------------


def example(name):
    operation, kind = name.split(", ")
    option = {"dispatch": "dtype", "combine": "combine"}[operation]
    return traffic.low_latency(EXAMPLE, HIDDEN, 4, **{option: kind})[operation]


@pytest.mark.parametrize("name", BY_HAND)
def test_worked_example(name):
    assert_worked_example(name, example(name), *BY_HAND[name])


def test_bytes_that_the_cpu_copies():
    """Rank 0: 4 rows into scratch memory and 6 delivered, or 5 of them once per rank; then 6 or 5 taken and 5 or 4 summed."""
    def rows(**options):
        return [(phase.copied / (2 * HIDDEN)).tolist() for phase in traffic.low_latency(EXAMPLE, HIDDEN, 4, **options).values()]
    assert rows() == [[10, 10], [11, 11]]
    assert rows(combine="reduced") == [[10, 10], [10, 10]]
    assert rows(layout="rank-major", combine="reduced") == [[9, 9], [9, 9]]


def test_one_rank_sends_nothing():
    dispatch, combine = traffic.low_latency([EXAMPLE[0]], HIDDEN, 4).values()
    assert dispatch.busiest == combine.busiest == 0 and dispatch.selections.tolist() == [5120]


def test_an_expert_named_twice():
    """Two selections, of which one row crosses to it and two come back."""
    dispatch, combine = traffic.low_latency([np.array([[2, 2]]), np.array([[-1, -1]])], HIDDEN, 4).values()
    assert (dispatch.selections.tolist(), dispatch.sent.tolist(), combine.sent.tolist()) == ([2048, 0], [1024, 0], [0, 2048])


def test_latency_and_bandwidth():
    us = np.array([[1.0, 2, 9], [4, 4, 5]])                      # medians 2 and 4
    found = figures.figures(us, example("dispatch, bf16"), 0.5)
    assert found["latency_us"] == {"max": 4, "avg": 3, "min": 2, "spread": 8, "by_rank": [2, 4]}
    assert found["gbps"]["wire"] == pytest.approx({"aggregate": 5120 / 4000, "per_rank": 2560 / 4000})
    assert found["gbps"]["selections"] == pytest.approx({"aggregate": 11264 / 4000, "per_rank": 5632 / 4000})


def test_rows_and_the_phases_they_move():
    rows = {"dispatch": ("dispatch",), "pair": ("dispatch", "combine"), "neither": ()}
    times = {"dispatch": np.full((2, 1), 1.0), "pair": np.full((2, 1), 4.0), "neither": np.full((2, 1), 3.0)}
    found = figures.by_row(rows, times, traffic.low_latency(EXAMPLE, HIDDEN, 4), {"dispatch": 0.25, "combine": 0.5})
    pair = found["pair"]
    assert pair["bytes"]["sent"] == [2048 + 4096, 3072 + 3072] and pair["bound_us"] == 0.75
    assert pair["gbps"]["wire"]["aggregate"] == pytest.approx((5120 + 7168) / 4000)
    assert found["dispatch"]["bytes"]["sent"] == [2048, 3072] and found["dispatch"]["bound_us"] == 0.25
    assert list(found["neither"]) == ["latency_us"] and found["neither"]["latency_us"]["max"] == 3, "no bytes, no bandwidth"


def test_inputs():
    point = low_latency.Point(50, 64, 4, 16)
    routing = [inputs.routing(point, 3, rank) for rank in range(2)]
    assert all(len(set(experts)) == 4 for idx in routing for experts in idx.tolist()), "a token selects different experts"
    assert {*np.unique(routing)} == set(range(16)) and not np.array_equal(*routing)
    assert np.array_equal(inputs.routing(point, 3, 1), routing[1]) and not np.array_equal(inputs.routing(point, 4, 1), routing[1])
    pairs, tokens = traffic.rows_between(routing, 16)
    for layout, rows, shape in (("expert-major", pairs, (8, 100, 64)), ("rank-major", tokens, (2, 50, 64))):
        y = inputs.outputs(point, layout, routing, 3, 1)
        assert y.shape == shape and np.count_nonzero(y.astype(np.float32).any(axis=2)) == rows[:, 1].sum()


@pytest.mark.parametrize("bottom, top", [(41.5, 48.5), (6, 55), (3, 20_000)])
def test_numbers_along_the_latency_axis(bottom, top):
    figure, axes = plot.pyplot.subplots()
    axes.plot([1, 2], [bottom, top])
    plot.in_logarithms(axes)
    figure.canvas.draw()
    shown = [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks()]
    plot.pyplot.close(figure)
    assert 3 <= sum(bottom < float(text) < top for text in shown) <= 15 and axes.get_yscale() == "log"


class OneRank:
    """As much of a communicator as timing needs."""

    Barrier, allgather = staticmethod(lambda: None), staticmethod(lambda mine: [mine])


def test_time_of_the_host(monkeypatch):
    """Of each repeat the median of its calls; neither the waiting in a call counts nor what the GPU does afterwards."""
    clock = iter([0, 100, 0, 100, 0, 100, 5, 12, 20, 22, 30, 90, 0, 4, 5, 10, 11, 17])      # a repeat to warm up, then two
    waits = iter([0, 0] * 3 + [1, 3, 0, 0, 0, 0] + [2, 2] * 3)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    library = mock.Mock(seconds=lambda run: run() or 1e9)
    us = timing.time_host(lambda: None, lambda: next(waits), library, mock.Mock(iterations=3, repeats=2, warm_up=1), OneRank)
    assert us.tolist() == [[5e6, 5e6]]                           # of 7 - 2, 2 and 60; of 4, 5 and 6


# -- options ----------------------------------------------------------------------------------------------------------


def points(*argv, num_ranks=4):
    return read(["bench", "ll", *argv], num_ranks).points


@pytest.fixture
def variables(monkeypatch):
    for name in low_latency.LowLatency.environment.values():
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(f"MSCCLPP_EP_LL_{name}", text) for name, text in values.items()]


def test_defaults(variables):
    assert points() == [(128, 7168, 8, 256)]


def test_environment_is_the_default(variables):
    variables(TOKENS="4", HIDDEN="256", TOPK="2", EXPERTS_PER_RANK="3")
    assert points() == [(4, 256, 2, 12)]


def test_options_win_over_the_environment(variables):
    variables(TOKENS="4", HIDDEN="256", TOPK="2", EXPERTS_PER_RANK="3")
    assert points("--tokens", "5", "--topk", "1", "--experts-per-rank", "7") == [(5, 256, 1, 28)]
    assert points("--hidden", "64", "--experts", "8", "--sweep", "topk=3") == [(4, 64, 3, 8)]


def test_sweeps_multiply(variables):
    assert points("--sweep", "experts=8,16", "--sweep", "tokens=1,2", "--hidden", "8") == [
        (1, 8, 8, 8), (1, 8, 8, 16), (2, 8, 8, 8), (2, 8, 8, 16)]


@pytest.mark.parametrize("argv, message", [
    (["--tokens", "0"], "'0' is not a whole number of at least 1"),
    (["--tokens", "many"], "'many' is not a whole number"),
    (["--hidden", "100"], "hidden is 100; expected a multiple of 8"),
    (["--experts", "255"], "num_experts is 255; expected a multiple of the 4 ranks"),
    (["--experts", "8", "--topk", "9"], "--topk selects 9 experts a token"),
    (["--experts", "8", "--experts-per-rank", "2"], "not allowed with"),
    (["--sweep", "speed=1,2"], "expected NAME=N,N,..."),
    (["--sweep", "tokens=1,x"], "'x' is not a whole number"),
    (["--sweep", "tokens=1", "--sweep", "tokens=2"], "--sweep names a quantity twice"),
    (["--dtype", "fp4"], "invalid choice"),
    (["--dtype", "fp8", "--hidden", "64"], "not a multiple of 128"),
    (["--dtype", "fp8", "--hidden", "128", "--round-scale", "--ue8m0"], "not a multiple of 512"),
    (["--dtype", "fp8", "--ue8m0"], "--ue8m0 needs --round-scale"),
    (["--round-scale"], "need --dtype fp8"),
    (["--layout", "rank-major", "--combine", "direct"], "needs --layout expert-major"),
    (["--link-gbps", "0"], "not a number above 0"),
    (["--plot", "a.png"], "add --sweep"),
    (["--json", "/no/such/folder/a.json"], "its folder does not exist"),
    pytest.param(["--mode", "graph"], "needs a GPU", marks=cpu_only),
    (["--arrays", "numpy,jax"], "expected some of cupy, numpy, torch"),
    (["--arrays", "torch,torch"], "each once"),
    pytest.param(["--mode", "host"], "needs a GPU", marks=cpu_only),
    pytest.param(["--arrays", "numpy,cupy"], "--arrays cupy is not for the cpu engine", marks=cpu_only),
    pytest.param(["--transport", "ipc"], "does not serve the cpu engine", marks=cpu_only),
])
def test_bad_options(argv, message, variables, capsys):
    with pytest.raises(SystemExit, match="2"):
        points(*argv)
    assert message in capsys.readouterr().err


def test_bad_environment(variables, capsys):
    variables(TOPK="eight")
    with pytest.raises(SystemExit, match="2"):
        points()
    assert "environment variable MSCCLPP_EP_LL_TOPK: 'eight' is not a whole number" in capsys.readouterr().err


def test_missing_package(variables, capsys, monkeypatch):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else name)
    points("--sweep", "tokens=1")
    with pytest.raises(SystemExit, match="2"):
        points("--sweep", "tokens=1", "--plot", "a.png")
    assert "--plot needs the package matplotlib, which is not installed: pip install --editable '.[bench]'  #" in capsys.readouterr(
        ).err


# -- runs -------------------------------------------------------------------------------------------------------------


def test_sweep(tmp_path, device):
    """Table, progress bar, JSON and plot of a sweep; the results are the oracle's."""
    files = tmp_path / "a.json", tmp_path / "a.png"
    (status, out, err), (other_status, *other) = ranks.run(
        2, bench, *LL, "--sweep", "tokens=8,4", "--check", "--json", str(files[0]), "--plot", str(files[1]))
    assert status == other_status == 0 and other == ["", ""], "rank 0 alone speaks"
    for text in ("2 ranks", f"engine      {device}", "tokens swept, hidden 64, top-3, 8 experts", "equal the oracle's", "memcpy"):
        assert text in out or text == "memcpy" and device == "cuda"
    assert "2/2" in err, "the progress bar"
    modes = ["eager", "graph"] if device == "cuda" else ["eager"]
    assert_table(out, [(tokens, mode) for tokens in (8, 4) for mode in modes], ROWS)
    written = json.loads(files[0].read_text())
    assert written["machine"]["engine"] == device and written["machine"]["ranks"] == 2 and "numba" in written["machine"]["versions"]
    assert written["options"]["layout"] == "expert-major" and written["options"]["iterations"] == 2
    assert [(r["tokens"], r["mode"]) for r in written["results"]] == [(t, mode) for t in (8, 4) for mode in modes]
    for result in written["results"]:
        for name in ROWS:
            assert_figures(result[name], 2)
        assert_pair(result)
        assert result["dispatch"]["bytes"]["selections"] == [2 * 64 * 3 * result["tokens"]] * 2
    assert files[1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and files[1].stat().st_size > 10_000


@pytest.mark.parametrize("argv", [
    ["--combine", "reduced"],
    ["--layout", "rank-major", "--dtype", "fp8", "--round-scale", "--ue8m0", "--hidden", "1536"],
])
def test_other_modes(argv, device):
    """Checked against the oracle, so they run in the mode that they say."""
    (status, out, _), _ = ranks.run(2, bench, *LL, "--check", *argv)
    assert status == 0 and "equal the oracle's" in out
    assert ("rank-major; combine bf16, reduced" if "rank-major" in argv else "expert-major; combine bf16, reduced") in out


@pytest.mark.parametrize("operation, name", [("low_latency_dispatch", "recv_x"), ("low_latency_combine", "combined_x")])
def test_check_fails(operation, name):
    (status, out, err), other = ranks.run(2, with_wrong, operation, *LL, "--check")
    assert status == 1 and other == (1, "", "") and out == "", "nothing is timed"
    assert "--check failed" in err and f"values of {name} differ, first at (0, 0" in err
    assert "rank 1: " in err and "rank 0: " not in err


def letter(operation, args, options):
    return operation.removeprefix("low_latency_")[0]


@cpu_only
def test_what_is_timed():
    """A pair that compiles, then 4 times 2 of each kind; the combines reuse a dispatch, and warm-up does not count."""
    operations = "low_latency_dispatch", "low_latency_combine"
    (calls, result), (other_calls, _) = ranks.run(2, by_a_fake_clock, operations, letter, *LL)
    assert calls == other_calls == "dc" + "d" * 8 + "c" * 8 + "dc" * 8
    assert all(result[name]["latency_us"] == FAKE_LATENCY for name in ROWS)


def test_host_rows(device):
    """As on GPUs, next to those of eager mode: times without bytes."""
    found = ranks.run(2, bench_in_modes, ["eager", "host"], *LL)[0]
    assert found["options"]["repeats"] == 3
    eager, host = found["results"]
    assert (eager["mode"], host["mode"]) == ("eager", "host") and eager["array"] == host["array"] == found["machine"]["arrays"][0]
    assert_pair(eager)
    for name in ROWS:
        assert list(host[name]) == ["latency_us"]
        assert_latency(host[name]["latency_us"], 2)


@pytest.mark.parametrize("module", [(), ("-m", "mpi4py")])
def test_command(module):
    """With and without -m mpi4py; the JSON alone on stdout."""
    done = command(2, *LL, "--json", "-", "--link-gbps", "100", module=module)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)["results"][0]
    for name in ROWS:
        assert_figures(result[name], 2)
    sent = result["dispatch"]["bytes"]
    assert result["dispatch"]["bound_us"] == pytest.approx(max(sent["sent"] + sent["received"]) / 100e3)
    assert "bound       wire bytes of the busiest rank and direction / 100 GB/s" in done.stderr


def test_bad_options_of_the_command():
    """Said once, and the exit status is 2."""
    done = command(2, "ll", "--tokens", "-1", module=())
    assert done.returncode == 2 and done.stderr.count("error: argument --tokens") == 1 and done.stdout == ""


@cpu_only
def test_a_rank_that_fails_ends_all():
    """Also without -m mpi4py, and long before the others would time out."""
    wrong = ("-n", "1", "env", "PYEP_CPU_SHAPE=junk", sys.executable, "-m", "pyep", "bench", *LL, ":")
    done = command(1, *LL, module=(), before=wrong)
    assert done.returncode not in (0, 2) and "PYEP_CPU_SHAPE is 'junk'" in done.stderr


def test_torch():
    pytest.importorskip("torch")
    done = command(2, *LL, "--check", "--arrays", "numpy,torch")
    assert done.returncode == 0 and "equal the oracle's" in done.stdout, done.stdout + done.stderr
    assert "numpy and torch arrays" in done.stdout
    assert_table(done.stdout, [(array, "eager") for array in ("numpy", "torch")], ROWS)
