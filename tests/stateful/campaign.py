"""The steps of a run, one after another, and what a failure says."""
import collections
import os
import time
import zlib

import pytest

from .buffers import Destroy, Lose, Make
from .high_throughput import Cached, CombineRows, Dispatch, Drop, Layout, TooLarge
from .low_latency import CallHook, Clean, Combine, Receive, Void
from .refused import Refused
from .waiting import Wait
from .world import World

OPERATIONS = (Receive, Combine, CallHook, Clean, Layout, Dispatch, Cached, CombineRows, TooLarge, Drop, Wait, Refused, Make,
              Destroy, Lose, Void)
REMEMBERED = 12                         # operations that a failure tells of
LATE = 0.002                            # seconds by which a rank comes late now and then


def run(comm, seed, steps="0:200", all_modes=False, tell=False):
    """A run on all ranks; `steps`: text, see `numbers_of`.  tell: print each before it is run, for when the process itself ends.

    Returns how often each kind of operation was run.
    """
    world, counts, last, told = World(comm, seed, all_modes), collections.Counter(), collections.deque(maxlen=REMEMBERED), 0
    for world.step in numbers_of(steps):
        try:
            counts[take_step(world, last, tell)] += 1
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(failure(world, steps, last, error)) from error
        told = zlib.crc32(last[-1].encode(), told)
    assert len(set(comm.allgather(told))) == 1, "the ranks have not drawn the same operations: this test is wrong"
    world.end()
    return counts


def take_step(world, last, tell):
    """Draw the operation of this step, tell of it in `last`, run it.  The name of its kind."""
    operation = draw(world)
    last.append(f"step {world.step}: {operation}")
    if tell and world.comm.rank == 0:
        print(last[-1], flush=True)
    if operation.late == world.comm.rank:
        time.sleep(LATE)
    operation.run()
    world.check()
    return type(operation).__name__


def draw(world):
    """The operation of this step: kinds come in an order by weight that only the step determines; the first that may be is it."""
    rng, held = world.random(), world.choose(world.buffers)
    turns = rng.exponential(size=len(OPERATIONS)) / [kind.weight for kind in OPERATIONS]
    for i in turns.argsort():
        if OPERATIONS[i].may(world, held):
            return OPERATIONS[i](world, held, rng)


def numbers_of(steps):
    """"0:40,97,812" as a sorted list of numbers."""
    numbers = set()
    for part in steps.split(","):
        begin, colon, end = part.partition(":")
        numbers.update(range(int(begin), int(end) if colon else int(begin) + 1))
    return sorted(numbers)


def text_of(numbers):
    """The reverse."""
    parts = []
    for n in numbers:
        if parts and parts[-1][1] == n:
            parts[-1][1] = n + 1
        else:
            parts.append([n, n + 1])
    return ",".join(f"{begin}:{end}" if end - begin > 1 else str(begin) for begin, end in parts)


def failure(world, steps, last, error):
    """What went wrong, where, after what, and how to see it again."""
    until = text_of([n for n in numbers_of(steps) if n <= world.step])
    device, modes = os.environ.get("PYEP_DEVICE", ""), " --all-modes" * world.all_modes
    return "\n".join([
        f"{type(error).__name__}: {error}",
        f"seed {world.seed}, step {world.step}, rank {world.comm.rank} of {world.comm.size}; the last operations:",
        *(f"  {words}" for words in last),
        "again:",
        f"  PYEP_DEVICE={device} PYTHONPATH=.:tests mpiexec -n {world.comm.size} python -m mpi4py -m stateful --seed {world.seed} "
        f"--steps {until}{modes}",
        "which steps it takes:",
        f"  PYEP_DEVICE={device} PYTHONPATH=.:tests python -m stateful.shrink --ranks {world.comm.size} --seed {world.seed} "
        f"--steps {until}{modes}"])
