"""What is held between the operations: buffers, and of each the results, handles, hooks and events."""
import hashlib
import itertools

import numpy as np
from engine import choose_gpu, down, on_gpu
from high_throughput_case import assert_all_is_back

import pyep
from pyep.layout import control_bytes

from .promises import RESULTS_IN_HEAP
from .shapes import HT_MOST_TOKENS, low_latency_bytes


class World:
    """All buffers of a run, and what is left of those that were destroyed.

    step: the number of the current one.  all_modes: try all modes, not only those that other tests compile too.
    """

    def __init__(self, comm, seed, all_modes):
        self.comm, self.seed, self.all_modes, self.step = comm, seed, all_modes, -1
        self.buffers, self.left, self.destroyed = [], [], []     # destroyed: (low-latency handle, high-throughput handle)
        self.add_buffer()

    def add_buffer(self):
        self.buffers.append(Held(self.comm, self.step))

    def random(self):
        """Of this step alone, so that it draws the same when others are left out."""
        return np.random.default_rng([self.seed, self.step])

    def choose(self, items):
        """One of the items, by their `born`: mostly the same one when others are missing."""
        return min(items, key=lambda item: hashlib.blake2b(b"%d %d %d" % (self.seed, self.step, item.born), digest_size=8).digest())

    def check(self):
        """What was promised to live is what it was."""
        for held in self.buffers:
            for record in held.received + held.dispatched:
                if record.kept is not None and record.alive:
                    record.kept.check()
        for kept in self.left:
            kept.check()

    def end(self):
        """Destroy all buffers; what they have lent out has come back once nobody holds it, and all that was sent was taken out."""
        self.left.clear()
        self.destroyed.clear()
        for held in self.buffers:
            held.wait()
            for sent in held.sent:
                sent.hook()
                sent.complete()
            held.check_halves()
            held.forget()
            assert_all_is_back(held.buf)
            held.buf.destroy()


class Held:
    """A Buffer, and what is held of it.  It has memory for both families; `born`: the step that made it."""

    def __init__(self, comm, born):
        choose_gpu()
        self.born, ranks = born, comm.size
        nvl = pyep.Buffer.get_high_throughput_size_hint(HT_MOST_TOKENS, 128, ranks, 3, num_results=RESULTS_IN_HEAP)
        self.buf = pyep.Buffer(comm=comm, num_rdma_bytes=low_latency_bytes(ranks), num_nvl_bytes=nvl, low_latency_mode=True,
                               timeout_s=60)
        self.received = []              # of low-latency dispatches: `low_latency.Received`
        self.dispatched = []            # of high-throughput ones: `high_throughput.Dispatched`
        self.sent = []                  # low-latency operations whose hook was not called: `Sent`
        self.running = []               # operations with async_finish that were not waited for: `Running`
        self.numbers = itertools.count(1)
        self.last = 0                   # the number of the last low-latency operation
        self.counts = {}                # low-latency dispatches, by what their results share
        self.used = set()               # low-latency shapes for which the ranks have met
        self.event = None               # of the last operation

    def next_number(self):
        """Of a low-latency operation that is launched now."""
        self.last = next(self.numbers)
        return self.last

    @property
    def may_send(self):
        """Whether a low-latency operation is accepted: at most the last one may wait for its hook."""
        return all(sent.number == self.last for sent in self.sent)

    def wait(self):
        """For all operations with async_finish."""
        while self.running:
            self.running.pop(0).finish()

    def check_halves(self):
        """Nothing is on its way: both halves are as they were made ready, for the next operations to find no old words in them."""
        memory = down(self.buf.symmetric_memory(np.uint8))[control_bytes(self.buf.group_size):]
        for half in memory, memory[self.buf._connection.half_bytes:]:
            assert (half[:self.buf._ready_bytes] == 0xFF).all(), "a half of the symmetric memory has words that nobody has taken"

    def forget(self):
        """Let go of all results."""
        self.received, self.dispatched, self.sent, self.event = [], [], [], None


class Sent:
    """An operation that was sent and is received when `hook` is called; `complete` compares its results."""

    def __init__(self, born, number, words, hook, complete):
        self.born, self.number, self.words, self.hook, self.complete = born, number, words, hook, complete


class Running:
    """An operation with async_finish; `complete` compares its results."""

    def __init__(self, born, words, event, complete):
        self.born, self.words, self.event, self.complete = born, words, event, complete

    def finish(self, on_host=False):
        """Wait for it, on the host or on the current stream, and compare."""
        if on_host:
            self.event.synchronize()
        else:
            self.event.current_stream_wait()
        self.complete()


class Kept:
    """Arrays that were promised to live on, by name, and what was in them."""

    def __init__(self, words, **arrays):
        self.words, self.arrays, self.was = words, {}, {}
        for name, array in arrays.items():
            if array is not None:
                self.hold(name, array)

    def hold(self, name, array):
        self.arrays[name], self.was[name] = array, down(array).tobytes()

    def drop(self, name):
        del self.arrays[name], self.was[name]

    def check(self):
        for name, array in self.arrays.items():
            assert down(array).tobytes() == self.was[name], f"{name} of {self.words} has changed, though it is still held"


def wait_for_inputs():
    """Before an operation that waits only for an event, which may be from before its inputs were made."""
    if on_gpu():
        import cupy
        cupy.cuda.get_current_stream().synchronize()
