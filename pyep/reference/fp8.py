"""FP8: the recipe by which a low-latency dispatch makes 8-bit floats of its tokens."""

import numpy as np
from ml_dtypes import float8_e4m3fn

BLOCK = 128  # consecutive values of a token that share an FP8 scale
E4M3_MAX = np.float32(448)
LEAST_AMAX = np.float32(1e-4)  # so that a block of zeros has a scale to divide by


def quantize(x, round_scale=False):
    """A token as 8-bit floats, each block of 128 values with a scale of its own: x is about data * scale.

    amax = max(|x|, 1e-4) of the block, NaNs apart; scale = amax / 448; data = e4m3(x * (448 / amax)); each operation
    rounds to fp32. round_scale: the scale is rounded up to a power of two, and data = e4m3(x * (1 / scale)). A block
    with an infinity has scale = infinity, and data = NaN for the infinities, 0 for what is finite.

    x: [..., H] bf16, H a multiple of 128. Returns (data [..., H] float8_e4m3fn, scales [..., H/128] fp32).
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"hidden is {x.shape[-1]}; FP8 needs a multiple of {BLOCK}")
    with np.errstate(all="ignore"):
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
        amax = np.fmax.reduce(np.abs(blocks), axis=-1, keepdims=True, initial=LEAST_AMAX)
        scale, factor = amax / E4M3_MAX, E4M3_MAX / amax
        if round_scale:
            # fp32 bits are sign, 8 bits of exponent, 23 of mantissa. Adding 23 ones carries into the exponent unless
            # the mantissa is 0, that is, unless this is a power of two already. Infinity stays what it is.
            scale = ((scale.view(np.int32) + 0x7FFFFF) & 0x7F800000).view(np.float32)
            factor = 1 / scale
        return to_e4m3(blocks * factor).reshape(x.shape), scale[..., 0]


def to_e4m3(values):
    """fp32 to float8_e4m3fn: to nearest even, saturating at +-448 (infinities too); every NaN is the byte 0x7f."""
    with np.errstate(all="ignore"):
        clipped = np.clip(values, -E4M3_MAX, E4M3_MAX)  # ml_dtypes makes NaNs of what is too large
        return np.where(np.isnan(values), np.float32(np.nan), clipped).astype(float8_e4m3fn)


def pack_ue8m0(scales):
    """Scales that are powers of two, as their 8-bit biased exponents; four consecutive ones make an int32.

    scales: [..., H/128] fp32, H a multiple of 512. Returns [..., H/512] int32, the first block in the lowest byte.
    """
    if scales.shape[-1] % 4:
        raise ValueError(f"hidden is {scales.shape[-1] * BLOCK}; use_ue8m0 needs a multiple of {4 * BLOCK}")
    exponents = np.ascontiguousarray(scales).view(np.uint32) >> 23
    return exponents.astype(np.uint8).view("<i4")
