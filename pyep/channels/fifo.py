"""The FIFO of triggers between kernels and a proxy, in the memory of the process: what MSCCL++ makes for its own proxies."""
import functools

import numpy as np

from ..kernels.cpu import compile_kernel
from ..kernels.lang import st8_release
from ..kernels.op import Cpu
from ..layout import LINE
from .handles import TRIGGER_BYTES, decode
from .port import poll


def store(address, value):
    """Store a word that kernels acquire."""
    st8_release(address, value)


@functools.cache
def host_code(fn):
    """A function of the kernel language, compiled for threads of the host.  Calls keep the interpreter lock: to get it back from a
    busy main thread may take 5 ms."""
    return compile_kernel(fn, Cpu(), {}, nogil=False)


def lines(n):
    """`n` lines (of LINE bytes, aligned) of zeros: (array [n, LINE / 8] int64, addresses of the lines)."""
    raw = np.zeros(n * LINE + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    array = raw[start:start + n * LINE].view(np.int64).reshape(n, -1)
    return array, [array.ctypes.data + LINE * i for i in range(n)]


class Fifo:
    """A ring of triggers.  Positions count from 0 on and never wrap; position p has the slot p % size.

    triggers, head, tail, tail_cache: addresses, for handles.  The head is the next position to be claimed by a kernel, the tail
    the next to be taken by the proxy.
    """

    def __init__(self, size):
        """size: triggers that it holds, a power of two."""
        self.size = size
        self._slots, (self.triggers, *_) = lines(-(-size * TRIGGER_BYTES // LINE))
        self._words, (self.head, self.tail, self.tail_cache, out) = lines(4)
        self._taken, self._out, self._found = 0, out, self._words[3]
        self._poll, self._store = host_code(poll), host_code(store)

    def next(self):
        """The trigger at the tail, or None; it stays there until `pop`."""
        self._poll(self.triggers, self.size, self.size.bit_length() - 1, self._taken, self._out)
        there, first, second = self._found[:3].tolist()
        return decode(first, second) if there else None

    def pop(self):
        """The trigger at the tail was served: its slot may be used again."""
        self._taken += 1
        self._store(self.tail, self._taken)

    @property
    def position(self):
        """The tail."""
        return self._taken

    @property
    def empty(self):
        """Whether all that was pushed was served."""
        return self._words[0, 0] == self._words[1, 0]

    def state(self):
        """Head and tail, in words."""
        return f"FIFO head {self._words[0, 0]}, tail {self._words[1, 0]}"
