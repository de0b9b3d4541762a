"""PyTorch: a torch.distributed group in place of a communicator, tensors in and out.  Skipped where PyTorch is not installed."""
import contextlib
import weakref

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
    return "done"


def ports_of_a_group(comm, folder):
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=comm.rank, world_size=comm.size)
    with pytest.raises(pyep.EPTransportError) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_RANKS_PER_NODE", "1")
        pyep.Buffer(dist.group.WORLD, 0, 1 << 20)
    dist.destroy_process_group()
    return str(caught.value)


@pytest.mark.skipif(on_gpu(), reason="about the ports of the CPU engine")
def test_ports_need_a_communicator(tmp_path):
    done = ranks.launch(2, ports_of_a_group, str(tmp_path), timeout=200)
    assert not done.errors and all("pass comm= instead of group=" in text for text in done.results), done


def test_process_group(tmp_path):
    """A process of its own for each rank: CuPy and PyTorch each like to be first."""
    done = ranks.launch(3, round_in_group, str(tmp_path), timeout=200)
    assert done.results == ["done"] * 3, done.stderr


@contextlib.contextmanager
def buffer_in_group(comm, folder, *shape):
    """A buffer for operations of (max tokens, hidden, experts, top-k) over a process group."""
    import torch
    import torch.distributed as dist
    if on_gpu():
        torch.cuda.set_device(comm.rank % torch.cuda.device_count())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=comm.rank, world_size=comm.size)
    max_tokens, hidden, experts, topk = shape
    size = pyep.Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, comm.size, experts, num_topk=topk)
    with pyep.Buffer(dist.group.WORLD, 0, size, low_latency_mode=True, timeout_s=60) as buf:
        yield buf
    dist.destroy_process_group()


def async_in_group(comm, folder):
    """What an operation uses lives as long as it must, and no longer."""
    import torch
    case = Case(8, 8, 64, 4, 3, (8,))
    x, idx, weights, y = (a[0] for a in case.make())
    with buffer_in_group(comm, folder, 8, 64, case.experts, 3) as buf:
        for _ in range(3):
            kept = [tensor(a) for a in (x, idx)]
            seen = [weakref.ref(a) for a in kept]
            got = buf.low_latency_dispatch(*kept, 8, case.experts, use_fp8=False, async_finish=True)
            del kept
            assert [a() is not None for a in seen] == [on_gpu()] * 2
            got.event.current_stream_wait()
            assert [a() for a in seen] == [None] * 2
            inputs = [tensor(a) for a in (y, idx, weights)]
            out = torch.empty((8, 64), dtype=torch.bfloat16, device=inputs[0].device)
            _, event, _ = buf.low_latency_combine(*inputs, got.handle, async_finish=True, previous_event=buf.capture(), out=out)
            del inputs
            event.synchronize()
            assert_same(numpy(out), case.combined([y], [idx], [weights])[0], "combined_x")
    return "done"


def test_async(tmp_path):
    done = ranks.launch(1, async_in_group, str(tmp_path), timeout=200)
    assert done.results == ["done"], done.stderr


def graph_in_group(comm, folder, replays):
    """A pair on the communication stream, captured by PyTorch, replayed with other tokens and other routing."""
    import torch
    case, me = Case(9, 8, 256, 4 * comm.size, 3, (8,) * comm.size), comm.rank
    with buffer_in_group(comm, folder, 8, 256, case.experts, 3) as buf:
        x, idx, weights, y = (tensor(a[me]) for a in case.make())

        def pair():
            got = buf.low_latency_dispatch(x, idx, 8, case.experts, use_fp8=False, async_finish=True)
            got.event.current_stream_wait()
            out, event, _ = buf.low_latency_combine(y, idx, weights, got.handle, async_finish=True)
            with event:
                pass
            return got.recv_count, out
        pair()                                                   # compiles: that cannot be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recv_count, out = pair()
        for seed in range(replays):
            everyones = Case(seed, 8, 256, case.experts, 3, case.tokens, ("random", "sparse")[seed % 2]).make()
            for t, values in zip((x, idx, weights, y), everyones):
                t.copy_(tensor(values[me]))
            graph.replay()
            torch.cuda.synchronize()
            x_all, idx_all, weights_all, y_all = everyones
            want = reference.low_latency_dispatch(x_all, idx_all, 8, case.experts)[me]
            assert (numpy(recv_count) == want.recv_count).all()
            want = reference.low_latency_combine(y_all, idx_all, weights_all, 8, case.experts)[me]
            assert_same(numpy(out), want, f"combined_x of replay {seed}")
            if seed % 3 == 0:
                assert_same(numpy(pair()[1]), numpy(out), f"eager, after replay {seed}")
    return "done"


@pytest.mark.multi_gpu
def test_graph(tmp_path):
    done = ranks.launch(2, graph_in_group, str(tmp_path), 40, timeout=300)
    assert done.results == ["done"] * 2, done.stderr
