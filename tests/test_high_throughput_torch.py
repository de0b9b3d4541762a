"""High throughput with PyTorch tensors: dispatch and combine as each other's backward pass, and FP8."""
import ml_dtypes
import numpy as np
import pytest
import ranks
from engine import make_high_throughput_buffer, on_gpu
from high_throughput_case import Case, assert_bits

pytest.importorskip("torch")
HEAP = 2**22
VIEWED = {"bfloat16": ("int16", np.int16), "float8_e4m3fn": ("uint8", np.uint8)}        # what NumPy and PyTorch exchange as bits


def tensor(array):
    """A tensor of an array's values, in the engine's memory."""
    import torch
    bits, numpy_bits = VIEWED.get(array.dtype.name, (None, None))
    t = torch.from_numpy(array.view(numpy_bits) if bits else array).to("cuda" if on_gpu() else "cpu")
    return t.view(getattr(torch, array.dtype.name)) if bits else t


def numpy(t):
    import torch
    name = str(t.dtype).removeprefix("torch.")
    if name in VIEWED:
        return t.detach().view(getattr(torch, VIEWED[name][0])).cpu().numpy().view(getattr(ml_dtypes, name))
    return t.detach().cpu().numpy()


def functions(buf):
    """dispatch and combine as functions that autograd goes through: the backward pass of each is the other, by the same handle."""
    import torch

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weights, layout, topk_idx):
            per_rank, per_node, per_expert, in_rank = layout
            recv_x, idx, recv_weights, counts, ctx.handle, _ = buf.dispatch(x, None, per_rank, per_node, in_rank, per_expert,
                                                                            topk_idx, weights)
            ctx.mark_non_differentiable(idx)
            ctx.save_for_backward(idx)
            return recv_x, recv_weights, idx, ctx.handle

        @staticmethod
        def backward(ctx, grad_x, grad_weights, *_):
            idx, = ctx.saved_tensors
            grad_weights = torch.where(idx >= 0, grad_weights, 0.0)              # the 0 beside a -1 is a constant
            x, weights, _ = buf.combine(grad_x.contiguous(), ctx.handle, topk_weights=grad_weights.contiguous())
            return x, weights, None, None

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, handle):
            ctx.handle = handle
            return buf.combine(y, handle)[0]

        @staticmethod
        def backward(ctx, grad):
            return buf.dispatch(grad.contiguous(), ctx.handle)[0], None

    return Dispatch.apply, Combine.apply


def train(comm):
    """A layer whose expert e multiplies by e + 1, forward and backward, against the same layer on one rank without any of this.

    Weights are 1 or 2, tokens and gradients small integers: everything is exact in bf16.
    """
    import torch
    if on_gpu():
        torch.cuda.set_device(comm.rank % torch.cuda.device_count())
    L, me = 2, comm.rank
    case = Case(3, (9, 0, 14)[:comm.size], 16, L * comm.size, 2)
    made, rng = case.make(), np.random.default_rng(3)
    x = [rng.integers(-2, 3, (t, 16)).astype(ml_dtypes.bfloat16) for t in case.tokens][me]
    weights = [rng.integers(1, 3, (t, 2)).astype(np.float32) for t in case.tokens][me]
    grad = [rng.integers(-1, 2, (t, 16)).astype(ml_dtypes.bfloat16) for t in case.tokens][me]
    idx = made.topk_idx[me]
    with make_high_throughput_buffer(comm, HEAP) as buf:
        dispatch, combine = functions(buf)
        x_t, w_t = tensor(x).requires_grad_(), tensor(weights).requires_grad_()
        *layout, _ = buf.get_dispatch_layout(tensor(idx), case.experts)
        assert layout[3].dtype == torch.bool and layout[0].dtype == layout[2].dtype == torch.int32
        recv_x, recv_weights, recv_idx, handle = dispatch(x_t, w_t, layout, tensor(idx))
        assert recv_x.dtype == torch.bfloat16 and recv_idx.dtype == torch.int64 and recv_weights.dtype == torch.float32
        assert recv_x.device == x_t.device and all(torch.is_tensor(part) for part in handle)
        factor = torch.where(recv_idx >= 0, recv_idx + me * L + 1, 0) * recv_weights
        out = combine(recv_x * factor.sum(dim=1, keepdim=True).to(torch.bfloat16), handle)
        out.backward(tensor(grad))

        factors = (idx + 1) * weights
        of = lambda a: a.astype(np.float64)  # noqa: E731
        np.testing.assert_array_equal(of(numpy(out)), of(x) * factors.sum(axis=1, keepdims=True))
        np.testing.assert_array_equal(of(numpy(x_t.grad)), of(grad) * factors.sum(axis=1, keepdims=True))
        np.testing.assert_array_equal(of(numpy(w_t.grad)), (idx + 1) * (of(grad) * of(x)).sum(axis=1, keepdims=True))
    return "done"


def test_a_layer_trains():
    """A process of its own for each rank: CuPy and PyTorch each like to be first."""
    done = ranks.launch(3, train, timeout=200)
    assert done.results == ["done"] * 3, (done.errors, done.stderr)


def move_fp8(comm):
    import torch
    if on_gpu():
        torch.cuda.set_device(comm.rank % torch.cuda.device_count())
    made, me = Case(2, (20, 13)[:comm.size], 256, 4 * comm.size, 3, fp8=True, values="bits").make(), comm.rank
    with make_high_throughput_buffer(comm, HEAP) as buf:
        per_rank, _, per_expert, in_rank = (None if part is None else tensor(part) for part in made.layout[me])
        (data, scales), *_, event = buf.dispatch(tuple(map(tensor, made.x[me])), None, per_rank, None, in_rank, per_expert)
        event.synchronize()
        assert data.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
        for got, want, name in zip((data, scales), made.cached(made.x)[me].recv_x, ("data", "scales")):
            assert_bits(numpy(got), want, name)
    return "done"


def test_fp8():
    done = ranks.launch(2, move_fp8, timeout=200)
    assert done.results == ["done"] * 2, (done.errors, done.stderr)
