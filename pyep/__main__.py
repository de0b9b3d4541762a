"""The command line: `mpiexec -n 4 python -m pyep bench ll`, `python -m pyep doctor`; `--help` says more."""
import argparse
import sys

from . import bench, doctor


def make_parser():
    parser = argparse.ArgumentParser("python -m pyep", description="pyep's tools; start them under mpiexec.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    benchmarks = commands.add_parser("bench", help="measure latency and bandwidth", description="Measure latency and bandwidth.")
    bench.add_commands(benchmarks.add_subparsers(title="benchmarks", required=True, metavar="benchmark"))
    doctor.add_command(commands)
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


def world(argv):
    """All of MPI's ranks; where MPI does not start, one rank alone for the doctor, whom one asks why."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):                          # RuntimeError: there is no MPI library
        if argv[:1] != ["doctor"]:
            raise
        return doctor.OneRank()
    return MPI.COMM_WORLD


def main(argv=None, comm=None):
    """Run a command on all ranks of `comm` (default: the world) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    comm = world(argv) if comm is None else comm
    args = read_once(argv, comm)
    return args.run(args, comm)


def script():
    """The console script `pyep`, and `python -m pyep`."""
    try:
        raise SystemExit(main())
    except Exception:
        from mpi4py.run import set_abort_status
        set_abort_status(1)                                      # as `python -m mpi4py` does: no rank waits for this one
        raise


if __name__ == "__main__":
    script()
