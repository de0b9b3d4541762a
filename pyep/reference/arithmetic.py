"""The arithmetic of a kernel: fp32 with one rounding an instruction, and bf16."""

import numpy as np
from ml_dtypes import bfloat16


def to_bf16(values):
    """fp32 to bf16, to nearest even."""
    with np.errstate(all="ignore"):  # NaN and overflow to infinity are results, not accidents
        return values.astype(bfloat16)


def fma32(a, b, c):
    """a * b + c in fp32 with one rounding (to nearest even), as the fma instruction does it.

    a, b, c: arrays or scalars that broadcast, fp32 or exactly convertible to it (bf16). Returns fp32.
    """
    with np.errstate(all="ignore"):
        a, b, c = (np.asarray(v, np.float32).astype(np.float64) for v in (a, b, c))
        product = a * b  # exact: 24 x 24 bits fit in 53, and float64 has exponents to spare
        total = product + c
        # TwoSum (Knuth): total + error is exactly product + c. The error of an infinite or NaN total means nothing.
        c_part = total - product
        error = (product - (total - c_part)) + (c - c_part)
        inexact = np.isfinite(total) & (error != 0)
        # `total` may have been rounded onto the midpoint of two fp32 values, and rounding that once more goes wrong.
        # So the first rounding is made one to odd: an inexact sum takes that of its two float64 neighbours whose last
        # bit is set. It is never a midpoint, and it lies on the same side of every midpoint as the exact sum.
        even = (total.view(np.int64) & 1) == 0
        to_odd = np.nextafter(total, np.copysign(np.inf, error))
        return np.where(inexact & even, to_odd, total).astype(np.float32)
