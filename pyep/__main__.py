"""The command line: `mpiexec -n 4 python -m pyep bench ll`; `--help` says more."""
import argparse

from mpi4py.run import set_abort_status

from . import bench


def make_parser():
    parser = argparse.ArgumentParser("python -m pyep", description="pyep's tools; start them under mpiexec.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    benchmarks = commands.add_parser("bench", help="measure latency and bandwidth", description="Measure latency and bandwidth.")
    bench.add_commands(benchmarks.add_subparsers(title="benchmarks", required=True, metavar="benchmark"))
    return parser


def read(argv, num_ranks):
    """The arguments.  Each command sets `parser`, `complete` (defaults; ValueError if options do not fit) and `run`."""
    args = make_parser().parse_args(argv)
    parser = args.__dict__.pop("parser")
    try:
        args.__dict__.pop("complete")(args, num_ranks)
    except ValueError as error:
        parser.error(str(error))
    return args


def read_once(argv, comm):
    """Rank 0 reads arguments and environment for all ranks: so they agree, and help and complaints appear once."""
    args = None
    if comm.rank == 0:
        try:
            args = read(argv, comm.size)
        except SystemExit as end:
            args = end.code
    args = comm.bcast(args)
    if not isinstance(args, argparse.Namespace):
        raise SystemExit(args)
    return args


def main(argv=None, comm=None):
    """Run a command on all ranks of `comm` (default: the world) and return its exit status."""
    if comm is None:
        from mpi4py import MPI
        comm = MPI.COMM_WORLD
    args = read_once(argv, comm)
    return args.run(args, comm)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except Exception:
        set_abort_status(1)                                      # as `python -m mpi4py` does: no rank waits for this one
        raise
