"""What a transport owes `Buffer`, and how ranks find and meet each other on the host."""
import itertools
import os
import time
from datetime import timedelta

import numpy as np

from ..errors import EPTimeoutError, EPTransportError


class Transport:
    """Symmetric memory: `nbytes` on every rank, each of which all ranks can write.

    base: address of this rank's memory.  peers: the address at which this rank maps each rank's (its own included).
    status: address of `pyep.channels.memory.RECORD`'s words, in memory that kernels write and the host reads.
    """

    name = ""

    def fill(self, offset, nbytes, value):
        """Set bytes of the own memory to `value` and wait until it is done."""
        raise NotImplementedError

    def write(self, offset, words):
        """Write a NumPy array of int64 into the own memory and wait until it is done."""
        raise NotImplementedError

    def read_status(self):
        """The words of the status block, as a list of ints.  Never waits for a GPU."""
        raise NotImplementedError

    def close(self, meet):
        """Unmap the peers' memory, call `meet()`, then free the own memory.  Idempotent, does not fail, leaks nothing."""
        raise NotImplementedError


def host_identity():
    """A string that is the same for ranks that can share memory: the boot of a kernel."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f.read().strip()
    except OSError:
        return os.uname().nodename


def require_one_host(bootstrap, name):
    """EPTransportError, on every rank, unless all ranks run on one host."""
    hosts = bootstrap.allgather(host_identity())
    others = [r for r, h in enumerate(hosts) if h != hosts[0]]
    if others:
        raise EPTransportError(f"transport {name!r} needs all ranks on one host, but ranks {others} run on another than rank 0")


class MpiBootstrap:
    """Ranks that find each other through an mpi4py communicator (a duplicate of it: our messages never meet the caller's)."""

    def __init__(self, comm):
        self._comm = comm.Dup()
        self.rank, self.size = comm.rank, comm.size
        self._tags = itertools.cycle(range(1, 32768))            # MPI promises tags up to 32767

    def allgather(self, value):
        """The values of all ranks, in rank order; collective."""
        return self._comm.allgather(value)

    def meet(self, timeout_s, what, word=0):
        """Return once every rank has called it; EPTimeoutError that names who did not.  Returns all ranks' `word`s (int64).

        Messages to and from everyone instead of MPI's barrier: that one cannot say who is missing.
        """
        from mpi4py import MPI
        tag, words = next(self._tags), np.zeros(self.size, np.int64)
        words[self.rank] = word
        own = words[self.rank:self.rank + 1].copy()
        peers = [r for r in range(self.size) if r != self.rank]
        receives = [self._comm.Irecv([words[r:r + 1], MPI.INT64_T], r, tag) for r in peers]
        sends = [self._comm.Isend([own, MPI.INT64_T], r, tag) for r in peers]
        deadline, here = time.monotonic() + timeout_s, [False] * len(peers)
        while not all(here) or not MPI.Request.Testall(sends):
            here = [done or request.Test() for done, request in zip(here, receives)]
            if time.monotonic() > deadline:
                for request, done in zip(receives, here):
                    if not done:
                        request.Cancel()
                missing = [r for r, done in zip(peers, here) if not done]
                raise EPTimeoutError(f"{what}: rank {self.rank} waited {timeout_s:g} s for ranks {missing}, which have not come")
            time.sleep(20e-6)
        return words.tolist()

    def close(self):
        """Collective in MPI's eyes, so only called when all ranks have met just before."""
        self._comm.Free()


class TorchBootstrap:
    """Ranks that find each other through a torch.distributed process group; a gloo group beside it carries host messages."""

    def __init__(self, group):
        import torch.distributed as dist
        self._dist = dist
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)

    def allgather(self, value):
        values = [None] * self.size
        self._dist.all_gather_object(values, value, group=self._group)
        return values

    def meet(self, timeout_s, what, word=0):
        try:
            self._dist.monitored_barrier(self._group, timedelta(seconds=timeout_s), wait_all_ranks=True)
        except RuntimeError as error:
            raise EPTimeoutError(f"{what}: rank {self.rank} waited {timeout_s:g} s for the other ranks: {error}") from error
        return self.allgather(word)

    def close(self):
        self._dist.destroy_process_group(self._group)
