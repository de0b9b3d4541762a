"""What the transports between GPUs share: this rank's symmetric memory, and the words that kernels write for the host."""
import contextlib
import ctypes

from cuda.bindings import runtime

from ..errors import EPTransportError
from .memory import HOST_WORDS, STATUS_WORDS
from .transport import Transport


def call(function, *args):
    """A CUDA runtime call; EPTransportError with CUDA's words if it fails."""
    error, *results = function(*args)
    if error != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(error)
        raise EPTransportError(f"{function.__name__} failed: {text.decode()}")
    return results[0] if len(results) == 1 else tuple(results)


@contextlib.contextmanager
def current(gpu):
    """Make a GPU the current one meanwhile.  Errors are ignored."""
    _, before = runtime.cudaGetDevice()                          # in no thread of its own: the interpreter may be ending
    runtime.cudaSetDevice(gpu)
    try:
        yield
    finally:
        runtime.cudaSetDevice(gpu if before is None else before)


class Memory:
    """GPU memory of this rank.  It is freed once nobody refers to it, no array of a result either, if all ranks have let go of it;
    else a peer may still write, and it goes with the process."""

    def __init__(self, nbytes):
        self.may_be_freed, self._gpu = False, call(runtime.cudaGetDevice)
        self.address = call(runtime.cudaMalloc, nbytes)
        call(runtime.cudaMemset, self.address, 0, nbytes)
        call(runtime.cudaDeviceSynchronize)

    def __del__(self, free=runtime.cudaFree, current=current):
        if self.may_be_freed:
            with current(self._gpu):
                free(self.address)


class GpuTransport(Transport):
    """A transport whose symmetric memory is the current GPU's."""

    def __init__(self, nodes, nbytes, timeout_s, queue_pairs):
        self.nodes, self.nbytes, self._timeout_s, self._queue_pairs = nodes, nbytes, timeout_s, queue_pairs
        self._gpu, self.memory, self._pinned = call(runtime.cudaGetDevice), None, None

    def _allocate(self, nbytes):
        """Make `memory`, of that many bytes, all 0, and the words that kernels write for the host."""
        self.memory = Memory(nbytes)
        self.base = int(self.memory.address)
        self._pinned = call(runtime.cudaHostAlloc, 8 * (STATUS_WORDS + HOST_WORDS), runtime.cudaHostAllocMapped)
        ctypes.memset(int(self._pinned), 0, 8 * (STATUS_WORDS + HOST_WORDS))
        self.record = (ctypes.c_int64 * STATUS_WORDS).from_address(int(self._pinned))
        self.answer = (ctypes.c_int64 * HOST_WORDS).from_address(int(self._pinned) + 8 * STATUS_WORDS)
        self.status = int(call(runtime.cudaHostGetDevicePointer, self._pinned, 0))
        self.answers = self.status + 8 * STATUS_WORDS

    def drop(self):
        """A GPU's memory is freed and unmapped by calls that may wait for the GPU, or break a graph that is being captured."""
        return [self._wait_for_gpu, *self.parting(False)]

    def _wait_for_gpu(self):
        with current(self._gpu):
            runtime.cudaDeviceSynchronize()                      # errors are ignored, here and below

    def _free(self):
        """All ranks have let go of this rank's memory: it is freed once no array of a result lies in it."""
        if self.memory is not None:
            self.memory.may_be_freed = True
        if self._pinned is not None:
            runtime.cudaFreeHost(self._pinned)                   # errors are ignored: after a kernel fault every call fails
        self.memory = self._pinned = None

    def fill(self, offset, nbytes, value):
        call(runtime.cudaMemset, self.base + offset, value, nbytes)
        call(runtime.cudaDeviceSynchronize)

    def write(self, offset, words):
        call(runtime.cudaMemcpy, self.base + offset, words.ctypes.data, words.nbytes, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)
        call(runtime.cudaDeviceSynchronize)


def bus_of_gpu():
    """The PCI address of the current GPU: what all processes of a host call it."""
    return call(runtime.cudaDeviceGetPCIBusId, 32, call(runtime.cudaGetDevice))


def require_peer_access(buses):
    """EPTransportError unless the current GPU can access the memory of others.  buses: {rank: the PCI address of its GPU}."""
    device = call(runtime.cudaGetDevice)
    for rank, bus in buses.items():
        error, peer = runtime.cudaDeviceGetByPCIBusId(bus)
        if error != runtime.cudaError_t.cudaSuccess:
            raise EPTransportError(f"the GPU of rank {rank} ({bus.decode()}) is hidden from this process: "
                                   "let every rank see all GPUs (CUDA_VISIBLE_DEVICES)")
        if peer != device and not call(runtime.cudaDeviceCanAccessPeer, device, peer):
            raise EPTransportError(f"GPU {device} cannot access the memory of GPU {peer} (rank {rank}): no NVLink or PCIe "
                                   "peer-to-peer path; see `nvidia-smi topo -p2p r`")
