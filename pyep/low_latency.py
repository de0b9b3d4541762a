"""Low latency on the host: from a shape to compiled kernels, from a wait that gave up to an error in words.

`Buffer.low_latency_dispatch` and `low_latency_combine` check their arguments and use what is here; the protocol itself is
in `pyep.kernels.low_latency` and the two files beside it.
"""
import zlib
from typing import NamedTuple

from . import layout
from .channels import memory
from .errors import EPBufferTooSmallError, EPError, EPRoutingError, EPTimeoutError
from .kernels import low_latency as kernels
from .kernels.low_latency_combine import combine
from .kernels.low_latency_dispatch import dispatch

# What the waits of a kernel wait for: (operation, phase, what the peer owes), by the number in the status record.
DISPATCH, COMBINE = "low_latency_dispatch", "low_latency_combine"
READ = "the peer to have read what it was sent two operations ago"
WAITS = {
    kernels.DISPATCH_CONSUMED: (DISPATCH, "send", READ),
    kernels.DISPATCH_COUNT: (DISPATCH, "receive", "the peer's token counts"),
    kernels.DISPATCH_ROUTE: (DISPATCH, "receive", "the experts that a token of the peer selects"),
    kernels.DISPATCH_PLACE: (DISPATCH, "receive", "the row that a token of the peer gets"),
    kernels.DISPATCH_ROW: (DISPATCH, "receive", "a token of the peer"),
    kernels.COMBINE_CONSUMED: (COMBINE, "send", READ),
    kernels.COMBINE_BEGUN: (COMBINE, "receive", "the peer to begin the operation"),
    kernels.COMBINE_OUTPUT: (COMBINE, "receive", "the output of an expert of the peer"),
}


class LowLatencyDispatched(NamedTuple):
    """What `low_latency_dispatch` returns; unpacks as DeepEP's tuple does."""

    recv_x: object                      # [L, R*M, H] bf16
    recv_count: object                  # [L] int32
    handle: object                      # for combine
    event: object
    hook: object                        # a function that launches the receive half, or None


class LowLatencyHandle(tuple):
    """(src_info, layout_range, M, H, E) as in DeepEP, with what combine needs besides as attributes."""

    def __new__(cls, owner, number, received, shape, num_tokens):
        self = super().__new__(cls, (received.src_info, received.layout_range, shape.max_tokens, shape.hidden, shape.num_experts))
        self.owner, self.number, self.shape, self.num_tokens = owner, number, shape, num_tokens
        self.private = received.row_of, received.source_tokens, received.selected
        return self


class Received(NamedTuple):
    """The arrays that a dispatch writes."""

    recv_x: object
    recv_count: object
    src_info: object
    layout_range: object
    row_of: object                      # [R, M, K] int64: the row of recv_x, counted over all local experts, or -1
    source_tokens: object               # [R] int64: how many tokens each rank sent
    selected: object                    # [M, K] int64: the experts that this rank's own tokens selected, or -1


class Results:
    """All that the dispatches of a shape are received into: two sets of arrays that take turns.

    `selected` takes turns among three: a combine reads it to its end, and with hooks that may be after one more dispatch.
    """

    def __init__(self, library, shape):
        local, rows, ranks = shape.local_experts, shape.rows_per_expert, shape.num_ranks
        selections = shape.max_tokens, shape.num_topk
        self.dispatches = 0
        self._sets = [(library.empty((local, rows, shape.hidden), "bfloat16"),
                       library.empty((local,), "int32"),
                       library.empty((local, rows), "int32"),
                       library.empty((local, ranks), "int64"),
                       library.empty((ranks, *selections), "int64"),
                       library.empty((ranks,), "int64")) for _ in range(2)]
        self._selected = [library.empty(selections, "int64") for _ in range(3)]

    def next(self, recv_x=None):
        """The arrays for the next dispatch; `recv_x` in place of the own one, if given."""
        own, *others = self._sets[self.dispatches % 2]
        return Received(own if recv_x is None else recv_x, *others, self._selected[self.dispatches % 3])


class InFlight:
    """Which operations were sent but not received yet.  Two may be: as many as there are halves."""

    def __init__(self):
        self._sent, self._pending = 0, []

    def send(self):
        """A new operation: (its number, the `lag` argument of its kernel)."""
        if self._pending and min(self._pending) < self._sent:
            raise RuntimeError("the hook of the operation before the last one was not called yet: call it before the next "
                               "operation (at most two may wait for their hooks)")
        self._sent += 1
        lag = len(self._pending)
        self._pending.append(self._sent)
        return self._sent, lag

    def receive(self, number):
        """The operation's receive half is launched now: the `lag` argument of its kernel."""
        if number not in self._pending:
            raise RuntimeError("this hook was called already")
        self._pending.remove(number)
        return self._sent - number


class Plan(NamedTuple):
    """The compiled kernels of a shape, by phase: "send", "receive" and, where one launch can do both at once, "both"."""

    shape: layout.LowLatency
    dispatch: dict
    combine: dict


def constants(shape, index_bytes):
    """The kernels' template parameters."""
    control = layout.control(shape.num_ranks)
    _, places, rows = shape.dispatch()
    return dict(
        RANKS=shape.num_ranks, EXPERTS=shape.num_experts, LOCAL_EXPERTS=shape.local_experts, MAX_TOKENS=shape.max_tokens,
        TOPK=shape.num_topk, ROW_BYTES=shape.row_bytes, INDEX_BYTES=index_bytes, MAX_BLOCKS=layout.MAX_BLOCKS,
        LINE=layout.LINE,
        STATUS=control["status"].offset, PEERS=control["peers"].offset, FAILED=control["failed"].offset,
        EPOCH=control["epoch"].offset, CONSUMED=control["consumed"].offset, COUNTS=control["rdma_recv_count"].offset,
        COUNTS_STRIDE=layout.WORD * (1 + layout.MAX_LOCAL_EXPERTS), CONTROL_BYTES=layout.control_bytes(shape.num_ranks),
        PLACES=places.offset, ROWS=rows.offset)


def shared_bytes(operation, shape, warps):
    """Shared memory of a block: what the senders of its kernel need, or the receivers.  See the kernels for what is in it."""
    if operation == "combine":
        return warps * layout.WORD * (1 + 2 * layout.align(shape.num_topk, 4))
    send = warps * (1 + shape.num_ranks)
    receive = shape.num_ranks * (1 + shape.local_experts) + warps * (1 + shape.num_topk)
    return layout.WORD * max(send, receive)


def make_plan(engine, shape, index_bytes, rank):
    """Compile the kernels of a shape.  Ranks begin at different kernels, so that those of a host share the work."""
    threads, jobs = engine.threads_for_row(shape.row_bytes), {}
    values = constants(shape, index_bytes)
    for operation, kernel in (("dispatch", dispatch), ("combine", combine)):
        shared = shared_bytes(operation, shape, engine.warps(threads))
        for phase, blocks, senders, receivers in engine.phases(operation):
            jobs[operation, phase] = (kernel, blocks, threads, shared, dict(values, SENDERS=senders, RECEIVERS=receivers))
    order = list(jobs)
    plan = Plan(shape, {}, {})
    for i in range(len(order)):
        operation, phase = key = order[(i + rank) % len(order)]
        kernel, blocks, threads, shared, parameters = jobs[key]
        getattr(plan, operation)[phase] = engine.kernel(kernel, blocks, threads, shared, **parameters)
    return plan


def check_fits(shape, nbytes, given):
    """EPBufferTooSmallError unless the shape fits a symmetric memory of `nbytes`; `given`: the num_rdma_bytes asked for."""
    if layout.half_capacity(nbytes, shape.num_ranks) < shape.half_bytes:
        s = shape
        raise EPBufferTooSmallError(
            f"num_rdma_bytes is {given}, but {s.nbytes} are needed: the right size comes from "
            f"Buffer.get_low_latency_rdma_size_hint({s.max_tokens}, {s.hidden}, {s.num_ranks}, {s.num_experts}, "
            f"num_topk={s.num_topk})")


def fingerprint(shape):
    """A number that ranks compare to see that they mean the same shape."""
    return zlib.crc32(repr(tuple(shape)).encode())


def error_from(record, rank, shapes, half_bytes, timeout_s):
    """The exception for a status record (see `pyep.channels.memory.RECORD`), in words.

    shapes: by operation, the shape of the latest one.
    """
    r = dict(zip(memory.RECORD, record))
    if r["wait"] == kernels.BAD_EXPERT:
        return EPRoutingError(f"topk_idx of rank {rank} names expert {r['seen']} for token {r['expected']}; there are "
                              f"{shapes[DISPATCH].num_experts} experts")
    if r["wait"] == kernels.NO_ROOM:
        return EPRoutingError(f"local expert {r['seen']} of rank {rank} got more than {shapes[DISPATCH].rows_per_expert} rows: "
                              "some tokens name an expert more than once")
    if r["wait"] == kernels.OTHER_OPERATION:
        names = {kernels.COMBINE: COMBINE}
        here, there = names.get(r["expected"], DISPATCH), names.get(r["seen"], DISPATCH)
        if here == there:
            there += f" with {r['seen']} tokens"
        return EPError(f"rank {rank} called {here} where rank {r['peer']} called {there}: all ranks must make the same calls in "
                       f"the same order (operation of epoch {r['epoch']})")
    operation, phase, owed = WAITS[r["wait"]]
    regions = getattr(shapes[operation], operation.removeprefix("low_latency_"))
    slot = layout.name_of(r["offset"], shapes[operation].num_ranks, half_bytes, regions)
    return EPTimeoutError(f"{operation}, {phase} phase: rank {rank} waited {timeout_s:g} s for rank {r['peer']}: {owed}. "
                          f"Slot {slot}: {_expected_and_seen(r)} (operation of epoch {r['epoch']}). Rank {r['peer']} has exited, "
                          "is stuck, or has not made this call")


def _expected_and_seen(r):
    if r["wait"] in (kernels.DISPATCH_COUNT, kernels.COMBINE_BEGUN):
        return f"expected epoch {r['expected']}, seen epoch {r['seen'] >> 32 & 0xFFFFFFFF}"
    if r["wait"] in (kernels.DISPATCH_CONSUMED, kernels.COMBINE_CONSUMED):
        return f"expected epoch {r['expected']} or later, seen epoch {r['seen'] & 0xFFFFFFFF}"
    return "expected data, seen none"
