"""The interface of a transport, and how ranks find and meet each other on the host."""
import itertools
import os
import pickle
import time
from datetime import timedelta

import numpy as np

from ..errors import EPTimeoutError, EPTransportError
from ..layout import LINE, WORD
from .handles import MAX_OFFSET, memory_handle


class Transport:
    """Symmetric memory: `nbytes` on every rank.  A peer of this rank's node is *mapped*: its memory has an address here.  To any
    other, a *port peer*, there is a PortChannel.

    Made collectively, by (bootstrap, nodes, nbytes, timeout_s, queue_pairs); queue_pairs: the most PortChannels to one peer.

    nodes: which ranks are mapped, `pyep.channels.nodes.Nodes`.
    nbytes: as it was asked for; puts must stay inside.
    base: address of this rank's memory.  peers: the address at which this rank maps each rank's (its own too); 0 of port peers.
    channels: address of the MemoryChannel handle for each mapped peer but this rank itself, else 0.
    ports: address of the PortChannel handle for each port peer, else 0; there are `channels_per_peer(queue_pairs)`, one after
        another.  Handles are those of `pyep.channels.handles`, in memory that kernels read.
    orders_puts: whether a put is visible to a port peer before later puts of its channel.  Before later signals it always is.
    copies_by_kernels: whether a port peer's rank shares this GPU: puts to it are then kernels, which need room beside pyep's.
    memory: an object that keeps this rank's memory while it is referred to, also beyond `close`, for arrays that lie in it.
    status: address of `pyep.channels.memory.RECORD`'s words, in memory that kernels write and the host reads, as `record`.
    answers: address of HOST_WORDS words more in such memory, which the host reads as `answer`.
    """

    name = ""
    orders_puts, copies_by_kernels = True, False

    def fill(self, offset, nbytes, value):
        """Set bytes of the own memory to `value` and wait until it is done."""
        raise NotImplementedError

    def write(self, offset, words):
        """Write a NumPy array of int64 into the own memory and wait until it is done."""
        raise NotImplementedError

    def check(self):
        """EPTransportError if a proxy of this rank has failed."""

    def port_state(self, rank):
        """What to know of the proxy that serves a port peer, in words, when it does not answer."""
        raise NotImplementedError

    @staticmethod
    def channel_bytes(num_ranks):
        """Symmetric memory that `make_channels` needs."""
        return 2 * LINE * num_ranks

    def make_channels(self, offset):
        """Set `channels`.  Their semaphores and handles lie from byte `offset` of all ranks' memory on, which must be 0 there.

        For rank r two lines: the word to which r adds its signals; the word of those that were expected, and the handle.
        """
        self.channels = [0] * len(self.peers)
        for rank, peer in enumerate(self.peers):
            if peer and peer != self.base:
                mine = self.base + offset + 2 * LINE * rank
                remote = peer + offset + 2 * LINE * self.nodes.rank
                self.channels[rank] = mine + LINE + 2 * WORD
                words = memory_handle(mine, remote, mine + LINE, peer, self.base)
                self.write(self.channels[rank] - self.base, np.array(words, np.int64))

    def check_put(self, dst, src, nbytes):
        """ValueError unless a put stays inside the symmetric memory; dst, src, nbytes in bytes.  To be called before a kernel makes
        the put: for one that does not MSCCL++'s proxy ends the process."""
        for name, value in (("dst", dst), ("src", src), ("nbytes", nbytes)):
            if value < 0:
                raise ValueError(f"{name} is {value}; expected bytes, at least 0")
        for name, offset in (("dst", dst), ("src", src)):
            if offset + nbytes > self.nbytes:
                raise ValueError(f"{name} is {offset} and nbytes {nbytes}: beyond the {self.nbytes} bytes of symmetric memory")

    def close(self, meet):
        """Unmap the peers' memory, call `meet()`, and if that says that all ranks have come, free the own memory.

        Idempotent, does not fail.
        """
        raise NotImplementedError


def host_identity():
    """A string that is the same for ranks that can share memory: the boot of a kernel, and the process ids' namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return os.uname().nodename


def require_port_offsets(nbytes):
    """EPTransportError where the symmetric memory is too large for the offsets that triggers hold."""
    if nbytes > MAX_OFFSET:
        raise EPTransportError(f"{nbytes} bytes of symmetric memory between nodes; PortChannels reach {MAX_OFFSET} (4 GiB): make "
                               "num_rdma_bytes and num_nvl_bytes smaller")


def require_same_settings(bootstrap, settings, timeout_s):
    """ValueError, on every rank, unless all have the same settings, a dict of values by name.  Collective."""
    told = bootstrap.allgather(settings, timeout_s, "Buffer: comparing settings of ports")
    for name in settings:
        values = [theirs[name] for theirs in told]
        if len(set(values)) > 1:
            raise ValueError(f"{name} differs between ranks: {values}, by rank")


def num_proxies():
    """PYEP_NUM_PROXIES: the proxies among which a rank's port peers are dealt, each with a FIFO of its own."""
    text = os.environ.get("PYEP_NUM_PROXIES") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"PYEP_NUM_PROXIES is {text!r}; expected a positive number of proxies")
    return int(text)


def channels_per_peer(queue_pairs):
    """PortChannels to each port peer: as many as may be, each served by another proxy."""
    return min(queue_pairs, num_proxies())


def proxy_of(rank, peer, channel):
    """The proxy that serves a channel to a peer: the same number on both ranks, and different ones for a pair's channels."""
    return (rank + peer + channel) % num_proxies()


class MpiBootstrap:
    """Ranks that find each other through an mpi4py communicator (a duplicate of it: our messages never meet the caller's).

    Messages to and from everyone instead of MPI's collectives: those have no time limit and cannot say who is missing.
    """

    def __init__(self, comm, timeout_s):
        self.rank, self.size = comm.rank, comm.size
        self._tags = itertools.cycle(range(1, 32768))            # MPI promises tags up to 32767
        self._comm = comm
        self._comm = self.duplicate(timeout_s)

    def duplicate(self, timeout_s):
        """The communicator once more, for messages that meet no others."""
        comm, duplicated = self._comm.Idup()
        deadline = time.monotonic() + timeout_s
        while not duplicated.Test():
            if time.monotonic() > deadline:
                raise EPTimeoutError(f"Buffer: rank {self.rank} waited {timeout_s:g} s for the other ranks to make a Buffer too")
            time.sleep(20e-6)
        return comm

    def allgather(self, value, timeout_s, what):
        """The values (anything that can be pickled) of all ranks, in rank order; EPTimeoutError that names who did not come."""
        data = pickle.dumps(value)
        sizes = self.meet(timeout_s, what, len(data))
        received = [bytearray(n) for n in sizes]
        self._exchange(bytearray(data), received, timeout_s, what)
        return [value if r == self.rank else pickle.loads(d) for r, d in enumerate(received)]

    def meet(self, timeout_s, what, word=0):
        """Return once every rank has called it: all ranks' `word`s (int64).  EPTimeoutError that names who did not come."""
        words = np.zeros(self.size, np.int64)
        words[self.rank] = word
        self._exchange(words[self.rank:self.rank + 1].copy(), [words[r:r + 1] for r in range(self.size)], timeout_s, what)
        return words.tolist()

    def _exchange(self, mine, theirs, timeout_s, what):
        """Send the buffer `mine` to every rank, and receive theirs[r] from every rank r but this one."""
        from mpi4py import MPI
        tag, peers = next(self._tags), [r for r in range(self.size) if r != self.rank]
        receives = {r: self._comm.Irecv([theirs[r], MPI.BYTE], r, tag) for r in peers}
        sends = [self._comm.Isend([mine, MPI.BYTE], r, tag) for r in peers]
        deadline = time.monotonic() + timeout_s
        while receives or not MPI.Request.Testall(sends):
            receives = {r: request for r, request in receives.items() if not request.Test()}
            if time.monotonic() > deadline:
                for request in receives.values():
                    request.Cancel()
                self._abandoned = receives, sends, mine, theirs  # MPI may still look at them
                raise EPTimeoutError(f"{what}: rank {self.rank} waited {timeout_s:g} s for ranks {list(receives)}, which have not "
                                     "come")
            time.sleep(20e-6)

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

    def duplicate(self, timeout_s):
        raise EPTransportError("between nodes the CPU engine needs an MPI communicator, since its ports send through MPI: pass "
                               "comm= instead of group=")

    def allgather(self, value, timeout_s, what):
        self._wait(timeout_s, what)
        values = [None] * self.size
        self._dist.all_gather_object(values, value, group=self._group)
        return values

    def meet(self, timeout_s, what, word=0):
        return self.allgather(word, timeout_s, what)

    def _wait(self, timeout_s, what):
        try:
            self._dist.monitored_barrier(self._group, timedelta(seconds=timeout_s), wait_all_ranks=True)
        except RuntimeError as error:
            raise EPTimeoutError(f"{what}: rank {self.rank} waited {timeout_s:g} s for the other ranks: {error}") from error

    def close(self):
        self._dist.destroy_process_group(self._group)
