"""Measure every point of a benchmark, and report."""
import sys

from tqdm import tqdm

from . import check, devices, figures, report
from .machine import describe
from .timing import bound, time_calls, time_host


def run(args, comm):
    """Measure every point, report on rank 0, return the exit status."""
    results, title = [], f"bench {args.benchmark.name}"
    for point in tqdm(args.points, title, unit="point", file=sys.stderr, disable=comm.rank > 0 or len(args.points) == 1):
        try:
            for array in args.arrays:
                results += measure(point, array, args, comm)
        except check.Difference as difference:                   # the same on every rank
            if comm.rank == 0:
                print(f"--check failed: {difference}", file=sys.stderr, flush=True)
            return 1
    machine = describe(args, comm)
    if comm.rank == 0:
        report.write(args, machine, results)
    comm.Barrier()
    return 0


def measure(point, array, args, comm):
    """One point with arrays of one library: a dict for each mode, with the point, both, and the figures by row of the table."""
    with args.benchmark.make_buffer(point, args, comm) as buf:
        args.transport_name = buf.transport
        library = devices.make(array, buf)
        with library.stream():
            operations = args.benchmark.make_operations(buf, library, point, args)
            operations.prepare(args.modes)
            wrong = check.of_all_ranks(operations.differences(args.modes), comm) if args.check else []
            times = {} if wrong else {mode: time_rows(operations, mode, library, args, comm) for mode in args.modes}
    if wrong:                                                    # only now: the buffer has been destroyed in good order
        raise check.Difference(f"{point}: " + "; ".join(wrong))
    phases = operations.phases
    del operations                                               # the bound's copies may need the memory
    bounds_us = {name: bound(phase, args, comm) for name, phase in phases.items()}
    return [dict(point._asdict(), array=array, mode=mode,
                 **figures.by_row(args.benchmark.rows_of(mode), times[mode], phases, bounds_us)) for mode in args.modes]


def time_rows(operations, mode, library, args, comm):
    """Microseconds of each call: by the name of its row, [R, repeats]."""
    calls = operations.calls(mode)
    if mode == "host":
        return {name: time_host(call, operations.waited, library, args, comm) for name, call in calls.items()}
    return {name: time_calls(call, mode, library, args, comm) for name, call in calls.items()}
