"""Who gets what: the experts that a token selects, and the ranks that own them."""

import numpy as np


def local_experts(topk_idx, num_experts):
    """The rank that every selection goes to, and which of that rank's local experts it names.

    topk_idx: list of [T_r, K] int. Returns a list of pairs (rank, expert) of [T_r, K] int arrays, -1 in both where
    topk_idx is -1. ValueError for a routing that cannot be.
    """
    num_ranks = len(topk_idx)
    if num_experts < 1 or num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts do not divide among {num_ranks} ranks")
    if any(np.any((idx < -1) | (idx >= num_experts)) for idx in topk_idx):
        raise ValueError(f"topk_idx must lie in -1..{num_experts - 1}")
    experts_per_rank = num_experts // num_ranks
    return [tuple(np.where(idx < 0, -1, part) for part in np.divmod(idx, experts_per_rank)) for idx in topk_idx]


def tokens_for(rank, destination):
    """The tokens that select at least one expert of rank `destination`, each once, in order.

    In the rank-major layout, the i-th of them is row i of what `destination` has from this source.

    rank: [T, K] int, of `local_experts`. Returns an int array.
    """
    return np.flatnonzero((rank == destination).any(axis=1))
