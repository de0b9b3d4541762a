"""How many bytes an operation moves, from the routing alone.  The formulas and a worked example are in docs/benchmark.md."""
from typing import NamedTuple

import numpy as np


class Phase(NamedTuple):
    """Bytes that a dispatch or a combine moves, by rank: int64 arrays [R].  Routes, counts and weights are not counted."""

    selections: np.ndarray              # one row per valid (token, expert) pair of the rank's tokens, local ones too
    sent: np.ndarray                    # rows that the rank really sends to other ranks
    received: np.ndarray                # rows that it really receives from other ranks
    copied: np.ndarray                  # rows that the CPU engine must copy or sum for the rank

    @property
    def busiest(self):
        """What the busiest link direction of any rank carries."""
        return int(max(self.sent.max(), self.received.max()))


def row_bytes(hidden, dtype):
    """Bytes of a token: BF16, or FP8 with an fp32 scale for every 128 values (exponents are packed where they arrive)."""
    return 2 * hidden if dtype == "bf16" else hidden + 4 * hidden // 128


def rows_between(topk_idx, num_experts):
    """What the tokens of rank s select on rank d, [R, R] each: (token, expert) pairs, and tokens that select anything there.

    topk_idx: list by rank of [T, K] ints; -1 selects nothing.
    """
    local = num_experts // len(topk_idx)
    hits = [[idx // local == d for d in range(len(topk_idx))] for idx in topk_idx]       # -1 // local is -1: nobody's
    pairs = [[hit.sum() for hit in row] for row in hits]
    tokens = [[hit.any(axis=1).sum() for hit in row] for row in hits]
    return np.array(pairs, np.int64), np.array(tokens, np.int64)


def low_latency(topk_idx, hidden, num_experts, dtype="bf16", layout="expert-major", combine="direct"):
    """The bytes of a low-latency dispatch and of the combine that follows it: a `Phase` by name.

    A token crosses once to each other rank of its experts.  What comes back is one row per token and rank, or with
    combine="direct" one per token and expert.
    """
    pairs, tokens = rows_between(topk_idx, num_experts)
    delivered = pairs if layout == "expert-major" else tokens
    returned = pairs if combine == "direct" else tokens
    return _both(pairs, tokens, returned, hidden, dtype, tokens.sum(1) + delivered.sum(0), delivered.sum(0) + returned.sum(1))


def high_throughput(topk_idx, hidden, num_experts, dtype="bf16"):
    """The bytes of a high-throughput dispatch and of the combine that follows it: a `Phase` by name.

    A token crosses once to each other rank of its experts, straight to where it stays, and one row comes back for each.
    """
    pairs, tokens = rows_between(topk_idx, num_experts)
    return _both(pairs, tokens, tokens, hidden, dtype, tokens.sum(1), others(tokens).sum(0) + tokens.sum(1))


def _both(pairs, tokens, returned, hidden, dtype, copied, copied_back):
    """pairs, tokens: [R, R], see `rows_between`.  returned: [R, R], rows that come back.  copied, copied_back: [R], rows."""
    there, here = row_bytes(hidden, dtype), row_bytes(hidden, "bf16")
    sent, back = others(tokens), others(returned)
    return {"dispatch": Phase(there * pairs.sum(1), there * sent.sum(1), there * sent.sum(0), there * copied),
            "combine": Phase(here * pairs.sum(1), here * back.sum(0), here * back.sum(1), here * copied_back)}


def others(rows):
    """[R, R] without what a rank has for itself."""
    return rows - np.diag(np.diag(rows))


def total(phases):
    """The bytes of several phases, one after the other."""
    return Phase(*map(sum, zip(*phases)))
