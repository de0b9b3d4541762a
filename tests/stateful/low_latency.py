"""Low-latency operations: dispatch in all modes, combine, and the hooks of both."""
import dataclasses

import numpy as np
import pytest
from case import assert_dispatched, assert_same, dispatch_inputs
from engine import down, up
from rejection import blind_host

from pyep import EPRoutingError
from pyep.reference.arithmetic import to_bf16
from pyep.reference.low_latency import places, weighted_sum

from .promises import RESULTS_LIVE_BY_M
from .shapes import chance, draw_low_latency, draw_seed, in_brackets, pick, words_of
from .waiting import Operation, Timing
from .world import Kept, Sent

OVERWRITTEN = 4                         # records whose results were overwritten that are remembered, to be refused


class Received:
    """A dispatch: what it was made of, and its results once they have come (`kept`)."""

    def __init__(self, held, born, case, made):
        self.born, self.case, self.made, self.counts = born, case, made, held.counts
        self.shares = dataclasses.astuple(dataclasses.replace(case, seed=0, tokens=(), routing="", values="",
                                                              max_tokens=case.max_tokens if RESULTS_LIVE_BY_M else 0))
        self.turn = self.counts.get(self.shares, 0) + 1
        self.handle = self.kept = None
        self.words = f"the low-latency dispatch of step {born}"

    @property
    def alive(self):
        """Whether not two more dispatches have come that share its memory."""
        return self.counts[self.shares] <= self.turn + 1


def shape_of(case):
    """What the ranks meet for when it is used first."""
    return case.max_tokens, case.hidden, case.experts, case.topk, case.fp8, case.layout, case.weighted


class Receive(Operation):
    """`low_latency_dispatch`."""

    weight = 10

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        self.case, self.timing = draw_low_latency(rng, world.comm.size, world.all_modes), Timing(rng, hooks=True)
        self.out = chance(rng, 0.3) and not self.case.fp8
        self.stats = [rng.integers(0, 1000, n) for n in (self.case.experts // self.case.ranks, self.case.ranks)]
        self.counted, self.waited = chance(rng, 0.3), chance(rng, 0.3)

    @staticmethod
    def may(world, held):
        return held.may_send

    def __str__(self):
        options = ["out"] * self.out + ["recv stats"] * self.counted + ["wait stats"] * self.waited
        return f"{self.name}low_latency_dispatch{words_of(self.case, self.timing, *options)}"

    def run(self):
        case, held, made = self.case, self.held, self.case.make()
        record = Received(held, self.world.step, case, made)
        out = up(np.full_like(made[3][self.me], 7)) if self.out else None
        rows, waits = (up(start.astype(dtype)) for start, dtype in zip(self.stats, (np.int32, np.int64)))
        inputs = dispatch_inputs(self.me, case, *made[:3])
        got = self.buf.low_latency_dispatch(
            **inputs, out=out, cumulative_local_expert_recv_stats=rows if self.counted else None,
            dispatch_wait_recv_cost_stats=waits if self.waited else None, **self.timing.options(held, rows))
        held.used.add(shape_of(case))
        held.counts[record.shares] = record.turn
        record.handle = got.handle
        held.received.append(record)
        forget_overwritten(held)

        def complete():
            if record.alive:
                assert_dispatched(got, case.dispatched(*made[:3])[self.me])
                assert out is None or got.recv_x is out
                record.kept = kept_of(record.words, got)
            self.check_stats(down(rows), down(waits), made[1])
        sent_or_ended(self, got.hook, got.event, record.words, complete)

    def check_stats(self, rows, waits, topk_idx):
        """The rows of each local expert were added, and times that are not negative."""
        selected, local = np.concatenate(topk_idx), len(rows)
        added = [(selected == self.me * local + e).sum() for e in range(local)] if self.counted else 0
        np.testing.assert_array_equal(rows, self.stats[0] + added, "cumulative_local_expert_recv_stats")
        assert (waits >= self.stats[1]).all() and (self.waited or (waits == self.stats[1]).all()), "dispatch_wait_recv_cost_stats"


def sent_or_ended(operation, hook, event, words, complete):
    """What follows the launch of an operation: its hook is called later, or its event is waited for, or it has ended."""
    held, step = operation.held, operation.world.step
    number = held.next_number()
    assert (hook is not None) == operation.timing.hook
    if hook is None:
        return operation.timing.ended(held, step, words, event, complete)

    def received():
        event.synchronize()
        complete()
    held.sent.append(Sent(step, number, words, hook, received))


def kept_of(words, got):
    """All arrays of a dispatch's results, whole: also in rows that no token came to nobody may write now."""
    recv_x, scales = got.recv_x if isinstance(got.recv_x, tuple) else (got.recv_x, None)
    return Kept(words, recv_x=recv_x, scales=scales, recv_count=got.recv_count, src_info=got.handle[0], layout_range=got.handle[1],
                recv_topk_idx=got.recv_topk_idx, recv_topk_weights=got.recv_topk_weights)


def forget_overwritten(held):
    """All but the latest records whose results are gone."""
    gone = [record for record in held.received if not record.alive]
    for record in gone:
        record.kept = None
    for record in gone[:-OVERWRITTEN]:
        held.received.remove(record)


class Void(Operation):
    """A `low_latency_dispatch` with an expert on one rank that does not exist: all ranks hear of it, and go on."""

    weight = 1.5

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        case = draw_low_latency(rng, world.comm.size, world.all_modes)
        self.case = dataclasses.replace(case, tokens=tuple(max(1, n) for n in case.tokens))
        self.rank, self.expert = pick(rng, range(world.comm.size)), pick(rng, (-2, case.experts, 1 << 40))
        self.hook = chance(rng, 0.5)

    @staticmethod
    def may(world, held):
        return held.may_send

    def __str__(self):
        words = words_of(self.case, "hook" * self.hook)
        return f"{self.name}void low_latency_dispatch, expert {self.expert} of rank {self.rank}{words}"

    def run(self):
        case, held, made = self.case, self.held, self.case.make()
        record = Received(held, self.world.step, case, made)
        made[1][self.rank][0, -1] = self.expert
        with blind_host(), pytest.raises(EPRoutingError, match=f"rank {self.rank} .* void"):
            got = self.buf.low_latency_dispatch(**dispatch_inputs(self.me, case, *made[:3]), return_recv_hook=self.hook)
            if self.hook:
                got.hook()
            got.event.synchronize()
        held.next_number()
        held.used.add(shape_of(case))
        held.counts[record.shares] = record.turn                 # it has overwritten what another dispatch would have
        forget_overwritten(held)


class Combine(Operation):
    """`low_latency_combine` of any handle that is not too old, with other outputs, and other weights, each time."""

    weight = 10

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        self.record, self.timing = world.choose(combinable(held)), Timing(rng, hooks=True)
        self.zero_copy, self.waited = chance(rng, 0.3), chance(rng, 0.3)
        self.out = chance(rng, 0.4) or self.timing.needs_out
        self.other = dataclasses.replace(self.record.case, seed=draw_seed(rng))      # whose outputs and weights are sent
        self.gone = chance(rng, 0.2) and self.record.case.direct   # some selections have become -1 since
        self.gone_seed = draw_seed(rng)

    @staticmethod
    def may(world, held):
        return held.may_send and bool(combinable(held))

    def __str__(self):
        options = ["zero_copy"] * self.zero_copy + ["out"] * self.out + ["wait stats"] * self.waited
        options += ["selections gone"] * self.gone
        return f"{self.name}low_latency_combine of step {self.record.born}{in_brackets(self.timing, *options)}"

    def run(self):
        case, held, me = self.record.case, self.held, self.me
        topk_idx = self.record.made[1]
        _, _, weights, y = self.other.make()
        weights = weights if case.direct else self.record.made[2]
        rng = np.random.default_rng(self.gone_seed)
        gone = [self.gone & (rng.random(idx.shape) < 0.5) for idx in topk_idx]
        now = [np.where(g, -1, idx) for g, idx in zip(gone, topk_idx)]
        x, waits = up(y[me]), up(np.zeros(case.ranks, np.int64))
        if self.zero_copy:
            held.wait()                                          # for those that read this array, if any does
            self.buf.get_next_low_latency_combine_buffer(self.record.handle)[:] = x
            x = up(np.zeros_like(y[me]))                         # which is not looked at
        selections = (up(now[me]), up(weights[me])) if case.direct else (None, None)
        out = up(np.full((case.tokens[me], case.hidden), 7, y[me].dtype)) if self.out else None
        combined, event, hook = self.buf.low_latency_combine(
            x, *selections, self.record.handle, zero_copy=self.zero_copy, out=out,
            combine_wait_recv_cost_stats=waits if self.waited else None, **self.timing.options(held, x))
        assert out is None or combined is out

        def complete():
            want = combined_direct(case, y, topk_idx, weights, gone) if self.gone else case.combined(y, topk_idx, weights)
            assert_same(down(combined), want[me], f"combined_x of step {self.record.born}")
            assert (down(waits) >= 0).all()
        sent_or_ended(self, hook, event, f"the combine of step {self.world.step}", complete)


def combinable(held):
    """Dispatches that were received, also on a stream that nobody has waited for yet, and not overwritten since."""
    sent = {sent.born for sent in held.sent}
    return [record for record in held.received if record.alive and record.born not in sent]


def combined_direct(case, y, topk_idx, weights, gone):
    """What the oracle says of a direct combine, some of whose selections are gone: they keep their rows and add nothing."""
    everywhere, placed = range(case.ranks), places(topk_idx, case.max_tokens, case.experts)
    return [to_bf16(weighted_sum(y, (np.where(g, -1, rank), expert, row), w, everywhere))
            for g, (rank, expert, row), w in zip(gone, placed, weights)]


class CallHook(Operation):
    """Call the hook of an operation, of two not always the first one's."""

    weight = 10

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        self.sent = world.choose(held.sent)

    @staticmethod
    def may(world, held):
        return bool(held.sent)

    def __str__(self):
        return f"{self.name}hook of {self.sent.words}"

    def run(self):
        self.held.sent.remove(self.sent)
        self.sent.hook()
        self.sent.complete()


class Clean(Operation):
    """`clean_low_latency_buffer`, which changes nothing, on one rank or on all."""

    weight = 0.5

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        self.case, self.alone = draw_low_latency(rng, world.comm.size, world.all_modes), chance(rng, 0.5)

    def __str__(self):
        return f"{self.name}clean_low_latency_buffer on {'rank 0' if self.alone else 'all ranks'}"

    def run(self):
        if self.me == 0 or not self.alone:
            self.buf.clean_low_latency_buffer(self.case.max_tokens, self.case.hidden, self.case.experts)
