"""PyTorch: a torch.distributed group in place of a communicator, tensors in and out.  Skipped where PyTorch is not installed."""
import contextlib

import ml_dtypes
import numpy as np
import pytest
import ranks
from case import Case, assert_same
from engine import on_gpu

import pyep
from pyep import reference

pytest.importorskip("torch")


def tensor(array):
    """A tensor of an array's values, in the engine's memory."""
    import torch
    device = "cuda" if on_gpu() else "cpu"
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).to(device).view(torch.bfloat16)
    return torch.from_numpy(array).to(device)


def numpy(t):
    import torch
    t = t.cpu()
    return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


def round_in_group(comm, folder):
    import torch
    import torch.distributed as dist
    if on_gpu():
        torch.cuda.set_device(comm.rank % torch.cuda.device_count())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=comm.rank, world_size=comm.size)
    case, me = Case(7, 8, 64, 4 * comm.size, 3, (8, 0, 5)[:comm.size]), comm.rank
    x, idx, weights, y = case.make()
    size = pyep.Buffer.get_low_latency_rdma_size_hint(8, 64, comm.size, case.experts, num_topk=3)
    stream = torch.cuda.stream(torch.cuda.Stream()) if on_gpu() else contextlib.nullcontext()
    with pyep.Buffer(dist.group.WORLD, 0, size, low_latency_mode=True, timeout_s=60) as buf, stream:
        got = buf.low_latency_dispatch(tensor(x[me]), tensor(idx[me]), 8, case.experts, use_fp8=False)
        out, event, _ = buf.low_latency_combine(tensor(y[me]), tensor(idx[me]), tensor(weights[me]), got.handle)
        event.synchronize()
        assert got.recv_x.dtype == torch.bfloat16 and got.recv_count.dtype == torch.int32
        want = reference.low_latency_dispatch(x, idx, 8, case.experts)[me]
        counts = numpy(got.recv_count)
        assert (counts == want.recv_count).all()
        for e, n in enumerate(counts):
            assert_same(numpy(got.recv_x)[e, :n], want.recv_x[e, :n], f"recv_x of local expert {e}")
        assert_same(numpy(out), reference.low_latency_combine(y, idx, weights, 8, case.experts)[me], "combined_x")
    dist.destroy_process_group()


def test_process_group(tmp_path):
    """A process of its own for each rank: CuPy and PyTorch each like to be first."""
    done = ranks.launch(3, round_in_group, str(tmp_path), timeout=200)
    assert not done.errors, done.errors
