"""`Channels`: symmetric memory and channels between all ranks, for kernels of one's own.

    def swap(base, timeout, peer, port, mine, theirs, nbytes):                  # the first two arguments are given by `launch`
        watch = base, timeout, 0
        if thread_rank() == 0:
            put_with_signal(watch, ROOM, peer, port, theirs, mine, nbytes)      # from pyep.channels.port
            wait(watch, SIGNAL, peer, port)

    with Channels(comm=comm, nbytes=1 << 20, waits={ROOM: "room for a trigger", SIGNAL: "the peer's signal"}) as channels:
        peer, half = 1 - channels.rank, 1 << 19                                 # two ranks, each a node: PYEP_RANKS_PER_NODE=1
        channels.memory[:half] = channels.rank
        channels.launch(channels.kernel(swap), peer, channels.ports[peer], channels.offset, channels.offset + half, half)
        channels.synchronize()                                                  # channels.memory[half:] has the peer's

Device halves: `pyep.channels.port` and `pyep.channels.memory_channel`.  See also docs/kernel-language.md.
"""
import functools

import numpy as np

from . import arrays, layout
from .channels.boards import open_board
from .connection import Connection
from .errors import EPTimeoutError


class Channels:
    """Collective; group, comm, transport, timeout_s and num_qps_per_rank are `Buffer`'s.

    nbytes: of symmetric memory that kernels may use as they like.
    waits: {number: what is waited for, in words}: the numbers, not 0, that kernels give to waits; the words are for errors.

    rank, size, nodes: this rank, how many there are, which of them map each other's memory (`pyep.channels.nodes.Nodes`).
    engine, transport: their names.
    memory: this rank's bytes as an array [nbytes] of uint8 (NumPy, on GPUs CuPy).
    offset: where they begin in the symmetric memory.  Offsets of puts count from its beginning, and below are pyep's own words.
    ports, channels: addresses of handles by rank, 0 where there is none: of PortChannels to ranks of other nodes, of
        MemoryChannels to ranks of this node.
    """

    def __init__(self, group=None, comm=None, nbytes=0, waits=None, *, transport="auto", timeout_s=100.0, num_qps_per_rank=1):
        self._connection = connection = Connection(open_board(group, comm), 0, layout.align(nbytes), transport, timeout_s,
                                                   num_qps_per_rank)
        connection.close_with(self)
        self.rank, self.size, self.nodes = connection.rank, connection.size, connection.nodes
        connection.words_for.update({number: functools.partial(error_from, self.rank, connection.timeout_s, owed)
                                     for number, owed in (waits or {}).items()})
        self.engine, self.transport = connection.engine.name, connection.transport.name
        self.ports, self.channels = connection.transport.ports, connection.transport.channels
        self.offset = connection.heap.offset
        self.memory = self.array((nbytes,), np.uint8)

    def array(self, shape, dtype, offset=0):
        """Part of `memory` as an array of a shape and a NumPy dtype, not copied; offset: in `memory`, in bytes."""
        connection = self._connection
        at = connection.transport.base + self.offset
        whole = arrays.Memory(self.engine, at, (connection.heap.nbytes,), connection.transport.memory)
        return arrays.view(whole, dtype, shape, offset)

    def check_put(self, dst, src, nbytes):
        """ValueError unless a put of these arguments stays inside the symmetric memory."""
        self._connection.transport.check_put(dst, src, nbytes)

    def kernel(self, fn, blocks=1, threads=32, **constants):
        """A compiled kernel for `launch`.

        fn: a function of the kernel language, whose first arguments are those that `launch` gives.  threads: of each block; on the
        CPU engine PYEP_CPU_SHAPE says how many.  constants: the values of fn's template parameters.
        """
        control = layout.control(self.size)
        offsets = dict(STATUS=control["status"].offset, FAILED=control["failed"].offset)
        return self._connection.engine.kernel(fn, blocks, threads, **offsets, **constants)

    def launch(self, kernel, *args):
        """Launch a kernel with (address of the symmetric memory, timeout in ns, *args), all ints, on the current stream."""
        connection = self._connection
        connection.require_usable()
        stream = arrays.library_of(self.memory, "memory").stream()
        connection.launch(kernel, stream, connection.transport.base, connection.timeout_ns, *args)

    def synchronize(self):
        """Wait until what was launched has run.  EPTimeoutError if a wait gave up, EPTransportError if a proxy failed; from then on
        it can only be closed."""
        self._connection.engine.synchronize()
        self._connection.check()

    def meet(self):
        """Return once all ranks have called it."""
        self._connection.meet("Channels.meet")

    def close(self):
        """Free everything; idempotent.  As `Buffer.destroy`."""
        self.memory = None
        self._connection.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and self._connection.error is None:
            self._connection.error = error                       # the other ranks may never come: do not wait for them
        self.close()


def error_from(rank, timeout_s, owed, record):
    """The error that a wait gave up with, in words."""
    return EPTimeoutError(f"rank {rank} waited {timeout_s:g} s for rank {record['peer']}: {owed}; expected {record['expected']}, "
                          f"seen {record['seen']}")
