"""Low-latency dispatch, what a receiver makes of the words beside the rows: how many rows each source has for each group, and for
each token a list of the rows that it gets here.  See `low_latency_announce` for what is told.
"""
from ..channels.memory import ABSENT, patience, read_word, report, wait_count
from .basics import lanes_before
from .lang import (add4, ballot, fetch_add8_relaxed, lane, ld8_relaxed, ld8_relaxed_if, ld8_shared, num_threads, polls_per_look,
                   popc, shared, st4, st8, st8_relaxed, st8_shared, syncthreads, syncwarp, thread_rank, udiv, umod, warp_size)
from .low_latency import (DISPATCH_COUNT, DISPATCH_PLACE, DISPATCH_ROUTE, LISTED, LOCAL_EXPERTS, MAX_TOKENS, NO_ROOM,
                          OTHER_OPERATION, PLACES, RANK_MAJOR, RANKS, TOPK, WEIGHTED, last_first, wait_begun)
from .low_latency_announce import LOCAL_GROUPS
from .low_latency_boxes import count_slot, is_port_peer
from .op import rare

TAKEN_CUTS = 1                                      # parts that a row is cut into, see `low_latency_dispatch`

# ---- counts ----------------------------------------------------------------------------------------------------------

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
    word = last_first()                                          # the first threads list units meanwhile
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


def first_row(source, expert):
    """The first row that a source has of a local expert, counted from the expert's first: behind those of the lower ranks."""
    row = 0
    for lower in range(RANKS):
        count = ld8_shared(shared() + 8 * (RANKS + lower * LOCAL_GROUPS + expert))
        row += count if lower < source else 0
    return row


def add_up_counts(part, recv_count, layout_range, sent, recv_stats):
    """What the caller and combine want of the counts: the first block sees to it, with its last threads."""
    group = last_first()
    while group < LOCAL_GROUPS and part == 0:
        row = 0
        for source in range(RANKS):
            count = ld8_shared(shared() + 8 * (RANKS + source * LOCAL_GROUPS + group))
            if RANK_MAJOR:
                st8(layout_range + 8 * source, (source * MAX_TOKENS << 32) | count)
                st4(recv_count + 4 * source, count)
                st8(sent + 8 * source, count)
            else:
                st8(layout_range + 8 * (group * RANKS + source), (row << 32) | count)
                row += count
        if not RANK_MAJOR:
            st4(recv_count + 4 * group, row)
            if recv_stats != 0:
                add4(recv_stats + 4 * group, row)
        group += num_threads()


# ---- lists -----------------------------------------------------------------------------------------------------------
# A *unit* is a (source, token) pair.  A warp reads what was told about it and lists its rows, in two steps, since the counts may
# come later than that.  The list in shared memory is: how many rows the unit gets, a word for each of them (in the rank-major
# layout first for each k), the place (rank-major).
#
# As many warps do so as a row has *cuts*, in different blocks: the last of them clears the slots of the words.  The one with the
# first cut *keeps* what combine and the caller want to know.


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


def list_selections(entries, watch, me, half, source, token, route, place, keeps, row_of, weight_of):
    """Expert-major, first step: list the unit's selections of this rank's experts, as k << 48 | local expert << 32 | place.
    Returns how many.  route, place: what looks at this lane's first selection have shown."""
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
            route = read_word(route, watch, DISPATCH_ROUTE, source, route_at)
            expert = (route & 0xFFFFFFFF) - 1 - me * LOCAL_EXPERTS
            if expert < 0 or expert >= LOCAL_EXPERTS:
                expert = -1
                if keeps:
                    st8(row_of + 8 * selection, -1)
            elif WEIGHTED and keeps:
                st4(weight_of + 4 * selection, route >> 32)
        mine = ballot(1 if expert >= 0 else 0)
        if expert >= 0:
            place = read_word(place, watch, DISPATCH_PLACE, source, route_at + PLACES)
            st8_shared(entries + 8 * (count + lanes_before(mine)), (k << 48) | (expert << 32) | (place & 0xFFFFFFFF))
        count += popc(mine)
        first += warp_size()
    return count


def place_selections(entries, count, watch, source, token, keeps, src_info, row_of):
    """Second step: the entries become rows of recv_x, counted over all local experts; with src_info and row_of."""
    i = lane()
    while i < count:
        entry = ld8_shared(entries + 8 * i)
        k, expert = (entry >> 48) & 0xFFFF, (entry >> 32) & 0xFFFF
        row = first_row(source, expert) + (entry & 0xFFFFFFFF)
        if row >= RANKS * MAX_TOKENS:
            report(watch, NO_ROOM, source, watch[0], token, expert)
            row = 0
        row += expert * RANKS * MAX_TOKENS
        st8_shared(entries + 8 * i, row)
        if keeps:
            st4(src_info + 4 * row, token)
            st8(row_of + 8 * ((source * MAX_TOKENS + token) * TOPK + k), row)
        i += warp_size()


def list_token(entries, watch, me, half, source, token, route, place, keeps, row_of, recv_stats):
    """Rank-major, first step: list the unit's selections as weight << 32 | local expert, and its place; 1 if it has a row here.
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
            route = read_word(route, watch, DISPATCH_ROUTE, source, route_at)
            expert = (route & 0xFFFFFFFF) - 1 - me * LOCAL_EXPERTS
            if expert >= 0 and expert < LOCAL_EXPERTS:
                st8_shared(entries + 8 * k, (route & ~0xFFFFFFFF) | expert)
                if recv_stats != 0 and keeps:
                    add4(recv_stats + 4 * expert, 1)
            else:
                expert = -1
                st8_shared(entries + 8 * k, 0xFFFFFFFF)
        hits |= ballot(1 if expert >= 0 else 0)
        first += warp_size()
    if lane() == 0:
        if hits != 0:
            place_at = base + half + PLACES + 8 * (source * MAX_TOKENS + token) * TOPK
            st8_shared(entries + 8 * TOPK, read_word(place, watch, DISPATCH_PLACE, source, place_at))
        elif keeps:
            st8(row_of + 8 * (source * MAX_TOKENS + token), -1)
    return 1 if hits != 0 else 0


def place_token(entries, source, token, keeps, src_info, row_of, recv_topk_idx, recv_topk_weights):
    """Second step: the unit's row of recv_x, and its selections beside it."""
    row = source * MAX_TOKENS + ld8_shared(entries + 8 * TOPK)
    k = lane()
    while k < TOPK and keeps:
        entry = ld8_shared(entries + 8 * k)
        expert = -1 if entry & 0xFFFFFFFF == 0xFFFFFFFF else entry & 0xFFFFFFFF
        st8(recv_topk_idx + 8 * (row * TOPK + k), expert)
        if WEIGHTED:
            st4(recv_topk_weights + 4 * (row * TOPK + k), entry >> 32)
        k += warp_size()
    syncwarp()
    if lane() == 0:
        st8_shared(entries, row)
        if keeps:
            st4(src_info + 4 * row, token)
            st8(row_of + 8 * (source * MAX_TOKENS + token), row)


def count_list(watch, half, source, token):
    """Count that a warp has listed a unit, which takes a trip to memory; how many had before, less one (for lane 0)."""
    syncwarp()                                                   # all lanes have read their words
    if TAKEN_CUTS > 1 and lane() == 0:
        return fetch_add8_relaxed(watch[0] + half + LISTED + 8 * (source * MAX_TOKENS + token), 1)
    return TAKEN_CUTS - 2


def clear_words(watch, half, source, token, before):
    """The warp that listed a unit last makes the slots of its words ready for the next sender.  before: from `count_list`."""
    if ballot(1 if lane() == 0 and before == TAKEN_CUTS - 2 else 0) != 0:
        unit = source * MAX_TOKENS + token
        k = lane()
        while k < TOPK:
            slot = watch[0] + half + 8 * (unit * TOPK + k)
            st8_relaxed(slot, ABSENT)
            st8_relaxed(slot + PLACES, ABSENT)
            k += warp_size()
        if TAKEN_CUTS > 1 and lane() == 0:
            st8_relaxed(watch[0] + half + LISTED + 8 * unit, ABSENT)


def clear_tails(part, parts, recv_topk_idx, recv_topk_weights):
    """Rank-major: in rows that no token got, nothing is selected.  Only blocks that have a unit call.

    (To compare with source * MAX_TOKENS + count is the same, but where MAX_TOKENS is 8, the size of a count, LLVM ends the process:
    x86 instruction selection fails an assertion over `8 * source + load(rows + 8 * source)` if `source` is a shift.)
    """
    rows = shared() + 8 * RANKS
    parts = parts if parts < RANKS * MAX_TOKENS else RANKS * MAX_TOKENS
    i = part * num_threads() + thread_rank()
    while i < RANKS * MAX_TOKENS * TOPK:
        source = udiv(i, MAX_TOKENS * TOPK)
        if umod(i, MAX_TOKENS * TOPK) >= ld8_shared(rows + 8 * source) * TOPK:
            st8(recv_topk_idx + 8 * i, -1)
            if WEIGHTED:
                st4(recv_topk_weights + 4 * i, 0)
        i += parts * num_threads()
