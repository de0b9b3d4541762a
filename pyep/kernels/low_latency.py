"""Low-latency dispatch and combine (BF16, expert-major), for any number of ranks, blocks and threads.

Dispatch.  A token crosses to a rank once, however many of that rank's experts it selects, into the slot of (source, token);
beside it travel its routes (which experts it selects, to every rank) and places (which row of an expert it gets, to the
expert's rank).  The receiver copies the row to every expert that wants it.  The place of a row follows from counts alone,
so the rows of an expert are ordered by (source rank, source token, k) without sorting.

Combine.  An expert's rank sends the output for (token, k) to the token's rank, which sums them in k order.

Nobody waits for an answer.  A sender only makes sure that its peers are done with what it sent two operations ago
(`consumed`), a receiver waits for data that announces itself.  Each operation signals every rank, also those it has no data
for: to have finished operation n is to know that every rank has begun it, hence finished n - 1.

Roles.  Of a grid's blocks the first SENDERS send and the last RECEIVERS receive; they may overlap (one block plays both
roles, one after the other) and one of them may be 0 (the operation then comes in two launches, see `lag`).
"""
from ..channels.memory import next_epoch, peer, previous_epoch, report, take16, take_word, tell, wait_count, wait_epoch
from .lang import (ballot, block_rank, f32_of, fma8, lane, ld4_nc, ld8, ld8_nc, ld8_relaxed, ld8_shared, ld16_nc, ld16_nc_if,
                   ld16_relaxed, ld16_relaxed_if, num_blocks, num_threads, popc, present, shared, st4, st8, st8_relaxed,
                   st8_release, st8_shared, st16, st16_relaxed, syncthreads, syncthreads_or, thread_rank, to_bf16, udiv, umod,
                   warp_size, zeros)

# Template parameters, compiled in by `bind`.  The shape: see pyep.layout.LowLatency.
RANKS = EXPERTS = LOCAL_EXPERTS = MAX_TOKENS = TOPK = ROW_BYTES = 0
INDEX_BYTES = 8                                 # of an entry of topk_idx: 4 or 8
SENDERS = RECEIVERS = 1                         # blocks of the grid that send, that receive
EPOCH = CONSUMED = FAILED = COUNTS = COUNTS_STRIDE = CONTROL_BYTES = MAX_BLOCKS = 0      # offsets in control memory, see pyep.layout
PLACES = ROWS = 0                               # offsets in a half, see pyep.layout.LowLatency.dispatch

NOT_ADDED = -(1 << 63)                          # the sign bit: see list_outputs
COMBINE = 1 << 31                               # in the word that tells that an operation has begun: it is a combine

# What a wait waits for; pyep.low_latency puts them in words.
(DISPATCH_CONSUMED, DISPATCH_COUNT, DISPATCH_ROUTE, DISPATCH_PLACE, DISPATCH_ROW, COMBINE_CONSUMED, COMBINE_BEGUN, COMBINE_OUTPUT,
 BAD_EXPERT, NO_ROOM, OTHER_OPERATION) = range(1, 12)


# ---- what both operations begin and end with -------------------------------------------------------------------------

def this_epoch(base, lag):
    """The epoch of this launch's operation: a new one if it sends, else the one sent `lag` operations before the latest."""
    epoch = ld8(base + EPOCH + 8 * block_rank())
    if SENDERS > 0:
        return next_epoch(epoch)
    return previous_epoch(epoch) if lag > 0 else epoch


def end_epoch(base, epoch):
    """Leave the epoch for the next launch, whatever its grid: block b alone reads copy b and alone writes b, b + blocks, ..."""
    syncthreads()
    if SENDERS > 0:
        block = block_rank() + num_blocks() * thread_rank()
        while block < MAX_BLOCKS:
            st8(base + EPOCH + 8 * block, epoch)
            block += num_blocks() * num_threads()


def half_of(epoch, half_bytes):
    """Offset of the half that an operation uses."""
    return CONTROL_BYTES + (epoch & 1) * half_bytes


def count_slot(memory, epoch, source):
    """The first of `source`'s counters in a rank's memory."""
    return memory + COUNTS + ((epoch & 1) * RANKS + source) * COUNTS_STRIDE


def begin(watch, wait, me, lag):
    """Tell every rank what is consumed here, and wait until all ranks have consumed what this operation overwrites.

    `lag`: operations sent before this one and not yet received (their hooks are still to be called): 0 or 1.
    Returns 1, or 0 if a rank has not: then nothing may be sent.  The block meets here.
    """
    base, _, epoch = watch
    before = previous_epoch(epoch)
    rank = thread_rank()
    while rank < RANKS and block_rank() == num_blocks() - 1:     # the last block: the first ones have rows to send
        st8_release(peer(base, rank) + CONSUMED + 128 * me, previous_epoch(before) if lag > 0 else before)
        rank += num_threads()
    missing = 0
    rank = num_threads() - 1 - thread_rank()                     # the last warp: the first ones have lists to make
    while rank < RANKS:
        missing |= ld8_relaxed(base + FAILED)                    # an operation before this one failed: send nothing more
        missing |= 1 - wait_epoch(watch, wait, rank, base + CONSUMED + 128 * rank, previous_epoch(before))
        rank += num_threads()
    return 1 - syncthreads_or(missing)


def tell_begun(part, watch, me, what):
    """Tell every rank that this operation has begun here; `what`: COMBINE, or how many tokens a dispatch sends."""
    base, _, epoch = watch
    rank = thread_rank()
    while rank < RANKS and part == 0:
        tell(count_slot(peer(base, rank), epoch, me), epoch, what)
        rank += num_threads()


def after(me, i):
    """The i-th rank after `me`: all ranks start their rounds at different peers."""
    rank = me + i
    return rank - RANKS if rank >= RANKS else rank


# ---- dispatch: send --------------------------------------------------------------------------------------------------

def expert_at(topk_idx, selection):
    """The expert that a selection names; negative where it selects nothing."""
    return ld8_nc(topk_idx + 8 * selection) if INDEX_BYTES == 8 else ld4_nc(topk_idx + 4 * selection)


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
        for i in range(RANKS):
            st8_relaxed(peer(base, after(me, i)) + half + 8 * (me * MAX_TOKENS * TOPK + selection), expert + 1 if expert >= 0 else 0)
        selection += parts * num_threads()


def number_hits(expert, wanted, slot, count):
    """One lane's turn: if its selection is of the wanted expert, tell its number; `count` with the warp's hits added."""
    hits = ballot(1 if expert == wanted else 0)
    if expert == wanted:
        st8_relaxed(slot, count + popc(hits & ((1 << lane()) - 1)))
    return count + popc(hits)


def expert_before(topk_idx, selection, end):
    """`expert_at`, or -1 from `end` on; without a branch, so that several loads can be under way."""
    inside = selection < end
    expert = expert_at(topk_idx, selection if inside else end - 1)
    return expert if inside else -1


def send_places(part, parts, watch, me, half, topk_idx, num_tokens):
    """Number each expert's selections in (token, k) order and tell its rank; one warp an expert, a lane a selection."""
    base, _, epoch = watch
    warps = udiv(num_threads(), warp_size())
    expert = part + udiv(thread_rank(), warp_size()) * parts     # neighbouring experts to different blocks
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
        expert += parts * warps


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
            st8_shared(addresses + 8 * (count + popc(wants & ((1 << lane()) - 1))), slot)
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
    warps = udiv(num_threads(), warp_size())
    warp = udiv(thread_rank(), warp_size())
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


# ---- dispatch: receive -----------------------------------------------------------------------------------------------

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
            st8_shared(addresses + 8 * (count + popc(mine & ((1 << lane()) - 1))), recv_x + row * ROW_BYTES)
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
    warps = udiv(num_threads(), warp_size())
    warp = udiv(thread_rank(), warp_size())
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


# ---- combine ---------------------------------------------------------------------------------------------------------

def send_outputs(part, parts, watch, me, half, y, row_of, source_tokens):
    """The output of every row this rank received, back to the slot of its (token, k) on the token's rank."""
    base, _, _ = watch
    unit = part
    while unit < MAX_TOKENS * RANKS:
        token = udiv(unit, RANKS)
        source = after(me, umod(unit, RANKS) + 1)
        if token < ld8(source_tokens + 8 * source):
            for k in range(TOPK):
                row = ld8_nc(row_of + 8 * ((source * MAX_TOKENS + token) * TOPK + k))
                if row >= 0:
                    slot = peer(base, source) + half + (token * TOPK + k) * ROW_BYTES
                    offset = 16 * thread_rank()
                    while offset < ROW_BYTES:
                        st16_relaxed(slot + offset, present(ld16_nc(y + row * ROW_BYTES + offset)))
                        offset += 16 * num_threads()
        unit += parts


def list_outputs(entries, half_start, topk_idx, topk_weights, selected, token):
    """One warp lists what a token is the sum of, in k order, two words each: the slot; source rank << 32 | weight.

    `selected` says what will come.  Where the caller's topk_idx has become -1 meanwhile, the second word is negative: the
    output is taken out of its slot, but not added.
    """
    count = 0
    first = 0
    while first < TOPK:
        k = first + lane()
        selection = token * TOPK + k
        expert = ld8_nc(selected + 8 * selection) if k < TOPK else -1
        hits = ballot(1 if expert >= 0 else 0)
        if expert >= 0:
            entry = entries + 16 * (count + popc(hits & ((1 << lane()) - 1)))
            word = udiv(expert, LOCAL_EXPERTS) << 32 | ld4_nc(topk_weights + 4 * selection) & 0xFFFFFFFF
            st8_shared(entry, half_start + selection * ROW_BYTES)
            st8_shared(entry + 8, word if expert_at(topk_idx, selection) >= 0 else word | NOT_ADDED)
        count += popc(hits)
        first += warp_size()
    return count


def add_output(total, look, watch, entry, offset):
    """Add one listed output to the sum, once it is there; `look`: what a first look at it has shown."""
    word = ld8_shared(entry + 8)
    value = take16(look, watch, COMBINE_OUTPUT, (word & ~NOT_ADDED) >> 32, ld8_shared(entry) + offset)
    return fma8(value, f32_of(word), total) if word >= 0 else total


def sum_listed(entries, count, watch, offset):
    """Sum 16 bytes of all listed outputs, in order.  Four first looks are under way at once: one after another, their trips to
    memory would add up."""
    total = zeros()
    i = 0
    while i < count:
        entry = entries + 16 * i
        look0 = ld16_relaxed(ld8_shared(entry) + offset)
        look1 = ld16_relaxed_if(ld8_shared(entry + 16) + offset, i + 1 < count)
        look2 = ld16_relaxed_if(ld8_shared(entry + 32) + offset, i + 2 < count)
        look3 = ld16_relaxed_if(ld8_shared(entry + 48) + offset, i + 3 < count)
        total = add_output(total, look0, watch, entry, offset)
        if i + 1 < count:
            total = add_output(total, look1, watch, entry + 16, offset)
        if i + 2 < count:
            total = add_output(total, look2, watch, entry + 32, offset)
        if i + 3 < count:
            total = add_output(total, look3, watch, entry + 48, offset)
        i += 4
    return total


def sum_outputs(part, parts, watch, half, topk_idx, topk_weights, selected, num_tokens, out):
    """out[t] = bf16(sum over k, in order, of weight * output), in fp32 fma.  A warp lists a token's outputs, then the block
    sums the warps' tokens."""
    base, _, _ = watch
    stride = 8 + 16 * align4(TOPK)                               # per warp: count, entries; looks may run past the last one
    warps = udiv(num_threads(), warp_size())
    warp = udiv(thread_rank(), warp_size())
    first = part
    while first < num_tokens:
        token = first + warp * parts
        count = 0
        if token < num_tokens:
            count = list_outputs(shared() + warp * stride + 8, base + half, topk_idx, topk_weights, selected, token)
        if lane() == 0:
            st8_shared(shared() + warp * stride, count)
        syncthreads()
        slot = shared()
        while first < num_tokens and slot < shared() + warps * stride:
            count = ld8_shared(slot)
            offset = 16 * thread_rank()
            while offset < ROW_BYTES:
                st16(out + first * ROW_BYTES + offset, to_bf16(sum_listed(slot + 8, count, watch, offset)))
                offset += 16 * num_threads()
            slot += stride
            first += parts
        syncthreads()


def align4(n):
    return (n + 3) & -4


def wait_for_all(part, watch):
    """One block makes sure that every rank has begun this operation, also those that have nothing for this rank."""
    base, _, epoch = watch
    rank = thread_rank()
    while rank < RANKS and part == 0:
        begun = wait_count(watch, COMBINE_BEGUN, rank, count_slot(base, epoch, rank))
        if begun != COMBINE:
            report(watch, OTHER_OPERATION, rank, base, COMBINE, begun)
        rank += num_threads()


def combine(base, me, half_bytes, timeout, lag, y, topk_idx, topk_weights, num_tokens, row_of, source_tokens, selected,
            out):
    """The kernel.  y [L, R*M, H] bf16; row_of, source_tokens and selected as `dispatch` left them; out [T, H] bf16."""
    epoch = this_epoch(base, lag)
    watch = (base, timeout, epoch)
    half = half_of(epoch, half_bytes)
    sender, receiver = block_rank(), block_rank() - num_blocks() + RECEIVERS
    if SENDERS > 0:
        if begin(watch, COMBINE_CONSUMED, me, lag) != 0 and sender < SENDERS:
            tell_begun(sender, watch, me, COMBINE)
            send_outputs(sender, SENDERS, watch, me, half, y, row_of, source_tokens)
    if RECEIVERS > 0:
        if receiver >= 0:
            wait_for_all(receiver, watch)
            sum_outputs(receiver, RECEIVERS, watch, half, topk_idx, topk_weights, selected, num_tokens, out)
    end_epoch(base, epoch)
