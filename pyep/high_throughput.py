"""High throughput on the host: from a shape to compiled kernels.

`Buffer.get_dispatch_layout`, `dispatch` and `combine` check their arguments and use what is here, what `high_throughput_results`
has of results and `high_throughput_errors` of errors; the protocol itself is in `pyep.kernels.intranode` and the files beside it.
"""
import zlib
from typing import NamedTuple

from . import layout
from .high_throughput_errors import COMBINE
from .kernels import intranode as kernels
from .kernels.basics import list_bytes
from .kernels.intranode_combine import combine
from .kernels.intranode_dispatch import SECTIONS, dispatch
from .kernels.intranode_layout import layout as count_layout
from .kernels.intranode_notify import TOKENS, notify

UNLIMITED = 2**31 - 1                   # rows: row numbers are int32
COMBINE_REGISTERS = 80                  # of a thread of combine, which has many loads under way
STAGED_COUNTS = 4096                    # words that the notify kernel has in shared memory for counts of experts


class Shape(NamedTuple):
    """What all ranks must agree on for an operation."""

    operation: str                      # DISPATCH or COMBINE
    num_ranks: int
    hidden: int                         # H
    dtype: str = "bfloat16"             # of the values; all others have one byte
    scale_bytes: int = 0                # of a row's scales; 0 if none travel
    scale_dtype: str = ""               # of the scales
    num_topk: int = 0                   # K of the indices (combine: weights) that travel; 0 if none do
    weighted: bool = False              # weights travel
    num_experts: int = 0                # of a dispatch that exchanges counts
    counts: str = ""                    # of a dispatch: who knows the layout: "exchanged", "worst" (nobody on a host), "cached"

    @property
    def rows(self):
        """What moves for each row."""
        if self.operation == COMBINE:
            return layout.combined_rows(self.hidden, self.num_topk)
        row = 2 * self.hidden if self.dtype == "bfloat16" else self.hidden
        return layout.dispatched_rows(row, self.num_topk, self.weighted, self.scale_bytes, self.counts != "cached")

    @property
    def fingerprint(self):
        """A number of 31 bits that ranks compare to see that they mean the same; never 0."""
        return zlib.crc32(repr(tuple(self)).encode()) & 0x7FFFFFFF | 1


class Plan(NamedTuple):
    """An operation of a shape, ready to be launched."""

    kernels: dict                       # by name
    rows: layout.Rows
    fingerprint: int
    most_rows: int                      # that it can store
    num_sms: int                        # that it may take


def constants(num_ranks):
    """The template parameters of all kernels: where the control words are."""
    control = layout.control(num_ranks)
    names = "status", "peers", "failed", "ht_epoch", "ht_counts", "place", "done", "chunk", "arrived"
    return dict({name.upper(): control[name].offset for name in names}, RANKS=num_ranks, LINE=layout.LINE,
                REFUSED=control["place"].offset + layout.WORD * kernels.REASON,
                HT_COUNTS_STRIDE=control["ht_counts"].item * control["ht_counts"].dims[-1], MAX_BLOCKS=layout.MAX_BLOCKS,
                MAX_CHUNKS=layout.MAX_CHUNKS, PEER_REFUSED=kernels.PEER_REFUSED)


class Kernels:
    """Compiled kernels of one engine, each made once."""

    def __init__(self, engine, num_ranks):
        self._engine, self._constants, self._made = engine, constants(num_ranks), {}

    def layout(self, num_experts, num_ranks, num_topk, index_bytes, num_sms):
        """(the kernel, the blocks of its grid)."""
        blocks, threads = self._engine.share(num_sms)
        parameters = dict(EXPERTS=num_experts, LOCAL_EXPERTS=num_experts // num_ranks, TOPK=num_topk, INDEX_BYTES=index_bytes)
        return self._make(count_layout, blocks, threads, 4 * (num_experts + num_ranks), parameters), blocks

    def of(self, shape, index_bytes, scale_item, num_sms, rank=0):
        """{name: kernel} of a shape.  index_bytes, scale_item: of an entry of topk_idx; of what is moved of scales at a time.

        Ranks begin at different kernels, so that those of a host share the work."""
        jobs = (self._combine(shape, num_sms) if shape.operation == COMBINE else
                self._dispatch(shape, index_bytes, scale_item, num_sms))
        names = list(jobs)[rank % len(jobs):] + list(jobs)[:rank % len(jobs)]
        return {name: self._make(*jobs[name]) for name in names}

    def _dispatch(self, shape, index_bytes, scale_item, num_sms):
        """The kernels of a dispatch: (function, blocks, threads, shared bytes, template parameters)."""
        blocks, threads = self._engine.share(num_sms)
        warps, ranks, rows = threads // self._engine.warp, shape.num_ranks, shape.rows
        local = shape.num_experts // ranks
        experts = dict(EXPERTS=shape.num_experts, LOCAL_EXPERTS=local)
        travels = dict(TOPK=shape.num_topk, WEIGHTED=int(shape.weighted), INDEX_BYTES=index_bytes) if shape.num_topk else {}
        scales = dict(SCALE_BYTES=rows.scales, SCALE_ITEM=scale_item) if rows.scales else {}
        moved = dict(experts if shape.num_topk else {}, ROW_BYTES=rows.row, SOURCES=int(rows.source > 0),
                     PART_BYTES=self._engine.part_bytes(rows.row), **scales, **travels)
        jobs = {"dispatch": (dispatch, blocks, threads, 8 * ranks * SECTIONS + list_bytes(ranks) * warps, moved)}
        if shape.counts != "cached":
            staged = max(1, min(local, STAGED_COUNTS // ranks))
            shared_bytes = 4 * max(warps, ranks * (TOKENS + ranks), ranks * staged)
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
            ROW_BYTES=shape.rows.row, TOPK=shape.num_topk, WEIGHTED=int(shape.weighted),
            SENDING_BLOCKS=sending_blocks, SENDING_WARPS=sending_warps))}

    def _make(self, fn, blocks, threads, shared_bytes, parameters):
        key = fn, blocks, tuple(sorted(parameters.items()))
        if key not in self._made:
            self._made[key] = self._engine.kernel(fn, blocks, threads, shared_bytes, overlap=True, **self._constants | parameters)
        return self._made[key]
