"""High-throughput combine inside one node, for any number of ranks, blocks and threads.

What a rank received from a source lies in one piece, in the order of the source's tokens, and goes back like that: into a
*staging* area on the source, in *chunks*, each followed by a flag.  The source sums a token's rows as soon as the chunks that hold
them are there, so that sums hide behind the link.

A warp sends a chunk by itself, and no warp waits for another: a flag must wait until the rows before it have arrived, and meanwhile
the other warps go on.
"""
from ..channels.memory import peer, release, wait_released
from .basics import add_entry, after, list_bytes, num_warps, warp_rank
from .intranode import (CHUNK, COMBINE_CHUNK, COMBINE_DONE, COMBINE_PLACE, MAX_CHUNKS, RANKS, ROW_BYTES, TOPK, WEIGHTED, enter,
                        finish, load_four, tell_operation, tell_place, wait_places)
from .lang import (bits_of, block_rank, f32_of, fma8, lane, ld4_nc, ld4_nc_if, ld4_relaxed_if, ld4_shared, ld8_shared, ld16,
                   ld16_if, ld16_nc, ld16_nc_if, num_blocks, num_threads, shared, st4, st4_shared, st16, syncwarp,
                   thread_rank, to_bf16, udiv, warp_size, zeros)

CHUNK_ROWS = 2                                  # of a chunk, or more if there are MAX_CHUNKS
SENDING_BLOCKS = SENDING_WARPS = 1              # the first warps of the first blocks send, all others receive
ONE = 0x3F800000                                # 1.0 as bits of fp32
STAGED_ROWS, STAGED_WEIGHTS = 0, 1              # the sections of a staging area


# ---- the layout ------------------------------------------------------------------------------------------------------
# Shared memory of a block: the places of all staging areas; rank_prefix_matrix, [R, R] int32; a list for each receiving warp.

def prefixes():
    """Where in shared memory rank_prefix_matrix is."""
    return shared() + 8 * RANKS * (1 + WEIGHTED)


def bring_prefixes(rank_prefix):
    """Bring rank_prefix_matrix into shared memory; to be used after the block has met."""
    i = thread_rank()
    while i < RANKS * RANKS:
        st4_shared(prefixes() + 4 * i, ld4_nc(rank_prefix + 4 * i))
        i += num_threads()


def rows_before(source, rank):
    """The rows that `rank` has from sources below `source`: where in its x the rows of `source` begin."""
    return ld4_shared(prefixes() + 4 * ((source - 1) * RANKS + rank)) if source > 0 else 0


def rows_of(source, rank):
    """How many rows `rank` has from `source`."""
    return rows_before(source + 1, rank) - rows_before(source, rank)


def staged_before(source, rank):
    """Where in the staging area of `source` the rows from `rank` begin: behind those from lower ranks.  Its own need none."""
    rows = 0
    for lower in range(RANKS):
        if lower < rank and lower != source:
            rows += rows_of(source, lower)
    return rows


def chunk_rows(rows):
    """Rows of each chunk in which so many travel."""
    least = udiv(rows + MAX_CHUNKS - 1, MAX_CHUNKS)
    return least if least > CHUNK_ROWS else CHUNK_ROWS


# ---- send: the first warps of the first blocks -----------------------------------------------------------------------

def sending_warps():
    """How many warps of a block send, if it does.  A block of no more warps than that then receives with all."""
    return SENDING_WARPS if SENDING_WARPS < num_warps() else num_warps()


def sends():
    """Whether this warp sends."""
    return block_rank() < SENDING_BLOCKS and warp_rank() < sending_warps()


def copy(to, source, nbytes):
    """One warp copies pieces of 16 bytes.  A lane's next four loads are under way while it stores the last four."""
    step = 16 * warp_size()
    offset = 16 * lane()
    value0, value1, value2, value3 = load_four(source, offset, step, nbytes)
    while offset < nbytes:
        next0, next1, next2, next3 = load_four(source, offset + 4 * step, step, nbytes)
        st16(to + offset, value0)
        if offset + step < nbytes:
            st16(to + offset + step, value1)
        if offset + 2 * step < nbytes:
            st16(to + offset + 2 * step, value2)
        if offset + 3 * step < nbytes:
            st16(to + offset + 3 * step, value3)
        value0, value1, value2, value3 = next0, next1, next2, next3
        offset += 4 * step


def copy_words(to, source, nbytes):
    """One warp copies words of 4 bytes."""
    offset = 4 * lane()
    while offset < nbytes:
        st4(to + offset, ld4_nc(source + offset))
        offset += 4 * warp_size()


def send_chunk(watch, me, source, chunk, x, topk_weights):
    """One warp sends the rows of a chunk back to the rank that they are from, then its flag; nothing if there are not so many
    chunks."""
    base, _, epoch = watch
    rows = rows_of(source, me)
    first = chunk * chunk_rows(rows)
    if first < rows:
        count = chunk_rows(rows) if rows - first > chunk_rows(rows) else rows - first
        row, staged = rows_before(source, me) + first, staged_before(source, me) + first
        places = shared() + 8 * source * (1 + WEIGHTED)
        copy(ld8_shared(places) + staged * ROW_BYTES, x + row * ROW_BYTES, count * ROW_BYTES)
        if WEIGHTED:
            copy_words(ld8_shared(places + 8) + 4 * TOPK * staged, topk_weights + 4 * TOPK * row, count * 4 * TOPK)
        syncwarp()
        if lane() == 0:
            release(peer(base, source) + CHUNK + 8 * (me * MAX_CHUNKS + chunk), epoch)


def send_chunks(watch, me, x, topk_weights):
    """All chunks in order, each for all sources before the next one, since sums need them together; nearest source first."""
    most = 0
    for source in range(RANKS):
        rows = rows_of(source, me)
        chunks = udiv(rows + chunk_rows(rows) - 1, chunk_rows(rows))
        most = chunks if source != me and chunks > most else most
    unit = block_rank() + SENDING_BLOCKS * warp_rank()
    while unit < most * (RANKS - 1):
        chunk = udiv(unit, RANKS - 1)
        send_chunk(watch, me, after(me, 1 + unit - chunk * (RANKS - 1)), chunk, x, topk_weights)
        unit += SENDING_BLOCKS * sending_warps()


# ---- receive: all other warps ----------------------------------------------------------------------------------------

def list_rows(entries, watch, me, token, send_rows, x, topk_weights, staging, staged_weights):
    """One warp lists a token's rows in rank order, two words each: where it is, where its weights are.  It waits for the chunks
    that hold them.  Returns how many."""
    base, _, _ = watch
    count = 0
    first = 0
    while first < RANKS:
        rank = first + lane()
        position = ld4_nc_if(send_rows + 4 * (token * RANKS + rank), rank < RANKS)
        hit = rank < RANKS and position >= 0
        row, weights = 0, 0
        if hit and rank == me:                                   # this rank's own need not travel
            at = rows_before(me, me) + position
            row, weights = x + at * ROW_BYTES, topk_weights + 4 * TOPK * at
        elif hit:
            chunk = udiv(position, chunk_rows(rows_of(me, rank)))
            wait_released(watch, COMBINE_CHUNK, rank, base + CHUNK + 8 * (rank * MAX_CHUNKS + chunk))
            at = staged_before(me, rank) + position
            row, weights = staging + at * ROW_BYTES, staged_weights + 4 * TOPK * at
        count = add_entry(entries, count, hit, row, weights)
        first += warp_size()
    syncwarp()
    return count


def sum_listed(entries, count, offset, step, total0, total1):
    """Two sums: `total0` and what each listed row has at `offset`, `total1` and what it has a step further on, in order.  Eight
    loads of a lane are under way at once."""
    more = offset + step < ROW_BYTES
    i = 0
    while i < count:
        entry = entries + 16 * i
        row0, row1 = ld8_shared(entry) + offset, ld8_shared(entry + 16) + offset
        row2, row3 = ld8_shared(entry + 32) + offset, ld8_shared(entry + 48) + offset
        one, two, three = i + 1 < count, i + 2 < count, i + 3 < count
        value00, value01 = ld16(row0), ld16_if(row0 + step, more)
        value10, value11 = ld16_if(row1, one), ld16_if(row1 + step, one and more)
        value20, value21 = ld16_if(row2, two), ld16_if(row2 + step, two and more)
        value30, value31 = ld16_if(row3, three), ld16_if(row3 + step, three and more)
        total0, total1 = fma8(value00, f32_of(ONE), total0), fma8(value01, f32_of(ONE), total1)
        if one:
            total0, total1 = fma8(value10, f32_of(ONE), total0), fma8(value11, f32_of(ONE), total1)
        if two:
            total0, total1 = fma8(value20, f32_of(ONE), total0), fma8(value21, f32_of(ONE), total1)
        if three:
            total0, total1 = fma8(value30, f32_of(ONE), total0), fma8(value31, f32_of(ONE), total1)
        i += 4
    return total0, total1


def sum_weights(entries, count, token, out_weights):
    """One warp sums the weights of listed rows, in order."""
    k = lane()
    while k < TOPK:
        total = f32_of(0)
        for i in range(count):
            total += f32_of(ld4_relaxed_if(ld8_shared(entries + 16 * i + 8) + 4 * k, 1))
        st4(out_weights + 4 * (token * TOPK + k), bits_of(total))
        k += warp_size()


def add_bias(bias, at, step, more, total0, total1):
    """Two sums and 16 bytes of a bias each, if there is one."""
    if bias != 0:
        value0, value1 = ld16_nc(bias + at), ld16_nc_if(bias + at + step, more)
        total0, total1 = fma8(value0, f32_of(ONE), total0), fma8(value1, f32_of(ONE), total1)
    return total0, total1


def sending_warps_before(block):
    """How many warps of the blocks below `block` only send."""
    warps = sending_warps() if sending_warps() < num_warps() else 0
    return (block if block < SENDING_BLOCKS else SENDING_BLOCKS) * warps


def sum_rows(watch, me, x, topk_weights, staging, staged_weights, send_rows, num_tokens, bias0, bias1, out, out_weights):
    """out[t] = bf16(0 + bias0 + bias1 + the token's rows, in rank order), in fp32; a warp a token, in order, as chunks arrive."""
    entries = prefixes() + ((4 * RANKS * RANKS + 15) & -16) + list_bytes(RANKS) * warp_rank()
    step = 16 * warp_size()
    token = block_rank() * num_warps() + warp_rank() - sending_warps_before(block_rank() + 1)
    while token < num_tokens:
        count = list_rows(entries, watch, me, token, send_rows, x, topk_weights, staging, staged_weights)
        offset = 16 * lane()
        while offset < ROW_BYTES:
            at = token * ROW_BYTES + offset
            more = offset + step < ROW_BYTES
            total0, total1 = add_bias(bias0, at, step, more, zeros(), zeros())
            total0, total1 = add_bias(bias1, at, step, more, total0, total1)
            total0, total1 = sum_listed(entries, count, offset, step, total0, total1)
            st16(out + at, to_bf16(total0))
            if more:
                st16(out + at + step, to_bf16(total1))
            offset += 2 * step
        if WEIGHTED:
            sum_weights(entries, count, token, out_weights)
        syncwarp()
        token += num_blocks() * num_warps() - sending_warps_before(num_blocks())


# ---- the kernel ------------------------------------------------------------------------------------------------------

def combine(base, me, timeout, operation, x, topk_weights, rank_prefix, send_rows, num_tokens, staging, staged_weights, bias0,
            bias1, out, out_weights):
    """The kernel.  operation: see `tell_operation`; x [N, H] bf16, topk_weights [N, K] fp32; rank_prefix [R, R] and send_rows
    [T, R] int32 as in the handle; staging and staged_weights: like x and topk_weights, for all rows that come from other ranks, in
    symmetric memory; bias0, bias1, out [T, H] bf16, out_weights [T, K] fp32.  0 where there is none."""
    watch = enter(base, timeout)
    tell_place(watch, me, STAGED_ROWS, staging)
    if WEIGHTED:
        tell_place(watch, me, STAGED_WEIGHTS, staged_weights)
    if block_rank() == 0:
        tell_operation(watch, me, operation)
    bring_prefixes(rank_prefix)
    if wait_places(watch, COMBINE_PLACE, me, operation, 1 + WEIGHTED, shared()) != 0:
        if sends():
            send_chunks(watch, me, x, topk_weights)
        if not sends() or sending_warps() == num_warps():
            sum_rows(watch, me, x, topk_weights, staging, staged_weights, send_rows, num_tokens, bias0, bias1, out, out_weights)
    finish(watch, COMBINE_DONE, me)
