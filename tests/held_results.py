"""A loop that holds results of dispatches and drops them in random order: no error, no growth, every row right.

    PYTHONPATH=.:tests mpiexec -n 3 python -m mpi4py -m held_results --memory config --steps 10000

It prints how many dispatches there were, how many of their results were copied, and what memory each process has.
"""
import argparse
import ctypes
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from engine import make_high_throughput_buffer
from high_throughput_case import Case, assert_all_is_back, assert_combined, assert_dispatched, combine, dispatch, up_x

from pyep import Buffer
from pyep.config import LEAST_TOKENS, Config

HIDDEN, LOCAL, TOPK = 64, 4, 3          # H, experts of a rank, top-k
MOST_HELD = 6                           # results
MOST_HANDLES = 3                        # that outlive their results
CYCLE, LARGE = 200, 20                  # of so many steps the first few have any number of tokens, the others few: time
FEW = 48                                # tokens
PARTS = 10                              # of a run, between which nothing is held


class Memory(NamedTuple):
    """How a user computes num_nvl_bytes; `most`: the tokens of a rank for which it is promised to suffice."""

    most: int
    nbytes: object                      # of the number of ranks


MEMORIES = {
    "hint": Memory(FEW, lambda ranks: Buffer.get_high_throughput_size_hint(FEW, HIDDEN, ranks, TOPK)),
    "config": Memory(LEAST_TOKENS, lambda ranks: Config().get_nvl_buffer_size_hint(2 * HIDDEN, ranks)),
}


class Held:
    """A dispatch whose results are held, and what it is made of."""

    def __init__(self, buf, made):
        self.made, self.got = made, dispatch(buf, made)

    def check(self, me):
        assert_dispatched(self.got, self.made.dispatched[me], me)


class Loop:
    """The steps of this rank; all ranks draw the same."""

    def __init__(self, buf, most, seed):
        self.buf, self.me, self.most, self.rng = buf, buf.rank, most, np.random.default_rng(seed)
        self.held, self.handles, self.dispatches = [], [], 0     # handles: (made, handle) of which the results may be gone

    def step(self, number):
        """Drop some results, dispatch, then use one of the handles in all ways."""
        rng = self.rng
        most = int(rng.integers(1, MOST_HELD + 1))
        while len(self.held) >= most:
            self.held.pop(int(rng.integers(len(self.held)))).check(self.me)
        self.held.append(Held(self.buf, self.draw(number).make()))
        self.dispatches += 1
        one = self.held[int(rng.integers(len(self.held)))]
        if rng.random() < 0.3:
            self.combine(one.made, one.got[4])
        if rng.random() < 0.3:
            self.dispatch_again(one.made, one.got[4])
        if rng.random() < 0.2:
            self.handles.append((one.made, one.got[4]))
        if len(self.handles) > MOST_HANDLES:
            self.combine(*self.handles.pop(0))

    def draw(self, number):
        """A case of any size, often the largest, with as many rows as come or with room for more."""
        rng, ranks = self.rng, self.buf.group_size
        most = self.most if number % CYCLE < LARGE else FEW
        tokens = rng.integers(0, most + 1, ranks) if rng.random() < 0.5 else [most] * ranks
        case = Case(int(rng.integers(2**32)), tuple(map(int, tokens)), HIDDEN, LOCAL * ranks, TOPK,
                    routing=("random", "all ranks", "one rank")[number % 3])
        return case.with_room(int(rng.integers(4))) if rng.random() < 0.2 and max(tokens) < most - 12 else case

    def combine(self, made, handle):
        assert_combined(combine(self.buf, made, handle), made.combined[self.me])

    def dispatch_again(self, made, handle):
        x = made.more_x(self.rng)
        assert_dispatched(self.buf.dispatch(up_x(x[self.me]), handle), made.cached(x)[self.me], self.me)
        self.dispatches += 1

    def let_go(self):
        """Of all that is held."""
        for one in self.held:
            one.check(self.me)
        self.held, self.handles, one = [], [], None
        assert_all_is_back(self.buf)


class Counted(NamedTuple):
    """What a rank has seen."""

    dispatches: int
    copied_results: int
    copied_bytes: int
    own_bytes: list                     # of the process, after each part of the run, when nothing is held


def run(comm, memory, seed, steps):
    """All steps on this rank, in the memory of one of MEMORIES."""
    most, nbytes = MEMORIES[memory]
    own = []
    with make_high_throughput_buffer(comm, nbytes(comm.size)) as buf:
        # A compiler that is first used late in a run would look like growth: 16 MiB for one kernel.
        call = dict(hidden=HIDDEN, num_topk=TOPK, num_experts=LOCAL * comm.size, weighted=True, cached=True)
        buf.warm_up(high_throughput=[call, call | dict(num_worst_tokens=1)], progress=False)
        loop = Loop(buf, most, seed)
        for number in range(steps):
            loop.step(number)
            if (number + 1) * PARTS % steps < PARTS:
                loop.let_go()
                own.append(own_memory())
        return Counted(loop.dispatches, buf.copied_results, buf.copied_bytes, own)


def own_memory():
    """Bytes of memory that this process alone has, without what the C library keeps for later."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


def main():
    parser = argparse.ArgumentParser(prog="held_results", description=__doc__)
    parser.add_argument("--memory", choices=MEMORIES, default="hint", help="num_nvl_bytes: of pyep's hint, or of DeepEP's Config")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("PYEP_DEVICE", "cpu")
    from mpi4py import MPI
    comm, begin = MPI.COMM_WORLD, time.monotonic()
    counts = comm.gather(run(comm, arguments.memory, arguments.seed, arguments.steps))
    if comm.rank == 0:
        print(f"{comm.size} ranks, num_nvl_bytes={MEMORIES[arguments.memory].nbytes(comm.size)} ({arguments.memory}), seed "
              f"{arguments.seed}: {arguments.steps} steps right in {time.monotonic() - begin:.0f} s")
        for rank, (dispatches, copied, nbytes, own) in enumerate(counts):
            print(f"  rank {rank}: {copied} of {dispatches} results copied, {nbytes / 2**20:.1f} MiB; MiB of the process: "
                  + " ".join(f"{n / 2**20:.1f}" for n in own))


if __name__ == "__main__":
    main()
