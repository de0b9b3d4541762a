"""The benchmark: `python -m pyep bench ll`.  What each figure means is in docs/benchmark.md.

Read in this order: `options` (what can be asked for), `low_latency` (one point of a sweep, measured), `inputs` (what is sent),
`devices` (clocks, graphs, arrays), `traffic` (how many bytes), `check` (the oracle), `report` (table, JSON) and `plot`.
"""
from . import options


def add_commands(benchmarks):
    """Add the benchmarks to argparse's subparsers."""
    parser = benchmarks.add_parser("ll", help="low-latency dispatch and combine", description=options.DESCRIPTION)
    options.add_arguments(parser)
    parser.set_defaults(parser=parser, complete=options.complete, run=run_low_latency)


def run_low_latency(args, comm):
    """Measure every point and report on rank 0; the exit status."""
    from . import low_latency                                    # only now: `complete` has asked for the packages it needs
    return low_latency.run(args, comm)
