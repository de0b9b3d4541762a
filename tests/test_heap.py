"""The heap: slabs never overlap, are aligned, come back with their last array, and leave the operations' room alone."""
import gc
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyep import arrays
from pyep.events import moments
from pyep.heap import Heap
from pyep.layout import LINE, operations_room

HEAPS = st.tuples(st.integers(0, 1000), st.integers(0, 20_000))                 # offset, bytes
ROOM = 5                                        # lines of the operations' room in `heap_of`


def heap_of(results, memory=None):
    """A heap whose results' room has so many lines, from byte 128 + 5 * 128 on."""
    heap = Heap(LINE, (ROOM + results) * LINE, memory)
    heap.operations_room = ROOM * LINE          # the rule leaves them less or more
    heap._free = type(heap._free)((LINE + ROOM * LINE, LINE + (ROOM + results) * LINE))
    return heap


def free(heap):
    """The lengths in lines of what can be lent now, found by borrowing all of it."""
    slabs, found = [], []
    for lines in range(heap.nbytes // LINE, 0, -1):
        while (slab := heap.lend(lines * LINE)) is not None:
            slabs.append(slab)
            found.append(lines)
    return found


@given(st.integers(0, 10**12))
def test_two_rooms(nbytes):
    """The operations' room is a third, in whole lines; three times as much as an operation needs has room for it."""
    assert operations_room(nbytes) % LINE == 0 and nbytes / 3 - LINE < operations_room(nbytes) <= nbytes / 3
    assert operations_room(3 * LINE * nbytes) == LINE * nbytes


@given(HEAPS, st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 9)), max_size=60))
def test_slabs(given_heap, steps):
    """Steps borrow, and drop one of the slabs held now and then; at the end everything is free, in one piece."""
    offset, nbytes = given_heap
    heap, held = Heap(*given_heap), []
    assert offset <= heap.offset < offset + LINE and heap.offset + heap.nbytes <= max(offset + nbytes, heap.offset)
    assert heap.nbytes // LINE == max(0, (offset + nbytes) // LINE - -(-offset // LINE))
    results = heap.nbytes - heap.operations_room
    for wanted, drop in steps:
        largest = max(free(heap), default=0) * LINE
        slab = heap.lend(wanted)
        assert (slab is None) == (max(wanted, 1) > largest)
        if slab is not None:
            assert slab.offset % LINE == slab.nbytes % LINE == 0 and max(wanted, 1) <= slab.nbytes < max(wanted, 1) + LINE
            assert heap.offset + heap.operations_room <= slab.offset and slab.offset + slab.nbytes <= heap.offset + heap.nbytes
            assert all(slab.offset + slab.nbytes <= s.offset or s.offset + s.nbytes <= slab.offset for s in held)
            held.append(slab)
        del slab
        if drop < len(held):
            del held[drop]
        assert sum(free(heap)) * LINE == results - sum(s.nbytes for s in held)
    held.clear()
    assert free(heap) == [results // LINE] * (results > 0)


def test_first_fit_and_joining_by_hand():
    heap = heap_of(10)
    a, b, c = (heap.lend(n * LINE) for n in (2, 3, 4))
    assert [s.offset for s in (a, b, c)] == [6 * LINE, 8 * LINE, 11 * LINE]
    del b                                               # 3 lines in the middle, 1 at the end
    assert free(heap) == [3, 1] and heap.lend(4 * LINE) is None
    d = heap.lend(LINE)
    assert d.offset == 8 * LINE                         # the first place where it fits, not the tightest
    del a, d
    assert free(heap) == [5, 1]                         # joined on both sides
    del c
    assert heap.lend(10 * LINE).offset == 6 * LINE


def test_memory_of_graphs():
    """What was lent while capturing stays with graphs, whoever still refers to it."""
    heap = heap_of(10)
    a = heap.lend(2 * LINE)
    heap.capturing = True
    b, c = heap.lend(3 * LINE), heap.lend(LINE)
    assert (b.offset, c.offset) == (8 * LINE, 11 * LINE)
    del b
    d = heap.lend(2 * LINE)                             # from what the graph has given back, before anything else
    assert d.offset == 8 * LINE
    heap.capturing = False
    del a, d
    assert free(heap) == [4, 2]                         # behind c, and of a
    assert heap.lend(3 * LINE).offset == 12 * LINE
    heap.capturing = True
    assert heap.lend(3 * LINE).offset == 8 * LINE


@pytest.mark.parametrize("nbytes", [0, 1, 127])
def test_no_memory(nbytes):
    heap = Heap(1000, nbytes)
    assert heap.nbytes == heap.operations_room == 0 and heap.lend(0) is None


def test_a_slab_lives_as_long_as_the_last_array():
    memory = np.zeros(48 * LINE, np.uint8)
    heap = Heap(0, 48 * LINE, memory)                   # results: from line 16 on
    slab = heap.lend(8 * LINE)
    assert slab.memory is memory
    whole = arrays.view(arrays.Memory("cpu", memory.ctypes.data + slab.offset, (slab.nbytes,), slab), np.int32, None, 0)
    del slab
    part = whole[3:5].reshape(2, 1)
    assert free(heap) == [24]
    del whole
    assert free(heap) == [24]
    part[:] = 7
    assert memory.view(np.int32)[16 * LINE // 4 + 3] == 7       # not copied
    del part
    assert free(heap) == [32]


def test_a_slab_comes_back_in_a_cycle_and_from_another_thread():
    """Wherever the last reference dies; also while memory is lent, when garbage is collected."""
    heap = heap_of(4)

    class Holder:
        pass
    holder = Holder()
    holder.self, holder.slab = holder, heap.lend(4 * LINE)
    del holder
    gc.collect()
    slabs = [heap.lend(LINE) for _ in range(4)]
    thread = threading.Thread(target=slabs.clear)
    thread.start()
    thread.join()
    assert free(heap) == [4]


def test_the_moment_of_return():
    """An event from before it does not say that the GPU is done with the memory."""
    heap = heap_of(4)
    slab = heap.lend(1)
    before = next(moments)
    assert heap.lend(4 * LINE) is None and heap.returned < before
    del slab
    assert heap.lend(4 * LINE) is not None and before < heap.returned < next(moments)
