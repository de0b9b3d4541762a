"""Low-latency dispatch and combine of one point, ready to be called again and again, and compared with the oracle."""
import functools

import numpy as np

from .. import reference
from . import inputs, traffic
from .check import compare, compare_parts


class Operations:
    """See `benchmark.Benchmark.make_operations`."""

    def __init__(self, buf, library, point, args):
        self.buf, self.library, self.point, self.args = buf, library, point, args
        self.all_topk_idx = inputs.of_all(inputs.routing, point, args.seed, buf.group_size)
        self.phases = traffic.low_latency(self.all_topk_idx, point.hidden, point.experts, args.dtype, args.layout, args.combine)
        x = inputs.tokens(point, args.seed, buf.rank)
        self.x, self.out = library.up(x), library.up(np.zeros_like(x))
        self.topk_idx = library.up(self.all_topk_idx[buf.rank])
        self.topk_weights = library.up(inputs.weights(point, args.seed, buf.rank))
        self.y = library.up(inputs.outputs(point, args.layout, self.all_topk_idx, args.seed, buf.rank))
        self.options = dispatch_options(args)
        if args.combine == "reduced":
            self.options["topk_weights"] = self.topk_weights

    def prepare(self, modes):
        self.pair()

    def calls(self, mode):
        return {"dispatch": self.dispatch, "combine": self.combine, "pair": self.pair}

    def dispatch(self):
        shape = self.point.tokens, self.point.experts
        self.dispatched = self.buf.low_latency_dispatch(self.x, self.topk_idx, *shape, **self.options)

    def combine(self):
        """Of the latest dispatch; all of a point have the same inputs."""
        self.buf.low_latency_combine(self.y, self.topk_idx, self.topk_weights, self.dispatched.handle, out=self.out)

    def pair(self):
        self.dispatch()
        self.combine()

    def waited(self):
        return 0.0                                               # no operation waits

    # ---- against the oracle ------------------------------------------------------------------------------------------

    def differences(self, modes):
        """All modes have the same results: those of the pair that came before."""
        dispatched, combined = self.expected()
        return (compare_dispatched(dispatched, self.dispatched, self.library.down)
                + compare("combined_x", self.library.down(self.out), combined))

    def expected(self):
        """What the oracle says that this rank holds: a `reference.Dispatched`, and combined_x [T, H]."""
        args, rank, topk_idx = self.args, self.buf.rank, self.all_topk_idx
        shape = self.point.tokens, self.point.experts
        of_all = functools.partial(inputs.of_all, point=self.point, seed=args.seed, num_ranks=len(topk_idx))
        weights = of_all(inputs.weights)
        options = dict(dispatch_options(args), topk_weights=weights if args.combine == "reduced" else None)
        dispatched = reference.low_latency_dispatch(of_all(inputs.tokens), topk_idx, *shape, **options)
        y = [inputs.outputs(self.point, args.layout, topk_idx, args.seed, source) for source in range(len(topk_idx))]
        if args.layout == "rank-major":
            combined = reference.low_latency_combine_rank_major(y, topk_idx, *shape)
        elif args.combine == "reduced":
            combined = reference.low_latency_combine_reduced(y, topk_idx, weights, *shape)
        else:
            combined = reference.low_latency_combine(y, topk_idx, weights, *shape)
        return dispatched[rank], combined[rank]


def dispatch_options(args):
    """How dispatch is called, but for the weights."""
    return dict(use_fp8=args.dtype == "fp8", round_scale=args.round_scale, use_ue8m0=args.ue8m0,
                output_layout=args.layout.replace("-", "_"))


def compare_dispatched(want, got, down):
    """Sentences on what differs between the oracle's result and an operation's.  Rows that hold no token are not looked at."""
    counts = down(got.recv_count)
    found = compare("recv_count", counts, want.recv_count)
    if found:
        return found                                             # of other rows there is nothing to say
    valid = np.arange(want.src_info.shape[1]) < counts[:, None]  # [groups, rows]
    found += compare("src_info", down(got.handle[0])[valid], want.src_info[valid])
    found += compare("layout_range", down(got.handle[1]), want.layout_range)
    found += compare_parts("recv_x", got.recv_x, want.recv_x, down, valid)
    for name in ("recv_topk_idx", "recv_topk_weights"):
        if getattr(want, name) is not None:
            found += compare(name, down(getattr(got, name)), getattr(want, name))
    return found
