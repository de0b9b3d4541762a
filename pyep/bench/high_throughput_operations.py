"""High-throughput operations of one point, ready to be called again and again, and compared with the oracle.

In a CUDA graph there is no host that could wait for counts, so dispatches for graphs get num_worst_tokens: the most rows that a
rank may receive.
"""
import functools
import time

from .. import reference
from ..config import Config
from . import inputs, traffic
from .check import compare, compare_parts


class Operations:
    """See `benchmark.Benchmark.make_operations`.  Each call drops its result, so that the next one finds the same memory free."""

    def __init__(self, buf, library, point, args):
        self.buf, self.library, self.point, self.args = buf, library, point, args
        self.all_topk_idx = inputs.of_all(inputs.routing, point, args.seed, buf.group_size)
        self.phases = traffic.high_throughput(self.all_topk_idx, point.hidden, point.experts, args.dtype)
        self.received = traffic.rows_between(self.all_topk_idx, point.experts)[1].sum(0).tolist()        # rows, by rank
        self.waits = Waits(buf)
        self.config = None if point.num_sms is None else Config(point.num_sms)
        self.x = up_tokens(library, self.tokens(buf.rank))
        self.topk_idx = library.up(self.all_topk_idx[buf.rank])
        self.topk_weights = library.up(inputs.weights(point, args.seed, buf.rank))
        self.y = library.up(self.outputs(buf.rank, max(map(self.rows, args.modes))))
        self.counts = dict(zip(("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank"),
                               self.layout()))

    def tokens(self, rank):
        """x of a rank, in NumPy: [T, H] bf16, or the pair (e4m3, scales)."""
        x = inputs.tokens(self.point, self.args.seed, rank)
        return reference.quantize(x) if self.args.dtype == "fp8" else x

    def outputs(self, rank, rows):
        """What the experts of a rank make of the rows that it received, in NumPy."""
        return inputs.packed_outputs(self.point, self.received[rank], rows, self.args.seed, rank)

    def rows(self, mode):
        """The rows of this rank's results: those that it receives, in a graph those that it might."""
        return self.buf.group_size * self.point.tokens if mode == "graph" else self.received[self.buf.rank]

    # ---- what is timed -----------------------------------------------------------------------------------------------

    def prepare(self, modes):
        for mode in modes:
            for call in self.calls(mode).values():
                call()

    def calls(self, mode):
        """All use the handle of a dispatch that is made here, and x, y and weights that are always the same."""
        handle, y = self.exchange(mode)[4], self.y[:self.rows(mode)]
        return {"layout": self.layout,
                "dispatch": functools.partial(self.dispatch, handle),
                "dispatch + exchange": functools.partial(self.exchange, mode),
                "combine": functools.partial(self.combine, y, handle),
                "pair": lambda: self.combine(y, self.exchange(mode)[4]),
                **({"dispatch, worst case": functools.partial(self.exchange, "graph")} if mode == "host" else {})}

    def waited(self):
        return self.waits.seconds

    def layout(self):
        return self.buf.get_dispatch_layout(self.topk_idx, self.point.experts)

    def dispatch(self, handle):
        """Cached: the layout is that of an earlier dispatch."""
        return self.buf.dispatch(self.x, handle, config=self.config)

    def exchange(self, mode):
        """Uncached, with a layout that was made before; the top-k travels too."""
        return self.buf.dispatch(self.x, **self.counts, topk_idx=self.topk_idx, topk_weights=self.topk_weights, config=self.config,
                                 num_worst_tokens=self.rows(mode) if mode == "graph" else 0)

    def combine(self, y, handle):
        return self.buf.combine(y, handle, config=self.config)

    # ---- against the oracle ------------------------------------------------------------------------------------------

    def differences(self, modes):
        layout = reference.get_dispatch_layout(self.all_topk_idx, self.point.experts)
        found = []
        for name, want in layout[self.buf.rank]._asdict().items():
            if want is not None:
                found += compare(name, self.library.down(self.counts[name]), want)
        return found + [f"{mode}: {text}" for mode in modes for text in self.differences_of_mode(mode, layout)]

    def differences_of_mode(self, mode, layout):
        """Of a dispatch, of a cached one, and of a combine."""
        me, down = self.buf.rank, self.library.down
        dispatched, combined = self.expected(mode, layout)
        got = self.exchange(mode)
        cached, (combined_x, *_) = self.dispatch(got[4]), self.combine(self.y[:self.rows(mode)], got[4])
        found = compare_dispatched(dispatched, got, self.received[me], down)
        valid = slice(self.received[me])
        found += [f"cached dispatch: {text}" for text in compare_parts("recv_x", cached[0], dispatched.recv_x, down, valid)]
        return found + compare("combined_x", down(combined_x), combined)

    def expected(self, mode, layout):
        """What the oracle says that this rank holds: a `reference.HighThroughputDispatched`, and combined_x [T, H]."""
        me, ranks = self.buf.rank, range(self.buf.group_size)
        worst = [self.rows(mode)] * len(ranks) if mode == "graph" else None
        weights = inputs.of_all(inputs.weights, self.point, self.args.seed, len(ranks))
        dispatched = reference.dispatch([self.tokens(rank) for rank in ranks], layout, self.all_topk_idx, weights,
                                        num_worst_tokens=worst)
        y = [self.outputs(rank, self.received[rank]) for rank in ranks]
        combined, _ = reference.combine(y, reference.make_handles(layout))[me]
        return dispatched[me], combined


class Waits:
    """Adds up how long the host waits, in dispatches of a `Buffer`, for the number of rows that will come."""

    def __init__(self, buf):
        self.seconds, self._wait = 0.0, buf._wait_for_counts
        buf._wait_for_counts = self._timed

    def _timed(self, *args):
        start = time.perf_counter()
        try:
            return self._wait(*args)
        finally:
            self.seconds += time.perf_counter() - start


def up_tokens(library, x):
    """x, or the pair of FP8, as arrays of the library."""
    return tuple(map(library.up, x)) if isinstance(x, tuple) else library.up(x)


def compare_dispatched(want, got, received, down):
    """Sentences on what differs between the oracle's result and an operation's.  What is undefined behind row `received` is not
    looked at."""
    recv_x, recv_topk_idx, recv_topk_weights, counts, handle, _ = got
    found = compare("rank_prefix_matrix", down(handle[0]), want.handle.rank_prefix_matrix)
    if found:
        return found                                             # of other rows there is nothing to say
    valid = slice(received)
    found += compare_parts("recv_x", recv_x, want.recv_x, down, valid)
    found += compare("recv_topk_idx", down(recv_topk_idx), want.recv_topk_idx)
    found += compare("recv_topk_weights", down(recv_topk_weights), want.recv_topk_weights)
    found += compare("recv_src_idx", down(handle[1])[valid], want.handle.recv_src_idx[valid])
    found += compare("is_token_in_rank", down(handle[2]), want.handle.is_token_in_rank)
    found += compare("send_rows", down(handle[3]), want.handle.send_rows)
    if counts != want.num_recv_tokens_per_expert_list:
        found.append(f"num_recv_tokens_per_expert_list is {counts}, the oracle's is {want.num_recv_tokens_per_expert_list}")
    return found
