"""High throughput on the host: from a shape to compiled kernels, results in the heap, from what went wrong to an error in words.

`Buffer.get_dispatch_layout`, `dispatch` and `combine` check their arguments and use what is here; the protocol itself is in
`pyep.kernels.intranode` and the files beside it.
"""
import math
import zlib
from typing import NamedTuple

from . import layout
from .errors import EPBufferTooSmallError, EPError, EPRoutingError, EPTimeoutError
from .kernels import intranode as kernels
from .kernels.basics import list_bytes
from .kernels.intranode_combine import combine
from .kernels.intranode_dispatch import SECTIONS, dispatch
from .kernels.intranode_layout import layout as count_layout
from .kernels.intranode_notify import COUNTS, NEEDED, RECEIVED, ROOM, SENT, SHORT, STATE, notify

DISPATCH, COMBINE = "dispatch", "combine"
UNLIMITED = 2**31 - 1                   # rows: row numbers are int32
COMBINE_REGISTERS = 80                  # of a thread of combine, which has many loads under way
STAGED_COUNTS = 4096                    # words that the notify kernel has in shared memory for counts of experts

# What the waits of a kernel wait for: (operation, phase, what the peer owes), by the number in the status record.
WAITS = {
    kernels.NOTIFY_COUNT: (DISPATCH, "layout", "how many tokens the peer sends to whom"),
    kernels.DISPATCH_PLACE: (DISPATCH, "send", "where the peer wants its rows"),
    kernels.DISPATCH_DONE: (DISPATCH, "receive", "the peer to have sent all its rows"),
    kernels.COMBINE_PLACE: (COMBINE, "send", "where the peer wants its rows"),
    kernels.COMBINE_CHUNK: (COMBINE, "receive", "a chunk of the peer's rows"),
    kernels.COMBINE_DONE: (COMBINE, "receive", "the peer to have sent all its rows"),
}
WORDS_FOR = {*WAITS, kernels.OTHER_LAYOUT, kernels.TOO_MANY_ROWS, kernels.BAD_SELECTION, kernels.OTHER_CALL}


# ---- shapes and kernels ----------------------------------------------------------------------------------------------

class Shape(NamedTuple):
    """What all ranks must agree on for an operation."""

    operation: str                      # DISPATCH or COMBINE
    num_ranks: int
    hidden: int                         # H
    fp8: bool = False                   # rows are e4m3 with a scale for every 128 values, else bf16
    num_topk: int = 0                   # K of the indices (combine: weights) that travel; 0 if none do
    weighted: bool = False              # weights travel
    num_experts: int = 0                # of a dispatch that exchanges counts
    counts: str = ""                    # of a dispatch: who knows the layout: "exchanged", "worst" (nobody on a host), "cached"

    @property
    def rows(self):
        """What moves for each row."""
        if self.operation == COMBINE:
            return layout.combined_rows(self.hidden, self.num_topk)
        scales = self.hidden // layout.FP8_BLOCK if self.fp8 else 0
        return layout.dispatched_rows(self.hidden if self.fp8 else 2 * self.hidden, self.num_topk, self.weighted, scales,
                                      self.counts != "cached")

    @property
    def fingerprint(self):
        """A number that ranks compare to see that they mean the same; never 0."""
        return zlib.crc32(repr(tuple(self)).encode()) | 1


def constants(num_ranks):
    """The template parameters of all kernels: where the control words are."""
    control = layout.control(num_ranks)
    names = "status", "peers", "failed", "ht_epoch", "ht_counts", "place", "done", "chunk", "arrived"
    return dict({name.upper(): control[name].offset for name in names}, RANKS=num_ranks, LINE=layout.LINE,
                HT_COUNTS_STRIDE=control["ht_counts"].item * control["ht_counts"].dims[-1], MAX_BLOCKS=layout.MAX_BLOCKS,
                MAX_CHUNKS=layout.MAX_CHUNKS)


class Kernels:
    """Compiled kernels of one engine, each made once."""

    def __init__(self, engine, num_ranks):
        self._engine, self._constants, self._made = engine, constants(num_ranks), {}

    def layout(self, num_experts, num_ranks, num_topk, index_bytes, num_sms):
        """(the kernel, the blocks of its grid)."""
        blocks, threads = self._engine.share(num_sms)
        parameters = dict(EXPERTS=num_experts, LOCAL_EXPERTS=num_experts // num_ranks, TOPK=num_topk, INDEX_BYTES=index_bytes)
        return self._make(count_layout, blocks, threads, 4 * (num_experts + num_ranks), parameters), blocks

    def of(self, shape, index_bytes, num_sms, rank=0):
        """{name: kernel} of a shape.  Ranks begin at different kernels, so that those of a host share the work."""
        jobs = self._combine(shape, num_sms) if shape.operation == COMBINE else self._dispatch(shape, index_bytes, num_sms)
        names = list(jobs)[rank % len(jobs):] + list(jobs)[:rank % len(jobs)]
        return {name: self._make(*jobs[name]) for name in names}

    def _dispatch(self, shape, index_bytes, num_sms):
        """The kernels of a dispatch: (function, blocks, threads, shared bytes, template parameters)."""
        blocks, threads = self._engine.share(num_sms)
        warps, ranks, rows = threads // self._engine.warp, shape.num_ranks, shape.rows
        local = shape.num_experts // ranks
        experts = dict(EXPERTS=shape.num_experts, LOCAL_EXPERTS=local)
        travels = dict(TOPK=shape.num_topk, WEIGHTED=int(shape.weighted), INDEX_BYTES=index_bytes) if shape.num_topk else {}
        moved = dict(experts if shape.num_topk else {}, ROW_BYTES=rows.row, SCALE_BYTES=rows.scales, SOURCES=int(rows.source > 0),
                     OPERATION=shape.fingerprint, PART_BYTES=self._engine.part_bytes(rows.row), **travels)
        jobs = {"dispatch": (dispatch, blocks, threads, 8 * ranks * SECTIONS + list_bytes(ranks) * warps, moved)}
        if shape.counts != "cached":
            staged = max(1, min(local, STAGED_COUNTS // ranks))
            shared_bytes = 4 * max(warps, ranks * (1 + ranks), ranks * staged)
            worst = int(shape.counts == "worst")
            jobs["notify"] = notify, min(blocks, ranks + 1), threads, shared_bytes, dict(experts, STAGED=staged, WORST=worst)
        return jobs

    def _combine(self, shape, num_sms):
        """The kernel of a combine, likewise."""
        blocks, threads = self._engine.share(num_sms, COMBINE_REGISTERS)
        sending_blocks, sending_warps = self._engine.senders(blocks, threads)
        warps, ranks = threads // self._engine.warp, shape.num_ranks
        shared_bytes = 8 * ranks * (1 + shape.weighted) + layout.align(4 * ranks * ranks, 16) + list_bytes(ranks) * warps
        return {"combine": (combine, blocks, threads, shared_bytes, dict(
            ROW_BYTES=shape.rows.row, TOPK=shape.num_topk, WEIGHTED=int(shape.weighted), OPERATION=shape.fingerprint,
            SENDING_BLOCKS=sending_blocks, SENDING_WARPS=sending_warps))}

    def _make(self, fn, blocks, threads, shared_bytes, parameters):
        key = fn, blocks, tuple(sorted(parameters.items()))
        if key not in self._made:
            self._made[key] = self._engine.kernel(fn, blocks, threads, shared_bytes, overlap=True, **self._constants | parameters)
        return self._made[key]


# ---- results -----------------------------------------------------------------------------------------------------------

class Lent:
    """A result in a slab of the heap: its address for kernels, which are launched first; then its array."""

    def __init__(self, connection, shape, dtype, itemsize):
        nbytes = math.prod(shape) * itemsize
        self._slab = connection.heap.allocate(nbytes) if nbytes else None
        self._shape, self._dtype = shape, dtype
        self.address = connection.transport.base + (self._slab or connection.heap).offset

    def array(self, library):
        if self._slab is None:
            return library.empty(self._shape, self._dtype)
        return library.lent(self.address, self._dtype, self._shape, self._slab)


class Made:
    """The same in memory of the library."""

    def __init__(self, library, shape, dtype):
        self._array = library.empty(shape, dtype)
        self.address = library.pointer(self._array)

    def array(self, library):
        return self._array


class Received(NamedTuple):
    """What a dispatch receives, in the order of `layout.Rows`; None where nothing moves."""

    x: object
    sources: object
    topk_idx: object
    topk_weights: object
    scales: object


def lend_received(connection, shape, num_rows, dtype):
    """Memory for what comes in a dispatch.  dtype: of the rows' values."""
    def lend(width, dtype, itemsize):
        return Lent(connection, (num_rows, *width), dtype, itemsize)
    rows, topk = shape.rows, shape.num_topk
    return Received(lend((shape.hidden,), dtype, 1 if shape.fp8 else 2),
                    lend((), "int32", 4) if rows.source else None,
                    lend((topk,), "int64", 8) if topk else None,
                    lend((topk,), "float32", 4) if shape.weighted else None,
                    lend((shape.hidden // layout.FP8_BLOCK,), "float32", 4) if shape.fp8 else None)


class Known(NamedTuple):
    """The layout of a dispatch, as this rank knows it."""

    rank_prefix: Lent
    send_rows: Lent
    num_tokens: int                     # T
    num_rows: int                       # of recv_x: as many as come, or num_worst_tokens
    num_sent: int                       # rows that go to other ranks, or with num_worst_tokens at most
    counts: list                        # num_recv_tokens_per_expert_list


class HighThroughputHandle(tuple):
    """(rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_rows), with what later operations need besides as attributes.

    rank_prefix_matrix [R, R] int32: entry [i][j] = tokens that ranks 0..i send to rank j.  recv_src_idx [N] int32: the source token
    of each row.  is_token_in_rank [T, R] bool.  send_rows [T, R] int32: how many earlier tokens of this rank go to that rank too;
    -1 where the token does not go there.
    """

    def __new__(cls, owner, known, library, recv_src_idx, is_token_in_rank):
        rank_prefix, send_rows = known.rank_prefix.array(library), known.send_rows.array(library)
        self = super().__new__(cls, (rank_prefix, recv_src_idx, is_token_in_rank, send_rows))
        self.owner, self.known = owner, known
        return self


class Counts(NamedTuple):
    """What the notify kernel tells the host."""

    received: int                       # rows that come
    sent: int                           # rows that go to other ranks
    by_expert: list                     # num_recv_tokens_per_expert_list
    short: tuple                        # (rank, rows it needs, rows it has room for) of a rank without room, or ()


def read_counts(answer, local_experts):
    """The host's words of a notify kernel that has written them, see `pyep.kernels.intranode_notify`."""
    short = (answer[SHORT], answer[NEEDED], answer[ROOM]) if answer[STATE] == 2 else ()
    return Counts(answer[RECEIVED], answer[SENT], answer[COUNTS:COUNTS + local_experts], short)


# ---- errors ------------------------------------------------------------------------------------------------------------

def size_hint_call(shape, num_max_tokens):
    """The call that computes enough num_nvl_bytes, for an error's message."""
    return f"Buffer.get_high_throughput_size_hint({num_max_tokens}, {shape.hidden}, {shape.num_ranks}, {shape.num_topk})"


def too_small(heap, given, shape, num_rows, num_max_tokens, whose="this operation needs"):
    """EPBufferTooSmallError in words.  num_max_tokens: for the size hint."""
    return EPBufferTooSmallError(
        f"num_nvl_bytes is {given}, but {whose} {shape.rows.nbytes(num_rows)} bytes in one piece for {num_rows} rows. Here, "
        f"{heap.state()}. Drop results of earlier operations, or make the Buffer with the bytes that "
        f"{size_hint_call(shape, num_max_tokens)} computes")


def error_from(record, rank, shapes, half_bytes, num_ranks, timeout_s):
    """The exception for a status record (see `pyep.channels.memory.RECORD`) as a dict, in words.

    shapes: by fingerprint, those that were used.
    """
    r = record
    if r["wait"] == kernels.BAD_SELECTION:
        return EPRoutingError(f"topk_idx of rank {rank} names expert {r['seen']} for token {r['expected']}; there is no such one")
    if r["wait"] == kernels.OTHER_LAYOUT:
        return EPRoutingError(f"num_tokens_per_rank of rank {rank} says that {r['expected']} tokens go to rank {r['peer']}, "
                              f"is_token_in_rank says {r['seen']}: pass what get_dispatch_layout has returned")
    if r["wait"] == kernels.TOO_MANY_ROWS:
        return EPRoutingError(f"rank {r['peer']} gets {r['seen']} rows, but its num_worst_tokens is {r['expected']}; nothing was "
                              "sent")
    if r["wait"] == kernels.OTHER_CALL:
        here, there = (_call(shapes.get(r[name])) for name in ("expected", "seen"))
        return EPError(f"rank {rank} called {here} where rank {r['peer']} called {there}: all ranks must make the same calls in "
                       f"the same order (operation of epoch {r['epoch']})")
    operation, phase, owed = WAITS[r["wait"]]
    slot = layout.name_of(r["offset"], num_ranks, half_bytes, lambda start: [])
    return EPTimeoutError(f"{operation}, {phase} phase: rank {rank} waited {timeout_s:g} s for rank {r['peer']}: {owed}. "
                          f"Slot {slot}: expected epoch {r['expected']}, seen epoch {r['seen'] >> 32 & 0xFFFFFFFF} (operation of "
                          f"epoch {r['epoch']}). Rank {r['peer']} has exited, is stuck, or has not made this call")


def _call(shape):
    return f"{shape.operation} with {shape}" if shape else "another operation"
