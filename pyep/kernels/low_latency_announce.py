"""Low-latency dispatch, the words beside the rows: who selects what, and which row it gets at its destination.

Rows are numbered per *group*: an expert, or in the rank-major layout a rank.  Of a source's selections of a group (rank-major:
of its tokens that have any), the n-th in (token, k) order has *place* n; with the counts of the lower ranks before it, that is
its row.  So the rows of a group are ordered by (source rank, source token, k) without sorting.
"""
from ..channels.memory import patience, report, take_word, tell, wait_count
from .basics import after, expert_at, lanes_before, num_warps, warp_rank
from .lang import (add4, ballot, lane, ld4_nc, ld4_shared, ld8_relaxed, ld8_relaxed_if, ld8_shared, num_threads, polls_per_look,
                   popc, shared, st4, st4_shared, st8, st8_relaxed, st8_shared, syncthreads, syncwarp, thread_rank, udiv, umod,
                   warp_size)
from .low_latency import (BAD_EXPERT, DISPATCH_CONSUMED, DISPATCH_COUNT, DISPATCH_PLACE, DISPATCH_ROUTE, EXPERTS, LOCAL_EXPERTS,
                          MAX_TOKENS, NO_ROOM, OTHER_OPERATION, PLACES, RANK_MAJOR, RANKS, TOPK, WEIGHTED, begin, tell_begun,
                          wait_begun)
from .low_latency_boxes import count_slot, counts_for, is_port_peer, places_for, routes_for
from .op import rare

GROUPS = LOCAL_GROUPS = 0                       # all groups; those of a rank
CHUNK = 0                                       # tokens whose selections are in shared memory at once

# ---- send ------------------------------------------------------------------------------------------------------------


def stage(topk_idx, topk_weights, first, selections):
    """Bring experts and weights of `selections` selections from `first` on into shared memory: as int32, one after another,
    the weights behind CHUNK * TOPK experts.  Two loads of each kind are under way at once."""
    weights = shared() + 4 * CHUNK * TOPK
    i = thread_rank()
    while i < selections:
        j = i + num_threads() if i + num_threads() < selections else i
        expert0, expert1 = expert_at(topk_idx, first + i), expert_at(topk_idx, first + j)
        if WEIGHTED:
            weight0, weight1 = ld4_nc(topk_weights + 4 * (first + i)), ld4_nc(topk_weights + 4 * (first + j))
            st4_shared(weights + 4 * i, weight0)
            st4_shared(weights + 4 * j, weight1)
        st4_shared(shared() + 4 * i, expert0)
        st4_shared(shared() + 4 * j, expert1)
        i += 2 * num_threads()


def send_routes(part, parts, watch, me, half, first, selections, selected):
    """Every staged selection's expert and weight, to every rank; `selected` keeps the expert for combine."""
    base, _, _ = watch
    warp = num_warps() - 1 - warp_rank()                         # the last warps: the first ones number groups
    i = (part + parts * warp) * warp_size() + lane()
    while i < selections:
        expert = ld4_shared(shared() + 4 * i)
        if expert < -1 or expert >= EXPERTS:
            report(watch, BAD_EXPERT, me, base, udiv(first + i, TOPK), expert)
            expert = -1
        st8(selected + 8 * (first + i), expert)
        route = expert + 1
        if WEIGHTED:
            route |= ld4_shared(shared() + 4 * (CHUNK * TOPK + i)) << 32
        for r in range(RANKS):
            st8_relaxed(routes_for(watch, after(me, r + 1), me, half) + 8 * (first + i), route)
        i += parts * num_threads()


def is_of_group(group, i, items):
    """Whether the i-th staged selection is of a group (rank-major: whether the i-th staged token has one that is).

    Without a branch, so that several looks are under way at once.
    """
    item = i if i < items else 0
    hit = 0
    if RANK_MAJOR:
        for k in range(TOPK):
            expert = ld4_shared(shared() + 4 * (item * TOPK + k))
            hit |= expert >= 0 and udiv(expert, LOCAL_EXPERTS) == group
    else:
        hit = ld4_shared(shared() + 4 * item) == group
    return 1 if hit and i < items else 0


def number_hits(hit, slot, count):
    """One lane's turn: tell a hit's place; `count` with the warp's hits added."""
    hits = ballot(hit)
    if hit != 0:
        st8_relaxed(slot, count + lanes_before(hits))
    return count + popc(hits)


def number_group(group, places, first, tokens, count):
    """One warp numbers what is of a group among the staged tokens, from `count` on; `places`: see `places_for`."""
    per_item = TOPK if RANK_MAJOR else 1                         # selections
    items = tokens if RANK_MAJOR else tokens * TOPK
    step = 8 * per_item * warp_size()
    i = lane()
    while i - lane() < items:                                    # four at once: their latency is the time of this loop
        hit0 = is_of_group(group, i, items)
        hit1 = is_of_group(group, i + warp_size(), items)
        hit2 = is_of_group(group, i + 2 * warp_size(), items)
        hit3 = is_of_group(group, i + 3 * warp_size(), items)
        slot = places + 8 * (first * TOPK + i * per_item)
        count = number_hits(hit0, slot, count)
        count = number_hits(hit1, slot + step, count)
        count = number_hits(hit2, slot + 2 * step, count)
        count = number_hits(hit3, slot + 3 * step, count)
        i += 4 * warp_size()
    return count


def announce(part, parts, watch, me, lag, half, topk_idx, topk_weights, num_tokens, selected):
    """All that the other ranks must know about this rank's tokens.

    Shared memory: the staged selections, then how many of each of this block's groups were numbered so far.
    """
    _, _, epoch = watch
    numbered = shared() + (4 * CHUNK * TOPK * (1 + WEIGHTED) + 7 & -8)
    first = 0
    while first < num_tokens or first == 0:
        tokens = num_tokens - first if num_tokens - first < CHUNK else CHUNK
        stage(topk_idx, topk_weights, first * TOPK, tokens * TOPK)
        if first > 0:
            syncthreads()
        elif begin(watch, DISPATCH_CONSUMED, me, lag) == 0:
            return
        else:
            tell_begun(part, watch, me, num_tokens)
        send_routes(part, parts, watch, me, half, first * TOPK, tokens * TOPK, selected)
        turn = warp_rank()
        while part + turn * parts < GROUPS:                      # a warp for each group; neighbouring ones in different blocks
            group = part + turn * parts
            owner = udiv(group, LOCAL_GROUPS)
            count = ld8_shared(numbered + 8 * turn) if first > 0 else 0
            count = number_group(group, places_for(watch, owner, me, half), first, tokens, count)
            if lane() == 0:
                st8_shared(numbered + 8 * turn, count)
                if first + CHUNK >= num_tokens:
                    tell(counts_for(watch, owner, me) + 8 * (1 + group - owner * LOCAL_GROUPS), epoch, count)
            turn += num_warps()
        syncthreads()
        first += CHUNK


# ---- receive ---------------------------------------------------------------------------------------------------------

def possible(watch, source, tokens):
    """How many tokens a source sends, if it says so; 0 if it does not even dispatch."""
    if tokens > MAX_TOKENS:
        report(watch, OTHER_OPERATION, source, watch[0], 0, tokens)
        tokens = 0
    return tokens


def tokens_of(watch, source, waited):
    """How many tokens a source sends."""
    return possible(watch, source, wait_begun(watch, DISPATCH_COUNT, source, waited))


def measure_waits(part, watch, wait_stats):
    """Add up how long this rank waits for each source to begin; before anything else waits.  (For port peers: `wait_for_box`.)"""
    source = thread_rank()
    while wait_stats != 0 and part == 0 and source < RANKS:
        if is_port_peer(watch[0], source) == 0:
            tokens_of(watch, source, wait_stats)
        source += num_threads()


def read_counts(part, watch, sent):
    """Shared memory from here on: tokens[source], then count[source][expert], in the rank-major layout rows[source].  Returns the
    most tokens of a source."""
    base, _, epoch = watch
    words = RANKS * (1 + LOCAL_GROUPS)
    word = num_threads() - 1 - thread_rank()                     # the last threads: the first ones take units meanwhile
    while word < words:
        if word < RANKS:
            count = tokens_of(watch, word, 0)
            if part == 0 and not RANK_MAJOR:
                st8(sent + 8 * word, count)
        else:
            source = udiv(word - RANKS, LOCAL_GROUPS)
            slot = count_slot(base, epoch, source) + 8 * (1 + word - RANKS - source * LOCAL_GROUPS)
            count = wait_count(watch, DISPATCH_COUNT, source, slot)
        st8_shared(shared() + 8 * word, count)
        word += num_threads()
    syncthreads()
    most = 0
    for source in range(RANKS):
        tokens = ld8_shared(shared() + 8 * source)
        most = tokens if tokens > most else most
    return most


def add_up_counts(part, recv_count, layout_range, sent, recv_stats):
    """In shared memory, count[source][expert] becomes begin[source][expert], the first row of that source for that expert; in the
    rank-major layout every source has rows of its own."""
    group = thread_rank()
    while group < LOCAL_GROUPS:
        begin_row = 0
        for source in range(RANKS):
            slot = shared() + 8 * (RANKS + source * LOCAL_GROUPS + group)
            count = ld8_shared(slot)
            if RANK_MAJOR:
                if part == 0:
                    st8(layout_range + 8 * source, (source * MAX_TOKENS << 32) | count)
                    st4(recv_count + 4 * source, count)
                    st8(sent + 8 * source, count)
            else:
                st8_shared(slot, begin_row)
                if part == 0:
                    st8(layout_range + 8 * (group * RANKS + source), (begin_row << 32) | count)
                begin_row += count
        if part == 0 and not RANK_MAJOR:
            st4(recv_count + 4 * group, begin_row)
            if recv_stats != 0:
                add4(recv_stats + 4 * group, begin_row)
        group += num_threads()
    syncthreads()


# A *unit* is a (source, token) pair.  One warp takes what was told about it, in two steps, since the counts may come later than
# that.  Its list in shared memory is: how many rows the unit gets, a word for each of them (in the rank-major layout first for
# each k), the place (rank-major).


def look_at_selection(base, half, source, token, k):
    """Looks at the route and at the place of a selection."""
    slot = base + half + 8 * ((source * MAX_TOKENS + token) * TOPK + k)
    return ld8_relaxed_if(slot, k < TOPK), ld8_relaxed_if(slot + PLACES, k < TOPK)


@rare
def wait_for_tokens(watch, half, source, token):
    """`tokens_of`, with looks at this lane's selection of a token, in the hope that there is one: as every poll is accompanied by
    them, they show by and large what has come when the number of tokens has."""
    base, _, epoch = watch
    counter = count_slot(base, epoch, source)
    told, deadline, polls, route, place = 0, 0, 0, 0, 0
    while (told >> 32) & 0xFFFFFFFF != epoch and deadline >= 0:
        polls += 1
        if umod(polls, polls_per_look()) == 0:
            deadline = patience(deadline, watch, DISPATCH_COUNT, source, counter, epoch, told)
        told = ld8_relaxed(counter)
        route, place = look_at_selection(base, half, source, token, lane())
    return possible(watch, source, told & 0xFFFFFFFF if deadline >= 0 else 0), route, place


def take_selections(entries, watch, me, half, source, token, route, place, row_of, weight_of):
    """Expert-major, first step: list the unit's selections of this rank's experts, as k << 48 | local expert << 32 | place.
    route, place: what looks at this lane's first selection have shown."""
    base, _, _ = watch
    count = 0
    first = 0
    while first < TOPK:
        k = first + lane()
        selection = (source * MAX_TOKENS + token) * TOPK + k
        route_at = base + half + 8 * selection
        if first > 0:
            route, place = look_at_selection(base, half, source, token, k)
        expert = -1
        if k < TOPK:
            route = take_word(route, watch, DISPATCH_ROUTE, source, route_at)
            expert = (route & 0xFFFFFFFF) - 1 - me * LOCAL_EXPERTS
            if expert < 0 or expert >= LOCAL_EXPERTS:
                expert = -1
                st8(row_of + 8 * selection, -1)
            elif WEIGHTED:
                st4(weight_of + 4 * selection, route >> 32)
        mine = ballot(1 if expert >= 0 else 0)
        if expert >= 0:
            place = take_word(place, watch, DISPATCH_PLACE, source, route_at + PLACES)
            st8_shared(entries + 8 * (count + lanes_before(mine)), (k << 48) | (expert << 32) | place)
        count += popc(mine)
        first += warp_size()
    return count


def place_selections(entries, count, watch, source, token, src_info, row_of):
    """Second step: the entries become rows of recv_x, counted over all local experts; with src_info and row_of."""
    i = lane()
    while i < count:
        entry = ld8_shared(entries + 8 * i)
        k, expert = (entry >> 48) & 0xFFFF, (entry >> 32) & 0xFFFF
        row = ld8_shared(shared() + 8 * (RANKS + source * LOCAL_GROUPS + expert)) + (entry & 0xFFFFFFFF)
        if row >= RANKS * MAX_TOKENS:
            report(watch, NO_ROOM, source, watch[0], token, expert)
            row = 0
        row += expert * RANKS * MAX_TOKENS
        st4(src_info + 4 * row, token)
        st8(row_of + 8 * ((source * MAX_TOKENS + token) * TOPK + k), row)
        st8_shared(entries + 8 * i, row)
        i += warp_size()


def take_token(entries, watch, me, half, source, token, route, place, row_of, recv_stats):
    """Rank-major, first step: keep the unit's selections as weight << 32 | local expert, and its place; 1 if it has a row here.
    route, place: what looks at this lane's first selection have shown."""
    base, _, _ = watch
    hits = 0
    first = 0
    while first < TOPK:
        k = first + lane()
        if first > 0:
            route, _ = look_at_selection(base, half, source, token, k)
        expert = -1
        if k < TOPK:
            route_at = base + half + 8 * ((source * MAX_TOKENS + token) * TOPK + k)
            route = take_word(route, watch, DISPATCH_ROUTE, source, route_at)
            expert = (route & 0xFFFFFFFF) - 1 - me * LOCAL_EXPERTS
            if expert >= 0 and expert < LOCAL_EXPERTS:
                st8_shared(entries + 8 * k, (route & ~0xFFFFFFFF) | expert)
                if recv_stats != 0:
                    add4(recv_stats + 4 * expert, 1)
            else:
                expert = -1
                st8_shared(entries + 8 * k, 0xFFFFFFFF)
        hits |= ballot(1 if expert >= 0 else 0)
        first += warp_size()
    if lane() == 0:
        if hits == 0:
            st8(row_of + 8 * (source * MAX_TOKENS + token), -1)
        else:
            place_at = base + half + PLACES + 8 * (source * MAX_TOKENS + token) * TOPK
            place = take_word(place, watch, DISPATCH_PLACE, source, place_at)
            st8_shared(entries + 8 * TOPK, place)
    return 1 if hits != 0 else 0


def place_token(entries, source, token, src_info, row_of, recv_topk_idx, recv_topk_weights):
    """Second step: the unit's row of recv_x, and its selections beside it."""
    row = source * MAX_TOKENS + ld8_shared(entries + 8 * TOPK)
    k = lane()
    while k < TOPK:
        entry = ld8_shared(entries + 8 * k)
        expert = -1 if entry & 0xFFFFFFFF == 0xFFFFFFFF else entry & 0xFFFFFFFF
        st8(recv_topk_idx + 8 * (row * TOPK + k), expert)
        if WEIGHTED:
            st4(recv_topk_weights + 4 * (row * TOPK + k), entry >> 32)
        k += warp_size()
    syncwarp()
    if lane() == 0:
        st8_shared(entries, row)
        st4(src_info + 4 * row, token)
        st8(row_of + 8 * (source * MAX_TOKENS + token), row)


def clear_tails(part, parts, recv_topk_idx, recv_topk_weights):
    """Rank-major: in rows that no token got, nothing is selected."""
    rows = shared() + 8 * RANKS
    i = part * num_threads() + thread_rank()
    while i < RANKS * MAX_TOKENS * TOPK:
        source = udiv(i, MAX_TOKENS * TOPK)
        if i >= (source * MAX_TOKENS + ld8_shared(rows + 8 * source)) * TOPK:
            st8(recv_topk_idx + 8 * i, -1)
            if WEIGHTED:
                st4(recv_topk_weights + 4 * i, 0)
        i += parts * num_threads()
