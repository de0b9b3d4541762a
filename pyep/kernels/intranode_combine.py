"""High-throughput combine inside one node, for any number of ranks, blocks and threads.

What a rank received from a source lies in one piece, in the order of the source's tokens, and goes back like that: into a
*staging* area on the source, in *chunks*, each followed by a flag.  The source sums a token's rows as soon as the chunks that hold
them are there, so that sums hide behind the link.

Chunks, since a flag must wait for the rows before it, and while it does, that thread's multiprocessor sends less: one for a row
would halve the rate of the link.
"""
from ..channels.memory import peer, release, wait_released
from .intranode import (CHUNK, COMBINE_CHUNK, COMBINE_DONE, COMBINE_PLACE, MAX_CHUNKS, RANKS, ROW_BYTES, TOPK, WEIGHTED, enter,
                        finish, tell_place, wait_places)
from .lang import (bits_of, block_rank, f32_of, fma8, lane, ld4_nc, ld4_nc_if, ld4_relaxed_if, ld4_shared, ld8_shared, ld16_if,
                   ld16_nc, ld16_nc_if, num_blocks, num_threads, shared, st4, st4_shared, st16, sync_first_threads, syncwarp,
                   thread_rank, to_bf16, udiv, warp_size, zeros)
from .low_latency import add_entry, after, num_warps, warp_rank

CHUNK_ROWS = 64                                 # of a chunk, or more if there are MAX_CHUNKS
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


# ---- send: the first half of a block's warps -------------------------------------------------------------------------

def sending_threads():
    """How many of a block's threads send: whole warps.  The other ones receive; a block of one warp does one after the other."""
    return udiv(num_warps(), 2) * warp_size() if num_warps() > 1 else num_threads()


def copy(to, source, nbytes):
    """The sending threads copy pieces of 16 bytes.  Four loads of a thread are under way at once."""
    stride = 16 * sending_threads()
    offset = 16 * thread_rank()
    while offset < nbytes:
        value0 = ld16_nc(source + offset)
        value1 = ld16_nc_if(source + offset + stride, offset + stride < nbytes)
        value2 = ld16_nc_if(source + offset + 2 * stride, offset + 2 * stride < nbytes)
        value3 = ld16_nc_if(source + offset + 3 * stride, offset + 3 * stride < nbytes)
        st16(to + offset, value0)
        if offset + stride < nbytes:
            st16(to + offset + stride, value1)
        if offset + 2 * stride < nbytes:
            st16(to + offset + 2 * stride, value2)
        if offset + 3 * stride < nbytes:
            st16(to + offset + 3 * stride, value3)
        offset += 4 * stride


def copy_words(to, source, nbytes):
    """The sending threads copy words of 4 bytes."""
    offset = 4 * thread_rank()
    while offset < nbytes:
        st4(to + offset, ld4_nc(source + offset))
        offset += 4 * sending_threads()


def send_chunk(watch, me, source, chunk, x, topk_weights):
    """The rows of a chunk back to the rank that they are from, then its flag; nothing if there are not so many chunks."""
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
        sync_first_threads(sending_threads())
        if thread_rank() == 0:
            release(peer(base, source) + CHUNK + 8 * (me * MAX_CHUNKS + chunk), epoch)


def send_chunks(watch, me, x, topk_weights):
    """All chunks in order, each for all sources before the next one, since sums need them together; nearest source first."""
    most = 0
    for source in range(RANKS):
        rows = rows_of(source, me)
        chunks = udiv(rows + chunk_rows(rows) - 1, chunk_rows(rows))
        most = chunks if source != me and chunks > most else most
    unit = block_rank()
    while unit < most * (RANKS - 1):
        chunk = udiv(unit, RANKS - 1)
        send_chunk(watch, me, after(me, 1 + unit - chunk * (RANKS - 1)), chunk, x, topk_weights)
        unit += num_blocks()


# ---- receive: the other half -----------------------------------------------------------------------------------------

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


def sum_listed(entries, count, offset, total):
    """`total` and 16 bytes of each listed row, in order.  Four loads are under way at once."""
    i = 0
    while i < count:
        entry = entries + 16 * i
        row0, row1, row2, row3 = ld8_shared(entry), ld8_shared(entry + 16), ld8_shared(entry + 32), ld8_shared(entry + 48)
        value0 = ld16_if(row0 + offset, 1)
        value1 = ld16_if(row1 + offset, i + 1 < count)
        value2 = ld16_if(row2 + offset, i + 2 < count)
        value3 = ld16_if(row3 + offset, i + 3 < count)
        total = fma8(value0, f32_of(ONE), total)
        if i + 1 < count:
            total = fma8(value1, f32_of(ONE), total)
        if i + 2 < count:
            total = fma8(value2, f32_of(ONE), total)
        if i + 3 < count:
            total = fma8(value3, f32_of(ONE), total)
        i += 4
    return total


def sum_weights(entries, count, token, out_weights):
    """One warp sums the weights of listed rows, in order."""
    k = lane()
    while k < TOPK:
        total = f32_of(0)
        for i in range(count):
            total += f32_of(ld4_relaxed_if(ld8_shared(entries + 16 * i + 8) + 4 * k, 1))
        st4(out_weights + 4 * (token * TOPK + k), bits_of(total))
        k += warp_size()


def sum_rows(watch, me, x, topk_weights, staging, staged_weights, send_rows, num_tokens, bias0, bias1, out, out_weights):
    """out[t] = bf16(bias0 + bias1 + the token's rows, in rank order), in fp32; a warp a token, in order, as chunks arrive."""
    one_warp = num_warps() == 1
    warp = 0 if one_warp else warp_rank() - udiv(num_warps(), 2)
    warps = 1 if one_warp else num_warps() - udiv(num_warps(), 2)
    entries = prefixes() + ((4 * RANKS * RANKS + 15) & -16) + 16 * warp * ((RANKS + 3) & -4)
    token = block_rank() + num_blocks() * warp
    while token < num_tokens:
        count = list_rows(entries, watch, me, token, send_rows, x, topk_weights, staging, staged_weights)
        offset = 16 * lane()
        while offset < ROW_BYTES:
            at = token * ROW_BYTES + offset
            total = zeros()
            if bias0 != 0:
                total = fma8(ld16_nc(bias0 + at), f32_of(ONE), total)
            if bias1 != 0:
                total = fma8(ld16_nc(bias1 + at), f32_of(ONE), total)
            st16(out + at, to_bf16(sum_listed(entries, count, offset, total)))
            offset += 16 * warp_size()
        if WEIGHTED:
            sum_weights(entries, count, token, out_weights)
        syncwarp()
        token += num_blocks() * warps


# ---- the kernel ------------------------------------------------------------------------------------------------------

def combine(base, me, timeout, x, topk_weights, rank_prefix, send_rows, num_tokens, staging, staged_weights, bias0, bias1, out,
            out_weights):
    """The kernel.  x [N, H] bf16, topk_weights [N, K] fp32; rank_prefix [R, R] and send_rows [T, R] int32 as in the handle;
    staging and staged_weights: like x and topk_weights, for all rows that come from other ranks, in symmetric memory;
    bias0, bias1, out [T, H] bf16, out_weights [T, K] fp32.  0 where there is none."""
    watch = enter(base, timeout)
    tell_place(watch, me, STAGED_ROWS, staging)
    if WEIGHTED:
        tell_place(watch, me, STAGED_WEIGHTS, staged_weights)
    bring_prefixes(rank_prefix)
    if wait_places(watch, COMBINE_PLACE, 1 + WEIGHTED, shared()) != 0:
        if thread_rank() < sending_threads():
            send_chunks(watch, me, x, topk_weights)
        if num_warps() == 1 or thread_rank() >= sending_threads():
            sum_rows(watch, me, x, topk_weights, staging, staged_weights, send_rows, num_tokens, bias0, bias1, out, out_weights)
    finish(watch, COMBINE_DONE, me)
