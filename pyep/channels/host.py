"""Transport "host": shared memory between the processes of one host, for the CPU engine.

The memory has no name: each rank opens its peers' through /proc, then closes the files.  So the kernel frees it with the
last process that maps it, however that process ends, and nothing can be left in /dev/shm.
"""
import ctypes
import mmap
import os
import tempfile

import numpy as np

from ..errors import EPTransportError
from .memory import HOST_WORDS, RECORD
from .transport import Transport, require_one_host


def _anonymous_file(nbytes):
    """(file descriptor, path by which other processes of this host open it); unlinked once all have."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("pyep")
        path, named = f"/proc/{os.getpid()}/fd/{fd}", False
    else:
        fd, path = tempfile.mkstemp(prefix="pyep-")
        named = True
    os.ftruncate(fd, nbytes)                                     # sparse: only pages that are touched cost memory
    return fd, path, named


class HostTransport(Transport):
    """Shared memory of one host."""

    name = "host"

    def __init__(self, bootstrap, nbytes, timeout_s):
        require_one_host(bootstrap, self.name, timeout_s)
        nbytes += -nbytes % mmap.PAGESIZE
        fd, path, named = _anonymous_file(nbytes)
        try:
            paths = bootstrap.allgather(path, timeout_s, "Buffer: exchanging shared memory")
            self._maps = [self._map(fd if r == bootstrap.rank else None, p, nbytes, r) for r, p in enumerate(paths)]
            bootstrap.meet(timeout_s, "Buffer: mapping the peers' shared memory")
        finally:
            os.close(fd)
            if named:
                os.unlink(path)
        self._bytes = [np.frombuffer(m, np.uint8) for m in self._maps]
        self.peers = [b.ctypes.data for b in self._bytes]
        self.base = self.peers[bootstrap.rank]
        self._own = self.memory = self._bytes[bootstrap.rank]
        self.record, self.answer = (ctypes.c_int64 * len(RECORD))(), (ctypes.c_int64 * HOST_WORDS)()
        self.status, self.answers = ctypes.addressof(self.record), ctypes.addressof(self.answer)

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

    def fill(self, offset, nbytes, value):
        self._own[offset:offset + nbytes] = value

    def write(self, offset, words):
        self._own[offset:offset + words.nbytes] = words.view(np.uint8)

    def close(self, meet):
        self._own = self.memory = self._bytes = self._maps = None             # unmapped with the last reference to it
        meet()
