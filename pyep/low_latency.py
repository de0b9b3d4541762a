"""Low latency on the host: from a shape to compiled kernels, from a wait that gave up to an error in words.

`Buffer.low_latency_dispatch` and `low_latency_combine` check their arguments and use what is here; the protocol itself is
in `pyep.kernels.low_latency`.
"""
import zlib
from typing import NamedTuple

from . import layout
from .channels import memory
from .errors import EPBufferTooSmallError, EPError, EPRoutingError, EPTimeoutError
from .kernels import low_latency as kernels

# What the waits of a kernel wait for: (operation, phase, what the peer owes), by the number in the status record.
WAITS = {
    kernels.WAIT_CONSUMED: ("send", "the peer to have read what it was sent two operations ago"),
    kernels.WAIT_COUNT: ("receive", "the peer's token counts"),
    kernels.WAIT_ROUTE: ("receive", "the experts that a token of the peer selects"),
    kernels.WAIT_PLACE: ("receive", "the row that a token of the peer gets"),
    kernels.WAIT_ROW: ("receive", "a token of the peer"),
    kernels.WAIT_OUTPUT: ("receive", "the output of an expert of the peer"),
    kernels.WAIT_BEGIN: ("receive", "the peer to begin the operation"),
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

    def __new__(cls, received, shape, num_tokens):
        self = super().__new__(cls, (received.src_info, received.layout_range, shape.max_tokens, shape.hidden, shape.num_experts))
        self.shape, self.num_tokens = shape, num_tokens
        self.row_of, self.source_tokens = received.row_of, received.source_tokens
        return self


class Received(NamedTuple):
    """The arrays that a dispatch writes.  A buffer has two sets of a shape and uses them in turn."""

    recv_x: object
    recv_count: object
    src_info: object
    layout_range: object
    row_of: object                      # [R, M, K] int64: the row of recv_x, counted over all local experts, or -1
    source_tokens: object               # [R] int64

    @classmethod
    def empty(cls, library, shape):
        local, rows, ranks = shape.local_experts, shape.rows_per_expert, shape.num_ranks
        return cls(library.empty((local, rows, shape.hidden), "bfloat16"),
                   library.empty((local,), "int32"),
                   library.empty((local, rows), "int32"),
                   library.empty((local, ranks), "int64"),
                   library.empty((ranks, shape.max_tokens, shape.num_topk), "int64"),
                   library.empty((ranks,), "int64"))


class InFlight:
    """Which operations were sent but not received yet.  Two may be: as many as there are halves."""

    def __init__(self):
        self._sent, self._pending = 0, []

    def send(self):
        """A new operation: (its number, the `lag` argument of its kernel)."""
        if self._pending and self._pending[0] < self._sent:
            raise RuntimeError("two operations are waiting for their hooks already: call the older hook before the next operation")
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
    for operation, kernel in (("dispatch", kernels.dispatch), ("combine", kernels.combine)):
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


def check_fits(shape, nbytes):
    """EPBufferTooSmallError unless the shape fits a symmetric memory of `nbytes`."""
    if layout.half_capacity(nbytes, shape.num_ranks) < shape.half_bytes:
        s = shape
        raise EPBufferTooSmallError(
            f"num_rdma_bytes is {nbytes}, but {s.nbytes} are needed: the right size comes from "
            f"Buffer.get_low_latency_rdma_size_hint({s.max_tokens}, {s.hidden}, {s.num_ranks}, {s.num_experts}, num_topk={s.num_topk})")


def fingerprint(shape, index_bytes):
    """A number that ranks compare to see that they mean the same shape."""
    return zlib.crc32(repr((tuple(shape), index_bytes)).encode())


def error_from(record, rank, plan, operation, half_bytes, timeout_s):
    """The exception for a status record (see `pyep.channels.memory.RECORD`), in words."""
    r = dict(zip(memory.RECORD, record))
    if r["wait"] == kernels.BAD_EXPERT:
        return EPRoutingError(f"topk_idx of rank {rank} names expert {r['seen']} for token {r['expected']}; there are "
                              f"{plan.shape.num_experts} experts")
    if r["wait"] == kernels.NO_ROOM:
        return EPRoutingError(f"local expert {r['seen']} of rank {rank} got more than {plan.shape.rows_per_expert} rows: token "
                              f"{r['expected']} of rank {r['peer']} names an expert more than once")
    if r["wait"] not in WAITS:
        return EPError(f"unknown status record {record}")
    phase, owed = WAITS[r["wait"]]
    regions = plan.shape.dispatch if operation == "low_latency_dispatch" else plan.shape.combine
    slot = layout.name_of(r["offset"], plan.shape.num_ranks, half_bytes, regions)
    if r["wait"] in (kernels.WAIT_COUNT, kernels.WAIT_BEGIN):
        seen = f"expected epoch {r['expected']}, seen epoch {r['seen'] >> 32 & 0xFFFFFFFF}"
    elif r["wait"] == kernels.WAIT_CONSUMED:
        seen = f"expected epoch {r['expected']} or later, seen epoch {r['seen'] & 0xFFFFFFFF}"
    else:
        seen = "expected data, seen none"
    return EPTimeoutError(f"{operation}, {phase} phase: rank {rank} waited {timeout_s:g} s for rank {r['peer']}: {owed}. "
                          f"Slot {slot}: {seen} (operation of epoch {r['epoch']}). Rank {r['peer']} has exited, is stuck, or has "
                          "not made this call")
