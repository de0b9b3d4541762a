"""Measure low-latency dispatch, combine, and the period of both: `python -m pyep bench ll`."""
import functools
import sys

import numpy as np
from tqdm import tqdm

from ..buffer import Buffer
from . import check, devices, figures, inputs, report
from .machine import describe
from .traffic import traffic


def run(args, comm):
    """Measure every point, report on rank 0, return the exit status."""
    results = []
    for point in tqdm(args.points, "bench ll", unit="point", file=sys.stderr, disable=comm.rank > 0 or len(args.points) == 1):
        try:
            results += measure(point, args, comm)
        except check.Difference as difference:                   # the same on every rank
            if comm.rank == 0:
                print(f"--check failed: {difference}", file=sys.stderr, flush=True)
            return 1
    machine = describe(args, comm)
    if comm.rank == 0:
        report.write(args, machine, results)
    comm.Barrier()
    return 0


def measure(point, args, comm):
    """One point: a dict for each mode, with the point, the mode and the figures by operation."""
    topk_idx = [inputs.routing(point, args.seed, rank) for rank in range(comm.size)]
    phases = traffic(topk_idx, point.hidden, point.experts, args.dtype, args.layout, args.combine)
    size = Buffer.get_low_latency_rdma_size_hint(point.tokens, point.hidden, comm.size, point.experts, num_topk=point.topk)
    with Buffer(comm=comm, num_rdma_bytes=size, low_latency_mode=True, transport=args.transport) as buf:
        library = devices.make(args.array, buf)
        with library.stream():
            operations = Operations(buf, library, point, args, topk_idx)
            operations.pair()                                    # compiles
            wrong = check.differences(operations, args, comm) if args.check else []
            times = {} if wrong else {mode: operations.time(mode, args, comm) for mode in args.modes}
    if wrong:                                                    # only now: the buffer has been destroyed in good order
        raise check.Difference(f"{point}: " + "; ".join(wrong))
    bounds_us = [bound(phase, args, comm) for phase in phases]
    return [dict(point._asdict(), mode=mode, **figures.of_all(times[mode], phases, bounds_us)) for mode in args.modes]


class Operations:
    """Dispatch and combine of one point, ready to be called again and again."""

    def __init__(self, buf, library, point, args, topk_idx):
        self.buf, self.library, self.point, self.all_topk_idx = buf, library, point, topk_idx
        self.x = library.up(inputs.tokens(point, args.seed, buf.rank))
        self.topk_idx = library.up(topk_idx[buf.rank])
        self.topk_weights = library.up(inputs.weights(point, args.seed, buf.rank))
        self.y = library.up(inputs.outputs(point, args.layout, topk_idx, args.seed, buf.rank))
        self.out = library.up(np.zeros_like(inputs.tokens(point, args.seed, buf.rank)))
        self.options = dispatch_options(args)
        if args.combine == "reduced":
            self.options["topk_weights"] = self.topk_weights

    def dispatch(self):
        shape = self.point.tokens, self.point.experts
        self.dispatched = self.buf.low_latency_dispatch(self.x, self.topk_idx, *shape, **self.options)

    def combine(self):
        """Of the latest dispatch; all of a point have the same inputs."""
        self.buf.low_latency_combine(self.y, self.topk_idx, self.topk_weights, self.dispatched.handle, out=self.out)

    def pair(self):
        self.dispatch()
        self.combine()

    def time(self, mode, args, comm):
        """Microseconds of each operation: by its name, [R, repeats]."""
        times = {}
        for name in ("dispatch", "combine", "pair"):
            run = functools.partial(repeat, getattr(self, name), args.iterations)
            if mode == "graph":
                run = self.library.capture(run)
            times[name] = time_runs(run, self.library, args, comm) / args.iterations
        return times


def dispatch_options(args):
    """How dispatch is called, but for the weights."""
    return dict(use_fp8=args.dtype == "fp8", round_scale=args.round_scale, use_ue8m0=args.ue8m0,
                output_layout=args.layout.replace("-", "_"))


def repeat(operation, times):
    for _ in range(times):
        operation()


def time_runs(run, library, args, comm):
    """Microseconds of `run` on all ranks, [R, repeats].  All meet before each: no rank's time holds the lateness of another."""
    seconds = []
    for _ in range(args.warm_up + args.repeats):
        comm.Barrier()
        seconds.append(library.seconds(run))
    return 1e6 * np.array(comm.allgather(seconds[args.warm_up:]))


def bound(phase, args, comm):
    """Microseconds that the bytes of a phase alone take: on the link, or on the CPU engine copied by all ranks at once."""
    if args.link_gbps:
        return phase.busiest / args.link_gbps / 1e3
    source, destination = (np.full(int(phase.copied[comm.rank]), value, np.uint8) for value in (1, 0))

    def copies():
        repeat(lambda: np.copyto(destination, source), args.iterations)
        comm.Barrier()                                           # until the last rank is done: they may share cores
    return figures.latency(time_runs(copies, devices.NumPy(), args, comm) / args.iterations)["max"]
