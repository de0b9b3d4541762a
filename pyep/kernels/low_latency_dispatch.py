"""Low-latency dispatch, the rows (BF16 or FP8, expert-major or rank-major), for any number of ranks, blocks and threads.

A token crosses to a rank once, however many of that rank's experts it selects, into the slot of (source, token).  What its
rank must know to deliver it travels beside it, see `low_latency_announce`.  The receiver copies the row to every expert that
wants it, or in the rank-major layout to the one place that it gets.
"""
from ..channels.memory import peer, take4, take16
from .basics import after, lanes_before, num_warps, warp_rank
from .lang import (absence, ballot, lane, ld4_relaxed_if, ld8_shared, ld16, ld16_nc_if, ld16_relaxed_if, popc, reserved,
                   shared, st1, st4, st4_relaxed, st8_shared, st16, st16_relaxed, syncthreads, syncwarp, thread_rank, to_e4m3,
                   udiv, umod, warp_size)
from .low_latency import (DATA_BYTES, DISPATCH_CONSUMED, DISPATCH_PROXY, DISPATCH_ROW, FP8, INDEX_BYTES, RANK_MAJOR, RANKS,
                          RECEIVERS, ROW_BYTES, SENDERS, TOPK, UE8M0, begin, end_epoch, enter, last_first, look_at_consumed,
                          selections, selects)
from .low_latency_announce import LOCAL_GROUPS, announce
from .low_latency_boxes import CLAIMS, PORTS, WORD_BYTES, claim_row
from .low_latency_escapes import store_escaped, wait_escaped
from .low_latency_listing import (add_up_counts, clear_tails, clear_words, count_list, list_selections, list_token, measure_waits,
                                  place_selections, place_token, read_counts, wait_for_tokens)
from .low_latency_ship import ship
from .low_latency_slots import row_at
from .low_latency_unpack import unpack_dispatch
from .op import rare
from .quantize import PIECES, block_amax, factor_of, first_piece, lanes_per_block, load_piece, scale_of, span

CUTS = 1                                        # parts that the senders cut a row into
CUT_BYTES = 0                                   # of one of them
TEAMS = 1                                       # of a block's warps
TEAM_THREADS = 0                                # of each
TAKEN_CUTS = TAKING_TEAMS = 1                   # the same for receivers
TAKEN_CUT_BYTES = TAKING_THREADS = 0

# ---- send ------------------------------------------------------------------------------------------------------------


def reads_own_x():
    """Whether the receivers take this rank's own rows from x: they can while the same launch sends, unless it converts them."""
    return SENDERS > 0 and RECEIVERS > 0 and not FP8


def row_for(watch, rank, memory, me, half, topk_idx, token, num_tokens):
    """Where the row of a token goes for a rank that owns an expert it selects, as if halves began at 0.  memory: the rank's.  Of a
    packet, the address and PACKET."""
    if PORTS and memory == 0:
        served = selections(topk_idx, INDEX_BYTES, token, rank)
        return claim_row(watch, rank, row_at(0, me, token), token, num_tokens, served) - half + PACKET
    return row_at(memory, me, token)


def list_destinations(addresses, watch, me, half, topk_idx, token, num_tokens):
    """One warp lists where a token goes, the next rank first: its slot (in a half) on every rank that owns an expert it selects.
    Returns how many.  A lane for each rank, whose address it loads before it knows whether the token goes there.

    With port peers it must be called once for each token, after `begin`, since it writes headers of packets.
    """
    count = 0
    ranks = RANKS - 1 if reads_own_x() else RANKS
    first = 0
    while first < ranks:
        i = first + lane()
        rank = after(me, i + 1 if i < ranks else 0)
        memory = peer(watch[0], rank)
        hit = selects(topk_idx, INDEX_BYTES, token, rank) if i < ranks else 0
        hits = ballot(hit)
        if hit != 0:
            row = row_for(watch, rank, memory, me, half, topk_idx, token, num_tokens)
            st8_shared(addresses + 8 * (count + lanes_before(hits)), row)
        count += popc(hits)
        first += warp_size()
    return count


PACKET = 1                                      # in a list, added to the address of a row in a packet


def address_in(entry):
    """The address of a row, of the entry of a list."""
    return ld8_shared(entry) & ~PACKET if PORTS else ld8_shared(entry)


def store_to_all(slot, offset, value):
    """Store 16 bytes at `offset` from every address of a list in shared memory (count, then addresses)."""
    end = slot + 8 * ld8_shared(slot)
    while slot < end:
        slot += 8
        st16_relaxed(address_in(slot) + offset, value)


@rare
def store_escaped_to_all(slot, half, offset, source):
    """Store 16 bytes that have reserved words, from the address `source`; half: the offset of the half."""
    end = slot + 8 * ld8_shared(slot)
    while slot < end:
        slot += 8
        if PORTS and ld8_shared(slot) & PACKET:
            st16_relaxed(address_in(slot) + half + offset, ld16(source))
        else:
            store_escaped(address_in(slot) + half, offset, source)


def store_word_to_all(slot, offset, value):
    """Store 4 bytes."""
    end = slot + 8 * ld8_shared(slot)
    while slot < end:
        slot += 8
        st4_relaxed(address_in(slot) + offset, value)


def send_fp8(slot, half, row, offset, low, high):
    """Quantize blocks (a few lanes each) and send them, then their scales; the whole warp calls.  low, high: this lane's first
    piece, at `offset`."""
    amax = block_amax(row, offset, low, high)
    scale = scale_of(amax)
    factor = factor_of(amax, scale)
    if offset < DATA_BYTES:
        store_to_all(slot, half + offset, to_e4m3(low, high, factor))
        for i in range(1, udiv(PIECES, lanes_per_block())):
            at = offset + 16 * i * lanes_per_block()
            low, high = load_piece(row, at, 1)
            store_to_all(slot, half + at, to_e4m3(low, high, factor))
        if umod(lane(), lanes_per_block()) == 0:
            store_word_to_all(slot, half + scale_offset(offset), scale)


# Rows are sent in *cuts*, CUTS to a row, numbered through.  The block's warps form *teams*, which take cuts in turn: so all blocks
# end together, though tokens have more and less to send.


def in_team(teams, threads):
    """(This thread's team, its rank in it), where there are so many teams of so many threads."""
    return (udiv(thread_rank(), threads), umod(thread_rank(), threads)) if teams > 1 else (0, thread_rank())


def team_bytes():
    """What a team moves at a time; CUT_BYTES is a multiple of it."""
    return span(TEAM_THREADS) if FP8 else 16 * TEAM_THREADS


def row_of_cut(x, cut):
    """The row of x that a cut is part of."""
    return x + udiv(cut, CUTS) * ROW_BYTES


def offset_in_row(cut, done):
    """Where in that row (counted in the bytes that travel) a thread is once its team has done so many bytes of the cut."""
    _, rank = in_team(TEAMS, TEAM_THREADS)
    return umod(cut, CUTS) * CUT_BYTES + done + (first_piece(rank) if FP8 else 16 * rank)


def look_at(x, cut, done, num_tokens):
    """What a thread sends of a cut at a time."""
    offset = offset_in_row(cut, done)
    wanted = cut < num_tokens * CUTS and offset < DATA_BYTES
    if FP8:
        return load_piece(row_of_cut(x, cut), offset, wanted)
    value = ld16_nc_if(row_of_cut(x, cut) + offset, wanted)
    return value, value


def send_rows(part, parts, watch, me, half, x, topk_idx, num_tokens):
    """Each token to every rank that wants it: a warp lists the destinations of a cut's token, then the teams send the warps'
    cuts.  A thread loads what it sends next before it stores the last, so that no store waits for memory."""
    stride = 8 * (1 + RANKS)                                     # per warp in shared memory: count, addresses
    warps, warp, (team, _) = num_warps(), warp_rank(), in_team(TEAMS, TEAM_THREADS)
    end = shared() + warps * stride
    cuts = num_tokens * CUTS
    first, cut, done = part, part + team * parts, 0
    look = look_at_consumed(watch[0], last_first())
    if PORTS and begin(watch, DISPATCH_CONSUMED, look) == 0:
        return
    low, high = look_at(x, cut, done, num_tokens)
    while first < cuts or first == part:
        listed = first + warp * parts
        count = 0
        if listed < cuts:
            count = list_destinations(shared() + warp * stride + 8, watch, me, half, topk_idx, udiv(listed, CUTS), num_tokens)
        if lane() == 0:
            st8_shared(shared() + warp * stride, count)
        if PORTS or first > part:
            syncthreads()
        elif begin(watch, DISPATCH_CONSUMED, look) == 0:
            return
        slot = shared() + team * stride
        while cut < cuts and slot < end:
            at, offset, row, first_half, second_half = slot, offset_in_row(cut, done), row_of_cut(x, cut), low, high
            done += team_bytes()
            if done >= CUT_BYTES:
                done = 0
                cut += TEAMS * parts
                slot += TEAMS * stride
            low, high = look_at(x, cut, done, num_tokens)
            if FP8:
                send_fp8(at, half, row, offset, first_half, second_half)
            elif offset < DATA_BYTES and reserved(first_half) != 0:
                store_escaped_to_all(at, half, offset, row + offset)
            elif offset < DATA_BYTES:
                store_to_all(at, half + offset, first_half)
        syncthreads()
        first += parts * warps


# ---- receive ---------------------------------------------------------------------------------------------------------
# A unit is a (source, token) pair.  They are numbered token by token, nearest source first, as rows arrive.

def unit_of(cut, me):
    """The unit that a cut is part of: (source, token)."""
    unit = udiv(cut, TAKEN_CUTS)
    return after(me, RANKS - 1 - umod(unit + RANKS - 1, RANKS)), udiv(unit, RANKS)


def row_slot(watch, me, half, x, cut):
    """Where the row of a cut arrives."""
    source, token = unit_of(cut, me)
    if reads_own_x() and source == me:
        return x + token * ROW_BYTES
    return row_at(watch[0] + half, source, token)


def offset_in_wire_row(cut, done):
    """Where in that row a thread is once its team has done so many bytes of the cut."""
    _, rank = in_team(TAKING_TEAMS, TAKING_THREADS)
    return umod(cut, TAKEN_CUTS) * TAKEN_CUT_BYTES + done + 16 * rank


def take_row(look, watch, me, source, row, offset):
    """Wait for 16 bytes of a row of `source` and take them; `look`: what a first look at them has shown."""
    if reads_own_x() and source == me:
        return look
    if FP8:
        return take16(look, watch, DISPATCH_ROW, source, row + offset)
    if reserved(look) != 0:
        look = wait_escaped(watch, source, row, offset)
    st16(row + offset, absence())
    return look


def has_scale(offset):
    """Whether a thread that has the bytes of a row from `offset` on sees to a scale: that of the block of values they begin."""
    return FP8 and offset & 127 == 0 and offset < DATA_BYTES


def scale_offset(offset):
    """Where in the row that scale travels: 4 bytes for every 128."""
    return DATA_BYTES + udiv(offset, 32)


def look_at_row(row, offset, wanted):
    """First looks at 16 bytes of a row, and at the scale that this thread sees to, if they are wanted."""
    scale = ld4_relaxed_if(row + scale_offset(offset), wanted and has_scale(offset))        # first: else it may wait for a store
    return ld16_relaxed_if(row + offset, wanted and offset < DATA_BYTES), scale


def deliver(slot, offset, value, recv_x):
    """Store 16 bytes of a row to every row of recv_x in a list (count, then group << 32 | row)."""
    end = slot + 8 * ld8_shared(slot)
    while slot < end:
        slot += 8
        st16(recv_x + (ld8_shared(slot) & 0xFFFFFFFF) * DATA_BYTES + offset, value)


def deliver_scale(slot, offset, scale, max_tokens, scales):
    """Store the scale of the values at `offset` beside every row in a list: each scale of a row is in a column of its own, four
    exponents share one."""
    rows = max_tokens if RANK_MAJOR else RANKS * max_tokens      # of a group
    block, blocks = udiv(offset, 128), udiv(DATA_BYTES, 128)
    end = slot + 8 * ld8_shared(slot)
    while slot < end:
        slot += 8
        row, group = ld8_shared(slot) & 0xFFFFFFFF, ld8_shared(slot) >> 32
        if UE8M0:
            column = group * udiv(blocks, 4) + udiv(block, 4)
            st1(scales + 4 * (column * rows + row - group * rows) + umod(block, 4), scale >> 23)
        else:
            st4(scales + 4 * ((group * blocks + block) * rows + row - group * rows), scale)


def list_cut(entries, watch, me, half, cut, cuts, max_tokens, row_of, weight_of, recv_stats):
    """A warp lists the unit of a cut, first step: (source, token, how many rows it gets here or -1 if there is no such token)."""
    source, token = unit_of(cut, me)
    keeps = umod(cut, TAKEN_CUTS) == 0
    count = -1
    if cut < cuts:
        tokens, route, place = wait_for_tokens(watch, half, source, token, max_tokens)
        is_there = ballot(1 if token >= tokens else 0) == 0      # for all lanes: one may have given up as the count came
        if is_there and RANK_MAJOR:
            count = list_token(entries, watch, me, half, source, token, route, place, keeps, row_of, recv_stats)
        elif is_there:
            count = list_selections(entries, watch, me, half, source, token, route, place, keeps, row_of, weight_of)
    return source, token, count


def place_cut(entries, count, me, cut, max_tokens, src_info, row_of, recv_topk_idx, recv_topk_weights):
    """Second step: its rows, and before the entries their count."""
    source, token = unit_of(cut, me)
    keeps = umod(cut, TAKEN_CUTS) == 0
    if lane() == 0:
        st8_shared(entries - 8, count if count > 0 else 0)
    syncwarp()
    if RANK_MAJOR and count > 0:
        place_token(entries, source, token, max_tokens, keeps, src_info, row_of, recv_topk_idx, recv_topk_weights)
    elif count > 0:
        place_selections(entries, count, source, token, max_tokens, keeps, src_info, row_of)


def exists(cut, cuts, me):
    """Whether there is a token that a cut is part of, once all counts are read."""
    source, token = unit_of(cut, me)
    return cut < cuts and token < ld8_shared(shared() + 8 * source)


def receive_rows(part, parts, watch, me, half, x, max_tokens, recv_x, scales, recv_count, src_info, layout_range, row_of, sent,
                 weight_of, recv_topk_idx, recv_stats):
    """Rows in the order in which they arrive, cut as for the senders: one delivers a row to many places no faster than its
    multiprocessor can store.  A warp lists where a cut goes, then the teams copy the warps' cuts.

    A thread has a first look at its next 16 bytes before it stores the last ones.
    """
    lists = shared() + 8 * RANKS * (1 + LOCAL_GROUPS)
    stride = 8 * (2 + TOPK)                                      # per warp: count, entries, place
    warps, warp, (team, _) = num_warps(), warp_rank(), in_team(TAKING_TEAMS, TAKING_THREADS)
    entries, end = lists + warp * stride + 8, lists + warps * stride
    cuts = max_tokens * RANKS * TAKEN_CUTS
    first = part
    while first < cuts:
        listed = first + warp * parts
        source, token, count = list_cut(entries, watch, me, half, listed, cuts, max_tokens, row_of, weight_of, recv_stats)
        before = count_list(watch, half, source, token) if count >= 0 else TAKEN_CUTS
        if TAKEN_CUTS == 1:
            clear_words(watch, half, source, token, before)
        if first == part:
            cuts = read_counts(part, watch, max_tokens, sent) * RANKS * TAKEN_CUTS
        slot, cut, done = lists + team * stride, first + team * parts, 0
        row, offset = row_slot(watch, me, half, x, cut), offset_in_wire_row(cut, done)
        # A first look before it is known whether the row comes here: what does has come about when the counts have.
        look, scale_look = look_at_row(row, offset, exists(cut, cuts, me))
        if first == part:
            add_up_counts(part, max_tokens, recv_count, layout_range, sent, recv_stats)
            if RANK_MAJOR:
                clear_tails(part, parts, max_tokens, recv_topk_idx, weight_of)
        place_cut(entries, count, me, listed, max_tokens, src_info, row_of, recv_topk_idx, weight_of)
        syncthreads()
        if TAKEN_CUTS > 1:                                       # only here, by when `before` has come
            clear_words(watch, half, source, token, before)
        while cut < cuts and slot < end:
            at, at_cut, at_row, at_offset, value, scale = slot, cut, row, offset, look, scale_look
            done += 16 * TAKING_THREADS
            if done >= TAKEN_CUT_BYTES:
                done = 0
                cut += TAKING_TEAMS * parts
                slot += TAKING_TEAMS * stride
            if cut < cuts and slot < end:
                row, offset = row_slot(watch, me, half, x, cut), offset_in_wire_row(cut, done)
                look, scale_look = look_at_row(row, offset, ld8_shared(slot) > 0)
            if at_offset < DATA_BYTES and ld8_shared(at) > 0:
                sender, _ = unit_of(at_cut, me)
                deliver(at, at_offset, take_row(value, watch, me, sender, at_row, at_offset), recv_x)
                if has_scale(at_offset):
                    scale = take4(scale, watch, DISPATCH_ROW, sender, at_row + scale_offset(at_offset))
                    deliver_scale(at, at_offset, scale, max_tokens, scales)
        syncthreads()
        first += parts * warps


# ---- the kernel ------------------------------------------------------------------------------------------------------

def dispatch(base, me, half_bytes, timeout, lag, max_tokens, x, topk_idx, topk_weights, num_tokens, recv_stats, wait_stats,
             recv_x, scales, recv_count, src_info, layout_range, recv_topk_idx, weight_of, row_of, sent, packet_of, selected):
    """The kernel.  Arrays as in `Buffer.low_latency_dispatch` (0 where there is none), and for combine:

    row_of         [M, R, K] int64: the row of recv_x (over all local experts) that a selection of a source's token got, or -1; in
                   the rank-major layout [M, R], that of a source's token
    weight_of      [M, R, K] fp32: the weight of that selection, where row_of has a row; in the rank-major layout [R, M, K], the
                   caller's recv_topk_weights
    sent           [R] int64: how many tokens each source has; in the rank-major layout, how many came here
    packet_of      [1 + M, R] int64, of sources that are port peers, unless rank-major: how many packets the box has that combine
                   sends back; and the index there of the first packet for a source's token
    selected       [M, K] int64: the experts of this rank's own selections, or -1
    """
    watch, half, sender, receiver = enter(base, me, lag, half_bytes, timeout, DISPATCH_PROXY)
    if SENDERS > 0:
        announcer, announcers = sender, SENDERS
        if RECEIVERS > 0:                                        # they have nothing to do yet
            announcer, announcers = receiver, RECEIVERS
        if announcer >= 0:
            announce(announcer, announcers, watch, me, half, topk_idx, topk_weights, num_tokens, max_tokens,
                     selected)
        if sender < SENDERS:
            send_rows(sender, SENDERS, watch, me, half, x, topk_idx, num_tokens)
        if PORTS:
            ship(watch, DISPATCH_PROXY, me, lag, base + CLAIMS, num_tokens * WORD_BYTES)
    if RECEIVERS > 0:
        if receiver >= 0:
            measure_waits(receiver, watch, max_tokens, wait_stats)
            if PORTS:
                unpack_dispatch(receiver, RECEIVERS, watch, me, half, max_tokens, packet_of, wait_stats)
            receive_rows(receiver, RECEIVERS, watch, me, half, x, max_tokens, recv_x, scales, recv_count, src_info, layout_range,
                         row_of, sent, weight_of, recv_topk_idx, recv_stats)
    end_epoch(base, watch[2])
