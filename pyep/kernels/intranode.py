"""What the high-throughput kernels inside one node share: template parameters, epochs, how rows find their place, how a launch
ends.

A rank says where it wants rows; its peers push them there; they say when they are done.  Nothing is cut into rings or buffered on
the way: the layout is known before the first row moves, so every row has a final address.

Each launch has an epoch of its own, the same on all ranks since all make the same calls.  A rank ends a launch only when every
peer is done with it: what it tells in the next one overwrites nothing that is still to be read.

The kernels are in `intranode_layout`, `intranode_notify`, `intranode_dispatch` and `intranode_combine`.
"""
from ..channels.memory import next_epoch, peer, refuse, release, tell, wait_count, wait_released
from .basics import start
from .lang import (block_rank, fetch_add8, ld8, ld8_relaxed, ld16_nc_if, num_blocks, num_threads, st8, st8_shared,
                   syncthreads, syncthreads_or, thread_rank, udiv)

# Template parameters, compiled in by `bind`.
RANKS = EXPERTS = LOCAL_EXPERTS = TOPK = 0      # TOPK: 0 where no top-k indices travel
INDEX_BYTES = 8                                 # of an entry of topk_idx: 4 or 8
ROW_BYTES = 0                                   # of a row's values
WEIGHTED = 0                                    # 1: topk_weights travel with the rows
HT_EPOCH = HT_COUNTS = HT_COUNTS_STRIDE = PLACE = DONE = CHUNK = ARRIVED = FAILED = 0           # offsets, see pyep.layout
MAX_BLOCKS = MAX_CHUNKS = LINE = 0

# Sections, in the order of pyep.layout.Rows.
ROW, SOURCE, TOPK_IDX, TOPK_WEIGHTS, SCALES = range(5)
REASON, OPERATION = 14, 15                      # the last words of a line: see `refuse`; a number that all ranks must agree on

# What a wait waits for, and what else ends a launch; pyep.high_throughput puts them in words.  Low latency has the numbers below.
(NOTIFY_COUNT, DISPATCH_PLACE, DISPATCH_DONE, COMBINE_PLACE, COMBINE_CHUNK, COMBINE_DONE, OTHER_LAYOUT, TOO_MANY_ROWS,
 BAD_SELECTION, OTHER_CALL, PEER_REFUSED) = range(101, 112)


def enter(base, timeout):
    """How every kernel begins: its watch, see `channels.memory`."""
    start()
    return base, timeout, next_epoch(ld8(base + HT_EPOCH + 8 * block_rank()))


def leave(watch):
    """Leave the epoch for the next launch, whatever its grid: block b alone reads copy b and alone writes b, b + blocks, ..."""
    base, _, epoch = watch
    syncthreads()
    block = block_rank() + num_blocks() * thread_rank()
    while block < MAX_BLOCKS:
        st8(base + HT_EPOCH + 8 * block, epoch)
        block += num_blocks() * num_threads()


# ---- where rows go ---------------------------------------------------------------------------------------------------

def place_slot(memory, source, section):
    """The word in a rank's memory that says where `source` wants a section."""
    return memory + PLACE + LINE * source + 8 * section


def tell_place(watch, me, section, address):
    """Tell every rank where in this rank's symmetric memory it wants a section; the first block does.  Nothing more is promised
    than that nobody here uses that memory any more: it is for the peers alone until all are done."""
    base, _, epoch = watch
    rank = thread_rank()
    while rank < RANKS and block_rank() == 0:
        tell(place_slot(peer(base, rank), me, section), epoch, (address - base) >> 4)
        rank += num_threads()


def tell_operation(watch, me, operation):
    """Tell every rank what this one does: operation and shape as a number, which is not 0.  One block calls it."""
    base, _, epoch = watch
    rank = thread_rank()
    while rank < RANKS:
        tell(place_slot(peer(base, rank), me, OPERATION), epoch, operation)
        rank += num_threads()


def wait_places(watch, wait, me, operation, sections, table):
    """A block waits until every rank has told the places of its first `sections` sections, and puts their addresses, as this rank
    maps them, into shared memory: `table` [R][sections].

    The block meets here.  Returns 1, or 0 if a rank has not told, or does something else, or this rank has given up: then nothing
    may be sent.
    """
    base, _, _ = watch
    missing = ld8_relaxed(base + FAILED)
    rank = num_threads() - 1 - thread_rank()
    while rank < RANKS:                                          # before places, which another operation may never tell
        other = wait_count(watch, wait, rank, place_slot(base, rank, OPERATION))
        if other != operation:
            missing = 1
            if other != 0:                                       # it has come
                refuse(watch, me, OTHER_CALL, rank, operation, other)
        rank += num_threads()
    i = thread_rank()
    while i < RANKS * sections:
        rank = udiv(i, sections)
        place = wait_count(watch, wait, rank, place_slot(base, rank, i - rank * sections))
        missing |= 1 if place == 0 else 0                        # no section is at byte 0: control words are
        st8_shared(table + 8 * i, peer(base, rank) + 16 * place)
        i += num_threads()
    return 1 - syncthreads_or(missing)


# ---- what rows are made of -------------------------------------------------------------------------------------------

def load_four(row, offset, step, last):
    """What a lane copies of four slices of a row, at `offset`, a step further on and so forth; zeros from `last` on.  All loads are
    under way at once."""
    return (ld16_nc_if(row + offset, offset < last), ld16_nc_if(row + offset + step, offset + step < last),
            ld16_nc_if(row + offset + 2 * step, offset + 2 * step < last),
            ld16_nc_if(row + offset + 3 * step, offset + 3 * step < last))


# ---- the end ---------------------------------------------------------------------------------------------------------

def is_last_block(base):
    """Whether this is the last block of the launch to come here: what the others had stored before they came, its threads see.
    The block meets here."""
    syncthreads()
    last = 0
    if thread_rank() == 0 and fetch_add8(base + ARRIVED, 1) == num_blocks() - 1:
        st8(base + ARRIVED, 0)                                   # for the next launch
        last = 1
    return syncthreads_or(last) != 0


def finish(watch, wait, me):
    """How a kernel ends that sends and receives: once all blocks of this rank have come here, every rank is told that this one is
    done, and the last block waits until all are.  So what has arrived is complete when the kernel has ended.

    All that any thread of this rank has stored is ordered before the word: by `syncthreads` within its block, by the atomic add
    among blocks, by the release between ranks.  A rank that has given up says nothing: what it sent is not complete.
    """
    base, _, epoch = watch
    if is_last_block(base):
        rank = thread_rank()
        while rank < RANKS and ld8_relaxed(base + FAILED) == 0:
            release(peer(base, rank) + DONE + LINE * me, epoch)
            rank += num_threads()
        rank = thread_rank()
        while rank < RANKS:
            wait_released(watch, wait, rank, base + DONE + LINE * rank)
            rank += num_threads()
    leave(watch)
