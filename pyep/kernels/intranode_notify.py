"""Before a high-throughput dispatch: every rank tells every rank how many tokens it has for whom, so that all know where all rows
go.

Nobody sends more than a few words, and nobody waits twice: each rank computes the whole rank_prefix_matrix by itself, and whether
some rank has too little room, so all come to the same conclusion.  Meanwhile other blocks number this rank's tokens.
"""
from ..channels.memory import peer, report, tell, wait_count
from .basics import lanes_before, warp_rank
from .intranode import (EXPERTS, FAILED, HT_COUNTS, HT_COUNTS_STRIDE, LOCAL_EXPERTS, NOTIFY_COUNT, OTHER_LAYOUT, RANKS,
                        TOO_MANY_ROWS, enter, leave)
from .lang import (ballot, block_rank, lane, ld1_nc_if, ld4_nc, ld4_shared, ld8_relaxed, num_blocks, num_threads, popc, shared,
                   shfl_xor, st4, st4_shared, st8, st8_release, syncthreads, syncthreads_or, thread_rank, udiv, warp_size)

STAGED = 0                                      # local experts whose counts are in shared memory at once
WORST = 0                                       # 1: nobody on the host waits for counts; a rank has room or it is an error

# The words for the host, the counts of the local experts behind them.  STATE: 1 once all is there, 2 if rank SHORT has ROOM for
# less than its NEEDED rows.  RECEIVED: rows that come here; SENT: rows that go from here to other ranks.
STATE, RECEIVED, SENT, SHORT, NEEDED, ROOM, COUNTS = range(7)


# ---- tell ------------------------------------------------------------------------------------------------------------

def slot(memory, epoch, source, entry):
    """A counter of `source` in a rank's memory: entry 0 its room, 1 + r its tokens for rank r, then its selections by expert."""
    return memory + HT_COUNTS + ((epoch & 1) * RANKS + source) * HT_COUNTS_STRIDE + 8 * entry


def tell_counts(watch, me, num_tokens_per_rank, num_tokens_per_expert, room):
    """To every rank, for how many rows there is room here and how many tokens go where; to an expert's rank its selections."""
    base, _, epoch = watch
    i = thread_rank()
    while i < RANKS * (1 + RANKS):
        rank = udiv(i, 1 + RANKS)
        entry = i - rank * (1 + RANKS)
        count = room
        if entry > 0:
            count = ld4_nc(num_tokens_per_rank + 4 * (entry - 1))
        tell(slot(peer(base, rank), epoch, me, entry), epoch, count)
        i += num_threads()
    i = thread_rank()
    while i < EXPERTS and WORST == 0:
        rank = udiv(i, LOCAL_EXPERTS)
        count = ld4_nc(num_tokens_per_expert + 4 * i)
        tell(slot(peer(base, rank), epoch, me, 1 + RANKS + i - rank * LOCAL_EXPERTS), epoch, count)
        i += num_threads()


# ---- number this rank's tokens -----------------------------------------------------------------------------------------

def is_in_rank(is_token_in_rank, token, rank, end):
    """1 if a token goes to a rank, else 0; 0 from token `end` on."""
    return 1 if ld1_nc_if(is_token_in_rank + token * RANKS + rank, token < end) != 0 else 0


def number(hit, at, token, end, count):
    """One lane's turn: the token's number among those that go to the rank, or -1; `count` with the warp's hits added."""
    hits = ballot(hit)
    if token < end:
        st4(at, count + lanes_before(hits) if hit != 0 else -1)
    return count + popc(hits)


def count_tokens(is_token_in_rank, rank, first, end):
    """One warp: how many of the tokens from `first` up to `end` go to a rank.  Four loads of a lane are under way at once."""
    count = 0
    token = first + lane()
    while token - lane() < end:
        hit0 = is_in_rank(is_token_in_rank, token, rank, end)
        hit1 = is_in_rank(is_token_in_rank, token + warp_size(), rank, end)
        hit2 = is_in_rank(is_token_in_rank, token + 2 * warp_size(), rank, end)
        hit3 = is_in_rank(is_token_in_rank, token + 3 * warp_size(), rank, end)
        count += popc(ballot(hit0)) + popc(ballot(hit1)) + popc(ballot(hit2)) + popc(ballot(hit3))
        token += 4 * warp_size()
    return count


def number_tokens(is_token_in_rank, rank, first, end, count, send_rows):
    """One warp numbers the tokens from `first` up to `end` that go to a rank, from `count` on; returns what comes after."""
    step = 4 * RANKS * warp_size()
    token = first + lane()
    while token - lane() < end:
        hit0 = is_in_rank(is_token_in_rank, token, rank, end)
        hit1 = is_in_rank(is_token_in_rank, token + warp_size(), rank, end)
        hit2 = is_in_rank(is_token_in_rank, token + 2 * warp_size(), rank, end)
        hit3 = is_in_rank(is_token_in_rank, token + 3 * warp_size(), rank, end)
        at = send_rows + 4 * (token * RANKS + rank)
        count = number(hit0, at, token, end, count)
        count = number(hit1, at + step, token + warp_size(), end, count)
        count = number(hit2, at + 2 * step, token + 2 * warp_size(), end, count)
        count = number(hit3, at + 3 * step, token + 3 * warp_size(), end, count)
        token += 4 * warp_size()
    return count


def sum_before(counts, warp):
    """The sum of the first `warp` words of 4 bytes in shared memory; the whole warp asks."""
    total = 0
    i = lane()
    while i < warp:
        total += ld4_shared(counts + 4 * i)
        i += warp_size()
    distance = 1
    while distance < warp_size():
        total += shfl_xor(total, distance)
        distance *= 2
    return total


def number_for_rank(watch, rank, num_tokens_per_rank, is_token_in_rank, num_tokens, send_rows):
    """One block makes a column of send_rows: each warp counts a stretch of tokens, then numbers it from where the warps before it
    end.  What comes out must be as many as were told."""
    stretch = udiv(num_tokens + num_threads() - 1, num_threads()) * warp_size()
    first = warp_rank() * stretch
    end = first + stretch if first + stretch < num_tokens else num_tokens
    count = count_tokens(is_token_in_rank, rank, first, end)
    if lane() == 0:
        st4_shared(shared() + 4 * warp_rank(), count)
    syncthreads()
    after = number_tokens(is_token_in_rank, rank, first, end, sum_before(shared(), warp_rank()), send_rows)
    told = ld4_nc(num_tokens_per_rank + 4 * rank)
    if thread_rank() == num_threads() - 1 and after != told:
        report(watch, OTHER_LAYOUT, rank, watch[0], told, after)
    syncthreads()


# ---- learn what the others have told -----------------------------------------------------------------------------------

def bring_counts(watch, first, entries, end, to):
    """Bring `entries` counters of each source, from entry `first` on but none from `end` on, into shared memory, [R][entries] words
    of 4 bytes; the block meets.  Returns 1 if all have come, else 0."""
    base, _, epoch = watch
    i = thread_rank()
    while i < RANKS * entries:
        source = udiv(i, entries)
        entry = first + i - source * entries
        if entry < end:
            st4_shared(to + 4 * i, wait_count(watch, NOTIFY_COUNT, source, slot(base, epoch, source, entry)))
        i += num_threads()
    return 1 - syncthreads_or(ld8_relaxed(base + FAILED))


def add_prefixes(watch, me, counts, rank_prefix, host):
    """rank_prefix_matrix, a thread a column, and whether its rank has room for its rows.  Returns 1 if it has, else 0."""
    room_for_all = 1
    rank = thread_rank()
    while rank < RANKS:
        rows = 0
        for source in range(RANKS):
            rows += ld4_shared(counts + 4 * (source * (1 + RANKS) + 1 + rank))
            st4(rank_prefix + 4 * (source * RANKS + rank), rows)
        room = ld4_shared(counts + 4 * rank * (1 + RANKS))
        if rows > room:
            room_for_all = 0
            if WORST:
                report(watch, TOO_MANY_ROWS, rank, watch[0], room, rows)
            else:                                                # if there are several, any of them will do
                st8(host + 8 * SHORT, rank)
                st8(host + 8 * NEEDED, rows)
                st8(host + 8 * ROOM, room)
        if rank == me and WORST == 0:
            st8(host + 8 * RECEIVED, rows)
            sent = 0
            for other in range(RANKS):
                if other != me:
                    sent += ld4_shared(counts + 4 * (me * (1 + RANKS) + 1 + other))
            st8(host + 8 * SENT, sent)
        rank += num_threads()
    return room_for_all


def count_experts(watch, alignment, host):
    """The rows of each local expert, rounded up, for the host.  Returns 1, or 0 if some counts have not come."""
    first = 0
    while first < LOCAL_EXPERTS:
        if bring_counts(watch, 1 + RANKS + first, STAGED, 1 + RANKS + LOCAL_EXPERTS, shared()) == 0:
            return 0
        expert = thread_rank()
        while expert < STAGED and first + expert < LOCAL_EXPERTS:
            rows = 0
            for source in range(RANKS):
                rows += ld4_shared(shared() + 4 * (source * STAGED + expert))
            st8(host + 8 * (COUNTS + first + expert), udiv(rows + alignment - 1, alignment) * alignment)
            expert += num_threads()
        syncthreads()
        first += STAGED
    return 1


def learn_counts(watch, me, alignment, rank_prefix, host):
    """One block waits for all ranks' counts and draws the conclusions."""
    if bring_counts(watch, 0, 1 + RANKS, 1 + RANKS, shared()) == 0:
        return
    short = syncthreads_or(1 - add_prefixes(watch, me, shared(), rank_prefix, host))
    if WORST == 0:
        if count_experts(watch, alignment, host) != 0:
            syncthreads()
            if thread_rank() == 0:                               # all else before it
                st8_release(host + 8 * STATE, 1 + short)


# ---- the kernel ------------------------------------------------------------------------------------------------------

def notify(base, me, timeout, num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank, num_tokens, room, alignment,
           rank_prefix, send_rows, host):
    """The kernel.  num_tokens_per_rank [R], num_tokens_per_expert [E] int32, is_token_in_rank [T, R] bool; room: rows that there is
    room for here; rank_prefix [R, R] and send_rows [T, R] int32: the results, see `pyep.high_throughput`; host: words for the host.

    The last block exchanges counts, the others number tokens, a rank each; any number of blocks does both.
    """
    watch = enter(base, timeout)
    if block_rank() == num_blocks() - 1:
        tell_counts(watch, me, num_tokens_per_rank, num_tokens_per_expert, room)
    rank = block_rank()
    while rank < RANKS:
        number_for_rank(watch, rank, num_tokens_per_rank, is_token_in_rank, num_tokens, send_rows)
        rank += num_blocks()
    if block_rank() == num_blocks() - 1:
        learn_counts(watch, me, alignment, rank_prefix, host)
    leave(watch)
