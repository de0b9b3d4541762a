"""Low-latency combine, rank-reduced, for any number of ranks, blocks and threads.

Each rank first sums what its own experts made of a token, weighted, and rounds that to bf16: one row travels per (rank, token),
not one per selection.  The token's rank adds these *partials* in rank order.  In the rank-major layout the caller has summed and
weighted already, and the partials are the rows of y.
"""
from ..channels.memory import peer
from .basics import add_entry, list_bytes, num_warps, warp_rank
from .lang import (lane, ld16_nc, ld16_nc_if, ld4_relaxed_if, ld8_nc, present, shared, st8, st16, st16_relaxed, syncwarp, to_bf16,
                   udiv, umod, warp_size)
from .low_latency import (COMBINE, COMBINE_CONSUMED, COMBINE_PARTIAL, COMBINE_PROXY, PER_LANE, RANK_MAJOR, RANKS, RECEIVERS,
                          ROW_BYTES, SENDERS, TOPK, begin_warp, end_epoch, enter, look_at_consumed, selects, shape_bits, tell_begun)
from .low_latency_boxes import PACKET_BYTES, PACKET_HEADER, PORTS, is_port_peer, outbox, packets_in
from .low_latency_ship import ship
from .low_latency_slots import partial_at
from .low_latency_sums import load_ahead, load_four, partial, reduces, sum_listed
from .low_latency_units import (first_packet, first_unit, list_rows, list_unit, offset_of, reads_own_y, slices, source_of, token_of,
                                tokens_here, travels, units, wait_for_all)
from .low_latency_unpack import unpack_combine

ONE = 0x3F800000                                # 1.0 as bits of fp32


def rows_bytes():
    """Of a warp's list of rows; that of partials is behind it."""
    return list_bytes(TOPK) if reduces() else 0


# ---- send ------------------------------------------------------------------------------------------------------------

def partial_for(watch, me, half, unit, token, i, exists):
    """Where the partial of a token goes; i: the index of its packet, if it goes to a port peer.  The warp that has the first
    slice writes the packet's header, if there is a partial at all."""
    source = source_of(unit, me)
    if is_port_peer(watch[0], source):
        packet = packets_in(outbox(watch, source), 0) + i * PACKET_BYTES
        if exists and umod(unit, slices()) == 0 and lane() == 0:
            st8(packet, partial_at(0, me, token))
        return packet + PACKET_HEADER
    return partial_at(peer(watch[0], source) + half, me, token)


def send_partials(part, parts, watch, me, half, max_tokens, y, row_of, weight_of, sent, packet_of):
    """The partial of every token that has rows here, to the token's rank.

    The first rows are loaded before it is known that their slots are free.  Returns what `begin_warp` does.
    """
    rows = shared() + warp_rank() * (rows_bytes() + list_bytes(RANKS))
    look = look_at_consumed(watch[0], lane())
    unit = first_unit(part, parts)
    count = list_unit(rows, unit, me, max_tokens, y, row_of, weight_of, sent)
    ahead = load_ahead(rows, unit, count)
    if begin_warp(watch, COMBINE_CONSUMED, look) == 0:
        return 0
    tell_begun(part, watch, me, COMBINE | shape_bits(max_tokens))
    while unit < units(max_tokens):
        slot = partial_for(watch, me, half, unit, token_of(unit), first_packet(unit, me, packet_of), count > 0)
        for piece in range(PER_LANE):
            offset = offset_of(unit, piece)
            if offset < ROW_BYTES and count > 0:
                values = ahead if piece == 0 else load_four(rows, offset, count)
                st16_relaxed(slot + offset, present(partial(values, rows, count, offset)))
        syncwarp()
        unit += parts * num_warps()
        if unit < units(max_tokens):
            count = list_unit(rows, unit, me, max_tokens, y, row_of, weight_of, sent)
            ahead = load_ahead(rows, unit, count)
    syncwarp()                                                   # the list's memory is used again
    return 1


def look_up_row(unit, me, max_tokens, y, src_info, sent):
    """Rank-major: the first 16 bytes that a lane sends of a unit, the token of its row, how many rows its source has here.  No load
    waits to know whether it is needed, and nothing here waits for a load."""
    row = source_of(unit, me) * max_tokens + token_of(unit)
    offset = offset_of(unit, 0)
    value = ld16_nc_if(y + row * ROW_BYTES + offset, unit < units(max_tokens) and offset < ROW_BYTES)
    token = ld4_relaxed_if(src_info + 4 * row, unit < units(max_tokens))       # not ld4_nc_if: to extend a sign would be to wait
    return value, token, tokens_here(unit, me, sent)


def send_rows(part, parts, watch, me, half, max_tokens, y, src_info, sent):
    """Rank-major: every row of y to its token's rank.  The next unit is looked up before one is stored.
    In the box for a port peer rows lie as in y.  Returns what `begin_warp` does."""
    look = look_at_consumed(watch[0], lane())
    unit = first_unit(part, parts)
    next_value, next_token, next_tokens = look_up_row(unit, me, max_tokens, y, src_info, sent)
    if begin_warp(watch, COMBINE_CONSUMED, look) == 0:
        return 0
    tell_begun(part, watch, me, COMBINE | shape_bits(max_tokens))
    while unit < units(max_tokens):
        value, token, tokens, this = next_value, next_token, next_tokens, unit
        unit += parts * num_warps()
        next_value, next_token, next_tokens = look_up_row(unit, me, max_tokens, y, src_info, sent)
        row = y + (source_of(this, me) * max_tokens + token_of(this)) * ROW_BYTES
        slot = partial_for(watch, me, half, this, token, token_of(this), travels(this, me, tokens, max_tokens))
        for piece in range(PER_LANE):
            offset = offset_of(this, piece)
            if travels(this, me, tokens, max_tokens) and offset < ROW_BYTES:
                st16_relaxed(slot + offset, present(ld16_nc(row + offset) if piece > 0 else value))
    return 1


# ---- receive ---------------------------------------------------------------------------------------------------------

def list_partials(entries, half_start, me, y, row_of, selected, token):
    """One warp lists a token's partials in rank order, two words each: where it is; rank << 32 | 1.0.  Returns how many.

    Where this rank's own one does not travel, it is a row of y (rank-major), or nowhere yet: 0.  A lane for each rank.
    """
    own = 0
    if reads_own_y() and RANK_MAJOR:
        own = y + ld8_nc(row_of + 8 * (token * RANKS + me)) * ROW_BYTES
    count = 0
    first = 0
    while first < RANKS:
        rank = first + lane()
        hit = selects(selected, 8, token, rank) != 0
        address = own if reads_own_y() and rank == me else partial_at(half_start, rank, token)
        count = add_entry(entries, count, hit, address, rank << 32 | ONE)
        first += warp_size()
    syncwarp()
    return count


def receive_partials(part, parts, watch, me, half, max_tokens, y, row_of, weight_of, selected, num_tokens, out):
    """out[t] = bf16(sum of the token's partials, in rank order), in fp32; a warp a slice."""
    base, _, _ = watch
    rows = shared() + warp_rank() * (rows_bytes() + list_bytes(RANKS))
    entries = rows + rows_bytes()
    unit = first_unit(part, parts)
    while unit < num_tokens * slices():
        token = udiv(unit, slices())
        num_rows = list_rows(rows, me, token, 1, max_tokens, y, row_of, weight_of) if reads_own_y() and reduces() else 0
        count = list_partials(entries, base + half, me, y, row_of, selected, token)
        for piece in range(PER_LANE):
            offset = offset_of(unit, piece)
            if offset < ROW_BYTES:
                total = sum_listed(entries, count, rows, num_rows, watch, COMBINE_PARTIAL, me, offset)
                st16(out + token * ROW_BYTES + offset, to_bf16(total))
        syncwarp()
        unit += parts * num_warps()


# ---- the kernel ------------------------------------------------------------------------------------------------------

def combine_reduced(base, me, half_bytes, timeout, lag, max_tokens, y, num_tokens, wait_stats, row_of, weight_of, src_info, sent,
                    packet_of, selected, out):
    """The kernel.  y [L, R*M, H] bf16, in the rank-major layout [R, M, H]; row_of, weight_of, src_info, sent, packet_of and
    selected as `dispatch` left them; out [T, H] bf16."""
    watch, half, sender, receiver = enter(base, me, lag, half_bytes, timeout, COMBINE_PROXY)
    begun = 1
    if SENDERS > 0:
        if RANK_MAJOR and sender < SENDERS:
            begun = send_rows(sender, SENDERS, watch, me, half, max_tokens, y, src_info, sent)
        elif sender < SENDERS:
            begun = send_partials(sender, SENDERS, watch, me, half, max_tokens, y, row_of, weight_of, sent, packet_of)
        if PORTS:
            ship(watch, COMBINE_PROXY, me, lag, sent if RANK_MAJOR else packet_of, 0)
    if RECEIVERS > 0:
        if receiver >= 0:
            wait_for_all(receiver, RECEIVERS, watch, max_tokens, wait_stats)
            if PORTS:
                unpack_combine(receiver, RECEIVERS, watch, me, half, max_tokens, wait_stats)
            if begun:                                            # else row_of may be of another dispatch than selected
                receive_partials(receiver, RECEIVERS, watch, me, half, max_tokens, y, row_of, weight_of, selected, num_tokens, out)
    end_epoch(base, watch[2])
