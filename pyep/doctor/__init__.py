"""`python -m pyep doctor`: what this machine has for pyep, and for each thing that is missing the line that fixes it.

It needs nothing but what pyep itself needs, and reports what is missing instead of failing.  Read in this order: `finding`;
`software`, `hardware` and `ranks`, which look; `report`, which prints.
"""
from . import hardware, ranks, report, software

DESCRIPTION = """What this machine has for pyep: engine, GPUs, MPI, MSCCL++, InfiniBand; and on several ranks, what connects each
with each.  The exit status is 1 if something must be fixed."""


def add_command(commands):
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("doctor", help="what this machine has, and what to do about what is missing",
                                 description=DESCRIPTION)
    parser.set_defaults(parser=parser, complete=complete, run=run)


def complete(args, num_ranks):
    """There is nothing to choose."""


def run(args, comm):
    """Look on every rank, report on rank 0; the exit status.  Collective."""
    found = [*software.look(comm), *hardware.look()]
    found_by_rank = comm.gather(found)
    sections = ranks.look(comm)                                  # collective
    if comm.rank != 0:
        return 0
    found = report.merged(found_by_rank)
    report.write([*found, *sections])
    return report.status([*found, *sections])


class OneRank:
    """In place of MPI's communicator where MPI does not start."""

    rank, size = 0, 1

    def bcast(self, value):
        return value

    def gather(self, value):
        return [value]

    allgather = gather
