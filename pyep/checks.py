"""Arguments that no operation can serve: `TypeError` or `ValueError`, naming the argument, what it was and what is accepted."""
import numbers

import numpy as np

from . import layout
from .low_latency import LowLatencyHandle

NOT_YET = dict(use_fp8=False, round_scale=False, use_ue8m0=False, use_logfmt=False, async_finish=False,
               output_layout="expert_major", topk_weights=None,
               cumulative_local_expert_recv_stats=None, dispatch_wait_recv_cost_stats=None, combine_wait_recv_cost_stats=None)


def check_construction(group, comm, num_rdma_bytes, low_latency_mode, enable_shrink, timeout_s):
    """The arguments of `Buffer`."""
    if (group is None) == (comm is None):
        raise ValueError("pass either group= (torch.distributed) or comm= (mpi4py), and not both")
    if comm is not None and not hasattr(comm, "Idup"):
        raise TypeError(f"comm is {comm!r}; expected an mpi4py communicator")
    if not low_latency_mode or enable_shrink:
        raise NotImplementedError(f"low_latency_mode={low_latency_mode!r}, enable_shrink={enable_shrink!r} is not implemented yet; "
                                  "pass low_latency_mode=True, enable_shrink=False")
    if not isinstance(num_rdma_bytes, (int, np.integer)) or num_rdma_bytes < 0:
        raise ValueError(f"num_rdma_bytes is {num_rdma_bytes!r}; expected a number of bytes")
    if not isinstance(timeout_s, numbers.Real) or not 0 < timeout_s < 1e9:
        raise ValueError(f"timeout_s is {timeout_s!r}; expected seconds, more than 0 and less than 1e9")


def check_shape(max_tokens, hidden, num_ranks, num_experts, num_topk, num_tokens=0, topk_name="num_topk"):
    """The shape of a low-latency operation."""
    for name, value in (("num_max_dispatch_tokens_per_rank", max_tokens), ("hidden", hidden), ("num_ranks", num_ranks),
                        ("num_experts", num_experts), ("num_topk", num_topk)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected an int")
        if name in ("num_max_dispatch_tokens_per_rank", "num_ranks") and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if num_tokens > max_tokens:
        raise ValueError(f"x has {num_tokens} tokens, more than num_max_dispatch_tokens_per_rank = {max_tokens}")
    if hidden < 8 or hidden % 8:
        raise ValueError(f"hidden is {hidden}; expected a multiple of 8 (rows of whole 16-byte vectors)")
    if num_experts < 1 or num_experts % num_ranks:
        raise ValueError(f"num_experts is {num_experts}; expected a multiple of the {num_ranks} ranks")
    if num_experts // num_ranks > layout.MAX_LOCAL_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}; expected at most {layout.MAX_LOCAL_EXPERTS} a rank")
    if not 1 <= num_topk <= num_experts:
        raise ValueError(f"{topk_name} selects {num_topk} experts a token; expected 1 to num_experts = {num_experts}")


def check_experts(topk_idx, num_experts):
    """Experts that do not exist.  Only on the CPU: on a GPU the kernel finds out, without a wait."""
    indices = np.asarray(topk_idx)
    if indices.size and not (-1 <= indices.min() and indices.max() < num_experts):
        raise ValueError(f"topk_idx has values from {indices.min()} to {indices.max()}; expected -1 to {num_experts - 1}")


def check_handle(handle, owner):
    """What `low_latency_dispatch` of the buffer `owner` returned as handle."""
    if not isinstance(handle, LowLatencyHandle):
        raise TypeError(f"handle is a {type(handle).__name__}; expected what low_latency_dispatch returned as handle")
    if handle.owner != owner:
        raise ValueError("handle is of another Buffer; expected one that low_latency_dispatch of this buffer returned")


def check_implemented(**arguments):
    """NotImplementedError for arguments whose feature is not there yet."""
    for name, value in arguments.items():
        accepted = NOT_YET[name]
        simple = isinstance(value, (bool, int, str))
        if value is not accepted and not (simple and value == accepted):
            was = repr(value) if simple else f"a {type(value).__name__}"
            raise NotImplementedError(f"{name}={was} is not implemented yet; pass {name}={accepted!r}")
