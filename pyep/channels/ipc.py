"""Transport "ipc": GPU memory that the processes of one host open in each other through CUDA IPC.  Nothing to build."""
from cuda.bindings import runtime

from ..errors import EPTransportError
from ..layout import align
from .gpu import GpuTransport, bus_of_gpu, call, require_peer_access


class IpcTransport(GpuTransport):
    """CUDA IPC between the GPUs of one host; several ranks may share a GPU."""

    name = "ipc"

    def __init__(self, bootstrap, nodes, nbytes, timeout_s, queue_pairs):
        super().__init__(nodes, nbytes)
        if nodes.count > 1:
            raise EPTransportError("transport \"ipc\" needs all ranks on one node (one host, one container), but by rank the nodes "
                                   f"are {list(nodes.of)}: use transport \"mscclpp\", or leave PYEP_RANKS_PER_NODE unset")
        self._opened, self.ports = [], [0] * bootstrap.size
        try:
            self._open(bootstrap, align(nbytes) + self.channel_bytes(bootstrap.size), timeout_s)
            self.make_channels(align(nbytes))
            bootstrap.meet(timeout_s, "Buffer: opening the peers' GPU memory")
        except Exception:
            self.close(lambda: False)
            raise

    def _open(self, bootstrap, nbytes, timeout_s):
        require_peer_access(dict(enumerate(bootstrap.allgather(bus_of_gpu(), timeout_s, "Buffer: comparing GPUs"))))
        self._allocate(nbytes)
        own = self.memory.address
        handle = bytes(call(runtime.cudaIpcGetMemHandle, own).reserved)
        handles = bootstrap.allgather(handle, timeout_s, "Buffer: exchanging GPU memory")
        for rank, raw in enumerate(handles):
            self._opened.append(own if rank == bootstrap.rank else self._open_handle(raw))
        self.peers = [int(p) for p in self._opened]

    @staticmethod
    def _open_handle(raw):
        handle = runtime.cudaIpcMemHandle_t()
        handle.reserved = raw
        return call(runtime.cudaIpcOpenMemHandle, handle, runtime.cudaIpcMemLazyEnablePeerAccess)

    def close(self, meet):
        # Errors are ignored: after a kernel fault every call fails, and the process is about to end.
        for address in self._opened:
            if self.memory is None or address is not self.memory.address:
                runtime.cudaIpcCloseMemHandle(address)
        self._opened = []
        self._free(meet())
