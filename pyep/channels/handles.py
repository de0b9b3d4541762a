"""What kernels are told about channels, byte for byte as MSCCL++ lays it out, so that device code is one for all transports.

A *handle* is a run of words that never change while kernels run.  A *trigger* is what a kernel asks a proxy to do.  Sources:
`PortChannelDeviceHandle`, `MemoryChannelDeviceHandle` and `ProxyTrigger` of https://github.com/microsoft/mscclpp.
"""
from typing import NamedTuple

# ---- handles: byte offsets ---------------------------------------------------------------------------------------------
# A semaphore counts signals: the peer adds to its inbound word; a waiter adds to the expected word, then waits until inbound is as
# large.

# PortChannel.  Head, tail and the cached tail are those of its proxy's FIFO, all addresses; several channels share them.
SEMAPHORE = 0                           # 4 bytes: the channel's number in its proxy
PORT_INBOUND, PORT_EXPECTED = 8, 16
TRIGGERS, HEAD, TAIL, TAIL_CACHE = 24, 32, 40, 48
SIZE, MASK, SHIFT = 56, 64, 72          # of the FIFO: triggers (4 bytes), that less 1, its logarithm
FLUSH_DONE = 80                         # address: the position of the last flush that is done, plus 1
MEMORIES = 88                           # two numbers of 4 bytes: the memory that puts write, then the one that they read
PORT_BYTES = 96

# MemoryChannel.
INBOUND, REMOTE_INBOUND, EXPECTED = 0, 8, 16
DST, SRC = 24, 32                       # addresses of the peer's memory and of this rank's
MEMORY_BYTES = 48                       # the last word, a buffer for packets, is not used here


def memory_handle(inbound, remote_inbound, expected, dst, src):
    """The words of a MemoryChannel's handle, all addresses."""
    return [inbound, remote_inbound, expected, dst, src, 0]


def port_handle(semaphore, inbound, expected, fifo, flush_done, dst_memory, src_memory):
    """The words of a PortChannel's handle; fifo: a `pyep.channels.fifo.Fifo`."""
    return [semaphore, inbound, expected, fifo.triggers, fifo.head, fifo.tail, fifo.tail_cache, fifo.size, fifo.size - 1,
            fifo.size.bit_length() - 1, flush_done, src_memory << 32 | dst_memory]


# ---- triggers: two words -----------------------------------------------------------------------------------------------
# First:  bytes 0..31 | offset in the source memory 32..63.
# Second: offset in the destination memory 0..31 | source memory 32..40 | destination memory 41..49 | kind 50..52 |
#         semaphore 53..62 | commit 63, which is 1 in the first lap of the FIFO, 0 in the second, and so on.

TRIGGER_BYTES = 16
DATA, SIGNAL, FLUSH = 1, 2, 4                   # kinds, which may be or-ed
SOURCE_MEMORY, DESTINATION_MEMORY, KIND, SEMAPHORE_AT, COMMIT = 32, 41, 50, 53, 63
MAX_OFFSET, MAX_MEMORIES, MAX_SEMAPHORES = 2**32, 2**9, 2**10


class Trigger(NamedTuple):
    """A trigger taken apart, for proxies and error messages; offsets and sizes in bytes."""

    kind: int
    semaphore: int
    destination_memory: int
    destination: int
    source_memory: int
    source: int
    nbytes: int
    commit: int

    def __str__(self):
        kinds = "+".join(name for bit, name in ((DATA, "put"), (SIGNAL, "signal"), (FLUSH, "flush")) if self.kind & bit)
        data = f" of {self.nbytes} bytes from offset {self.source} to offset {self.destination}" if self.kind & DATA else ""
        return f"{kinds or 'nothing'}{data} on channel {self.semaphore}"


def decode(first, second):
    """The `Trigger` of two words."""
    def bits(word, low, end):
        return word >> low & (1 << end - low) - 1
    return Trigger(kind=bits(second, KIND, SEMAPHORE_AT), semaphore=bits(second, SEMAPHORE_AT, COMMIT),
                   destination_memory=bits(second, DESTINATION_MEMORY, KIND), destination=bits(second, 0, SOURCE_MEMORY),
                   source_memory=bits(second, SOURCE_MEMORY, DESTINATION_MEMORY), source=bits(first, 32, 64),
                   nbytes=bits(first, 0, 32), commit=bits(second, COMMIT, 64))
