"""Transport "host", for the CPU engine: shared memory between the processes of a node, ports through MPI between nodes.

The memory has no name: each rank opens its peers' through /proc, then closes the files.  So the kernel frees it with the
last process that maps it, however that process ends, and nothing can be left in /dev/shm.
"""
import ctypes
import mmap
import os
import tempfile

import numpy as np

from ..errors import EPTransportError
from ..layout import WORD, align, control
from .memory import HOST_WORDS, STATUS_WORDS
from .transport import Transport, channels_per_peer, num_proxies, require_port_offsets, require_same_settings


def _anonymous_file(nbytes):
    """(file descriptor, path by which other processes of this host open it, whether it must be unlinked once all have)."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("pyep")
        path, named = f"/proc/{os.getpid()}/fd/{fd}", False
    else:
        fd, path = tempfile.mkstemp(prefix="pyep-")
        named = True
    os.ftruncate(fd, nbytes)                                     # sparse: only pages that are touched cost memory
    return fd, path, named


class HostTransport(Transport):
    """Shared memory of a host's processes, and MPI."""

    name = "host"
    parts_in_stages = False

    def __init__(self, nodes, nbytes, timeout_s, queue_pairs):
        self.nodes, self.nbytes, self._timeout_s, self._queue_pairs = nodes, nbytes, timeout_s, queue_pairs
        self._bytes, self._ports, self.memory = [], None, None

    def connect(self, bootstrap):
        channels_at = align(self.nbytes)
        self._map_all(bootstrap, channels_at + self.channel_bytes(bootstrap.size))
        self.peers = [0 if b is None else b.ctypes.data for b in self._bytes]
        self.base = self.peers[bootstrap.rank]
        self._own = self.memory = self._bytes[bootstrap.rank]
        self.record, self.answer = (ctypes.c_int64 * STATUS_WORDS)(), (ctypes.c_int64 * HOST_WORDS)()
        self.status, self.answers = ctypes.addressof(self.record), ctypes.addressof(self.answer)
        self.make_channels(channels_at)
        self.ports = [0] * bootstrap.size
        if self.nodes.count > 1:
            self._open_ports(bootstrap)

    def _map_all(self, bootstrap, nbytes):
        """Make this rank's memory, and map that of its node's other ranks."""
        nbytes += -nbytes % mmap.PAGESIZE
        fd, path, named = _anonymous_file(nbytes)
        try:
            paths = bootstrap.allgather(path, self._timeout_s, "Buffer: exchanging shared memory")
            for rank, theirs in enumerate(paths):
                here = self.nodes.holds(rank)
                self._bytes.append(self._map(fd if rank == bootstrap.rank else None, theirs, nbytes, rank) if here else None)
            bootstrap.meet(self._timeout_s, "Buffer: mapping the peers' shared memory")
        finally:
            os.close(fd)
            if named:
                os.unlink(path)

    @staticmethod
    def _map(fd, path, nbytes, rank):
        """A rank's memory as an array of bytes, which keeps it mapped."""
        try:
            theirs = os.open(path, os.O_RDWR) if fd is None else os.dup(fd)
        except OSError as error:
            raise EPTransportError(f"cannot open the shared memory of rank {rank} ({path}): {error}. Ranks must run as one user "
                                   "in one container (one PID namespace)") from error
        try:
            return np.frombuffer(mmap.mmap(theirs, nbytes), np.uint8)
        finally:
            os.close(theirs)

    def _open_ports(self, bootstrap):
        require_port_offsets(self.nbytes)
        settings = dict(PYEP_NUM_PROXIES=num_proxies(), num_qps_per_rank=channels_per_peer(self._queue_pairs))
        require_same_settings(bootstrap, settings, self._timeout_s)
        if not hasattr(bootstrap.board, "lane"):
            raise EPTransportError("between nodes the CPU engine needs an MPI communicator, since its ports send through MPI: pass "
                                   "comm= instead of group=")
        from .host_ports import HostPorts                        # which needs an MPI library
        lane = bootstrap.board.lane(bootstrap, self._timeout_s)
        at = control(bootstrap.size)["failed"].offset
        failed = self._own[at:at + WORD].view(np.int64)
        self._ports = HostPorts(bootstrap.board.comm, lane, self.nodes, self._own[:self.nbytes], failed, self._queue_pairs)
        self.ports = self._ports.ports
        self._ports.start()

    def fill(self, offset, nbytes, value):
        self._own[offset:offset + nbytes] = value

    def write(self, offset, words):
        self._own[offset:offset + words.nbytes] = words.view(np.uint8)

    def check(self):
        if self._ports is not None:
            self._ports.check()

    def port_state(self, rank):
        return self._ports.state(rank)

    def parting(self, failed):
        """Only ports wait for anything.  Memory need not: the system frees it with the last mapping."""
        def let_go():
            if self._ports is not None:
                self._ports.close(failed, self._timeout_s)
            self._let_go()
        return [let_go]

    def drop(self):
        if self._ports is not None:
            self._ports.end()
        self._let_go()
        return []

    def _let_go(self):
        """Unmapped with the last reference to it."""
        self._own = self.memory = self._bytes = self._ports = None
