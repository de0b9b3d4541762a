"""The heap: symmetric memory lent out in slabs, which come back by themselves once nothing refers to them any more.

The results of a high-throughput operation lie in a slab of this rank's symmetric memory, where the peers wrote them.  So nothing
is copied, and arrays live as long as arrays do: each keeps its slab (`pyep.arrays.Memory.owner`), and the slab whose last array
has died may be lent out again.

Nothing here waits for a GPU.  As with any allocator that follows a stream, memory that comes back while a GPU still uses it is
safe to lend out for operations that come later on the same stream: peers write into a slab only once a kernel of this rank has
told them where it is.

Operations in a CUDA graph write into their slabs whenever the graph is replayed, also when nothing here refers to them any more.
So what was lent while capturing is only lent again while capturing: to later operations of that graph, or of others (graphs of one
buffer are not replayed side by side, as its operations must be ordered).
"""
import bisect
import collections

from .errors import EPBufferTooSmallError
from .events import moments
from .layout import LINE, align


class Slab:
    """Bytes `offset` to `offset + nbytes` of the symmetric memory; `memory` is what must live as long as they are in use."""

    __slots__ = "offset", "nbytes", "memory", "_captured", "_back"

    def __init__(self, offset, nbytes, memory, captured, back):
        self.offset, self.nbytes, self.memory, self._captured, self._back = offset, nbytes, memory, captured, back

    def __del__(self, moment=moments.__next__):
        # Garbage collection comes here at any time, in the middle of `Heap.allocate` too: so this only appends.
        self._back.append((self.offset, self.offset + self.nbytes, self._captured, moment()))


class Stretches:
    """What is free: stretches of bytes (begin, end), sorted, never touching each other."""

    def __init__(self, *stretches):
        self._stretches = list(stretches)

    def take(self, nbytes):
        """The beginning of so many bytes, first fit, which are free no longer; None if no stretch is as long."""
        for i, (begin, end) in enumerate(self._stretches):
            if end - begin >= nbytes:
                self._stretches[i:i + 1] = [(begin + nbytes, end)] if end - begin > nbytes else []
                return begin
        return None

    def put(self, begin, end):
        """Bytes are free again; joined with their neighbours."""
        i = bisect.bisect(self._stretches, (begin, end))
        if i < len(self._stretches) and self._stretches[i][0] == end:
            end = self._stretches.pop(i)[1]
        if i > 0 and self._stretches[i - 1][1] == begin:
            i -= 1
            begin = self._stretches.pop(i)[0]
        self._stretches.insert(i, (begin, end))

    def lengths(self):
        return [end - begin for begin, end in self._stretches]


class Heap:
    """`nbytes` of symmetric memory from byte `offset` on, lent out first fit, in whole lines of 128 bytes.

    capturing: whether what is lent now goes into a graph; the caller sets it.
    """

    def __init__(self, offset, nbytes, memory=None):
        """memory: an object that every slab keeps alive, or None."""
        end = (offset + nbytes) // LINE * LINE
        self.offset = align(offset)
        self.nbytes = max(0, end - self.offset)
        self.capturing = False
        self.returned = 0                                        # the moment at which a slab came back last, see `pyep.events`
        self._memory = memory
        self._free = Stretches(*[(self.offset, end)] if self.nbytes else [])
        self._free_in_graphs = Stretches()
        self._back = collections.deque()                         # slabs that have come back: (begin, end, captured, moment)

    def allocate(self, nbytes):
        """A slab of at least `nbytes`; EPBufferTooSmallError if no free stretch is as long."""
        self._collect()
        size = align(max(nbytes, 1))
        begin = self._free_in_graphs.take(size) if self.capturing else None
        if begin is None:
            begin = self._free.take(size)
        if begin is None:
            raise EPBufferTooSmallError(f"{size} bytes in one piece are needed; {self.state()}")
        return Slab(begin, size, self._memory, self.capturing, self._back)

    def let_go(self):
        """Of the memory, which lives on as long as slabs do."""
        self._memory = None

    def largest(self):
        """Bytes of the largest slab that can be had now."""
        return max(self._lengths(), default=0)

    def free(self):
        """Bytes that can be had now, in all."""
        return sum(self._lengths())

    def state(self):
        """How full it is, in words."""
        free = self.free()
        return (f"of the {self.nbytes} that there are, results that are still referred to (or that graphs write) hold "
                f"{self.nbytes - free}, {free} are free, at most {self.largest()} in one piece")

    def _lengths(self):
        self._collect()
        return self._free.lengths() + (self._free_in_graphs.lengths() if self.capturing else [])

    def _collect(self):
        """Put what has come back among what is free."""
        while self._back:
            begin, end, captured, self.returned = self._back.popleft()
            (self._free_in_graphs if captured else self._free).put(begin, end)
