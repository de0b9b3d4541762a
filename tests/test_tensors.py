"""What PyTorch's programs bring: tensors with memory and without, modes that a call is made in, autograd, torch.compile."""
import contextlib
import functools
import threading
import warnings

import pytest
import ranks
from case import Case, assert_same
from engine import choose_gpu, make_buffer, on_gpu
from test_torch import numpy, tensor

from pyep import arrays

torch = pytest.importorskip("torch")

M, H, E, K = 8, 64, 4, 3                                         # as in test_torch.py
HEAP = 2**22
CASE = Case(8, M, H, E, K, (M,))


class Tensor(torch.Tensor):
    """As frameworks define them."""


class Wrapper(torch.Tensor):
    """A tensor in place of another one, whose memory is not its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, op, *args, **kwargs):
        raise NotImplementedError(op)


def inside(transform):
    """A tensor as a function sees it that torch.func transforms."""
    def make(t):
        seen = []
        with contextlib.suppress(Exception):                     # of an integer there is no gradient
            transform(lambda part: (seen.append(part), part.sum())[1])(t)
        return seen[0]
    return make


def fake(t):
    from torch._subclasses import FakeTensorMode
    return FakeTensorMode().from_tensor(t)


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


# Tensors that no kernel can use: how to make one of another, and what an error must say.
WITHOUT_MEMORY = {
    "meta": (lambda t: t.to("meta"), "meta"), "fake": (fake, "FakeTensor"), "wrapper": (Wrapper, "Wrapper"),
    "sparse": (lambda t: t.to_sparse(), "sparse"), "freed": (freed, "freed"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "nested"),
    "vmap": (inside(lambda f: torch.func.vmap(lambda row: f(row))), "torch.func"),
    "neg": (lambda t: t if t.dtype == torch.bool else torch._neg_view(t), "resolve_neg"),
    "uninitialized": (lambda t: torch.nn.parameter.UninitializedParameter(), "UninitializedParameter"),
}


@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("shape", ((4, 8), (1, 8)))
def test_without_memory(kind, shape):
    plain = torch.ones(shape)
    make, words = WITHOUT_MEMORY[kind]
    bad = make(plain)
    assert arrays.look((bad,))[0] != arrays.look((plain,))[0]      # else it would pass where a plain one has
    with torch.device("cpu"):
        assert arrays.look((make(plain),))[0] != arrays.look((plain,))[0]
    with pytest.raises(TypeError, match=f"^topk_idx is .*{words}"):
        arrays.library_of(bad, "topk_idx")


@pytest.mark.parametrize("mode", (contextlib.nullcontext, functools.partial(torch.device, "cpu")), ids=("no mode", "a mode"))
def test_what_a_look_sees(mode):
    """How a tensor lies in memory, and how it is aligned there; but not where."""
    whole = torch.zeros(64)
    with mode():
        first, same, shifted, by_column = [arrays.look((tensor,)) for tensor in (
            whole[:16].view(4, 4), whole[16:32].view(4, 4), whole[1:17].view(4, 4), whole[:16].view(4, 4).t())]
    assert first[0] == same[0] != shifted[0] != by_column[0] != first[0]
    assert [*first[1], *same[1], *shifted[1]] == [whole.data_ptr() + offset for offset in (0, 64, 4)]


def test_dtensor():
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(TypeError, match="^x is .*DTensor.*; pass the local"):
            arrays.library_of(DTensor.from_local(torch.ones(2), mesh, [Replicate()]), "x")
    finally:
        dist.destroy_process_group()


WITH_MEMORY = {
    "Parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()), "subclass": lambda t: t.as_subclass(Tensor),
    "requires_grad": lambda t: t.clone().requires_grad_(t.is_floating_point()), "rows": lambda t: torch.cat([t, t])[len(t):],
    "subclass that handles operations": lambda t: torch.Tensor._make_subclass(type("Own", (Wrapper,), {}), t),
}


@pytest.mark.parametrize("kind", WITH_MEMORY)
@pytest.mark.parametrize("empty", (False, True))
def test_with_memory(kind, empty):
    plain = torch.ones(4, 8)[:0 if empty else 4]
    made = WITH_MEMORY[kind](plain)
    library = arrays.library_of(made, "x")
    arrays.check(made, "x", library, ("float32",), plain.shape)
    assert library is arrays.library_of(plain, "x") and library.pointer(made) == torch.Tensor.data_ptr(made)


def arguments(buf):
    """Tensors that the operations accept, and the operations."""
    x, idx, weights, y = (tensor(a[0]) for a in CASE.make())
    handle = buf.low_latency_dispatch(x, idx, M, E, use_fp8=False).handle
    per_rank, _, per_expert, in_rank, _ = buf.get_dispatch_layout(idx, E)
    counts = dict(num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert)
    received, _, received_weights, _, dispatched, _ = buf.dispatch(x, **counts, topk_idx=idx, topk_weights=weights)
    device = x.device
    stats, waits, out, bias = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in (
        ((E,), torch.int32), ((1,), torch.int64), ((M, H), torch.bfloat16), ((M, H), torch.bfloat16)))
    return {
        "low_latency_dispatch": dict(x=x, topk_idx=idx, topk_weights=weights, cumulative_local_expert_recv_stats=stats,
                                     dispatch_wait_recv_cost_stats=waits, num_max_dispatch_tokens_per_rank=M, num_experts=E,
                                     use_fp8=False, out=torch.empty_like(y)),
        "low_latency_combine": dict(x=y, topk_idx=idx, topk_weights=weights, handle=handle, combine_wait_recv_cost_stats=waits,
                                    out=out),
        "get_dispatch_layout": dict(topk_idx=idx, num_experts=E),
        "dispatch": dict(x=x, **counts, topk_idx=idx, topk_weights=weights),
        "combine": dict(x=received.clone(), handle=dispatched, topk_weights=received_weights, bias=bias),
    }


def refuse_tensors(comm):
    """Every argument of every operation, right after a call that was accepted."""
    with make_buffer(comm, M, H, E, K, num_nvl_bytes=HEAP) as buf:
        accepted, launches = arguments(buf), []
        for operation, given in accepted.items():
            getattr(buf, operation)(**given)
            launch, buf._connection.launch = buf._connection.launch, lambda *args: launches.append(args)
            for argument in (name for name, value in given.items() if torch.is_tensor(value)):
                for kind in "meta", "fake", "wrapper", "sparse", "freed", "vmap", "uninitialized":
                    make, words = WITHOUT_MEMORY[kind]
                    with pytest.raises(TypeError, match=f"^{argument} is .*{words}"):
                        getattr(buf, operation)(**given | {argument: make(given[argument])})
            buf._connection.launch = launch
        assert not launches
        for operation, given in accepted.items():
            getattr(buf, operation)(**given)
    return "done"


def accept_tensors(comm):
    with make_buffer(comm, M, H, E, K, num_nvl_bytes=HEAP) as buf:
        accepted = arguments(buf)
        want = {name: getattr(buf, name)(**given)[0].clone() for name, given in accepted.items()}
        for kind, make in WITH_MEMORY.items():
            for mode in contextlib.nullcontext(), torch.device("cpu"), torch.device("meta"):
                for operation, given in accepted.items():
                    made = {name: make(value) if torch.is_tensor(value) and name != "out" else value
                            for name, value in given.items()}
                    with mode:
                        got = getattr(buf, operation)(**made)[0]
                    assert type(got) is torch.Tensor and not got.requires_grad, (kind, operation)
                    if operation != "low_latency_dispatch":      # of its rows not all are defined
                        assert torch.equal(got, want[operation]), (kind, operation)
    return "done"


def fake_mode():
    from torch._subclasses import FakeTensorMode
    return FakeTensorMode()


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def transformed():
    from torch._C._functorch import _grad_decrement_nesting, _grad_increment_nesting
    _grad_increment_nesting()
    yield
    _grad_decrement_nesting()


MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "fake": fake_mode, "deterministic": deterministic,
         "transformed": transformed, "autocast": lambda: torch.autocast("cpu"), "default device": lambda: torch.device("meta")}


def call_in_modes(comm, name):
    """The first call in a mode, the next in none: each result can be changed in place and go into autograd."""
    x, idx, weights, y = (tensor(a[0]) for a in CASE.make())
    factor = torch.full((H,), 2.0, dtype=torch.bfloat16, device=x.device).requires_grad_()
    with make_buffer(comm, M, H, E, K, num_nvl_bytes=HEAP) as buf:
        def call():
            got = buf.low_latency_dispatch(x, idx, M, E, use_fp8=False)
            out, _, _ = buf.low_latency_combine(y, idx, weights, got.handle)
            lent = buf.get_next_low_latency_combine_buffer(got.handle)
            per_rank, _, per_expert, in_rank, _ = buf.get_dispatch_layout(idx, E)
            received, _, received_weights, _, handle, _ = buf.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights)
            return got.recv_x, got.recv_count, lent, out, received, received_weights, buf.combine(received, handle)[0]
        with MODES[name]():
            first = call()
            if name == "inference_mode":
                first[0].add_(0)
        for got in first:
            assert type(got) is torch.Tensor and got.data_ptr()
        assert_same(numpy(first[3]), CASE.combined([numpy(y)], [numpy(idx)], [numpy(weights)])[0], "combined_x")
        for _ in range(3):                                       # with both sets of results
            results = call()
            for got in results:
                assert not got.requires_grad and got.is_leaf
                got.add_(0)
            for got in (results[0], results[2], results[3], results[4]):
                (got @ factor).sum().backward()
                got.mul_(factor)                                 # what is handed out next knows nothing of it
                assert got.requires_grad
        with torch.no_grad():
            lent = call()[2]
        lent.copy_(y * factor)
    return "done"


def compile_calls(comm):
    """The same bits as eagerly, compiled once, without a warning."""
    from torch._dynamo.utils import counters
    x, idx, weights, _ = (tensor(a[0]) for a in CASE.make())
    with make_buffer(comm, M, H, E, K, num_nvl_bytes=HEAP) as buf, warnings.catch_warnings():
        warnings.simplefilter("error")

        def model(x):
            recv_x, _, handle, _, hook = buf.low_latency_dispatch(x * 2, idx, M, E, use_fp8=False, return_recv_hook=True)
            beside = x.relu()
            hook()
            out, event, _ = buf.low_latency_combine(recv_x.relu(), idx, weights, handle)
            event.current_stream_wait()
            per_rank, _, per_expert, in_rank, _ = buf.get_dispatch_layout(idx, E)
            received, *_, handle, _ = buf.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights)
            return out + beside + buf.combine(received * 2, handle)[0]
        compiled = torch.compile(model, backend="eager")
        for i in range(4):
            assert torch.equal(compiled(x + i), model(x + i))
            if i == 0:
                frames = dict(counters["frames"])
        assert dict(counters["frames"]) == frames
        breaks = " ".join(counters["graph_break"])
        assert "launches kernels" in breaks and "pyep/arrays.py" not in breaks, breaks
    return "done"


def checkpoint_a_layer(comm):
    """Dispatch and combine as autograd Functions, with recomputation in the backward pass, which runs on a thread of its own."""
    from test_high_throughput_torch import functions
    from torch.utils.checkpoint import checkpoint
    choose_gpu()
    x, idx, weights, _ = (tensor(a[comm.rank]) for a in Case(8, M, H, E * comm.size, K, (M, 5)).make())
    with make_buffer(comm, M, H, E * comm.size, K, num_nvl_bytes=HEAP) as buf:
        dispatch, combine = functions(buf)
        *layout, _ = buf.get_dispatch_layout(idx, E * comm.size)

        def layer(x, weights):
            received, received_weights, _, handle = dispatch(x, weights, layout, idx)
            return combine(torch.tanh(received * received_weights.sum(dim=1, keepdim=True)).to(x.dtype), handle)

        def gradients(run):
            inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
            out = run(run(*inputs), inputs[1])
            thread = threading.Thread(target=out.sum().backward)
            thread.start()
            thread.join()
            return [out.detach(), *(t.grad for t in inputs)]
        plain = gradients(layer)
        again = gradients(lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False))
        for got, want in zip(again, plain):
            assert want is not None and torch.equal(got, want)
    return "done"


def run(n, body, *args):
    """On processes of their own, as in test_torch.py."""
    done = ranks.launch(n, body, *args, timeout=300)
    assert done.results == ["done"] * n, (done.errors, done.stderr)


def test_refused_by_every_operation():
    run(1, refuse_tensors)


@pytest.mark.skipif(on_gpu(), reason="makes tensors on the CPU")
def test_accepted_by_every_operation():
    run(1, accept_tensors)


@pytest.mark.parametrize("mode", MODES)
def test_first_call_in_a_mode(mode):
    run(1, call_in_modes, mode)


def test_compiled():
    run(1, compile_calls)


def test_checkpoint():
    run(2, checkpoint_a_layer)
