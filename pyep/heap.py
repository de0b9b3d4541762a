"""The heap: symmetric memory lent out in slabs, which come back by themselves once nothing refers to them any more.

The results of a high-throughput operation lie in a slab of this rank's symmetric memory, where the peers wrote them.  So nothing
is copied, and arrays live as long as arrays do: each keeps its slab (`pyep.arrays.Memory.owner`), and the slab whose last array
has died may be lent out again.

Nothing here waits for a GPU.  As with any allocator that follows a stream, memory that comes back while a GPU still uses it is
safe to lend out for operations that come later on the same stream: peers write into a slab only once a kernel of this rank has
told them where it is.
"""
import bisect
import collections

from .errors import EPBufferTooSmallError
from .events import moments
from .layout import LINE, align


class Slab:
    """Bytes `offset` to `offset + nbytes` of the symmetric memory; `memory` is what must live as long as they are in use."""

    __slots__ = "offset", "nbytes", "memory", "_back"

    def __init__(self, offset, nbytes, memory, back):
        self.offset, self.nbytes, self.memory, self._back = offset, nbytes, memory, back

    def __del__(self, moment=moments.__next__):
        # Garbage collection comes here at any time, in the middle of `Heap.allocate` too: so this only appends.
        self._back.append((self.offset, self.offset + self.nbytes, moment()))


class Heap:
    """`nbytes` of symmetric memory from byte `offset` on, lent out first fit, in whole lines of 128 bytes."""

    def __init__(self, offset, nbytes, memory=None):
        """memory: an object that every slab keeps alive, or None."""
        end = (offset + nbytes) // LINE * LINE
        self.offset = align(offset)
        self.nbytes = max(0, end - self.offset)
        self.returned = 0                                        # the moment at which a slab came back last, see `pyep.events`
        self._memory = memory
        self._free = [(self.offset, end)] if self.nbytes else []                 # (begin, end), sorted, never touching each other
        self._back = collections.deque()                         # slabs that have come back: (begin, end, moment)

    def allocate(self, nbytes):
        """A slab of at least `nbytes`; EPBufferTooSmallError if no free stretch is as long."""
        self._collect()
        size = align(max(nbytes, 1))
        for i, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[i:i + 1] = [(begin + size, end)] if end - begin > size else []
                return Slab(begin, size, self._memory, self._back)
        raise EPBufferTooSmallError(f"{size} bytes in one piece are needed; {self.state()}")

    def largest(self):
        """Bytes of the largest slab that can be had now."""
        self._collect()
        return max((end - begin for begin, end in self._free), default=0)

    def free(self):
        """Bytes that are not lent out, in all."""
        self._collect()
        return sum(end - begin for begin, end in self._free)

    def state(self):
        """How full it is, in words."""
        free = self.free()
        return (f"of the {self.nbytes} that there are, results that are still referred to hold {self.nbytes - free}, {free} are "
                f"free, at most {self.largest()} in one piece")

    def _collect(self):
        """Put what has come back among what is free, joined with its neighbours."""
        while self._back:
            begin, end, self.returned = self._back.popleft()
            i = bisect.bisect(self._free, (begin, end))
            if i < len(self._free) and self._free[i][0] == end:
                end = self._free.pop(i)[1]
            if i > 0 and self._free[i - 1][1] == begin:
                i -= 1
                begin = self._free.pop(i)[0]
            self._free.insert(i, (begin, end))

