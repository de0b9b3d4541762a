"""Kernels on an NVIDIA GPU: numba-cuda writes PTX, nvJitLink makes machine code of it, the driver launches it.

`ptx` and `cubin` need no GPU.  Numba's own dispatcher is not used: it costs tens of microseconds a launch.  Nor is `cuda.core`'s
`launch`: with 20 arguments and a cooperative grid it takes 7.4 us on a machine with an H200, the driver's own call 3.7.
"""
import contextlib
import ctypes
import functools
import inspect
import math
import re
import struct
import threading
from types import SimpleNamespace

from cuda.bindings import driver, runtime
from cuda.core import Device, Event, Linker, LinkerOptions, ObjectCode, Stream, StreamOptions
from numba import cuda, types
from numba.cuda import dispatcher

from ..channels.gpu import call, current
from . import cache
from .op import CUDA, bind

SENDING = 5, 6                  # a fifth of a GPU fills the link to one peer, a sixth those to more: a row is loaded once for all
FILLING = 24                    # multiprocessors fill the link with a third of their warps
WARPS, FEW_WARPS = 28, 14       # of a block at most; with more than 28 a thread would have but 64 registers
FEW_TOKENS = 64                 # of all ranks: then it counts how soon kernels start, not how many loads are under way
REGISTERS = 65536               # of a multiprocessor
LARGE_SHARED = 48 << 10         # bytes of dynamic shared memory above which a kernel must ask for them
ROOM = 4                        # multiprocessors that suffice for copies within a GPU


def resident_blocks(threads):
    """How many blocks of so many threads a multiprocessor must have room for: beside small ones for those of the next kernel."""
    return 2 if threads <= 512 else 1


@contextlib.contextmanager
def compiling_for(cc):
    """Have Numba compile functions that a kernel calls for a GPU of compute capability `cc`, in one thread at a time.  It would ask
    the current GPU, and there need not be one."""
    with cache.LOCK:
        ask = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
        try:
            yield
        finally:
            dispatcher.get_current_device = ask


def ptx(fn, threads, cc=(9, 0), **constants):
    """PTX of a kernel for blocks of `threads`; its entry is named pyep_<function>."""
    signature = types.void(*[types.int64] * len(inspect.signature(fn).parameters))
    with compiling_for(cc):
        text, _ = cuda.compile_ptx(bind(fn, CUDA, **constants), signature, device=False, cc=cc,
                                   launch_bounds=(threads, resident_blocks(threads)))
    return text.replace(re.search(r"\.entry (\w+)", text)[1], "pyep_" + fn.__name__)


def link(text, cc=(9, 0)):
    """(machine code, the assembler's report of registers, stack and spills) of PTX."""
    options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}", ptxas_options=["-v"], verbose=True)
    linker = Linker(ObjectCode.from_ptx(text.encode()), options=options)
    return linker.link("cubin").code, linker.get_info_log()


def cubin(fn, threads, cc, constants):
    """Machine code of a kernel, from the disk cache if it is there."""
    file = cache.File("cuda", cache.key(fn, (CUDA, threads, cc), constants) + ".cubin")
    with cache.LOCK, file.locked():
        code = file.read()
        if code is None:
            code, _ = link(ptx(fn, threads, cc, **constants), cc)
            file.write(code)
        return code


class Loaded:
    """Machine code in the memory of one GPU, for all in this process that launch it."""

    def __init__(self, code, name, device):
        self.kernel = ObjectCode.from_cubin(code).get_kernel(name)
        self._name, self._device, self._allowed = name, device, LARGE_SHARED

    def allow_shared(self, nbytes):
        """Blocks may have so many bytes of shared memory from here on; and still as many as were allowed before."""
        if nbytes > self._allowed:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            error, = driver.cuKernelSetAttribute(attribute, nbytes, self.kernel.handle, driver.CUdevice(self._device))
            if error:
                raise RuntimeError(f"{self._name} needs {nbytes} bytes of shared memory per block: {error.name}")
            self._allowed = nbytes


LOADED = {}                                     # by name and GPU


def loaded(fn, threads, device, constants):
    """A kernel on a GPU, loaded once in a process."""
    key = cache.key(fn, (CUDA, threads, device.cc), constants), device.index
    with cache.LOCK:
        if key not in LOADED:
            LOADED[key] = Loaded(cubin(fn, threads, device.cc, constants), "pyep_" + fn.__name__, device.index)
        return LOADED[key]


class CudaKernel:
    """A compiled kernel on one GPU: `launch(stream, *ints)`, `stream` being a CUstream as an int."""

    def __init__(self, fn, device, blocks, threads, shared_bytes, overlap, constants):
        code = loaded(fn, threads, device, constants)
        code.allow_shared(shared_bytes)
        self._kernel = code.kernel
        resident = self._kernel.occupancy.max_active_blocks_per_multiprocessor(threads, shared_bytes) * device.multiprocessors
        if blocks > resident:
            raise RuntimeError(f"{fn.__name__} wants {blocks} blocks of {threads} threads at once; this GPU holds {resident}")
        self._name, count = fn.__name__, len(inspect.signature(fn).parameters)
        self._function = driver.CUfunction(int(self._kernel.handle))
        self._config = launch_config(blocks, threads, shared_bytes, overlap)
        # The arguments, where the driver copies them from: written anew for each launch, since it has copied them when it returns.
        self._arguments, self._pack = (ctypes.c_int64 * count)(), struct.Struct(f"{count}q").pack_into
        begin = ctypes.addressof(self._arguments)
        self._addresses = (ctypes.c_void_p * count)(*range(begin, begin + 8 * count, 8))
        self._at_addresses = ctypes.addressof(self._addresses)

    def launch(self, stream, *args):
        self._pack(self._arguments, 0, *args)
        self._config.hStream = stream
        error, = driver.cuLaunchKernelEx(self._config, self._function, self._at_addresses, 0)
        if error:
            raise RuntimeError(f"the launch of {self._name} failed: {error.name}")


def launch_config(blocks, threads, shared_bytes, overlap):
    """How the driver launches a kernel.  Cooperative: it starts all blocks together or none, whatever else runs on the GPU."""
    cooperative, serialized = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
    cooperative.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    cooperative.value.cooperative = 1
    serialized.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    serialized.value.programmaticStreamSerializationAllowed = int(overlap)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.attrs, config.numAttrs = [cooperative, serialized], 2
    return config


@functools.lru_cache(maxsize=64)
def _stream(handle):
    """cuda.core's object for a stream that somebody else owns; making one costs more than a launch."""
    return Stream.from_handle(handle)


class CudaEngine:
    """One GPU as an engine."""

    name, warp = "cuda", 32
    few_tokens = FEW_TOKENS

    def __init__(self, index):
        device = Device(index)
        device.set_current()
        self.index, self.cc, self._known = index, tuple(device.compute_capability), threading.local()
        self.multiprocessors = device.properties.multiprocessor_count
        _, _, highest = driver.cuCtxGetStreamPriorityRange()     # other ranks wait for what runs here
        self._comm_stream = device.create_stream(options=StreamOptions(priority=highest))
        self.comm_stream = int(self._comm_stream.handle)

    def leave_room(self):
        """Keep some multiprocessors free of all kernels, for copies that run while those wait for them."""
        self.multiprocessors -= ROOM

    def teams(self, row_bytes, tokens):
        """(cuts, teams, threads): how many parts a dispatch cuts a row into, how many teams the warps of a block form, and the
        threads of each, which move a part 16 bytes a thread at a time.

        tokens: the most that all ranks have together.  Few get blocks half as large, so that the next kernel's find room beside.
        """
        vectors, warps = -(-row_bytes // 16), FEW_WARPS if tokens <= FEW_TOKENS else WARPS
        threads = min((32 * n for n in (7, 8, 6, 5)), key=lambda threads: -(-vectors // threads) * threads)
        return -(-vectors // threads), 32 * warps // threads, threads

    def pieces_per_lane(self, row_bytes):
        """How many 16-byte pieces of a row a lane moves for its warp: one, since there are warps enough."""
        return 1

    def neighbours(self, threads):
        """How many warps of a block move slices that lie next to each other."""
        return math.gcd(threads // 32, 4)

    def phases(self, operation, threads, ranks):
        """(phase, blocks, how many of them send, how many receive) of each launch that an operation may need."""
        blocks = self.multiprocessors
        senders = max(1, blocks // SENDING[ranks > 2]) if operation == "dispatch" else blocks
        receivers = blocks - senders if operation == "dispatch" else blocks
        return ("both", blocks, senders, receivers), ("send", blocks, blocks, 0), ("receive", blocks, 0, blocks)

    def share(self, num_sms, registers=64):
        """(blocks, threads) of a kernel that may take so many multiprocessors: it fills each, if a thread has so many registers."""
        return max(1, min(num_sms, self.multiprocessors)), min(1024, REGISTERS // registers // 128 * 128)

    def part_bytes(self, row_bytes):
        """How much of a row a warp sends at a time: little enough that few warps have one turn more than others."""
        return 64 * self.warp

    def senders(self, blocks, threads):
        """(blocks, warps of each) that send, where one launch sends and receives all the while."""
        return min(blocks, FILLING), threads // 32 // 3

    def kernel(self, fn, blocks, threads, shared_bytes=0, overlap=False, **constants):
        """A compiled kernel.  overlap: its blocks may start before the kernel before it on the stream has ended; it then calls
        `previous_kernel_done` first of all."""
        return CudaKernel(fn, self, blocks, threads, shared_bytes, overlap, constants)

    def use(self):
        """Make this the calling thread's GPU, if that has chosen none so far; quick in a thread that was here before."""
        if not hasattr(self._known, "thread"):
            if current_device() is None:
                Device(self.index).set_current()
            self._known.thread = True

    def copy(self, to, source, nbytes, stream):
        """Copy bytes within the GPU's memory, behind all that was put on a stream; may be captured into a graph."""
        error, = driver.cuMemcpyDtoDAsync(to, source, nbytes, stream)
        if error:
            raise RuntimeError(f"cuMemcpyDtoDAsync of {nbytes} bytes failed: {error.name}")

    def synchronize(self):
        """Wait until nothing runs on the GPU, whichever the calling thread uses."""
        with current(self.index):
            call(runtime.cudaDeviceSynchronize)


def device_count():
    """GPUs that this process sees; 0 without a driver."""
    error, count = runtime.cudaGetDeviceCount()
    return 0 if error else count


def current_device():
    """The GPU that the calling thread has chosen so far, or None."""
    error, context = driver.cuCtxGetCurrent()
    if error or not int(context):
        return None
    return int(driver.cuCtxGetDevice()[1])


def compute_capability():
    """Of the current GPU, or of the first one where none was chosen."""
    return tuple(Device(current_device() or 0).compute_capability)


def record(stream):
    """An event behind all that was put on a stream (a CUstream as an int) so far."""
    return _stream(stream).record()


def stream_wait(stream, other):
    """Make `stream` wait for `other`: an event, or a stream, which means all that was put on it so far."""
    _stream(stream).wait(other if isinstance(other, Event) else _stream(other))


def synchronize(other):
    """Make the host wait for an event or a stream."""
    (other if isinstance(other, Event) else _stream(other)).sync()


def is_capturing(stream):
    """Whether what is put on a stream goes into a graph."""
    error, status = driver.cuStreamIsCapturing(stream)           # an error: the default stream, while another is captured
    return not error and status == driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
