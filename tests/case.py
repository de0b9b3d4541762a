"""Random inputs of low-latency operations, what the oracle says of them, and the comparison.

Every rank makes the inputs of all ranks from one seed, so that each can ask the oracle by itself.
"""
import dataclasses
import itertools

import ml_dtypes
import numpy as np
from engine import down, on_gpu, up

from pyep import reference

ROUTINGS = ("random", "sparse", "one expert", "one rank", "none", "repeated")
VALUES = ("normal", "spread", "bits")
FP8 = {"": {}, "fp8": dict(use_fp8=True), "fp8_round": dict(use_fp8=True, round_scale=True),
       "fp8_ue8m0": dict(use_fp8=True, round_scale=True, use_ue8m0=True)}
LAYOUTS = ("expert_major", "rank_major")
MODES = tuple(itertools.product(FP8, LAYOUTS, (False, True)))   # (fp8, layout, weighted): the last fields of a `Case`


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs of one round, and its mode.

    tokens: how many each rank has.  fp8: a key of FP8.  layout: one of LAYOUTS.  weighted: the weights are given to dispatch, so
    that expert-major outputs are reduced on the experts' rank, and rank-major rows arrive with their weights.
    """

    seed: int
    max_tokens: int
    hidden: int
    experts: int
    topk: int
    tokens: tuple
    routing: str = "random"
    values: str = "normal"
    index_dtype: type = np.int64
    fp8: str = ""
    layout: str = "expert_major"
    weighted: bool = False

    @property
    def ranks(self):
        return len(self.tokens)

    @property
    def options(self):
        """The mode as arguments of `low_latency_dispatch`, but for the weights; the same for `Buffer` and the oracle."""
        return dict(use_fp8=False, output_layout=self.layout) | FP8[self.fp8]

    @property
    def direct(self):
        """Whether combine takes indices and weights; else the experts' ranks have applied the weights, and it needs none."""
        return self.layout == "expert_major" and not self.weighted

    def make(self):
        """Lists by rank: x, topk_idx, topk_weights, y (an output for each row that dispatch may deliver)."""
        rng = np.random.default_rng(self.seed)
        local, rows = self.experts // self.ranks, self.ranks * self.max_tokens
        groups = (local, rows) if self.layout == "expert_major" else (self.ranks, self.max_tokens)
        x = [self._floats(rng, (t, self.hidden)) for t in self.tokens]
        y = [self._floats(rng, (*groups, self.hidden)) for _ in self.tokens]
        weights = [rng.standard_normal((t, self.topk)).astype(np.float32) for t in self.tokens]
        return x, [self._route(rng, t) for t in self.tokens], weights, y

    def _floats(self, rng, shape):
        if self.values == "normal":
            return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        if self.values == "spread":
            # Rows of very different size, some all zero; in a row, values that FP8 keeps, makes subnormal, and loses.
            exponents = rng.integers(-30, 30, (*shape[:-1], 1)) + rng.integers(-20, 1, shape)
            kept = rng.random((*shape[:-1], 1)) < 0.9
            return (np.ldexp(rng.standard_normal(shape), exponents) * kept).astype(ml_dtypes.bfloat16)
        # Any bits at all, NaNs and infinities included, and many words that mean "absent" to the protocol.
        words = rng.integers(0, 2**32, (*shape[:-1], shape[-1] // 2), dtype=np.uint32)
        words[rng.random(words.shape) < 0.2] = 0xFFFFFFFF
        words[rng.random(words.shape) < 0.1] = 0xFFFFFFFE        # what stands for it
        words[rng.random(words.shape) < 0.002] = 0xFF807F80      # in some blocks of FP8: infinity and -infinity
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
        elif self.routing == "repeated" and (self.layout == "rank_major" or tokens * self.topk <= self.max_tokens):
            idx[:] = rng.integers(self.experts, size=(tokens, 1))
        return np.ascontiguousarray(idx.astype(self.index_dtype))

    def dispatched(self, x, topk_idx, topk_weights):
        """What the oracle says each rank receives."""
        return reference.low_latency_dispatch(x, topk_idx, self.max_tokens, self.experts,
                                              topk_weights if self.weighted else None, **self.options)

    def combined(self, y, topk_idx, topk_weights):
        """What the oracle says each rank gets back, by the recipe of the mode."""
        shape = self.max_tokens, self.experts
        if self.layout == "rank_major":
            return reference.low_latency_combine_rank_major(y, topk_idx, *shape)
        combine = reference.low_latency_combine if self.direct else reference.low_latency_combine_reduced
        return combine(y, topk_idx, topk_weights, *shape)


def assert_same(got, want, what, opaque=False):
    """Equal bit for bit; one NaN is as good as another, but for e4m3, which has one byte for it (0x7f, not 0xff), and for what is
    opaque."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    bits = f"u{want.itemsize}"
    same = got.view(bits) == want.view(bits)
    if want.dtype != ml_dtypes.float8_e4m3fn and not opaque:
        with np.errstate(invalid="ignore"):                      # NumPy's opinion of some NaNs
            same |= np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32))
    assert same.all(), f"{what}: {(~same).sum()} of {same.size} values differ, first at {np.argwhere(~same)[0]}"


def down_received(recv_x):
    """recv_x as a list of NumPy arrays: bf16; or e4m3 and scales, whose memory must be column-major."""
    if not isinstance(recv_x, tuple):
        return [down(recv_x)]
    data, scales = recv_x
    assert scales.swapaxes(1, 2).flags.c_contiguous
    if on_gpu():                                                 # CuPy has no e4m3: there its bytes come as uint8
        return [down(data).view(ml_dtypes.float8_e4m3fn), down(scales)]
    return [data, scales]


def assert_dispatched(got, want):
    """A rank's dispatch result (arrays of the engine) against the oracle's, in any mode."""
    parts, counts = down_received(got.recv_x), down(got.recv_count)
    src_info, layout_range = (down(a) for a in got.handle[:2])
    assert_same(counts, want.recv_count, "recv_count")
    assert_same(layout_range, want.layout_range, "layout_range")
    wanted = want.recv_x if isinstance(want.recv_x, tuple) else (want.recv_x,)
    assert [a.shape for a in parts] == [a.shape for a in wanted] and src_info.shape == want.src_info.shape
    for group, n in enumerate(counts):                           # a local expert, or a source rank
        assert_same(src_info[group, :n], want.src_info[group, :n], f"src_info of group {group}")
        for a, b, what in zip(parts, wanted, ("recv_x", "scales")):
            assert_same(a[group, :n], b[group, :n], f"{what} of group {group}", opaque=len(parts) == 1)         # bf16 rows
    for field in "recv_topk_idx", "recv_topk_weights":           # specified to the last row, valid or not
        a, b = getattr(got, field), getattr(want, field)
        assert (a is None) == (b is None), field
        if b is not None:
            assert_same(down(a), b, field)


def dispatch_inputs(me, case, x, topk_idx, topk_weights):
    """The arguments of a rank's part of the dispatch of a case, from the inputs of all ranks."""
    return dict(x=up(x[me]), topk_idx=up(topk_idx[me]), num_max_dispatch_tokens_per_rank=case.max_tokens, num_experts=case.experts,
                topk_weights=up(topk_weights[me]) if case.weighted else None, **case.options)


def dispatch(buf, case, x, topk_idx, topk_weights, **options):
    """This rank's part of the dispatch of a case, from the inputs of all ranks."""
    return buf.low_latency_dispatch(**dispatch_inputs(buf.rank, case, x, topk_idx, topk_weights), **options)


def run_round(buf, case, hooks=(False, False), zero_copy=False, out=False):
    """One dispatch and one combine of a case on this rank, both compared with the oracle."""
    me = buf.rank
    x, topk_idx, weights, y = case.make()
    out_x = up(np.full_like(y[me], 7)) if out and not case.fp8 else None         # its shape is that of recv_x
    got = dispatch(buf, case, x, topk_idx, weights, return_recv_hook=hooks[0], out=out_x)
    if hooks[0]:
        got.hook()
    got.event.synchronize()
    assert out_x is None or got.recv_x is out_x
    assert_dispatched(got, case.dispatched(x, topk_idx, weights)[me])

    y_me = up(y[me])
    if zero_copy:
        y_me = buf.get_next_low_latency_combine_buffer(got.handle)
        y_me[:] = up(y[me])
    out_t = up(np.full_like(x[me], 7)) if out else None
    selections = (up(topk_idx[me]), up(weights[me])) if case.direct else (None, None)
    combined, event, hook = buf.low_latency_combine(y_me, *selections, got.handle, zero_copy=zero_copy, return_recv_hook=hooks[1],
                                                    out=out_t)
    if hooks[1]:
        hook()
    event.synchronize()
    assert_same(down(combined), case.combined(y, topk_idx, weights)[me], "combined_x")
