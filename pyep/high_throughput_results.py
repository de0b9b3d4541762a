"""What a high-throughput dispatch leaves: its results, and where they lie while it runs and after it; the layout; the handle."""
import math
from typing import NamedTuple

from .kernels.intranode_notify import COUNTS, MOST_RECEIVED, MOST_SENT, RECEIVED, SENT


class Kind(NamedTuple):
    """The array that a section becomes."""

    index: int                          # of the section in `layout.Rows`
    dtype: object                       # the library's
    row: tuple                          # the shape of a row: (H,), (S,), (K,) or ()
    nbytes: int                         # of a row


def kind_of(index, dtype, *row):
    return Kind(index, dtype, row, dtype.itemsize * math.prod(row))


class Received:
    """The results of one dispatch: `num_rows` rows of every kind.

    Peers write them into slabs of the results' room, all of them, or if they find no space there all into the operations' room.
    addresses: by section, for the kernel; what does not travel has a place all the same.
    """

    __slots__ = "_kinds", "_num_rows", "_slabs", "addresses"

    def __init__(self, base, heap, rows, kinds, num_rows):
        """base: the address of the symmetric memory.  rows, kinds: see `Plan` and `Moved`."""
        self._kinds, self._num_rows = kinds, num_rows
        self._slabs = heap.lend_all([kind.nbytes * num_rows for kind in kinds]) if num_rows else None
        if self._slabs:
            self.addresses = [base + self._slabs[0].offset] * len(rows)
            for kind, slab in zip(kinds, self._slabs):
                self.addresses[kind.index] = base + slab.offset
        else:
            self.addresses = rows.starts(num_rows, base + heap.offset)[:-1]

    @property
    def copied_bytes(self):
        """How many bytes are copied out of the operations' room, 0 if peers write where the results stay."""
        return 0 if self._slabs else sum(kind.nbytes for kind in self._kinds) * self._num_rows

    def arrays(self, library, engine, stream):
        """By section, the arrays; None where nothing moves.  Where they lie, or copied on the stream, behind the dispatch."""
        arrays, n = [None] * len(self.addresses), self._num_rows
        with library.plainly():
            for i, (index, dtype, row, nbytes) in enumerate(self._kinds):
                if self._slabs:
                    array = library.lent(self.addresses[index], dtype, (n, *row), self._slabs[i])
                else:
                    array = library.empty((n, nbytes), "uint8")
                    if n:
                        engine.copy(library.pointer(array), self.addresses[index], n * nbytes, stream)
                    array = array.view(dtype).reshape((n, *row))
                arrays[index] = array
        return arrays


class Words:
    """rank_prefix_matrix and send_rows, which lie one after another: [R + T, R] int32.  They have addresses, for kernels, and later
    become arrays."""

    __slots__ = "addresses", "_shape", "_slab", "_array", "_arrays"

    def __init__(self, base, heap, library, num_ranks, num_tokens):
        """In the results' room, or where that has no space in memory of the library."""
        self._shape = num_ranks + num_tokens, num_ranks
        self._slab, self._array, self._arrays = heap.lend(4 * num_ranks * (num_ranks + num_tokens)), None, None
        if self._slab is None:
            self._array = library.empty(self._shape, "int32")
        address = library.pointer(self._array) if self._slab is None else base + self._slab.offset
        self.addresses = address, address + 4 * num_ranks * num_ranks

    @property
    def of_library(self):
        """Whether they are in memory of the library."""
        return self._slab is None

    def arrays(self, library):
        """(rank_prefix_matrix [R, R], send_rows [T, R]), made when they are asked for first."""
        if self._arrays is None:
            num_ranks = self._shape[1]
            with library.plainly():
                if self._array is None:
                    self._array = library.lent(self.addresses[0], library.dtype_of("int32"), self._shape, self._slab)
                self._arrays = self._array[:num_ranks], self._array[num_ranks:]
        return self._arrays


class Known(NamedTuple):
    """The layout of a dispatch, as this rank knows it."""

    rank_prefix: int                    # addresses of rank_prefix_matrix [R, R]
    send_rows: int                      # and of send_rows [T, R]; the handle has the arrays
    num_tokens: int                     # T
    num_rows: int                       # of recv_x: as many as come, or num_worst_tokens
    num_sent: int                       # rows that go to other ranks, or with num_worst_tokens at most
    most_received: int                  # the num_rows and
    most_sent: int                      # the num_sent of the rank that has most; with num_worst_tokens this rank's
    counts: list                        # num_recv_tokens_per_expert_list


def read_counts(answer, local_experts):
    """What a notify kernel has told the host, see `pyep.kernels.intranode_notify`: the fields of `Known` from num_rows on."""
    return answer[RECEIVED], answer[SENT], answer[MOST_RECEIVED], answer[MOST_SENT], answer[COUNTS:COUNTS + local_experts]


class HighThroughputHandle(tuple):
    """(rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_rows), with what later operations need besides as attributes.

    rank_prefix_matrix [R, R] int32: entry [i][j] = tokens that ranks 0..i send to rank j.  recv_src_idx [N] int32: the source token
    of each row.  is_token_in_rank [T, R] bool.  send_rows [T, R] int32: how many earlier tokens of this rank go to that rank too;
    -1 where the token does not go there.
    """

    def __new__(cls, owner, known, library, rank_prefix, send_rows, recv_src_idx, is_token_in_rank):
        self = super().__new__(cls, (rank_prefix, recv_src_idx, is_token_in_rank, send_rows))
        self.owner, self.known, self.library = owner, known, library
        return self
