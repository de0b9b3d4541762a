"""NumPy, CuPy and PyTorch arrays, in and out: where their bytes are, what their values are, what stream they belong to.

A library is imported only once the caller has handed in one of its arrays.
"""
import functools
import math

import ml_dtypes
import numpy as np

BF16 = "bfloat16"


class Library:
    """What pyep needs of an array library; `engine` is the engine whose memory its arrays are in ("cpu", "cuda")."""

    def __init__(self, name, engine):
        self.name, self.engine = name, engine

    def pointer(self, array):
        """Address of the first byte."""
        raise NotImplementedError

    def dtype(self, array):
        """Name of the element type, for instance "bfloat16"."""
        raise NotImplementedError

    def is_contiguous(self, array):
        raise NotImplementedError

    def is_writable(self, array):
        return True

    def device(self, array):
        """The index of the GPU whose memory the array is in; 0 on the CPU."""
        return 0

    def empty(self, shape, dtype):
        """An array on the current device whose values are undefined."""
        raise NotImplementedError

    def stream(self):
        """The caller's current stream, as an int (0 on the CPU)."""
        return 0

    def is_capturing(self):
        """Whether the current stream is being captured into a graph."""
        return False


class _NumPy(Library):
    pointer = staticmethod(lambda array: array.ctypes.data)
    dtype = staticmethod(lambda array: array.dtype.name if array.dtype.isnative else f"byte-swapped {array.dtype.name}")
    is_contiguous = staticmethod(lambda array: array.flags.c_contiguous)
    is_writable = staticmethod(lambda array: array.flags.writeable)

    def empty(self, shape, dtype):
        return np.empty(shape, ml_dtypes.bfloat16 if dtype == BF16 else dtype)


class _CuPy(Library):
    pointer = staticmethod(lambda array: array.data.ptr)
    dtype = staticmethod(lambda array: array.dtype.name)
    is_contiguous = staticmethod(lambda array: array.flags.c_contiguous)
    device = staticmethod(lambda array: array.device.id)

    def __init__(self, name, engine):
        super().__init__(name, engine)
        import cupy
        self.cupy = cupy

    def empty(self, shape, dtype):
        return self.cupy.empty(shape, ml_dtypes.bfloat16 if dtype == BF16 else dtype)

    def stream(self):
        return self.cupy.cuda.get_current_stream().ptr

    def is_capturing(self):
        return self.cupy.cuda.get_current_stream().is_capturing()


class _Torch(Library):
    pointer = staticmethod(lambda array: array.data_ptr())
    dtype = staticmethod(lambda array: str(array.dtype).removeprefix("torch."))
    is_contiguous = staticmethod(lambda array: array.is_contiguous())

    def __init__(self, name, engine):
        super().__init__(name, engine)
        import torch
        self.torch = torch

    def device(self, array):
        return array.device.index or 0

    def empty(self, shape, dtype):
        return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=self.engine)

    def stream(self):
        return self.torch.cuda.current_stream().cuda_stream if self.engine == "cuda" else 0

    def is_capturing(self):
        return self.engine == "cuda" and self.torch.cuda.is_current_stream_capturing()


@functools.cache
def _library(name, engine):
    return {"numpy": _NumPy, "cupy": _CuPy, "torch": _Torch}[name](name, engine)


def library_of(array, argument):
    """The library of an array; TypeError if it is not one of ours, naming the argument."""
    package = type(array).__module__.partition(".")[0]
    if package == "numpy" and isinstance(array, np.ndarray):
        return _library("numpy", "cpu")
    if package == "cupy" and hasattr(array, "data"):
        return _library("cupy", "cuda")
    if package == "torch" and hasattr(array, "data_ptr"):
        return _library("torch", "cuda" if array.is_cuda else "cpu")
    raise TypeError(f"{argument} is a {type(array).__module__}.{type(array).__qualname__}; "
                    "expected a NumPy array, a CuPy array or a PyTorch tensor")


def check(array, argument, library, dtypes, shape, writable=False):
    """TypeError or ValueError unless `array` is a contiguous array of `library` with one of `dtypes` and this shape.

    In `shape`, an int is a length that must be, a string names a length that may be anything.  Returns the address.
    """
    other = library_of(array, argument)
    if other is not library:
        raise TypeError(f"{argument} is a {other.name} array in {other.engine} memory; the others are {library.name} "
                        f"arrays in {library.engine} memory")
    if library.dtype(array) not in dtypes:
        raise TypeError(f"{argument} has dtype {library.dtype(array)}; expected {' or '.join(dtypes)}")
    if len(array.shape) != len(shape) or any(isinstance(want, int) and want != got for want, got in zip(shape, array.shape)):
        raise ValueError(f"{argument} has shape {list(array.shape)}; expected [{', '.join(map(str, shape))}]")
    if not library.is_contiguous(array):
        raise ValueError(f"{argument} is not contiguous; pass a contiguous copy of it")
    if writable and not library.is_writable(array):
        raise ValueError(f"{argument} is read-only; pass an array that may be written")
    address = library.pointer(array)
    if address % 16 and math.prod(array.shape) and library.dtype(array) == BF16:
        raise ValueError(f"{argument} begins at address {address:#x}; rows must begin at a multiple of 16 bytes")
    return address
