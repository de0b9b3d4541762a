"""What the ranks of a `Buffer` share: symmetric memory that all of them write, how they meet on the host, and the first error."""
import numpy as np

from . import layout
from .channels.memory import RECORD
from .channels.nodes import find_nodes
from .channels.transport import MpiBootstrap, TorchBootstrap
from .choices import choose_device, choose_engine, choose_transport
from .errors import EPClosedError, EPError, EPTimeoutError
from .heap import Heap
from .streams import Streams

COMPILE_ALLOWANCE_S = 60.0              # a peer that compiles is not late


class Connection:
    """All ranks of a group, connected.  Collective; the arguments are `Buffer`'s.

    rank, size       this rank, and how many there are
    nodes            which ranks map each other's memory, see `pyep.channels.nodes.Nodes`
    engine, streams  what runs kernels, and in which order
    transport        the symmetric memory, see `pyep.channels.transport.Transport`; None once closed
    nbytes, half_bytes: of control words and halves, see `pyep.layout`; of each of the halves
    heap             num_nvl_bytes of the symmetric memory
    boxes            offset of the rest of it, which is for what travels between nodes; none if there is one node
    words_for        by the number of a wait (the word "wait" of a status record): a function that makes an error of the record
    error            what has made the connection unusable, or None
    """

    def __init__(self, group, comm, num_rdma_bytes, num_nvl_bytes, transport, timeout_s, num_qps_per_rank=1):
        self.transport = self.error = None
        device = choose_device()
        choose_transport(transport, device)                      # for its errors, before anybody waits
        self.timeout_s, self.timeout_ns, self.words_for = timeout_s, int(timeout_s * 1e9), {}
        self._bootstrap = MpiBootstrap(comm, timeout_s) if comm is not None else TorchBootstrap(group)
        self.rank, self.size = self._bootstrap.rank, self._bootstrap.size
        self._require_same("num_rdma_bytes", num_rdma_bytes)
        self._require_same("num_nvl_bytes", num_nvl_bytes)
        self.nodes = find_nodes(self._bootstrap, timeout_s)
        self.engine = choose_engine(device, self._bootstrap, timeout_s)
        self.streams = Streams(self.engine)
        self.nbytes = max(num_rdma_bytes, layout.control_bytes(self.size))
        self.half_bytes = layout.half_capacity(self.nbytes, self.size)
        heap = layout.heap_offset(num_rdma_bytes, self.size)
        self.boxes = layout.align(heap + num_nvl_bytes)
        *_, last = layout.boxes(self.boxes, layout.most_port_peers(self.nodes.of), self.half_bytes)
        make = choose_transport(transport, device, self.nodes.count)
        self.transport = make(self._bootstrap, self.nodes, last.end, timeout_s, num_qps_per_rank)
        if self.transport.copies_by_kernels:
            self.engine.leave_room()
        self.heap = Heap(heap, num_nvl_bytes, self.transport.memory)
        try:
            self.write_control()
            self.meet("Buffer: connecting")
        except Exception as error:
            self.error = error
            self.close()
            raise

    def write_control(self, epoch=0):
        """Fill the control words.  `epoch`: the epoch of the operation before the first (tests start near the wrap-around)."""
        control, transport = layout.control(self.size), self.transport
        transport.fill(0, layout.control_bytes(self.size), 0)
        transport.write(control["status"].offset, np.array([transport.status], np.int64))
        for name in "peers", "ports":
            transport.write(control[name].offset, np.array(getattr(transport, name), np.int64))
        if self.nodes.count > 1:
            table = layout.box_table(self.nodes.of, self.rank, self.boxes, self.half_bytes)
            transport.write(control["boxes"].offset, np.array(table, np.int64).ravel())
        for name in "epoch", "consumed", "ht_epoch", "told":
            transport.write(control[name].offset, np.full(control[name].nbytes // layout.WORD, epoch, np.int64))

    def meet(self, what, word=0):
        """All ranks meet on the host and show that they mean the same."""
        try:
            words = self._bootstrap.meet(self.timeout_s + COMPILE_ALLOWANCE_S, what, word)
        except EPError as error:
            self.error = error
            raise
        others = [r for r, w in enumerate(words) if w != word]
        if others:
            self.error = ValueError(f"{what}: ranks {others} made another call (another shape, or another operation) than rank "
                                    f"{self.rank}")
            raise self.error

    def require_usable(self):
        """EPClosedError once closed or after an error; what went wrong in an operation, if nobody was told yet."""
        if self.transport is None:
            raise EPClosedError("this Buffer was destroyed")
        if self.error is not None:
            raise EPClosedError(f"this Buffer is unusable after an error; destroy it. The error was: {self.error}")
        self.check()

    def check(self):
        """Raise what went wrong in an operation that has run, if anything has.  Does not wait for a GPU."""
        if self.error is not None:
            raise self.error
        if self.transport is None:
            return
        if self.transport.record[0]:
            self.error = self._error_of(dict(zip(RECORD, self.transport.record)))
            raise self.error
        try:
            self.transport.check()
        except EPError as error:
            self.error = error
            raise

    def _error_of(self, record):
        """What a kernel has recorded, in words; if it has waited for a port peer, with the state of the proxy."""
        error = self.words_for[record["wait"]](record)
        if isinstance(error, EPTimeoutError) and self.transport.ports[record["peer"]]:
            state = self.transport.port_state(record["peer"])
            error = EPTimeoutError(f"{error}. Rank {record['peer']} is reached through a port: {state}")
        return error

    def require_one_node(self, operation):
        """NotImplementedError for an operation that stores into all peers' memory, where there are port peers."""
        if self.nodes.count > 1:
            raise NotImplementedError(f"{operation} between nodes is not implemented yet (by rank, the nodes are "
                                      f"{list(self.nodes.of)})")

    def launch(self, kernel, stream, *args):
        """Launch a kernel; an error leaves the connection unusable: sent or not, received or not, nobody knows."""
        try:
            kernel.launch(stream, *args)
        except Exception as error:
            self.error = error
            raise
        if self.engine.name == "cpu":
            self.check()

    def close(self):
        """Free everything; collective, idempotent.  After an error, or if a peer is gone, it does not wait for the others.

        Raises what went wrong in the last operations, if that was not raised before; everything is freed all the same.
        """
        if self.transport is None:
            return
        unreported = None
        if self.error is None:
            try:
                self.engine.synchronize()
                self.check()
            except Exception as error:
                self.error = unreported = error
        transport, self.transport = self.transport, None
        self._met_to_close()
        transport.close(self._met_to_close)
        self.heap.let_go()
        self.words_for = {}                                      # nothing that refers to the Buffer, which refers to this
        if self.error is None:
            self._bootstrap.close()
        if unreported is not None:
            raise unreported

    def _met_to_close(self):
        """Whether all ranks have met to close; never after an error."""
        if self.error is None:
            try:
                self._bootstrap.meet(self.timeout_s, "Buffer.destroy")
            except EPError as error:
                self.error = error
        return self.error is None

    def _require_same(self, argument, value):
        """ValueError on every rank unless all were given the same."""
        values = self._bootstrap.allgather(value, self.timeout_s, f"Buffer: comparing {argument}")
        if len(set(values)) > 1:
            raise ValueError(f"{argument} differs between ranks: {values}, by rank")
