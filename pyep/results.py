"""What a low-latency dispatch is received into, and what it returns."""
import math
from typing import NamedTuple

from . import layout

MOST_SIZES = 64                         # for how many M the arrays are kept in mind


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

    def __new__(cls, owner, number, received, addresses, library, shape, num_tokens):
        self = tuple.__new__(cls, (received.src_info, received.layout_range, shape.max_tokens, shape.hidden, shape.num_experts))
        self.owner, self.number, self.received, self.addresses = owner, number, received, addresses
        self.library, self.shape, self.num_tokens = library, shape, num_tokens
        return self


class Received(NamedTuple):
    """The arrays that a dispatch writes; None where the mode has none."""

    recv_x: object                      # the values
    scales: object                      # of FP8
    recv_count: object
    src_info: object                    # [L, R*M] int32: the source token of each row; rank-major: [R, M]
    layout_range: object                # [L, R] int64: begin << 32 | count; rank-major: [R]
    recv_topk_idx: object
    weight_of: object                   # [M, R, K] fp32, if weights travel; rank-major: recv_topk_weights, [R, M, K]
    row_of: object                      # [M, R, K] int64, rank-major [M, R]: the row of recv_x that a selection (token) got, or -1
    sent: object                        # [R] int64: how many tokens each rank has; rank-major: how many came here
    packet_of: object                   # [1 + M, R] int64, of port peers, unless rank-major: where in a box combine puts what
    selected: object                    # [M, K] int64: the experts that this rank's own tokens selected, or -1


class Results:
    """All that the dispatches of a mode are received into: two sets of arrays that take turns, with room for the largest M so far.
    A dispatch with a smaller one gets the beginning of each.

    `selected` takes turns among three: a combine reads it to its end, and with hooks that may be after one more dispatch.
    """

    def __init__(self, library, ports):
        """ports: 0 if there are no port peers."""
        self.dispatches = 0
        self._library, self._ports = library, ports
        self._max_tokens, self._sets, self._selected = 0, [], []
        self._turns, self._views = [], {}                        # of the largest M, and by M: see `next`
        self._combine_input = None                               # what `combine_input` returns the beginning of
        self._captured, self._kept = False, []                   # graphs were captured; arrays that they use

    def has_room(self, shape):
        """Whether there is room for the results of a shape."""
        return shape.max_tokens <= self._max_tokens

    def grow(self, shape):
        """Make room for the results of a shape.  Those that somebody still holds stay as they are."""
        self._keep(self._sets, self._selected)
        specs = _arrays(shape, self._ports)
        self._sets = [[spec and self._allocate(*spec) for spec in specs] for _ in range(2)]
        self._selected = [self._allocate(*_selected(shape)) for _ in range(3)]
        self._turns = self._turns_for(shape)
        self._max_tokens, self._views = shape.max_tokens, {shape.max_tokens: self._turns}

    def next(self, shape):
        """The arrays for the next dispatch, and their addresses, 0 for None."""
        turns = self._views.get(shape.max_tokens)
        if turns is None:
            if len(self._views) >= MOST_SIZES:
                self._views = {self._max_tokens: self._turns}
            turns = self._views[shape.max_tokens] = self._turns_for(shape)
        turn, library = self.dispatches % 6, self._library
        received, addresses = turns[turn]
        if library.has_history(received.recv_x, received.scales, received.weight_of):
            received = Received(*map(library.without_history, received))
            turns[turn] = received, addresses
        return received, addresses

    def combine_input(self, shape, make=True):
        """An array like recv_x in bf16 for a combine to send from; None if there is none yet and none is to be made."""
        groups, rows = recv_shape(shape)
        dims = groups, rows, shape.hidden
        if self._combine_input is None or len(self._combine_input) < math.prod(dims):
            if not make:
                return None
            if self._library.is_capturing():
                raise RuntimeError("the first get_next_low_latency_combine_buffer of a shape makes memory that outlives a graph: "
                                   "call it once before capturing")
            self._keep(self._combine_input)
            self._combine_input = self._allocate(dims, "bfloat16")
        with self._library.lasting():
            return self._library.without_history(_begin_of(self._combine_input, dims))

    def note_capture(self):
        """An operation is about to be launched: if into a graph, what it uses must stay for as long as the buffer."""
        if not self._captured and self._library.engine == "cuda":
            self._captured = self._library.is_capturing()

    def _keep(self, *arrays):
        if self._captured:
            self._kept.append(arrays)

    def _turns_for(self, shape):
        specs, library = _arrays(shape, self._ports), self._library
        with library.lasting():
            sets = [[spec and _begin_of(array, spec[0]) for spec, array in zip(specs, arrays)] for arrays in self._sets]
            if shape.fp8:
                for arrays in sets:
                    arrays[1] = arrays[1].swapaxes(1, 2)
            sets = [list(map(library.without_history, arrays)) for arrays in sets]
            selected = [_begin_of(array, _selected(shape)[0]) for array in self._selected]
        turns = [Received(*sets[i % 2], selected[i % 3]) for i in range(6)]
        return [(received, Received(*(0 if a is None else library.pointer(a) for a in received))) for received in turns]

    def _allocate(self, dims, dtype, value=None):
        """An array of one dimension with so many entries.  With a value it is what a combine looks at before it knows whether the
        dispatch has failed: then nothing is there."""
        with self._library.lasting():
            array = self._library.empty((math.prod(dims),), dtype)
            if value is not None:
                array[...] = value
        return array


def _begin_of(array, dims):
    """The first entries of an array as one of these dimensions."""
    return array[:math.prod(dims)].reshape(dims)


def recv_shape(shape):
    """(groups, rows of each) of recv_x: rows lie by local expert, in the rank-major layout by source rank."""
    return (shape.num_ranks, shape.max_tokens) if shape.rank_major else (shape.local_experts, shape.rows_per_expert)


def _arrays(shape, ports):
    """(dimensions, dtype[, value to begin with]) of each array in `Received` but for `selected`; None where the mode has none.

    Of scales a column is contiguous, as DeepEP's TMA wants it: their last two dimensions are still to be exchanged.
    """
    groups, rows = recv_shape(shape)
    ranks, tokens, topk = shape.num_ranks, shape.max_tokens, shape.num_topk
    columns, kind = (4, "int32") if shape.data == "fp8_ue8m0" else (1, "float32")        # exponents [groups, rows, H/512]
    return [((groups, rows, shape.hidden), "float8_e4m3fn" if shape.fp8 else "bfloat16"),
            ((groups, shape.hidden // layout.FP8_BLOCK // columns, rows), kind) if shape.fp8 else None,
            ((groups,), "int32"),
            ((groups, rows), "int32"),
            ((ranks,) if shape.rank_major else (groups, ranks), "int64"),
            ((ranks, tokens, topk), "int64") if shape.rank_major else None,
            ((ranks, tokens, topk), "float32") if shape.weighted else None,
            ((tokens, ranks) if shape.rank_major else (tokens, ranks, topk), "int64", -1),
            ((ranks,), "int64", 0),
            ((1 + tokens, ranks), "int64") if ports and not shape.rank_major else None]


def _selected(shape):
    return (shape.max_tokens, shape.num_topk), "int64", -1
