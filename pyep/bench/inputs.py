"""What is sent: random tokens, routing and weights, and the experts' outputs.

Everything follows from the seed, the rank and the shape, so every rank can make what any other rank has: byte counts and the
oracle need all ranks' routing, and nothing is exchanged for it.
"""
import ml_dtypes
import numpy as np

from .traffic import rows_between


def _generator(seed, rank, what):
    return np.random.default_rng([seed, rank, ("tokens", "routing", "weights", "outputs").index(what)])


def of_all(make, point, seed, num_ranks):
    """What one of the functions below makes for each rank."""
    return [make(point, seed, rank) for rank in range(num_ranks)]


def tokens(point, seed, rank):
    """[T, H] bf16, normally distributed."""
    return _normal(_generator(seed, rank, "tokens"), (point.tokens, point.hidden))


def routing(point, seed, rank):
    """[T, K] int64: for each token, K different experts, every choice equally likely."""
    scores = _generator(seed, rank, "routing").random((point.tokens, point.experts))
    return np.argsort(scores, axis=1)[:, :point.topk].copy()


def weights(point, seed, rank):
    """[T, K] fp32 in [0, 1)."""
    return _generator(seed, rank, "weights").random((point.tokens, point.topk), np.float32)


def outputs(point, layout, topk_idx, seed, rank):
    """The outputs of a rank's experts: [L, R*T, H] bf16 in the expert-major layout, [R, T, H] in the rank-major one.

    Random in the rows that combine reads, 0 elsewhere.  topk_idx: list of all ranks' routing.
    """
    ranks = len(topk_idx)
    local = point.experts // ranks
    if layout == "expert-major":
        counts = np.bincount(np.concatenate(topk_idx).ravel(), minlength=point.experts)[rank * local:(rank + 1) * local]
        y = np.zeros((local, ranks * point.tokens, point.hidden), ml_dtypes.bfloat16)
    else:
        counts = rows_between(topk_idx, point.experts)[1][:, rank]
        y = np.zeros((ranks, point.tokens, point.hidden), ml_dtypes.bfloat16)
    generator = _generator(seed, rank, "outputs")
    for rows, n in zip(y, counts):
        rows[:n] = _normal(generator, (n, point.hidden))
    return y


def packed_outputs(point, received, rows, seed, rank):
    """The outputs of a rank's experts where rows lie without gaps: [rows, H] bf16, random in the first `received`, 0 behind."""
    y = np.zeros((rows, point.hidden), ml_dtypes.bfloat16)
    y[:received] = _normal(_generator(seed, rank, "outputs"), (received, point.hidden))
    return y


def _normal(generator, shape):
    return generator.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
