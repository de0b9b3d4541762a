"""Random inputs of low-latency operations, what the oracle says of them, and the comparison.

Every rank makes the inputs of all ranks from one seed, so that each can ask the oracle by itself.
"""
import dataclasses

import ml_dtypes
import numpy as np
from engine import down, up

from pyep import reference

ROUTINGS = ("random", "sparse", "one expert", "one rank", "none", "repeated")
VALUES = ("normal", "bits")


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs of one round.  tokens: how many each rank has."""

    seed: int
    max_tokens: int
    hidden: int
    experts: int
    topk: int
    tokens: tuple
    routing: str = "random"
    values: str = "normal"
    index_dtype: type = np.int64

    @property
    def ranks(self):
        return len(self.tokens)

    def make(self):
        """Lists by rank: x, topk_idx, topk_weights, y."""
        rng = np.random.default_rng(self.seed)
        rows = self.ranks * self.max_tokens
        x = [self._floats(rng, (t, self.hidden)) for t in self.tokens]
        y = [self._floats(rng, (self.experts // self.ranks, rows, self.hidden)) for _ in self.tokens]
        weights = [rng.standard_normal((t, self.topk)).astype(np.float32) for t in self.tokens]
        return x, [self._route(rng, t) for t in self.tokens], weights, y

    def _floats(self, rng, shape):
        if self.values == "normal":
            return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        # Any bits at all, NaNs and infinities included, and many words that mean "absent" to the protocol.
        words = rng.integers(0, 2**32, (*shape[:-1], shape[-1] // 2), dtype=np.uint32)
        words[rng.random(words.shape) < 0.2] = 0xFFFFFFFF
        return words.view(ml_dtypes.bfloat16)

    def _route(self, rng, tokens):
        idx = rng.permuted(np.tile(np.arange(self.experts), (tokens, 1)), axis=1)[:, :self.topk]
        if self.routing == "sparse":
            idx[rng.random(idx.shape) < 0.6] = -1
        elif self.routing == "one expert":
            idx[:], idx[:, rng.integers(self.topk):][:, :1] = -1, self.experts - 1
        elif self.routing == "one rank":
            local = self.experts // self.ranks
            idx = np.where(idx // local == self.ranks // 2, idx, -1)
        elif self.routing == "none":
            idx[:] = -1
        elif self.routing == "repeated" and tokens * self.topk <= self.max_tokens:
            idx[:] = rng.integers(self.experts, size=(tokens, 1))
        return np.ascontiguousarray(idx.astype(self.index_dtype))


def assert_same(got, want, what):
    """Equal bit for bit; one NaN is as good as another."""
    same = got.view(np.uint16) == want.view(np.uint16)
    same |= np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32))
    assert same.all(), f"{what}: {(~same).sum()} of {same.size} values differ, first at {np.argwhere(~same)[0]}"


def assert_dispatched(got, want):
    """A rank's dispatch result (arrays of the engine) against the oracle's."""
    recv_x, counts = down(got.recv_x), down(got.recv_count)
    src_info, layout_range = (down(a) for a in got.handle[:2])
    np.testing.assert_array_equal(counts, want.recv_count)
    np.testing.assert_array_equal(layout_range, want.layout_range)
    for e, n in enumerate(counts):
        np.testing.assert_array_equal(src_info[e, :n], want.src_info[e, :n])
        assert_same(recv_x[e, :n], want.recv_x[e, :n], f"recv_x of local expert {e}")


def run_round(buf, case, hooks=(False, False), zero_copy=False, out=False):
    """One dispatch and one combine of a case on this rank, both compared with the oracle."""
    x, topk_idx, weights, y = case.make()
    me, shape = buf.rank, (case.max_tokens, case.experts)
    idx, w = up(topk_idx[me]), up(weights[me])
    out_x = up(np.full_like(y[me], 7)) if out else None
    got = buf.low_latency_dispatch(up(x[me]), idx, *shape, use_fp8=False, return_recv_hook=hooks[0], out=out_x)
    if hooks[0]:
        got.hook()
    got.event.synchronize()
    assert out_x is None or got.recv_x is out_x
    assert_dispatched(got, reference.low_latency_dispatch(x, topk_idx, *shape)[me])

    y_me = up(y[me])
    if zero_copy:
        y_me = buf.get_next_low_latency_combine_buffer(got.handle)
        y_me[:] = up(y[me])
    out_t = up(np.full_like(x[me], 7)) if out else None
    combined, event, hook = buf.low_latency_combine(y_me, idx, w, got.handle, zero_copy=zero_copy, return_recv_hook=hooks[1],
                                                    out=out_t)
    if hooks[1]:
        hook()
    event.synchronize()
    assert_same(down(combined), reference.low_latency_combine(y, topk_idx, weights, *shape)[me], "combined_x")
