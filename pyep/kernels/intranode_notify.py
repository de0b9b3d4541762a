"""Before a high-throughput dispatch: every rank tells every rank how many tokens it has for whom, so that all know where all rows
go.

Nobody sends more than a few words, and nobody waits twice: each rank computes the whole rank_prefix_matrix by itself, and the most
rows that any rank gets, so all come to the same conclusion about room for them.  Meanwhile other blocks number this rank's tokens.
"""
from ..channels.memory import peer, refuse, report, tell, wait_count
from .basics import lanes_before, num_warps, warp_rank
from .intranode import (EXPERTS, FAILED, HT_COUNTS, HT_COUNTS_STRIDE, LOCAL_EXPERTS, NOTIFY_COUNT, OTHER_LAYOUT, RANKS,
                        OTHER_CALL, TOO_MANY_ROWS, enter, leave, tell_operation)
from .lang import (ballot, block_rank, lane, ld1_nc_if, ld4_nc, ld4_shared, ld8_relaxed, num_blocks, num_threads, popc, shared,
                   shfl_xor, st4, st4_shared, st8, st8_release, syncthreads, syncthreads_or, thread_rank, udiv, warp_size)

STAGED = 0                                      # local experts whose counts are in shared memory at once
WORST = 0                                       # 1: nobody on the host waits for counts; a rank has room or it is an error

# The words for the host, the counts of the local experts behind them.  STATE: 1 once all is there.  RECEIVED: rows that come here;
# SENT: rows that go from here to other ranks; MOST_RECEIVED, MOST_SENT: of the rank that has most.
STATE, RECEIVED, SENT, MOST_RECEIVED, MOST_SENT, COUNTS = range(6)

ROOM, OPERATION, TOKENS = range(3)              # counters that a rank tells, see pyep.layout.control


# ---- tell ------------------------------------------------------------------------------------------------------------

def slot(memory, epoch, source, entry):
    """A counter of `source` in a rank's memory, see `pyep.layout.control`."""
    return memory + HT_COUNTS + ((epoch & 1) * RANKS + source) * HT_COUNTS_STRIDE + 8 * entry


def tell_counts(watch, me, operation, num_tokens_per_rank, num_tokens_per_expert, room):
    """To every rank, what this one does, for how many rows there is room here and how many tokens go where; to an expert's rank its
    selections."""
    base, _, epoch = watch
    i = thread_rank()
    while i < RANKS * (TOKENS + RANKS):
        rank = udiv(i, TOKENS + RANKS)
        entry = i - rank * (TOKENS + RANKS)
        count = operation if entry == OPERATION else room
        if entry >= TOKENS:
            count = ld4_nc(num_tokens_per_rank + 4 * (entry - TOKENS))
        tell(slot(peer(base, rank), epoch, me, entry), epoch, count)
        i += num_threads()
    i = thread_rank()
    while i < EXPERTS and WORST == 0:
        rank = udiv(i, LOCAL_EXPERTS)
        count = ld4_nc(num_tokens_per_expert + 4 * i)
        tell(slot(peer(base, rank), epoch, me, TOKENS + RANKS + i - rank * LOCAL_EXPERTS), epoch, count)
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


def number_for_rank(watch, me, rank, num_tokens_per_rank, is_token_in_rank, num_tokens, send_rows):
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
        refuse(watch, me, OTHER_LAYOUT, rank, told, after)
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


def count_of(counts, source, entry):
    """A counter that was brought."""
    return ld4_shared(counts + 4 * (source * (TOKENS + RANKS) + entry))


def most_of_warp(value):
    """The largest value of a warp's lanes."""
    distance = 1
    while distance < warp_size():
        other = shfl_xor(value, distance)
        value = other if other > value else value
        distance *= 2
    return value


def add_prefixes(watch, me, operation, counts, rank_prefix):
    """rank_prefix_matrix, a thread a column, and whether its rank makes the same call; with WORST also whether it has room for its
    rows.  Returns 1 if so, else 0."""
    agreed = 1
    rank = thread_rank()
    while rank < RANKS:
        rows = 0
        for source in range(RANKS):
            rows += count_of(counts, source, TOKENS + rank)
            st4(rank_prefix + 4 * (source * RANKS + rank), rows)
        room, other = count_of(counts, rank, ROOM), count_of(counts, rank, OPERATION)
        if other != operation:
            refuse(watch, me, OTHER_CALL, rank, operation, other)
            agreed = 0
        elif WORST and rows > room:
            report(watch, TOO_MANY_ROWS, rank, watch[0], room, rows)
        rank += num_threads()
    return agreed


def add_up(me, counts, host):
    """One warp adds up what every rank receives and what it sends to others, a lane a rank, for the host."""
    most_received, most_sent = 0, 0
    first = 0
    while first < RANKS:
        rank = first + lane()
        received, sent = 0, 0
        for other in range(RANKS):
            if rank < RANKS:
                received += count_of(counts, other, TOKENS + rank)
                sent += count_of(counts, rank, TOKENS + other) if other != rank else 0
        if rank == me:
            st8(host + 8 * RECEIVED, received)
            st8(host + 8 * SENT, sent)
        most_received = received if received > most_received else most_received
        most_sent = sent if sent > most_sent else most_sent
        first += warp_size()
    most_received, most_sent = most_of_warp(most_received), most_of_warp(most_sent)
    if lane() == 0:
        st8(host + 8 * MOST_RECEIVED, most_received)
        st8(host + 8 * MOST_SENT, most_sent)


def count_experts(watch, alignment, host):
    """The rows of each local expert, rounded up, for the host.  Returns 1, or 0 if some counts have not come."""
    first = 0
    while first < LOCAL_EXPERTS:
        if bring_counts(watch, TOKENS + RANKS + first, STAGED, TOKENS + RANKS + LOCAL_EXPERTS, shared()) == 0:
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


def learn_counts(watch, me, operation, alignment, rank_prefix, host):
    """One block waits for all ranks' counts and draws the conclusions."""
    if bring_counts(watch, 0, TOKENS + RANKS, TOKENS + RANKS, shared()) == 0:
        return
    refused = syncthreads_or(1 - add_prefixes(watch, me, operation, shared(), rank_prefix))
    if WORST == 0 and refused == 0:
        if warp_rank() == num_warps() - 1:
            add_up(me, shared(), host)
        syncthreads()                                            # shared memory is used again
        if count_experts(watch, alignment, host) != 0:
            syncthreads()
            if thread_rank() == 0:                               # all else before it
                st8_release(host + 8 * STATE, 1)


# ---- the kernel ------------------------------------------------------------------------------------------------------

def notify(base, me, timeout, operation, num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank, num_tokens, room, alignment,
           rank_prefix, send_rows, host):
    """The kernel.  operation: see `tell_operation`; num_tokens_per_rank [R], num_tokens_per_expert [E] int32, is_token_in_rank
    [T, R] bool; room: with WORST the rows that there is room for here; rank_prefix [R, R] and send_rows [T, R] int32: the results,
    see `pyep.high_throughput`; host: words for the host.

    The last block exchanges counts, the others number tokens, a rank each; any number of blocks does both.
    """
    watch = enter(base, timeout)
    if block_rank() == num_blocks() - 1:
        tell_counts(watch, me, operation, num_tokens_per_rank, num_tokens_per_expert, room)
        tell_operation(watch, me, operation)                     # for ranks that make another call, without counts
    rank = block_rank()
    while rank < RANKS:
        number_for_rank(watch, me, rank, num_tokens_per_rank, is_token_in_rank, num_tokens, send_rows)
        rank += num_blocks()
    if block_rank() == num_blocks() - 1:
        learn_counts(watch, me, operation, alignment, rank_prefix, host)
    leave(watch)
