"""The benchmarks: `python -m pyep bench ll` and `bench ht`.  What each figure means is in docs/benchmark.md.

Read in this order: `benchmark` (what makes a benchmark); the two there are, `low_latency` and `high_throughput`; `options` and
`points` (what can be asked for); `measure` (one point of a sweep) and `timing`; `low_latency_operations` and
`high_throughput_operations` (what is called); `inputs` (what is sent), `devices` (clocks, graphs, arrays), `traffic` (how many
bytes), `check` (the oracle), `figures`, `report` (table, JSON) and `plot`.
"""
from . import options
from .high_throughput import HighThroughput
from .low_latency import LowLatency

BENCHMARKS = LowLatency(), HighThroughput()


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
