"""`Buffer`: the one object a user holds.

Each operation reads: check the arguments, launch, hand back arrays and a handle.  Names, argument order and meaning follow
DeepEP's V1 `deep_ep.Buffer`.
"""
import numpy as np

from . import arrays, layout
from .channels.transport import MpiBootstrap, TorchBootstrap
from .checks import check_construction, check_experts, check_handle, check_implemented, check_shape
from .choices import choose_device, choose_engine, choose_transport
from .errors import EPClosedError, EPError
from .events import EventOverlap
from .low_latency import (COMBINE, DISPATCH, InFlight, LowLatencyDispatched, LowLatencyHandle, Results, check_fits,
                          error_from, fingerprint, make_plan)

COMPILE_ALLOWANCE_S = 60.0              # a peer that compiles is not late


class Buffer:
    """Symmetric memory over all ranks of a group, and the operations on it.

    group, comm: a torch.distributed process group or an mpi4py communicator; exactly one.  Collective.
    num_rdma_bytes: bytes of symmetric memory for low-latency operations, see `get_low_latency_rdma_size_hint`.
    low_latency_mode: must be True (the high-throughput operations are not there yet).
    num_nvl_bytes, num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, explicitly_destroy: accepted for
        DeepEP's sake.
    transport: "auto", "host" (CPU engine) or "ipc" (GPUs of one host); the environment's PYEP_TRANSPORT overrides "auto".
    timeout_s: how long a rank waits for another before it raises `EPTimeoutError`.

    The engine is the GPU where one is visible, unless PYEP_DEVICE=cpu says otherwise.  All calls on a buffer must be ordered:
    from one stream, or from streams that wait for each other.
    """

    def __init__(self, group=None, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24,
                 allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False, enable_shrink=False,
                 comm=None, *, transport="auto", timeout_s=100.0):
        self._transport = None
        check_construction(group, comm, num_rdma_bytes, low_latency_mode, enable_shrink, timeout_s)
        device = choose_device()
        transport = choose_transport(transport, device)
        self._timeout_s, self._timeout_ns, self._given_bytes = timeout_s, int(timeout_s * 1e9), int(num_rdma_bytes)
        self._bootstrap = MpiBootstrap(comm, timeout_s) if comm is not None else TorchBootstrap(group)
        self.rank, self.group_size = self._bootstrap.rank, self._bootstrap.size
        self._require_same("num_rdma_bytes", self._given_bytes)
        self._engine = choose_engine(device, self._bootstrap, timeout_s)
        self._nbytes = max(self._given_bytes, layout.control_bytes(self.group_size))
        self._half_bytes = layout.half_capacity(self._nbytes, self.group_size)
        self._ready_bytes = 0                                    # of each half: holds the absence value, peers may write
        self._plans, self._shapes, self._in_flight, self._error = {}, {}, InFlight(), None
        self._results, self._combine_inputs = {}, {}
        self.transport, self._transport = transport.name, transport(self._bootstrap, self._nbytes, timeout_s)
        try:
            self._write_control()
            self._meet("Buffer: connecting")
        except Exception as error:
            self._error = error
            self.destroy()
            raise

    # ---- queries -----------------------------------------------------------------------------------------------------

    @property
    def engine(self):
        """"cpu" or "cuda"."""
        return self._engine.name

    def is_available(self):
        """Whether all peers are connected and no error has made the buffer unusable."""
        return self._transport is not None and self._error is None

    def get_local_device_id(self):
        """The index of this rank's GPU; 0 on the CPU engine."""
        return self._engine.index

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts, num_topk=None):
        """Bytes of num_rdma_bytes for low-latency operations of up to this shape.

        num_topk (an addition to DeepEP's interface): the most experts that a token selects.  Without it there is room for
        any number of them, which takes num_experts / num_topk times the memory.
        """
        check_shape(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts, 1 if num_topk is None else num_topk)
        return layout.low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts, num_topk)

    # ---- low latency -------------------------------------------------------------------------------------------------

    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,
                             cumulative_local_expert_recv_stats=None, dispatch_wait_recv_cost_stats=None, use_fp8=True,
                             round_scale=False, use_ue8m0=False, async_finish=False, return_recv_hook=False, *,
                             topk_weights=None, output_layout="expert_major", out=None):
        """Send every token to the experts that it selects.

        x: [T, H] bf16, T <= M = num_max_dispatch_tokens_per_rank; T may differ between ranks and be 0.
        topk_idx: [T, K] int64 or int32, global experts; -1 selects nothing.
        use_fp8: must be False so far (BF16 only).
        return_recv_hook: launch only the send half; the returned hook launches the receive half.
        out: an [L, R*M, H] bf16 array to receive into, instead of one of the buffer's two.

        Returns (recv_x [L, R*M, H] bf16, recv_count [L] int32, handle, event, hook).  The first recv_count[e] rows of local
        expert e are valid, ordered by (source rank, source token).  handle = (src_info [L, R*M] int32, layout_range [L, R]
        int64, M, H, E).  The results live until the second next dispatch of this shape.
        """
        check_implemented(
            use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0, async_finish=async_finish, topk_weights=topk_weights,
            cumulative_local_expert_recv_stats=cumulative_local_expert_recv_stats,
            dispatch_wait_recv_cost_stats=dispatch_wait_recv_cost_stats, output_layout=output_layout)
        self._require_usable()
        library = self._library_of(x, "x")
        max_tokens = num_max_dispatch_tokens_per_rank
        x_at = arrays.check(x, "x", library, ("bfloat16",), ("T", "H"))
        topk_at = arrays.check(topk_idx, "topk_idx", library, ("int64", "int32"), (x.shape[0], "K"))
        (num_tokens, hidden), num_topk = x.shape, topk_idx.shape[1]
        check_shape(max_tokens, hidden, self.group_size, num_experts, num_topk, num_tokens, topk_name="topk_idx")
        if library.engine == "cpu":
            check_experts(topk_idx, num_experts)
        shape = layout.LowLatency(self.group_size, int(max_tokens), hidden, int(num_experts), num_topk)
        if out is not None:
            arrays.check(out, "out", library, ("bfloat16",), (shape.local_experts, shape.rows_per_expert, hidden), writable=True)
        plan = self._plan(shape, _index_bytes(library, topk_idx), library)
        results = self._results[library, shape]
        received = results.next(out)
        args = (x_at, topk_at, num_tokens, *(library.pointer(a) for a in received))
        hook = self._run(DISPATCH, plan, library, args, (x, topk_idx, received), return_recv_hook)
        results.dispatches += 1                                  # only now: a call that was refused is no dispatch
        handle = LowLatencyHandle(id(self), results.dispatches, received, shape, num_tokens)
        return LowLatencyDispatched(received.recv_x, received.recv_count, handle, EventOverlap(library, self._check), hook)

    def low_latency_combine(self, x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False, async_finish=False,
                            return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None):
        """Bring the experts' outputs back and sum them: out[t] = bf16(sum over k, in order, of weight[t, k] * y[t, k]), fp32.

        x: [L, R*M, H] bf16, the output of the local experts, row by row as dispatch delivered their inputs.
        topk_idx: [T, K] int64 or int32 and topk_weights: [T, K] fp32, of the tokens that this rank dispatched.  A selection that
            has become -1 since then adds nothing.
        handle: of the dispatch; it serves any number of combines.
        zero_copy: x is the array of `get_next_low_latency_combine_buffer`.
        return_recv_hook: launch only the send half; the returned hook launches the receive half.

        Returns (combined_x [T, H] bf16, event, hook).
        """
        check_implemented(use_logfmt=use_logfmt, async_finish=async_finish,
                          combine_wait_recv_cost_stats=combine_wait_recv_cost_stats)
        self._require_usable()
        check_handle(handle, id(self))
        shape, num_tokens = handle.shape, handle.num_tokens
        library = self._library_of(x, "x")
        if self._results[arrays.library_of(handle[0], "handle"), shape].dispatches > handle.number + 1:
            raise ValueError("handle is of a dispatch whose results were overwritten: two more of that shape came after it")
        x_at = arrays.check(x, "x", library, ("bfloat16",), (shape.local_experts, shape.rows_per_expert, shape.hidden))
        topk_at = arrays.check(topk_idx, "topk_idx", library, ("int64", "int32"), (num_tokens, shape.num_topk))
        weights_at = arrays.check(topk_weights, "topk_weights", library, ("float32",), (num_tokens, shape.num_topk))
        if zero_copy and x_at != library.pointer(self.get_next_low_latency_combine_buffer(handle)):
            raise ValueError("zero_copy=True, but x is not the array that get_next_low_latency_combine_buffer returned")
        if out is None:
            out = library.empty((num_tokens, shape.hidden), "bfloat16")
        out_at = arrays.check(out, "out", library, ("bfloat16",), (num_tokens, shape.hidden), writable=True)
        plan = self._plan(shape, _index_bytes(library, topk_idx), library)
        args = (x_at, topk_at, weights_at, num_tokens, *(library.pointer(a) for a in handle.private), out_at)
        hook = self._run(COMBINE, plan, library, args, (x, topk_idx, topk_weights, handle, out), return_recv_hook)
        return out, EventOverlap(library, self._check), hook

    def get_next_low_latency_combine_buffer(self, handle):
        """An [L, R*M, H] bf16 array for the experts' output, from which combine sends with zero_copy=True."""
        self._require_usable()
        check_handle(handle, id(self))
        library, shape = arrays.library_of(handle[0], "handle"), handle.shape
        if (library, shape) not in self._combine_inputs:
            rows = shape.local_experts, shape.rows_per_expert, shape.hidden
            self._combine_inputs[library, shape] = library.empty(rows, "bfloat16")
        return self._combine_inputs[library, shape]

    # ---- how an operation runs ---------------------------------------------------------------------------------------

    def _plan(self, shape, index_bytes, library):
        """The kernels of a shape.  The first time, all ranks compile, make ready the memory it uses, and meet."""
        plan = self._plans.get((shape, index_bytes))
        if plan is None:
            check_fits(shape, self._nbytes, self._given_bytes)
        new_results = (library, shape) not in self._results
        if (plan is None or new_results) and library.is_capturing():
            raise RuntimeError("the first operation of a shape compiles kernels: run it once before capturing a graph")
        if new_results:
            self._results[library, shape] = Results(library, shape)
        if plan is None:
            known = shape in {s for s, _ in self._plans}         # with the other integer type: only this rank may need it
            plan = make_plan(self._engine, shape, index_bytes, self.rank)
            self._make_ready(shape.half_bytes)
            if not known:
                self._meet(f"first use of {shape}", fingerprint(shape))
            self._plans[shape, index_bytes] = plan
        return plan

    def _run(self, operation, plan, library, args, keep, return_recv_hook):
        """Launch an operation, or its send half; then the result is a function that launches the receive half."""
        kernels = plan.dispatch if operation == DISPATCH else plan.combine
        number, lag = self._in_flight.send()
        self._shapes[operation] = plan.shape
        common = self._transport.base, self.rank, self._half_bytes, self._timeout_ns

        def launch(phase, lag):
            try:
                kernels[phase].launch(library.stream(), *common, lag, *args)
            except Exception as error:                           # sent or not, received or not: nobody knows
                self._error = error
                raise
            if self._engine.name == "cpu":
                self._check()

        def hook():
            self._require_usable()
            launch("receive", self._in_flight.receive(number))
        hook.arrays = keep                                       # they must live until the hook is called
        if "both" in kernels and not return_recv_hook:
            self._in_flight.receive(number)
            return launch("both", lag)
        launch("send", lag)
        return hook if return_recv_hook else hook()

    def _library_of(self, array, argument):
        library = arrays.library_of(array, argument)
        if library.engine != self._engine.name:
            where = "GPU" if self._engine.name == "cuda" else "CPU"
            raise TypeError(f"{argument} is in {library.engine} memory, but this buffer runs on the {where}")
        if library.device(array) != self._engine.index:
            raise ValueError(f"{argument} is on GPU {library.device(array)}, but this buffer is on GPU {self._engine.index}")
        return library

    # ---- memory, errors, the end -------------------------------------------------------------------------------------

    def _write_control(self, epoch=0):
        """Fill the control words.  `epoch`: the epoch of the operation before the first (tests start near the wrap-around)."""
        control = layout.control(self.group_size)
        self._transport.fill(0, layout.control_bytes(self.group_size), 0)
        self._transport.write(control["status"].offset, np.array([self._transport.status], np.int64))
        self._transport.write(control["peers"].offset, np.array(self._transport.peers, np.int64))
        self._transport.write(control["epoch"].offset, np.full(layout.MAX_BLOCKS, epoch, np.int64))
        consumed = np.full(control["consumed"].nbytes // 8, epoch, np.int64)
        self._transport.write(control["consumed"].offset, consumed)

    def _make_ready(self, nbytes):
        """Put the absence value into the part of each half that no operation has used so far."""
        if nbytes > self._ready_bytes:
            for half in (0, 1):
                start = layout.control_bytes(self.group_size) + half * self._half_bytes
                self._transport.fill(start + self._ready_bytes, nbytes - self._ready_bytes, 0xFF)
            self._ready_bytes = nbytes

    def _require_same(self, argument, value):
        """ValueError on every rank unless all were given the same."""
        values = self._bootstrap.allgather(value, self._timeout_s, f"Buffer: comparing {argument}")
        if len(set(values)) > 1:
            raise ValueError(f"{argument} differs between ranks: {values}, by rank")

    def _meet(self, what, word=0):
        """All ranks meet on the host and show that they mean the same."""
        try:
            words = self._bootstrap.meet(self._timeout_s + COMPILE_ALLOWANCE_S, what, word)
        except EPError as error:
            self._error = error
            raise
        others = [r for r, w in enumerate(words) if w != word]
        if others:
            self._error = ValueError(f"{what}: ranks {others} made another call (another shape, or another operation) than "
                                     f"rank {self.rank}")
            raise self._error

    def _require_usable(self):
        if self._transport is None:
            raise EPClosedError("this Buffer was destroyed")
        if self._error is not None:
            raise EPClosedError(f"this Buffer is unusable after an error; destroy it. The error was: {self._error}")
        self._check()

    def _check(self):
        """Raise what went wrong in an operation that has run, if anything has.  Does not wait for a GPU."""
        if self._error is not None:
            raise self._error
        record = self._transport.read_status() if self._transport else [0]
        if record[0]:
            self._error = error_from(record, self.rank, self._shapes, self._half_bytes, self._timeout_s)
            raise self._error

    def destroy(self):
        """Free everything; collective, idempotent.  After an error, or if a peer is gone, it does not wait for the others.

        Raises what went wrong in the last operations, if that was not raised before; everything is freed all the same.
        """
        if self._transport is None:
            return
        unreported = None
        if self._error is None:
            try:
                self._engine.synchronize()
                self._check()
            except Exception as error:
                self._error = unreported = error
        transport, self._transport = self._transport, None
        self._met_to_part()
        transport.close(self._met_to_part)
        self._plans, self._results, self._combine_inputs = {}, {}, {}
        if self._error is None:
            self._bootstrap.close()
        if unreported is not None:
            raise unreported

    def _met_to_part(self):
        """Whether all ranks have come to part; never after an error."""
        if self._error is None:
            try:
                self._bootstrap.meet(self._timeout_s, "Buffer.destroy")
            except EPError as error:
                self._error = error
        return self._error is None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and self._error is None:
            self._error = error                                  # the other ranks may never come: do not wait for them
        self.destroy()


def _index_bytes(library, topk_idx):
    return 8 if library.dtype(topk_idx) == "int64" else 4
