"""pyep.deep_ep.utils, what DeepEP's own tests take from it, and that it can be imported under DeepEP's name."""
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import ranks

from pyep import reference

torch = pytest.importorskip("torch")
from pyep.deep_ep.utils import math, testing  # noqa: E402


def test_under_the_name_of_deepep():
    """One line redirects a program that is not to be changed; events are the same class by either name."""
    code = """if True:
        import sys, pyep.deep_ep
        sys.modules["deep_ep"] = pyep.deep_ep
        import deep_ep
        from deep_ep import Buffer, Config, EventHandle, EventOverlap, topk_idx_t
        from deep_ep.utils import EventHandle as handle, EventOverlap as overlap
        from deep_ep.utils.event import EventOverlap as again
        from deep_ep.utils.envs import init_dist
        from deep_ep.utils.math import (calc_diff, create_grouped_scores, hash_tensor, inplace_unique, per_token_cast_back,
                                        per_token_cast_to_fp8)
        from deep_ep.utils.testing import bench, bench_kineto
        assert handle is EventHandle and overlap is again is EventOverlap is pyep.events.EventOverlap"""
    done = subprocess.run([sys.executable, "-c", code], env=ranks.environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("hidden", [256, 200])
def test_fp8_and_back(hidden):
    """As the oracle quantizes, to a unit in the last place of a scale; e4m3 keeps three bits behind the leading one."""
    x = torch.randn((5, hidden), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    x[2] = 0
    values, scales = math.per_token_cast_to_fp8(x)
    assert (values.shape, values.dtype, tuple(scales.shape)) == (x.shape, torch.float8_e4m3fn, (5, 2))
    back = math.per_token_cast_back(values, scales)
    assert back.dtype == torch.bfloat16 and not back[2].any()
    assert ((back - x).float().abs() <= x.float().abs() / 15.9 + scales.repeat_interleave(128, 1)[:, :hidden] * 2**-10).all()
    if hidden == 256:
        want, want_scales = reference.quantize(x.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        np.testing.assert_allclose(scales.numpy(), want_scales, rtol=2e-7)
        np.testing.assert_allclose(values.float().numpy(), want.astype(np.float32), rtol=1 / 8)


def test_packed_exponents():
    """Four scales in an int32: powers of two, the first in the lowest byte; also where columns are contiguous."""
    values = torch.ones((2, 512)).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[127, 128, 126, 127], [130, 127, 127, 127]], dtype=torch.uint8)
    packed = exponents.view(torch.int32)
    want = torch.tensor([[1, 2, 0.5, 1], [8, 1, 1, 1]]).repeat_interleave(128, 1).to(torch.bfloat16)
    for scales in packed, packed.T.contiguous().T:
        assert torch.equal(math.per_token_cast_back(values, scales), want)


def test_inplace_unique():
    x = torch.tensor([[3, 1, 3, -1], [0, 0, 0, 0], [-1, -1, -1, -1], [0, 2, 1, 3]])
    math.inplace_unique(x, 4)
    assert x.tolist() == [[3, 1, -1, -1], [0, -1, -1, -1], [-1] * 4, [3, 2, 1, 0]]
    few, many = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0]])
    math.inplace_unique(few, 2)                                  # fewer slots than columns, and more
    math.inplace_unique(many, 9)
    assert few.tolist() == [[1, 0, -1]] and many.tolist() == [[1, 0]]


def test_comparisons():
    x = torch.randn((4, 64), generator=torch.Generator().manual_seed(1))
    assert math.calc_diff(x, x) == pytest.approx(0, abs=1e-12)
    assert math.calc_diff(torch.zeros(3), torch.ones(3)) == pytest.approx(1 - 2 * 2 / (1 + 4))
    same, other = x.clone(), x.clone()
    other[1, 2] += 1
    assert math.hash_tensor(x) == math.hash_tensor(same) != math.hash_tensor(other)
    scores = torch.ones((2, 6))
    assert math.create_grouped_scores(scores, torch.tensor([[0], [2]]), 3).tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]


def test_seconds_of_kernels():
    """In the order of their starts; of each name, or of each phase of a name."""
    kernels = [("pyep_dispatch", 30, 4.0), ("pyep_dispatch", 10, 1.0), ("pyep_combine_reduced", 20, 5.0), ("fill", 15, 99.0),
               ("pyep_dispatch", 20, 2.0), ("pyep_dispatch", 40, 8.0)]
    assert testing.seconds_of("combine", kernels) == 5e-6 and testing.seconds_of("notify", kernels) == 0
    assert testing.seconds_of("dispatch", kernels) == pytest.approx(15e-6 / 4)
    assert testing.seconds_of("dispatch", kernels, 2) == pytest.approx([2.5e-6, 5e-6])
    with pytest.raises(ValueError, match="4 kernels .* multiple of num_kernels_per_period = 3"):
        testing.seconds_of("dispatch", kernels, 3)


def test_bench_on_the_host(monkeypatch):
    """The first timed call does not count."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clock, calls = iter([0, 100, 0, 2, 0, 4]), []
    monkeypatch.setattr(testing.time, "perf_counter", lambda: next(clock))
    assert testing.bench(lambda: calls.append("f"), 2, 3, lambda: calls.append("p")) == (3, 2, 4)
    assert "".join(calls) == "ff" + "fp" * 3
    with pytest.raises(NotImplementedError, match="there is none"):
        testing.bench_kineto(lambda: None, "dispatch")
