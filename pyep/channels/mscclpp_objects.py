"""MSCCL++'s objects: what connects a rank with its peers, the proxies that serve its PortChannels, and their end.

They must be gone before the interpreter ends: threads of theirs, the bootstrap's above all, abort a process that ends before them.
So no module keeps any, nor does an exception, and `Objects` says when they go.  A call that waits for other ranks keeps the
interpreter lock and has no time limit: it is made only once all ranks are known to have sent what it waits for.
"""
import concurrent.futures
import ctypes
import struct
import time

from cuda.bindings import runtime

from ..errors import EPTransportError
from .gpu import call, current
from .handles import MAX_MEMORIES, MAX_SEMAPHORES, TRIGGER_BYTES, TRIGGERS, decode
from .mscclpp_package import require_port_handle

DRAIN_S, STUCK_S = 1.0, 0.1             # how long a proxy may take for all that is in its FIFO, and for one trigger


class Links:
    """Connections with some peers; for each of these, this rank's memory and the peer's, registered, and a semaphore.

    Built by the methods named in `STEPS`, in this order, which all ranks take together: requests go out in one step, answers are
    waited for in the next.

    Mapped peers share one of these; so do the peers of each proxy.  Each has a communicator of its own, hence a stream of its own
    for copies between GPUs: MSCCL++ does not tell apart whose copies are under way on a stream, and two proxies that shared one
    could take each other's for done.
    """

    STEPS = "ask_for_connections", "connect", "ask_for_memory", "map_memory", "ask_for_semaphores", "make_semaphores"

    def __init__(self, api, bootstrap, tag, memory, endpoints):
        """bootstrap: MSCCL++'s.  tag: a number, on both ends the same, and another for each of a rank's `Links`.  memory: (address,
        bytes) of this rank's.  endpoints: {peer: (kind, EndpointConfig)}; kind: what connects the two, "ipc" or "ib"."""
        self._api, self._tag, self._memory, self._endpoints = api, tag, memory, endpoints
        self._communicator = api.Communicator(bootstrap)
        self.mine, self.theirs, self.semaphores = {}, {}, {}     # registered memory by kind; by peer; by peer

    def kind(self, peer):
        return self._endpoints[peer][0]

    def ask_for_connections(self):
        self._asked = {peer: self._communicator.connect(config, peer, self._tag) for peer, (_, config) in self._endpoints.items()}

    def connect(self):
        self._connections = self._answers()

    def ask_for_memory(self):
        for kind, config in self._endpoints.values():
            if kind not in self.mine:
                flags = self._api.TransportFlags(config.transport)
                self.mine[kind] = self._communicator.register_memory(*self._memory, flags)
        for peer in self._endpoints:
            self._communicator.send_memory(self.mine[self.kind(peer)], peer, self._tag)
        self._asked = {peer: self._communicator.recv_memory(peer, self._tag) for peer in self._endpoints}

    def map_memory(self):
        self.theirs = self._answers()

    def ask_for_semaphores(self):
        self._asked = {peer: self._communicator.build_semaphore(connection, peer, self._tag)
                       for peer, connection in self._connections.items()}

    def make_semaphores(self):
        self.semaphores = self._answers()

    def drop_communicator(self):
        """Connecting is over."""
        self._asked = self._communicator = None

    def _answers(self):
        """What was asked for, by peer."""
        return {peer: future.get() for peer, future in self._asked.items()}


class MemoryChannels:
    """MemoryChannels to the peers of some `Links`.  By peer, handles: their bytes; peers: the address of the peer's memory here."""

    def __init__(self, api, links):
        self._channels = {peer: api.MemoryChannel(semaphore, links.theirs[peer], links.mine[links.kind(peer)])
                          for peer, semaphore in links.semaphores.items()}
        self.handles = {peer: channel.device_handle().raw for peer, channel in self._channels.items()}
        self.peers = {peer: memory.data() for peer, memory in links.theirs.items()}


class Proxy:
    """PortChannels to the peers of some `Links`, and the thread of MSCCL++ that serves them.  handles: their bytes, by peer."""

    def __init__(self, api, links, fifo_size):
        """fifo_size: triggers that the FIFO holds, a power of two."""
        require_room(len(links.mine) + len(links.theirs), len(links.semaphores))
        self._service, self._channels, self.handles, self.runs = in_a_thread(api.ProxyService, fifo_size), [], {}, False
        mine = {kind: self._service.add_memory(memory) for kind, memory in links.mine.items()}
        for peer, semaphore in links.semaphores.items():
            source, destination = mine[links.kind(peer)], self._service.add_memory(links.theirs[peer])
            channel = self._service.port_channel(self._service.add_semaphore(semaphore), destination, source)
            raw = channel.device_handle().raw
            require_port_handle(raw, fifo_size, destination, source)
            self._channels.append(channel)
            self.handles[peer] = raw
        self._triggers, self._head, self._tail = struct.unpack_from("3q", raw, TRIGGERS)
        self._size = fifo_size

    def start(self):
        self._service.start_proxy(blocking=True)
        self.runs = True

    def stop(self):
        """Serve what is in the FIFO, as long as that goes on, and end the thread; idempotent.  Copies under way are waited for."""
        if self.runs:
            self.drain()
            self._service.stop_proxy()
        self.runs = False

    def drain(self):
        """Wait until the FIFO is empty; no longer than a second, nor than a tenth of one without a trigger that is taken."""
        start = taken = time.monotonic()
        head, tail = self.position()
        while head > tail and time.monotonic() < min(start + DRAIN_S, taken + STUCK_S):
            before, (head, tail) = tail, self.position()
            if tail > before:
                taken = time.monotonic()

    def position(self):
        """(head, tail) of the FIFO: triggers pushed so far, and taken so far.  The tail twice if the GPU does not answer."""
        tail = ctypes.c_int64.from_address(self._tail).value
        try:
            return read_word(self._head), tail
        except EPTransportError:
            return tail, tail

    def state(self):
        """What to know of it when a peer does not answer."""
        head, tail = self.position()
        last = "none"
        if tail > 0:
            slot = self._triggers + TRIGGER_BYTES * ((tail - 1) % self._size)
            last = decode(*(ctypes.c_uint64 * 2).from_address(slot))
        return f"FIFO head {head}, tail {tail}, last trigger {last}; the proxy {'runs' if self.runs else 'does not run'}"


class Objects:
    """All of MSCCL++ that a transport holds, made and dropped in the order that MSCCL++ needs.

    bootstrap: MSCCL++'s, until all is connected.  mapped: `Links` to mapped peers, and their `channels`.  served: `Links` to the
    port peers of each proxy, by its number, and the `proxies`.  gpu: the one that all of it is on.
    """

    def __init__(self, gpu):
        self._gpu = gpu
        self.bootstrap = self.mapped = self.channels = None
        self.served, self.proxies = {}, {}

    def start_bootstrap(self, api, rank, size, identity, timeout_s):
        """Meet through TCP.  identity: what rank 0 has made, its address among it."""
        self.bootstrap = api.TcpBootstrap.create(rank, size)
        self.bootstrap.initialize(identity, timeout_s)

    def make_links(self, api, memory, mapped, served):
        """mapped: endpoints of mapped peers; served: those of each proxy's peers, by its number."""
        self.mapped = Links(api, self.bootstrap, 0, memory, mapped)
        self.served = {i: Links(api, self.bootstrap, 1 + i, memory, endpoints) for i, endpoints in served.items()}

    def take(self, step):
        """Take one of `Links.STEPS`."""
        for links in (self.mapped, *self.served.values()):
            getattr(links, step)()

    def make_channels(self, api, fifo_size):
        self.channels = MemoryChannels(api, self.mapped)
        self.proxies = {i: Proxy(api, links, fifo_size) for i, links in self.served.items()}

    def start(self):
        """Start the proxies' threads; all ranks have made their channels.

        The bootstrap goes: with it its sockets, one of them a file in /tmp that a process would leave behind if it were killed.
        """
        for links in (self.mapped, *self.served.values()):
            links.drop_communicator()
        self.bootstrap = None
        for proxy in self.proxies.values():
            proxy.start()

    def stop(self):
        """End the proxies' threads; idempotent."""
        with current(self._gpu):
            for proxy in self.proxies.values():
                proxy.stop()

    def drop(self):
        """Let go of everything, peers' memory included; idempotent.

        On the right GPU, since the caller may have chosen another, or none (a thread in which garbage is collected): MSCCL++ unmaps
        memory and clears semaphores on the current one, and ends the process if it cannot.
        """
        with current(self._gpu):
            self.stop()
            self.proxies, self.channels = {}, None               # what refers to others goes before these
            self.served, self.mapped = {}, None
            self.bootstrap = None

    def end(self):
        """`drop` once nothing runs on the GPU any more, for a transport that nobody has closed.  Errors are ignored."""
        with current(self._gpu):
            if self.proxies or self.channels:
                runtime.cudaDeviceSynchronize()
            self.drop()


def require_room(memories, semaphores):
    """EPTransportError where a proxy would serve more than triggers can tell apart."""
    if memories > MAX_MEMORIES or semaphores > MAX_SEMAPHORES:
        raise EPTransportError(f"a proxy would serve {semaphores} channels between {memories} memories, where triggers tell "
                               f"{MAX_SEMAPHORES} and {MAX_MEMORIES} apart: set PYEP_NUM_PROXIES to more, num_qps_per_rank to less")


def in_a_thread(function, *args):
    """Call a function in a thread of its own, on the current GPU: MSCCL++ binds the thread that makes a FIFO to the CPUs next to
    the GPU, for good, and the caller's should run where it likes."""
    gpu = call(runtime.cudaGetDevice)
    with concurrent.futures.ThreadPoolExecutor(1, initializer=runtime.cudaSetDevice, initargs=(gpu,)) as thread:
        return thread.submit(function, *args).result()


def read_word(address):
    """A word of GPU memory, also while kernels run."""
    word, stream = ctypes.c_int64(), call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
    try:
        call(runtime.cudaMemcpyAsync, ctypes.addressof(word), address, 8, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)
        call(runtime.cudaStreamSynchronize, stream)
    finally:
        runtime.cudaStreamDestroy(stream)
    return word.value
