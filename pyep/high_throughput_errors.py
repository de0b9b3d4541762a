"""What goes wrong in high throughput, in words: status records that kernels leave, and memory that is too small."""
from . import layout
from .errors import EPBufferTooSmallError, EPError, EPRoutingError, EPTimeoutError
from .kernels import intranode as kernels

DISPATCH, COMBINE = "dispatch", "combine"

# What the waits of a kernel wait for: (operation, phase, what the peer owes), by the number in the status record.
WAITS = {
    kernels.NOTIFY_COUNT: (DISPATCH, "layout", "how many tokens the peer sends to whom"),
    kernels.DISPATCH_PLACE: (DISPATCH, "send", "where the peer wants its rows"),
    kernels.DISPATCH_DONE: (DISPATCH, "receive", "the peer to have sent all its rows"),
    kernels.COMBINE_PLACE: (COMBINE, "send", "where the peer wants its rows"),
    kernels.COMBINE_CHUNK: (COMBINE, "receive", "a chunk of the peer's rows"),
    kernels.COMBINE_DONE: (COMBINE, "receive", "the peer to have sent all its rows"),
}
# Why a rank refuses, and tells all: (error, what is wrong there).
REASONS = {
    kernels.BAD_SELECTION: (EPRoutingError, "its topk_idx names an expert that does not exist"),
    kernels.OTHER_LAYOUT: (EPRoutingError, "its num_tokens_per_rank is not that of its is_token_in_rank"),
    kernels.OTHER_CALL: (EPError, "not all ranks make the same call"),
}
WORDS_FOR = {*WAITS, *REASONS, kernels.TOO_MANY_ROWS, kernels.PEER_REFUSED}


def too_small(given, shape, num_rows, received, sent):
    """EPBufferTooSmallError for an operation that stores `num_rows` rows, in memory of which num_nvl_bytes is `given`.

    received, sent: the most rows that any rank receives in the dispatch, and that any sends to others.
    """
    num_ranks, rows = shape.num_ranks, shape.rows
    tokens = max(-(-received // num_ranks), -(-sent // max(1, num_ranks - 1)))
    dispatched = rows.row + rows.scales
    other_bytes = f", hidden_bytes={dispatched}" if shape.operation == DISPATCH and dispatched != 2 * shape.hidden else ""
    return EPBufferTooSmallError(
        f"num_nvl_bytes is {given}, of which {layout.operations_room(given)} are for an operation while it runs, but this "
        f"{shape.operation} needs {rows.nbytes(num_rows)} bytes, for {num_rows} rows on a rank. Make the Buffer with the bytes "
        f"that Buffer.get_high_throughput_size_hint({tokens}, {shape.hidden}, {num_ranks}, {shape.num_topk}{other_bytes}) computes")


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
    if r["wait"] == kernels.PEER_REFUSED:
        error, reason = REASONS[r["seen"]]
        return error(f"rank {r['peer']} has given up: {reason}; its own error says more")
    operation, phase, owed = WAITS[r["wait"]]
    slot = layout.name_of(r["offset"], num_ranks, half_bytes, lambda start: [])
    return EPTimeoutError(f"{operation}, {phase} phase: rank {rank} waited {timeout_s:g} s for rank {r['peer']}: {owed}. "
                          f"Slot {slot}: expected epoch {r['expected']}, seen epoch {r['seen'] >> 32 & 0xFFFFFFFF} (operation of "
                          f"epoch {r['epoch']}). Rank {r['peer']} has exited, is stuck, or has not made this call")


def _call(shape):
    return f"{shape.operation} with {shape}" if shape else "another operation"
