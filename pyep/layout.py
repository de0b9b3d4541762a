"""The byte layout of the symmetric memory: every region, slot and counter, as pure integer functions.

Every rank owns `nbytes` of memory that all ranks can write, laid out alike on all of them:

    control    words of 8 bytes, fixed places, a function of the number of ranks alone
    half 0     low latency: what peers send in operations of even epoch
    half 1     low latency: what peers send in operations of odd epoch
    heap       high throughput: what peers write once they were told where, in two rooms, see `pyep.heap`
    boxes      low latency: what goes to and comes from peers of other nodes, if there are any, each box as a whole

A *half* holds self-announcing data only: every 32-bit word of it is 0xffffffff whenever nothing is under way, whatever
shapes were used before, because readers put that value back.  So operations of different shapes may share a buffer
freely, in captured graphs too, and nothing is ever cleaned between them.  A *box* may hold anything: it is read only once it
was told that it has come.

Hot words of different writers never share a 128-byte line.
"""
import math
from typing import NamedTuple

WORD = 8                                # every counter and flag: so that 64-bit remote adds are safe over any transport
LINE = 128                              # what one transaction of a GPU's memory system covers
MAX_BLOCKS = 1024                       # blocks in a grid, at most
MAX_LOCAL_EXPERTS = 2047                # experts of one rank, at most
MAX_TOKENS = 65535                      # tokens of one rank in a low-latency dispatch, at most
MAX_CHUNKS = 4096                       # chunks in which one rank's rows travel to another in a high-throughput combine, at most
SECTIONS = LINE // WORD                 # kinds of data for which a rank can tell a place: a line of words
FP8_BLOCK = 128                         # values that share a scale
PACKET_HEADER = 16                      # bytes of a packet before its row
DATA = ("bf16", "fp8", "fp8_powers_of_2", "fp8_ue8m0")      # e4m3 with scales in fp32, of powers of two, those as exponents


def align(n, to=LINE):
    """`n` rounded up to a multiple of `to`."""
    return -(-n // to) * to


class Region(NamedTuple):
    """Entries in a rank's symmetric memory; `index` names what they are indexed by, `dims` says how far."""

    name: str
    offset: int
    index: tuple
    dims: tuple
    item: int                           # bytes of one entry; of a run of entries with the gap to the next
    writer: str
    apart: tuple = ()                   # bytes from one entry to the next, by index; (): they are a run, the last index fastest

    @property
    def nbytes(self):
        return self.item * math.prod(self.dims)

    @property
    def strides(self):
        """`apart`, of a run of entries too."""
        return self.apart or tuple(self.item * math.prod(self.dims[i + 1:]) for i in range(len(self.dims)))

    @property
    def end(self):
        return self.offset + sum((n - 1) * stride for n, stride in zip(self.dims, self.strides)) + self.item

    def find(self, offset):
        """The index of the entry that has the byte at `offset`, or None."""
        found, rest = [], offset - self.offset
        for stride in self.strides:
            i, rest = divmod(rest, stride)
            found.append(i)
        inside = 0 <= rest < self.item and all(0 <= i < n for i, n in zip(found, self.dims))
        return tuple(found) if inside else None

    def slot(self, offset):
        """The name of the entry at `offset`, for instance "consumed[source 2]"."""
        return self.name + "".join(f"[{name} {i}]" for name, i in zip(self.index, self.find(offset)))


def stack(start, *regions):
    """Regions one after another from `start`, each on a line of its own; given as (name, index, dims, item, writer)."""
    placed = []
    for name, index, dims, item, writer in regions:
        region = Region(name, start, index, dims, item, writer)
        placed.append(region)
        start = align(region.end)
    return placed


def control(num_ranks):
    """The control words of a rank, as a dict of `Region`s.

    status           address of the block of words in which a kernel says why it gave up (host memory)
    peers            address of every rank's symmetric memory, as this rank maps it; 0 if it does not: a *port peer*
    ports            address of the PortChannel handle for every port peer, else 0
    failed           not 0 once a wait of this rank gave up: all other waits then end too
    epoch            the epoch of the latest operation sent, one copy per block, so that no block waits for another
    consumed         the latest epoch whose data that rank has read to the end: its half may be written again.  Of a port peer
                     beside it, a word further on, the epoch of its latest box that has come
    rdma_recv_count  epoch << 32 | count.  Entry 0: the tokens of that source; 1 + e: its rows for local expert e

    High throughput, where each launch of a kernel has an epoch of its own, and words hold epoch << 32 | value:

    ht_epoch    as epoch
    ht_counts   entry 0: the rows for which that source has room; 1: what it does, a number; 2 + r: its tokens for rank r;
                2 + R + e: its selections of local expert e.  By parity of the epoch: nothing tells when they have been read
    place       where that source wants the rows, and what goes with them, as (offset in its memory) / 16; the last two: why it has
                given up, if that was for a reason of its own; what it does
    done        that source has sent all of a launch, and read what it was told
    chunk       that source has sent a chunk of its rows
    arrived     blocks of this launch that are done

    Low latency between port peers:

    boxes       where boxes are, as offsets: the outbox for that rank; the inbox for what comes from it; its inbox for this rank's
    claims      of the box that is being packed for that rank: packets | selections << 32
    packed      blocks of this launch that have packed their part of the boxes
    told        the epoch that this rank has told that rank to have consumed
    flags       what is put to `consumed` of that rank behind a box, and once more the first word alone: staged here
    """
    words, ht_words = 1 + MAX_LOCAL_EXPERTS, align(2 + num_ranks + MAX_LOCAL_EXPERTS, LINE // WORD)
    return {r.name: r for r in stack(
        0,
        ("status", (), (), WORD, "host"),
        ("peers", ("rank",), (num_ranks,), WORD, "host"),
        ("ports", ("rank",), (num_ranks,), WORD, "host"),
        ("failed", (), (), WORD, "this rank"),
        ("epoch", ("block",), (MAX_BLOCKS,), WORD, "this rank"),
        ("consumed", ("source",), (num_ranks,), LINE, "source"),
        ("rdma_recv_count", ("half", "source", "entry"), (2, num_ranks, words), WORD, "source"),
        ("ht_epoch", ("block",), (MAX_BLOCKS,), WORD, "this rank"),
        ("ht_counts", ("parity", "source", "entry"), (2, num_ranks, ht_words), WORD, "source"),
        ("place", ("source", "section"), (num_ranks, SECTIONS), WORD, "source"),
        ("done", ("source",), (num_ranks,), LINE, "source"),
        ("chunk", ("source", "chunk"), (num_ranks, MAX_CHUNKS), WORD, "source"),
        ("arrived", (), (), WORD, "this rank"),
        ("boxes", ("parity", "rank", "entry"), (2, num_ranks, 4), WORD, "host"),
        ("claims", ("rank",), (num_ranks,), WORD, "this rank"),
        ("packed", (), (), WORD, "this rank"),
        ("told", ("rank",), (num_ranks,), WORD, "this rank"),
        ("flags", ("parity", "rank", "entry"), (2, num_ranks, 4), WORD, "this rank"),
    )}


def control_bytes(num_ranks):
    return align(control(num_ranks)["flags"].end)


class LowLatency(NamedTuple):
    """The shape and the mode of a low-latency dispatch and of its combines, and where their data goes within a half."""

    num_ranks: int
    max_tokens: int                     # M: the most tokens that any rank dispatches
    hidden: int                         # H: values in a row
    num_experts: int                    # E
    num_topk: int                       # K
    data: str = "bf16"                  # what rows travel as, one of DATA
    rank_major: bool = False            # rows are delivered once per rank, not once per expert
    weighted: bool = False              # topk_weights travel with the tokens

    @property
    def local_experts(self):
        return self.num_experts // self.num_ranks

    @property
    def rows_per_expert(self):
        """Rows of one expert in recv_x: all tokens of all ranks may choose it."""
        return self.num_ranks * self.max_tokens

    @property
    def row_bytes(self):
        """A row of bf16."""
        return 2 * self.hidden

    @property
    def data_bytes(self):
        """The values of a row as they travel in a dispatch."""
        return self.hidden if self.fp8 else self.row_bytes

    @property
    def wire_bytes(self):
        """A row as it travels in a dispatch: the values, then the fp32 scales of FP8, in whole vectors of 16 bytes."""
        return self.data_bytes + (align(4 * self.hidden // FP8_BLOCK, 16) if self.fp8 else 0)

    @property
    def fp8(self):
        return self.data != "bf16"

    @property
    def reduced(self):
        """Whether combine brings back one partial sum per (rank, token), not one output per selection."""
        return self.rank_major or self.weighted

    def slot(self):
        """What a *slot* holds: all that a dispatch sends of one token to one rank.

        routes  1 + the expert that the token's k-th selection names, or 0; above it the selection's weight; every rank gets all
        places  n: the selection is the source's n-th for its expert (the first is 0); only that expert's rank gets it.
                rank-major: the token is the source's n-th for this rank, at k = 0
        listed  how many of the token's cuts this rank's warps have listed, less one, until the last one has
        rows    the token, once per rank however many of that rank's experts it selects
        escapes of bf16, for each piece of 16 bytes: which of its four words are 0xffffffff.  Written only where a word of it is
                that or one less, see `pyep.kernels.low_latency_escapes`
        """
        words = WORD * self.num_topk
        _, listed, rows = stack(0,
                                 ("words", (), (), 2 * words, "source"),
                                 ("listed", (), (), WORD, "this rank"),
                                 ("rows", (), (), self.wire_bytes, "source"))
        regions = [Region("routes", 0, ("k",), (self.num_topk,), WORD, "source"),
                   Region("places", words, ("k",), (self.num_topk,), WORD, "source"), listed, rows]
        if not self.fp8:
            regions.append(Region("escapes", rows.end, ("piece",), (self.row_bytes // 16,), 4, "source"))
        return regions

    @property
    def slot_bytes(self):
        return align(self.slot()[-1].end)

    def dispatch(self, half=0):
        """What a half that begins at byte `half` holds in a dispatch: slots, by token and source.  So nothing but how many there
        are depends on M, which kernels learn at run time."""
        return self._of_each(half, ("token", "source"), (self.max_tokens, self.num_ranks), self.slot_bytes, self.slot())

    @staticmethod
    def _of_each(start, index, dims, nbytes, parts):
        """The regions of `parts` of what begins every `nbytes` bytes from `start` on."""
        outer = [nbytes * math.prod(dims[i + 1:]) for i in range(len(dims))]
        return [part._replace(offset=start + part.offset, index=(*index, *part.index), dims=(*dims, *part.dims),
                              apart=(*outer, *part.strides)) for part in parts]

    def combine(self, half=0):
        """What a half holds in a combine, written by the experts' rank: the output of the expert that (token, k) selected, or
        if the experts' rank reduces first, its sum for the token."""
        if self.reduced:
            return stack(half, ("partials", ("token", "rank"), (self.max_tokens, self.num_ranks), self.row_bytes, "rank"))
        return stack(half, ("outputs", ("token", "k"), (self.max_tokens, self.num_topk), self.row_bytes, "expert's rank"))

    @property
    def local_groups(self):
        """How many groups rows of a rank are counted in: its experts; in the rank-major layout it is one itself."""
        return 1 if self.rank_major else self.local_experts

    def dispatch_box(self, box=0, num_tokens=None):
        """What a box that begins at byte `box` holds in a dispatch, of one source for one destination.

        header   how many packets | how many selections they serve << 32; the words of rdma_recv_count
        routes, places: of each token, as in a slot
        packets  in no order, each the row of a token behind a header of two words: the row's place, as an offset in the half;
                 the token | the selections that the packets claimed before this one serve << 32

        num_tokens: that the source has, M if None; packets begin behind the words of so many.
        """
        tokens, words = self.max_tokens if num_tokens is None else num_tokens, 2 * WORD * self.num_topk
        header, = stack(box, ("header", ("entry",), (2 + self.local_groups,), WORD, "source"))
        routes, places, *_ = self._of_each(align(header.end), ("token",), (tokens,), words, self.slot())
        packet_bytes = PACKET_HEADER + self.wire_bytes
        packets = Region("packets", routes.offset + tokens * words, ("packet",), (tokens,), packet_bytes, "source")
        return [header, routes, places, packets]

    def combine_box(self, box=0):
        """What a box holds in a combine: as in a dispatch, but there are no counts, routes and places, and a packet holds a
        partial or an output, and the second word of its header is not used."""
        packets = self.max_tokens * (1 if self.reduced else self.num_topk)
        return stack(box,
                      ("header", ("entry",), (2,), WORD, "expert's rank"),
                      ("packets", ("packet",), (packets,), PACKET_HEADER + self.row_bytes, "expert's rank"))

    @property
    def half_bytes(self):
        return align(max(self.max_tokens * self.num_ranks * self.slot_bytes, self.combine()[-1].end))

    @property
    def nbytes(self):
        """Symmetric memory that the shape needs on each rank."""
        return control_bytes(self.num_ranks) + 2 * self.half_bytes


class Rows(NamedTuple):
    """What a high-throughput operation stores for each row, in bytes; 0 for what it does not move.  Each kind is an array of its
    own, a *section*.

    A dispatch has all of them, as its results; a combine has rows and weights, for the rows that come back to a rank's tokens.
    """

    row: int                            # the values
    source: int = 0                     # the source token, int32
    topk_idx: int = 0                   # K local experts, int64
    topk_weights: int = 0               # K fp32
    scales: int = 0                     # that belong to the values

    def starts(self, num_rows, start=0):
        """Where the sections begin, one after another from byte `start` on, each on a line of its own, and where the last ends."""
        starts = [start]
        for item in self:
            start += align(item * num_rows)
            starts.append(start)
        return starts

    def nbytes(self, num_rows):
        """Bytes of so many rows."""
        return self.starts(num_rows)[-1]

    def fit(self, nbytes):
        """How many rows `nbytes` hold."""
        rows = nbytes // sum(self)
        while rows > 0 and self.nbytes(rows) > nbytes:
            rows -= 1
        return rows


def dispatched_rows(hidden_bytes, num_topk=0, weighted=False, scale_bytes=0, sources=True):
    """The `Rows` of a dispatch.  hidden_bytes, scale_bytes: of a token's values and scales; num_topk: of its selections; 0 if none
    travel."""
    return Rows(hidden_bytes, 4 if sources else 0, 8 * num_topk, 4 * num_topk if weighted else 0, scale_bytes)


def combined_rows(hidden, num_topk=0):
    """The `Rows` of a combine of bf16.  num_topk: of a token's weights, 0 if none come back."""
    return Rows(2 * hidden, topk_weights=4 * num_topk)


def operations_room(heap_bytes):
    """How many of a heap's bytes, the first ones, are for the operation that runs; the others are lent to results."""
    return heap_bytes // 3 // LINE * LINE


def high_throughput_size_hint(num_max_tokens, hidden, num_ranks, num_topk, hidden_bytes, num_results=2):
    """Bytes of a heap for every dispatch and combine (always bf16) where no rank has more than `num_max_tokens` tokens, of which
    each may go to every rank; results of so many dispatches that are as large as that lie in it without being copied.

    hidden_bytes: of a row, scales included.
    """
    results = dispatched_rows(hidden_bytes, num_topk, True).nbytes(num_ranks * num_max_tokens) + LINE     # scales are apart
    staging = combined_rows(hidden, num_topk).nbytes((num_ranks - 1) * num_max_tokens)
    handle = align(4 * num_ranks * (num_ranks + num_max_tokens))                                # rank_prefix_matrix, send_rows
    return max(3 * max(results, staging), align(-(-3 * num_results * (results + handle) // 2)))


def heap_offset(num_rdma_bytes, num_ranks):
    """Where the heap begins, behind control words and halves."""
    return align(max(num_rdma_bytes, control_bytes(num_ranks)))


def half_capacity(nbytes, num_ranks):
    """Bytes of each half in a symmetric memory of `nbytes`."""
    return max(0, (nbytes - control_bytes(num_ranks)) // 2) // LINE * LINE


def low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts, num_topk=None):
    """Bytes that `Buffer(num_rdma_bytes=...)` needs for low-latency operations of a shape.

    Without `num_topk` there is room for any top-k up to the number of experts, which costs E / K times the memory of an
    exact hint: one row per token and selected expert comes back in a direct combine.  Every mode fits: this one needs most.
    """
    sizes = num_ranks, num_max_dispatch_tokens_per_rank, hidden, num_experts, num_topk or num_experts
    return LowLatency(*map(int, sizes)).nbytes                   # NumPy's may overflow


def name_of(offset, num_ranks, half_bytes, data):
    """The name of the slot at `offset`; `data(start)` lists the regions of a half (`LowLatency.dispatch` or `.combine`)."""
    start = control_bytes(num_ranks)
    half = int(offset >= start + half_bytes)
    for region in [*control(num_ranks).values(), *data(start + half * half_bytes)]:
        if region.find(offset) is not None:
            return region.slot(offset) + (f" of half {half}" if offset >= start else "")
    return f"byte {offset}"


def draw(shape, nbytes=None):
    """The layout as text, one line per region; for readers and for error messages."""
    nbytes = nbytes or shape.nbytes
    start, half = control_bytes(shape.num_ranks), half_capacity(nbytes, shape.num_ranks)
    lines = [f"symmetric memory of each of {shape.num_ranks} ranks: {nbytes:,} bytes, two halves of {half:,} from {start:,} on",
             f"{'offset':>14} {'bytes':>14}  region, written by"]

    def show(title, regions):
        lines.append(title)
        for r in regions:
            dims = "".join(f"[{i} {d}]" for i, d in zip(r.index, r.dims))
            lines.append(f"{r.offset:>14,} {r.nbytes:>14,}  {r.name}{dims} x {r.item}, {r.writer}")
    show("control", control(shape.num_ranks).values())
    for i in (0, 1):
        show(f"half {i}, dispatch", shape.dispatch(start + i * half))
        show(f"half {i}, combine (over the same bytes)", shape.combine(start + i * half))
    return "\n".join(lines)
