"""pyep.deep_ep in place of DeepEP: a program for the low-latency interface, built as DeepEP's own test of it; and the interface."""
import inspect
import math

import pytest
import ranks
from engine import on_gpu

torch = pytest.importorskip("torch")

TOKENS, HIDDEN, LOCAL_EXPERTS, TOPK = 16, 1024, 3, 4
FORMATS = (dict(use_fp8=False), dict(use_fp8=True), dict(use_fp8=True, round_scale=True),
           dict(use_fp8=True, round_scale=True, use_ue8m0=True))


def joined(comm, folder):
    """Make a process group of all ranks: (rank, number of ranks, group)."""
    import torch.distributed as dist
    if on_gpu():
        torch.cuda.set_device(comm.rank % torch.cuda.device_count())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=comm.rank, world_size=comm.size)
    return dist.get_rank(), dist.get_world_size(), dist.new_group(list(range(comm.size)))


def part():
    """Its end, once all ranks have come to it."""
    import torch.distributed as dist
    dist.barrier()
    dist.destroy_process_group()


# ---- the program -----------------------------------------------------------------------------------------------------

def gathered(tensor, group):
    """The tensors of all ranks, [R, ...]."""
    import torch.distributed as dist
    bits = tensor.cpu().view(torch.int32)                        # gloo knows no 16-bit types
    everyones = [torch.empty_like(bits) for _ in range(group.size())]
    dist.all_gather(everyones, bits, group=group)
    return torch.stack(everyones).view(tensor.dtype).to(tensor.device)


def dequantized(values, scales):
    """What the FP8 values [N, H] of one expert stand for, in fp32; scales fp32 [N, H / 128], or int32 that pack four exponents."""
    if scales.dtype == torch.int32:
        scales = (scales.contiguous().view(torch.uint8).int() << 23).view(torch.float32)
    return (values.float().view(len(values), -1, 128) * scales.unsqueeze(-1)).view(values.shape), scales.repeat_interleave(128, 1)


def relative_difference(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check_received(recv_x, recv_count, handle, stats, all_x, all_topk_idx, rank):
    """Every row against the token that it says it is; returns what an expert that changes nothing makes of recv_x, in bf16."""
    src_info, layout_range, max_tokens, hidden, num_experts = handle
    num_ranks = len(all_x)
    rows, local = num_ranks * max_tokens, num_experts // num_ranks
    fp8 = isinstance(recv_x, tuple)
    values = recv_x[0] if fp8 else recv_x
    assert (tuple(values.shape), values.dtype) == ((local, rows, hidden), torch.float8_e4m3fn if fp8 else torch.bfloat16)
    assert tuple(src_info.shape) == (local, rows) and src_info.dtype == torch.int32
    assert tuple(layout_range.shape) == (local, num_ranks) and layout_range.dtype == torch.int64
    assert tuple(recv_count.shape) == (local,) and recv_count.dtype == torch.int32 and torch.equal(stats, recv_count)
    if fp8:
        width, dtype = (hidden // 512, torch.int32) if recv_x[1].dtype == torch.int32 else (hidden // 128, torch.float32)
        assert (tuple(recv_x[1].shape), recv_x[1].dtype) == ((local, rows, width), dtype)
        assert recv_x[1].stride() == (rows * width, 1, rows)     # column-major, for TMA
    outputs = torch.zeros((local, rows, hidden), dtype=torch.bfloat16, device=values.device)
    for i in range(local):
        count = recv_count[i].item()
        begins, counts = layout_range[i] >> 32, layout_range[i] & 0xFFFFFFFF
        assert count == counts.sum().item()
        for source in range(num_ranks):
            chosen = (all_topk_idx[source] == rank * local + i).any(dim=1).nonzero().view(-1)
            begin, end = begins[source].item(), (begins + counts)[source].item()
            assert torch.equal(src_info[i, begin:end].long().sort().values, chosen)
            sent = all_x[source, src_info[i, begin:end].long()]
            if fp8:
                got, scale = dequantized(values[i, begin:end], recv_x[1][i, begin:end])
                # e4m3 has three bits behind the leading one, and nothing below 2^-9.
                assert ((got - sent.float()).abs() <= sent.float().abs() / 15.9 + scale * 2**-10).all()
                outputs[i, begin:end] = got.bfloat16()
            else:
                assert torch.equal(values[i, begin:end], sent)
                outputs[i, begin:end] = sent
    return outputs


def exercise(deep_ep, buffer, group, rank, num_ranks, device):
    """Every format, with hooks and with events, combined from any tensor and from the buffer's own."""
    torch.manual_seed(1 + rank)
    num_experts = LOCAL_EXPERTS * num_ranks
    x = torch.randn((TOKENS, HIDDEN), dtype=torch.bfloat16, device=device)
    topk_idx = torch.topk(torch.rand((TOKENS, num_experts), device=device), TOPK, dim=-1)[1].to(deep_ep.topk_idx_t)
    topk_weights = torch.rand((TOKENS, TOPK), dtype=torch.float32, device=device)
    topk_idx[torch.rand((TOKENS, TOPK), device=device) < 0.2] = -1
    all_x, all_topk_idx = gathered(x, group), gathered(topk_idx, group)
    wanted = x.float() * topk_weights.masked_fill(topk_idx == -1, 0).sum(dim=1, keepdim=True)
    for return_recv_hook in False, True:
        for options in FORMATS:
            stats = torch.zeros((LOCAL_EXPERTS,), dtype=torch.int, device=device)
            recv_x, recv_count, handle, event, hook = buffer.low_latency_dispatch(
                x, topk_idx, TOKENS, num_experts, cumulative_local_expert_recv_stats=stats, async_finish=not return_recv_hook,
                return_recv_hook=return_recv_hook, **options)
            hook() if return_recv_hook else event.current_stream_wait()
            outputs = check_received(recv_x, recv_count, handle, stats, all_x, all_topk_idx, rank)
            for zero_copy in False, True:
                if zero_copy:                                    # then x is not what is sent
                    buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = outputs
                    outputs = torch.zeros_like(outputs)
                out = torch.empty_like(x)
                combined_x, event, hook = buffer.low_latency_combine(
                    outputs, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=zero_copy,
                    async_finish=not return_recv_hook, return_recv_hook=return_recv_hook, out=out)
                hook() if return_recv_hook else event.current_stream_wait()
                assert combined_x is out and not combined_x.isnan().any()
                limit = 0.05 if options["use_fp8"] else 0.005
                assert relative_difference(combined_x, wanted) < limit, (options, zero_copy, return_recv_hook)


def program(comm, folder):
    """What a DeepEP program does from beginning to end."""
    import pyep.deep_ep as deep_ep                               # the line that was changed
    rank, num_ranks, group = joined(comm, folder)
    num_experts = LOCAL_EXPERTS * num_ranks
    num_rdma_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, num_ranks, num_experts)
    buffer = deep_ep.Buffer(group, num_rdma_bytes=num_rdma_bytes, low_latency_mode=True, num_qps_per_rank=LOCAL_EXPERTS,
                            allow_nvlink_for_low_latency_mode=True, explicitly_destroy=True, allow_mnnvl=False, enable_shrink=False)
    assert (buffer.group, buffer.rank, buffer.group_size) == (group, rank, num_ranks)
    assert buffer.low_latency_mode and buffer.num_rdma_bytes == num_rdma_bytes and buffer.num_nvl_bytes == 0
    exercise(deep_ep, buffer, group, rank, num_ranks, "cuda" if on_gpu() else "cpu")
    buffer.clean_low_latency_buffer(TOKENS, HIDDEN, num_experts)
    exercise(deep_ep, buffer, group, rank, num_ranks, "cuda" if on_gpu() else "cpu")
    buffer.destroy()
    part()
    return "done"


def test_program(tmp_path):
    """A process of its own for each rank: CuPy and PyTorch each like to be first."""
    done = ranks.launch(2, program, str(tmp_path), timeout=300)
    assert done.results == ["done"] * 2, done.stderr


# ---- the same for the intranode interface ----------------------------------------------------------------------------

def check_intranode(deep_ep, buffer, group, rank, num_ranks, device, x, fp8, with_topk, async_mode, config):
    """One layout, dispatch, cached dispatch and combine, as DeepEP's own test makes them."""
    num_experts = LOCAL_EXPERTS * num_ranks
    scores = torch.randn((TOKENS, num_experts), device=device).abs()
    topk_idx = torch.topk(scores, TOPK, dim=-1, sorted=False)[1].to(deep_ep.topk_idx_t)
    topk_weights = torch.ones((TOKENS, TOPK), device=device) * rank
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(topk_idx, num_experts, async_finish=async_mode)
    if async_mode:
        event.current_stream_wait()
    owners = torch.nn.functional.one_hot(topk_idx // LOCAL_EXPERTS, num_ranks).sum(dim=1) > 0
    assert torch.equal(in_rank, owners) and torch.equal(per_rank.long(), owners.sum(dim=0)) and per_rdma_rank is None
    assert torch.equal(per_expert.long(), torch.bincount(topk_idx.view(-1), minlength=num_experts))

    options = dict(async_finish=async_mode, config=config)
    if async_mode:
        options["previous_event"] = buffer.capture()
    carried = dict(topk_idx=topk_idx, topk_weights=topk_weights) if with_topk else {}
    recv_x, recv_topk_idx, recv_topk_weights, counts, handle, event = buffer.dispatch(
        x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, **carried, **options)
    if async_mode:
        event.current_stream_wait()
    prefix = handle[0]
    everyones = gathered(per_expert, group).sum(dim=0)
    assert counts == everyones[rank * LOCAL_EXPERTS:(rank + 1) * LOCAL_EXPERTS].tolist()
    values = dequantized(recv_x[0].view(-1, HIDDEN), recv_x[1])[0].bfloat16() if fp8 else recv_x
    begin = 0
    for source in range(num_ranks):                              # all values of a rank's tokens are its number
        end = prefix[source, rank].item()
        assert (values[begin:end].float() - source).abs().max() < 0.1 * (source + 1) if end > begin else True
        if with_topk:
            own = recv_topk_idx[begin:end] >= 0
            assert own.any(dim=1).all() and torch.equal(recv_topk_weights[begin:end], own.float() * source)
        begin = end
    assert begin == len(values)

    again, *nothing, _, event = buffer.dispatch(x, handle=handle, **options)
    if async_mode:
        event.current_stream_wait()
    for a, b in zip(again if fp8 else (again,), recv_x if fp8 else (recv_x,)):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert nothing[:2] == [None, None]

    combined, combined_weights, event = buffer.combine(values, handle, topk_weights=recv_topk_weights, **options)
    if async_mode:
        event.current_stream_wait()
    times = owners.sum(dim=1, keepdim=True)                      # as often as it went to a rank
    assert relative_difference(combined, (rank + 1e-9) * times.expand(-1, HIDDEN).double()) < 5e-2 if rank else not combined.any()
    if with_topk:
        assert torch.equal(combined_weights, topk_weights)       # each is with the rank of its expert alone


def intranode_program(comm, folder):
    import pyep.deep_ep as deep_ep
    device = "cuda" if on_gpu() else "cpu"
    rank, num_ranks, group = joined(comm, folder)
    deep_ep.Buffer.set_num_sms(24)
    config = deep_ep.Config(24, 8, 256)
    buffer = deep_ep.Buffer(group, config.get_nvl_buffer_size_hint(2 * HIDDEN, num_ranks), 0, low_latency_mode=False,
                            num_qps_per_rank=1, explicitly_destroy=True)
    x = torch.ones((TOKENS, HIDDEN), dtype=torch.bfloat16, device=device) * rank
    scales = torch.full((TOKENS, HIDDEN // 128), 1 / 64, device=device)
    in_fp8 = (x.float() * 64).clamp(max=448).to(torch.float8_e4m3fn), scales
    for async_mode in False, True:
        for tokens in x, in_fp8:
            for with_topk in False, True:
                check_intranode(deep_ep, buffer, group, rank, num_ranks, device, tokens, tokens is in_fp8, with_topk, async_mode,
                                config)
    buffer.destroy()
    part()
    return "done"


def test_intranode_program(tmp_path):
    done = ranks.launch(3, intranode_program, str(tmp_path), timeout=300)
    assert done.results == ["done"] * 3, done.stderr


# ---- the interface ---------------------------------------------------------------------------------------------------

REQUIRED = inspect.Parameter.empty
TENSOR_STATS = dict(cumulative_local_expert_recv_stats=None, dispatch_wait_recv_cost_stats=None)

RUN = dict(previous_event=None, async_finish=False, allocate_on_comm_stream=False)

# The methods of DeepEP V1's Buffer that a program of one node may use, with their arguments in order and the defaults.
METHODS = {
    "__init__": dict(group=REQUIRED, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24,
                     allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False, enable_shrink=False,
                     comm=None),
    "destroy": {},
    "is_sm90_compiled": {},
    "set_num_sms": dict(new_num_sms=REQUIRED),
    "capture": {},
    "get_low_latency_rdma_size_hint": dict.fromkeys(("num_max_dispatch_tokens_per_rank", "hidden", "num_ranks", "num_experts"),
                                                    REQUIRED),
    "get_comm_stream": {},
    "get_local_buffer_tensor": dict(dtype=REQUIRED, size=None, offset=0, use_rdma_buffer=False),
    "get_dispatch_config": dict(num_ranks=REQUIRED),
    "get_combine_config": dict(num_ranks=REQUIRED),
    "clean_low_latency_buffer": dict.fromkeys(("num_max_dispatch_tokens_per_rank", "hidden", "num_experts"), REQUIRED),
    "low_latency_dispatch": dict(x=REQUIRED, topk_idx=REQUIRED, num_max_dispatch_tokens_per_rank=REQUIRED, num_experts=REQUIRED,
                                 **TENSOR_STATS, use_fp8=True, round_scale=False, use_ue8m0=False, async_finish=False,
                                 return_recv_hook=False),
    "low_latency_combine": dict(x=REQUIRED, topk_idx=REQUIRED, topk_weights=REQUIRED, handle=REQUIRED, use_logfmt=False,
                                zero_copy=False, async_finish=False, return_recv_hook=False, out=None,
                                combine_wait_recv_cost_stats=None),
    "low_latency_update_mask_buffer": dict(rank_to_mask=REQUIRED, mask=False),
    "low_latency_query_mask_buffer": dict(mask_status=REQUIRED),
    "low_latency_clean_mask_buffer": {},
    "get_next_low_latency_combine_buffer": dict(handle=REQUIRED),
    "get_dispatch_layout": dict(topk_idx=REQUIRED, num_experts=REQUIRED, **RUN),
    "dispatch": dict(x=REQUIRED, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
                     num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0,
                     config=None, **RUN),
    "combine": dict(x=REQUIRED, handle=REQUIRED, topk_weights=None, bias=None, config=None, **RUN),
}


@pytest.mark.parametrize("name", METHODS)
def test_arguments_of(name):
    """DeepEP's names, order and defaults; what pyep adds follows and has a default."""
    import pyep.deep_ep as deep_ep
    method = inspect.getattr_static(deep_ep.Buffer, name)
    parameters = list(inspect.signature(getattr(deep_ep.Buffer, name)).parameters.values())
    if not isinstance(method, staticmethod):
        parameters = parameters[1:]
    theirs = METHODS[name]
    assert [p.name for p in parameters[:len(theirs)]] == list(theirs)
    for p in parameters:
        assert p.default == theirs.get(p.name, p.default) or (name, p.name) == ("__init__", "group")
        assert p.name in theirs or p.default is not REQUIRED
        assert p.name not in theirs or p.kind is p.POSITIONAL_OR_KEYWORD


def test_names():
    import pyep.deep_ep as deep_ep
    assert deep_ep.topk_idx_t is torch.int64
    config = deep_ep.Config(24, 8, 256, 16, 128)
    assert (config.num_sms, config.num_max_nvl_chunked_send_tokens, config.num_max_rdma_chunked_recv_tokens) == (24, 8, 128)
    event = deep_ep.EventOverlap()
    event.current_stream_wait()
    with event as same:
        assert same is event and event.event is None


def test_num_sms():
    import pyep.deep_ep as deep_ep
    before = deep_ep.Buffer.num_sms
    try:
        deep_ep.Buffer.set_num_sms(24)
        assert deep_ep.Buffer.get_dispatch_config(7).num_sms == deep_ep.Buffer.get_combine_config(160).num_sms == 24
    finally:
        deep_ep.Buffer.set_num_sms(before)


def queries(comm, folder):
    import pyep
    import pyep.deep_ep as deep_ep
    _, _, group = joined(comm, folder)
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(4, 64, comm.size, comm.size)
    with deep_ep.Buffer(group, 0, size, True) as buffer:
        assert buffer.is_available() and not buffer.is_internode_available()
        assert (buffer.get_num_rdma_ranks(), buffer.get_rdma_rank()) == (1, 0)
        assert buffer.is_sm90_compiled()
        whole = buffer.symmetric_memory(torch.uint8)
        assert whole.is_cuda == on_gpu() and len(whole) == size
        # What lies there is known: every rank's address of the symmetric memory of every rank, its own among them.
        peers = pyep.layout.control(comm.size)["peers"]
        addresses = buffer.symmetric_memory(torch.int64, torch.Size((1, comm.size)), peers.offset)
        assert addresses[0, comm.rank].item() == whole.data_ptr()
        assert math.prod(addresses.shape) == comm.size and addresses.data_ptr() == whole.data_ptr() + peers.offset
        stream = buffer.get_comm_stream()
        assert stream is None if not on_gpu() else isinstance(stream, torch.cuda.Stream) and stream.priority < 0
        deep_ep.Buffer.capture().synchronize()
    assert not buffer.is_available()
    part()
    return "done"


def test_queries(tmp_path):
    done = ranks.launch(2, queries, str(tmp_path), timeout=200)
    assert done.results == ["done"] * 2, done.stderr
