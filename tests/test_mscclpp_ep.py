"""pyep.mscclpp_ep in place of MSCCL++'s extension: a program built as its own tests of both interfaces."""
import inspect
import weakref

import pytest
import ranks
from engine import on_gpu
from test_deep_ep import HIDDEN, LOCAL_EXPERTS, TOKENS, TOPK, joined, part, relative_difference

torch = pytest.importorskip("torch")


def low_latency(ep, group, x, topk_idx, topk_weights, hooked):
    """Dispatch with a hook or with an event, and combine of what came, from any tensor and from the Buffer's own."""
    num_ranks, num_experts = group.size(), LOCAL_EXPERTS * group.size()
    size = ep.Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, num_ranks, num_experts)
    buffer = ep.Buffer(group, num_nvl_bytes=0, num_rdma_bytes=size, low_latency_mode=True, num_qps_per_rank=LOCAL_EXPERTS)
    assert buffer.is_available() and not buffer.is_internode_available() and buffer.get_num_rdma_ranks() == 1
    assert (buffer.get_rdma_rank(), buffer.get_root_rdma_rank(True), buffer.get_root_rdma_rank(False)) == (0, group.rank(), 0)
    buffer.clean_low_latency_buffer(TOKENS, HIDDEN, num_experts)
    with pytest.raises(ValueError, match="before any low_latency_dispatch"):
        buffer.get_next_low_latency_combine_buffer(TOKENS, HIDDEN, num_experts)
    recv_x, scales, recv_count, src_info, layout_range, event, hook = buffer.low_latency_dispatch(
        x, topk_idx, TOKENS, num_experts, False, not hooked, hooked)
    assert scales is None and (event is None) == hooked and (hook is not None) == hooked
    hook() if hooked else event.current_stream_wait()
    assert recv_x.shape == (LOCAL_EXPERTS, num_ranks * TOKENS, HIDDEN) and src_info.shape == recv_x.shape[:2]
    assert torch.equal((layout_range & 0xFFFFFFFF).sum(dim=1), recv_count.long())
    combine = topk_idx, topk_weights, src_info, layout_range, TOKENS, num_experts
    for zero_copy in False, True:
        y = recv_x.clone()
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(TOKENS, HIDDEN, num_experts)[:] = y
            y.zero_()                                            # then it is not what is sent
        out = torch.empty_like(x)
        combined_x, event, hook = buffer.runtime.low_latency_combine(y, *combine, zero_copy, False, False, out)
        assert combined_x is out and event is hook is None
        assert relative_difference(out, x.float() * topk_weights.sum(dim=1, keepdim=True)) < 0.005
    with pytest.raises(TypeError, match="src_info is a tensor of shape .* not a copy"):
        buffer.low_latency_combine(y, topk_idx, topk_weights, src_info.clone(), *combine[3:])
    with pytest.raises(ValueError, match="num_experts"):
        buffer.low_latency_combine(y, *combine[:-1], num_experts + num_ranks)
    values, scales, *_ = buffer.low_latency_dispatch(x, topk_idx, TOKENS, num_experts, True)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (*recv_x.shape[:2], HIDDEN // 128)
    buffer._buffer.destroy()


def high_throughput(ep, group, x, topk_idx, topk_weights, async_finish):
    """Layout, dispatch, a cached one, and combine through `runtime`."""
    num_ranks, num_experts, rank = group.size(), LOCAL_EXPERTS * group.size(), group.rank()
    config = ep.Config(20, 8, 256)
    buffer = ep.Buffer(group, num_nvl_bytes=config.get_nvl_buffer_size_hint(2 * HIDDEN, num_ranks), num_rdma_bytes=0)
    previous = ep.EventHandle() if async_finish else None
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.runtime.get_dispatch_layout(
        topk_idx, num_experts, previous, async_finish, False)
    assert per_rdma_rank is None and (event is not None) == async_finish
    run = 1, config, event, async_finish, False                  # expert_alignment first
    got = buffer.runtime.intranode_dispatch(x, None, topk_idx, topk_weights, per_rank, in_rank, per_expert, 0, None, None, *run)
    recv_x, scales, recv_idx, recv_weights, counts, prefix, channels, recv_channels, recv_src_idx, send_head, event = got
    if async_finish:
        event.current_stream_wait()
    assert scales is None and len(counts) == LOCAL_EXPERTS and recv_src_idx.shape == (len(recv_x),)
    assert prefix[-1, rank].item() == len(recv_x) and torch.equal(channels[:, 0], per_rank) and not recv_channels.any()
    assert torch.equal(send_head >= 0, in_rank)
    again = buffer.runtime.intranode_dispatch(x, None, None, None, None, in_rank, None, len(recv_x), prefix, channels, *run)
    if async_finish:
        again[-1].current_stream_wait()
    assert torch.equal(again[0], recv_x) and again[2] is again[3] is None and torch.equal(again[6], channels)
    for of in got, again:                                        # either's tensors serve a combine
        combined_x, combined_weights, event = buffer.runtime.intranode_combine(
            recv_x, recv_weights, of[8], of[5], of[7], of[9], *run[1:])
        if async_finish:
            event.current_stream_wait()
        assert relative_difference(combined_x, x.float() * in_rank.sum(dim=1, keepdim=True)) < 0.005
        assert torch.equal(combined_weights, topk_weights)
    with pytest.raises(TypeError, match="send_head is a tensor .* not a copy"):
        buffer.runtime.intranode_combine(recv_x, recv_weights, recv_src_idx, prefix, recv_channels, send_head + 0, *run[1:])
    for between_nodes in buffer.runtime.internode_dispatch, buffer.runtime.internode_combine:
        with pytest.raises(NotImplementedError, match="between nodes"):
            between_nodes(x, None)
    local = buffer.get_local_buffer_tensor(torch.float32, 8)
    assert local.numel() == buffer.num_nvl_bytes // 4 - 2
    buffer._buffer.destroy()


def program(comm, folder):
    from pyep import mscclpp_ep as ep                            # the line that was changed
    rank, num_ranks, group = joined(comm, folder)
    device = "cuda" if on_gpu() else "cpu"
    torch.manual_seed(rank)
    x = torch.randn((TOKENS, HIDDEN), device=device).to(torch.bfloat16)
    topk_idx = torch.topk(torch.rand((TOKENS, LOCAL_EXPERTS * num_ranks), device=device), TOPK, dim=-1)[1]
    topk_weights = torch.rand((TOKENS, TOPK), device=device)
    for mode in False, True:
        low_latency(ep, group, x, topk_idx, topk_weights, mode)
        high_throughput(ep, group, x, topk_idx, topk_weights, mode)
    part()
    return "done"


def test_program(tmp_path):
    """A process of its own for each rank: CuPy and PyTorch each like to be first."""
    done = ranks.launch(2, program, str(tmp_path), timeout=400)
    assert done.results == ["done"] * 2, done.stderr


def test_results_go_when_their_tensors_are_dropped():
    """A tensor carries its handle, and the handle does not refer to that tensor: no circle keeps memory."""
    from pyep import mscclpp_ep as ep

    class Handle:
        tensor = None
    tensor, handle = torch.zeros(3), Handle()
    handle.tensor = tensor
    gone = weakref.ref(handle)
    alias = ep.carrying(tensor, handle)
    assert ep.carried(alias, "send_head") is handle and alias.data_ptr() == tensor.data_ptr()
    del handle
    assert gone() is not None
    del alias
    assert gone() is None


def test_names():
    from pyep import mscclpp_ep as ep
    assert list(inspect.signature(ep.Buffer).parameters) == ["group", "num_nvl_bytes", "num_rdma_bytes", "low_latency_mode",
                                                             "num_qps_per_rank"]
    assert ep.Config(num_sms=20, num_max_nvl_chunked_send_tokens=8).num_max_nvl_chunked_recv_tokens == 256
    ep.EventHandle().current_stream_wait()
