"""pyep.deep_ep as serving and training frameworks call it: the names and arguments, by keyword or position, that each of them uses.

vLLM and TensorRT-LLM serve with both interfaces, SGLang switches between them on one Buffer, Megatron-Core trains with autograd.
"""
import json

import pytest
import ranks
from engine import choose_gpu, on_gpu
from test_deep_ep import HIDDEN, LOCAL_EXPERTS, TOKENS, TOPK, joined, part, relative_difference

torch = pytest.importorskip("torch")


def made(num_ranks, tokens=TOKENS, hidden=HIDDEN):
    """(x, topk_idx, topk_weights) of this rank; experts that change nothing make of a token its x times its weights' sum."""
    device, num_experts = "cuda" if on_gpu() else "cpu", LOCAL_EXPERTS * num_ranks
    x = torch.randn((tokens, hidden), device=device).to(torch.bfloat16)
    topk_idx = torch.topk(torch.rand((tokens, num_experts), device=device), TOPK, dim=-1)[1]
    return x, topk_idx, torch.rand((tokens, TOPK), device=device)


def assert_weighted(out, x, topk_weights, limit=0.005):
    assert relative_difference(out, x.float() * topk_weights.sum(dim=1, keepdim=True)) < limit


def in_launched_ranks(program, tmp_path):
    """A process of its own for each of two ranks: CuPy and PyTorch each like to be first."""
    done = ranks.launch(2, run_program, program, str(tmp_path), timeout=300)
    assert done.results == ["done"] * 2, done.stderr


def run_program(comm, program, folder):
    import pyep.deep_ep as deep_ep
    rank, _, group = joined(comm, folder)
    torch.manual_seed(rank)
    program(deep_ep, comm, group)
    part()
    return "done"


# ---- vLLM ------------------------------------------------------------------------------------------------------------

class LowLatencyBatches:
    """Prepare and finalize of a layer for several batches in flight: each has a handle, and is received when its hook is called."""

    def __init__(self, buffer, max_tokens):
        self.buffer, self.max_tokens, self.handles = buffer, max_tokens, {}

    def prepare(self, batch, x, topk_idx, num_experts, use_fp8):
        expert_x, expert_num_tokens, self.handles[batch], _, hook = self.buffer.low_latency_dispatch(
            x, topk_idx, self.max_tokens, num_experts, use_fp8=use_fp8, round_scale=False, use_ue8m0=False, async_finish=False,
            return_recv_hook=True)
        return hook, expert_x, expert_num_tokens

    def finalize(self, batch, output, expert_y, topk_weights, topk_idx):
        _, _, hook = self.buffer.low_latency_combine(
            expert_y, topk_idx, topk_weights, self.handles.pop(batch), async_finish=False, zero_copy=False, return_recv_hook=True,
            out=output)
        return hook


def vllm_low_latency(deep_ep, comm, group):
    num_experts = LOCAL_EXPERTS * group.size()
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=TOKENS, hidden=HIDDEN, num_ranks=group.size(), num_experts=num_experts)
    options = dict(group=group, num_nvl_bytes=2**20, num_rdma_bytes=size, low_latency_mode=True, num_qps_per_rank=LOCAL_EXPERTS,
                   allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=True)
    with pytest.raises(NotImplementedError, match="enable_shrink=True"):             # of its fault tolerance
        deep_ep.Buffer(**options, enable_shrink=True)
    buffer = deep_ep.Buffer(**options, enable_shrink=False)
    batches = LowLatencyBatches(buffer, TOKENS)
    inputs = [made(group.size()) for _ in range(2)]
    sent = [batches.prepare(i, x, idx, num_experts, use_fp8=False) for i, (x, idx, _) in enumerate(inputs)]
    for hook, *_ in sent:
        hook()
    for i, ((_, expert_x, _), (x, idx, weights)) in enumerate(zip(sent, inputs)):
        output = torch.empty_like(x)
        batches.finalize(i, output, expert_x, weights, idx)()
        assert_weighted(output, x, weights)
    local = buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True)
    assert local.numel() == size
    local.zero_()                                                # what it does after a fault
    x, idx, weights = inputs[0]
    hook, (values, scales), counts = batches.prepare(0, x, idx, num_experts, use_fp8=True)
    hook()
    assert values.dtype == torch.float8_e4m3fn and counts.shape == (LOCAL_EXPERTS,)
    expert_y = (values.float().unflatten(2, (-1, 128)) * scales.unsqueeze(3)).flatten(2).to(torch.bfloat16)
    batches.finalize(0, output := torch.empty_like(x), expert_y, weights, idx)()
    assert_weighted(output, x, weights, limit=0.05)
    buffer.destroy()


def test_vllm_low_latency(tmp_path):
    in_launched_ranks(vllm_low_latency, tmp_path)


def vllm_high_throughput(deep_ep, comm, group):
    num_experts, ranks_of_it = LOCAL_EXPERTS * group.size(), group.size()
    buffer = deep_ep.Buffer(group=group, num_nvl_bytes=2**24, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=1,
                            explicitly_destroy=True)
    deep_ep.Buffer.set_num_sms(20)
    x, topk_idx, topk_weights = made(ranks_of_it)
    run = dict(previous_event=None, async_finish=False, allocate_on_comm_stream=False)
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
        topk_idx=topk_idx, num_experts=num_experts, **run)
    assert event.event is None
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        x=x, handle=None, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_rdma_rank, is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert, topk_idx=topk_idx, topk_weights=topk_weights, expert_alignment=1,
        config=deep_ep.Buffer.get_dispatch_config(ranks_of_it), **run)
    assert event.event is None and len(counts) == LOCAL_EXPERTS
    y = (recv_x.float() * recv_weights.masked_fill(recv_idx < 0, 0).sum(dim=1, keepdim=True)).to(torch.bfloat16)
    combined, _, event = buffer.combine(x=y, handle=handle, topk_weights=None,
                                        config=deep_ep.Buffer.get_combine_config(ranks_of_it), **run)
    assert event.event is None
    assert_weighted(combined, x, topk_weights)
    buffer.destroy()


def test_vllm_high_throughput(tmp_path):
    in_launched_ranks(vllm_high_throughput, tmp_path)


# ---- SGLang ----------------------------------------------------------------------------------------------------------

def hints(deep_ep, num_ranks, configs):
    """(num_nvl_bytes, num_rdma_bytes) as frameworks compute them."""
    return (max(config.get_nvl_buffer_size_hint(2 * HIDDEN, num_ranks) for config in configs),
            max(config.get_rdma_buffer_size_hint(2 * HIDDEN, num_ranks) for config in configs))


def sglang_normal(deep_ep, buffer, configs, async_finish, tokens):
    x, topk_idx, topk_weights = tokens
    previous = deep_ep.Buffer.capture() if async_finish else None
    per_rank, per_rdma_rank, per_expert, in_rank, previous = buffer.get_dispatch_layout(
        topk_idx, LOCAL_EXPERTS * buffer.group_size, previous_event=previous, async_finish=async_finish,
        allocate_on_comm_stream=previous is not None)
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        x, topk_idx=topk_idx, topk_weights=topk_weights, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, previous_event=previous, async_finish=async_finish,
        allocate_on_comm_stream=async_finish, expert_alignment=128, config=configs["normal_dispatch"])
    if async_finish:
        event.current_stream_wait()
    assert all(count % 128 == 0 for count in counts)
    y = (recv_x.float() * recv_weights.masked_fill(recv_idx < 0, 0).sum(dim=1, keepdim=True)).to(torch.bfloat16)
    previous = deep_ep.Buffer.capture() if async_finish else None
    combined, _, event = buffer.combine(y, handle, async_finish=async_finish, previous_event=previous,
                                        allocate_on_comm_stream=previous is not None, config=configs["normal_combine"])
    if async_finish:
        event.current_stream_wait()
    assert_weighted(combined, x, topk_weights)


def sglang_low_latency(buffer, return_recv_hook, tokens):
    x, topk_idx, topk_weights = tokens
    last = dict(async_finish=not return_recv_hook, return_recv_hook=return_recv_hook)
    recv_x, _, handle, event, hook = buffer.low_latency_dispatch(x, topk_idx, TOKENS, LOCAL_EXPERTS * buffer.group_size,
                                                                 use_fp8=False, **last)
    hook() if return_recv_hook else event.current_stream_wait()
    combined, event, hook = buffer.low_latency_combine(x=recv_x, topk_idx=topk_idx, topk_weights=topk_weights, handle=handle,
                                                       **last)
    hook() if return_recv_hook else event.current_stream_wait()
    assert_weighted(combined, x, topk_weights)


def sglang(deep_ep, comm, group):
    """Both interfaces of one Buffer in turn, as prefill and decoding come."""
    text = '{"num_sms": 16, "num_max_nvl_chunked_send_tokens": 8, "num_max_nvl_chunked_recv_tokens": 256}'
    configs = {name: deep_ep.Config(**json.loads(text)) for name in ("normal_dispatch", "normal_combine")}
    nvl, rdma = hints(deep_ep, group.size(), configs.values())
    rdma = max(rdma, deep_ep.Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, group.size(), LOCAL_EXPERTS * group.size()))
    buffer = deep_ep.Buffer(group, nvl, rdma, low_latency_mode=True, num_qps_per_rank=max(deep_ep.Buffer.num_sms, LOCAL_EXPERTS),
                            allow_mnnvl=True)
    assert buffer.low_latency_mode and buffer.group_size == group.size()
    tokens = made(group.size())
    for mode in False, True:
        sglang_normal(deep_ep, buffer, configs, mode, tokens)
        buffer.clean_low_latency_buffer(TOKENS, HIDDEN, LOCAL_EXPERTS * group.size())
        sglang_low_latency(buffer, mode, tokens)
    buffer.destroy()


def test_sglang(tmp_path):
    in_launched_ranks(sglang, tmp_path)


# ---- TensorRT-LLM ----------------------------------------------------------------------------------------------------

def tensorrt_llm(deep_ep, comm, group):
    """Through mpi4py, and a Buffer is dropped for a larger one."""
    mine = comm.Split(0, comm.rank)
    configs = deep_ep.Buffer.get_dispatch_config(mine.Get_size()), deep_ep.Buffer.get_combine_config(mine.Get_size())
    nvl, rdma = hints(deep_ep, mine.Get_size(), configs)
    buffer = deep_ep.Buffer(None, nvl // 2, rdma, comm=mine)
    assert buffer.num_nvl_bytes < nvl and buffer.num_rdma_bytes >= rdma
    del buffer
    buffer = deep_ep.Buffer(None, nvl, rdma, comm=mine)
    x, topk_idx, topk_weights = made(mine.Get_size())
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(topk_idx, LOCAL_EXPERTS * buffer.group_size)
    assert event.event is None
    recv_x, recv_idx, recv_weights, _, handle, event = buffer.dispatch(
        x, topk_idx=topk_idx, topk_weights=topk_weights, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank, num_tokens_per_expert=per_expert)
    assert event.event is None
    y = (recv_x.float() * recv_weights.masked_fill(recv_idx < 0, 0).sum(dim=1, keepdim=True)).to(torch.bfloat16)
    combined, _, event = buffer.combine(y, handle)
    assert event.event is None
    assert_weighted(combined, x, topk_weights)
    del buffer

    num_experts = LOCAL_EXPERTS * mine.Get_size()
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, mine.Get_size(), num_experts)
    buffer = deep_ep.Buffer(None, 0, size, low_latency_mode=True, num_qps_per_rank=LOCAL_EXPERTS, comm=mine)
    recv_x, _, handle, event, hook = buffer.low_latency_dispatch(x, topk_idx, TOKENS, num_experts, use_fp8=False)
    assert event.event is None and hook is None
    combined, event, hook = buffer.low_latency_combine(recv_x, topk_idx, topk_weights, handle)
    assert event.event is None and hook is None
    assert_weighted(combined, x, topk_weights)
    del buffer
    mine.Free()


def test_tensorrt_llm(tmp_path):
    in_launched_ranks(tensorrt_llm, tmp_path)


# ---- Megatron-Core ---------------------------------------------------------------------------------------------------

LAYERS, SEQUENCE, WIDTH = 8, 2048, 128  # a rank's tokens, H: more results than lie in the memory that `Buffers` computes


class Buffers:
    """The one Buffer of a program, as large as asked for so far."""

    buffer = None

    @classmethod
    def of(cls, group, x):
        from pyep.deep_ep import Buffer
        configs = Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size())
        row = x.size(1) * max(x.element_size(), 2)
        nvl = max(config.get_nvl_buffer_size_hint(row, group.size()) for config in configs)
        rdma = max(config.get_rdma_buffer_size_hint(row, group.size()) for config in configs)
        old = cls.buffer
        if old is None or old.group != group or old.num_nvl_bytes < nvl or old.num_rdma_bytes < rdma:
            cls.buffer = Buffer(group, nvl, rdma)
        return cls.buffer


def now(async_finish):
    from pyep.deep_ep.utils import EventHandle, EventOverlap
    return EventOverlap(EventHandle()) if async_finish else None


class FusedDispatch(torch.autograd.Function):
    """The gradient of a dispatch is a combine with its handle, weights and all."""

    @staticmethod
    def forward(ctx, x, topk_idx, probs, num_experts, group, async_finish):
        run = dict(async_finish=async_finish, allocate_on_comm_stream=async_finish)
        buffer = Buffers.of(group, x)
        per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
            topk_idx, num_experts, previous_event=now(async_finish), **run)
        recv_x, recv_idx, recv_probs, counts, handle, event = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=probs, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, previous_event=event, **run)
        if async_finish:
            event.current_stream_wait()
        ctx.group, ctx.handle, ctx.run = group, handle, run
        return recv_x, recv_idx, recv_probs, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx, grad_x, grad_idx, grad_probs, grad_counts, grad_handle):
        grad_x, grad_probs, event = Buffers.of(ctx.group, grad_x).combine(
            grad_x.contiguous(), ctx.handle, topk_weights=grad_probs.float(), previous_event=now(ctx.run["async_finish"]),
            **ctx.run)
        if ctx.run["async_finish"]:
            event.current_stream_wait()
        return grad_x, None, grad_probs, None, None, None


class FusedCombine(torch.autograd.Function):
    """The gradient of a combine is a dispatch with its handle."""

    @staticmethod
    def forward(ctx, x, group, handle, async_finish):
        run = dict(async_finish=async_finish, allocate_on_comm_stream=async_finish)
        out, _, event = Buffers.of(group, x).combine(x, handle=handle, previous_event=now(async_finish), **run)
        if async_finish:
            event.current_stream_wait()
        ctx.group, ctx.handle, ctx.run = group, handle, run
        return out

    @staticmethod
    def backward(ctx, grad):
        grad_x, *_, event = Buffers.of(ctx.group, grad).dispatch(
            grad.contiguous(), handle=ctx.handle, previous_event=now(ctx.run["async_finish"]), **ctx.run)
        if ctx.run["async_finish"]:
            event.current_stream_wait()
        return grad_x, None, None, None


def layers(x, probs, topk_idx, scales, group, async_finish):
    """x through all layers, each with a residual; the expert e of a layer multiplies by scales[layer, e]."""
    rank, num_experts = group.rank(), scales.shape[1]
    for scale in scales:
        recv_x, recv_idx, recv_probs, counts, handle = FusedDispatch.apply(x, topk_idx, probs, num_experts, group, async_finish)
        assert counts.tolist() == [(recv_idx == e).sum().item() for e in range(LOCAL_EXPERTS)]
        own = torch.where(recv_idx >= 0, scale[rank * LOCAL_EXPERTS:][recv_idx.clamp(min=0)] * recv_probs, 0)
        y = recv_x * own.sum(dim=1, keepdim=True).to(torch.bfloat16)           # autograd keeps recv_x
        x = x + FusedCombine.apply(y, group, handle, async_finish)
    return x


def megatron(deep_ep, comm, group):
    """All gradients against those of dense layers.  Each layer keeps its results until the backward pass, the last ones as copies:
    there is no more room for them where peers write."""
    deep_ep.Buffer.set_num_sms(20)
    x, topk_idx, probs = made(group.size(), SEQUENCE, WIDTH)
    probs = probs / probs.sum(dim=1, keepdim=True)
    scales = torch.linspace(0.1, 0.4, LAYERS * LOCAL_EXPERTS * group.size(), device=x.device).view(LAYERS, -1)

    def dense(x, probs):
        for scale in scales:
            x = x + x * (scale[topk_idx] * probs).sum(dim=1, keepdim=True)
        return x
    want_x, want_probs = x.float().requires_grad_(), probs.clone().requires_grad_()
    want = dense(want_x, want_probs)
    want.square().mean().backward()
    copied = 0
    for async_finish in False, True:
        got_x, got_probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
        out = layers(got_x, got_probs, topk_idx, scales, group, async_finish)
        assert copied < Buffers.buffer.copied_results < copied + LAYERS
        out.float().square().mean().backward()
        for got, wanted in (out, want), (got_x.grad, want_x.grad), (got_probs.grad, want_probs.grad):
            assert relative_difference(got, wanted) < 0.02
        copied = Buffers.buffer.copied_results
    Buffers.buffer.destroy()


def test_megatron(tmp_path):
    in_launched_ranks(megatron, tmp_path)


def test_events_of_megatron():
    """DeepEP's events are made on the current stream; pyep's operations take them."""
    choose_gpu()
    from pyep.deep_ep.utils import EventHandle, EventOverlap
    handle = EventHandle()
    event = EventOverlap(handle)
    assert event.moment == handle.moment and event.event is handle.event and (event.event is not None) == on_gpu()
    for waits in handle, event:
        waits.current_stream_wait()
        waits.synchronize()
