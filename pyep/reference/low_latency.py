"""Low latency: what dispatch and combine must return, in each of their modes.

To learn what dispatch means, read `places`, then `expert_major` and `rank_major`, its two layouts. The three combines
are the three recipes of the way back.
"""

from typing import NamedTuple

import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn

from .arithmetic import fma32, to_bf16
from .fp8 import pack_ue8m0, quantize
from .routing import local_experts, tokens_for

# ---------------------------------------------------------------------------------------------------------------------
# Who gets what


def owners(topk_idx, num_max_dispatch_tokens_per_rank, num_experts):
    """`local_experts` of tokens that a low-latency dispatch accepts: ValueError if a rank has too many."""
    most = max(len(idx) for idx in topk_idx)
    if most > num_max_dispatch_tokens_per_rank:
        raise ValueError(f"a rank has {most} tokens, at most {num_max_dispatch_tokens_per_rank} are allowed")
    return local_experts(topk_idx, num_experts)


def places(topk_idx, num_max_dispatch_tokens_per_rank, num_experts):
    """Where every selection lands in the expert-major layout: the one rule that its dispatch and its combines share.

    Selection (t, k) of source rank s is row `row[t, k]` of local expert `expert[t, k]` on rank `rank[t, k]`, where
    (rank, expert, row) = places(...)[s]. The rows of an expert are in (source rank, source token, k) order without
    gaps; a token that names an expert twice takes two of them.

    topk_idx: list of [T_r, K] int. Returns a list of three [T_r, K] int arrays, -1 in all three where topk_idx is -1.
    """
    owned = owners(topk_idx, num_max_dispatch_tokens_per_rank, num_experts)
    selected = np.concatenate(topk_idx)  # [sum of T_r, K]: in C order, this is (source rank, source token, k) order
    row = np.full(selected.shape, -1)
    for e in range(num_experts):
        names_e = selected == e
        row[names_e] = np.arange(names_e.sum())  # a boolean mask is filled in C order
    capacity = len(topk_idx) * num_max_dispatch_tokens_per_rank
    if np.any(row >= capacity):  # distinct experts per token always fit, repeated ones may not
        raise ValueError(f"an expert was selected {row.max() + 1} times, it has room for {capacity} rows")
    starts = np.cumsum([len(idx) for idx in topk_idx])[:-1]
    return [(*pair, rows) for pair, rows in zip(owned, np.split(row, starts))]


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch


class Dispatched(NamedTuple):
    """What one rank holds after `low_latency_dispatch`: G groups with room for N rows each.

    A group is a local expert (expert-major, [G, N] = [L, R*M]) or a source rank (rank-major, [G, N] = [R, M]). Of
    recv_x and src_info, only the first recv_count[g] rows of group g are specified. The oracle leaves the others 0 in
    recv_x and -1 in src_info.
    """

    recv_x: np.ndarray | tuple  # [G, N, H] bf16: the tokens of each group, packed; with FP8 the pair that `to_fp8` makes
    recv_count: np.ndarray  # [G] int32: how many rows of each group are valid
    src_info: np.ndarray  # [G, N] int32: the source token (its index on its own rank) of each row
    layout_range: np.ndarray  # [L, R] or [R] int64: (begin << 32) | count of the rows that came from each source rank
    recv_topk_idx: np.ndarray | None = None  # rank-major: [R, M, K] int64, the local experts of each row, else -1
    recv_topk_weights: np.ndarray | None = None  # rank-major, if weights were given: [R, M, K] fp32, 0 beside a -1


def low_latency_dispatch(
    x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, topk_weights=None, use_fp8=False, round_scale=False,
    use_ue8m0=False, output_layout="expert_major"
):
    """Copy every token to each expert that it selects (expert-major) or to each rank that owns one (rank-major).

    x: list of [T_r, H] bf16. topk_idx: list of [T_r, K] int. topk_weights: None or list of [T_r, K] fp32; they show in
    the rank-major layout only, but with them an expert-major dispatch is followed by `low_latency_combine_reduced`
    instead of `low_latency_combine`. use_fp8, round_scale, use_ue8m0: see `to_fp8`. Returns a list of `Dispatched`.
    """
    if output_layout == "expert_major":
        received = expert_major(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts)
    elif output_layout == "rank_major":
        received = rank_major(x, topk_idx, topk_weights, num_max_dispatch_tokens_per_rank, num_experts)
    else:
        raise ValueError(f"output_layout is {output_layout!r}; expected 'expert_major' or 'rank_major'")
    return [to_fp8(got, round_scale, use_ue8m0) for got in received] if use_fp8 else received


def expert_major(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts):
    """A dispatch of bf16 to the rows that `places` names. Returns a list of `Dispatched`."""
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


def rank_major(x, topk_idx, topk_weights, num_max_dispatch_tokens_per_rank, num_experts):
    """A dispatch of bf16 that copies every token once to each rank of `tokens_for`, with its selections there.

    What is selected of other ranks reads -1 in recv_topk_idx. Returns a list of `Dispatched`.
    """
    R, M, K, H = len(x), num_max_dispatch_tokens_per_rank, topk_idx[0].shape[1], x[0].shape[1]
    received = [
        Dispatched(
            recv_x=np.zeros((R, M, H), bfloat16),
            recv_count=np.zeros(R, np.int32),
            src_info=np.full((R, M), -1, np.int32),
            layout_range=np.zeros(R, np.int64),
            recv_topk_idx=np.full((R, M, K), -1, np.int64),
            recv_topk_weights=None if topk_weights is None else np.zeros((R, M, K), np.float32),
        )
        for _ in range(R)
    ]
    for source, (rank, expert) in enumerate(owners(topk_idx, M, num_experts)):
        for destination, got in enumerate(received):
            token = tokens_for(rank, destination)
            count = len(token)
            here = rank[token] == destination  # [count, K]
            got.recv_x[source, :count] = x[source][token]
            got.recv_count[source] = count
            got.src_info[source, :count] = token
            got.layout_range[source] = (source * M << 32) | count  # rows counted over all sources
            got.recv_topk_idx[source, :count] = np.where(here, expert[token], -1)
            if topk_weights is not None:
                got.recv_topk_weights[source, :count] = np.where(here, topk_weights[source][token], 0)
    return received


def to_fp8(got, round_scale, use_ue8m0):
    """A `Dispatched` of bf16 as one of FP8: recv_x becomes the pair (data, scales).

    data: [G, N, H] e4m3. scales: [G, N, H/128] fp32 or, with use_ue8m0, [G, N, H/512] int32; column-major, that is, a
    view with its last two axes swapped of a contiguous [G, H/128, N], which is how DeepEP hands them to TMA.
    """
    if use_ue8m0 and not round_scale:
        raise ValueError("use_ue8m0 needs round_scale: only the exponent of a scale is kept")
    valid = got.src_info >= 0
    data, scales = quantize(got.recv_x[valid], round_scale)  # per token, so before or after it travels is the same
    if use_ue8m0:
        scales = pack_ue8m0(scales)
    (groups, rows), columns = valid.shape, scales.shape[1]
    recv_data = np.zeros(got.recv_x.shape, float8_e4m3fn)
    recv_scales = np.zeros((groups, columns, rows), scales.dtype).swapaxes(1, 2)
    recv_data[valid], recv_scales[valid] = data, scales
    return got._replace(recv_x=(recv_data, recv_scales))


# ---------------------------------------------------------------------------------------------------------------------
# Combine


def low_latency_combine(y, topk_idx, topk_weights, num_max_dispatch_tokens_per_rank, num_experts):
    """Bring the experts' outputs back to the tokens and sum them, weighted (the direct recipe).

    out[t] = bf16(sum over k = 0..K-1 of w[t, k] * y[t, k]): fp32 fma in k order from +0.0, nothing at all for a -1,
    and one rounding to nearest even at the end.

    y: list of [L, R*M, H] bf16, in the row order of dispatch. topk_idx: list of [T_r, K] int. topk_weights: list of
    [T_r, K] fp32. Returns a list of [T_r, H] bf16.
    """
    all_places = places(topk_idx, num_max_dispatch_tokens_per_rank, num_experts)
    everywhere = range(len(y))
    return [to_bf16(weighted_sum(y, place, w, everywhere)) for place, w in zip(all_places, topk_weights)]


def low_latency_combine_reduced(y, topk_idx, topk_weights, num_max_dispatch_tokens_per_rank, num_experts):
    """The same with a sum on the experts' rank first, so that one row comes back from each rank (rank-reduced).

    p[r, t] = bf16(sum over those k, in order, whose expert is on rank r, of w[t, k] * y[t, k]), as the direct recipe
    sums; out[t] = bf16(sum of p[r, t] in rank order), fp32 additions from +0.0. A rank that t selects nothing of is
    left out, or adds p = +0.0 as here: that is the same, since a sum that begins with +0.0 is never -0.0.

    topk_idx, topk_weights: those of the dispatch. Arguments and result as of `low_latency_combine`.
    """
    combined = []
    all_places = places(topk_idx, num_max_dispatch_tokens_per_rank, num_experts)
    for place, weights in zip(all_places, topk_weights):
        partial = [to_bf16(weighted_sum(y, place, weights, [r])) for r in range(len(y))]
        total = np.zeros(partial[0].shape, np.float32)
        with np.errstate(all="ignore"):
            for p in partial:
                total += p.astype(np.float32)
        combined.append(to_bf16(total))
    return combined


def low_latency_combine_rank_major(y, topk_idx, num_max_dispatch_tokens_per_rank, num_experts):
    """Bring back what each rank made of a token, and sum it.

    out[t] = bf16(sum over the ranks that t went to, in rank order, of y), fp32 additions from +0.0. The rank has
    already weighted and summed the outputs of its experts.

    y: list of [R, M, H] bf16; row (s, i) belongs to row (s, i) of the rank-major recv_x. topk_idx: list of [T_r, K]
    int. Returns a list of [T_r, H] bf16.
    """
    combined = []
    for source, (rank, _) in enumerate(owners(topk_idx, num_max_dispatch_tokens_per_rank, num_experts)):
        total = np.zeros((len(rank), y[0].shape[2]), np.float32)
        for destination in range(len(y)):
            token = tokens_for(rank, destination)
            with np.errstate(all="ignore"):
                total[token] += y[destination][source, : len(token)].astype(np.float32)
        combined.append(to_bf16(total))
    return combined


def weighted_sum(y, place, weights, ranks):
    """The sum over k, in order, of w[t, k] * y[t, k], over selections of experts on `ranks`: fp32 fma from +0.0.

    y: list of [L, R*M, H] bf16. place: (rank, expert, row) of one source, of `places`. weights: [T, K] fp32. Returns
    [T, H] fp32.
    """
    rank, expert, row = place
    total = np.zeros((len(rank), y[0].shape[2]), np.float32)
    for k in range(rank.shape[1]):
        for r in ranks:  # (t, k) meets at most one of them, so k alone orders the sum
            t = np.flatnonzero(rank[:, k] == r)
            total[t] = fma32(weights[t, k, None], y[r][expert[t, k], row[t, k]], total[t])
    return total
