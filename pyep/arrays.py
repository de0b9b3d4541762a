"""NumPy, CuPy and PyTorch arrays, in and out: where their bytes are, what their values are, what stream they belong to.

A library is imported only once the caller has handed in one of its arrays.
"""
import contextlib
import functools
import math
import sys
import warnings

import ml_dtypes
import numpy as np


ALIGNED = 16                            # bytes that kernels access at a time in rows
AS_IT_IS = contextlib.nullcontext()


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

    @staticmethod
    def look_of(kind):
        """A function of arrays of this type: (the signature of an array, its address), see `look`; quick to make, to compare and to
        hash."""
        raise NotImplementedError

    @staticmethod
    def obstacle(array):
        """What keeps kernels from the values of an array, in words; None if nothing does."""
        return None

    def plainly(self):
        """A context in which to make arrays of arrays: real ones, whatever mode the caller is in."""
        return AS_IT_IS

    def lasting(self):
        """A context in which to make arrays that outlive a call: they belong to no mode that its caller is in."""
        return AS_IT_IS

    def has_history(self, *arrays):
        """Whether autograd has attached something to any of these, of which some may be None."""
        return False

    def without_history(self, array):
        """The memory of an array that outlives a call, to be handed out anew: autograd knows nothing of it.  None for None."""
        return array

    def of_memory(self, memory):
        """A `Memory` as an array, not copied."""
        raise NotImplementedError

    def lent(self, address, dtype, shape, owner):
        """An array over memory at an address.  To be called in `plainly`.

        dtype: the library's own.  owner: lives as long as the array and its views; it must have room for what `describe` sets, and
        describes this one array from then on.
        """
        describe(owner, self.engine, address, shape, typestr(dtype))
        array = self.of_memory(owner)
        return array if array.dtype == dtype else array.view(dtype)

    def dtype_of(self, name):
        """The library's dtype of a name."""
        return np.dtype(getattr(ml_dtypes, name, name))

    def external_stream(self, stream, device):
        """A stream of a GPU that somebody else owns (a CUstream as an int), as the library's own kind of object."""
        raise NotImplementedError


class _NumPy(Library):
    pointer = staticmethod(lambda array: array.ctypes.data)
    dtype = staticmethod(lambda array: array.dtype.name if array.dtype.isnative else f"byte-swapped {array.dtype.name}")
    is_contiguous = staticmethod(lambda array: array.flags.c_contiguous)
    is_writable = staticmethod(lambda array: array.flags.writeable)

    def empty(self, shape, dtype):
        return np.empty(shape, self.dtype_of(dtype))

    @staticmethod
    def look_of(kind):
        def look(array):
            address = array.ctypes.data
            return (kind, array.shape, array.dtype, array.flags.num, array.strides, address % ALIGNED), address
        return look

    def of_memory(self, memory):
        return np.asarray(memory)


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
        return self.cupy.empty(shape, self.dtype_of(dtype))

    def dtype_of(self, name):
        return super().dtype_of("uint8" if name == "float8_e4m3fn" else name)    # CuPy has no FP8: the bytes, for others to view

    @staticmethod
    def look_of(kind):
        def look(array):
            memory = array.data
            address = memory.ptr
            return (kind, array.shape, array.dtype, array.strides, memory.device_id, address % ALIGNED), address
        return look

    def stream(self):
        return self.cupy.cuda.get_current_stream().ptr

    def is_capturing(self):
        return self.cupy.cuda.runtime.streamIsCapturing(self.stream())

    def of_memory(self, memory):
        return self.cupy.asarray(memory)

    def external_stream(self, stream, device):
        with warnings.catch_warnings():                          # its successor, Stream.from_external, destroys what it was given
            warnings.simplefilter("ignore", DeprecationWarning)
            return self.cupy.cuda.ExternalStream(stream, device)


def _class_of(package):
    if package == "torch":
        from .tensors import Torch
        return Torch
    return _CuPy if package == "cupy" else _NumPy


@functools.cache
def _library(package, engine):
    return _class_of(package)(package, engine)


ARRAYS = ("numpy", "ndarray"), ("cupy", "ndarray"), ("torch", "Tensor")         # package, name of the class


@functools.cache
def _package(kind):
    """Which library a type of arrays is of; subclasses of arrays are arrays, whoever has defined them."""
    names = [(base.__module__.partition(".")[0], base.__name__) for base in kind.__mro__]
    return next((package for package, name in names if (package, name) in ARRAYS), None)


def library_of(array, argument):
    """The library of an array; TypeError, naming the argument, if it is of none of ours or has no memory that kernels can use."""
    kind = type(array)
    package = _package(kind)
    if package is None:
        raise TypeError(f"{argument} is a {kind.__module__}.{kind.__qualname__}; "
                        "expected a NumPy array, a CuPy array or a PyTorch tensor")
    on_gpu = array.is_cuda if package == "torch" else package == "cupy"
    library = _library(package, "cuda" if on_gpu else "cpu")
    obstacle = library.obstacle(array)
    if obstacle is not None:
        raise TypeError(f"{argument} is {obstacle}")
    return library


def as_numpy(array):
    """A checked array on the CPU as one of NumPy, not copied: whatever its class, and the mode that PyTorch is in."""
    if isinstance(array, np.ndarray):
        return np.asarray(array)
    torch, numpy = _library("torch", "cpu"), _library("numpy", "cpu")
    memory = Memory("cpu", torch.pointer(array), tuple(array.shape), array, typestr(array.dtype))
    return numpy.of_memory(memory).view(numpy.dtype_of(torch.dtype(array)))


def library_on_gpu():
    """The library whose current stream is meant where no array says so: PyTorch if it has used a GPU, else CuPy if the program has
    imported it, else None."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return _library("torch", "cuda")
    return _library("cupy", "cuda") if "cupy" in sys.modules else None


@functools.cache
def typestr(dtype):
    """How arrays of a dtype, of whatever library, are described to other libraries.  They know nothing of bf16, FP8 and the like:
    those are described as integers, to be viewed as what they are afterwards."""
    if str(dtype).removeprefix("torch.") == "float32":
        return "<f4"
    return "|u1" if dtype.itemsize == 1 else f"<i{dtype.itemsize}"


class Memory:
    """Memory at an address, for libraries to make arrays of; `owner` is kept alive with them."""

    def __init__(self, engine, address, shape, owner=None, typestr="|u1"):
        describe(self, engine, address, shape, typestr)
        self.engine, self.nbytes, self.owner = engine, math.prod(shape) * int(typestr[2:]), owner


def describe(memory, engine, address, shape, typestr):
    """Have an object describe an array to libraries, which make theirs of it and then keep the object alive."""
    interface = {"shape": shape, "typestr": typestr, "data": (address, False), "version": 3}
    if engine == "cuda":
        memory.__cuda_array_interface__ = interface
    else:
        memory.__array_interface__ = interface


def allocate(engine, nbytes, dtype):
    """`Memory` of its own, whose values are undefined, from the library that has the dtype."""
    library = _library_for(dtype, engine)
    array = library.empty((max(nbytes, 1),), "uint8")
    return Memory(engine, library.pointer(array), (nbytes,), array)


def _library_for(dtype, engine):
    if type(dtype).__module__.partition(".")[0] == "torch":
        return _library("torch", engine)
    return _library("cupy" if engine == "cuda" else "numpy", engine)


def view(memory, dtype, shape, offset):
    """An array over a `Memory`, not copied, of PyTorch if the dtype is, else NumPy or CuPy.

    shape: a tuple or torch.Size, or None for all that follows byte `offset`, in one dimension.
    """
    library = _library_for(dtype, memory.engine)
    dtype = dtype if library.name == "torch" else np.dtype(dtype)
    itemsize = dtype.itemsize
    if not 0 <= offset <= memory.nbytes or offset % itemsize:
        raise ValueError(f"offset is {offset}; expected bytes, a multiple of {itemsize}, up to {memory.nbytes}")
    room = (memory.nbytes - offset) // itemsize
    shape = (room,) if shape is None else tuple(shape)
    items = math.prod(shape)
    if items > room:
        raise ValueError(f"size is {list(shape)}; after byte {offset} there is room for {room} values of {itemsize} bytes")
    return library.of_memory(memory)[offset:offset + items * itemsize].view(dtype).reshape(shape)


NOTHING = None, 0                       # what there is to see of an argument that is None


def look(given):
    """(signatures, addresses) of arguments, each an array or None.  A signature is all that checks look at, so not the values, and
    of the address only how it is aligned: with the same ones arguments pass the same checks.

    An operation looks at its arguments here and nowhere else: each look at an attribute takes a tenth of a microsecond.
    """
    signatures, addresses = [], []
    for array in given:
        signature, address = NOTHING if array is None else _look_of(type(array))(array)
        signatures.append(signature)
        addresses.append(address)
    return tuple(signatures), addresses


@functools.cache
def _look_of(kind):
    package = _package(kind)
    return (lambda array: (kind, 0)) if package is None else _class_of(package).look_of(kind)


def check_type(array, argument, library, dtypes):
    """TypeError unless `array`, which may lie in any strides, is of `library` and has one of `dtypes`."""
    other = library_of(array, argument)
    if other is not library:
        raise TypeError(f"{argument} is a {other.name} array in {other.engine} memory; the others are {library.name} "
                        f"arrays in {library.engine} memory")
    if library.dtype(array) not in dtypes:
        raise TypeError(f"{argument} has dtype {library.dtype(array)}; expected {' or '.join(dtypes)}")


def check(array, argument, library, dtypes, shape, writable=False):
    """TypeError or ValueError unless `array` is a contiguous array of `library` with one of `dtypes` and this shape.

    In `shape`, an int is a length that must be, a string names a length that may be anything.
    """
    check_type(array, argument, library, dtypes)
    if len(array.shape) != len(shape) or any(isinstance(want, int) and want != got for want, got in zip(shape, array.shape)):
        raise ValueError(f"{argument} has shape {list(array.shape)}; expected [{', '.join(map(str, shape))}]")
    if not library.is_contiguous(array):
        raise ValueError(f"{argument} is not contiguous; pass a contiguous copy of it")
    if writable and not library.is_writable(array):
        raise ValueError(f"{argument} is read-only; pass an array that may be written")


def check_aligned(array, argument, library):
    """ValueError unless rows begin where kernels can access them."""
    address = library.pointer(array)
    if address % ALIGNED and len(array):
        raise ValueError(f"{argument} begins at address {address:#x}; rows must begin at a multiple of {ALIGNED} bytes")
