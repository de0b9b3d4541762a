"""The oracle: what each operation must return, in plain NumPy over the inputs of all ranks at once.

Nothing here is distributed or fast. Every argument and every result is a list indexed by rank, and a kernel is right
when each rank's result equals the oracle's entry for that rank, bit for bit.

    low_latency         small batches, fixed room for every rank's tokens, several layouts and recipes
    high_throughput     large batches, rows packed to what has really come
    routing, fp8, arithmetic    what they are made of

Notation: R ranks, E experts, L = E / R experts per rank (expert e is local expert e % L of rank e // L), T_r tokens of
rank r, K top-k, H hidden. A *selection* is one entry (source rank, token, k) of `topk_idx`; the entry -1 selects
nothing. Low latency: M, the most tokens that any rank may dispatch. High throughput: N_r, the rows that rank r receives.
"""

from .arithmetic import fma32, to_bf16
from .fp8 import BLOCK, E4M3_MAX, LEAST_AMAX, pack_ue8m0, quantize, to_e4m3
from .high_throughput import (
    HighThroughputDispatched, HighThroughputHandle, HighThroughputLayout, combine, dispatch, get_dispatch_layout,
    make_handles, row_of
)
from .low_latency import (
    Dispatched, expert_major, low_latency_combine, low_latency_combine_rank_major, low_latency_combine_reduced,
    low_latency_dispatch, owners, places, rank_major, to_fp8, weighted_sum
)
from .routing import local_experts, tokens_for

__all__ = [
    "BLOCK", "Dispatched", "E4M3_MAX", "HighThroughputDispatched", "HighThroughputHandle", "HighThroughputLayout",
    "LEAST_AMAX", "combine", "dispatch", "expert_major", "fma32", "get_dispatch_layout", "local_experts",
    "low_latency_combine", "low_latency_combine_rank_major", "low_latency_combine_reduced", "low_latency_dispatch", "make_handles",
    "owners", "pack_ue8m0", "places", "quantize", "rank_major", "row_of", "to_bf16", "to_e4m3", "to_fp8", "tokens_for",
    "weighted_sum"
]
