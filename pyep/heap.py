"""The heap: num_nvl_bytes of symmetric memory, in two rooms (`pyep.layout.operations_room`).

The *operations' room* is for what peers write while an operation runs: all of it, for every operation anew, since the operations
of a buffer follow each other on the device.  So no operation ever lacks room because of what came before it: either it is larger
than the room, or it runs.

The *results' room* is lent out in slabs, which come back by themselves once nothing refers to them any more.  As long as there is
space, peers write the results of a dispatch into slabs of it: nothing is copied, and arrays live as long as arrays do, since each
keeps its slab (`pyep.arrays.Library.lent`).  Where there is none, they write into the operations' room, and what has come is copied
out of it, into memory of the caller's library.

Nothing here waits for a GPU.  As with any allocator that follows a stream, memory that comes back while a GPU still uses it is
safe to lend out for operations that come later on the same stream: peers write into a slab only once a kernel of this rank has
told them where it is.

Operations in a CUDA graph write into their slabs whenever the graph is replayed, also when nothing here refers to them any more.
So what was lent while capturing is only lent again while capturing: to later operations of that graph, or of others (graphs of one
buffer are not replayed side by side, as its operations must be ordered).  The operations' room needs no such care.
"""
import bisect
import collections

from .events import moments
from .layout import LINE, align, operations_room


class Slab:
    """Bytes `offset` to `offset + nbytes` of the symmetric memory, for one array (`pyep.arrays.Library.lent`), which keeps it.

    memory: what must live as long as they are in use.
    """

    __slots__ = "offset", "nbytes", "memory", "_captured", "_back", "__array_interface__", "__cuda_array_interface__"

    def __init__(self, offset, nbytes, memory, captured, back):
        self.offset, self.nbytes, self.memory, self._captured, self._back = offset, nbytes, memory, captured, back

    def __del__(self, moment=moments.__next__):
        # Garbage collection comes here at any time, in the middle of `Heap.lend` too: so this only appends.
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


class Heap:
    """`nbytes` of symmetric memory from byte `offset` on, of which the first `operations_room` are the operations' room.

    capturing: whether what is lent now goes into a graph; the caller sets it.
    """

    def __init__(self, offset, nbytes, memory=None):
        """memory: an object that every slab keeps alive, or None."""
        end = (offset + nbytes) // LINE * LINE
        self.offset = align(offset)
        self.nbytes = max(0, end - self.offset)
        self.operations_room = operations_room(self.nbytes)
        self.capturing = False
        self.returned = 0                                        # the moment at which a slab came back last, see `pyep.events`
        self._memory = memory
        self._free = Stretches(*[(self.offset + self.operations_room, end)] if self.nbytes else [])
        self._free_in_graphs = Stretches()
        self._back = collections.deque()                         # slabs that have come back: (begin, end, captured, moment)

    def lend(self, nbytes):
        """A slab of at least `nbytes` in the results' room, first fit, in whole lines of 128 bytes; None if there is no space."""
        while self._back:                                        # what has come back is free
            begin, end, captured, self.returned = self._back.popleft()
            (self._free_in_graphs if captured else self._free).put(begin, end)
        size = align(max(nbytes, 1))
        begin = self._free_in_graphs.take(size) if self.capturing else None
        if begin is None:
            begin = self._free.take(size)
        return None if begin is None else Slab(begin, size, self._memory, self.capturing, self._back)

    def lend_all(self, sizes):
        """A slab for each of these sizes; None, and none is lent, if there is no space for all."""
        slabs = []
        for nbytes in sizes:
            slab = self.lend(nbytes)
            if slab is None:
                return None
            slabs.append(slab)
        return slabs

    def let_go(self):
        """Of the memory, which lives on as long as slabs do."""
        self._memory = None
