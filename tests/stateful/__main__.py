"""A run by hand: `PYTHONPATH=.:tests mpiexec -n 3 python -m mpi4py -m stateful --seed 5 --steps 0:2000`."""
import argparse
import os
import time

from mpi4py import MPI


def options(parser):
    """What a run is made of."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default="0:1000", help='which ones, as "0:40,97,812"')
    parser.add_argument("--all-modes", action="store_true", help="not only those that other tests compile too")
    return parser


def main():
    parser = options(argparse.ArgumentParser(prog="stateful", description=__doc__))
    parser.add_argument("--tell", action="store_true", help="print each operation before it is run")
    arguments = parser.parse_args()
    os.environ.setdefault("PYEP_DEVICE", "cpu")
    from .campaign import run
    begin = time.monotonic()
    counts = run(MPI.COMM_WORLD, arguments.seed, arguments.steps, arguments.all_modes, arguments.tell)
    if MPI.COMM_WORLD.rank == 0:
        print(f"seed {arguments.seed}, {MPI.COMM_WORLD.size} ranks: {sum(counts.values())} steps right in "
              f"{time.monotonic() - begin:.1f} s: " + ", ".join(f"{n} {name}" for name, n in counts.most_common()), flush=True)


if __name__ == "__main__":
    main()
