"""`Buffer`: the one object a user holds.

Each operation reads: check the arguments, launch, hand back arrays and a handle.  Names, argument order and meaning follow
DeepEP's V1 `deep_ep.Buffer`.
"""
import os

import numpy as np

from . import arrays, layout
from .channels.transport import MpiBootstrap, TorchBootstrap, host_identity
from .errors import EPClosedError, EPError, EPTransportError
from .events import EventOverlap
from .low_latency import (InFlight, LowLatencyDispatched, LowLatencyHandle, Received, check_fits, error_from, fingerprint, make_plan)

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
        self._transport = self._bootstrap = None
        if (group is None) == (comm is None):
            raise ValueError("pass either group= (torch.distributed) or comm= (mpi4py), and not both")
        if not low_latency_mode or enable_shrink:
            raise NotImplementedError("only low_latency_mode=True, enable_shrink=False is implemented so far")
        if not isinstance(num_rdma_bytes, (int, np.integer)) or num_rdma_bytes < 0:
            raise ValueError(f"num_rdma_bytes is {num_rdma_bytes!r}; expected a number of bytes")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s!r}; expected seconds, more than 0")
        self._bootstrap = MpiBootstrap(comm) if comm is not None else TorchBootstrap(group)
        self.rank, self.group_size = self._bootstrap.rank, self._bootstrap.size
        self._timeout_s, self._timeout_ns = timeout_s, int(timeout_s * 1e9)
        self._engine = _choose_engine(self._bootstrap)
        nbytes = max(int(num_rdma_bytes), layout.control_bytes(self.group_size))
        self._transport = _choose_transport(transport, self._engine.name)(self._bootstrap, nbytes, timeout_s)
        self._nbytes, self._half_bytes = nbytes, layout.half_capacity(nbytes, self.group_size)
        self._ready_bytes = 0                                    # of each half: holds the absence value, peers may write
        self._write_control()
        self._plans, self._received, self._turn = {}, {}, 0
        self._in_flight, self._latest, self._error = InFlight(), None, None
        self._meet("Buffer: connecting")

    # ---- queries -----------------------------------------------------------------------------------------------------

    @property
    def engine(self):
        """"cpu" or "cuda"."""
        return self._engine.name

    @property
    def transport(self):
        """The name of the transport in use, for instance "ipc"."""
        return self._transport.name

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
        _check_shape(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts, num_topk or 1)
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
        _not_yet(use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0, async_finish=async_finish, topk_weights=topk_weights,
                 cumulative_local_expert_recv_stats=cumulative_local_expert_recv_stats,
                 dispatch_wait_recv_cost_stats=dispatch_wait_recv_cost_stats, output_layout=output_layout)
        self._require_usable()
        library = self._library_of(x, "x")
        max_tokens = num_max_dispatch_tokens_per_rank
        x_at = arrays.check(x, "x", library, ("bfloat16",), ("T", "H"))
        topk_at = arrays.check(topk_idx, "topk_idx", library, ("int64", "int32"), (x.shape[0], "K"))
        num_tokens, hidden = x.shape
        _check_shape(max_tokens, hidden, self.group_size, num_experts, topk_idx.shape[1], num_tokens)
        if library.engine == "cpu":
            _check_experts(topk_idx, num_experts)
        shape = layout.LowLatency(self.group_size, int(max_tokens), hidden, int(num_experts), topk_idx.shape[1])
        plan = self._plan(shape, _index_bytes(library, topk_idx), library)
        received = self._next_received(library, shape)
        if out is not None:
            arrays.check(out, "out", library, ("bfloat16",), (shape.local_experts, shape.rows_per_expert, hidden))
            received = received._replace(recv_x=out)
        args = (x_at, topk_at, num_tokens, *(library.pointer(a) for a in received))
        keep = (x, topk_idx, received)
        hook = self._run("low_latency_dispatch", plan, plan.dispatch, library, args, keep, return_recv_hook)
        handle = LowLatencyHandle(received, shape, num_tokens)
        return LowLatencyDispatched(received.recv_x, received.recv_count, handle, EventOverlap(library, self._check), hook)

    def low_latency_combine(self, x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False, async_finish=False,
                            return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None):
        """Bring the experts' outputs back and sum them: out[t] = bf16(sum over k, in order, of weight[t, k] * y[t, k]), fp32.

        x: [L, R*M, H] bf16, the output of the local experts, row by row as dispatch delivered their inputs.
        topk_idx: [T, K] int64 or int32 and topk_weights: [T, K] fp32, of the tokens that this rank dispatched.
        handle: of the dispatch; it serves any number of combines.
        zero_copy: x is the array of `get_next_low_latency_combine_buffer`.
        return_recv_hook: launch only the send half; the returned hook launches the receive half.

        Returns (combined_x [T, H] bf16, event, hook).
        """
        _not_yet(use_logfmt=use_logfmt, async_finish=async_finish, combine_wait_recv_cost_stats=combine_wait_recv_cost_stats)
        self._require_usable()
        if not isinstance(handle, LowLatencyHandle) or handle.shape.num_ranks != self.group_size:
            raise TypeError("handle is not one that low_latency_dispatch of this buffer returned")
        shape, num_tokens = handle.shape, handle.num_tokens
        library = self._library_of(x, "x")
        x_at = arrays.check(x, "x", library, ("bfloat16",), (shape.local_experts, shape.rows_per_expert, shape.hidden))
        topk_at = arrays.check(topk_idx, "topk_idx", library, ("int64", "int32"), (num_tokens, shape.num_topk))
        weights_at = arrays.check(topk_weights, "topk_weights", library, ("float32",), (num_tokens, shape.num_topk))
        if zero_copy and x_at != library.pointer(self.get_next_low_latency_combine_buffer(handle)):
            raise ValueError("zero_copy=True, but x is not the array that get_next_low_latency_combine_buffer returned")
        if out is None:
            out = library.empty((num_tokens, shape.hidden), "bfloat16")
        out_at = arrays.check(out, "out", library, ("bfloat16",), (num_tokens, shape.hidden))
        plan = self._plan(shape, _index_bytes(library, topk_idx), library)
        args = (x_at, topk_at, weights_at, num_tokens, library.pointer(handle.row_of), library.pointer(handle.source_tokens), out_at)
        keep = (x, topk_idx, topk_weights, handle, out)
        hook = self._run("low_latency_combine", plan, plan.combine, library, args, keep, return_recv_hook)
        return out, EventOverlap(library, self._check), hook

    def get_next_low_latency_combine_buffer(self, handle):
        """An [L, R*M, H] bf16 array for the experts' output, from which combine sends with zero_copy=True."""
        library, shape = arrays.library_of(handle[0], "handle"), handle.shape
        key = ("combine", library, shape)
        if key not in self._received:
            self._received[key] = library.empty((shape.local_experts, shape.rows_per_expert, shape.hidden), "bfloat16")
        return self._received[key]

    # ---- how an operation runs ---------------------------------------------------------------------------------------

    def _plan(self, shape, index_bytes, library):
        """The kernels of a shape.  The first time, all ranks compile, make ready the memory it uses, and meet."""
        plan = self._plans.get((shape, index_bytes))
        if plan is None:
            check_fits(shape, self._nbytes)
            if library.is_capturing():
                raise RuntimeError("the first operation of a shape compiles kernels: run it once before capturing a graph")
            plan = make_plan(self._engine, shape, index_bytes, self.rank)
            self._make_ready(shape.half_bytes)
            self._meet(f"first use of {shape}", fingerprint(shape, index_bytes))
            self._plans[shape, index_bytes] = plan
        return plan

    def _run(self, operation, plan, kernels, library, args, keep, return_recv_hook):
        """Launch an operation, or its send half; then the result is a function that launches the receive half."""
        number, lag = self._in_flight.send()
        self._latest = operation, plan
        stream = library.stream()
        common = (self._transport.base, self.rank, self._half_bytes, self._timeout_ns)
        if "both" in kernels and not return_recv_hook:
            self._in_flight.receive(number)
            kernels["both"].launch(stream, *common, lag, *args)
        else:
            kernels["send"].launch(stream, *common, lag, *args)

        def hook():
            self._require_usable()
            kernels["receive"].launch(library.stream(), *common, self._in_flight.receive(number), *args)
            self._check_cpu()
            return keep and None                                 # the arrays must live until here
        if return_recv_hook:
            self._check_cpu()
            return hook
        if "both" not in kernels:
            hook()
        self._check_cpu()
        return None

    def _next_received(self, library, shape):
        """One of the two sets of arrays for results, in turn."""
        self._turn ^= 1
        key = (self._turn, library, shape)
        if key not in self._received:
            self._received[key] = Received.empty(library, shape)
        return self._received[key]

    def _library_of(self, array, argument):
        library = arrays.library_of(array, argument)
        if library.engine != self._engine.name:
            where = "GPU" if self._engine.name == "cuda" else "CPU"
            raise TypeError(f"{argument} is in {library.engine} memory, but this buffer runs on the {where}")
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
        if self._transport is None or self._error is not None:
            return
        record = self._transport.read_status()
        if record[0]:
            operation, plan = self._latest
            self._error = error_from(record, self.rank, plan, operation, self._half_bytes, self._timeout_s)
            raise self._error

    def _check_cpu(self):
        if self._engine.name == "cpu":
            self._check()

    def destroy(self):
        """Free everything; collective, idempotent.  After an error, or if a peer is gone, it does not wait for the others."""
        if self._transport is None:
            return
        transport, self._transport = self._transport, None
        together = self._error is None

        def meet():
            nonlocal together
            if together:
                try:
                    self._bootstrap.meet(self._timeout_s, "Buffer.destroy")
                except EPError:
                    together = False
        self._engine.synchronize()
        meet()
        transport.close(meet)
        self._plans, self._received = {}, {}
        if together:
            self._bootstrap.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and self._error is None:
            self._error = error                                  # the other ranks may never come: do not wait for them
        self.destroy()


# ---- choices and checks ----------------------------------------------------------------------------------------------

def _choose_engine(bootstrap):
    """The engine of this rank: PYEP_DEVICE, or the GPU where there is one."""
    from .kernels.cpu import CpuEngine
    device = os.environ.get("PYEP_DEVICE", "").lower()
    if device not in ("", "cpu", "cuda"):
        raise ValueError(f"PYEP_DEVICE is {device!r}; expected cpu or cuda")
    if device == "cpu":
        return CpuEngine()
    try:
        from .kernels import cuda
        count = cuda.device_count()
    except ImportError as error:
        if device == "cuda":
            raise EPTransportError(f"PYEP_DEVICE=cuda needs the CUDA packages: pip install 'pyep[cuda]' ({error})") from error
        count = 0
    if count == 0:
        if device == "cuda":
            raise EPTransportError("PYEP_DEVICE=cuda, but the driver shows no GPU; see `nvidia-smi` and CUDA_VISIBLE_DEVICES")
        return CpuEngine()
    hosts = bootstrap.allgather(host_identity())
    local_rank = hosts[:bootstrap.rank].count(hosts[bootstrap.rank])
    current = cuda.current_device()
    return cuda.CudaEngine(local_rank % count if current is None else current)


def _choose_transport(name, engine):
    """The class of a transport by name."""
    if name == "auto":
        name = os.environ.get("PYEP_TRANSPORT") or {"cpu": "host", "cuda": "ipc"}[engine]
    if (name, engine) == ("host", "cpu"):
        from .channels.host import HostTransport
        return HostTransport
    if (name, engine) == ("ipc", "cuda"):
        from .channels.ipc import IpcTransport
        return IpcTransport
    if name in ("host", "ipc"):
        raise EPTransportError(f"transport {name!r} does not serve the {engine} engine: use \"host\" with cpu, \"ipc\" with cuda")
    raise ValueError(f"transport is {name!r}; expected \"auto\", \"host\" or \"ipc\"")


def _check_shape(max_tokens, hidden, num_ranks, num_experts, num_topk, num_tokens=0):
    """ValueError, naming the argument, for what no buffer can do."""
    if max_tokens < 1:
        raise ValueError(f"num_max_dispatch_tokens_per_rank is {max_tokens}; expected at least 1")
    if num_tokens > max_tokens:
        raise ValueError(f"x has {num_tokens} tokens, more than num_max_dispatch_tokens_per_rank = {max_tokens}")
    if hidden < 8 or hidden % 8:
        raise ValueError(f"hidden is {hidden}; expected a multiple of 8 (rows of whole 16-byte vectors)")
    if num_experts < 1 or num_experts % num_ranks:
        raise ValueError(f"num_experts is {num_experts}; expected a multiple of the {num_ranks} ranks")
    if num_experts // num_ranks > layout.MAX_LOCAL_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}; expected at most {layout.MAX_LOCAL_EXPERTS} a rank")
    if not 1 <= num_topk <= num_experts:
        raise ValueError(f"topk_idx selects {num_topk} experts a token; expected 1 to num_experts = {num_experts}")


def _check_experts(topk_idx, num_experts):
    """ValueError for an expert that does not exist.  Only on the CPU: on a GPU the kernel finds out, without a wait."""
    indices = np.asarray(topk_idx)
    if indices.size and not (-1 <= indices.min() and indices.max() < num_experts):
        raise ValueError(f"topk_idx has values from {indices.min()} to {indices.max()}; expected -1 to {num_experts - 1}")


def _index_bytes(library, topk_idx):
    return 8 if library.dtype(topk_idx) == "int64" else 4


def _not_yet(**arguments):
    """NotImplementedError for arguments whose feature is not there yet."""
    for name, value in arguments.items():
        accepted = "expert_major" if name == "output_layout" else None if value is None else False
        if value is not accepted and value != accepted:
            raise NotImplementedError(f"{name}={value!r} is not implemented yet; pass {name}={accepted!r}")
