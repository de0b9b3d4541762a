"""The oracle: what each operation must return, in plain NumPy over the inputs of all ranks at once.

Nothing here is distributed or fast. Every argument and every result is a list indexed by rank, and a kernel is right
when each rank's result equals the oracle's entry for that rank, bit for bit. To learn what dispatch and combine mean,
read `places`, then the two functions that use it.

Notation: R ranks, E experts, L = E / R experts per rank (expert e is local expert e % L of rank e // L), T_r tokens of
rank r, M the most tokens any rank may dispatch, K top-k, H hidden. A *selection* is one entry (source rank, token, k)
of `topk_idx`; the entry -1 selects nothing.
"""

from typing import NamedTuple

import numpy as np
from ml_dtypes import bfloat16


class Dispatched(NamedTuple):
    """What one rank holds after `low_latency_dispatch`.

    Only the first recv_count[e] rows of expert e are specified. The oracle leaves the others 0 in recv_x and -1 in
    src_info.
    """

    recv_x: np.ndarray  # [L, R*M, H] bf16: the tokens of each local expert, packed
    recv_count: np.ndarray  # [L] int32: how many rows of each local expert are valid
    src_info: np.ndarray  # [L, R*M] int32: the source token (its index on its own rank) of each row
    layout_range: np.ndarray  # [L, R] int64: (begin << 32) | count of the rows that came from each source rank


def places(topk_idx, num_max_dispatch_tokens_per_rank, num_experts):
    """Where every selection lands: the one rule that dispatch and combine share.

    Selection (t, k) of source rank s is row `row[t, k]` of local expert `expert[t, k]` on rank `rank[t, k]`, where
    (rank, expert, row) = places(...)[s]. The rows of an expert are in (source rank, source token, k) order without
    gaps; a token that names an expert twice takes two of them.

    topk_idx: list of [T_r, K] int. Returns a list of three [T_r, K] int arrays, -1 in all three where topk_idx is -1.
    """
    num_ranks, capacity = len(topk_idx), len(topk_idx) * num_max_dispatch_tokens_per_rank
    tokens = [len(idx) for idx in topk_idx]
    selected = np.concatenate(topk_idx)  # [sum of T_r, K]: in C order, this is (source rank, source token, k) order
    if num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts do not divide among {num_ranks} ranks")
    if max(tokens) > num_max_dispatch_tokens_per_rank:
        raise ValueError(f"a rank has {max(tokens)} tokens, at most {num_max_dispatch_tokens_per_rank} are allowed")
    if np.any((selected < -1) | (selected >= num_experts)):
        raise ValueError(f"topk_idx must lie in -1..{num_experts - 1}")

    row = np.full(selected.shape, -1)
    for e in range(num_experts):
        names_e = selected == e
        row[names_e] = np.arange(names_e.sum())  # a boolean mask is filled in C order
    if np.any(row >= capacity):  # distinct experts per token always fit, repeated ones may not
        raise ValueError(f"an expert was selected {row.max() + 1} times, it has room for {capacity} rows")

    experts_per_rank = num_experts // num_ranks
    rank = np.where(selected < 0, -1, selected // experts_per_rank)
    expert = np.where(selected < 0, -1, selected % experts_per_rank)
    starts = np.cumsum(tokens)[:-1]
    return list(zip(*(np.split(part, starts) for part in (rank, expert, row))))


def low_latency_dispatch(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts):
    """Copy every token to each expert that it selects.

    x: list of [T_r, H] bf16. topk_idx: list of [T_r, K] int. Returns a list of `Dispatched`.
    """
    R, L, H = len(x), num_experts // len(x), x[0].shape[1]
    rows = R * num_max_dispatch_tokens_per_rank
    received = [
        Dispatched(
            recv_x=np.zeros((L, rows, H), bfloat16),
            recv_count=np.zeros(L, np.int32),
            src_info=np.full((L, rows), -1, np.int32),
            layout_range=np.zeros((L, R), np.int64),
        )
        for _ in range(R)
    ]
    all_places = places(topk_idx, num_max_dispatch_tokens_per_rank, num_experts)
    for source, (rank, expert, row) in enumerate(all_places):
        for destination, got in enumerate(received):
            token, k = np.nonzero(rank == destination)
            e, i = expert[token, k], row[token, k]
            got.recv_x[e, i] = x[source][token]
            got.src_info[e, i] = token
            # Sources come in rank order, so the rows received so far end where this source's begin.
            count = np.bincount(e, minlength=L)
            got.layout_range[:, source] = (got.recv_count.astype(np.int64) << 32) | count
            got.recv_count[:] += count
    return received


def low_latency_combine(y, topk_idx, topk_weights, num_max_dispatch_tokens_per_rank, num_experts):
    """Bring the experts' outputs back to the tokens and sum them, weighted (the direct recipe).

    out[t] = bf16(sum over k = 0..K-1 of w[t, k] * y[t, k]): fp32 fma in k order from +0.0, nothing at all for a -1,
    and one rounding to nearest even at the end.

    y: list of [L, R*M, H] bf16, in the row order of dispatch. topk_idx: list of [T_r, K] int. topk_weights: list of
    [T_r, K] fp32. Returns a list of [T_r, H] bf16.
    """
    combined = []
    all_places = places(topk_idx, num_max_dispatch_tokens_per_rank, num_experts)
    for (rank, expert, row), weights in zip(all_places, topk_weights):
        tokens, top_k = rank.shape
        total = np.zeros((tokens, y[0].shape[2]), np.float32)
        for k in range(top_k):
            for destination in range(len(y)):  # each token meets at most one of them, so k alone orders the sum
                (t,) = np.nonzero(rank[:, k] == destination)
                output = y[destination][expert[t, k], row[t, k]]
                total[t] = fma32(weights[t, k, None], output, total[t])
        with np.errstate(all="ignore"):  # NaN and overflow to infinity are results, not accidents
            combined.append(total.astype(bfloat16))
    return combined


def fma32(a, b, c):
    """a * b + c in fp32 with one rounding (to nearest even), as the fma instruction does it.

    a, b, c: arrays or scalars that broadcast, fp32 or exactly convertible to it (bf16). Returns fp32.
    """
    with np.errstate(all="ignore"):
        a, b, c = (np.asarray(v, np.float32).astype(np.float64) for v in (a, b, c))
        product = a * b  # exact: 24 x 24 bits fit in 53, and float64 has exponents to spare
        total = product + c
        # TwoSum (Knuth): total + error is exactly product + c. The error of an infinite or NaN total means nothing.
        c_part = total - product
        error = (product - (total - c_part)) + (c - c_part)
        inexact = np.isfinite(total) & (error != 0)
        # `total` may have been rounded onto the midpoint of two fp32 values, and rounding that once more goes wrong.
        # So the first rounding is made one to odd: an inexact sum takes that of its two float64 neighbours whose last
        # bit is set. It is never a midpoint, and it lies on the same side of every midpoint as the exact sum.
        even = (total.view(np.int64) & 1) == 0
        to_odd = np.nextafter(total, np.copysign(np.inf, error))
        return np.where(inexact & even, to_odd, total).astype(np.float32)
