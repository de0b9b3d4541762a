"""Random inputs of high-throughput operations, what the oracle says of them, and the comparison.

Every rank makes the inputs of all ranks from one seed, so that each can ask the oracle by itself.
"""
import dataclasses
import functools
import gc

import ml_dtypes
import numpy as np
from case import assert_same
from engine import down, on_gpu, up

from pyep import reference

ROUTINGS = ("random", "sparse", "one expert", "one rank", "none", "repeated", "own rank", "all ranks")
VALUES = ("normal", "bits")
CARRIED = ("weights", "indices", "nothing")                     # what dispatch is given beside x


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs of one round, and its mode.

    tokens: how many each rank has.  fp8: x is a pair of e4m3 and scales.  carried: one of CARRIED; "weights" come with indices.
    alignment: of the counts by expert.  rows: num_worst_tokens of each rank, or () for as many as come.  bias: how many arrays are
    given to combine.  sum_weights: weights are given to combine.  stray: the layout is not that of topk_idx: tokens also go where
    none of their experts is, and the counts by expert are the caller's own.
    """

    seed: int
    tokens: tuple
    hidden: int
    experts: int
    topk: int
    routing: str = "random"
    values: str = "normal"
    index_dtype: type = np.int64
    fp8: bool = False
    carried: str = "weights"
    alignment: int = 1
    rows: tuple = ()
    bias: int = 0
    sum_weights: bool = False
    stray: bool = False

    @property
    def ranks(self):
        return len(self.tokens)

    def make(self):
        return Made(self)

    def with_room(self, spare):
        """The same with num_worst_tokens: on each rank for another number of rows more than come."""
        received = reference.make_handles(self.make().layout)[0].rank_prefix_matrix[-1]
        return dataclasses.replace(self, rows=tuple(max(1, int(n) + spare + 3 * r) for r, n in enumerate(received)))


class Made:
    """What a case is made of, as lists by rank, in NumPy; and what the oracle makes of it (when it is asked)."""

    def __init__(self, case):
        rng = np.random.default_rng(case.seed)
        self.case = case
        self.topk_idx = [route(case, rng, rank, t) for rank, t in enumerate(case.tokens)]
        self.topk_weights = [floats(case, rng, (t, case.topk)) for t in case.tokens]
        self.x = self.more_x(rng)
        self.bias = [tuple(rows_of_bf16(case, rng, t) for _ in range(case.bias)) for t in case.tokens]
        self.layout = reference.get_dispatch_layout(self.topk_idx, case.experts)
        if case.stray:
            self.layout = [stray(of_rank, rng) for of_rank in self.layout]
        rows = [len(handle.recv_src_idx) for handle in self.handles]
        self.y = [rows_of_bf16(case, rng, n) for n in rows]      # with num_worst_tokens also in rows that no token came to
        self.y_weights = [floats(case, rng, (n, case.topk)) for n in rows] if case.sum_weights else None

    def more_x(self, rng):
        """Other tokens of the same shape."""
        case = self.case
        if not case.fp8:
            return [rows_of_bf16(case, rng, t) for t in case.tokens]
        # Any bytes and any scales: they only pass through.
        data = [rng.integers(0, 256, (t, case.hidden), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn) for t in case.tokens]
        return list(zip(data, (floats(case, rng, (t, case.hidden // 128)) for t in case.tokens)))

    @functools.cached_property
    def handles(self):
        return reference.make_handles(self.layout, self.case.rows or None)

    @functools.cached_property
    def dispatched(self):
        """What the oracle says each rank receives."""
        case = self.case
        return reference.dispatch(self.x, self.layout, None if case.carried == "nothing" else self.topk_idx,
                                  self.topk_weights if case.carried == "weights" else None, case.alignment, case.rows or None)

    def cached(self, x):
        """What it says of a cached dispatch of `more_x`."""
        return reference.dispatch(x, self.layout, None, None, self.case.alignment, self.case.rows or None)

    @functools.cached_property
    def combined(self):
        """What it says each rank gets back: pairs (combined_x, combined_topk_weights)."""
        bias = {0: None, 1: [b[0] for b in self.bias if b], 2: self.bias}[self.case.bias]
        return reference.combine(self.y, self.handles, self.y_weights, bias)


def floats(case, rng, shape):
    """fp32: normal values, or any bits at all."""
    if case.values == "bits":
        return rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    return rng.standard_normal(shape).astype(np.float32)


def rows_of_bf16(case, rng, rows):
    """[rows, H] bf16: normal values; or any bits, NaNs and infinities included, and many words of ones and of zeros."""
    if case.values == "normal":
        return rng.standard_normal((rows, case.hidden)).astype(ml_dtypes.bfloat16)
    words = rng.integers(0, 2**32, (rows, case.hidden // 2), dtype=np.uint32)
    words[rng.random(words.shape) < 0.2] = 0xFFFFFFFF
    words[rng.random(words.shape) < 0.2] = 0x80000000            # 0 and -0
    words[rng.random(words.shape) < 0.05] = 0xFF807F80           # infinity and -infinity
    return words.view(ml_dtypes.bfloat16)


def route(case, rng, rank, tokens):
    """topk_idx of one rank, [tokens, K]."""
    local = case.experts // case.ranks
    idx = rng.permuted(np.tile(np.arange(case.experts), (tokens, 1)), axis=1)[:, :case.topk]
    if case.routing == "sparse":
        idx[rng.random(idx.shape) < 0.6] = -1
    elif case.routing == "one expert":
        column = rng.integers(case.topk)
        idx[:] = -1
        idx[:, column] = case.experts - 1
    elif case.routing == "one rank":
        idx = np.where(idx // local == case.ranks // 2, idx, -1)
        idx[:, 0] = case.ranks // 2 * local
    elif case.routing == "none":
        idx[:] = -1
    elif case.routing == "repeated":
        idx[:] = rng.integers(case.experts, size=(tokens, 1))
    elif case.routing == "own rank":
        idx = np.where(idx // local == rank, idx, -1)
    elif case.routing == "all ranks":                            # to as many as there are entries
        idx[:] = (rank + np.arange(case.topk)) % case.ranks * local + rng.integers(local)
    return np.ascontiguousarray(idx.astype(case.index_dtype))


def stray(layout, rng):
    """A layout with more destinations, and with other counts by expert, than topk_idx has."""
    is_token_in_rank = layout.is_token_in_rank | (rng.random(layout.is_token_in_rank.shape) < 0.3)
    per_expert = layout.num_tokens_per_expert + rng.integers(0, 5, layout.num_tokens_per_expert.shape, dtype=np.int32)
    return layout._replace(is_token_in_rank=is_token_in_rank, num_tokens_per_expert=per_expert,
                           num_tokens_per_rank=is_token_in_rank.sum(axis=0).astype(np.int32))


# ---- the operations, on one rank ---------------------------------------------------------------------------------------

def up_x(x):
    """x or the pair of FP8 as arrays of the engine."""
    if not isinstance(x, tuple):
        return up(x)
    data, scales = x
    return up(data.view(np.uint8) if on_gpu() else data), up(scales)     # CuPy has no e4m3: there its bytes go as uint8


def counts_of(layout):
    """A layout as arguments of `Buffer.dispatch`."""
    return dict(num_tokens_per_rank=up(layout.num_tokens_per_rank), is_token_in_rank=up(layout.is_token_in_rank),
                num_tokens_per_expert=up(layout.num_tokens_per_expert))


def carried(made, me):
    """The arguments that travel with x."""
    args = {}
    if made.case.carried != "nothing":
        args["topk_idx"] = up(made.topk_idx[me])
    if made.case.carried == "weights":
        args["topk_weights"] = up(made.topk_weights[me])
    return args


def dispatch_inputs(made, me):
    """The arguments of a rank's part of the first dispatch of a case."""
    case = made.case
    return dict(x=up_x(made.x[me]), **counts_of(made.layout[me]), **carried(made, me), expert_alignment=case.alignment,
                num_worst_tokens=case.rows[me] if case.rows else 0)


def dispatch(buf, made, **options):
    """This rank's part of the first dispatch of a case."""
    return buf.dispatch(**dispatch_inputs(made, buf.rank) | options)


def combine_inputs(made, me):
    """The arguments of a rank's part of the combine of a case, but for the handle."""
    bias = tuple(map(up, made.bias[me]))
    return dict(x=up(made.y[me]), topk_weights=None if made.y_weights is None else up(made.y_weights[me]),
                bias={0: None, 1: bias[:1] and bias[0], 2: bias}[len(bias)])


def combine(buf, made, handle, **options):
    """This rank's part of the combine of a case."""
    return buf.combine(handle=handle, **combine_inputs(made, buf.rank) | options)


def assert_all_is_back(buf):
    """Nobody holds a result: the results' room is free, in one piece."""
    gc.collect()
    heap = buf._connection.heap
    room = heap.nbytes - heap.operations_room
    assert heap.lend(room) is not None, f"nothing is held, but the {room} bytes of the results' room are not all free"


def assert_bits(got, want, what):
    """Equal bit for bit, NaNs too: what is only moved stays what it is."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    bits = f"u{want.itemsize}"
    same = got.view(bits) == want.view(bits)
    assert same.all(), f"{what}: {(~same).sum()} of {same.size} values differ, first at {np.argwhere(~same)[0]}"


def assert_layout(got, want):
    """What `get_dispatch_layout` returned on a rank, against the oracle's."""
    per_rank, per_node, per_expert, is_token_in_rank, event = got
    event.synchronize()
    assert per_node is None
    assert_bits(down(per_rank), want.num_tokens_per_rank, "num_tokens_per_rank")
    assert_bits(down(per_expert), want.num_tokens_per_expert, "num_tokens_per_expert")
    assert_bits(down(is_token_in_rank), want.is_token_in_rank, "is_token_in_rank")


def down_x(x):
    """recv_x as a list of NumPy arrays: bf16, or e4m3 and scales."""
    if not isinstance(x, tuple):
        return [down(x)]
    data, scales = map(down, x)
    return [data.view(ml_dtypes.float8_e4m3fn) if on_gpu() else data, scales]


def assert_dispatched(got, want, me):
    """What a dispatch returned on a rank, against the oracle's; rows that no token came to count where they are specified."""
    recv_x, recv_topk_idx, recv_topk_weights, counts, handle, event = got
    event.synchronize()
    assert type(counts) is list and all(type(n) is int for n in counts) and counts == want.num_recv_tokens_per_expert_list
    assert isinstance(handle, tuple) and len(handle) == 4
    rows = int(want.handle.rank_prefix_matrix[-1, me])
    wanted = want.recv_x if isinstance(want.recv_x, tuple) else (want.recv_x,)
    for a, b, name in zip(down_x(recv_x), wanted, ("recv_x", "scales")):
        assert a.shape == b.shape, name
        assert_bits(a[:rows], b[:rows], name)
    for a, b, name in ((recv_topk_idx, want.recv_topk_idx, "recv_topk_idx"),
                       (recv_topk_weights, want.recv_topk_weights, "recv_topk_weights")):
        assert (a is None) == (b is None), name
        if b is not None:
            assert_bits(down(a), b, name)
    for a, b, name in zip(map(down, handle), want.handle, want.handle._fields):
        assert a.shape == b.shape, name
        specified = rows if name == "recv_src_idx" else None
        assert_bits(a[:specified], b[:specified], name)


def assert_combined(got, want):
    """What a combine returned on a rank, against the oracle's; one NaN is as good as another."""
    combined_x, weights, event = got
    event.synchronize()
    assert_same(down(combined_x), want[0], "combined_x")
    assert (weights is None) == (want[1] is None)
    if weights is not None:
        assert_same(down(weights), want[1], "combined_topk_weights")


def run_round(buf, case, **options):
    """Layout, dispatch, cached dispatch of other tokens and combine of a case on this rank, all compared with the oracle."""
    me, made = buf.rank, case.make()
    if not case.stray:
        assert_layout(buf.get_dispatch_layout(up(made.topk_idx[me]), case.experts), made.layout[me])
    got = dispatch(buf, made, **options)
    assert_dispatched(got, made.dispatched[me], me)
    other = made.more_x(np.random.default_rng(case.seed + 1))
    again = buf.dispatch(up_x(other[me]), got[4], **options)
    assert_dispatched(again, made.cached(other)[me], me)
    assert_combined(combine(buf, made, got[4], **options), made.combined[me])
    assert_combined(combine(buf, made, again[4], **options), made.combined[me])
    assert_dispatched(got, made.dispatched[me], me)              # still what it was
