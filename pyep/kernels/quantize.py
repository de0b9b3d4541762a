"""FP8: blocks of 128 values become e4m3 with one fp32 scale (the recipe is `pyep.reference.quantize`).

A few lanes of a warp (8, fewer on a CPU with narrow warps) quantize a block together.  A *piece* is what a lane converts at a
time: 16 values, 32 bytes of bf16, 16 bytes of e4m3.
"""
from .lang import amax8, bits_of, div, f32_of, ld16_nc_if, shfl_xor, udiv, umod, warp_size
from .low_latency import DATA_BYTES, POWERS_OF_2

PIECES = 8                                      # in a block
SMALLEST_AMAX, LARGEST_E4M3, INFINITY = 0x38D1B717, 0x43E00000, 0x7F800000      # 1e-4, 448, infinity as bits of fp32


def lanes_per_block():
    """Lanes that share a block."""
    return PIECES if warp_size() >= PIECES else warp_size()


def first_piece(rank):
    """Where the first piece of a thread is in the e4m3 that it quantizes at a time with others; rank: among them."""
    return 16 * (PIECES * udiv(rank, lanes_per_block()) + umod(rank, lanes_per_block()))


def span(threads):
    """Bytes of e4m3 that so many threads quantize at a time."""
    return 16 * PIECES * udiv(threads, lanes_per_block())


def load_piece(row, offset, wanted):
    """The bf16 of the piece at `offset` among the e4m3 of a row; zeros where wanted is 0."""
    return ld16_nc_if(row + 2 * offset, wanted), ld16_nc_if(row + 2 * offset + 16, wanted)


def largest(low, high):
    """The largest |value| of a piece, as bits of bf16."""
    a, b = amax8(low), amax8(high)
    return a if a > b else b


def block_amax(row, offset, low, high):
    """max(largest |value| of the lanes' block, 1e-4), as bits of fp32; the whole warp asks.  low, high: this lane's first piece."""
    amax = largest(low, high)
    for i in range(1, udiv(PIECES, lanes_per_block())):
        next_low, next_high = load_piece(row, offset + 16 * i * lanes_per_block(), offset < DATA_BYTES)
        other = largest(next_low, next_high)
        amax = other if other > amax else amax
    step = 1
    while step < lanes_per_block():
        other = shfl_xor(amax, step)
        amax = other if other > amax else amax
        step *= 2
    amax = amax << 16                                            # of positive floats, the larger has the larger bits
    return amax if amax > SMALLEST_AMAX else SMALLEST_AMAX


def scale_of(amax):
    """Bits of the scale of a block: amax / 448, or the smallest power of two that is not less."""
    if POWERS_OF_2:
        # 448 is 1.75 * 2**8: the power is amax's own by 2**8, twice that where amax's mantissa is above 1.75 (0x600000).
        return ((amax + 0x1FFFFF) & 0x7F800000) - (8 << 23) if amax < INFINITY else INFINITY
    return bits_of(div(f32_of(amax), f32_of(LARGEST_E4M3)))


def factor_of(amax, scale):
    """What values are multiplied by: 1 / scale, or 448 / amax."""
    if POWERS_OF_2:
        return f32_of(0x7F000000 - scale if scale < INFINITY else 0)             # the exponents of 2**n and 2**-n add up to 254
    return div(f32_of(LARGEST_E4M3), f32_of(amax))
