"""Kernels on the CPU: Numba compiles them, every GPU thread of every block is an OS thread running machine code."""
import ctypes
import inspect
import os
import threading

import numba
from numba import int64, void

from ..layout import MAX_BLOCKS
from . import cache, llvm
from .op import Cpu, bind


def compile_kernel(fn, machine, constants, nogil=True):
    """`fn` as a Numba function over int64 that releases the interpreter lock (or not); from the disk cache if it is there."""
    name, folder = cache.key(fn, machine, constants), cache.directory("cpu")
    bound = bind(fn, machine, **constants)
    bound.__name__ = bound.__qualname__ = name            # Numba's own cache looks at the name, not at the constants
    signature = void(*[int64] * len(inspect.signature(fn).parameters))
    saved, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        with cache.one_at_a_time(folder, name):
            return numba.njit(signature, nogil=nogil, error_model="numpy", cache=True)(bound)
    finally:
        numba.config.CACHE_DIR = saved


class CpuKernel:
    """A compiled kernel: `launch(stream, *ints)` runs it to its end (`stream` is for the GPU's sake, and ignored)."""

    def __init__(self, fn, blocks, machine, shared_bytes, constants):
        self.run = compile_kernel(fn, machine, constants)
        self._keep = []                                          # what the contexts point to
        self._contexts = [c for block in range(blocks) for c in self._block(block, blocks, machine, shared_bytes)]

    def _block(self, block, blocks, machine, shared_bytes):
        """The contexts of one block's threads, which share barriers, exchange words and shared memory."""
        barriers = llvm.barriers([machine.threads] + machine.threads // machine.warp * [machine.warp])
        exchange = (ctypes.c_int64 * machine.threads)()
        shared = (ctypes.c_int64 * (shared_bytes // 8 + 1))()
        self._keep += [barriers, exchange, shared]
        addresses = [ctypes.addressof(x) for x in (barriers, exchange, shared)]
        for thread in range(machine.threads):
            yield (ctypes.c_int64 * len(llvm.CONTEXT))(thread, block, blocks, *addresses)

    def launch(self, stream, *args):
        def thread(context):
            llvm.enter(context)
            self.run(*args)
        others = [threading.Thread(target=thread, args=(c,)) for c in self._contexts[1:]]
        for t in others:
            t.start()
        thread(self._contexts[0])
        for t in others:
            t.join()


class CpuEngine:
    """The CPU as an engine: `PYEP_CPU_SHAPE=blocks,threads,warp` (default 1,1,1, the fastest) is the shape of all launches."""

    name, index = "cpu", 0
    few_tokens = 0                                               # no kernels of their own for few tokens

    def __init__(self, shape=None):
        text = shape or os.environ.get("PYEP_CPU_SHAPE") or "1,1,1"
        try:
            self.blocks, threads, warp = (int(n) for n in text.split(","))
        except ValueError:
            raise ValueError(f"PYEP_CPU_SHAPE is {text!r}; expected blocks,threads,warp, for instance 2,8,4") from None
        if self.blocks > MAX_BLOCKS:
            raise ValueError(f"PYEP_CPU_SHAPE is {text!r}: at most {MAX_BLOCKS} blocks are possible")
        if min(self.blocks, threads, warp) < 1 or threads % warp or warp > 32 or warp & (warp - 1):
            raise ValueError(f"PYEP_CPU_SHAPE is {text!r}: the warp must be 1, 2, 4, 8, 16 or 32 and divide the threads")
        self.machine, self.warp = Cpu(threads, warp), warp

    def teams(self, row_bytes, tokens):
        """(cuts, teams, threads): how many parts a dispatch cuts a row into, how many teams the warps of a block form, and the
        threads of each.  More than one in wide shapes, to try it."""
        teams = 2 if self.machine.threads // self.warp % 2 == 0 else 1
        return teams, teams, self.machine.threads // teams

    def pieces_per_lane(self, row_bytes):
        """How many 16-byte pieces of a row a lane moves for its warp: all, so that a warp looks up once what it does with a row."""
        return -(-row_bytes // (16 * self.machine.warp))

    def neighbours(self, threads):
        """How many warps of a block move slices that lie next to each other."""
        return 1

    def phases(self, operation, threads, ranks):
        """(phase, blocks, how many of them send, how many receive) of each launch that an operation may need.

        Sending and receiving at once gains nothing where threads take turns on a few cores, so there is no "both".
        """
        return ("send", self.blocks, self.blocks, 0), ("receive", self.blocks, 0, self.blocks)

    def share(self, num_sms, registers=64):
        """(blocks, threads) of a kernel that may take so many multiprocessors: there are none here."""
        return self.blocks, self.machine.threads

    def part_bytes(self, row_bytes):
        """How much of a row a warp sends at a time: all; in shapes with warps less, to try it."""
        return row_bytes if self.warp == 1 else 128 * self.warp

    def senders(self, blocks, threads):
        """(blocks, warps of each) that send, where one launch sends and receives all the while."""
        return max(1, blocks - 1), max(1, threads // self.warp // 2)

    def kernel(self, fn, blocks, threads, shared_bytes=0, overlap=False, **constants):
        """A compiled kernel; `overlap` is for the GPU's sake, and ignored."""
        return CpuKernel(fn, blocks, self.machine, shared_bytes, constants)

    def use(self):
        """Any thread may launch."""

    def copy(self, to, source, nbytes, stream):
        """Copy bytes, both addresses in this process."""
        ctypes.memmove(to, source, nbytes)

    def synchronize(self):
        """Nothing runs once a call has returned."""
