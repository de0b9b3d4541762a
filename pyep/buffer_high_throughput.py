"""The high-throughput operations of a `Buffer`: each checks its arguments, launches, and hands back arrays and a handle."""
import functools
import time
from typing import NamedTuple

from . import arrays
from .checks import check_experts
from .checks_high_throughput import (LAYOUT, biases_of, check_cached, check_combine, check_dispatch, check_fits_handle,
                                     check_handle, check_layout, check_library, check_none, check_run, strides, values_and_scales)
from .events import EventOverlap
from .high_throughput import UNLIMITED, Kernels, Plan
from .high_throughput_errors import WORDS_FOR, error_from, too_small
from .high_throughput_results import HighThroughputHandle, Known, Received, Words, read_counts
from .kernels.intranode_notify import STATE

CHECKED = 1000                          # kinds of calls whose checks are remembered, at most
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
        self._checked, self._ht_plans = {}, {}                      # calls whose checks have passed; what they launch
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
        library, num_tokens, num_topk, index_bytes, num_experts = self._check("layout", check_layout, (topk_idx,), (num_experts,))
        if library.engine == "cpu":
            check_experts(topk_idx, num_experts)
        ranks = connection.size
        kernel, blocks = self._kernels.layout(num_experts, ranks, num_topk, index_bytes, self._sms(None))
        run = self._enter(library, async_finish, previous_event, fresh=True)
        if (library, blocks, num_experts) not in self._counts:   # for all to use in turn: no graph may find it gone
            self._counts[library, blocks, num_experts] = library.empty((blocks, num_experts + ranks), "int32")
        counts = self._counts[library, blocks, num_experts]
        per_rank, per_expert = library.empty((ranks,), "int32"), library.empty((num_experts,), "int32")
        in_rank = library.empty((num_tokens, ranks), "bool")
        at = library.pointer
        connection.launch(kernel, run.stream, connection.transport.base, connection.rank, at(topk_idx), num_tokens, at(counts),
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
        counts = num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert
        if handle is None:
            moved = self._check("dispatch", check_dispatch, (values, scales, *counts, topk_idx, topk_weights),
                                (expert_alignment, num_worst_tokens, strides(values), strides(scales)))
        else:
            check_handle(handle, connection.number)
            if num_worst_tokens or any(a is not None for a in (*counts, topk_idx, topk_weights)):
                check_none(dict(zip(LAYOUT, counts), topk_idx=topk_idx, topk_weights=topk_weights,
                                num_worst_tokens=num_worst_tokens))
            moved = self._check("cached", check_cached, (values, scales), (strides(values), strides(scales)))
            check_fits_handle(moved, values, handle)
        connection.heap.capturing = moved.library.is_capturing()
        if handle is None:
            self._check_uncached(moved, topk_idx)
        library, num_tokens, known = moved.library, values.shape[0], handle and handle.known
        at_x, at_scales = aligned(library, values, "x"), 0 if scales is None else library.pointer(scales)
        scale_item, *scale_strides = moved.scales_from(at_scales)
        plan = self._ready(library, moved.shape, moved.index_bytes, scale_item, self._sms(config),
                           self._most(moved, num_tokens, known))
        run = self._enter(library, async_finish, previous_event)
        if known is None:
            known, words = self._exchange(run, plan, moved, *counts, num_tokens)
        received = Received(connection.transport.base, connection.heap, plan.rows, moved.kinds, known.num_rows)
        self._cover(run)
        connection.launch(plan.kernels["dispatch"], run.stream, *self._common(), plan.fingerprint, at_x, moved.x_stride, at_scales,
                          *scale_strides, *[0 if a is None else library.pointer(a) for a in (topk_idx, topk_weights)], num_tokens,
                          known.rank_prefix, known.send_rows, known.num_rows, *received.addresses)
        recv_x, sources, recv_topk_idx, recv_topk_weights, recv_scales = results = self._received(run, received)
        if handle is None:
            handle = HighThroughputHandle(connection.number, known, library, words, sources, is_token_in_rank)
        event = self._event(run, (x, counts, topk_idx, topk_weights, handle, results))
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
        library, shape = self._check("combine", check_combine, (x, topk_weights, *biases), (known.num_rows, known.num_tokens))
        check_library(handle, library)
        num_tokens, at = known.num_tokens, library.pointer
        inputs = [aligned(library, x, "x"), 0 if topk_weights is None else at(topk_weights)]
        biases = [aligned(library, b, "bias") for b in biases]
        plan = self._ready(library, shape, 8, 0, self._sms(config), (known.most_sent, known.most_received, known.most_sent))
        run = self._enter(library, async_finish, previous_event, fresh=True)
        staging, _, _, staged_weights, *_ = plan.rows.starts(known.num_sent, connection.transport.base + connection.heap.offset)
        out = library.empty((num_tokens, shape.hidden), "bfloat16")
        out_weights = library.empty((num_tokens, shape.num_topk), "float32") if shape.weighted else None
        connection.launch(plan.kernels["combine"], run.stream, *self._common(), plan.fingerprint, *inputs, known.rank_prefix,
                          known.send_rows, num_tokens, staging, staged_weights, *biases, *[0] * (2 - len(biases)), at(out),
                          0 if out_weights is None else at(out_weights))
        return out, out_weights, self._event(run, (x, handle, topk_weights, bias, out, out_weights))

    # ---- how an operation runs -------------------------------------------------------------------------------------------

    def _sms(self, config):
        return (config.num_sms if config else 0) or type(self).num_sms

    def _common(self):
        """The first arguments of most kernels."""
        connection = self._connection
        return connection.transport.base, connection.rank, connection.timeout_ns

    def _check(self, operation, check, given, options):
        """What a check returns; remembered for arguments like these, of which only addresses and values may differ."""
        try:
            key = (operation, *map(arrays.signature, given), *options)
            checked = self._checked.get(key)
        except TypeError:                                        # an argument that cannot be hashed: the check says which
            checked = key = None
        if checked is None:
            checked = check(self._connection.engine, self._connection.size, *given, *options)
            if len(self._checked) >= CHECKED:
                self._checked.clear()
            if key is not None:
                self._checked[key] = checked
        return checked

    def _check_uncached(self, moved, topk_idx):
        """What the checks of a dispatch that exchanges counts cannot remember."""
        if moved.library.engine == "cpu" and topk_idx is not None:
            check_experts(topk_idx, moved.shape.num_experts)
        if self._connection.heap.capturing and not moved.num_worst_tokens:
            raise RuntimeError("dispatch waits on the host for the number of rows, which a graph cannot do: pass num_worst_tokens "
                               "or a handle")

    def _most(self, moved, num_tokens, known):
        """Of a dispatch, as far as it is known by now: the rows that it stores on a rank, those that it receives, those that go
        from a rank to others."""
        if known is not None:
            return known.most_received, known.most_received, known.most_sent
        return moved.num_worst_tokens, moved.num_worst_tokens, num_tokens * (self._connection.size - 1)

    def _ready(self, library, shape, index_bytes, scale_item, num_sms, most):
        """The `Plan` of a shape; EPBufferTooSmallError if it has no room for so many rows (`_most`)."""
        key = shape, index_bytes, scale_item, num_sms
        plan = self._ht_plans.get(key)
        if plan is None or most[0] > plan.most_rows:
            plan = self._ht_plans[key] = self._make_ready_plan(library, *key, most)
        return plan

    def _make_ready_plan(self, library, shape, index_bytes, scale_item, num_sms, most):
        """The first time that a shape is used, all ranks compile, and meet."""
        connection, fingerprint = self._connection, shape.fingerprint
        most_rows = min(shape.rows.fit(connection.heap.operations_room), UNLIMITED)
        self._require_room(shape, most_rows, *most)
        met = fingerprint in self._met
        if not met and library.is_capturing():
            raise RuntimeError("the first operation of a shape compiles kernels: run it once before capturing a graph")
        kernels = self._kernels.of(shape, index_bytes, scale_item, num_sms, connection.rank)
        if not met:
            connection.meet(f"first use of {shape}", fingerprint)
            self._met[fingerprint] = shape
        return Plan(kernels, shape.rows, fingerprint, most_rows)

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

    def _exchange(self, run, plan, moved, per_rank, in_rank, per_expert, num_tokens):
        """Exchange counts; wait for them, unless there is room for the worst.  The layout that this rank knows then; its `Words`."""
        connection, at, worst = self._connection, run.library.pointer, moved.num_worst_tokens
        ranks, transport = connection.size, connection.transport
        words = Words(transport.base, connection.heap, run.library, ranks, num_tokens)
        if words.of_library and run.previous_event is not None:
            self._follow(run)
        self._cover(run)
        transport.answer[STATE] = 0
        connection.launch(plan.kernels["notify"], run.stream, *self._common(), plan.fingerprint, at(per_rank), at(per_expert),
                          at(in_rank), num_tokens, worst, moved.expert_alignment, *words.addresses,
                          0 if worst else transport.answers)
        most = num_tokens * (ranks - 1)
        known = (worst, most, worst, most, []) if worst else self._wait_for_counts(moved.shape)
        known = Known(*words.addresses, num_tokens, *known)
        self._require_room(moved.shape, plan.most_rows, known.most_received, known.most_received, known.most_sent)
        return known, words

    def _wait_for_counts(self, shape):
        """What the notify kernel has written for the host, once it is there."""
        connection, answer = self._connection, self._connection.transport.answer
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

    def _received(self, run, received):
        """The arrays of a dispatch that was launched, by section."""
        if received.copied and run.previous_event is not None:
            self._follow(run)                                    # memory of the library may be in use on the current stream
        results, copied = received.arrays(run.library, self._connection.engine, run.stream)
        if received.copied:
            self.copied_results, self.copied_bytes = self.copied_results + 1, self.copied_bytes + copied
        return results

    def _event(self, run, keep):
        """The event behind an operation that was launched; keep: what it reads and writes."""
        streams = self._connection.streams
        recorded = streams.record() if run.async_finish else None
        event = EventOverlap(recorded, keep if recorded else None, run.library, run.current, self._connection.check)
        if run.previous_event is not None:
            event.moment = run.previous_event.moment             # it does not cover what the caller's stream has done since
        return event

    def _forget_high_throughput(self):
        """Let go of all kernels and memory."""
        self._kernels, self._checked, self._ht_plans, self._met, self._counts = None, {}, {}, {}, {}


class Run(NamedTuple):
    """An operation that is being launched."""

    library: arrays.Library
    stream: int                         # where it runs
    current: int                        # the caller's stream
    async_finish: bool
    previous_event: object


def aligned(library, array, argument):
    """The address of rows that kernels access 16 bytes at a time."""
    address = library.pointer(array)
    if address % 16 and len(array):
        raise ValueError(f"{argument} begins at address {address:#x}; rows must begin at a multiple of 16 bytes")
    return address
