"""The examples, run as a user runs them, and the pieces of `moe_layer.py` that its result rests on."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import ranks
from engine import on_gpu

with_ports = pytest.mark.skipif(on_gpu() and importlib.util.find_spec("mscclpp") is None, reason="on GPUs needs MSCCL++")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEXT = bytes(range(32, 127)) * 3


def load(name):
    """The module `examples/<name>.py`, which is not in a package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mpi(n, *command):
    """`python -m mpi4py <command>` on n ranks: the finished process."""
    line = [*ranks.mpiexec(), "-n", str(n), sys.executable, "-m", "mpi4py", *map(str, command)]
    env = ranks.environment()
    del env["OMP_NUM_THREADS"]  # a user does not set it; moe_layer.py does
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)


def assert_passes(done):
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") == 1 and "FAIL" not in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def moe():
    return load("moe_layer")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


# -- as a user runs them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4])
def test_round_trip(n):
    assert_passes(mpi(n, EXAMPLES / "round_trip.py"))


@pytest.mark.parametrize("n", [1, 3])
def test_train(n):
    """It compares its gradients itself; the loss falls."""
    done = mpi(n, EXAMPLES / "train.py")
    assert done.returncode == 0 and f"{n} ranks; against a dense layer" in done.stdout, done.stdout + done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 100


def test_round_trip_is_short():
    assert len((EXAMPLES / "round_trip.py").read_text().splitlines()) < 40


def test_modes():
    assert_passes(mpi(2, EXAMPLES / "modes.py"))


def test_modes_is_short():
    assert len((EXAMPLES / "modes.py").read_text().splitlines()) <= 60


def test_modes_fails(tmp_path):
    """With wrong weights in combine, which only the first of the modes looks at."""
    program, right = (EXAMPLES / "modes.py").read_text(), "idx, weights, got.handle)"
    assert program.count(right) == 1
    (tmp_path / "wrong.py").write_text(program.replace(right, "idx, 2 * weights, got.handle)"))
    done = mpi(2, tmp_path / "wrong.py")
    assert done.returncode == 1 and "FAIL" in done.stdout and "PASS" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("n, per_node, kinds", [
    (2, "2", ["memory"]), pytest.param(2, "1", ["port"], marks=with_ports),
    pytest.param(3, "2", ["memory", "port"], marks=with_ports)])
def test_ping_pong(n, per_node, kinds, monkeypatch):
    monkeypatch.setenv("PYEP_RANKS_PER_NODE", per_node)
    done = mpi(n, EXAMPLES / "ping_pong.py")
    assert_passes(done)
    header, *rows, _ = done.stdout.splitlines()
    assert header.split()[-len(kinds):] == kinds and len(rows) == 9
    for row in rows:
        nbytes, *figures = [float(word.replace(",", "")) for word in row.split()]
        for us, gb in zip(figures[::2], figures[1::2], strict=True):
            assert us > 0 and abs(gb - nbytes / us / 1e3) < 0.001 + 0.05 * gb
        assert len(figures) == 2 * len(kinds)


def test_ping_pong_fails(tmp_path):
    """Where one rank sends something else."""
    program, right = (EXAMPLES / "ping_pong.py").read_text(), "xp.asarray(bytes_of(comm.rank))"
    assert program.count(right) == 1
    (tmp_path / "wrong.py").write_text(program.replace(right, "xp.asarray(bytes_of(0))"))
    done = mpi(2, tmp_path / "wrong.py")
    assert done.returncode == 1 and "FAIL" in done.stdout and "PASS" not in done.stdout, done.stdout + done.stderr


def test_ping_pong_alone():
    done = mpi(1, EXAMPLES / "ping_pong.py")
    assert done.returncode == 1 and "needs two ranks or more" in done.stderr, done.stdout + done.stderr


def test_moe_layer_by_default():
    """The first command of the README: its own text, no options."""
    assert_passes(mpi(4, EXAMPLES / "moe_layer.py"))


@pytest.mark.parametrize(
    "n, options",
    [
        (4, ["--preset", "deepseek-v3", "--scale", "1/64", "--tokens", "32"]),
        (3, ["--preset", "qwen3-30b-a3b", "--scale", "1/64", "--tokens", "32"]),  # experts that do not divide
        (2, ["--preset", "mixtral-8x7b", "--scale", "1/64", "--tokens", "100", "--seed", "7"]),
        (4, ["--preset", "deepseek-v2-lite", "--scale", "1/64", "--tokens", "8", "--limit", "33"]),  # 8, 8, 8, 9 tokens
        (4, ["--preset", "deepseek-v2-lite", "--scale", "1/64", "--limit", "2"]),  # two ranks without a token
    ],
)
def test_moe_layer(n, options, text):
    assert_passes(mpi(n, EXAMPLES / "moe_layer.py", text, *options))


def test_moe_layer_alone(text):
    """One rank sends nothing to others; top-k rows a token are delivered on any number of ranks."""
    done = mpi(1, EXAMPLES / "moe_layer.py", text, "--preset", "gpt-oss-20b", "--scale", "1/64")
    assert_passes(done)
    assert "\nsent       0 rows" in done.stdout and f"\ndelivered  {4 * len(TEXT):,} rows" in done.stdout, done.stdout


def test_moe_layer_fails(text, tmp_path):
    """With the weights of the experts exchanged, the table says FAIL and mpiexec returns an error."""
    program, right = (EXAMPLES / "moe_layer.py").read_text(), "topk_weights, handle)"
    assert program.count(right) == 1
    (tmp_path / "wrong.py").write_text(program.replace(right, "topk_weights[:, ::-1].copy(), handle)"))
    done = mpi(2, tmp_path / "wrong.py", text, "--preset", "mixtral-8x7b", "--scale", "1/64")
    assert done.returncode == 1 and "FAIL" in done.stdout and "PASS" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("options", [["--scale", "2"], ["--scale", "0"], ["--tokens", "0"], ["--preset", "gpt-9"]])
def test_moe_layer_rejects(moe, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moe_layer.py", *options])
    with pytest.raises(SystemExit, match="2"):
        moe.parse()
    assert options[0] in capsys.readouterr().err


# -- pieces -----------------------------------------------------------------------------------------------------------


def same_bits(a, b):
    return a.dtype == b.dtype and np.array_equal(a.view(np.uint16), b.view(np.uint16))


def test_bf16_widening_is_exact(moe):
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    assert np.array_equal(moe.to_f32(every).view(np.uint32), every.view(np.uint16).astype(np.uint32) << 16)
    assert same_bits(moe.to_bf16(moe.to_f32(every)), every)


def test_bf16_rounding_is_that_of_ml_dtypes(moe):
    """Around every bf16 value: itself, its neighbours in float32, the middle to the next value and its neighbours."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = ((np.arange(2**16, dtype=np.uint32) << 16)[:, None] | low).view(np.float32).ravel()
    values = values[~np.isnan(values)]
    assert same_bits(moe.to_bf16(values), values.astype(ml_dtypes.bfloat16))


def test_uniform(moe):
    """Tables have the moments asked for, do not resemble each other, and can be made in parts."""
    a, b = moe.uniform((1000, 100), 0.5, "a"), moe.uniform((1000, 100), 0.5, "b")
    assert a.dtype == np.float32 and np.array_equal(a, a.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert abs(a.mean()) < 0.01 and abs(a.std() - 0.5) < 0.01 and abs(a).max() <= 0.875
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02
    assert np.array_equal(moe.uniform((10, 100), 0.5, "a", 5000), a[50:60])


def test_tokens_differ(moe):
    """Also those of equal bytes; and a part of the file gives the tokens that the whole file gives."""
    data = np.frombuffer(b"a" * 50, np.uint8)
    x = moe.embed(data, 0, 64, 0)
    assert len(np.unique(moe.to_f32(x), axis=0)) == 50
    assert same_bits(moe.embed(data[20:], 20, 64, 0), x[20:])


@pytest.mark.parametrize("preset", ["deepseek-v3", "mixtral-8x7b"])
def test_gate(moe, preset):
    shape = moe.scaled(moe.PRESETS[preset], 1 / 32, 1)
    x, weights = moe.embed(np.frombuffer(TEXT, np.uint8), 0, shape.hidden, 0), moe.make_gate(shape, 0)
    topk_idx, topk_weights = moe.gate(x, weights, shape.topk)
    assert topk_idx.shape == topk_weights.shape == (len(TEXT), shape.topk)
    assert topk_idx.dtype == np.int64 and topk_weights.dtype == np.float32 and topk_idx.flags.c_contiguous
    assert topk_idx.min() >= 0 and topk_idx.max() < shape.experts
    assert (np.diff(np.sort(topk_idx, axis=1)) > 0).all(), "an expert twice"
    assert topk_weights.min() > 0 and np.allclose(topk_weights.sum(axis=1), 1, atol=1e-6)
    assert np.array_equal(moe.gate(x[7:9], weights, shape.topk)[0], topk_idx[7:9]), "depends on the batch"
    assert moe.gate(x[:0], weights, shape.topk)[0].shape == (0, shape.topk)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1, 1 / 16, 1 / 100, 1e-6])
def test_presets_scale_legally(moe, n, scale):
    for shape in moe.PRESETS.values():
        small = moe.scaled(shape, scale, n)
        assert small.hidden % 8 == small.inter % 8 == small.experts % n == 0 < min(small)
        assert small.topk == shape.topk <= small.experts and 0 <= small.experts - shape.experts < n
        assert small.hidden <= shape.hidden and (scale < 1 or small[:1] + small[2:] == shape[:1] + shape[2:])


def test_expert_is_swiglu(moe):
    """Against float64, within what two roundings to bf16 allow."""
    x, weights = moe.uniform((20, 64), 1, "x"), moe.make_expert(3, moe.Shape(64, 4, 2, 96), 0)
    gate, up, down = (w.astype(np.float64) for w in weights)
    expected = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    assert 0 < moe.worst_error(moe.to_f32(moe.expert(moe.to_bf16(x), weights)), expected) < 2**-7


def test_dense_layer_is_the_weighted_sum(moe):
    """Against a sum over the choices of each token; and what differs from that sum is above the tolerance."""
    shape, seed = moe.Shape(64, 16, 4, 32), 1
    x = moe.embed(np.frombuffer(TEXT[:20], np.uint8), 0, shape.hidden, seed)
    topk_idx, w = moe.gate(x, moe.make_gate(shape, seed), shape.topk)
    of_all = np.stack([moe.to_f32(moe.expert(x, moe.make_expert(e, shape, seed))) for e in range(shape.experts)])
    y = of_all[topk_idx, np.arange(len(x))[:, None]]  # [T, K, H]
    dense = moe.to_f32(moe.layer_dense(x, shape, seed))

    def passes(y, w):
        return moe.worst_error(np.einsum("tk,tkh->th", w, y), dense) <= moe.TOLERANCE

    def changed(a, at, to):
        a = a.copy()
        a[at] = to
        return a

    assert passes(y, w)
    assert not passes(changed(y, (3, 1), 0), w), "a row lost"
    assert not passes(changed(y, (3, 1), y[4, 1]), w), "the row of another token"
    assert not passes(changed(y, (3, 1), of_all[topk_idx[3, 1] - 1, 3]), w), "the row of another expert"
    assert not passes(y, changed(w, 3, w[3, ::-1])), "weights exchanged"
    assert not passes(changed(y, (3, 1, 5), np.nan), w), "not a number"
