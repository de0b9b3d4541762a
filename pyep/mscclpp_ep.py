"""The interface of MSCCL++'s expert-parallel extension, `mscclpp.ext.ep` of its pull request 796 (commit 10cd0012), over pyep.

A program for it runs after `from pyep import mscclpp_ep as ep`, with PyTorch tensors and a `torch.distributed` group.  It gets and
passes on tuples of tensors where pyep has a handle.  So here the handle travels with tensors of the tuple: `src_info`,
`rank_prefix_matrix` and `send_head` must be those that a dispatch has returned, themselves, not copies.  What pyep has no use for,
prefix sums over channels, is there all the same, as for one channel.
"""
import torch

from . import buffer
from .config import Config
from .events import EventHandle

__all__ = ["Buffer", "Config", "EventHandle"]
BETWEEN_NODES = "high throughput between nodes ({}) is not implemented yet; within a node there are intranode_dispatch and _combine"


class Buffer:
    """`pyep.Buffer` with MSCCL++'s methods, which are also those of its `runtime`.

    group: a torch.distributed process group.  num_nvl_bytes: see `Config.get_nvl_buffer_size_hint`; num_rdma_bytes: see
    `get_low_latency_rdma_size_hint`.  low_latency_mode, num_qps_per_rank: as for `pyep.Buffer`.
    """

    num_sms = 20                        # without effect, as there: operations get a Config

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=12):
        self._buffer = buffer.Buffer(group, num_nvl_bytes, num_rdma_bytes, low_latency_mode, num_qps_per_rank)
        self._dispatched = None                                  # the handle of the latest low-latency dispatch
        self.rank, self.group_size, self.group = self._buffer.rank, self._buffer.group_size, group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.num_qps_per_rank = low_latency_mode, num_qps_per_rank
        self.is_available = self._buffer.is_available
        self.is_internode_available = self._buffer.is_internode_available
        self.get_local_device_id = self._buffer.get_local_device_id
        self.get_num_rdma_ranks, self.get_rdma_rank = self._buffer.get_num_rdma_ranks, self._buffer.get_rdma_rank
        self.clean_low_latency_buffer = self._buffer.clean_low_latency_buffer

    @property
    def runtime(self):
        return self

    def get_root_rdma_rank(self, global_):
        """This rank's index within its node if global_, else 0."""
        nodes = self._buffer._connection.nodes
        return nodes.of[:self.rank].count(nodes.mine) if global_ else 0

    def get_local_buffer_tensor(self, dtype, offset=0, use_rdma_buffer=False):
        """As that of `pyep.Buffer`: memory that may be overwritten."""
        return self._buffer.get_local_buffer_tensor(dtype, None, offset, use_rdma_buffer)

    get_low_latency_rdma_size_hint = staticmethod(buffer.Buffer.get_low_latency_rdma_size_hint)

    # ---- low latency -------------------------------------------------------------------------------------------------

    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, use_fp8=False, async_finish=False,
                             return_recv_hook=False):
        """(packed_recv_x [L, R*M, H], its scales or None, packed_recv_count [L], src_info [L, R*M], layout_range [L, R], event or
        None, hook or None); see `pyep.Buffer.low_latency_dispatch`."""
        recv_x, recv_count, handle, event, hook = self._buffer.low_latency_dispatch(
            x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, use_fp8=use_fp8, async_finish=async_finish,
            return_recv_hook=return_recv_hook)
        self._dispatched = handle
        values, scales = recv_x if use_fp8 else (recv_x, None)
        return values, scales, recv_count, carrying(handle[0], handle), handle[1], event if async_finish else None, hook

    def low_latency_combine(self, x, topk_idx, topk_weights, src_info, layout_range, num_max_dispatch_tokens_per_rank, num_experts,
                            zero_copy=False, async_finish=False, return_recv_hook=False, out=None):
        """(combined_x [T, H], event or None, hook or None); see `pyep.Buffer.low_latency_combine`.  src_info: of the dispatch."""
        handle = carried(src_info, "src_info")
        require_shape(handle, num_max_dispatch_tokens_per_rank, handle[3], num_experts)
        combined_x, event, hook = self._buffer.low_latency_combine(
            x, topk_idx, topk_weights, handle, zero_copy=zero_copy, async_finish=async_finish, return_recv_hook=return_recv_hook,
            out=out)
        return combined_x, event if async_finish else None, hook

    def get_next_low_latency_combine_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts):
        """The [L, R*M, H] array that zero_copy sends from in a combine of the latest dispatch."""
        if self._dispatched is None:
            raise ValueError("get_next_low_latency_combine_buffer before any low_latency_dispatch; expected it after one")
        require_shape(self._dispatched, num_max_dispatch_tokens_per_rank, hidden, num_experts)
        return self._buffer.get_next_low_latency_combine_buffer(self._dispatched)

    # ---- high throughput ---------------------------------------------------------------------------------------------

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        """As that of `pyep.Buffer`; the event is None without async_finish."""
        *counts, event = self._buffer.get_dispatch_layout(topk_idx, num_experts, previous_event, async_finish,
                                                          allocate_on_comm_stream)
        return *counts, event if async_finish else None

    def intranode_dispatch(self, x, x_scales, topk_idx, topk_weights, num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert,
                           cached_num_recv_tokens, cached_rank_prefix_matrix, cached_channel_prefix_matrix, expert_alignment,
                           config, previous_event, async_finish, allocate_on_comm_stream):
        """(recv_x, recv_x_scales, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, rank_prefix_matrix,
        channel_prefix_matrix, recv_channel_prefix_matrix, recv_src_idx, send_head, event); see `pyep.Buffer.dispatch`.

        cached_rank_prefix_matrix: of an earlier dispatch whose layout this one has, or None.
        channel_prefix_matrix [R, 1] int32: this rank's tokens for each rank; recv_channel_prefix_matrix [R, 1]: zeros.
        """
        tokens = x if x_scales is None else (x, x_scales)
        run = dict(config=config, previous_event=previous_event, async_finish=async_finish,
                   allocate_on_comm_stream=allocate_on_comm_stream)
        if cached_rank_prefix_matrix is None:
            recv_x, recv_topk_idx, recv_topk_weights, counts, handle, event = self._buffer.dispatch(
                tokens, None, num_tokens_per_rank, None, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights,
                expert_alignment, **run)
            channel_prefix_matrix = num_tokens_per_rank.unsqueeze(1)
        else:
            handle = carried(cached_rank_prefix_matrix, "cached_rank_prefix_matrix")
            channel_prefix_matrix = cached_channel_prefix_matrix
            recv_x, recv_topk_idx, recv_topk_weights, counts, _, event = self._buffer.dispatch(tokens, handle, **run)
        values, scales = (recv_x, None) if x_scales is None else recv_x
        rank_prefix_matrix, recv_src_idx, _, send_rows = handle
        begins = torch.zeros((self.group_size, 1), dtype=torch.int32, device=values.device)
        return (values, scales, recv_topk_idx, recv_topk_weights, counts, carrying(rank_prefix_matrix, handle),
                channel_prefix_matrix, begins, recv_src_idx, carrying(send_rows, handle), event if async_finish else None)

    def intranode_combine(self, x, topk_weights, src_idx, rank_prefix_matrix, channel_prefix_matrix, send_head, config,
                          previous_event, async_finish, allocate_on_comm_stream):
        """(combined_x [T, H], combined_topk_weights or None, event or None); see `pyep.Buffer.combine`.

        send_head: of the dispatch."""
        combined_x, combined_weights, event = self._buffer.combine(
            x, carried(send_head, "send_head"), topk_weights, None, config, previous_event, async_finish, allocate_on_comm_stream)
        return combined_x, combined_weights, event if async_finish else None

    def internode_dispatch(self, *args, **kwargs):
        raise NotImplementedError(BETWEEN_NODES.format("internode_dispatch"))

    def internode_combine(self, *args, **kwargs):
        raise NotImplementedError(BETWEEN_NODES.format("internode_combine"))


def carrying(tensor, handle):
    """The tensor as another object, which has the handle with it and so keeps it.  (The handle refers to the first object: there is
    no circle, and results go when they are dropped.)"""
    alias = tensor.view_as(tensor)
    alias.pyep_handle = handle
    return alias


def carried(tensor, argument):
    """The handle that a tensor has with it; TypeError if it has none."""
    handle = getattr(tensor, "pyep_handle", None)
    if handle is None:
        kind = f"a tensor of shape {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
        raise TypeError(f"{argument} is {kind}; expected the tensor that a dispatch has returned, itself and not a copy")
    return handle


def require_shape(handle, num_max_dispatch_tokens_per_rank, hidden, num_experts):
    """ValueError unless a low-latency dispatch was of this shape."""
    given, expected = (num_max_dispatch_tokens_per_rank, hidden, num_experts), tuple(handle[2:])
    if given != expected:
        raise ValueError(f"(num_max_dispatch_tokens_per_rank, hidden, num_experts) is {given}; expected {expected}, as in the "
                         "dispatch")
