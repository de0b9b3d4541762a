"""High-throughput operations: layout, dispatch with counts and without, combine; and what is dropped of their results."""
import copy
import dataclasses

import numpy as np
import pytest
from engine import up
from high_throughput_case import (Case, assert_combined, assert_dispatched, assert_layout, combine_inputs, dispatch,
                                  dispatch_inputs, floats, rows_of_bf16, up_x)

from pyep import EPBufferTooSmallError

from .shapes import HT_SHAPES, chance, draw_high_throughput, draw_seed, in_brackets, pick, words_of
from .waiting import Operation, Timing
from .world import Kept

HELD = 8                                # results of dispatches that are held of a buffer, at most


class Dispatched:
    """A dispatch: what it was made of; its handle, None once dropped; its results once they were compared (`kept`)."""

    alive = True                        # as long as anybody holds it

    def __init__(self, born, made, handle):
        self.born, self.made, self.handle, self.kept = born, made, handle, None
        self.words = f"the dispatch of step {born}"


def with_handle(held):
    return [record for record in held.dispatched if record.handle is not None]


class Layout(Operation):
    """`get_dispatch_layout`, on all ranks or on one: no other takes part."""

    weight = 1

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        self.made, self.timing = draw_high_throughput(rng, world.comm.size, world.all_modes), Timing(rng, hooks=False)
        self.alone = chance(rng, 0.5)

    def __str__(self):
        where = "rank 0" if self.alone else "all ranks"
        return f"{self.name}get_dispatch_layout on {where}{words_of(self.made.case, self.timing)}"

    def run(self):
        if self.me == 0 or not self.alone:
            counted_layout(self, self.timing)


def counted_layout(operation, timing):
    """What `get_dispatch_layout` says, compared with the oracle."""
    made, topk_idx = operation.made, up(operation.made.topk_idx[operation.me])
    got = operation.buf.get_dispatch_layout(topk_idx, made.case.experts, **timing.options(operation.held, topk_idx))
    want = made.layout[operation.me]
    if made.case.stray:
        want = type(made)(dataclasses.replace(made.case, stray=False)).layout[operation.me]
    assert_layout(got, want)
    return got


class Dispatch(Operation):
    """`dispatch` without a handle, of counts from the oracle or from `get_dispatch_layout`."""

    weight = 8

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        self.made, self.timing = draw_high_throughput(rng, world.comm.size, world.all_modes), Timing(rng, hooks=False)
        self.counted = chance(rng, 0.4) and not self.made.case.stray

    @staticmethod
    def may(world, held):
        return len(held.dispatched) < HELD

    def __str__(self):
        return f"{self.name}dispatch{words_of(self.made.case, self.timing, 'counted' * self.counted)}"

    def run(self):
        options = {}
        if self.counted:
            per_rank, _, per_expert, in_rank, _ = counted_layout(self, self.timing)
            options = dict(num_tokens_per_rank=per_rank, num_tokens_per_expert=per_expert, is_token_in_rank=in_rank)
        inputs = dispatch_inputs(self.made, self.me) | options
        got = self.buf.dispatch(**inputs, **self.timing.options(self.held, inputs["is_token_in_rank"]))
        ended(self, got, self.made, lambda: self.made.dispatched)


def ended(operation, got, made, wanted):
    """Hold the results of a dispatch, once compared with what the oracle says (`wanted()`, by rank)."""
    record = Dispatched(operation.world.step, made, got[4])
    operation.held.dispatched.append(record)

    def complete():
        assert_dispatched(got, wanted()[operation.me], operation.me)
        if record in operation.held.dispatched:                  # else it was dropped before it was looked at
            record.kept = kept_of(record.words, got)
    operation.timing.ended(operation.held, record.born, record.words, got[5], complete)


def kept_of(words, got):
    """All arrays of a dispatch's results, whole: also in rows that no token came to nobody may write now."""
    recv_x, scales = got[0] if isinstance(got[0], tuple) else (got[0], None)
    names = "rank_prefix_matrix", "recv_src_idx", "is_token_in_rank", "send_rows"
    return Kept(words, recv_x=recv_x, scales=scales, recv_topk_idx=got[1], recv_topk_weights=got[2], **dict(zip(names, got[4])))


class Cached(Operation):
    """`dispatch` with a handle, old or new, of other rows: a handle says where rows lie, not what they are."""

    weight = 5

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        self.record, self.timing = world.choose(with_handle(held)), Timing(rng, hooks=False)
        fp8 = pick(rng, (False, True))
        self.made, self.seed = copy.copy(self.record.made), draw_seed(rng)
        self.made.case = dataclasses.replace(self.made.case, fp8=fp8, hidden=HT_SHAPES[fp8][0])

    @staticmethod
    def may(world, held):
        return len(held.dispatched) < HELD and bool(with_handle(held))

    def __str__(self):
        return f"{self.name}dispatch by the handle of step {self.record.born}{in_brackets('FP8' * self.made.case.fp8, self.timing)}"

    def run(self):
        x = self.made.more_x(np.random.default_rng(self.seed))
        x_me = up_x(x[self.me])
        like = x_me[0] if isinstance(x_me, tuple) else x_me
        got = self.buf.dispatch(x_me, self.record.handle, **self.timing.options(self.held, like))
        ended(self, got, self.record.made, lambda: self.made.cached(x))


class CombineRows(Operation):
    """`combine` of any handle, with other outputs each time."""

    weight = 8

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        self.record, self.timing = world.choose(with_handle(held)), Timing(rng, hooks=False)
        self.made = with_outputs(self.record.made, rng, bias=int(rng.integers(3)), sum_weights=chance(rng, 0.5))

    @staticmethod
    def may(world, held):
        return bool(with_handle(held))

    def __str__(self):
        case = self.made.case
        options = in_brackets(f"bias {case.bias}", "weights" * case.sum_weights, self.timing)
        return f"{self.name}combine by the handle of step {self.record.born}{options}"

    def run(self):
        inputs = combine_inputs(self.made, self.me)
        got = self.buf.combine(handle=self.record.handle, **inputs, **self.timing.options(self.held, inputs["x"]))
        self.timing.ended(self.held, self.world.step, f"the combine of step {self.world.step}", got[2],
                          lambda: assert_combined(got, self.made.combined[self.me]))


def with_outputs(made, rng, bias, sum_weights):
    """The same dispatch with other outputs for its rows, and with this bias."""
    other, case = copy.copy(made), dataclasses.replace(made.case, bias=bias, sum_weights=sum_weights)
    rows = [len(handle.recv_src_idx) for handle in made.handles]
    other.case = case
    other.y = [rows_of_bf16(case, rng, n) for n in rows]
    other.y_weights = [floats(case, rng, (n, case.topk)) for n in rows] if sum_weights else None
    other.bias = [tuple(rows_of_bf16(case, rng, t) for _ in range(bias)) for t in case.tokens]
    vars(other).pop("combined", None)
    return other


class TooLarge(Operation):
    """A dispatch with more rows for one rank than its whole heap has room for: refused on all ranks, and nothing else happens."""

    weight = 0.3

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        hidden, per_rank, topk = HT_SHAPES[False]
        ranks, row = world.comm.size, 2 * hidden
        tokens, experts = held.buf._connection.heap.nbytes // (row * ranks) + 1, per_rank * ranks
        self.made = Case(draw_seed(rng), (tokens,) * ranks, hidden, experts, min(topk, experts), "one rank").make()

    def __str__(self):
        return f"{self.name}dispatch of too many tokens{words_of(self.made.case)}"

    def run(self):
        with pytest.raises(EPBufferTooSmallError, match="num_nvl_bytes"):
            dispatch(self.buf, self.made)


class Drop(Operation):
    """Let go of a dispatch's results: of all, of its handle, of one array, or of all of it but for a view."""

    weight = 8

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        self.record, self.what, self.part = world.choose(held.dispatched), pick(rng, ("all", "all", "handle", "array", "rest")), rng

    @staticmethod
    def may(world, held):
        return bool(held.dispatched)

    def __str__(self):
        return f"{self.name}drop {self.what} of the dispatch of step {self.record.born}"

    def run(self):
        record = self.record
        if self.what == "all":
            self.held.dispatched.remove(record)
        elif self.what == "handle":
            record.handle = None
        elif record.kept is not None and record.kept.arrays:     # its results have come
            name = pick(self.part, sorted(record.kept.arrays))
            array = record.kept.arrays[name]
            record.kept.drop(name)
            if self.what == "rest":
                record.kept.hold(name, array[1:3])
