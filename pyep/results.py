"""What a low-latency dispatch is received into, and what it returns."""
from typing import NamedTuple

from . import layout


class _Five(NamedTuple):
    recv_x: object                      # [L, R*M, H] bf16 or the pair (e4m3, scales); rank-major: [R, M, H]
    recv_count: object                  # [L] int32; rank-major: [R]
    handle: object                      # for combine
    event: object
    hook: object                        # a function that launches the receive half, or None


class LowLatencyDispatched(_Five):
    """What `low_latency_dispatch` returns: unpacks as DeepEP's five do, and in the rank-major layout has two more attributes."""

    recv_topk_idx = None                # rank-major: [R, M, K] int64, local experts, -1 elsewhere
    recv_topk_weights = None            # rank-major, if topk_weights were given: [R, M, K] fp32, 0 elsewhere


class LowLatencyHandle(tuple):
    """(src_info, layout_range, M, H, E) as in DeepEP, with what combine needs besides as attributes."""

    def __new__(cls, owner, number, received, addresses, shape, num_tokens):
        self = super().__new__(cls, (received.src_info, received.layout_range, shape.max_tokens, shape.hidden, shape.num_experts))
        self.owner, self.number, self.received, self.addresses = owner, number, received, addresses
        self.shape, self.num_tokens = shape, num_tokens
        return self


class Received(NamedTuple):
    """The arrays that a dispatch writes; None where the mode has none."""

    recv_x: object                      # the values
    scales: object                      # of FP8
    recv_count: object
    src_info: object                    # [L, R*M] int32: the source token of each row; rank-major: [R, M]
    layout_range: object                # [L, R] int64: begin << 32 | count; rank-major: [R]
    recv_topk_idx: object
    weight_of: object                   # [R, M, K] fp32, if weights travel: in the rank-major layout recv_topk_weights
    row_of: object                      # [R, M, K] int64, rank-major [R, M]: the row of recv_x that a selection (token) got, or -1
    sent: object                        # [R] int64: how many tokens each rank has; rank-major: how many came here
    packet_of: object                   # [R, M + 1] int64, of port peers, unless rank-major: where in a box combine puts what
    selected: object                    # [M, K] int64: the experts that this rank's own tokens selected, or -1


class Results:
    """All that the dispatches of a shape are received into: two sets of arrays that take turns.

    `selected` takes turns among three: a combine reads it to its end, and with hooks that may be after one more dispatch.
    """

    def __init__(self, library, shape, ports):
        """ports: 0 if there are no port peers."""
        self.dispatches, self._library = 0, library
        with library.lasting():
            sets = [list(map(library.without_history, _allocate(library, shape, ports))) for _ in range(2)]
            selected = [_filled(library, (shape.max_tokens, shape.num_topk), -1) for _ in range(3)]
        turns = [Received(*sets[i % 2], selected[i % 3]) for i in range(6)]
        self._turns = [(received, Received(*(0 if a is None else library.pointer(a) for a in received))) for received in turns]

    def next(self):
        """The arrays for the next dispatch, and their addresses, 0 for None."""
        turn, library = self.dispatches % 6, self._library
        received, addresses = self._turns[turn]
        if library.has_history(received.recv_x, received.scales, received.weight_of):
            received = Received(*map(library.without_history, received))
            self._turns[turn] = received, addresses
        return received, addresses


def recv_shape(shape):
    """(groups, rows of each) of recv_x: rows lie by local expert, in the rank-major layout by source rank."""
    return (shape.num_ranks, shape.max_tokens) if shape.rank_major else (shape.local_experts, shape.rows_per_expert)


def _allocate(library, shape, ports):
    """A set of arrays, as in `Received` but for `selected`."""
    groups, rows = recv_shape(shape)
    ranks, selections = shape.num_ranks, (shape.num_ranks, shape.max_tokens, shape.num_topk)
    return (library.empty((groups, rows, shape.hidden), "float8_e4m3fn" if shape.fp8 else "bfloat16"),
            _allocate_scales(library, shape) if shape.fp8 else None,
            library.empty((groups,), "int32"),
            library.empty((groups, rows), "int32"),
            library.empty((ranks,) if shape.rank_major else (groups, ranks), "int64"),
            library.empty(selections, "int64") if shape.rank_major else None,
            library.empty(selections, "float32") if shape.weighted else None,
            _filled(library, selections[:2] if shape.rank_major else selections, -1),
            _filled(library, (ranks,), 0),
            library.empty((ranks, shape.max_tokens + 1), "int64") if ports and not shape.rank_major else None)


def _filled(library, shape, value):
    """[shape] int64 of what a combine looks at before it knows whether the dispatch has failed: then nothing is there."""
    array = library.empty(shape, "int64")
    array[...] = value
    return array


def _allocate_scales(library, shape):
    """[groups, rows, H/128] fp32, or exponents [groups, rows, H/512] int32; a column is contiguous, as DeepEP's TMA wants it."""
    groups, rows = recv_shape(shape)
    columns, dtype = (4, "int32") if shape.data == "fp8_ue8m0" else (1, "float32")
    return library.empty((groups, shape.hidden // layout.FP8_BLOCK // columns, rows), dtype).swapaxes(1, 2)
