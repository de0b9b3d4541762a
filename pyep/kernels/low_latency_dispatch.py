"""Low-latency dispatch (BF16, expert-major), for any number of ranks, blocks and threads.

A token crosses to a rank once, however many of that rank's experts it selects, into the slot of (source, token); beside it
travel its routes (which experts it selects, to every rank) and places (which row of an expert it gets, to the expert's
rank).  The receiver copies the row to every expert that wants it.  The place of a row follows from counts alone, so the
rows of an expert are ordered by (source rank, source token, k) without sorting.
"""
from ..channels.memory import peer, report, take16, take_word, tell, wait_count
from .lang import (ballot, block_rank, lane, ld16_nc_if, ld16_relaxed_if, ld8_shared, num_blocks, num_threads, popc, present,
                   shared, st16, st16_relaxed, st4, st8, st8_relaxed, st8_shared, syncthreads, thread_rank, udiv, umod,
                   warp_size)
from .low_latency import (BAD_EXPERT, DISPATCH_CONSUMED, DISPATCH_COUNT, DISPATCH_PLACE, DISPATCH_ROUTE, DISPATCH_ROW,
                          EXPERTS, LOCAL_EXPERTS, MAX_TOKENS, NO_ROOM, OTHER_OPERATION, PLACES, RANKS, RECEIVERS, ROW_BYTES,
                          ROWS, SENDERS, TOPK, after, begin, count_slot, end_epoch, expert_at, half_of, lanes_before,
                          num_warps, tell_begun, this_epoch, warp_rank)

# ---- send ------------------------------------------------------------------------------------------------------------

def send_routes(part, parts, watch, me, half, topk_idx, num_tokens, selected):
    """Every selection's expert, to every rank; `selected` keeps it for combine."""
    base, _, _ = watch
    selection = part * num_threads() + thread_rank()
    while selection < num_tokens * TOPK:
        expert = expert_at(topk_idx, selection)
        if expert < -1 or expert >= EXPERTS:
            report(watch, BAD_EXPERT, me, base, udiv(selection, TOPK), expert)
            expert = -1
        st8(selected + 8 * selection, expert)
        slot = half + 8 * (me * MAX_TOKENS * TOPK + selection)
        for i in range(RANKS):
            st8_relaxed(peer(base, after(me, i)) + slot, expert + 1)
        selection += parts * num_threads()


def number_hits(expert, wanted, slot, count):
    """One lane's turn: if its selection is of the wanted expert, tell its number; `count` with the warp's hits added."""
    hits = ballot(1 if expert == wanted else 0)
    if expert == wanted:
        st8_relaxed(slot, count + lanes_before(hits))
    return count + popc(hits)


def expert_before(topk_idx, selection, end):
    """`expert_at`, or -1 from `end` on; without a branch, so that several loads can be under way."""
    inside = selection < end
    expert = expert_at(topk_idx, selection if inside else end - 1)
    return expert if inside else -1


def send_places(part, parts, watch, me, half, topk_idx, num_tokens):
    """Number each expert's selections in (token, k) order and tell its rank; one warp an expert, a lane a selection."""
    base, _, epoch = watch
    expert = part + warp_rank() * parts                          # neighbouring experts to different blocks
    end = num_tokens * TOPK
    step = 8 * warp_size()
    while expert < EXPERTS:
        owner = udiv(expert, LOCAL_EXPERTS)
        memory = peer(base, owner)
        count = 0
        i = lane()
        while i - lane() < end:                                  # four loads at once: their latency is the time of this loop
            e0 = expert_before(topk_idx, i, end)
            e1 = expert_before(topk_idx, i + warp_size(), end)
            e2 = expert_before(topk_idx, i + 2 * warp_size(), end)
            e3 = expert_before(topk_idx, i + 3 * warp_size(), end)
            slot = memory + half + PLACES + 8 * (me * MAX_TOKENS * TOPK + i)
            count = number_hits(e0, expert, slot, count)
            count = number_hits(e1, expert, slot + step, count)
            count = number_hits(e2, expert, slot + 2 * step, count)
            count = number_hits(e3, expert, slot + 3 * step, count)
            i += 4 * warp_size()
        if lane() == 0:
            tell(count_slot(memory, epoch, me) + 8 * (1 + expert - owner * LOCAL_EXPERTS), epoch, count)
        expert += parts * num_warps()


def announce(part, parts, watch, me, half, topk_idx, num_tokens, selected):
    """All that the other ranks must know about this rank's tokens."""
    tell_begun(part, watch, me, num_tokens)
    send_routes(part, parts, watch, me, half, topk_idx, num_tokens, selected)
    send_places(part, parts, watch, me, half, topk_idx, num_tokens)


def selects(topk_idx, token, rank):
    """Whether a token selects an expert of `rank`; the whole warp asks."""
    hits = 0
    first = 0
    while first < TOPK:
        k = first + lane()
        hit = 0
        if k < TOPK:
            expert = expert_at(topk_idx, token * TOPK + k)
            hit = 1 if expert >= 0 and udiv(expert, LOCAL_EXPERTS) == rank else 0
        hits |= ballot(hit)
        first += warp_size()
    return hits != 0


def list_destinations(addresses, watch, me, half, topk_idx, token):
    """One warp lists, from `addresses` on, where a token goes: its slot on every rank that owns an expert it selects."""
    base, _, _ = watch
    count = 0
    first = 0
    while first < RANKS:                                         # a lane for each rank, from the next one on
        rank = after(me, first + lane() + 1) if first + lane() < RANKS else me
        slot = peer(base, rank) + half + ROWS + (me * MAX_TOKENS + token) * ROW_BYTES
        wanted = 0
        i = 0
        while i < warp_size() and first + i < RANKS:
            if selects(topk_idx, token, after(me, first + i + 1)) and i == lane():
                wanted = 1
            i += 1
        wants = ballot(wanted)
        if wanted != 0:
            st8_shared(addresses + 8 * (count + lanes_before(wants)), slot)
        count += popc(wants)
        first += warp_size()
    return count


def store_to_all(slot, offset, value):
    """Store 16 bytes of a row to every address of a list in shared memory (count, then addresses)."""
    end = slot + 8 * ld8_shared(slot)
    while slot < end:
        slot += 8
        st16_relaxed(ld8_shared(slot) + offset, value)


def send_rows(part, parts, watch, me, half, x, topk_idx, num_tokens):
    """Each token to every rank that wants it: a warp lists a token's destinations, then the block sends the warps' tokens.

    A thread loads its next 16 bytes before it stores the last ones, so that no store waits for memory.
    """
    stride = 8 * (1 + RANKS)                                     # per warp in shared memory: count, addresses
    warps, warp = num_warps(), warp_rank()
    end = shared() + warps * stride
    token = part
    while token < num_tokens:
        offset = 16 * thread_rank()
        value = ld16_nc_if(x + token * ROW_BYTES + offset, offset < ROW_BYTES)
        listed = token + warp * parts
        count = 0
        if listed < num_tokens:
            count = list_destinations(shared() + warp * stride + 8, watch, me, half, topk_idx, listed)
        if lane() == 0:
            st8_shared(shared() + warp * stride, count)
        syncthreads()
        slot = shared()
        while token < num_tokens and slot < end:
            at, current, current_offset = slot, present(value), offset
            offset += 16 * num_threads()
            if offset >= ROW_BYTES:
                offset = 16 * thread_rank()
                token += parts
                slot += stride
            value = ld16_nc_if(x + token * ROW_BYTES + offset, token < num_tokens and slot < end and offset < ROW_BYTES)
            if current_offset < ROW_BYTES:
                store_to_all(at, current_offset, current)
        syncthreads()


# ---- receive ---------------------------------------------------------------------------------------------------------

def read_counts(part, watch, recv_count, layout_range, source_tokens):
    """Shared memory from here on: tokens[source], then begin[source][expert], the first row of that source for that expert."""
    base, _, epoch = watch
    words = RANKS * (1 + LOCAL_EXPERTS)
    word = thread_rank()
    while word < words:
        source = word if word < RANKS else udiv(word - RANKS, LOCAL_EXPERTS)
        entry = 0 if word < RANKS else 1 + word - RANKS - source * LOCAL_EXPERTS
        count = wait_count(watch, DISPATCH_COUNT, source, count_slot(base, epoch, source) + 8 * entry)
        if entry == 0 and count > MAX_TOKENS:
            report(watch, OTHER_OPERATION, source, base, 0, count)
            count = 0
        st8_shared(shared() + 8 * word, count)
        if part == 0 and word < RANKS:
            st8(source_tokens + 8 * source, count)
        word += num_threads()
    syncthreads()
    expert = thread_rank()
    while expert < LOCAL_EXPERTS:
        begin_row = 0
        for source in range(RANKS):
            slot = shared() + 8 * (RANKS + source * LOCAL_EXPERTS + expert)
            count = ld8_shared(slot)
            st8_shared(slot, begin_row)
            if part == 0:
                st8(layout_range + 8 * (expert * RANKS + source), (begin_row << 32) | count)
            begin_row += count
        if part == 0:
            st4(recv_count + 4 * expert, begin_row)
        expert += num_threads()
    syncthreads()


def list_rows(addresses, watch, me, half, source, token, recv_x, src_info, row_of):
    """One warp lists where a token goes in recv_x, and notes it: src_info for the caller, row_of for combine."""
    base, _, _ = watch
    count = 0
    first = 0
    while first < TOPK:
        k = first + lane()
        row = -1
        if k < TOPK:
            selection = (source * MAX_TOKENS + token) * TOPK + k
            expert = take_word(watch, DISPATCH_ROUTE, source, base + half + 8 * selection) - 1 - me * LOCAL_EXPERTS
            if 0 <= expert and expert < LOCAL_EXPERTS:
                place = take_word(watch, DISPATCH_PLACE, source, base + half + PLACES + 8 * selection)
                row = ld8_shared(shared() + 8 * (RANKS + source * LOCAL_EXPERTS + expert)) + place
                if row < RANKS * MAX_TOKENS:
                    row += expert * RANKS * MAX_TOKENS
                    st4(src_info + 4 * row, token)
                else:
                    report(watch, NO_ROOM, source, base, token, expert)
                    row = -1
            st8(row_of + 8 * selection, row)
        mine = ballot(1 if row >= 0 else 0)
        if row >= 0:
            st8_shared(addresses + 8 * (count + lanes_before(mine)), recv_x + row * ROW_BYTES)
        count += popc(mine)
        first += warp_size()
    return count


def most_tokens():
    """The most tokens that any source sends, from the counts in shared memory."""
    most = 0
    for source in range(RANKS):
        tokens = ld8_shared(shared() + 8 * source)
        most = tokens if tokens > most else most
    return most


def source_of(unit, me):
    """Units are (token, source) pairs, token by token, nearest source first, as rows arrive: the source of one."""
    return after(me, RANKS - 1 - umod(unit + RANKS - 1, RANKS))


def row_slot(watch, me, half, unit):
    """Where the row of a unit arrives."""
    return watch[0] + half + ROWS + (source_of(unit, me) * MAX_TOKENS + udiv(unit, RANKS)) * ROW_BYTES


def copy_to_all(slot, offset, value):
    """Store 16 bytes to every address of a list in shared memory, all of them in own memory."""
    end = slot + 8 * ld8_shared(slot)
    while slot < end:
        slot += 8
        st16(ld8_shared(slot) + offset, value)


def receive_rows(part, parts, watch, me, half, recv_x, src_info, row_of):
    """Rows in the order in which they arrive.  A warp lists where a row goes, then the block copies the warps' rows.

    A thread has a first look at its next 16 bytes before it stores the last ones.
    """
    lists = shared() + 8 * RANKS * (1 + LOCAL_EXPERTS)
    stride = 8 * (1 + TOPK)                                      # per warp: count, addresses
    warps, warp = num_warps(), warp_rank()
    end = lists + warps * stride
    units = most_tokens() * RANKS
    unit = part
    while unit < units:
        listed = unit + warp * parts
        count = 0
        if listed < units:
            token, source = udiv(listed, RANKS), source_of(listed, me)
            if token < ld8_shared(shared() + 8 * source):
                count = list_rows(lists + warp * stride + 8, watch, me, half, source, token, recv_x, src_info, row_of)
        if lane() == 0:
            st8_shared(lists + warp * stride, count)
        syncthreads()
        slot, offset = lists, 16 * thread_rank()
        row = row_slot(watch, me, half, unit)
        look = ld16_relaxed_if(row + offset, offset < ROW_BYTES and ld8_shared(slot) > 0)
        while unit < units and slot < end:
            current, current_slot, current_unit, address, current_offset = look, slot, unit, row + offset, offset
            offset += 16 * num_threads()
            if offset >= ROW_BYTES:
                offset = 16 * thread_rank()
                unit += parts
                slot += stride
                row = row_slot(watch, me, half, unit)
            if unit < units and slot < end:
                look = ld16_relaxed_if(row + offset, offset < ROW_BYTES and ld8_shared(slot) > 0)
            if current_offset < ROW_BYTES and ld8_shared(current_slot) > 0:
                value = take16(current, watch, DISPATCH_ROW, source_of(current_unit, me), address)
                copy_to_all(current_slot, current_offset, value)
        syncthreads()


# ---- the kernel ------------------------------------------------------------------------------------------------------

def dispatch(base, me, half_bytes, timeout, lag, x, topk_idx, num_tokens, recv_x, recv_count, src_info, layout_range, row_of,
             source_tokens, selected):
    """The kernel.  Arrays as in `Buffer.low_latency_dispatch`, and for combine: row_of [R, M, K] int64, the row of recv_x (over
    all local experts) that a source's selection got, or -1; source_tokens [R] int64, how many tokens each source sent;
    selected [M, K] int64, the experts of this rank's own selections, or -1."""
    epoch = this_epoch(base, lag)
    watch = (base, timeout, epoch)
    half = half_of(epoch, half_bytes)
    sender, receiver = block_rank(), block_rank() - num_blocks() + RECEIVERS
    if SENDERS > 0:
        free = begin(watch, DISPATCH_CONSUMED, me, lag)
        announcer, announcers = sender, SENDERS
        if RECEIVERS > 0:                                        # they have nothing to do yet
            announcer, announcers = receiver, RECEIVERS
        if free != 0 and announcer >= 0:
            announce(announcer, announcers, watch, me, half, topk_idx, num_tokens, selected)
        if free != 0 and sender < SENDERS:
            send_rows(sender, SENDERS, watch, me, half, x, topk_idx, num_tokens)
    if RECEIVERS > 0:
        if receiver >= 0:
            read_counts(receiver, watch, recv_count, layout_range, source_tokens)
            receive_rows(receiver, RECEIVERS, watch, me, half, recv_x, src_info, row_of)
    end_epoch(base, epoch)
