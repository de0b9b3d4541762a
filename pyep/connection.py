"""What the ranks of a `Buffer` share: symmetric memory that all of them write, how they meet on the host, and the first error."""
import copy
import itertools
import warnings
import weakref

import numpy as np

from . import layout, layout_boxes
from .channels import parting
from .channels.bootstrap import Bootstrap, failure_of, telling_failure
from .channels.memory import RECORD, VOID_OPERATION, VOID_REASON
from .channels.nodes import find_nodes
from .channels.parting import Parting
from .channels.transport import require_same_settings
from .choices import choose_device, choose_engine, choose_transport
from .errors import EPClosedError, EPError, EPTimeoutError
from .heap import Heap
from .streams import Streams

COMPILE_ALLOWANCE_S = 60.0              # a peer that compiles is not late
_numbers = itertools.count(1)


class Connection:
    """All ranks of a group, connected.  Collective; board: `pyep.channels.boards.open_board`'s, the other arguments are `Buffer`'s.

    number           by which handles know whose they are: no other connection of this process ever has it
    rank, size       this rank, and how many there are
    nodes            which ranks map each other's memory, see `pyep.channels.nodes.Nodes`
    engine, streams  what runs kernels, and in which order
    transport        the symmetric memory, see `pyep.channels.transport.Transport`; None once closed
    nbytes, half_bytes: of control words and halves, see `pyep.layout`; of each of the halves
    heap             num_nvl_bytes of the symmetric memory
    boxes            offset of the rest of it, which is for what travels between nodes; none if there is one node
    words_for        by the number of a wait (the word "wait" of a status record): a function that makes an error of the record.
                     It must not refer to the `Buffer`, which would live as long as this then.  By "void": the same of an operation
                     that is void, for its rank, epoch and reason
    error            what has made the connection unusable, or None
    """

    def __init__(self, board, num_rdma_bytes, num_nvl_bytes, transport, timeout_s, num_qps_per_rank=1):
        self.transport = self._error = None
        self.number, timeout_s = next(_numbers), float(timeout_s)
        self.timeout_s, self.timeout_ns, self.words_for = timeout_s, int(timeout_s * 1e9), {}
        parting.tidy()
        with telling_failure(board):
            device = choose_device()
            choose_transport(transport, device)                  # for its errors, before anybody waits
        self._bootstrap = Bootstrap(board, timeout_s)
        self.rank, self.size = self._bootstrap.rank, self._bootstrap.size
        made = []
        try:
            require_same_settings(self._bootstrap, dict(num_rdma_bytes=num_rdma_bytes, num_nvl_bytes=num_nvl_bytes), timeout_s,
                                  "arguments")
            # All are here, so what all have destroyed can go now, before the next meeting.  MSCCL++ frees what a peer maps in the
            # step in which that peer unmaps it; a peer that is late cannot map what is made at the same address.
            parting.tidy()
            self.nodes = find_nodes(self._bootstrap, timeout_s)
            self.engine = choose_engine(device, self._bootstrap, timeout_s)
            self.streams = Streams(self.engine)
            self._lay_out(num_rdma_bytes, num_nvl_bytes)
            make = choose_transport(transport, device, self.nodes.count)
            made.append(make(self.nodes, self._end, timeout_s, num_qps_per_rank))
            made[0].connect(self._bootstrap)
            self.transport = made[0]
            if self.transport.copies_by_kernels:
                self.engine.leave_room()
            self.heap = Heap(self._heap_at, num_nvl_bytes, self.transport.memory)
            self.write_control()
            self.meet("Buffer: connecting")
        except BaseException as error:
            self.error, self.transport = error, None
            steps = made[0].parting(True) if made else []
            parting.leave(Parting(self._bootstrap, steps, failure_of(error)), 0)
            raise

    def _lay_out(self, num_rdma_bytes, num_nvl_bytes):
        """Where everything lies in the symmetric memory."""
        self.nbytes = max(num_rdma_bytes, layout.control_bytes(self.size))
        self.half_bytes = layout.half_capacity(self.nbytes, self.size)
        self._heap_at = layout.heap_offset(num_rdma_bytes, self.size)
        self.boxes = layout.align(self._heap_at + num_nvl_bytes)
        *_, last = layout_boxes.boxes(self.boxes, layout_boxes.most_port_peers(self.nodes.of), self.half_bytes)
        self._end = last.end

    @property
    def error(self):
        return self._error

    @error.setter
    def error(self, error):
        """A copy is kept: the error itself will refer, by its traceback, to the `Buffer` and its user."""
        self._error = None if error is None else without_traceback(error)

    def write_control(self, epoch=0):
        """Fill the control words.  `epoch`: the epoch of the operation before the first (tests start near the wrap-around)."""
        control, transport = layout.control(self.size), self.transport
        transport.fill(0, layout.control_bytes(self.size), 0)
        transport.write(control["status"].offset, np.array([transport.status], np.int64))
        for name in "peers", "ports":
            transport.write(control[name].offset, np.array(getattr(transport, name), np.int64))
        if self.nodes.count > 1:
            table = layout_boxes.box_table(self.nodes.of, self.rank, self.boxes, self.half_bytes)
            transport.write(control["boxes"].offset, np.array(table, np.int64).ravel())
        for name in "epoch", "consumed", "ht_epoch", "told":
            transport.write(control[name].offset, np.full(control[name].nbytes // layout.WORD, epoch, np.int64))

    def meet(self, what, word=0):
        """All ranks meet on the host and show that they mean the same."""
        try:
            words = self._bootstrap.meet(self.timeout_s + COMPILE_ALLOWANCE_S, what, word)
            others = [r for r, w in enumerate(words) if w != word]
            if others:
                raise ValueError(f"{what}: ranks {others} made another call (another shape, or another operation) than rank "
                                 f"{self.rank}")
        except (EPError, ValueError) as error:
            self.error = error
            raise

    def require_usable(self):
        """EPClosedError once closed or after an error; what went wrong in an operation, if nobody was told yet."""
        if self.transport is None:
            raise EPClosedError("this Buffer was destroyed")
        if self.error is not None:
            raise EPClosedError(f"this Buffer is unusable after an error; destroy it. The error was: {self.error}")
        self.engine.use()
        self.check()

    def check(self):
        """Raise what went wrong in an operation that has run, if anything has.  Does not wait for a GPU.

        The connection stays usable only where the operation is void: then all ranks have run it, and all raise this.
        """
        if self.error is not None:
            raise without_traceback(self.error)
        if self.transport is None:
            return
        if self.transport.record[0]:
            self.error = self._error_of(dict(zip(RECORD, self.transport.record)))
            raise without_traceback(self.error)
        void = self.transport.record[VOID_OPERATION]
        if void:
            reason, self.transport.record[VOID_OPERATION:] = self.transport.record[VOID_REASON], [0, 0]
            raise self.words_for["void"]((void & 0xFFFFFFFF) - 1, void >> 32, reason)
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
        """Free everything; idempotent.  It waits a moment for the other ranks to do so too, see `pyep.channels.parting`, but not
        after an error.

        Raises what went wrong in the last operations, if that was not raised before; everything is freed all the same.
        """
        if self.transport is None:
            parting.tidy()
            return
        unreported = False
        if self.error is None:
            try:
                self.engine.synchronize()
                self.check()
            except Exception as error:
                self.error, unreported = error, True
        transport, self.transport = self.transport, None
        failure = None if self.error is None else failure_of(self.error)
        self.heap.let_go()
        wait_s = min(self.timeout_s, parting.WAIT_S) if transport.parts_in_stages and self.error is None else 0
        parting.leave(Parting(self._bootstrap, transport.parting(self.error is not None), failure), wait_s)
        parting.tidy()
        if unreported:
            raise without_traceback(self.error)

    def close_with(self, owner, explicitly=False):
        """See that this is closed when its owner is collected, or the interpreter ends: alone, without a wait.

        explicitly: whether the owner promised to call `close`: then a warning tells that it did not.
        """
        weakref.finalize(owner, self._drop, type(owner).__name__, explicitly)

    def _drop(self, owner, explicitly):
        transport, self.transport = self.transport, None
        if transport is None:
            return
        if explicitly:
            warnings.warn(f"a {owner} with explicitly_destroy=True was dropped; destroy() was not called", ResourceWarning, 2)
        self.heap.let_go()
        failure = None if self.error is None else failure_of(self.error)
        parting.park(Parting(self._bootstrap, transport.drop(), failure))


def without_traceback(error):
    """The same error once more, without what it went through."""
    try:
        return copy.copy(error)
    except Exception:                                            # somebody's error, which cannot be made of its arguments
        return EPError(str(error))
