"""Transport "ipc": GPU memory that the processes of one host open in each other through CUDA IPC.  Nothing to build."""
from cuda.bindings import runtime

from ..errors import EPTransportError
from ..layout import align
from .gpu import GpuTransport, bus_of_gpu, call, current, require_peer_access


class IpcTransport(GpuTransport):
    """CUDA IPC between the GPUs of one host; several ranks may share a GPU."""

    name = "ipc"

    def __init__(self, nodes, nbytes, timeout_s, queue_pairs):
        super().__init__(nodes, nbytes, timeout_s, queue_pairs)
        if nodes.count > 1:
            raise EPTransportError("transport \"ipc\" needs all ranks on one node (one host, one container), but by rank the nodes "
                                   f"are {list(nodes.of)}: use transport \"mscclpp\", or leave PYEP_RANKS_PER_NODE unset")
        self._opened, self.ports = [], [0] * len(nodes.of)

    def connect(self, bootstrap):
        buses = bootstrap.allgather(bus_of_gpu(), self._timeout_s, "Buffer: comparing GPUs")
        require_peer_access(dict(enumerate(buses)))
        self._allocate(align(self.nbytes) + self.channel_bytes(bootstrap.size))
        own = self.memory.address
        handle = bytes(call(runtime.cudaIpcGetMemHandle, own).reserved)
        handles = bootstrap.allgather(handle, self._timeout_s, "Buffer: exchanging GPU memory")
        for rank, raw in enumerate(handles):
            self._opened.append(own if rank == bootstrap.rank else self._open_handle(raw))
        self.peers = [int(p) for p in self._opened]
        self.make_channels(align(self.nbytes))
        bootstrap.meet(self._timeout_s, "Buffer: opening the peers' GPU memory")

    @staticmethod
    def _open_handle(raw):
        handle = runtime.cudaIpcMemHandle_t()
        handle.reserved = raw
        return call(runtime.cudaIpcOpenMemHandle, handle, runtime.cudaIpcMemLazyEnablePeerAccess)

    def parting(self, failed):
        return [self._close_peers, self._free]

    def _close_peers(self):
        """Unmap the peers' memory.  Errors are ignored: after a kernel fault every call fails, and the process is about to end."""
        with current(self._gpu):
            for address in self._opened:
                if self.memory is None or address is not self.memory.address:
                    runtime.cudaIpcCloseMemHandle(address)
        self._opened = []
