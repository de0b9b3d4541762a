"""Arguments that no operation can serve: `TypeError` or `ValueError`, naming the argument, what it was and what is accepted."""
import numbers
from typing import NamedTuple

import numpy as np

from . import arrays, layout
from .errors import EPRoutingError
from .events import EventOverlap
from .results import LowLatencyHandle, recv_shape


def check_construction(num_nvl_bytes, num_rdma_bytes, num_qps_per_rank, enable_shrink, timeout_s):
    """The arguments of `Buffer`, but for group and comm, see `pyep.channels.boards`."""
    if enable_shrink:
        raise NotImplementedError(f"enable_shrink={enable_shrink!r} is not implemented yet; pass enable_shrink=False")
    for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
        if not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(f"{name} is {value!r}; expected a number of bytes")
    if not isinstance(num_qps_per_rank, (int, np.integer)) or num_qps_per_rank < 1:
        raise ValueError(f"num_qps_per_rank is {num_qps_per_rank!r}; expected a number of channels, at least 1")
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
    if max_tokens > layout.MAX_TOKENS:
        raise ValueError(f"num_max_dispatch_tokens_per_rank is {max_tokens}; expected at most {layout.MAX_TOKENS}")
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


def check_mode(hidden, use_fp8, round_scale, use_ue8m0, output_layout):
    """The mode of a dispatch; what its rows travel as, see `layout.DATA`."""
    if output_layout not in ("expert_major", "rank_major"):
        raise ValueError(f"output_layout is {output_layout!r}; expected \"expert_major\" or \"rank_major\"")
    if not use_fp8:
        if round_scale or use_ue8m0:
            raise ValueError(f"round_scale={round_scale!r}, use_ue8m0={use_ue8m0!r} with use_fp8=False; they are for use_fp8=True")
        return "bf16"
    if use_ue8m0 and not round_scale:
        raise ValueError("use_ue8m0=True with round_scale=False; exponents can only stand for scales that are powers of two: "
                         "pass round_scale=True")
    multiple = layout.FP8_BLOCK * (4 if use_ue8m0 else 1)
    if hidden % multiple:
        raise ValueError(f"hidden is {hidden}; expected a multiple of {multiple} with use_fp8=True"
                         + (", use_ue8m0=True" if use_ue8m0 else ""))
    return "fp8_ue8m0" if use_ue8m0 else "fp8_powers_of_2" if round_scale else "fp8"


class LowLatencyCall(NamedTuple):
    """What an operation needs to know of its arguments but for values and addresses."""

    library: arrays.Library
    shape: layout.LowLatency
    num_tokens: int                     # T
    index_bytes: int                    # of an entry of topk_idx; 0 without it


def check_dispatch(engine, num_ranks, x, topk_idx, topk_weights, stats, waits, out, max_tokens, num_experts, use_fp8, round_scale,
                   use_ue8m0, output_layout):
    """All of a dispatch's arguments but for values and addresses: `LowLatencyCall`."""
    library = library_on(engine, x, "x")
    arrays.check(x, "x", library, ("bfloat16",), ("T", "H"))
    arrays.check_aligned(x, "x", library)
    arrays.check(topk_idx, "topk_idx", library, ("int64", "int32"), (x.shape[0], "K"))
    (num_tokens, hidden), num_topk = x.shape, topk_idx.shape[1]
    check_shape(max_tokens, hidden, num_ranks, num_experts, num_topk, num_tokens, topk_name="topk_idx")
    data = check_mode(hidden, use_fp8, round_scale, use_ue8m0, output_layout)
    shape = layout.LowLatency(num_ranks, int(max_tokens), hidden, int(num_experts), num_topk, data, output_layout == "rank_major",
                              topk_weights is not None)
    if topk_weights is not None:
        arrays.check(topk_weights, "topk_weights", library, ("float32",), (num_tokens, num_topk))
    if stats is not None:
        arrays.check(stats, "cumulative_local_expert_recv_stats", library, ("int32",), (shape.local_experts,), writable=True)
    if waits is not None:
        arrays.check(waits, "dispatch_wait_recv_cost_stats", library, ("int64",), (num_ranks,), writable=True)
    if out is not None:
        if shape.fp8:
            raise ValueError("out is given with use_fp8=True; expected None: FP8 is received into the buffer's own arrays")
        arrays.check(out, "out", library, ("bfloat16",), (*recv_shape(shape), hidden), writable=True)
        arrays.check_aligned(out, "out", library)
    return LowLatencyCall(library, shape, num_tokens, index_bytes_of(library, topk_idx))


def check_combine(engine, num_ranks, x, topk_idx, topk_weights, waits, out, dispatched_with, shape, num_tokens, zero_copy):
    """All of a combine's arguments but for values and addresses, likewise; no bytes of an entry where it takes no topk_idx.
    dispatched_with, shape, num_tokens: of the handle."""
    library = library_on(engine, x, "x")
    check_library(library, dispatched_with)
    arrays.check(x, "x", library, ("bfloat16",), (*recv_shape(shape), shape.hidden))
    if not zero_copy:
        arrays.check_aligned(x, "x", library)
    index_bytes = 0
    if not shape.reduced:
        arrays.check(topk_idx, "topk_idx", library, ("int64", "int32"), (num_tokens, shape.num_topk))
        arrays.check(topk_weights, "topk_weights", library, ("float32",), (num_tokens, shape.num_topk))
        index_bytes = index_bytes_of(library, topk_idx)
    if waits is not None:
        arrays.check(waits, "combine_wait_recv_cost_stats", library, ("int64",), (num_ranks,), writable=True)
    if out is not None:
        arrays.check(out, "out", library, ("bfloat16",), (num_tokens, shape.hidden), writable=True)
        arrays.check_aligned(out, "out", library)
    return LowLatencyCall(library, shape, num_tokens, index_bytes)


def check_library(library, dispatched_with):
    """TypeError unless a handle's arrays are of the library that x is of."""
    if dispatched_with is not library:
        raise TypeError(f"x is a {library.name} array, but handle is of a dispatch of {dispatched_with.name} arrays")


def library_on(engine, array, argument):
    """The library of an array, which must be in the engine's memory."""
    library = arrays.library_of(array, argument)
    if library.engine != engine.name:
        where = "GPU" if engine.name == "cuda" else "CPU"
        raise TypeError(f"{argument} is in {library.engine} memory, but this buffer runs on the {where}")
    if library.device(array) != engine.index:
        raise ValueError(f"{argument} is on GPU {library.device(array)}, but this buffer is on GPU {engine.index}")
    return library


def index_bytes_of(library, topk_idx):
    return 8 if library.dtype(topk_idx) == "int64" else 4


def check_experts(topk_idx, num_experts):
    """Experts that do not exist.  Only on the CPU: on a GPU the kernel finds out, without a wait."""
    indices = arrays.as_numpy(topk_idx)
    if indices.size and not (-1 <= indices.min() and indices.max() < num_experts):
        raise ValueError(f"topk_idx has values from {indices.min()} to {indices.max()}; expected -1 to {num_experts - 1}")


def check_room(topk_idx, shape, rank):
    """More rows for an expert than it has room for, of a low-latency dispatch.  Likewise only on the CPU."""
    indices = arrays.as_numpy(topk_idx)
    if indices.size > shape.max_tokens and not shape.rank_major:
        rows = np.bincount(indices[indices >= 0], minlength=1)
        if rows.max() > shape.max_tokens:
            raise EPRoutingError(
                f"topk_idx of rank {rank} selects expert {rows.argmax()} {rows.max()} times; a rank may send an expert "
                f"num_max_dispatch_tokens_per_rank = {shape.max_tokens} rows: some tokens name an expert more than once")


def check_handle(handle, owner):
    """What `low_latency_dispatch` of the buffer `owner` returned as handle."""
    if not isinstance(handle, LowLatencyHandle):
        raise TypeError(f"handle is a {type(handle).__name__}; expected what low_latency_dispatch returned as handle")
    if handle.owner != owner:
        raise ValueError("handle is of another Buffer; expected one that low_latency_dispatch of this buffer returned")


def check_async(async_finish, return_recv_hook, previous_event):
    """When an operation begins and who waits for its end."""
    if async_finish and return_recv_hook:
        raise ValueError("async_finish=True with return_recv_hook=True; expected at most one of them: either the event says when "
                         "the operation has ended, or the hook ends it")
    if previous_event is not None and not isinstance(previous_event, EventOverlap):
        raise TypeError(f"previous_event is a {type(previous_event).__name__}; expected what Buffer.capture or an operation "
                        "returned as event")
