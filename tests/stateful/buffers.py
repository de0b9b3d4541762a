"""Buffers that come and go."""
import dataclasses

import pytest
from engine import up
from high_throughput_case import dispatch

from pyep import EPClosedError, EPRoutingError

from .shapes import HT_SHAPES, draw_high_throughput, words_of
from .waiting import Operation

LEFT = 6                                # results of destroyed buffers that are held, at most


class Make(Operation):
    """A second Buffer."""

    weight = 0.7

    @staticmethod
    def may(world, held):
        return len(world.buffers) < 2

    def __str__(self):
        return "a second Buffer"

    def run(self):
        self.world.add_buffer()


class Destroy(Operation):
    """Destroy one of two Buffers, whatever it is doing.  High-throughput results live on."""

    weight = 0.7

    @staticmethod
    def may(world, held):
        return len(world.buffers) == 2

    def __str__(self):
        return f"{self.name}destroy"

    def run(self):
        self.held.wait()
        destroy(self.world, self.held)
        for sent in self.held.sent:
            with pytest.raises(EPClosedError):
                sent.hook()


def destroy(world, held):
    """Destroy a buffer; what it has lent out is still held."""
    held.buf.destroy()
    with pytest.raises(EPClosedError):
        held.buf.clean_low_latency_buffer(8, 64, held.buf.group_size)
    world.buffers.remove(held)
    world.destroyed = [(held.received[-1].handle if held.received else None,
                        held.dispatched[-1].handle if held.dispatched else None)]
    world.left = (world.left + [record.kept for record in held.dispatched if record.kept])[-LEFT:]


class Lose(Operation):
    """An error that comes out of a running operation, to all ranks: more rows than num_worst_tokens.  Then a new Buffer."""

    weight = 0.3

    def __init__(self, world, held, rng):
        super().__init__(world, held, rng)
        drawn = draw_high_throughput(rng, world.comm.size, world.all_modes).case
        hidden, per_rank, topk = HT_SHAPES[False]
        self.made = dataclasses.replace(drawn, tokens=(5,) * drawn.ranks, hidden=hidden, experts=per_rank * drawn.ranks, fp8=False,
                                        topk=min(topk, per_rank * drawn.ranks), carried="nothing", routing="random", stray=False,
                                        rows=()).make()

    def __str__(self):
        return f"{self.name}dispatch of too many rows{words_of(self.made.case)}, and a new Buffer"

    def run(self):
        self.held.wait()
        up(self.made.x[self.me])
        with pytest.raises(EPRoutingError, match="num_worst_tokens is 1"):
            dispatch(self.buf, self.made, num_worst_tokens=1)[5].synchronize()
        with pytest.raises(EPClosedError, match="unusable after an error"):
            self.buf.get_dispatch_layout(up(self.made.topk_idx[self.me]), self.made.case.experts)
        destroy(self.world, self.held)
        self.world.add_buffer()
