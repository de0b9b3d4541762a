"""`Buffer`: the one object a user holds.

Its operations are in `buffer_low_latency`.  Names, argument order and meaning follow DeepEP's V1 `deep_ep.Buffer`.
"""
import weakref

from . import arrays, config, events, layout
from .buffer_high_throughput import HighThroughputOperations
from .buffer_low_latency import LowLatencyOperations, ReceiveHook
from .channels.boards import open_board
from .channels.bootstrap import telling_failure
from .checks import check_construction, check_shape
from .checks_high_throughput import check_high_throughput_shape
from .choices import choose_device
from .compiled import leave_alone
from .connection import Connection
from .warm_up import warm_up


class Buffer(LowLatencyOperations, HighThroughputOperations):
    """Symmetric memory over all ranks of a group, and the operations on it.

    group, comm: a torch.distributed process group or an mpi4py communicator; exactly one.  Collective.
    num_nvl_bytes: bytes of symmetric memory for high-throughput operations and their results, see `get_high_throughput_size_hint`.
    num_rdma_bytes: bytes of symmetric memory for low-latency operations, see `get_low_latency_rdma_size_hint`.  For each rank of
        another node as much as three times that is taken besides, see `pyep.layout_boxes`.
    num_qps_per_rank: the most channels to one rank of another node; there are as many, but no more than PYEP_NUM_PROXIES.
    low_latency_mode, allow_nvlink_for_low_latency_mode, allow_mnnvl: accepted for DeepEP's sake.
    explicitly_destroy: whether the program promises to call `destroy`: then a ResourceWarning tells that it did not.
    transport: "auto"; "host" for the CPU engine; for GPUs "ipc", of one host, or "mscclpp", of several too.  "auto" is "ipc" on one
        node and "mscclpp" on more, unless the environment's PYEP_TRANSPORT says otherwise.
    timeout_s: how long a rank waits for another before it raises `EPTimeoutError`.

    The engine is the GPU where one is visible, unless PYEP_DEVICE=cpu says otherwise.  All calls on a buffer must be ordered:
    from one stream, or from streams that wait for each other.  (Operations with async_finish and the others see to it themselves
    that they follow each other.)
    """

    num_sms = 20                        # see `set_num_sms`

    def __init__(self, group=None, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24,
                 allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False, enable_shrink=False,
                 comm=None, *, transport="auto", timeout_s=100.0):
        leave_alone(type(self), ReceiveHook, events.EventOverlap)
        board = open_board(group, comm)
        with telling_failure(board):
            check_construction(num_nvl_bytes, num_rdma_bytes, num_qps_per_rank, enable_shrink, timeout_s)
        self.group = comm if group is None else group
        self.num_nvl_bytes, self.num_rdma_bytes, self.low_latency_mode = int(num_nvl_bytes), int(num_rdma_bytes), low_latency_mode
        connection = Connection(board, self.num_rdma_bytes, self.num_nvl_bytes, transport, timeout_s, int(num_qps_per_rank))
        connection.close_with(self, explicitly_destroy)
        LowLatencyOperations.__init__(self, connection)
        HighThroughputOperations.__init__(self, connection, self.num_nvl_bytes)
        self.rank, self.group_size = self._connection.rank, self._connection.size
        self._local_buffers = weakref.WeakValueDictionary()      # by use_rdma_buffer, see `get_local_buffer_tensor`
        self.engine = self._connection.engine.name               # "cpu" or "cuda"
        self.transport = self._connection.transport.name         # "host", "ipc" or "mscclpp"

    # ---- queries -----------------------------------------------------------------------------------------------------

    def is_available(self):
        """Whether all peers are connected and no error has made the buffer unusable."""
        return self._connection.transport is not None and self._connection.error is None

    def get_local_device_id(self):
        """The index of this rank's GPU; 0 on the CPU engine."""
        return self._connection.engine.index

    def is_internode_available(self):
        """Whether ranks of several nodes are connected."""
        return self.is_available() and self.get_num_rdma_ranks() > 1

    def get_num_rdma_ranks(self):
        """The number of nodes: sets of ranks that map each other's memory."""
        return self._connection.nodes.count

    def get_rdma_rank(self):
        """The index of this rank's node."""
        return self._connection.nodes.mine

    def get_comm_stream(self):
        """The stream on which operations with async_finish run, PyTorch's kind if the program has used a GPU through it, else
        CuPy's; None on the CPU engine.  It lives as long as the buffer."""
        library = arrays.library_on_gpu()
        if self._connection.streams.comm is None or library is None:
            return None
        return library.external_stream(self._connection.streams.comm, self._connection.engine.index)

    def get_local_buffer_tensor(self, dtype, size=None, offset=0, use_rdma_buffer=False):
        """An array of this rank that the caller may overwrite, zero for instance, at any time: no operation reads or writes it.

        DeepEP hands out the memory that its operations use; programs zero it to make a Buffer clean.  Here nothing ever needs to
        be cleaned, and zeros there would be data.  So this is memory of its own, allocated when it is asked for, and kept as long
        as there are arrays over it.  To look at the Buffer's memory: `symmetric_memory`.

        dtype: PyTorch's for a tensor, else NumPy's.  size: the shape; all there is if None.  offset: in bytes.
        use_rdma_buffer: there are num_rdma_bytes, else num_nvl_bytes.
        """
        self._connection.require_usable()
        memory = self._local_buffers.get(use_rdma_buffer)
        if memory is None:
            memory = arrays.allocate(self.engine, self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes, dtype)
            self._local_buffers[use_rdma_buffer] = memory
        return arrays.view(memory, dtype, size, offset)

    def symmetric_memory(self, dtype, size=None, offset=0):
        """This rank's control words and halves as an array, not copied: to look at, for all of it is the protocol's (see
        `pyep.layout.draw`).  Valid until `destroy`.  dtype, size, offset: as for `get_local_buffer_tensor`."""
        self._connection.require_usable()
        transport = self._connection.transport
        return arrays.view(arrays.Memory(self.engine, transport.base, (self._connection.nbytes,), transport.memory), dtype, size,
                           offset)

    capture = staticmethod(events.capture)
    warm_up = warm_up

    @staticmethod
    def set_num_sms(new_num_sms):
        """The SMs of high-throughput operations without a `Config`, and of `Config`s made from now on, an even number.  Low-latency
        operations take all."""
        Buffer.num_sms = config.check_num_sms(new_num_sms)

    @staticmethod
    def get_dispatch_config(num_ranks):
        """The `Config` of a high-throughput dispatch between any number of ranks."""
        return config.recommended(Buffer.num_sms, num_ranks)

    @staticmethod
    def get_combine_config(num_ranks):
        """The `Config` of a high-throughput combine between any number of ranks."""
        return config.recommended(Buffer.num_sms, num_ranks)

    @staticmethod
    def is_sm90_compiled():
        """Whether FP8 can be sent here: on GPUs from compute capability 8.9 on, and by the CPU engine."""
        if choose_device() == "cpu":
            return True
        from .kernels import cuda
        return cuda.compute_capability() >= (8, 9)

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts, num_topk=None):
        """Bytes of num_rdma_bytes for low-latency operations of up to this shape.

        num_topk (an addition to DeepEP's interface): the most experts that a token selects.  Without it there is room for
        any number of them, which takes num_experts / num_topk times the memory.
        """
        check_shape(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts, 1 if num_topk is None else num_topk)
        return layout.low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts, num_topk)

    @staticmethod
    def get_high_throughput_size_hint(num_max_tokens, hidden, num_ranks, num_topk=0, *, hidden_bytes=None, num_results=2):
        """Bytes of num_nvl_bytes that suffice for high-throughput operations whatever the routing: every token may go to every
        rank.  (With random routing a good deal less does: a rank receives fewer rows.)

        num_max_tokens: the most that any rank has.  num_topk: of the indices and weights that travel.
        hidden_bytes: of a token as it is dispatched, scales included, 2 * hidden (bf16) if None; FP8 has hidden + hidden / 32.
        num_results: how many dispatches' results have room, that are as large, without being copied; in `recv_x = dispatch(..)` the
            old result lives until the new one is there.  However many more are held, no operation lacks room: see `copied_results`.
        """
        return layout.high_throughput_size_hint(*check_high_throughput_shape(num_max_tokens, hidden, num_ranks, num_topk,
                                                                             hidden_bytes, num_results))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def destroy(self):
        """Free everything; idempotent.  Every rank calls it, in whatever order if there are several Buffers, also after the group
        or communicator is gone.

        Where something may be freed only when the other ranks have let go of it (on GPUs memory, between nodes what still
        travels), it waits for them for a second at most; what is left is freed when Buffers are made or destroyed later, or at
        exit.  After an error it does not wait.  A Buffer that is dropped without it does the same when it is collected, but waits
        for nobody.  Arrays of results keep the memory that they lie in.

        Raises what went wrong in the last operations, if that was not raised before; everything is freed all the same.
        """
        try:
            self._connection.close()
        finally:
            self._forget()
            self._forget_high_throughput()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and self._connection.error is None:
            self._connection.error = error                       # the other ranks may never come: do not wait for them
        self.destroy()
