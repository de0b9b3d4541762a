"""Low-latency combine, direct, for any number of ranks, blocks and threads.

An expert's rank sends the output for (token, k) to the token's rank, which sums them in k order.
"""
from ..channels.memory import peer
from .basics import add_entry, list_bytes, num_warps, warp_rank
from .lang import (lane, ld4_nc_if, ld8_nc_if, ld8_shared, present, shared, st8, st8_shared, st16, st16_relaxed, syncwarp,
                   to_bf16, udiv, umod, warp_size)
from .low_latency import (COMBINE, COMBINE_CONSUMED, COMBINE_OUTPUT, COMBINE_PROXY, INDEX_BYTES, LOCAL_EXPERTS, PER_LANE, RANKS,
                          RECEIVERS, ROW_BYTES, SENDERS, TOPK, begin_warp, end_epoch, enter, look_at_consumed, shape_bits,
                          tell_begun)
from .low_latency_boxes import PACKET_BYTES, PACKET_HEADER, PORTS, is_port_peer, outbox, packets_in
from .low_latency_ship import ship
from .low_latency_slots import output_at
from .low_latency_sums import NOT_ADDED, four_words, load_ahead, load_four, sum_listed
from .low_latency_units import (first_packet, first_unit, list_unit, offset_of, reads_own_y, slices, source_of, token_of, units,
                                wait_for_all)
from .low_latency_unpack import unpack_combine

# ---- send ------------------------------------------------------------------------------------------------------------

def copy_four(values, entry, left, outputs, stride):
    """Store 16 bytes of each of four listed rows to a token's outputs, which are `stride` bytes apart."""
    value0, value1, value2, value3 = values
    k0, k1, k2, k3 = four_words(entry + 8)
    if left > 0:
        st16_relaxed(outputs + k0 * stride, present(value0))
    if left > 1:
        st16_relaxed(outputs + k1 * stride, present(value1))
    if left > 2:
        st16_relaxed(outputs + k2 * stride, present(value2))
    if left > 3:
        st16_relaxed(outputs + k3 * stride, present(value3))


def copy_listed(values, rows, count, outputs, stride, offset):
    """Copy 16 bytes of listed rows; `values`: of the first four."""
    copy_four(values, rows, count, outputs + offset, stride)
    entry, left = rows + 64, count - 4
    while left > 0:
        copy_four(load_four(entry, offset, left), entry, left, outputs + offset, stride)
        entry += 64
        left -= 4


def pack_outputs(watch, me, rows, count, unit, packet_of):
    """Where listed outputs go for a port peer, one packet after another: in the list, k becomes the packet's index among them.  The
    warp that has the first slice writes the headers."""
    first = packets_in(outbox(watch, source_of(unit, me)), 0) + first_packet(unit, me, packet_of) * PACKET_BYTES
    i = lane()
    while i < count:
        if umod(unit, slices()) == 0:
            st8(first + i * PACKET_BYTES, output_at(0, token_of(unit), ld8_shared(rows + 16 * i + 8)))
        st8_shared(rows + 16 * i + 8, i)
        i += warp_size()
    syncwarp()
    return first + PACKET_HEADER


def outputs_for(watch, me, half, rows, count, unit, packet_of):
    """Where the outputs of a list go: the address for k = 0, and how far it is to the next."""
    if is_port_peer(watch[0], source_of(unit, me)):
        return pack_outputs(watch, me, rows, count, unit, packet_of), PACKET_BYTES
    return output_at(peer(watch[0], source_of(unit, me)) + half, token_of(unit), 0), ROW_BYTES


def send_outputs(part, parts, watch, me, half, max_tokens, y, row_of, sent, packet_of):
    """The output of every row this rank received, back to the slot of its (token, k) on the token's rank.

    The first rows are loaded before it is known that their slots are free.  Returns what `begin_warp` does.
    """
    rows = shared() + warp_rank() * list_bytes(TOPK)
    look = look_at_consumed(watch[0], lane())
    unit = first_unit(part, parts)
    count = list_unit(rows, unit, me, max_tokens, y, row_of, 0, sent)
    ahead = load_ahead(rows, unit, count)
    if begin_warp(watch, COMBINE_CONSUMED, look) == 0:
        return 0
    tell_begun(part, watch, me, COMBINE | shape_bits(max_tokens))
    while unit < units(max_tokens):
        outputs, stride = outputs_for(watch, me, half, rows, count, unit, packet_of)
        for piece in range(PER_LANE):
            offset = offset_of(unit, piece)
            if offset < ROW_BYTES:
                copy_listed(ahead if piece == 0 else load_four(rows, offset, count), rows, count, outputs, stride, offset)
        syncwarp()
        unit += parts * num_warps()
        if unit < units(max_tokens):
            count = list_unit(rows, unit, me, max_tokens, y, row_of, 0, sent)
            ahead = load_ahead(rows, unit, count)
    syncwarp()                                                   # the list's memory is used again
    return 1


# ---- receive ---------------------------------------------------------------------------------------------------------

def list_outputs(entries, half_start, me, y, topk_idx, topk_weights, selected, row_of, token):
    """One warp lists what a token is the sum of, in k order, two words each: where it is; source rank << 32 | weight.

    `selected` says what will come.  Where the caller's topk_idx has become -1 meanwhile, the second word is negative: the
    output is taken out of its slot, but not added.
    """
    count = 0
    first = 0
    while first < TOPK:
        k = first + lane()
        selection = token * TOPK + k
        expert = ld8_nc_if(selected + 8 * selection, k < TOPK)
        row = ld8_nc_if(row_of + 8 * ((token * RANKS + me) * TOPK + k), k < TOPK and reads_own_y())
        now = topk_idx + INDEX_BYTES * selection
        masked = ld8_nc_if(now, k < TOPK) < 0 if INDEX_BYTES == 8 else ld4_nc_if(now, k < TOPK) < 0
        weight = ld4_nc_if(topk_weights + 4 * selection, k < TOPK) & 0xFFFFFFFF
        source = udiv(expert, LOCAL_EXPERTS)
        address = y + row * ROW_BYTES if reads_own_y() and source == me else output_at(half_start, token, k)
        count = add_entry(entries, count, k < TOPK and expert >= 0, address, source << 32 | weight | (NOT_ADDED if masked else 0))
        first += warp_size()
    syncwarp()
    return count


def sum_outputs(part, parts, watch, me, half, y, topk_idx, topk_weights, selected, row_of, num_tokens, out):
    """out[t] = bf16(sum over k, in order, of weight * output), in fp32 fma; a warp a slice."""
    base, _, _ = watch
    entries = shared() + warp_rank() * list_bytes(TOPK)
    unit = first_unit(part, parts)
    while unit < num_tokens * slices():
        token = udiv(unit, slices())
        count = list_outputs(entries, base + half, me, y, topk_idx, topk_weights, selected, row_of, token)
        for piece in range(PER_LANE):
            offset = offset_of(unit, piece)
            if offset < ROW_BYTES:
                total = sum_listed(entries, count, 0, 0, watch, COMBINE_OUTPUT, me, offset)
                st16(out + token * ROW_BYTES + offset, to_bf16(total))
        syncwarp()
        unit += parts * num_warps()


def combine(base, me, half_bytes, timeout, lag, max_tokens, y, topk_idx, topk_weights, num_tokens, wait_stats, row_of, sent,
            packet_of, selected, out):
    """The kernel.  y [L, R*M, H] bf16; row_of, sent, packet_of and selected as `dispatch` left them; out [T, H] bf16."""
    watch, half, sender, receiver = enter(base, me, lag, half_bytes, timeout, COMBINE_PROXY)
    begun = 1
    if SENDERS > 0:
        if sender < SENDERS:
            begun = send_outputs(sender, SENDERS, watch, me, half, max_tokens, y, row_of, sent, packet_of)
        if PORTS:
            ship(watch, COMBINE_PROXY, me, lag, packet_of, 0)
    if RECEIVERS > 0:
        if receiver >= 0:
            wait_for_all(receiver, RECEIVERS, watch, max_tokens, wait_stats)
            if PORTS:
                unpack_combine(receiver, RECEIVERS, watch, me, half, max_tokens, wait_stats)
            if begun:                                            # else row_of may be of another dispatch than selected
                sum_outputs(receiver, RECEIVERS, watch, me, half, y, topk_idx, topk_weights, selected, row_of, num_tokens, out)
    end_epoch(base, watch[2])
