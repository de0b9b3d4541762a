"""The PortChannels of the CPU engine: FIFOs, handles and semaphores in the memory of the process, proxies that speak MPI."""
import time
import weakref

import numpy as np
from mpi4py import MPI

from ..errors import EPTransportError
from . import parting
from .fifo import Fifo
from .handles import port_handle
from .link import RELEASE_S, Link
from .proxy import Proxy, memories
from .transport import channels_per_peer, num_proxies, proxy_of

FIFO_SIZE = 512                         # triggers
DRAIN_S = 0.5                           # after an error: how long a proxy still sends what was pushed
GOODBYE_S = 1.0                         # how long `close` waits for the peers' proxies

GET_MULTIPLE = "leave mpi4py.rc.thread_level at \"multiple\" (its default), and take an MPI library that was built for it"


def thread_level():
    """MPI's: "SINGLE", "FUNNELED", "SERIALIZED" or "MULTIPLE"."""
    return {MPI.THREAD_SINGLE: "SINGLE", MPI.THREAD_FUNNELED: "FUNNELED", MPI.THREAD_SERIALIZED: "SERIALIZED",
            MPI.THREAD_MULTIPLE: "MULTIPLE"}[MPI.Query_thread()]


def require_threads():
    """EPTransportError unless proxies may call MPI beside the main thread."""
    if thread_level() != "MULTIPLE":
        raise EPTransportError("ports on the CPU engine need MPI's thread level MULTIPLE, but MPI was initialized with "
                               f"{thread_level()}: {GET_MULTIPLE}")


class HostPorts:
    """PortChannels to all ranks of other nodes; collective.  ports: the handles' addresses, 0 where there is none."""

    def __init__(self, comm, lane, nodes, memory, failed, queue_pairs):
        """comm, lane: an MPI communicator, and the number by which these ports' tags differ from all others on it.  memory: [bytes]
        uint8, this rank's symmetric memory.  failed: see `Proxy`.  queue_pairs: see `Transport`."""
        require_threads()
        me, per_peer = nodes.rank, channels_per_peer(queue_pairs)
        tags = tags_of(lane, comm.Get_attr(MPI.TAG_UB))
        fifos = [Fifo(FIFO_SIZE) for _ in range(num_proxies())]
        links = [[] for _ in fifos]
        self._words = np.zeros((len(nodes.of), per_peer, 12), np.int64)
        self.ports, self._proxies_of = [0] * len(nodes.of), {}
        for peer in (r for r in range(len(nodes.of)) if not nodes.holds(r)):
            numbers = [proxy_of(me, peer, channel) for channel in range(per_peer)]
            for channel, i in enumerate(numbers):
                link, number = Link(comm, peer, tags[i], memory), len(links[i])
                links[i].append(link)
                source, destination = memories(number)
                self._words[peer, channel] = port_handle(number, link.inbound, link.expected, fifos[i], link.flush_done,
                                                         destination, source)
            self.ports[peer], self._proxies_of[peer] = self._words[peer].ctypes.data, numbers
        self.proxies = [Proxy(fifo, served, failed) for fifo, served in zip(fifos, links)]
        self.end = weakref.finalize(self, end, self.proxies)     # also if nobody closes it, and when the interpreter ends

    def start(self):
        for proxy in self.proxies:
            proxy.start()

    def check(self):
        """EPTransportError if a proxy has failed."""
        for proxy in self.proxies:
            if proxy.error is not None:
                raise EPTransportError(f"the proxy of this rank's ports has failed: {proxy.error}") from proxy.error

    def state(self, rank):
        """`Proxy.state` of the proxies that serve a peer."""
        return ", ".join(f"proxy {i}: {self.proxies[i].state()}" for i in self._proxies_of[rank])

    def close(self, failed, timeout_s):
        """End all proxies.  They send what was pushed, say goodbye, and wait a moment for the peers' goodbyes.

        Where those do not come in time, the threads go on by themselves until what was pushed is sent, for timeout_s at most.
        After an error it is sent as far as DRAIN_S allows: what a kernel has stored to a mapped peer has come too.
        """
        if failed:
            for proxy in self.proxies:
                proxy.drain(DRAIN_S)
            self.end()
            return
        patience = min(timeout_s, GOODBYE_S)
        for proxy in self.proxies:
            proxy.leave(patience, timeout_s)
        deadline = time.monotonic() + patience + 2 * RELEASE_S
        for proxy in self.proxies:
            proxy.join(max(0, deadline - time.monotonic()))
        if any(proxy.runs for proxy in self.proxies):
            parting.park(Lingering(self))


class Lingering:
    """Keeps ports whose proxies still send, for `pyep.channels.parting`; the interpreter's end ends them."""

    holds = True

    def __init__(self, ports):
        self._ports = ports

    def go_on(self):
        """Whether none runs any more."""
        return not any(proxy.runs for proxy in self._ports.proxies)


def tags_of(lane, most):
    """The tags of the channels of each proxy.  0 is not among them, see `mpi_board`.  most: the largest that MPI allows; only after
    so many Buffers a tag comes again."""
    return [1 + (lane * num_proxies() + i) % most for i in range(num_proxies())]


def end(proxies):
    """For the finalizer, which must not refer to `HostPorts`."""
    for proxy in proxies:
        proxy.end()
