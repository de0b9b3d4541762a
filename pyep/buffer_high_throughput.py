"""The high-throughput operations of a `Buffer`: each checks its arguments, launches, and hands back arrays and a handle."""
import functools
import time
from typing import NamedTuple

from . import arrays
from .calls import Calls
from .checks import check_experts
from .checks_high_throughput import (GIVEN, biases_of, check_cached, check_combine, check_dispatch, check_handle,
                                     check_layout, check_none, check_run, values_and_scales)
from .high_throughput import UNLIMITED, Kernels, Plan
from .high_throughput_errors import WORDS_FOR, error_from, too_small
from .high_throughput_results import HighThroughputHandle, Known, Received, Words, read_counts
from .kernels.intranode_notify import STATE

MOST_CALLS = 1000                       # checked calls that are kept in mind
POLLS = 1000                            # of the host for counts, between looks at the time


class HighThroughputOperations:
    """The part of `Buffer` that training and prefill use.

    copied_results, copied_bytes: how many dispatches had their results copied out of the operations' room, since the results' room
        had no space for them, and how many bytes that were; in a CUDA graph they count once, when it is captured.
    """

    num_sms = 20                        # see `Buffer.set_num_sms`

    def __init__(self, connection, num_nvl_bytes):
        self._connection, self._num_nvl_bytes = connection, num_nvl_bytes
        self.copied_results = self.copied_bytes = 0
        self._kernels = Kernels(connection.engine, connection.size)
        self._ht_calls, self._ht_plans = Calls(connection, MOST_CALLS), {}        # what calls launch, by what it depends on
        self._met = {}                                           # shapes for which the ranks have met, by fingerprint
        self._counts = {}                                        # memory in which layouts are counted
        words = functools.partial(error_from, rank=connection.rank, shapes=self._met, half_bytes=connection.half_bytes,
                                  num_ranks=connection.size, timeout_s=connection.timeout_s)
        connection.words_for.update(dict.fromkeys(WORDS_FOR, words))

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        """Count what this rank sends to whom: what `dispatch` wants to be told.  No other rank takes part.

        topk_idx: [T, K] int64 or int32, global experts; -1 selects nothing.
        previous_event, async_finish, allocate_on_comm_stream: as for `dispatch`.

        Returns (num_tokens_per_rank [R] int32: a token counts once for a rank, however many of its experts it selects;
        num_tokens_per_rdma_rank: None, as long as there is one node; num_tokens_per_expert [E] int32: selections;
        is_token_in_rank [T, R] bool; event).
        """
        connection = self._connection
        connection.require_usable()
        connection.require_one_node("get_dispatch_layout")
        check_run(None, previous_event)
        call, (idx_at,) = self._ht_calls.find("layout", check_layout, (topk_idx,), (num_experts,))
        library, num_tokens, *_, num_experts = call.checked
        if library.engine == "cpu":
            check_experts(topk_idx, num_experts)
        run = self._enter(library, async_finish, previous_event, fresh=True)
        _, kernel, counts = self._ready_layout(call)
        per_rank, per_expert = library.empty((connection.size,), "int32"), library.empty((num_experts,), "int32")
        in_rank, at = library.empty((num_tokens, connection.size), "bool"), library.pointer
        connection.launch(kernel, run.stream, connection.transport.base, connection.rank, idx_at, num_tokens, at(counts),
                          at(per_rank), at(per_expert), at(in_rank))
        return per_rank, None, per_expert, in_rank, self._event(run, (topk_idx, counts, per_rank, per_expert, in_rank))

    def dispatch(self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
                 num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0, config=None,
                 previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        """Send every token once to each rank that owns one of its experts.

        x: [T, H] bf16, or of any type of one byte where H is a multiple of 16; rows may lie apart, by a multiple of 16 bytes.  Or
            the pair (values of such a type, scales [T, S] or [T] of fp32, int32, uint8, float8_e8m0fnu, bf16.., in any strides).
            All of it travels byte for byte as it is: quantized in blocks of any size, packed FP4, packed exponents.  T may differ
            between ranks.
        handle: of an earlier dispatch, whose layout this one has: no counts are exchanged and only x moves (*cached*); the
            arguments up to topk_weights must then be None.
        num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: as `get_dispatch_layout` returns them.
        topk_idx: [T, K] int64 or int32, and topk_weights: [T, K] fp32, to travel with the tokens; both or the weights may be None.
        expert_alignment: the counts by expert are rounded up to a multiple of it.
        num_worst_tokens: if not 0, results have so many rows, and the host does not wait: use it in CUDA graphs.  If more come, to
            any rank, it is an `EPRoutingError` on all.
        config: whose num_sms bounds the multiprocessors that are used; else that of `set_num_sms`.
        previous_event: what `Buffer.capture` or an operation returned as event, to wait for; with async_finish instead of the
            current stream.
        async_finish: run on the buffer's own stream; the current one does not wait until the event is waited for.  Keep the event
            up to then, and do not change the inputs.
        num_tokens_per_rdma_rank, allocate_on_comm_stream: accepted for DeepEP's sake; results lie in symmetric memory, which
            belongs to no stream.

        Returns (recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, event).
        recv_x: [N, H] like x, or a pair like it, contiguous; ordered by (source rank, source token).  recv_topk_idx [N, K] int64:
        local experts, -1 where an expert is another rank's.  recv_topk_weights [N, K] fp32: 0 there.  The list has the selections
        of each local expert.  With num_worst_tokens the list is empty, recv_topk_idx is -1 and recv_topk_weights 0 in rows that no
        token came to, and recv_x is undefined there.

        Results lie where the peers wrote them, in num_nvl_bytes, as long as there is space, and hold it as long as arrays over them
        live.  Where there is none, all results of the dispatch are copied, once, into memory of their library (`copied_results`
        counts).  So it does not matter how many results are held.  `EPBufferTooSmallError` is raised where this one operation is
        too large for num_nvl_bytes: without num_worst_tokens on all ranks, in the same call; the buffer stays usable.
        """
        connection = self._connection
        connection.require_usable()
        connection.require_one_node("dispatch")
        check_run(config, previous_event)
        values, scales = values_and_scales(x)
        given = num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights
        call, addresses = self._checked_dispatch(values, scales, given, handle, expert_alignment, num_worst_tokens)
        moved, known = call.checked, handle and handle.known
        plan = self._ready(call, config, *self._most(moved, known))
        run = self._enter(moved.library, async_finish, previous_event)
        if handle is None:
            known, words = self._exchange(run, plan, moved, addresses)
        recv_x, sources, recv_topk_idx, recv_topk_weights, recv_scales = results = self._send(run, plan, moved, known, addresses)
        if handle is None:
            handle = HighThroughputHandle(connection.number, known, run.library, *words, sources, is_token_in_rank)
        event = self._event(run, (x, given, handle, results))
        recv_x = recv_x if scales is None else (recv_x, recv_scales)
        return recv_x, recv_topk_idx, recv_topk_weights, list(known.counts), handle, event

    def combine(self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False,
                allocate_on_comm_stream=False):
        """Bring rows back to the tokens that they were dispatched for, and sum them.

        x: [N, H] bf16, a row for each row of recv_x; with num_worst_tokens, rows that no token came to are not looked at.
        handle: of the dispatch, or of a cached one; it serves any number of combines.
        topk_weights: [N, K] fp32, to be summed beside x, or None.
        bias: [T, H] bf16 to begin the sums with, or two of them, or None.
        config, previous_event, async_finish, allocate_on_comm_stream: as for `dispatch`.

        Returns (combined_x [T, H] bf16, combined_topk_weights [T, K] fp32 or None, event).  combined_x[t] = bf16(bias + the token's
        rows from all ranks that it went to, in rank order, in fp32).  Nothing is weighted: the caller has done that.

        What comes from other ranks is staged in num_nvl_bytes during the operation.  `EPBufferTooSmallError` as for `dispatch`.
        """
        connection = self._connection
        connection.require_usable()
        connection.require_one_node("combine")
        check_run(config, previous_event)
        check_handle(handle, connection.number)
        known = handle.known
        biases = biases_of(bias)
        call, (x_at, weights_at, *biases_at) = self._ht_calls.find("combine", check_combine, (x, topk_weights, *biases),
                                                                (handle.library, known.num_rows, known.num_tokens))
        library, shape, *_ = call.checked
        at = library.pointer
        plan = self._ready(call, config, known.most_sent, known.most_received, known.most_sent)
        run = self._enter(library, async_finish, previous_event, fresh=True)
        staging, _, _, staged_weights, *_ = plan.rows.starts(known.num_sent, connection.transport.base + connection.heap.offset)
        out = library.empty((known.num_tokens, shape.hidden), "bfloat16")
        out_weights = library.empty((known.num_tokens, shape.num_topk), "float32") if shape.weighted else None
        connection.launch(plan.kernels["combine"], run.stream, *self._common(), plan.fingerprint, x_at, weights_at,
                          known.rank_prefix, known.send_rows, known.num_tokens, staging, staged_weights, *biases_at,
                          *[0] * (2 - len(biases)), at(out), 0 if out_weights is None else at(out_weights))
        return out, out_weights, self._event(run, (x, handle, topk_weights, bias, out, out_weights))

    # ---- how an operation runs -------------------------------------------------------------------------------------------

    def _sms(self, config):
        return (config.num_sms if config else 0) or type(self).num_sms

    def _common(self):
        """The first arguments of most kernels."""
        connection = self._connection
        return connection.transport.base, connection.rank, connection.timeout_ns

    def _ready_layout(self, call):
        """(num_sms, the kernel that counts for so many, memory in which it counts) for a call of `get_dispatch_layout`."""
        num_sms = self._sms(None)
        if call.ready is None or call.ready[0] != num_sms:
            (library, _, num_topk, index_bytes, num_experts), ranks = call.checked, self._connection.size
            kernel, blocks = self._kernels.layout(num_experts, ranks, num_topk, index_bytes, num_sms)
            key = library, blocks, num_experts
            if key not in self._counts:                          # for all to use in turn: no graph may find it gone
                self._counts[key] = library.empty((blocks, num_experts + ranks), "int32")
            call.ready = num_sms, kernel, self._counts[key]
        return call.ready

    def _checked_dispatch(self, values, scales, given, handle, expert_alignment, num_worst_tokens):
        """(the `Call` of a dispatch, addresses of values, scales and, without a handle, of what is given beside it)."""
        if handle is None:
            found = self._ht_calls.find("dispatch", check_dispatch, (values, scales, *given), (expert_alignment, num_worst_tokens))
        else:
            check_handle(handle, self._connection.number)
            if num_worst_tokens or any([a is not None for a in given]):
                check_none(dict(zip(GIVEN, given), num_worst_tokens=num_worst_tokens))
            found = self._ht_calls.find("cached", check_cached, (values, scales), (handle.library, handle.known.num_tokens))
        moved = found[0].checked
        capturing = self._connection.heap.capturing = moved.library.is_capturing()
        if handle is None:
            topk_idx = given[3]
            if moved.library.engine == "cpu" and topk_idx is not None:
                check_experts(topk_idx, moved.shape.num_experts)
            if capturing and not moved.num_worst_tokens:
                raise RuntimeError("dispatch waits on the host for the number of rows, which a graph cannot do: pass "
                                   "num_worst_tokens or a handle")
        return found

    def _most(self, moved, known):
        """Of a dispatch, as far as it is known by now: the rows that it stores on a rank, those that it receives, those that go
        from a rank to others."""
        if known is not None:
            return known.most_received, known.most_received, known.most_sent
        return moved.num_worst_tokens, moved.num_worst_tokens, moved.num_tokens * (self._connection.size - 1)

    def _ready(self, call, config, *most):
        """The `Plan` of a call; EPBufferTooSmallError if it has no room for so many rows (`_most`)."""
        num_sms, plan = self._sms(config), call.ready
        if plan is None or plan.num_sms != num_sms or most[0] > plan.most_rows:
            plan = call.ready = self._make_plan(call.checked, num_sms, most)
        return plan

    def _make_plan(self, moved, num_sms, most):
        """The first time that a shape is used, all ranks compile, and meet."""
        connection, shape, fingerprint = self._connection, moved.shape, moved.shape.fingerprint
        key = shape, moved.index_bytes, moved.scale_item, num_sms
        plan = self._ht_plans.get(key)
        most_rows = min(shape.rows.fit(connection.heap.operations_room), UNLIMITED) if plan is None else plan.most_rows
        self._require_room(shape, most_rows, *most)
        if plan is None:
            met = fingerprint in self._met
            if not met and moved.library.is_capturing():
                raise RuntimeError("the first operation of a shape compiles kernels: run it once before capturing a graph")
            kernels = self._kernels.of(*key, connection.rank)
            if not met:
                connection.meet(f"first use of {shape}", fingerprint)
                self._met[fingerprint] = shape
            plan = self._ht_plans[key] = Plan(kernels, shape.rows, fingerprint, most_rows, num_sms)
        return plan

    def _require_room(self, shape, most_rows, num_rows, received, sent):
        if num_rows > most_rows:
            raise too_small(self._num_nvl_bytes, shape, num_rows, received, sent)

    def _enter(self, library, async_finish, previous_event, fresh=False):
        """Where and when an operation runs.  fresh: it writes into memory of the library, which may be in use on the current
        stream; of memory of the heap `_cover` takes care."""
        current = library.stream()
        stream = self._connection.streams.enter(current, async_finish, previous_event)
        run = Run(library, stream, current, async_finish, previous_event)
        if fresh and previous_event is not None:
            self._follow(run)
        return run

    def _follow(self, run):
        """Make an operation wait for the current stream."""
        self._connection.streams.follow(run.stream, run.current)

    def _cover(self, run):
        """Make an operation wait for the current stream after all, if it was to wait for an event only and memory has come back to
        the heap since: it may be in use there.  To be called between lending and launching."""
        event, heap = run.previous_event, self._connection.heap
        if event is not None and heap.returned > event.moment:
            self._follow(run)

    def _exchange(self, run, plan, moved, addresses):
        """Exchange counts; wait for them, unless there is room for the worst.  The layout that this rank knows then, and the arrays
        that are it."""
        connection, worst = self._connection, moved.num_worst_tokens
        ranks, transport = connection.size, connection.transport
        words = Words(transport.base, connection.heap, run.library, ranks, moved.num_tokens)
        if words.of_library and run.previous_event is not None:
            self._follow(run)
        self._cover(run)
        transport.answer[STATE] = 0
        per_rank_at, in_rank_at, per_expert_at = addresses[2:5]
        connection.launch(plan.kernels["notify"], run.stream, *self._common(), plan.fingerprint, per_rank_at, per_expert_at,
                          in_rank_at, moved.num_tokens, worst, moved.expert_alignment, *words.addresses,
                          0 if worst else transport.answers)
        most = moved.num_tokens * (ranks - 1)
        known = (worst, most, worst, most, []) if worst else self._wait_for_counts(moved.shape, words, run.library)
        known = Known(*words.addresses, moved.num_tokens, *known)
        self._require_room(moved.shape, plan.most_rows, known.most_received, known.most_received, known.most_sent)
        return known, words.arrays(run.library)

    def _wait_for_counts(self, shape, words, library):
        """What the notify kernel has written for the host, once it is there.  The arrays of `Words` are made meanwhile."""
        connection, answer = self._connection, self._connection.transport.answer
        words.arrays(library)
        deadline, polls = time.monotonic() + connection.timeout_s, 0
        while answer[STATE] == 0:
            polls += 1
            if polls % POLLS == 0:
                connection.check()
                if time.monotonic() > deadline:                  # behind a long queue, or the GPU has failed
                    connection.engine.synchronize()
                    connection.check()
                    deadline = float("inf")
        return read_counts(answer, shape.num_experts // shape.num_ranks)

    def _send(self, run, plan, moved, known, addresses):
        """Send the rows: the arrays that they are received in, by section."""
        connection, (x_at, scales_at, *_) = self._connection, addresses
        idx_at, weights_at = addresses[5:] or (0, 0)             # travel without a handle only
        received = Received(connection.transport.base, connection.heap, plan.rows, moved.kinds, known.num_rows)
        self._cover(run)
        connection.launch(plan.kernels["dispatch"], run.stream, *self._common(), plan.fingerprint, x_at, moved.x_stride, scales_at,
                          moved.scales_stride, moved.scale_stride, idx_at, weights_at, known.num_tokens, known.rank_prefix,
                          known.send_rows, known.num_rows, *received.addresses)
        if received.copied_bytes:
            self.copied_results, self.copied_bytes = self.copied_results + 1, self.copied_bytes + received.copied_bytes
            if run.previous_event is not None:
                self._follow(run)                                # memory of the library may be in use on the current stream
        return received.arrays(run.library, connection.engine, run.stream)

    def _event(self, run, keep):
        """The event behind an operation that was launched; keep: what it reads and writes."""
        return self._connection.streams.event(run.library, run.current, keep, run.async_finish, run.previous_event,
                                              self._connection.check)

    def _forget_high_throughput(self):
        """Let go of all kernels and memory."""
        self._ht_calls.forget()
        self._kernels, self._ht_plans, self._met, self._counts = None, {}, {}, {}


class Run(NamedTuple):
    """An operation that is being launched."""

    library: arrays.Library
    stream: int                         # where it runs
    current: int                        # the caller's stream
    async_finish: bool
    previous_event: object
