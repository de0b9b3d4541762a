"""The heap: slabs never overlap, are aligned, and come back with their last array."""
import gc
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyep import EPBufferTooSmallError, arrays
from pyep.events import moments
from pyep.heap import Heap
from pyep.layout import LINE

HEAPS = st.tuples(st.integers(0, 1000), st.integers(0, 20_000))                 # offset, bytes


def lines(heap):
    """Whole lines of a heap."""
    return heap.nbytes // LINE


@given(HEAPS, st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 9)), max_size=60))
def test_slabs(given_heap, steps):
    """Steps allocate, and drop one of the slabs held now and then; at the end everything is free, in one piece."""
    offset, nbytes = given_heap
    heap, held = Heap(*given_heap), []
    whole = lines(heap)
    assert offset <= heap.offset < offset + LINE and heap.offset + heap.nbytes <= max(offset + nbytes, heap.offset)
    assert (offset + nbytes) // LINE - -(-offset // LINE) == whole or whole == 0
    for wanted, drop in steps:
        before = heap.largest()
        try:
            slab = heap.allocate(wanted)
        except EPBufferTooSmallError:
            assert max(wanted, 1) > before
        else:
            assert max(wanted, 1) <= before
            assert slab.offset % LINE == slab.nbytes % LINE == 0 and wanted <= slab.nbytes < max(wanted, 1) + LINE
            assert heap.offset <= slab.offset and slab.offset + slab.nbytes <= heap.offset + heap.nbytes
            assert all(slab.offset + slab.nbytes <= s.offset or s.offset + s.nbytes <= slab.offset for s in held)
            held.append(slab)
            del slab
        if drop < len(held):
            del held[drop]
        assert heap.free() == heap.nbytes - sum(s.nbytes for s in held)
        assert heap.largest() <= heap.free()
    held.clear()
    assert heap.free() == heap.largest() == heap.nbytes


def test_first_fit_and_joining_by_hand():
    heap = Heap(128, 10 * LINE)
    a, b, c = (heap.allocate(n * LINE) for n in (2, 3, 4))
    assert [s.offset for s in (a, b, c)] == [1 * LINE, 3 * LINE, 6 * LINE]
    del b                                               # 3 lines in the middle, 1 at the end
    assert heap.largest() == 3 * LINE and heap.free() == 4 * LINE
    with pytest.raises(EPBufferTooSmallError, match=r"512 bytes .* hold 768, 512 are free, at most 384 in one piece"):
        heap.allocate(4 * LINE)
    d = heap.allocate(LINE)
    assert d.offset == 3 * LINE                         # the first place where it fits, not the tightest
    del a, d
    assert heap.largest() == 5 * LINE                   # joined on both sides
    del c
    assert heap.allocate(10 * LINE).offset == 128


def test_memory_of_graphs():
    """What was lent while capturing stays with graphs, whoever still refers to it."""
    heap = Heap(128, 10 * LINE)
    a = heap.allocate(2 * LINE)
    heap.capturing = True
    b, c = heap.allocate(3 * LINE), heap.allocate(LINE)
    assert (b.offset, c.offset) == (3 * LINE, 6 * LINE)
    del b
    d = heap.allocate(2 * LINE)                         # from what the graph has given back, before anything else
    assert d.offset == 3 * LINE
    heap.capturing = False
    del a, d
    assert heap.free() == 2 * LINE + 4 * LINE           # of a, and behind c
    assert heap.allocate(3 * LINE).offset == 7 * LINE
    heap.capturing = True
    assert heap.free() == 2 * LINE + 4 * LINE + 3 * LINE and heap.allocate(3 * LINE).offset == 3 * LINE


@pytest.mark.parametrize("nbytes", [0, 1, 127])
def test_no_memory(nbytes):
    heap = Heap(1000, nbytes)
    assert heap.free() == heap.largest() == heap.nbytes == 0
    with pytest.raises(EPBufferTooSmallError, match="128 bytes"):
        heap.allocate(0)


def test_a_slab_lives_as_long_as_the_last_array():
    memory = np.zeros(32 * LINE, np.uint8)
    heap = Heap(0, 32 * LINE, memory)
    slab = heap.allocate(8 * LINE)
    assert slab.memory is memory
    whole = arrays.view(arrays.Memory("cpu", memory.ctypes.data + slab.offset, (slab.nbytes,), slab), np.int32, None, 0)
    del slab
    part = whole[3:5].reshape(2, 1)
    assert heap.free() == 24 * LINE
    del whole
    assert heap.free() == 24 * LINE
    part[:] = 7
    assert memory.view(np.int32)[3] == 7        # not copied
    del part
    assert heap.free() == 32 * LINE


def test_a_slab_comes_back_in_a_cycle_and_from_another_thread():
    """Wherever the last reference dies; also in the middle of an allocation, when garbage is collected."""
    heap = Heap(0, 4 * LINE)

    class Holder:
        pass
    holder = Holder()
    holder.self, holder.slab = holder, heap.allocate(4 * LINE)
    del holder
    gc.collect()
    slabs = [heap.allocate(LINE) for _ in range(4)]
    thread = threading.Thread(target=slabs.clear)
    thread.start()
    thread.join()
    assert heap.largest() == 4 * LINE


def test_the_moment_of_return():
    """An event from before it does not say that the GPU is done with the memory."""
    heap = Heap(0, 4 * LINE)
    slab = heap.allocate(1)
    before = next(moments)
    assert heap.free() < heap.nbytes and heap.returned < before
    del slab
    assert heap.free() == heap.nbytes and before < heap.returned < next(moments)
