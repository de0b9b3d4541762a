"""What tests of wrong arguments share: an error of the right kind and in the right words, and nothing launched."""
import contextlib

import numpy as np
import pytest
from engine import on_gpu, up
from ml_dtypes import bfloat16

from pyep import buffer_low_latency


def zeros(*shape, dtype=bfloat16):
    return up(np.zeros(shape, dtype))


def read_only(array):
    array.flags.writeable = False
    return array


@contextlib.contextmanager
def nothing_launched():
    """Fail if a kernel is launched."""
    if on_gpu():
        from pyep.kernels.cuda import CudaKernel as Kernel
    else:
        from pyep.kernels.cpu import CpuKernel as Kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "launch", lambda *args: pytest.fail("a kernel was launched"))
        yield


@contextlib.contextmanager
def rejected(error, *words):
    """Fail unless this error is raised, with all of the words in its message."""
    with nothing_launched(), pytest.raises(error) as caught:
        yield caught
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {str(caught.value)!r}"


@contextlib.contextmanager
def blind_host():
    """The host does not look at the topk_idx of low-latency dispatches: kernels find out, as on GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        for check in "check_experts", "check_room":
            patch.setattr(buffer_low_latency, check, lambda *args: None)
        yield
