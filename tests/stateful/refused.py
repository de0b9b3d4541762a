"""Calls that are refused, on all ranks or on one alone, as nothing is launched; all that is held stays what it is."""
from typing import NamedTuple

import numpy as np
from engine import on_gpu, up
from high_throughput_case import dispatch, up_x
from rejection import rejected, zeros

from pyep import EPBufferTooSmallError

from .high_throughput import with_handle
from .low_latency import combinable, shape_of
from .promises import DESTROYED_IS_KNOWN, FIRST_USE_IS_REFUSED_ALONE, REPEATS_ARE_REFUSED
from .shapes import draw_high_throughput, draw_low_latency, pick
from .waiting import Operation


class Wrong(NamedTuple):
    """A call with wrong arguments, and the error that it must raise."""

    words: str                          # what is wrong
    error: object
    named: tuple                        # what the message says
    call: object


class Refused(Operation):
    """A wrong call of any kind that is possible now."""

    weight = 5

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        wrongs = [list(kind(self, rng)) for kind in KINDS]
        self.wrong = pick(rng, pick(rng, [of_kind for of_kind in wrongs if of_kind]))
        self.rank = pick(rng, (None, *range(world.comm.size)))

    def __str__(self):
        return f"{self.name}refused on {'all ranks' if self.rank is None else f'rank {self.rank}'}: {self.wrong.words}"

    def run(self):
        if self.rank in (None, self.me):
            with rejected(self.wrong.error, *self.wrong.named):
                self.wrong.call()


def wrong_receives(refused, rng):
    """Of `low_latency_dispatch`."""
    world, held, buf = refused.world, refused.held, refused.buf
    case = draw_low_latency(rng, world.comm.size, world.all_modes)
    tokens, hidden, experts, most = min(2, case.max_tokens), case.hidden, case.experts, case.max_tokens
    weights = zeros(tokens, case.topk, dtype=np.float32) if case.weighted else None
    good = dict(x=zeros(tokens, hidden), topk_idx=zeros(tokens, case.topk, dtype=np.int64), num_max_dispatch_tokens_per_rank=most,
                num_experts=experts, topk_weights=weights, **case.options)

    def wrong(words, error, *named, **arguments):
        return Wrong(f"low_latency_dispatch, {words}", error, named, lambda: buf.low_latency_dispatch(**good | arguments))

    yield wrong("x fp32", TypeError, "x", "float32", x=zeros(tokens, hidden, dtype=np.float32))
    yield wrong("topk_idx of other tokens", ValueError, "topk_idx", topk_idx=zeros(tokens + 1, case.topk, dtype=np.int64))
    yield wrong("more tokens than M", ValueError, "num_max_dispatch_tokens_per_rank", x=zeros(most + 1, hidden),
                topk_idx=zeros(most + 1, case.topk, dtype=np.int64))
    yield wrong("exponents of no powers of two", ValueError, "use_ue8m0", "round_scale", use_fp8=True, round_scale=False,
                use_ue8m0=True)
    yield wrong("layout", ValueError, "output_layout", "diagonal", output_layout="diagonal")
    yield wrong("hook and async_finish", ValueError, "async_finish", "return_recv_hook", async_finish=True, return_recv_hook=True)
    yield wrong("previous_event", TypeError, "previous_event", previous_event=7)
    yield wrong("no room for M", EPBufferTooSmallError, "num_rdma_bytes", num_max_dispatch_tokens_per_rank=60000)
    yield wrong("stats of other experts", ValueError, "cumulative_local_expert_recv_stats",
                cumulative_local_expert_recv_stats=zeros(experts + 1, dtype=np.int32))
    if not on_gpu():
        bad = np.full((tokens, case.topk), -1)
        bad[-1, -1] = pick(rng, (experts, -2))
        if shape_of(case) in held.used or FIRST_USE_IS_REFUSED_ALONE:          # else it is refused when all ranks have compiled
            yield wrong("an expert that does not exist", ValueError, "topk_idx", topk_idx=bad)
    if REPEATS_ARE_REFUSED and not on_gpu() and case.layout == "expert_major" and case.topk * most > most:
        yield wrong("too many rows for one expert", ValueError, "topk_idx", x=zeros(most, hidden),
                    topk_idx=zeros(most, case.topk, dtype=np.int64),
                    topk_weights=zeros(most, case.topk, dtype=np.float32) if case.weighted else None)
    if not held.may_send and shape_of(case) in held.used:
        yield wrong("the last but one was not received", RuntimeError, "hook")


def wrong_combines(refused, rng):
    """Of `low_latency_combine`, and of what belongs to it."""
    world, held, buf = refused.world, refused.held, refused.buf

    def wrong(record, words, error, *named, **arguments):
        return wrong_combine(refused, record, words, error, *named, **arguments)

    for record in combinable(held)[-1:]:
        yield wrong(record, "no handle", TypeError, "handle", handle=tuple(record.handle))
        yield wrong(record, "x of another shape", ValueError, "x", x=zeros(1, 1, record.case.hidden))
        yield wrong(record, "LogFMT", NotImplementedError, "use_logfmt", use_logfmt=True)
        yield wrong(record, "out of another shape", ValueError, "out", out=zeros(100, record.case.hidden))
        if not held.may_send:
            yield wrong(record, "the last but one was not received", RuntimeError, "hook")
    for record in others(world, held, "received"):
        yield wrong(record, "of the other buffer", ValueError, "handle", "another Buffer")
    yield Wrong("mask buffer", NotImplementedError, ("enable_shrink",), lambda: buf.low_latency_update_mask_buffer(0, True))


def wrong_combine(refused, record, words, error, *named, **arguments):
    case, me = record.case, refused.me
    _, topk_idx, weights, y = (up(of_all[me]) for of_all in record.made)
    good = dict(x=y, topk_idx=topk_idx, topk_weights=weights, handle=record.handle)
    return Wrong(f"low_latency_combine of step {record.born} ({case.layout}), {words}", error, named,
                 lambda: refused.buf.low_latency_combine(**good | arguments))


def old_combines(refused, rng):
    """Of `low_latency_combine`, with handles that are too old."""
    for record in refused.held.received:
        if not record.alive:
            yield wrong_combine(refused, record, "its results were overwritten", ValueError, "handle", "overwritten")


def wrong_dispatches(refused, rng):
    """Of `dispatch` and `get_dispatch_layout`."""
    world, held, buf, me = refused.world, refused.held, refused.buf, refused.me
    made = draw_high_throughput(rng, world.comm.size, world.all_modes)

    def wrong(words, error, *named, **arguments):
        return Wrong(f"dispatch, {words}", error, named, lambda: dispatch(buf, made, **arguments))

    yield wrong("no counts", ValueError, "num_tokens_per_rank", "None", num_tokens_per_rank=None)
    yield wrong("alignment", ValueError, "expert_alignment", expert_alignment=0)
    yield wrong("no room for the worst", EPBufferTooSmallError, "num_nvl_bytes", num_worst_tokens=10**7)
    yield wrong("previous_event", TypeError, "previous_event", previous_event="event")
    yield wrong("config", TypeError, "config", config=20)
    yield wrong("weights of nothing", ValueError, "topk_weights", topk_idx=None,
                topk_weights=zeros(made.case.tokens[me], 3, dtype=np.float32))
    if not on_gpu() and min(made.case.tokens):                   # the same on all ranks, as all that is drawn
        bad = made.topk_idx[me].copy()
        bad[0, 0] = pick(rng, (made.case.experts, -2))
        yield Wrong("get_dispatch_layout, an expert that does not exist", ValueError, ("topk_idx",),
                    lambda: buf.get_dispatch_layout(bad, made.case.experts))
    for record in with_handle(held)[-1:]:
        x, tokens = up_x(record.made.x[me]), record.made.case.tokens[me]
        yield wrong_by(buf, record, "counts too", ValueError, "topk_idx", x=x, topk_idx=up(record.made.topk_idx[me]))
        yield wrong_by(buf, record, "other tokens", ValueError, "x", "tokens", x=zeros(tokens + 1, 64))
    for record in others(world, held, "dispatched"):
        yield wrong_by(buf, record, "of the other buffer", ValueError, "handle", "another Buffer", x=up_x(record.made.x[me]))


def wrong_by(buf, record, words, error, *named, **arguments):
    return Wrong(f"dispatch by the handle of step {record.born}, {words}", error, named,
                 lambda: buf.dispatch(**dict(handle=record.handle) | arguments))


def wrong_combines_of_rows(refused, rng):
    """Of `combine`."""
    world, held, buf, me = refused.world, refused.held, refused.buf, refused.me

    def wrong(record, words, error, *named, **arguments):
        return Wrong(f"combine by the handle of step {record.born}, {words}", error, named,
                     lambda: buf.combine(**dict(x=up(record.made.y[me]), handle=record.handle) | arguments))

    for record in with_handle(held)[-1:]:
        rows, tokens, hidden = len(record.made.y[me]), record.made.case.tokens[me], record.made.case.hidden
        yield wrong(record, "x fp32", TypeError, "x", "float32", x=zeros(rows, hidden, dtype=np.float32))
        yield wrong(record, "three arrays of bias", ValueError, "bias", bias=(zeros(tokens, hidden),) * 3)
        yield wrong(record, "weights of other rows", ValueError, "topk_weights", topk_weights=zeros(rows + 1, 3, dtype=np.float32))
    for record in others(world, held, "dispatched"):
        yield wrong(record, "of the other buffer", ValueError, "handle", "another Buffer")
    yield Wrong("combine, no handle", TypeError, ("handle",), lambda: buf.combine(zeros(2, 64), None))


def wrong_buffers(refused, rng):
    """Of handles of a Buffer that is gone."""
    if DESTROYED_IS_KNOWN:
        for low_latency, high_throughput in refused.world.destroyed:
            x = zeros(1, 64)
            if low_latency is not None:
                yield Wrong("low_latency_combine, of a buffer that is gone", ValueError, ("handle", "another Buffer"),
                            lambda: refused.buf.low_latency_combine(x, None, None, low_latency))
            if high_throughput is not None:
                yield Wrong("combine, of a buffer that is gone", ValueError, ("handle", "another Buffer"),
                            lambda: refused.buf.combine(x, high_throughput))


def others(world, held, records):
    """The latest record with a handle of the other buffer, if there are two, in a list."""
    return [record for other in world.buffers if other is not held
            for record in [r for r in getattr(other, records) if r.handle is not None][-1:]]


KINDS = wrong_receives, wrong_combines, old_combines, wrong_dispatches, wrong_combines_of_rows, wrong_buffers
