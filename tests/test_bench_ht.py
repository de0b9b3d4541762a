"""`python -m pyep bench ht`: what is different from low latency (test_bench.py)."""
import json
from unittest import mock

import numpy as np
import pytest
import ranks
from benchmark import (EXAMPLE, FAKE_LATENCY, HIDDEN, SMALL, assert_figures, assert_latency, assert_pair, assert_table,
                       assert_worked_example, bench, bench_in_modes, by_a_fake_clock, command, cpu_only, with_wrong)

import pyep
from pyep.__main__ import read
from pyep.bench import devices, high_throughput, high_throughput_operations, inputs, low_latency, options, traffic

ROWS = "layout", "dispatch", "dispatch + exchange", "combine", "pair"
HT = ("ht", *SMALL)


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, by_hand", [
    ("dispatch, bf16", ([5120, 6144], [2048, 3072], [3072, 2048], 0.0068)),
    ("dispatch, fp8", ([2640, 3168], [1056, 1584], [1584, 1056], 0.0035)),
    ("combine, ht", ([5120, 6144], [3072, 2048], [2048, 3072], 0.0068)),
])
def test_worked_example(name, by_hand):
    operation, kind = name.split(", ")
    phases = traffic.high_throughput(EXAMPLE, HIDDEN, 4, "fp8" if kind == "fp8" else "bf16")
    assert_worked_example(name, phases[operation], *by_hand)


def test_bytes_that_the_cpu_copies():
    """Rank 0 sends 4 rows, its own too, and sums as many; 3 rows of rank 1 travel back from it."""
    dispatch, combine = traffic.high_throughput(EXAMPLE, HIDDEN, 4).values()
    assert (dispatch.copied / (2 * HIDDEN)).tolist() == [4, 5]
    assert (combine.copied / (2 * HIDDEN)).tolist() == [3 + 4, 2 + 5]


def test_inputs():
    point = low_latency.Point(50, 64, 4, 16)
    y = inputs.packed_outputs(point, 7, 9, 3, 1)
    assert y.shape == (9, 64) and y[:7].astype(np.float32).any(axis=1).all() and not y[7:].any()
    assert np.array_equal(inputs.packed_outputs(point, 7, 7, 3, 1), y[:7]), "room behind changes nothing"


# -- options ----------------------------------------------------------------------------------------------------------


def points(*argv, num_ranks=4):
    return read(["bench", "ht", *argv], num_ranks).points


@pytest.fixture
def variables(monkeypatch):
    for name in high_throughput.HighThroughput.environment.values():
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(f"MSCCLPP_EP_{name}", text) for name, text in values.items()]


@pytest.fixture
def gpu(monkeypatch):
    """Options are read as on a machine with a GPU."""
    monkeypatch.setattr(options, "choose_device", lambda: "cuda")
    monkeypatch.setattr(options, "choose_transport", lambda name, device: mock.Mock())


def test_defaults(variables, gpu):
    assert points() == [(4096, 7168, 8, 256, pyep.Buffer.num_sms)]


@cpu_only
def test_the_cpu_has_no_sms(variables):
    variables(NUM_SMS="8")                                       # of scripts that are for GPUs
    assert points() == [(4096, 7168, 8, 256, None)]


def test_environment_and_options(variables, gpu):
    variables(BENCH_TOKENS="4", BENCH_HIDDEN="256", BENCH_TOPK="2", BENCH_EXPERTS="12", NUM_SMS="8")
    assert points() == [(4, 256, 2, 12, 8)]
    assert points("--num-sms", "16", "--experts-per-rank", "5") == [(4, 256, 2, 20, 16)]
    assert points("--sweep", "num_sms=8,16", "--tokens", "3") == [(3, 256, 2, 12, 8), (3, 256, 2, 12, 16)]


@pytest.mark.parametrize("argv, message", [
    (["--dtype", "fp8", "--hidden", "64"], "not a multiple of 128, as --dtype fp8 needs"),
    (["--layout", "rank-major"], "unrecognized arguments"),
    pytest.param(["--num-sms", "8"], "--num-sms needs a GPU", marks=cpu_only),
    pytest.param(["--sweep", "num_sms=8,16"], "--num-sms needs a GPU", marks=cpu_only),
])
def test_bad_options(argv, message, variables, capsys):
    with pytest.raises(SystemExit, match="2"):
        points(*argv)
    assert message in capsys.readouterr().err


def test_num_sms_are_those_of_the_config():
    """Dispatches, with and without a handle, and combines get the number of the point; the layout's kernel has no such bound."""
    buf = mock.MagicMock(rank=0, group_size=1)
    args = read(["bench", "ht", *SMALL], 1)
    point = high_throughput.Point(8, 64, 3, 4, 6)
    operations = high_throughput_operations.Operations(buf, devices.NumPy(), point, args)
    for call in operations.calls("eager").values():
        call()
    configs = [call.kwargs["config"] for method in (buf.dispatch, buf.combine) for call in method.call_args_list]
    assert len(configs) == 6 and {config.num_sms for config in configs} == {6}


# -- runs -------------------------------------------------------------------------------------------------------------


def test_sweep(tmp_path, device):
    """Table, JSON and plot of a sweep; the results are the oracle's."""
    files = tmp_path / "a.json", tmp_path / "a.png"
    (status, out, err), other = ranks.run(
        2, bench, *HT, "--sweep", "tokens=8,4", "--check", "--json", str(files[0]), "--plot", str(files[1]))
    assert status == 0 and other == (0, "", ""), err
    title = "High-throughput dispatch and combine, 2 ranks"
    assert title in out and "tokens swept, hidden 64, top-3, 8 experts" in out and "equal the oracle's" in out
    assert (", 20 SMs" in out) == (device == "cuda")
    modes = ["eager", "graph"] if device == "cuda" else ["eager"]
    assert_table(out, [(tokens, mode) for tokens in (8, 4) for mode in modes], ROWS)
    written = json.loads(files[0].read_text())
    assert written["benchmark"] == "ht" and written["options"]["dtype"] == "bf16"
    assert [(r["tokens"], r["mode"]) for r in written["results"]] == [(t, mode) for t in (8, 4) for mode in modes]
    for result in written["results"]:
        assert list(result["layout"]) == ["latency_us"], "it moves no rows"
        assert_latency(result["layout"]["latency_us"], 2)
        for name in ROWS[1:]:
            assert_figures(result[name], 2)
        assert_pair(result)
        assert result["dispatch"]["bytes"] == result["dispatch + exchange"]["bytes"]
        assert result["dispatch"]["bytes"]["selections"] == [2 * 64 * 3 * result["tokens"]] * 2
    assert files[1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and files[1].stat().st_size > 10_000


def test_fp8():
    (status, out, err), _ = ranks.run(2, bench, *HT, "--check", "--dtype", "fp8", "--hidden", "256")
    assert status == 0 and "equal the oracle's" in out and "dispatch fp8, combine bf16" in out, err


@pytest.mark.parametrize("operation, name", [("dispatch", "recv_x"), ("combine", "combined_x")])
def test_check_fails(operation, name):
    (status, out, err), other = ranks.run(2, with_wrong, operation, *HT, "--check")
    assert status == 1 and other == (1, "", "") and out == "", "nothing is timed"
    assert "--check failed" in err and f"values of {name} differ, first at (0, 0" in err
    assert "rank 1: " in err and "rank 0: " not in err
    assert ("eager: cached dispatch: " in err) == (operation == "dispatch")


def letter(operation, args, options):
    """l, c; h for a dispatch with a handle, d for one without."""
    if operation == "dispatch":
        return "h" if len(args) > 2 else "d"
    return {"get_dispatch_layout": "l", "combine": "c"}[operation]


@cpu_only
def test_what_is_timed():
    """A layout to use; a dispatch whose handle is used, and each operation once to compile; again a dispatch, then 4 times 2 of
    each kind; the layout is not part of a dispatch."""
    operations = "get_dispatch_layout", "dispatch", "combine"
    (calls, result), (other_calls, _) = ranks.run(2, by_a_fake_clock, operations, letter, *HT)
    assert calls == other_calls == "l" + "d" + "lhdcdc" + "d" + "l" * 8 + "h" * 8 + "d" * 8 + "c" * 8 + "dc" * 8
    assert all(result[name]["latency_us"] == FAKE_LATENCY for name in ROWS)


def as_for_graphs(comm):
    """num_worst_tokens of the dispatches without a handle, in eager mode and in graphs; the JSON."""
    right, rooms = pyep.Buffer.dispatch, []

    def dispatch(self, x, handle=None, **others):
        rooms.extend([others["num_worst_tokens"]] if handle is None else [])
        return right(self, x, handle, **others)
    with mock.patch.object(pyep.Buffer, "dispatch", dispatch):
        return rooms, bench_in_modes(comm, ["eager", "graph"], *HT, "--check")


@cpu_only
def test_graphs_have_room_for_the_worst_case():
    """Where every rank sends all its tokens everywhere; the results of both modes are the oracle's."""
    (rooms, found), _ = ranks.run(2, as_for_graphs)
    assert [result["mode"] for result in found["results"]] == ["eager", "graph"]
    prepared, checked, timed = 3, 1, 1 + 2 * 8                   # dispatches without a handle
    assert rooms == [0] * prepared + [16] * prepared + [0] * checked + [16] * checked + [0] * timed + [16] * timed


def waits_of_each(comm):
    """Whether the host waited in an operation, by name."""
    args = read(["bench", *HT], comm.size)
    point = args.points[0]
    with args.benchmark.make_buffer(point, args, comm) as buf:
        operations = args.benchmark.make_operations(buf, devices.make(args.arrays[0], buf), point, args)
        found = {}
        for name, call in operations.calls("host").items():
            before = operations.waited()
            call()
            found[name] = operations.waited() > before
        return found


def test_host_rows():
    """Only what exchanges counts waits; a dispatch with room for the worst case does not."""
    waits, _ = ranks.run(2, waits_of_each)
    assert waits == {"layout": False, "dispatch": False, "dispatch + exchange": True, "dispatch, worst case": False,
                     "combine": False, "pair": True}
    host, = ranks.run(2, bench_in_modes, ["host"], *HT)[0]["results"]
    for name in waits:
        assert list(host[name]) == ["latency_us"]


def test_command_with_torch():
    pytest.importorskip("torch")
    done = command(2, *HT, "--check", "--arrays", "torch", "--dtype", "fp8", "--hidden", "256")
    assert done.returncode == 0 and "torch arrays" in done.stdout and "equal the oracle's" in done.stdout, done.stdout + done.stderr
