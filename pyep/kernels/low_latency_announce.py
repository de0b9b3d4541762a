"""Low-latency dispatch, the words beside the rows: who selects what, and which row it gets at its destination.

Rows are numbered per *group*: an expert, or in the rank-major layout a rank.  Of a source's selections of a group (rank-major:
of its tokens that have any), the n-th in (token, k) order has *place* n; with the counts of the lower ranks before it, that is
its row.  So the rows of a group are ordered by (source rank, source token, k) without sorting.
"""
from ..channels.memory import tell
from .basics import after, expert_at, lanes_before, num_warps, warp_rank
from .lang import (ballot, lane, ld4_nc, ld4_shared, ld8_shared, num_threads, popc, shared, st4_shared, st8, st8_relaxed,
                   st8_shared, syncthreads, syncthreads_or, thread_rank, udiv, umod, warp_size)
from .low_latency import (DISPATCH_CONSUMED, EXPERTS, LOCAL_EXPERTS, RANK_MAJOR, RANKS, TOPK, WEIGHTED, any_missing, last_first,
                          look_at_consumed, shape_bits, tell_begun)
from .low_latency_boxes import counts_for, words_for
from .low_latency_slots import PLACES
from .low_latency_void import may_be_void, void

GROUPS = LOCAL_GROUPS = 0                       # all groups; those of a rank
CHUNK = 0                                       # tokens whose selections are in shared memory at once
SECTIONS = 1                                    # sections that these are cut into, at most


def existing(expert):
    """An expert, or -1 where there is none of that number."""
    return expert if expert >= 0 and expert < EXPERTS else -1


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
        st4_shared(shared() + 4 * i, existing(expert0))
        st4_shared(shared() + 4 * j, existing(expert1))
        i += 2 * num_threads()


def send_routes(part, parts, watch, me, half, first, selections, selected):
    """Every staged selection's expert and weight, to every rank; `selected` keeps the expert for combine."""
    warp = num_warps() - 1 - warp_rank()                         # the last warps: the first ones number groups
    i = (part + parts * warp) * warp_size() + lane()
    while i < selections:
        expert, token = ld4_shared(shared() + 4 * i), udiv(first + i, TOPK)
        st8(selected + 8 * (first + i), expert)
        route = expert + 1
        if WEIGHTED:
            route |= ld4_shared(shared() + 4 * (CHUNK * TOPK + i)) << 32
        for r in range(RANKS):
            words, stride = words_for(watch, after(me, r + 1), me, half)
            st8_relaxed(words + token * stride + 8 * (first + i - token * TOPK), route)
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


# What a block numbers it deals out to its warps by group and *section* of the staged selections (rank-major: tokens), for it has
# fewer groups than warps.


def section_of(items):
    """How many of so many staged items are in a section: a whole number of what a warp numbers at once."""
    at_once = 4 * warp_size()
    return udiv(items + SECTIONS * at_once - 1, SECTIONS * at_once) * at_once


def of_warp(turn, part, parts, items):
    """What a warp numbers in its `turn`-th turn: the group, and from which staged item to which."""
    first, end = umod(turn, SECTIONS) * section_of(items), (umod(turn, SECTIONS) + 1) * section_of(items)
    return part + udiv(turn, SECTIONS) * parts, first, end if end < items else items


def count_hits(group, first, end):
    """One warp counts what is of a group among staged items."""
    count = 0
    i = first + lane()
    while i - lane() < end:
        count += popc(ballot(is_of_group(group, i, end)))
        i += warp_size()
    return count


def number_hits(hit, words, stride, i, count):
    """One lane's turn: tell the place of the i-th staged item, if it is a hit; `count` with the warp's hits added."""
    hits = ballot(hit)
    if hit != 0:
        token = i if RANK_MAJOR else udiv(i, TOPK)
        k = 0 if RANK_MAJOR else i - token * TOPK
        st8_relaxed(words + token * stride + PLACES + 8 * k, count + lanes_before(hits))
    return count + popc(hits)


def number_group(group, words, stride, first, end, count):
    """One warp numbers what is of a group among staged items, from `count` on; words, stride: see `words_for`, of the first token
    staged."""
    step = warp_size()
    i = first + lane()
    while i - lane() < end:                                      # four at once: their latency is the time of this loop
        hit0, hit1 = is_of_group(group, i, end), is_of_group(group, i + step, end)
        hit2, hit3 = is_of_group(group, i + 2 * step, end), is_of_group(group, i + 3 * step, end)
        count = number_hits(hit0, words, stride, i, count)
        count = number_hits(hit1, words, stride, i + step, count)
        count = number_hits(hit2, words, stride, i + 2 * step, count)
        count = number_hits(hit3, words, stride, i + 3 * step, count)
        i += 4 * step
    return count


def number_staged(part, parts, watch, me, half, first, tokens, last):
    """The block numbers the staged selections, those of `tokens` tokens from `first` on, and after the last ones tells the totals.

    Shared memory, behind the staged selections: for each of this block's groups how many were numbered in all chunks before this
    one, and in those before the next (by turns), then how many each section has.
    """
    so_far = behind_staged()
    of_section = so_far + 16 * groups_of_block(parts)
    now = 8 * (udiv(first, CHUNK) & 1)
    items = tokens if RANK_MAJOR else tokens * TOPK
    turn = warp_rank()
    cut = SECTIONS > 1 and items > section_of(items)             # else all are in the first section
    while cut and turn < groups_of_block(parts) * SECTIONS:
        group, begin_item, end_item = of_warp(turn, part, parts, items)
        count = count_hits(group, begin_item, end_item)
        if lane() == 0:
            st8_shared(of_section + 8 * turn, count)
        turn += num_warps()
    if cut:
        syncthreads()
    turn = warp_rank()
    while turn < groups_of_block(parts) * SECTIONS:
        group, begin_item, end_item = of_warp(turn, part, parts, items)
        if group < GROUPS:
            index, section = udiv(turn, SECTIONS), umod(turn, SECTIONS)
            owner = udiv(group, LOCAL_GROUPS)
            count = ld8_shared(so_far + 16 * index + now) if first > 0 else 0
            for before in range(SECTIONS - 1):
                count += ld8_shared(of_section + 8 * (index * SECTIONS + before)) if cut and before < section else 0
            words, stride = words_for(watch, owner, me, half)
            count = number_group(group, words + first * stride, stride, begin_item, end_item, count)
            if section == (SECTIONS - 1 if cut else 0) and lane() == 0:
                st8_shared(so_far + 16 * index + 8 - now, count)
                if last:
                    tell(counts_for(watch, owner, me) + 8 * (1 + group - owner * LOCAL_GROUPS), watch[2], count)
        turn += num_warps()


def behind_staged():
    """Shared memory behind the staged selections."""
    return shared() + (4 * CHUNK * TOPK * (1 + WEIGHTED) + 7 & -8)


def groups_of_block(parts):
    """How many groups a block numbers, or one more; neighbouring ones are numbered by different blocks."""
    return udiv(GROUPS + parts - 1, parts)


def announce(part, parts, watch, me, half, topk_idx, topk_weights, num_tokens, max_tokens, selected):
    """All that the other ranks must know about this rank's tokens."""
    look = look_at_consumed(watch[0], last_first())
    first = 0
    while first < num_tokens or first == 0:
        tokens = num_tokens - first if num_tokens - first < CHUNK else CHUNK
        stage(topk_idx, topk_weights, first * TOPK, tokens * TOPK)
        if first > 0:
            syncthreads()
        else:
            odd = may_be_void(topk_idx, num_tokens) if part == 0 else 0
            missing = any_missing(watch, DISPATCH_CONSUMED, look, last_first(), num_threads())
            begun = shape_bits(max_tokens) | num_tokens
            if syncthreads_or(missing | odd) != 0:               # as in `begin`; both in one, since the block waits here
                if syncthreads_or(missing) != 0:
                    return
                begun |= void(behind_staged(), watch, topk_idx, num_tokens, max_tokens)
            tell_begun(part, watch, me, begun)
        send_routes(part, parts, watch, me, half, first * TOPK, tokens * TOPK, selected)
        number_staged(part, parts, watch, me, half, first, tokens, first + CHUNK >= num_tokens)
        syncthreads()
        first += CHUNK
