"""What low-latency dispatch and combine share: template parameters, epochs and halves, how an operation begins and ends.

Nobody waits for an answer.  A sender only makes sure that its peers are done with what it sent two operations ago
(`consumed`), a receiver waits for data that announces itself.  Each operation signals every rank, also those it has no data
for: to have finished operation n is to know that every rank has begun it, hence finished n - 1.

Roles.  Of a grid's blocks the first SENDERS send and the last RECEIVERS receive; they may overlap (one block plays both
roles, one after the other) and one of them may be 0 (the operation then comes in two launches, see `lag`).

The kernels are in `low_latency_dispatch`, `low_latency_combine` (direct) and `low_latency_reduce` (rank-reduced); what the
combines share is in `low_latency_units`.  Between ranks that do not map each other's memory all this holds too: see
`low_latency_boxes`.
"""
from ..channels.memory import next_epoch, patience, peer, previous_epoch, reached, tell, wait_count, wait_epoch
from .basics import start
from .lang import (add8, ballot, block_rank, clock_ns, lane, ld4_nc, ld8, ld8_if, ld8_nc, ld8_relaxed, num_blocks, num_threads,
                   prefetch, st8, st8_after_kernels, syncthreads, syncthreads_or, thread_rank, udiv, warp_size)
from .low_latency_boxes import count_slot, counts_for, is_port_peer
from .low_latency_ship import consumed_here, tell_consumed

# Template parameters, compiled in by `bind`.  The shape: see pyep.layout.LowLatency.  (M is no template parameter but an argument.)
RANKS = EXPERTS = LOCAL_EXPERTS = TOPK = 0
SHAPE = 0                                       # a number that ranks compare to see that they mean the same shape and mode
INDEX_BYTES = 8                                 # of an entry of topk_idx: 4 or 8
ROW_BYTES = 0                                   # of a row of bf16
FP8 = POWERS_OF_2 = UE8M0 = 0                   # 1: rows travel as e4m3; their scales are powers of two; delivered as exponents
DATA_BYTES = WIRE_BYTES = 0                     # of a row in `rows`: the values; with the scales of FP8
RANK_MAJOR = 0                                  # 1: rows are delivered once per rank, not once per expert
WEIGHTED = 0                                    # 1: topk_weights travel with the tokens
SENDERS = RECEIVERS = 1                         # blocks of the grid that send, that receive
NEIGHBOURS = 1                                  # warps of a block that take slices next to each other: divides them
PER_LANE = 1                                    # 16-byte pieces of a row that a lane moves for its warp in a combine
EPOCH = CONSUMED = STATUS = FAILED = PEERS = COUNTS = COUNTS_STRIDE = CONTROL_BYTES = MAX_BLOCKS = LINE = 0    # see pyep.layout

# The word that tells that an operation has begun: COMBINE, if it is one; VOID, see `low_latency_void`; `shape_bits`; how many
# tokens a dispatch sends.
COMBINE, VOID, TOKENS = 1 << 31, 1 << 30, 0xFFFF

# What a wait waits for; pyep.low_latency puts them in words.
(DISPATCH_CONSUMED, DISPATCH_COUNT, DISPATCH_ROUTE, DISPATCH_PLACE, DISPATCH_ROW, COMBINE_CONSUMED, COMBINE_BEGUN, COMBINE_OUTPUT,
 COMBINE_PARTIAL, OTHER_OPERATION, DISPATCH_PROXY, DISPATCH_BOX, COMBINE_PROXY, COMBINE_BOX) = range(1, 15)


def this_epoch(base, lag):
    """The epoch of this launch's operation: a new one if it sends, else the one sent `lag` operations before the latest."""
    epoch = ld8(base + EPOCH + 8 * block_rank())
    if SENDERS > 0:
        return next_epoch(epoch)
    return previous_epoch(epoch) if lag > 0 else epoch


def enter(base, me, lag, half_bytes, timeout, proxy):
    """How every kernel begins: its watch (see `channels.memory`), the offset of its half, and this block's index among the senders
    (one of them if below SENDERS) and among the receivers (one of them if not negative).

    lag: operations sent before this one and not yet received (their hooks are still to be called): 0 or 1.
    proxy: the number of the wait for room in a proxy's FIFO.
    """
    start()
    if thread_rank() == 0:
        prefetch(base + PEERS)                                   # for all who will ask for the address of a peer
    epoch = this_epoch(base, lag)
    watch = base, timeout, epoch
    if SENDERS > 0:
        tell_all_consumed(watch, proxy, me, consumed_here(epoch, lag))
    half = CONTROL_BYTES + (epoch & 1) * half_bytes
    return watch, half, block_rank(), block_rank() - num_blocks() + RECEIVERS


def end_epoch(base, epoch):
    """Leave the epoch for the next launch, whatever its grid: block b alone reads copy b and alone writes b, b + blocks, ..."""
    syncthreads()
    if SENDERS > 0:
        block = block_rank() + num_blocks() * thread_rank()
        while block < MAX_BLOCKS:
            st8(base + EPOCH + 8 * block, epoch)
            block += num_blocks() * num_threads()


# ---- may one send? ---------------------------------------------------------------------------------------------------

def tell_all_consumed(watch, proxy, me, consumed):
    """Tell every rank the epoch that is consumed here.  The last block does: the first ones have rows to send."""
    base, _, _ = watch
    rank = last_first()
    while rank < RANKS and block_rank() == num_blocks() - 1:
        if is_port_peer(base, rank):
            tell_consumed(watch, proxy, me, rank, consumed)
        else:
            st8_after_kernels(peer(base, rank) + CONSUMED + LINE * me, consumed)
        rank += num_threads()


def look_at_consumed(base, rank):
    """First looks, for `begin` and `begin_warp`: whether an operation before this one failed; the epoch that a rank has consumed.

    Plain loads: a multiprocessor makes one trip for all its threads, and that what they see may be old is no harm.
    """
    return ld8_if(base + FAILED, rank < RANKS), ld8_if(base + CONSUMED + LINE * rank, rank < RANKS)


def any_missing(watch, wait, look, rank, stride):
    """Wait until ranks have consumed what this operation overwrites: 0, or 1 if one has not, or an operation failed.  A thread
    waits for `rank`, which it has looked at, and for each that is `stride` further on."""
    base, _, epoch = watch
    goal = previous_epoch(previous_epoch(epoch))
    failed, consumed = look
    missing = 0
    while rank < RANKS:
        missing |= failed
        if not reached(consumed, goal):
            missing |= 1 - wait_epoch(watch, wait, rank, base + CONSUMED + LINE * rank, goal)
        rank += stride
        failed, consumed = look_at_consumed(base, rank)
    return missing


def begin(watch, wait, look):
    """Wait until all ranks have consumed what this operation overwrites.

    Returns 1, or 0 if a rank has not, or an operation failed: then nothing may be sent.  The block meets here: what it loads and
    lists before costs no time.  The last warp waits, the first ones have lists to make.  look: `look_at_consumed` of `last_first`.
    """
    return 1 - syncthreads_or(any_missing(watch, wait, look, last_first(), num_threads()))


def begin_warp(watch, wait, look):
    """The same for a warp that shares nothing with others of its block: they need not meet.  look: `look_at_consumed` of `lane`."""
    return 1 if ballot(any_missing(watch, wait, look, lane(), warp_size())) == 0 else 0


def last_first():
    """This thread's rank in its block, counted from the last thread."""
    return num_threads() - 1 - thread_rank()


def shape_bits(max_tokens):
    """What ranks tell each other of the shape and the mode, M included: numbers of M that are near each other always differ."""
    return (SHAPE + max_tokens & 0x3FFF) << 16


def tell_begun(part, watch, me, what):
    """Tell every rank that this operation has begun here; `what`: see COMBINE."""
    _, _, epoch = watch
    rank = thread_rank()
    while rank < RANKS and part == 0:
        tell(counts_for(watch, rank, me), epoch, what)
        rank += num_threads()


def wait_begun(watch, wait, source, waited):
    """Wait until a rank has begun this operation: what it told.  `waited`: 0, or [R] int64 to which the wait's ns are added."""
    base, _, epoch = watch
    counter = count_slot(base, epoch, source)
    if waited == 0:
        return wait_count(watch, wait, source, counter)
    since = clock_ns()
    now, deadline, told = since, 0, ld8_relaxed(counter)
    while (told >> 32) & 0xFFFFFFFF != epoch and deadline >= 0:
        now = clock_ns()                        # in the loop: after it, the lanes of a warp go on together
        deadline = patience(deadline, watch, wait, source, counter, epoch, told)
        told = ld8_relaxed(counter)
    add8(waited + 8 * source, now - since)
    return told & 0xFFFFFFFF if deadline >= 0 else 0


def selects(topk_idx, index_bytes, token, rank):
    """Whether a token selects an expert of a rank; each lane may ask for another rank.

    Without branches, so that all loads are under way at once.
    """
    hit = 0
    for k in range(TOPK):
        at = topk_idx + index_bytes * (token * TOPK + k)
        expert = ld8_nc(at) if index_bytes == 8 else ld4_nc(at)
        hit |= expert >= 0 and expert < EXPERTS and udiv(expert, LOCAL_EXPERTS) == rank
    return 1 if hit else 0


def selections(topk_idx, index_bytes, token, rank):
    """How many experts of a rank a token selects."""
    hits = 0
    for k in range(TOPK):
        at = topk_idx + index_bytes * (token * TOPK + k)
        expert = ld8_nc(at) if index_bytes == 8 else ld4_nc(at)
        if expert >= 0 and expert < EXPERTS and udiv(expert, LOCAL_EXPERTS) == rank:
            hits += 1
    return hits
