"""The benchmarks: `python -m pyep bench ll`.  What each figure means is in docs/benchmark.md.

Read in this order: `benchmark` (what makes a benchmark) and `low_latency` (the one there is), `options` and `points` (what can be
asked for), `measure` (one point of a sweep), `timing`, `low_latency_operations` (what is called), `inputs` (what is sent),
`devices` (clocks, graphs, arrays), `traffic` (how many bytes), `check` (the oracle), `figures`, `report` (table, JSON) and `plot`.
"""
from . import options
from .low_latency import LowLatency

BENCHMARKS = (LowLatency(),)


def add_commands(benchmarks):
    """Add the benchmarks to argparse's subparsers."""
    for benchmark in BENCHMARKS:
        description = options.DESCRIPTION.format(benchmark.title)
        parser = benchmarks.add_parser(benchmark.name, help=benchmark.title, description=description)
        options.add_arguments(parser, benchmark)
        parser.set_defaults(parser=parser, benchmark=benchmark, complete=options.complete, run=run)


def run(args, comm):
    """Measure every point and report on rank 0; the exit status."""
    from . import measure                                        # only now: `complete` has asked for the packages it needs
    return measure.run(args, comm)
