"""Kernels on the CPU: Numba compiles them, every GPU thread of every block is an OS thread running machine code."""
import ctypes
import hashlib
import inspect
import os
import pickle
import threading

import numba
from numba import int64, void
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from ..layout import MAX_BLOCKS
from . import cache, llvm
from .op import Cpu, bind

COMPILED = {}                                   # all that this process has compiled or loaded (Numba's dispatchers), by name


def compile_kernel(fn, machine, constants, nogil=True):
    """`fn` as a Numba function over int64 that releases the interpreter lock (or not): made once in a process, and from the disk
    cache if it is there."""
    name = cache.key(fn, machine, constants)
    with cache.LOCK:
        if (name, nogil) not in COMPILED:
            bound = bind(fn, machine, **constants)
            bound.__name__ = bound.__qualname__ = name           # of which Numba makes symbols
            kernel = numba.njit(nogil=nogil, error_model="numpy")(bound)
            kernel._cache = OnDisk(name, kernel.targetctx.codegen().magic_tuple())
            with kernel._cache.file.locked():
                kernel.compile(void(*[int64] * len(inspect.signature(fn).parameters)))
            kernel.disable_compile()
            COMPILED[name, nogil] = kernel
        return COMPILED[name, nogil]


class OnDisk(NullCache):
    """Where Numba looks for what it has compiled of a function, and keeps it."""

    def __init__(self, name, target):
        self.file = cache.File("cpu", f"{name}.{hashlib.sha256(repr(target).encode()).hexdigest()[:8]}.code")

    def load_overload(self, sig, context):
        data = self.file.read()
        context.refresh()
        return data and CompileResult._rebuild(context, *pickle.loads(data))

    def save_overload(self, sig, compiled):
        if not compiled.library.has_dynamic_globals:             # addresses of this process
            self.file.write(dumps(compiled._reduce()))


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
