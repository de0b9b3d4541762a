"""Transport "ipc": GPU memory that the processes of one host open in each other through CUDA IPC.  Nothing to build."""
import ctypes

from cuda.bindings import runtime

from ..errors import EPTransportError
from ..layout import align
from .memory import HOST_WORDS, RECORD
from .nodes import find_nodes
from .transport import Transport


def call(function, *args):
    """A CUDA runtime call; EPTransportError with CUDA's words if it fails."""
    error, *results = function(*args)
    if error != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(error)
        raise EPTransportError(f"{function.__name__} failed: {text.decode()}")
    return results[0] if len(results) == 1 else tuple(results)


class _Memory:
    """GPU memory of this rank.  It is freed once nobody refers to it, no array of a result either, if all ranks have let go of it;
    else a peer may still write, and it goes with the process."""

    def __init__(self, nbytes):
        self.may_be_freed = False
        self.address = call(runtime.cudaMalloc, nbytes)
        call(runtime.cudaMemset, self.address, 0, nbytes)
        call(runtime.cudaDeviceSynchronize)

    def __del__(self, free=runtime.cudaFree):
        if self.may_be_freed:
            free(self.address)


class IpcTransport(Transport):
    """CUDA IPC between the GPUs of one host; several ranks may share a GPU."""

    name = "ipc"

    def __init__(self, bootstrap, nbytes, timeout_s, queue_pairs):
        self.nodes, self.nbytes = find_nodes(bootstrap, timeout_s), nbytes
        if self.nodes.count > 1:
            raise EPTransportError("transport \"ipc\" needs all ranks on one node (one host and container); by rank, nodes are "
                                   f"{list(self.nodes.of)}: use transport \"mscclpp\", or leave PYEP_RANKS_PER_NODE unset")
        self.memory = self._pinned = None
        self._opened, self.ports = [], [0] * bootstrap.size
        try:
            self._open(bootstrap, align(nbytes) + self.channel_bytes(bootstrap.size), timeout_s)
            self.make_channels(align(nbytes))
            bootstrap.meet(timeout_s, "Buffer: opening the peers' GPU memory")
        except Exception:
            self.close(lambda: False)
            raise

    def _open(self, bootstrap, nbytes, timeout_s):
        device = call(runtime.cudaGetDevice)
        buses = bootstrap.allgather(call(runtime.cudaDeviceGetPCIBusId, 32, device), timeout_s, "Buffer: comparing GPUs")
        self._require_peer_access(device, buses)
        self.memory = _Memory(nbytes)
        own = self.memory.address
        handle = bytes(call(runtime.cudaIpcGetMemHandle, own).reserved)
        handles = bootstrap.allgather(handle, timeout_s, "Buffer: exchanging GPU memory")
        for rank, raw in enumerate(handles):
            self._opened.append(own if rank == bootstrap.rank else self._open_handle(raw))
        self.peers = [int(p) for p in self._opened]
        self.base = int(own)
        self._pinned = call(runtime.cudaHostAlloc, 8 * (len(RECORD) + HOST_WORDS), runtime.cudaHostAllocMapped)
        ctypes.memset(int(self._pinned), 0, 8 * (len(RECORD) + HOST_WORDS))
        self.record = (ctypes.c_int64 * len(RECORD)).from_address(int(self._pinned))
        self.answer = (ctypes.c_int64 * HOST_WORDS).from_address(int(self._pinned) + 8 * len(RECORD))
        self.status = int(call(runtime.cudaHostGetDevicePointer, self._pinned, 0))
        self.answers = self.status + 8 * len(RECORD)

    @staticmethod
    def _require_peer_access(device, buses):
        for rank, bus in enumerate(buses):
            error, peer = runtime.cudaDeviceGetByPCIBusId(bus)
            if error != runtime.cudaError_t.cudaSuccess:
                raise EPTransportError(f"the GPU of rank {rank} ({bus.decode()}) is hidden from this process: "
                                       "let every rank see all GPUs (CUDA_VISIBLE_DEVICES)")
            if peer != device and not call(runtime.cudaDeviceCanAccessPeer, device, peer):
                raise EPTransportError(f"GPU {device} cannot access the memory of GPU {peer} (rank {rank}): no NVLink or PCIe "
                                       "peer-to-peer path; see `nvidia-smi topo -p2p r`")

    @staticmethod
    def _open_handle(raw):
        handle = runtime.cudaIpcMemHandle_t()
        handle.reserved = raw
        return call(runtime.cudaIpcOpenMemHandle, handle, runtime.cudaIpcMemLazyEnablePeerAccess)

    def fill(self, offset, nbytes, value):
        call(runtime.cudaMemset, self.base + offset, value, nbytes)
        call(runtime.cudaDeviceSynchronize)

    def write(self, offset, words):
        call(runtime.cudaMemcpy, self.base + offset, words.ctypes.data, words.nbytes, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)
        call(runtime.cudaDeviceSynchronize)

    def close(self, meet):
        # Errors are ignored: after a kernel fault every call fails, and the process is about to end.
        for address in self._opened:
            if self.memory is None or address is not self.memory.address:
                runtime.cudaIpcCloseMemHandle(address)
        self._opened = []
        if meet() and self.memory is not None:
            self.memory.may_be_freed = True
        if self._pinned is not None:
            runtime.cudaFreeHost(self._pinned)
        self.memory = self._pinned = None
