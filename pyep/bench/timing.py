"""How long something takes, on all ranks at once."""
import functools
import time

import numpy as np

from . import devices, figures


MOST_CALLS = 200                        # between waits for the GPU: behind about 1000 launches a stream makes the host wait


def time_calls(call, mode, library, args, comm):
    """Microseconds of a call, of many in a row or in a CUDA graph: [R, repeats]."""
    run = functools.partial(repeat, call, args.iterations)
    if mode == "graph":
        run = library.capture(run)
    return time_runs(run, library, args, comm) / args.iterations


def time_host(call, waited, library, args, comm):
    """Microseconds that the host needs for a call, waiting left out: [R, repeats], of each repeat the median of its calls.

    The GPU is not waited for within a repeat.  waited(): seconds that the host has waited so far.
    """
    medians = []

    def run():
        medians.append(np.median([host_seconds(call, waited) for _ in range(min(args.iterations, MOST_CALLS))]))
    time_runs(run, library, args, comm)                          # what the GPU needs for it is not asked for
    return 1e6 * np.array(comm.allgather(medians[args.warm_up:]))


def host_seconds(call, waited):
    before, start = waited(), time.perf_counter()
    call()
    return time.perf_counter() - start - (waited() - before)


def repeat(call, times):
    for _ in range(times):
        call()


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
