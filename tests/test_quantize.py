"""The scales of FP8 as kernels compute them, against the oracle, for every |value| that a block may have as its largest."""
import numpy as np
import pytest
from ml_dtypes import bfloat16

from pyep import reference
from pyep.kernels.cpu import CpuKernel
from pyep.kernels.lang import bits_of, ld8, st8
from pyep.kernels.op import Cpu
from pyep.kernels.quantize import SMALLEST_AMAX, factor_of, scale_of


def scales(amaxes, n, out):
    """Two words for each amax (bits of fp32): the bits of its scale and of its factor."""
    i = 0
    while i < n:
        amax = ld8(amaxes + 8 * i)
        scale = scale_of(amax)
        st8(out + 16 * i, scale)
        st8(out + 16 * i + 8, bits_of(factor_of(amax, scale)))
        i += 1


@pytest.mark.parametrize("powers_of_2", [0, 1])
def test_scales_of_every_amax(powers_of_2):
    """Of all bf16 from 0 to infinity, with 1e-4 in place of what is less."""
    values = np.arange(0x7F81, dtype=np.uint16).view(bfloat16)
    amax = np.maximum(values.astype(np.float32), reference.LEAST_AMAX)
    bits = amax.view(np.uint32).astype(np.int64)
    assert bits.min() == SMALLEST_AMAX and np.isinf(amax).sum() == 1
    out = np.zeros((len(bits), 2), np.int64)
    CpuKernel(scales, 1, Cpu(), 0, dict(POWERS_OF_2=powers_of_2)).launch(None, bits.ctypes.data, len(bits), out.ctypes.data)
    _, scale = reference.quantize(np.repeat(values[:, None], reference.BLOCK, axis=1), bool(powers_of_2))
    factor = 1 / scale[:, 0] if powers_of_2 else reference.E4M3_MAX / amax
    np.testing.assert_array_equal(out, np.stack([scale[:, 0], factor], axis=1).view(np.uint32))
