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
from .memory import HOST_WORDS, RECORD
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

    def __init__(self, bootstrap, nodes, nbytes, timeout_s, queue_pairs):
        self.nodes, self.nbytes, self._timeout_s, self._ports = nodes, nbytes, timeout_s, None
        channels_at = align(nbytes)
        self._map_all(bootstrap, channels_at + self.channel_bytes(bootstrap.size), timeout_s)
        self.peers = [0 if b is None else b.ctypes.data for b in self._bytes]
        self.base = self.peers[bootstrap.rank]
        self._own = self.memory = self._bytes[bootstrap.rank]
        self.record, self.answer = (ctypes.c_int64 * len(RECORD))(), (ctypes.c_int64 * HOST_WORDS)()
        self.status, self.answers = ctypes.addressof(self.record), ctypes.addressof(self.answer)
        self.make_channels(channels_at)
        self.ports = [0] * bootstrap.size
        if self.nodes.count > 1:
            self._open_ports(bootstrap, queue_pairs)

    def _map_all(self, bootstrap, nbytes, timeout_s):
        """Make this rank's memory, and map that of its node's other ranks."""
        nbytes += -nbytes % mmap.PAGESIZE
        fd, path, named = _anonymous_file(nbytes)
        try:
            paths = bootstrap.allgather(path, timeout_s, "Buffer: exchanging shared memory")
            self._maps = [self._map(fd if r == bootstrap.rank else None, p, nbytes, r) if self.nodes.holds(r) else None
                          for r, p in enumerate(paths)]
            bootstrap.meet(timeout_s, "Buffer: mapping the peers' shared memory")
        finally:
            os.close(fd)
            if named:
                os.unlink(path)
        self._bytes = [None if m is None else np.frombuffer(m, np.uint8) for m in self._maps]

    @staticmethod
    def _map(fd, path, nbytes, rank):
        try:
            theirs = os.open(path, os.O_RDWR) if fd is None else os.dup(fd)
        except OSError as error:
            raise EPTransportError(f"cannot open the shared memory of rank {rank} ({path}): {error}. Ranks must run as one user "
                                   "in one container (one PID namespace)") from error
        try:
            return mmap.mmap(theirs, nbytes)
        finally:
            os.close(theirs)

    def _open_ports(self, bootstrap, queue_pairs):
        require_port_offsets(self.nbytes)
        settings = dict(PYEP_NUM_PROXIES=num_proxies(), num_qps_per_rank=channels_per_peer(queue_pairs))
        require_same_settings(bootstrap, settings, self._timeout_s)
        comm = bootstrap.duplicate(self._timeout_s)
        from .host_ports import HostPorts                        # which needs an MPI library
        at = control(bootstrap.size)["failed"].offset
        failed = self._own[at:at + WORD].view(np.int64)
        self._ports = HostPorts(comm, self.nodes, self._own[:self.nbytes], failed, queue_pairs)
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

    def close(self, meet):
        all_here = meet()
        if self._ports is not None:
            self._ports.close(all_here, self._timeout_s)
        self._own = self.memory = self._bytes = self._maps = self._ports = None             # unmapped with the last reference to it
