"""Low-latency dispatch, what a receiver makes of the words beside the rows: how many rows each source has for each group, and for
each token a list of the rows that it gets here.  See `low_latency_announce` for what is told.
"""
from ..channels.memory import ABSENT, patience, read_word, report, wait_count
from .basics import lanes_before
from .lang import (add4, ballot, fetch_add8_relaxed, lane, ld8_relaxed, ld8_relaxed_if, ld8_shared, num_threads, polls_per_look,
                   popc, shared, st4, st8, st8_relaxed, st8_shared, syncthreads, syncwarp, thread_rank, udiv, umod, warp_size)
from .low_latency import (DISPATCH_COUNT, DISPATCH_PLACE, DISPATCH_ROUTE, LOCAL_EXPERTS, OTHER_OPERATION, RANK_MAJOR, RANKS,
                          TOKENS, TOPK, VOID, WEIGHTED, last_first, shape_bits, wait_begun)
from .low_latency_announce import LOCAL_GROUPS
from .low_latency_boxes import count_slot, is_port_peer
from .low_latency_slots import listed_at, place_at, route_at
from .low_latency_void import tell_void
from .op import rare

TAKEN_CUTS = 1                                      # parts that a row is cut into, see `low_latency_dispatch`

# ---- counts ----------------------------------------------------------------------------------------------------------

def told_tokens(watch, source, told, max_tokens):
    """How many tokens a source sends, by what it has told; 0 if that is another operation, or of another shape."""
    if told & ~(TOKENS | VOID) != shape_bits(max_tokens):
        report(watch, OTHER_OPERATION, source, watch[0], 0, told)
        return 0
    return told & TOKENS


def tokens_of(watch, source, max_tokens, waited):
    """How many tokens a source sends."""
    return told_tokens(watch, source, wait_begun(watch, DISPATCH_COUNT, source, waited), max_tokens)


def measure_waits(part, watch, max_tokens, wait_stats):
    """Add up how long this rank waits for each source to begin; before anything else waits.  (For port peers: `wait_for_box`.)"""
    source = thread_rank()
    while wait_stats != 0 and part == 0 and source < RANKS:
        if is_port_peer(watch[0], source) == 0:
            tokens_of(watch, source, max_tokens, wait_stats)
        source += num_threads()


def read_counts(part, watch, max_tokens, sent):
    """Shared memory from here on: tokens[source], then count[source][expert], in the rank-major layout rows[source].  Returns the
    most tokens of a source."""
    base, _, epoch = watch
    words = RANKS * (1 + LOCAL_GROUPS)
    word = last_first()                                          # the first threads list units meanwhile
    while word < words:
        if word < RANKS:
            told = wait_begun(watch, DISPATCH_COUNT, word, 0)
            count = told_tokens(watch, word, told, max_tokens)
            if told & VOID:
                tell_void(watch, word)
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


def add_up_counts(part, max_tokens, recv_count, layout_range, sent, recv_stats):
    """What the caller and combine want of the counts: the first block sees to it, with its last threads."""
    group = last_first()
    while group < LOCAL_GROUPS and part == 0:
        row = 0
        for source in range(RANKS):
            count = ld8_shared(shared() + 8 * (RANKS + source * LOCAL_GROUPS + group))
            if RANK_MAJOR:
                st8(layout_range + 8 * source, (source * max_tokens << 32) | count)
                st4(recv_count + 4 * source, count)
                st8(sent + 8 * source, count)
            else:
                st8(layout_range + 8 * (group * RANKS + source), (row << 32) | count)
                row += count
        if not RANK_MAJOR:
            st4(recv_count + 4 * group, row if row < RANKS * max_tokens else RANKS * max_tokens)
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


def look_at_selection(half_at, source, token, k):
    """Looks at the route and at the place of a selection.  half_at: the address of the half."""
    return (ld8_relaxed_if(route_at(half_at, source, token, k), k < TOPK),
            ld8_relaxed_if(place_at(half_at, source, token, k), k < TOPK))


@rare
def wait_for_tokens(watch, half, source, token, max_tokens):
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
        route, place = look_at_selection(base + half, source, token, lane())
    return told_tokens(watch, source, told & 0xFFFFFFFF if deadline >= 0 else 0, max_tokens), route, place


def list_selections(entries, watch, me, half, source, token, route, place, keeps, row_of, weight_of):
    """Expert-major, first step: list the unit's selections of this rank's experts, as k << 48 | local expert << 32 | place.
    Returns how many.  route, place: what looks at this lane's first selection have shown."""
    base, _, _ = watch
    count = 0
    first = 0
    while first < TOPK:
        k = first + lane()
        selection = (token * RANKS + source) * TOPK + k
        if first > 0:
            route, place = look_at_selection(base + half, source, token, k)
        expert = -1
        if k < TOPK:
            route = read_word(route, watch, DISPATCH_ROUTE, source, route_at(base + half, source, token, k))
            expert = (route & 0xFFFFFFFF) - 1 - me * LOCAL_EXPERTS
            if expert < 0 or expert >= LOCAL_EXPERTS:
                expert = -1
                if keeps:
                    st8(row_of + 8 * selection, -1)
            elif WEIGHTED and keeps:
                st4(weight_of + 4 * selection, route >> 32)
        mine = ballot(1 if expert >= 0 else 0)
        if expert >= 0:
            place = read_word(place, watch, DISPATCH_PLACE, source, place_at(base + half, source, token, k))
            st8_shared(entries + 8 * (count + lanes_before(mine)), (k << 48) | (expert << 32) | (place & 0xFFFFFFFF))
        count += popc(mine)
        first += warp_size()
    return count


def place_selections(entries, count, source, token, max_tokens, keeps, src_info, row_of):
    """Second step: the entries become local expert << 32 | row of recv_x, counted over all local experts; with src_info and
    row_of."""
    i = lane()
    while i < count:
        entry = ld8_shared(entries + 8 * i)
        k, expert = (entry >> 48) & 0xFFFF, (entry >> 32) & 0xFFFF
        row = first_row(source, expert) + (entry & 0xFFFFFFFF)
        row = row if row < RANKS * max_tokens else 0             # of a dispatch that is void there may be more than have room
        row += expert * RANKS * max_tokens
        st8_shared(entries + 8 * i, (expert << 32) | row)
        if keeps:
            st4(src_info + 4 * row, token)
            st8(row_of + 8 * ((token * RANKS + source) * TOPK + k), row)
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
            route, _ = look_at_selection(base + half, source, token, k)
        expert = -1
        if k < TOPK:
            route = read_word(route, watch, DISPATCH_ROUTE, source, route_at(base + half, source, token, k))
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
            place = read_word(place, watch, DISPATCH_PLACE, source, place_at(base + half, source, token, 0))
            st8_shared(entries + 8 * TOPK, place)
        elif keeps:
            st8(row_of + 8 * (token * RANKS + source), -1)
    return 1 if hits != 0 else 0


def place_token(entries, source, token, max_tokens, keeps, src_info, row_of, recv_topk_idx, recv_topk_weights):
    """Second step: source << 32 | the unit's row of recv_x, and its selections beside it."""
    row = source * max_tokens + ld8_shared(entries + 8 * TOPK)
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
        st8_shared(entries, (source << 32) | row)
        if keeps:
            st4(src_info + 4 * row, token)
            st8(row_of + 8 * (token * RANKS + source), row)


def count_list(watch, half, source, token):
    """Count that a warp has listed a unit, which takes a trip to memory; how many had before, less one (for lane 0)."""
    syncwarp()                                                   # all lanes have read their words
    if TAKEN_CUTS > 1 and lane() == 0:
        return fetch_add8_relaxed(listed_at(watch[0] + half, source, token), 1)
    return TAKEN_CUTS - 2


def clear_words(watch, half, source, token, before):
    """The warp that listed a unit last makes the slots of its words ready for the next sender.  before: from `count_list`."""
    if ballot(1 if lane() == 0 and before == TAKEN_CUTS - 2 else 0) != 0:
        half_at, k = watch[0] + half, lane()
        while k < TOPK:
            st8_relaxed(route_at(half_at, source, token, k), ABSENT)
            st8_relaxed(place_at(half_at, source, token, k), ABSENT)
            k += warp_size()
        if TAKEN_CUTS > 1 and lane() == 0:
            st8_relaxed(listed_at(half_at, source, token), ABSENT)


def clear_tails(part, parts, max_tokens, recv_topk_idx, recv_topk_weights):
    """Rank-major: in rows that no token got, nothing is selected.  Only blocks that have a unit call."""
    parts = parts if parts < RANKS * max_tokens else RANKS * max_tokens
    source = 0
    while source < RANKS:
        rows = ld8_shared(shared() + 8 * (RANKS + source))
        i = (source * max_tokens + rows) * TOPK + part * num_threads() + thread_rank()
        while i < (source + 1) * max_tokens * TOPK:
            st8(recv_topk_idx + 8 * i, -1)
            if WEIGHTED:
                st4(recv_topk_weights + 4 * i, 0)
            i += parts * num_threads()
        source += 1
