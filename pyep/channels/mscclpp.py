"""Transport "mscclpp": MSCCL++'s channels between GPUs, of one node and of many.

Ranks of a node map each other's memory, through CUDA IPC.  To all others there are PortChannels: a kernel pushes triggers, and a
*proxy*, a thread of MSCCL++, moves the bytes, through InfiniBand to other hosts and through CUDA IPC to other nodes of this host.
"""
import weakref

import numpy as np
from cuda.bindings import runtime

from ..errors import EPError, EPTransportError
from ..layout import align
from . import infiniband, mscclpp_package
from .gpu import GpuTransport, bus_of_gpu, call, require_peer_access
from .handles import MEMORY_BYTES, PORT_BYTES
from .mscclpp_objects import Links, Objects
from .reach import kinds_of, port_transport
from .transport import (channels_per_peer, host_identity, num_proxies, proxy_of, require_port_offsets,
                        require_same_settings)

TRIGGERS_PER_PEER = 16                  # for which a FIFO has room: an operation pushes two, and no rank is two operations ahead
MIN_FIFO = 512


class MscclppTransport(GpuTransport):
    """MSCCL++'s MemoryChannels within a node, its PortChannels between nodes."""

    name = "mscclpp"

    def __init__(self, nodes, nbytes, timeout_s, queue_pairs):
        super().__init__(nodes, nbytes, timeout_s, queue_pairs)
        self._objects = Objects(self._gpu)
        self._end = weakref.finalize(self, self._objects.end)    # also when the interpreter ends

    def connect(self, bootstrap):
        self._bootstrap = bootstrap
        self._connect(self._agreed_kinds(), channels_per_peer(self._queue_pairs))

    # ---- connecting: every step that may fail on one rank alone is taken by all together -------------------------------

    def _together(self, what, step, *args):
        """What a step returns that all ranks take, once all have: if it fails on one, EPTransportError on all.

        step: nothing of MSCCL++ itself, since an error refers to it.
        """
        result, error = attempt(step, *args)
        errors = self._bootstrap.allgather(error, self._timeout_s, f"Buffer: {what}")
        if error:
            raise EPTransportError(f"{what} failed: {error}")
        failed = [r for r, e in enumerate(errors) if e]
        if failed:
            raise EPTransportError(f"{what} failed on rank {failed[0]}: {errors[failed[0]]}")
        return result

    def _agreed_kinds(self):
        """How this rank reaches each rank, see `kinds_of`; ValueError unless all ranks have the same settings."""
        settings = dict(PYEP_PORT_TRANSPORT=port_transport(), PYEP_NUM_PROXIES=num_proxies(),
                        num_qps_per_rank=channels_per_peer(self._queue_pairs))
        require_same_settings(self._bootstrap, settings, self._timeout_s)
        hosts = self._bootstrap.allgather(host_identity(), self._timeout_s, "Buffer: comparing hosts")
        return kinds_of(hosts, self.nodes, port_transport())

    def _connect(self, kinds, per_peer):
        """Make everything: memory, connections, channels, proxies; and a table of handles, behind the memory that is registered."""
        me, size = self.nodes.rank, len(kinds)
        by_ports = [r for r, kind in enumerate(kinds) if kind in ("ipc", "ib")]
        if by_ports:
            require_port_offsets(self.nbytes)
        api = self._together("loading MSCCL++", mscclpp_package.load).api
        endpoints = self._together("choosing InfiniBand adapters", make_endpoints, api, set(kinds), self.nodes.local_rank)
        buses = self._bootstrap.allgather(bus_of_gpu(), self._timeout_s, "Buffer: comparing GPUs")
        by_ipc = {r: buses[r] for r, kind in enumerate(kinds) if kind in ("mapped", "ipc")}
        self._together("checking access to GPUs", require_peer_access, by_ipc)
        table = align(self.nbytes)
        self._together("allocating GPU memory", self._allocate, table + size * (MEMORY_BYTES + per_peer * PORT_BYTES))

        mapped = {r: ("ipc", endpoints["ipc"]) for r, kind in enumerate(kinds) if kind == "mapped"}
        self._proxies_of = {r: [proxy_of(me, r, channel) for channel in range(per_peer)] for r in by_ports}
        served = {i: {r: (kinds[r], endpoints[kinds[r]]) for r in by_ports if i in self._proxies_of[r]}
                  for i in set().union(*self._proxies_of.values())}
        self._link(api, mapped, served)
        self._together("making channels", self._objects.make_channels, api, fifo_size(len(by_ports)))
        self._write_table(table)
        self.orders_puts = "ib" not in kinds
        self.copies_by_kernels = any(kind == "ipc" and buses[r] == buses[me] for r, kind in enumerate(kinds))
        self._together("starting proxies", self._objects.start)

    def _link(self, api, mapped, served):
        """Make the `Links` to mapped peers, and those of each proxy by its number, from the endpoints of each."""
        rank, size = self._bootstrap.rank, self._bootstrap.size
        identity = self._together("looking for a network interface", api.TcpBootstrap.create_unique_id)
        identity = self._bootstrap.allgather(identity if rank == 0 else None, self._timeout_s, "Buffer: finding rank 0")[0]
        seconds = max(1, round(self._timeout_s))
        self._together("meeting through TCP", self._objects.start_bootstrap, api, rank, size, identity, seconds)
        self._objects.make_links(api, (self.base, self.nbytes), mapped, served)
        for step in Links.STEPS:
            self._together(step.replace("_", " "), self._objects.take, step)

    def _write_table(self, offset):
        """Put all handles into GPU memory, at `offset`, and set their addresses."""
        objects, size, raw = self._objects, len(self.nodes.of), b""
        self.channels, self.ports, self.peers = [0] * size, [0] * size, [0] * size
        self.peers[self.nodes.rank] = self.base
        for rank, handle in objects.channels.handles.items():
            self.peers[rank] = objects.channels.peers[rank]
            self.channels[rank], raw = self.base + offset + len(raw), raw + handle
        for rank, numbers in self._proxies_of.items():
            self.ports[rank], raw = self.base + offset + len(raw), raw + b"".join(objects.proxies[i].handles[rank] for i in numbers)
        if raw:
            self.write(offset, np.frombuffer(raw, np.int64))

    # ---- afterwards ------------------------------------------------------------------------------------------------------

    def port_state(self, rank):
        return ", ".join(f"proxy {i}: {self._objects.proxies[i].state()}" for i in self._proxies_of[rank])

    def parting(self, failed):
        """Once all have stopped their proxies, none writes here any more; once all have dropped theirs, none maps this memory."""
        return [self._objects.stop, self._end, self._free]


def attempt(function, *args):
    """(what a function returns, None), or (None, what went wrong in words): no exception that refers to what was being made."""
    try:
        return function(*args), None
    except EPError as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error.args[-1] if error.args else error}"       # MSCCL++'s: (number, text)


def fifo_size(num_peers):
    """Triggers that a proxy's FIFO holds, a power of two: more than kernels push before they wait for an answer.

    A full FIFO does no harm but to speed: threads then poll memory of the host.
    """
    return max(MIN_FIFO, 1 << (TRIGGERS_PER_PEER * num_peers - 1).bit_length())


def make_endpoints(api, kinds, local_rank):
    """MSCCL++'s EndpointConfig by kind, for the current GPU."""
    gpu = api.Device(api.DeviceType.GPU, call(runtime.cudaGetDevice))
    endpoints = {"ipc": api.EndpointConfig(api.Transport.CudaIpc, gpu)}
    if "ib" in kinds:
        adapter = getattr(api.Transport, f"IB{infiniband.choose(local_rank)}")
        endpoints["ib"] = api.EndpointConfig(adapter, gpu)
        for name, value in infiniband.settings().items():
            setattr(endpoints["ib"], f"ib_{name}", value)
    return endpoints
