"""The interface of a transport, and the settings that all ranks must share."""
import os

import numpy as np

from ..errors import EPTransportError
from ..layout import LINE, WORD
from .handles import MAX_OFFSET, memory_handle


class Transport:
    """Symmetric memory: `nbytes` on every rank.  A peer of this rank's node is *mapped*: its memory has an address here.  To any
    other, a *port peer*, there is a PortChannel.

    Made by (nodes, nbytes, timeout_s, queue_pairs), and then connected, collectively; queue_pairs: the most PortChannels to one
    peer.  Whatever comes of that, `parting` is the end.

    nodes: which ranks are mapped, `pyep.channels.nodes.Nodes`.
    nbytes: as it was asked for; puts must stay inside.
    base: address of this rank's memory.  peers: the address at which this rank maps each rank's (its own too); 0 of port peers.
    channels: address of the MemoryChannel handle for each mapped peer but this rank itself, else 0.
    ports: address of the PortChannel handle for each port peer, else 0; there are `channels_per_peer(queue_pairs)`, one after
        another.  Handles are those of `pyep.channels.handles`, in memory that kernels read.
    orders_puts: whether a put is visible to a port peer before later puts of its channel.  Before later signals it always is.
    copies_by_kernels: whether a port peer's rank shares this GPU: puts to it are then kernels, which need room beside pyep's.
    parts_in_stages: whether some memory may be freed only when the other ranks have let go of it.
    memory: an object that keeps this rank's memory while it is referred to, also beyond `close`, for arrays that lie in it.
    status: address of STATUS_WORDS words (see `pyep.channels.memory`) that kernels write and the host reads, as `record`.
    answers: address of HOST_WORDS words more in such memory, which the host reads as `answer`.
    """

    name = ""
    orders_puts, copies_by_kernels, parts_in_stages = True, False, True

    def connect(self, bootstrap):
        """Make the memory, and connect it with that of the other ranks of a `Bootstrap`."""
        raise NotImplementedError

    def fill(self, offset, nbytes, value):
        """Set bytes of the own memory to `value` and wait until it is done."""
        raise NotImplementedError

    def write(self, offset, words):
        """Write a NumPy array of int64 into the own memory and wait until it is done."""
        raise NotImplementedError

    def check(self):
        """EPTransportError if a proxy of this rank has failed."""

    def port_state(self, rank):
        """What to know of the proxy that serves a port peer, in words, when it does not answer."""
        raise NotImplementedError

    @staticmethod
    def channel_bytes(num_ranks):
        """Symmetric memory that `make_channels` needs."""
        return 2 * LINE * num_ranks

    def make_channels(self, offset):
        """Set `channels`.  Their semaphores and handles lie from byte `offset` of all ranks' memory on, which must be 0 there.

        For rank r two lines: the word to which r adds its signals; the word of those that were expected, and the handle.
        """
        self.channels = [0] * len(self.peers)
        for rank, peer in enumerate(self.peers):
            if peer and peer != self.base:
                mine = self.base + offset + 2 * LINE * rank
                remote = peer + offset + 2 * LINE * self.nodes.rank
                self.channels[rank] = mine + LINE + 2 * WORD
                words = memory_handle(mine, remote, mine + LINE, peer, self.base)
                self.write(self.channels[rank] - self.base, np.array(words, np.int64))

    def check_put(self, dst, src, nbytes):
        """ValueError unless a put stays inside the symmetric memory; dst, src, nbytes in bytes.  To be called before a kernel makes
        the put: for one that does not MSCCL++'s proxy ends the process."""
        for name, value in (("dst", dst), ("src", src), ("nbytes", nbytes)):
            if value < 0:
                raise ValueError(f"{name} is {value}; expected bytes, at least 0")
        for name, offset in (("dst", dst), ("src", src)):
            if offset + nbytes > self.nbytes:
                raise ValueError(f"{name} is {offset} and nbytes {nbytes}: beyond the {self.nbytes} bytes of symmetric memory")

    def parting(self, failed):
        """The steps by which this rank lets go of everything, see `pyep.channels.parting`; idempotent, and none fails.

        failed: whether it is after an error: then nothing waits for what was pushed to be served.
        """
        raise NotImplementedError

    def drop(self):
        """For finalizers: let go of what can be let go of without a wait.  The steps that are left, which others take later."""
        raise NotImplementedError


def host_identity():
    """A string that is the same for ranks that can share memory: the boot of a kernel, and the process ids' namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return os.uname().nodename


def require_port_offsets(nbytes):
    """EPTransportError where the symmetric memory is too large for the offsets that triggers hold."""
    if nbytes > MAX_OFFSET:
        raise EPTransportError(f"{nbytes} bytes of symmetric memory between nodes; PortChannels reach {MAX_OFFSET} (4 GiB): make "
                               "num_rdma_bytes and num_nvl_bytes smaller")


def require_same_settings(bootstrap, settings, timeout_s, what="settings of ports"):
    """ValueError, on every rank, unless all have the same settings, a dict of values by name.  Collective."""
    told = bootstrap.allgather(settings, timeout_s, f"Buffer: comparing {what}")
    for name in settings:
        values = [theirs[name] for theirs in told]
        if len(set(values)) > 1:
            raise ValueError(f"{name} differs between ranks: {values}, by rank")


def num_proxies():
    """PYEP_NUM_PROXIES: the proxies among which a rank's port peers are dealt, each with a FIFO of its own."""
    text = os.environ.get("PYEP_NUM_PROXIES") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"PYEP_NUM_PROXIES is {text!r}; expected a positive number of proxies")
    return int(text)


def channels_per_peer(queue_pairs):
    """PortChannels to each port peer: as many as may be, each served by another proxy."""
    return min(queue_pairs, num_proxies())


def proxy_of(rank, peer, channel):
    """The proxy that serves a channel to a peer: the same number on both ranks, and different ones for a pair's channels."""
    return (rank + peer + channel) % num_proxies()
