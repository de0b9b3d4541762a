"""The low-latency operations of a `Buffer`: each checks its arguments, launches, and hands back arrays and a handle."""
import functools

from . import layout
from .calls import Calls
from .checks import check_async, check_combine, check_dispatch, check_experts, check_handle, check_room, check_shape
from .kernels.low_latency_boxes import UNORDERED
from .low_latency import (COMBINE, DISPATCH, WORDS_FOR, InFlight, check_fits, error_from, fingerprint, make_plan, void_error,
                          widest)
from .results import LowLatencyDispatched, LowLatencyHandle, Results

MOST_CALLS = 4096                       # checked calls that are kept in mind
NO_MASKS = ("leaving ranks out of the operations (enable_shrink=True, the mask buffer) is not implemented yet; a rank that does "
            "not answer ends an operation with EPTimeoutError")


class LowLatencyOperations:
    """The part of `Buffer` that serving and decoding use."""

    def __init__(self, connection):
        self._connection = connection
        self._ready_bytes = 0                                    # of each half: holds the absence value, peers may write
        self._plans, self._shapes, self._in_flight = {}, {}, InFlight()
        self._calls, self._results = Calls(connection, MOST_CALLS), {}
        words = functools.partial(error_from, rank=connection.rank, shapes=self._shapes, half_bytes=connection.half_bytes,
                                  timeout_s=connection.timeout_s)
        connection.words_for.update(dict.fromkeys(WORDS_FOR, words))
        connection.words_for["void"] = functools.partial(void_error, rank=connection.rank, shapes=self._shapes)

    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,
                             cumulative_local_expert_recv_stats=None, dispatch_wait_recv_cost_stats=None, use_fp8=True,
                             round_scale=False, use_ue8m0=False, async_finish=False, return_recv_hook=False, *,
                             topk_weights=None, output_layout="expert_major", out=None, previous_event=None):
        """Send every token to the experts that it selects.

        x: [T, H] bf16, T <= M = num_max_dispatch_tokens_per_rank; T may differ between ranks and be 0.
        topk_idx: [T, K] int64 or int32, global experts; -1 selects nothing.
        cumulative_local_expert_recv_stats: [L] int32, to which the rows that each local expert got are added.
        dispatch_wait_recv_cost_stats: [R] int64, to which the ns are added that this rank, ready to receive, waited until each
            source had begun to send (of another node: until what it sends had come): the rank that all others wait for is the slow
            one.
        use_fp8: send e4m3 in blocks of 128 values with fp32 scales; recv_x is then the pair (values, scales).  The recipe is
            `pyep.reference.quantize`.  round_scale: scales are powers of two.  use_ue8m0: four scales' exponents in an int32.
        async_finish: run on the buffer's own stream, after what the caller's current stream has to do.  That stream does not wait
            for it: the returned event is for that.  Until then keep the event, which keeps the inputs, and do not change them.
        return_recv_hook: launch only the send half; the returned hook launches the receive half, on the stream current then.
        topk_weights: [T, K] fp32, to travel with the tokens; combine then reduces on the experts' rank first.
        output_layout: "expert_major", or "rank_major": each token once per rank, not once per expert.
        out: an array like recv_x (BF16 only) to receive into, instead of one of the buffer's two.
        previous_event: what `Buffer.capture` or an operation returned as event, to wait for; with async_finish instead of the
            current stream.

        Returns (recv_x, recv_count, handle, event, hook) as a `LowLatencyDispatched`.
        expert_major: recv_x [L, R*M, H], recv_count [L] int32; the first recv_count[e] rows of local expert e are valid, ordered
            by (source rank, source token).  handle = (src_info [L, R*M] int32, layout_range [L, R] int64, M, H, E).
        rank_major: recv_x [R, M, H], recv_count [R] int32; the first recv_count[s] rows of source s are valid, in the order of
            its tokens.  handle = (src_info [R, M], layout_range [R], M, H, E).  With the attributes recv_topk_idx [R, M, K]
            int64 (local experts, -1 elsewhere) and, given topk_weights, recv_topk_weights [R, M, K] fp32.
        FP8: scales are fp32 [.., H/128] or, with use_ue8m0, int32 [.., H/512], each column contiguous.
        The results live until the second next dispatch of this mode (all of the above but T and M), whatever its M.

        EPRoutingError: topk_idx names an expert too often, or on GPUs one that does not exist (on the CPU engine: ValueError).
        There the dispatch is void, all ranks get the error when they wait for it, and its results are garbage; the buffer stays
        usable.
        """
        if async_finish or previous_event is not None:
            check_async(async_finish, return_recv_hook, previous_event)
        self._connection.require_usable()
        stats, waits = cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats
        call, (x_at, idx_at, weights_at, stats_at, waits_at, out_at) = self._calls.find(
            "dispatch", check_dispatch, (x, topk_idx, topk_weights, stats, waits, out),
            (num_max_dispatch_tokens_per_rank, num_experts, use_fp8, round_scale, use_ue8m0, output_layout))
        library, shape, num_tokens, _ = call.checked
        if library.engine == "cpu":
            check_experts(topk_idx, shape.num_experts)
            check_room(topk_idx, shape, self._connection.rank)
        _, results = self._made_ready(call, "dispatch")
        received, addresses = results.next(shape)
        if out is not None:
            received, addresses = received._replace(recv_x=out), addresses._replace(recv_x=out_at)
        args = x_at, idx_at, weights_at, num_tokens, stats_at, waits_at, *addresses
        event, hook = self._run(DISPATCH, call, args, (x, topk_idx, topk_weights, stats, waits, received), return_recv_hook,
                                async_finish, previous_event)
        handle = LowLatencyHandle(self._connection.number, results.dispatches, received, addresses, library, shape, num_tokens)
        recv_x = (received.recv_x, received.scales) if shape.fp8 else received.recv_x
        dispatched = LowLatencyDispatched(recv_x, received.recv_count, handle, event, hook)
        if shape.rank_major:
            dispatched.recv_topk_idx, dispatched.recv_topk_weights = received.recv_topk_idx, received.weight_of
        return dispatched

    def low_latency_combine(self, x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False, async_finish=False,
                            return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None, *, previous_event=None):
        """Bring the experts' outputs back and sum them, in fp32, in an order that is always the same.

        x: the output of the local experts, bf16, row by row as dispatch delivered their inputs: [L, R*M, H].
            rank-major: [R, M, H], for each received token the sum of what this rank's experts made of it, weighted by the caller.
        topk_idx: [T, K] int64 or int32 and topk_weights: [T, K] fp32, of the tokens that this rank dispatched.  A selection that
            has become -1 since then adds nothing.  If topk_weights were given to dispatch, or in the rank-major layout, they are
            not looked at and may be None.
        handle: of the dispatch; it serves any number of combines.
        zero_copy: send from the array of `get_next_low_latency_combine_buffer`, whatever x is.
        async_finish, return_recv_hook, previous_event: as for dispatch.
        out: a [T, H] bf16 array to sum into.  Must be given with async_finish and previous_event: memory made here might still be
            used by what the current stream has to do, which the operation does not wait for.
        combine_wait_recv_cost_stats: [R] int64, to which the ns are added that this rank waited until each rank had begun (of
            another node: until what it sends had come).

        direct: out[t] = bf16(sum over k, in order, of weight[t, k] * y[t, k]).
        rank-reduced (topk_weights were given to dispatch): every rank r makes p[r, t], the same sum over its own experts;
            out[t] = bf16(sum over r, in order, of bf16(p[r, t])).  rank-major: the caller has made the p[r, t].

        Returns (combined_x [T, H] bf16, event, hook).
        """
        if use_logfmt:
            raise NotImplementedError("use_logfmt=True is not implemented yet; pass use_logfmt=False")
        if async_finish or previous_event is not None:
            check_async(async_finish, return_recv_hook, previous_event)
        self._connection.require_usable()
        check_handle(handle, self._connection.number)
        library, shape, num_tokens, known = handle.library, handle.shape, handle.num_tokens, handle.addresses
        reduced, waits = shape.reduced, combine_wait_recv_cost_stats
        if reduced:
            topk_idx = topk_weights = None
        call, (x_at, idx_at, weights_at, waits_at, out_at) = self._calls.find(
            "combine", check_combine, (x, topk_idx, topk_weights, waits, out), (library, shape, num_tokens, zero_copy))
        _, results = self._made_ready(call, "combine")
        if results.dispatches > handle.number + 1:
            raise ValueError("handle is of a dispatch whose results were overwritten: two more of that mode came after it")
        if zero_copy:
            x = results.combine_input(shape, make=False)
            if x is None:
                raise ValueError("zero_copy=True sends the array of get_next_low_latency_combine_buffer, which was not called")
            x_at = library.pointer(x)
        if out is None:
            if async_finish and previous_event is not None:
                raise ValueError("out is None with async_finish=True and previous_event; expected an array: memory made here might "
                                 "still be in use on the current stream")
            out = library.empty((num_tokens, shape.hidden), "bfloat16")
            out_at = library.pointer(out)
        selections, more = ((), (known.weight_of, known.src_info)) if reduced else ((idx_at, weights_at), ())
        args = (x_at, *selections, num_tokens, waits_at, known.row_of, *more, known.sent, known.packet_of, known.selected, out_at)
        event, hook = self._run(COMBINE, call, args, (x, topk_idx, topk_weights, handle, out, waits), return_recv_hook,
                                async_finish, previous_event)
        return out, event, hook

    def get_next_low_latency_combine_buffer(self, handle):
        """An [L, R*M, H] bf16 array (rank-major: [R, M, H]) for the experts' output, from which combine sends with zero_copy=True.

        Combine reads any array in place; this one saves the caller an allocation.  There is one for each mode: after a combine
        with async_finish, write into it once the event was waited for.  In the rank-major layout the output may also overwrite
        recv_x.
        """
        self._connection.require_usable()
        check_handle(handle, self._connection.number)
        return self._results_of(handle.library, handle.shape).combine_input(handle.shape)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts):
        """Make the buffer ready for a shape: it always is, since readers clean behind themselves.  Checks that the shape fits."""
        self._connection.require_usable()
        sizes = num_max_dispatch_tokens_per_rank, hidden, self._connection.size, num_experts
        check_shape(*sizes, 1)
        max_tokens, hidden, num_ranks, num_experts = map(int, sizes)
        self._check_fits(layout.LowLatency(num_ranks, max_tokens, hidden, num_experts, 1))

    def low_latency_update_mask_buffer(self, rank_to_mask, mask=False):
        """Leave a rank out of the operations (mask=True), or take it in again: needs enable_shrink=True, which is not there yet."""
        raise NotImplementedError(NO_MASKS)

    def low_latency_query_mask_buffer(self, mask_status):
        """Write 1 for each rank that is left out, else 0, into [R] int32: needs enable_shrink=True, which is not there yet."""
        raise NotImplementedError(NO_MASKS)

    def low_latency_clean_mask_buffer(self):
        """Take all ranks in again: needs enable_shrink=True, which is not there yet."""
        raise NotImplementedError(NO_MASKS)

    # ---- how an operation runs -------------------------------------------------------------------------------------------

    def _made_ready(self, call, operation):
        """(kernels by phase, `Results`) for a call.  The first time it is more than a look, and all ranks meet."""
        if call.ready is None:
            plan = self._plan(call)
            call.ready = getattr(plan, operation), self._results_of(call.checked.library, call.checked.shape)
        _, results = call.ready
        if not results.has_room(call.checked.shape):
            self._refuse_capture(call, "needs memory for its results")
            results.grow(call.checked.shape)
            self._connection.engine.synchronize()                # that memory may be in use on a stream that is not waited for
        return call.ready

    def _plan(self, call):
        """The kernels of a call's shape.  The first time, and whenever M is larger than before, all ranks make ready the memory it
        uses, and meet."""
        connection, (_, shape, _, index_bytes) = self._connection, call.checked
        compiled = widest(connection.engine, shape)
        known = [nbytes for s, nbytes in self._plans if s == compiled]
        index_bytes = index_bytes or known[0]                    # a combine that takes no topk_idx: those of its dispatch
        plan = self._plans.get((compiled, index_bytes))          # None though known: only this rank may need the other integers
        if plan is None or shape.half_bytes > self._ready_bytes:
            self._check_fits(shape)
            self._refuse_capture(call, "compiles kernels, or needs more of the buffer than any before")
        if plan is None:
            plan = make_plan(connection.engine, shape, index_bytes, connection.rank, self._ports())
        if not known or shape.half_bytes > self._ready_bytes:
            self._make_ready(shape.half_bytes)
            connection.meet(f"first use of {shape}", fingerprint(shape) + shape.max_tokens)
        self._plans[compiled, index_bytes] = plan
        return plan

    def _results_of(self, library, shape):
        """What dispatches of a mode are received into, whatever M is."""
        key = library, shape._replace(max_tokens=0)
        if key not in self._results:
            self._results[key] = Results(library, self._ports())
        return self._results[key]

    @staticmethod
    def _refuse_capture(call, what):
        """RuntimeError if the call is to be captured into a graph."""
        if call.checked.library.is_capturing():
            raise RuntimeError(f"this operation {what}: run it once before capturing a graph, or call Buffer.warm_up, with "
                               f"num_max_dispatch_tokens_per_rank={call.checked.shape.max_tokens}")

    def _run(self, operation, call, args, keep, return_recv_hook, async_finish, previous_event):
        """Launch an operation, or its send half: (its event, what launches the receive half or None)."""
        connection, library, (kernels, results), receive = self._connection, call.checked.library, call.ready, None
        results.note_capture()
        current = library.stream()
        stream = connection.streams.enter(current, async_finish, previous_event)
        if not return_recv_hook and "both" in kernels:
            lag = self._in_flight.send_and_receive()
            self._note(operation, call)
            self._launch(call, "both", stream, lag, args)
        else:
            number, lag = self._in_flight.send()
            self._note(operation, call)
            self._launch(call, "send", stream, lag, args)
            receive = ReceiveHook(self, call, number, args, keep)
            if not return_recv_hook:
                receive(stream)
        event = connection.streams.event(library, current, keep, async_finish, previous_event, connection.check)
        return event, receive if return_recv_hook else None

    def _note(self, operation, call):
        """An operation is launched now, and no longer refused: errors are about its shape, and results of earlier dispatches are
        overwritten, even if it turns out to be void."""
        self._shapes[operation] = call.checked.shape
        if operation == DISPATCH:
            _, results = call.ready
            results.dispatches += 1

    def _launch(self, call, phase, stream, lag, args):
        connection, (kernels, _) = self._connection, call.ready
        connection.launch(kernels[phase], stream, connection.transport.base, connection.rank, connection.half_bytes,
                          connection.timeout_ns, lag, call.checked.shape.max_tokens, *args)

    def _ports(self):
        """0 if all ranks map each other's memory, else what PORTS is in the kernels."""
        if self._connection.nodes.count == 1:
            return 0
        return 1 if self._connection.transport.orders_puts else UNORDERED

    def _check_fits(self, shape):
        check_fits(shape, self._connection.nbytes, self.num_rdma_bytes)

    def _make_ready(self, nbytes):
        """Put the absence value into the part of each half that no operation has used so far."""
        connection = self._connection
        if nbytes > self._ready_bytes:
            for half in (0, 1):
                start = layout.control_bytes(connection.size) + half * connection.half_bytes
                connection.transport.fill(start + self._ready_bytes, nbytes - self._ready_bytes, 0xFF)
            self._ready_bytes = nbytes

    def _forget(self):
        """Let go of all arrays and kernels."""
        self._calls.forget()
        self._plans, self._results = {}, {}


class ReceiveHook:
    """Launches the receive half of an operation, once."""

    def __init__(self, operations, call, number, args, keep):
        """number: the operation's, see `InFlight`.  args: of its kernels.  keep: the arrays that these address."""
        self._operations, self._call, self._number, self._args, self._keep = operations, call, number, args, keep

    def __call__(self, stream=None):
        """stream: the current one if None."""
        operations, connection = self._operations, self._operations._connection
        if stream is None:
            connection.require_usable()
            stream = connection.streams.enter(self._call.checked.library.stream())
        lag = operations._in_flight.receive(self._number)
        operations._launch(self._call, "receive", stream, lag, self._args)
