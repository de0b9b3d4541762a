"""Low latency on the host: from a shape to compiled kernels, from a wait that gave up to an error in words.

`Buffer.low_latency_dispatch` and `low_latency_combine` check their arguments and use what is here; the protocol itself is
in `pyep.kernels.low_latency` and the files beside it.
"""
import zlib
from typing import NamedTuple

from . import layout
from .errors import EPBufferTooSmallError, EPError, EPRoutingError, EPTimeoutError
from .kernels import low_latency as kernels
from .kernels import low_latency_void as void
from .kernels.low_latency_combine import combine
from .kernels.low_latency_dispatch import dispatch
from .kernels.low_latency_reduce import combine_reduced

# What the waits of a kernel wait for: (operation, phase, what the peer owes), by the number in the status record.
DISPATCH, COMBINE = "low_latency_dispatch", "low_latency_combine"
READ = "the peer to have read what it was sent two operations ago"
BOX = "the peer's box: all that it sends in the operation"
WAITS = {
    kernels.DISPATCH_CONSUMED: (DISPATCH, "send", READ),
    kernels.DISPATCH_COUNT: (DISPATCH, "receive", "the peer's token counts"),
    kernels.DISPATCH_ROUTE: (DISPATCH, "receive", "the experts that a token of the peer selects"),
    kernels.DISPATCH_PLACE: (DISPATCH, "receive", "the row that a token of the peer gets"),
    kernels.DISPATCH_ROW: (DISPATCH, "receive", "a token of the peer"),
    kernels.COMBINE_CONSUMED: (COMBINE, "send", READ),
    kernels.COMBINE_BEGUN: (COMBINE, "receive", "the peer to begin the operation"),
    kernels.COMBINE_OUTPUT: (COMBINE, "receive", "the output of an expert of the peer"),
    kernels.COMBINE_PARTIAL: (COMBINE, "receive", "the sum of what the peer's experts made of a token"),
    kernels.DISPATCH_BOX: (DISPATCH, "receive", BOX),
    kernels.COMBINE_BOX: (COMBINE, "receive", BOX),
}
PROXIES = {kernels.DISPATCH_PROXY: DISPATCH, kernels.COMBINE_PROXY: COMBINE}             # waits for room in a proxy's FIFO
WORDS_FOR = (*WAITS, *PROXIES, kernels.OTHER_OPERATION)           # what `error_from` puts in words


class InFlight:
    """Which operations were sent but not received yet.  Two may be: as many as there are halves."""

    def __init__(self):
        self._sent, self._pending = 0, []

    def send_and_receive(self):
        """A new operation whose halves are launched as one: the `lag` argument of its kernel."""
        if self._pending and min(self._pending) < self._sent:
            raise RuntimeError("the hook of the operation before the last one was not called yet: call it before the next "
                               "operation (at most two may wait for their hooks)")
        self._sent += 1
        return len(self._pending)

    def send(self):
        """A new operation, whose receive half is launched later: (its number, the `lag` argument of its kernel)."""
        lag = self.send_and_receive()
        self._pending.append(self._sent)
        return self._sent, lag

    def receive(self, number):
        """The operation's receive half is launched now: the `lag` argument of its kernel."""
        if number not in self._pending:
            raise RuntimeError("this hook was called already")
        self._pending.remove(number)
        return self._sent - number


class Plan(NamedTuple):
    """Compiled kernels, by phase: "send", "receive" and, where one launch can do both at once, "both"."""

    dispatch: dict
    combine: dict


def widest(engine, shape):
    """What kernels are compiled for: the shape with the largest M that its kernels serve.  On GPUs there are others for few tokens,
    which differ in how the work is cut, not in what they do."""
    few = engine.few_tokens // shape.num_ranks
    return shape._replace(max_tokens=few if shape.max_tokens <= few else layout.MAX_TOKENS)


def constants(shape, index_bytes, ports=0):
    """The kernels' template parameters.  ports: see PORTS in `pyep.kernels.low_latency_boxes`."""
    control = layout.control(shape.num_ranks)
    _, places, listed, rows, *escapes = shape.slot()
    return dict(
        RANKS=shape.num_ranks, EXPERTS=shape.num_experts, LOCAL_EXPERTS=shape.local_experts,
        TOPK=shape.num_topk, ROW_BYTES=shape.row_bytes, INDEX_BYTES=index_bytes,
        FP8=int(shape.fp8), POWERS_OF_2=int(shape.data in ("fp8_powers_of_2", "fp8_ue8m0")), UE8M0=int(shape.data == "fp8_ue8m0"),
        DATA_BYTES=shape.data_bytes, RANK_MAJOR=int(shape.rank_major), WEIGHTED=int(shape.weighted),
        GROUPS=shape.num_ranks * shape.local_groups, LOCAL_GROUPS=shape.local_groups, CHUNK=chunk(shape),
        MAX_BLOCKS=layout.MAX_BLOCKS, LINE=layout.LINE,
        STATUS=control["status"].offset, PEERS=control["peers"].offset, FAILED=control["failed"].offset,
        EPOCH=control["epoch"].offset, CONSUMED=control["consumed"].offset, COUNTS=control["rdma_recv_count"].offset,
        COUNTS_STRIDE=layout.WORD * (1 + layout.MAX_LOCAL_EXPERTS), CONTROL_BYTES=layout.control_bytes(shape.num_ranks),
        SLOT_BYTES=shape.slot_bytes, PLACES=places.offset, LISTED=listed.offset, ROWS=rows.offset,
        ESCAPES=escapes[0].offset - rows.offset if escapes else 0, PORTS=ports, SHAPE=fingerprint(shape),
        PORT_HANDLES=control["ports"].offset, **{name: control[name.lower()].offset for name in CONTROL_OF_BOXES})


CONTROL_OF_BOXES = "BOXES", "CLAIMS", "PACKED", "TOLD", "FLAGS"


def box_constants(operation, shape):
    """The template parameters of an operation for its boxes."""
    regions = shape.dispatch_box() if operation == "dispatch" else shape.combine_box()
    word_bytes = 2 * layout.WORD * shape.num_topk if operation == "dispatch" else 0
    return dict(BOX_WORDS=regions[1].offset, WORD_BYTES=word_bytes, PACKET_BYTES=regions[-1].item)


STAGED = 2048                           # selections that a sending block has in its shared memory at once


def chunk(shape):
    """How many tokens' selections that is."""
    return min(shape.max_tokens, max(1, STAGED // shape.num_topk))


def shared_bytes(operation, shape, warps, announcers, num_sections):
    """Shared memory of a block: the most that any of its roles needs.  See the kernels for what is in it."""
    word, ranks, topk = layout.WORD, layout.align(shape.num_ranks, 8), layout.align(shape.num_topk, 8)
    if operation == "dispatch":
        groups = shape.num_ranks * shape.local_groups
        staged = layout.align(4 * chunk(shape) * shape.num_topk * (1 + shape.weighted), word)
        announce = staged + max(word * -(-groups // announcers) * (2 + num_sections), 4 * shape.num_experts)
        send = word * warps * (1 + shape.num_ranks)
        receive = word * (shape.num_ranks * (1 + shape.local_groups) + warps * (2 + shape.num_topk))
        return max(announce, send, receive)
    if not shape.reduced:
        return 2 * word * warps * topk
    return 2 * word * warps * ((0 if shape.rank_major else topk) + ranks)


def sections(engine, shape, threads, announcers, ports):
    """Into how many sections an announcing block cuts the staged selections (rank-major: tokens), at most, so that all its warps
    have some to number.

    With port peers it does not: all that is told waits for the rows there.
    """
    items, at_once = chunk(shape) * (1 if shape.rank_major else shape.num_topk), 4 * engine.warp
    wanted = 1 if ports else max(1, threads // engine.warp // -(-shape.num_ranks * shape.local_groups // announcers))
    return min(wanted, -(-items // at_once))


def cut(engine, shape, teams, whole):
    """How a dispatch cuts rows: (cuts to a row, bytes of each, teams, threads of each).  A cut is a whole number of what a team
    moves at a time.  For whole rows teams join, as many as one takes at a time.  teams: of the engine."""
    cuts, count, threads = teams
    if whole:
        warps = count * threads // engine.warp
        joined = max(n for n in range(1, max(1, count // cuts) + 1) if warps % n == 0)
        cuts, count, threads = 1, joined, count * threads // joined
    lanes = min(8, engine.warp)                                  # that share a block of FP8, see `pyep.kernels.quantize`
    at_a_time = layout.FP8_BLOCK * (threads // lanes) if shape.fp8 else 16 * threads
    nbytes = layout.align(-(-shape.data_bytes // cuts), at_a_time)
    return -(-shape.data_bytes // nbytes), nbytes, count, threads


def cuts(engine, shape, teams, ports):
    """How senders and receivers of a dispatch cut rows.

    With port peers rows are left whole: to list where a token goes is to claim a packet, so it must be listed once.  In the
    rank-major layout receivers leave them whole: a row is stored once, and to list it more often costs more than that gains.
    """
    names = ("CUTS", "CUT_BYTES", "TEAMS", "TEAM_THREADS"), ("TAKEN_CUTS", "TAKEN_CUT_BYTES", "TAKING_TEAMS", "TAKING_THREADS")
    return {name: value for side, whole in zip(names, (ports, ports or shape.rank_major))
            for name, value in zip(side, cut(engine, shape, teams, whole))}


def make_plan(engine, shape, index_bytes, rank, ports=0):
    """Compile the kernels of a shape, see `widest`.  Ranks begin at different kernels, so that those of a host share the work."""
    jobs, shape = {}, widest(engine, shape)
    in_bf16 = shape._replace(data="bf16")                        # as combine travels: one set of kernels whatever dispatch's data
    for operation, kernel, moved in (("dispatch", dispatch, shape),
                                     ("combine", combine_reduced if shape.reduced else combine, in_bf16)):
        values, row_bytes = constants(moved, index_bytes, ports) | box_constants(operation, moved), moved.data_bytes
        _, count, team = teams = engine.teams(row_bytes, shape.num_ranks * shape.max_tokens)
        threads = count * team
        for phase, blocks, senders, receivers in engine.phases(operation, threads, shape.num_ranks):
            announcers = receivers or senders
            num_sections = sections(engine, shape, threads, announcers, ports)
            shared = shared_bytes(operation, shape, threads // engine.warp, announcers, num_sections)
            parameters = dict(values, SENDERS=senders, RECEIVERS=receivers, PER_LANE=engine.pieces_per_lane(row_bytes),
                              NEIGHBOURS=engine.neighbours(threads), SECTIONS=num_sections, **cuts(engine, moved, teams, ports))
            jobs[operation, phase] = kernel, blocks, threads, shared, parameters
    order = list(jobs)
    plan = Plan({}, {})
    for i in range(len(order)):
        operation, phase = key = order[(i + rank) % len(order)]
        kernel, blocks, threads, shared, parameters = jobs[key]
        getattr(plan, operation)[phase] = engine.kernel(kernel, blocks, threads, shared, overlap=True, **parameters)
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
    """A number that ranks compare to see that they mean the same shape, whatever M is."""
    return zlib.crc32(repr(tuple(shape._replace(max_tokens=0))).encode())


def error_from(r, rank, shapes, half_bytes, timeout_s):
    """The exception for a status record (a dict of the words `pyep.channels.memory.RECORD`), in words.

    shapes: by operation, the shape of the latest one.
    """
    if r["wait"] == kernels.OTHER_OPERATION:
        here, there = (COMBINE if r[word] & kernels.COMBINE else DISPATCH for word in ("expected", "seen"))
        if here == there:
            there += " of another shape or mode"
            if there.startswith(DISPATCH):
                there += f", or with another num_max_dispatch_tokens_per_rank, of {r['seen'] & kernels.TOKENS} tokens"
        return EPError(f"rank {rank} called {here} where rank {r['peer']} called {there}: all ranks must make the same calls in "
                       f"the same order (operation of epoch {r['epoch']})")
    if r["wait"] in PROXIES:
        return EPTimeoutError(f"{PROXIES[r['wait']]}, send phase: rank {rank} waited {timeout_s:g} s for room in the FIFO of the "
                              f"proxy that serves rank {r['peer']}: expected {r['expected']} triggers taken or more, seen "
                              f"{r['seen']} (operation of epoch {r['epoch']})")
    operation, phase, owed = WAITS[r["wait"]]
    regions = getattr(shapes[operation], operation.removeprefix("low_latency_"))
    slot = layout.name_of(r["offset"], shapes[operation].num_ranks, half_bytes, regions)
    return EPTimeoutError(f"{operation}, {phase} phase: rank {rank} waited {timeout_s:g} s for rank {r['peer']}: {owed}. "
                          f"Slot {slot}: {_expected_and_seen(r)} (operation of epoch {r['epoch']}). Rank {r['peer']} has exited, "
                          "is stuck, or has not made this call")


def void_error(source, epoch, reason, rank, shapes):
    """The exception for a dispatch that a source has told to be void; reason: see `low_latency_void.void`.

    shapes: as above.
    """
    what, token, expert = reason >> 56, reason >> 32 & 0xFFFFFF, (reason + (1 << 31) & 0xFFFFFFFF) - (1 << 31)
    experts, most = shapes[DISPATCH].num_experts, shapes[DISPATCH].max_tokens
    wrong = {void.BAD_EXPERT: f"names expert {expert} for token {token}; there are {experts} experts",
             void.NO_ROOM: f"selects expert {expert} more than num_max_dispatch_tokens_per_rank = {most} times: some tokens name "
                           "an expert more than once"}
    unknown = f"names an expert beyond the {experts}, or one more often than {most} times; its own error says which"
    return EPRoutingError(f"topk_idx of rank {source} {wrong.get(what, unknown) if source == rank else unknown}. The dispatch of "
                          f"epoch {epoch} is void on all ranks; the buffer stays usable")


def _expected_and_seen(r):
    if r["wait"] in (kernels.DISPATCH_COUNT, kernels.COMBINE_BEGUN):
        return f"expected epoch {r['expected']}, seen epoch {r['seen'] >> 32 & 0xFFFFFFFF}"
    if r["wait"] in (kernels.DISPATCH_CONSUMED, kernels.COMBINE_CONSUMED, kernels.DISPATCH_BOX, kernels.COMBINE_BOX):
        return f"expected epoch {r['expected']} or later, seen epoch {r['seen'] & 0xFFFFFFFF}"
    return "expected data, seen none"
