"""One PortChannel of the CPU engine between two ranks' proxies, both ways, by messages of MPI.

A message is a header of three words, [kind, offset, bytes], and the data behind it.  Data of more than INLINE bytes follows in a
message of its own, which MPI takes from one symmetric memory and brings into the other.  Messages do not overtake each other, and a
header is received only when the data of the header before is there: so what comes becomes visible in the order of the channel.
"""
import collections
import time

import numpy as np
from mpi4py import MPI

from ..errors import EPTransportError
from ..kernels.lang import ld1_nc_if, ld8, st1, st8_release
from .fifo import host_code, lines, store
from .handles import DATA, FLUSH, SIGNAL

GOODBYE = 0                             # the kind of a channel's last message
HEADER_BYTES = 24
INLINE = 1000                           # bytes of data that travel with their header, at most
RELEASE_S = 0.1                         # how long `release` waits for requests to end

_unended = []                           # requests that MPI did not end, and the memory that it may still touch


def deliver(dst, src, nbytes):
    """Copy bytes in order into memory that kernels poll; addresses.  An aligned word of 8 bytes that is written whole changes at
    once."""
    end = dst + nbytes
    while dst < end:
        if dst & 7 == 0 and dst + 8 <= end:
            st8_release(dst, ld8(src))
            dst, src = dst + 8, src + 8
        else:
            st1(dst, ld1_nc_if(src, 1))
            dst, src = dst + 1, src + 1


class Link:
    """The channel to a peer, and what comes from it.

    rank: the peer.  inbound, expected, flush_done: addresses of words, for the handle.  closed: whether nothing more is received:
    the peer's goodbye has come, or `release` was called.
    """

    def __init__(self, comm, rank, tag, memory):
        """comm: for proxies alone.  tag: the channel's, the same on both ranks.  memory: [bytes] uint8, of the puts."""
        self.rank, self.closed = rank, False
        self._comm, self._tag, self._memory = comm, tag, memory
        self._words, (self.inbound, self.expected, self.flush_done) = lines(3)
        self._signals = 0                                        # received so far
        self._under_way = collections.deque()                    # (request, what it sends), or (None, position of a flush)
        self._message = np.zeros(HEADER_BYTES + INLINE, np.uint8)
        self._header = self._message[:HEADER_BYTES].view(np.int64)
        self._data_next = False                                  # whether the message that is awaited is data without a header
        self._deliver, self._store = host_code(deliver), host_code(store)
        self._expect(self._message)

    # ---- send ------------------------------------------------------------------------------------------------------------

    @property
    def in_flight(self):
        """Messages that MPI has not sent yet."""
        return len(self._under_way)

    def serve(self, trigger, position):
        """Begin what the trigger at a position of the FIFO asks for."""
        if trigger.kind & (DATA | SIGNAL):
            data = self._memory[:0]
            if trigger.kind & DATA:
                self._require_inside(trigger)
                data = self._memory[trigger.source:trigger.source + trigger.nbytes]
            self._send(trigger.kind & (DATA | SIGNAL), trigger.destination, data)
        if trigger.kind & FLUSH:
            self._under_way.append((None, position))

    def say_goodbye(self):
        """Tell the peer that no more will come."""
        self._send(GOODBYE, 0, self._memory[:0])

    def _require_inside(self, trigger):
        end = max(trigger.source, trigger.destination) + trigger.nbytes
        if end > len(self._memory):
            raise EPTransportError(f"a kernel asked for a {trigger} to rank {self.rank}, beyond the end of the symmetric "
                                   f"memory ({len(self._memory)} bytes)")

    def _send(self, kind, offset, data):
        header = np.array([kind, offset, len(data)], np.int64).view(np.uint8)
        for message in [np.concatenate([header, data])] if len(data) <= INLINE else [header, data]:
            self._under_way.append((self._comm.Isend([message, MPI.BYTE], self.rank, self._tag), message))

    def _note_sent(self):
        """Forget what MPI has sent, and tell flushes that are done: whether there was any."""
        before = len(self._under_way)
        while self._under_way:
            request, message = self._under_way[0]
            if request is None:
                self._store(self.flush_done, message + 1)
            elif not request.Test():
                break
            self._under_way.popleft()
        return len(self._under_way) < before

    # ---- receive ---------------------------------------------------------------------------------------------------------

    def _expect(self, buffer):
        """Have the next message received into a buffer."""
        self._receiving = self._comm.Irecv([buffer, MPI.BYTE], self.rank, self._tag)

    def _receive(self):
        """Take one message, if one has come: whether one has."""
        if self.closed or not self._receiving.Test():
            return False
        kind, offset, nbytes = self._header.tolist()
        if kind == GOODBYE:
            self.closed = True
            return True
        if nbytes > INLINE and not self._data_next:
            self._data_next = True
            self._expect(self._memory[offset:offset + nbytes])
            return True
        if not self._data_next:
            self._deliver(self._memory.ctypes.data + offset, self._message.ctypes.data + HEADER_BYTES, nbytes)
        if kind & SIGNAL:
            self._signals += 1
            self._store(self.inbound, self._signals)
        self._data_next = False
        self._expect(self._message)
        return True

    # ---- both ------------------------------------------------------------------------------------------------------------

    def progress(self):
        """Go on with what is under way: whether anything has happened."""
        return self._note_sent() | self._receive()

    def release(self):
        """Cancel the receive, and wait until all requests have ended.  Those that have not within RELEASE_S are kept for ever, with
        the memory that MPI may still touch."""
        requests = [request for request, _ in self._under_way if request is not None]
        if not self.closed:
            self._receiving.Cancel()
            requests.append(self._receiving)
        deadline = time.monotonic() + RELEASE_S
        while not all([request.Test() for request in requests]):
            if time.monotonic() > deadline:
                _unended.append((requests, list(self._under_way), self._message, self._memory))
                break
            time.sleep(100e-6)
        self._under_way.clear()
        self.closed = True
