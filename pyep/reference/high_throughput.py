"""High throughput: what layout, dispatch and combine must return.

A token goes once to every rank that owns one of its experts. What a rank receives lies without gaps, ordered by
(source rank, source token), and combine sums over the ranks that a token went to. All that says where a row lies is in
`HighThroughputHandle`: token t of source rank s is, on rank j, row `row_of(handles, s, j)[t]`.
"""

from typing import NamedTuple

import numpy as np

from .arithmetic import to_bf16
from .routing import local_experts, tokens_for


class HighThroughputLayout(NamedTuple):
    """How much one rank sends to whom: what `get_dispatch_layout` returns, but for the event."""

    num_tokens_per_rank: np.ndarray  # [R] int32: the tokens that go to each rank
    num_tokens_per_rdma_rank: None  # of more nodes than one: the tokens that go to each node
    num_tokens_per_expert: np.ndarray  # [E] int32: the selections of each expert
    is_token_in_rank: np.ndarray  # [T, R] bool


class HighThroughputHandle(NamedTuple):
    """Where the rows of one rank come from and go to."""

    rank_prefix_matrix: np.ndarray  # [R, R] int32, the same on all ranks: [i][j] = the tokens of ranks 0..i for rank j
    recv_src_idx: np.ndarray  # [N] int32: the source token (its index on its own rank) of each row
    is_token_in_rank: np.ndarray  # [T, R] bool, of the layout
    send_rows: np.ndarray  # [T, R] int32: earlier tokens of this rank that go to the same rank; -1 where t does not go


class HighThroughputDispatched(NamedTuple):
    """What one rank holds after `dispatch`.

    N rows, or with num_worst_tokens that many, of which the first N hold tokens. In the others recv_topk_idx is -1 and
    recv_topk_weights 0; recv_x and the handle's recv_src_idx are unspecified there, the oracle leaves 0 and -1.
    """

    recv_x: np.ndarray | tuple  # [N, H], or the pair (values [N, H], scales [N, S] or [N])
    recv_topk_idx: np.ndarray | None  # [N, K] int64: local experts, -1 for what is another rank's or nobody's
    recv_topk_weights: np.ndarray | None  # [N, K] fp32, 0 beside a -1
    num_recv_tokens_per_expert_list: list  # L ints: selections of each local expert, rounded up; [] with worst rows
    handle: HighThroughputHandle


# ---------------------------------------------------------------------------------------------------------------------
# Layout


def get_dispatch_layout(topk_idx, num_experts):
    """Count what each rank sends to whom.

    topk_idx: list of [T_r, K] int. Returns a list of `HighThroughputLayout`. A token that names two experts of a rank
    goes there once; one that names an expert twice counts twice for that expert.
    """
    num_ranks, layouts = len(topk_idx), []
    for idx, (rank, _) in zip(topk_idx, local_experts(topk_idx, num_experts)):
        is_token_in_rank = np.zeros((len(idx), num_ranks), bool)
        for destination in range(num_ranks):
            is_token_in_rank[tokens_for(rank, destination), destination] = True
        per_expert = np.bincount(idx[idx >= 0], minlength=num_experts)
        per_rank = is_token_in_rank.sum(axis=0)
        layouts.append(
            HighThroughputLayout(per_rank.astype(np.int32), None, per_expert.astype(np.int32), is_token_in_rank)
        )
    return layouts


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch


def dispatch(x, layout, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=None):
    """Copy every token to the ranks of its layout, with its top-k indices and weights if they are given.

    A cached dispatch is this too, with the layout of the first and without indices and weights.

    x: list of [T_r, H], or of pairs (values [T_r, H], scales [T_r, S] or [T_r]): bits are passed through. layout: list of
    `HighThroughputLayout`. topk_idx: None or list of [T_r, K] int. topk_weights: None or list of [T_r, K] fp32,
    not without topk_idx. expert_alignment: the counts by expert are rounded up to a multiple of it.
    num_worst_tokens: None or a list of the rows that each rank's results have. Returns a list of
    `HighThroughputDispatched`. ValueError for what cannot be, for more rows than num_worst_tokens too.
    """
    check_dispatch(x, layout, topk_idx, topk_weights, expert_alignment)
    handles = make_handles(layout, num_worst_tokens)
    num_experts = len(layout[0].num_tokens_per_expert)
    selected = None if topk_idx is None else local_experts(topk_idx, num_experts)
    received = []
    for rank, handle in enumerate(handles):

        def collect(of_all, fill, rank=rank):
            return gather(handles, rank, of_all, fill)

        recv_x = tuple(collect(part, 0) for part in zip(*x)) if isinstance(x[0], tuple) else collect(x, 0)
        recv_topk_idx = recv_topk_weights = None
        if topk_idx is not None:
            here = [owner == rank for owner, _ in selected]
            experts = [np.where(h, expert, -1).astype(np.int64) for h, (_, expert) in zip(here, selected)]
            recv_topk_idx = collect(experts, -1)
        if topk_weights is not None:
            recv_topk_weights = collect([np.where(h, w, np.float32(0)) for h, w in zip(here, topk_weights)], 0)
        counts = [] if num_worst_tokens else expert_counts(layout, rank, expert_alignment)
        received.append(HighThroughputDispatched(recv_x, recv_topk_idx, recv_topk_weights, counts, handle))
    return received


def make_handles(layout, num_worst_tokens=None):
    """Where every row lies, from who goes where. Returns a list of `HighThroughputHandle`."""
    counts = np.array([of_rank.is_token_in_rank.sum(axis=0) for of_rank in layout])  # [source, destination]
    rank_prefix_matrix = np.cumsum(counts, axis=0).astype(np.int32)
    rows = rank_prefix_matrix[-1]
    room = rows if num_worst_tokens is None else np.array(num_worst_tokens)
    if np.any(rows > room):
        raise ValueError(f"ranks receive {rows.tolist()} tokens, num_worst_tokens is {room.tolist()}")
    handles = []
    for destination in range(len(layout)):
        is_token_in_rank = layout[destination].is_token_in_rank
        earlier = np.cumsum(is_token_in_rank, axis=0) - is_token_in_rank
        recv_src_idx = np.full(room[destination], -1, np.int32)
        sources = [np.flatnonzero(of_rank.is_token_in_rank[:, destination]) for of_rank in layout]
        recv_src_idx[: rows[destination]] = np.concatenate(sources)
        send_rows = np.where(is_token_in_rank, earlier, -1).astype(np.int32)
        handles.append(HighThroughputHandle(rank_prefix_matrix.copy(), recv_src_idx, is_token_in_rank, send_rows))
    return handles


def row_of(handles, source, destination):
    """The row of `destination` that each token of `source` is, -1 for those that do not go there: [T] int."""
    prefix, send_rows = handles[source].rank_prefix_matrix, handles[source].send_rows[:, destination]
    first = prefix[source - 1, destination] if source else 0
    return np.where(send_rows < 0, -1, first + send_rows)


def gather(handles, destination, of_all, fill):
    """The rows of `destination`, from a list of arrays [T_r, ...]; rows that no token comes to are `fill`."""
    first = of_all[0]
    rows = np.full((len(handles[destination].recv_src_idx), *first.shape[1:]), fill, first.dtype)
    for source, values in enumerate(of_all):
        row = row_of(handles, source, destination)
        rows[row[row >= 0]] = values[row >= 0]
    return rows


def expert_counts(layout, rank, alignment):
    """The selections of each expert of a rank, over all sources, rounded up to a multiple of `alignment`: L ints."""
    counts = sum(of_rank.num_tokens_per_expert.astype(int) for of_rank in layout)
    own = np.split(counts, len(layout))[rank]
    return [-(-int(count) // alignment) * alignment for count in own]


# ---------------------------------------------------------------------------------------------------------------------
# Combine


def combine(x, handles, topk_weights=None, bias=None):
    """Sum what the ranks made of a token, in rank order.

    out[t] = bf16(b + sum over the ranks that t went to, in rank order, of x): additions in fp32 from b, one rounding to
    nearest even at the end. b is +0.0, plus the bias, plus a second one. A token that went nowhere is b.

    x: list of [N_r, H] bf16, in the rows of dispatch. handles: list of `HighThroughputHandle`. topk_weights: None or
    list of [N_r, K] fp32, summed beside x from +0.0. bias: None, or a list of arrays [T_r, H] bf16 or of pairs of such.
    Returns a list of pairs (combined_x [T_r, H] bf16, combined_topk_weights [T_r, K] fp32 or None).
    """
    check_combine(x, handles, topk_weights, bias)
    combined = []
    for source in range(len(handles)):
        with np.errstate(all="ignore"):
            total = start_of_sum(None if bias is None else bias[source], len(handles[source].send_rows), x[0].shape[1])
        combined_x = to_bf16(add_rows(total, handles, source, x))
        weights = None
        if topk_weights is not None:
            nothing = np.zeros((len(combined_x), topk_weights[0].shape[1]), np.float32)
            weights = add_rows(nothing, handles, source, topk_weights)
        combined.append((combined_x, weights))
    return combined


def start_of_sum(bias, num_tokens, hidden):
    """What the sums of a rank's tokens begin with: [T, H] fp32."""
    total = np.zeros((num_tokens, hidden), np.float32)
    for one in () if bias is None else bias if isinstance(bias, tuple) else (bias,):
        total += one.astype(np.float32)
    return total


def add_rows(total, handles, source, rows_of_all):
    """Add to each token of `source` its rows on all ranks, in rank order, in fp32: [T, ...], changed in place."""
    with np.errstate(all="ignore"):  # NaN and overflow to infinity are results, not accidents
        for destination, rows in enumerate(rows_of_all):
            row = row_of(handles, source, destination)
            total[row >= 0] += rows[row[row >= 0]].astype(np.float32)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


def check_dispatch(x, layout, topk_idx, topk_weights, expert_alignment):
    """ValueError unless the arguments of `dispatch` belong together."""
    if topk_weights is not None and topk_idx is None:
        raise ValueError("topk_weights need topk_idx: they say whose they are")
    if expert_alignment < 1:
        raise ValueError(f"expert_alignment is {expert_alignment}; expected at least 1")
    num_ranks = len(layout)
    for rank, of_rank in enumerate(layout):
        going = of_rank.is_token_in_rank.sum(axis=0)
        if not np.array_equal(of_rank.num_tokens_per_rank, going):
            raise ValueError(f"num_tokens_per_rank of rank {rank} is {of_rank.num_tokens_per_rank.tolist()}, but "
                             f"is_token_in_rank sends {going.tolist()}")
        if len(of_rank.num_tokens_per_expert) != len(layout[0].num_tokens_per_expert):
            raise ValueError("num_tokens_per_expert differs in length between ranks")
        if len(of_rank.num_tokens_per_expert) % num_ranks:
            raise ValueError(f"{len(of_rank.num_tokens_per_expert)} experts do not divide among {num_ranks} ranks")
        parts = x[rank] if isinstance(x[rank], tuple) else (x[rank],)
        for name, of_all in ("topk_idx", topk_idx), ("topk_weights", topk_weights):
            if of_all is not None:
                parts += (of_all[rank],)
                if of_all[rank].shape != topk_idx[rank].shape:
                    raise ValueError(f"{name} of rank {rank} has shape {of_all[rank].shape}, topk_idx {topk_idx[rank].shape}")
        if any(len(part) != len(of_rank.is_token_in_rank) for part in parts):
            raise ValueError(f"rank {rank} has {[len(part) for part in parts]} tokens, its layout is of "
                             f"{len(of_rank.is_token_in_rank)}")


def check_combine(x, handles, topk_weights, bias):
    """ValueError unless the arguments of `combine` belong together."""
    for rank, handle in enumerate(handles):
        rows, tokens = len(handle.recv_src_idx), len(handle.send_rows)
        for name, of_all in ("x", x), ("topk_weights", topk_weights):
            if of_all is not None and len(of_all[rank]) != rows:
                raise ValueError(f"{name} of rank {rank} has {len(of_all[rank])} rows, it received {rows}")
        biases = () if bias is None else bias[rank] if isinstance(bias[rank], tuple) else (bias[rank],)
        if any(b.shape != (tokens, x[0].shape[1]) for b in biases):
            raise ValueError(f"bias of rank {rank} has shapes {[b.shape for b in biases]}; expected {(tokens, x[0].shape[1])}")
