"""The package mscclpp: whether it is there, and whether it lays out its handles as kernels expect."""
import logging
import struct
from typing import NamedTuple

from ..errors import EPTransportError
from . import handles

INSTALL = ("pip install 'mscclpp[cuda13] @ git+https://github.com/microsoft/mscclpp'  # builds it, with CUDA's nvcc, CMake, "
           "libibverbs-dev and libnuma-dev")
OLDEST = "MSCCL++ of 2026-08-12 (commit 5e038eac) or later"
BEFORE = {80: "0.10", 72: "0.9"}        # versions whose PortChannel handles have so many bytes


class UnusablePackage(EPTransportError):
    """what: what is wrong with it.  fix: what mends that."""

    def __init__(self, what, fix):
        super().__init__(f"transport \"mscclpp\" cannot be used here: {what}: {fix}")
        self.what, self.fix = what, fix


class Package(NamedTuple):
    """mscclpp: its module, that of its C++ classes, and its version."""

    api: object
    cpp: object
    version: str


def load():
    """The `Package`; `UnusablePackage` if it is missing, does not start, or has handles of another layout."""
    package = import_package()
    require_layout(*handle_sizes(package), package.version)
    return package


def import_package():
    """The `Package`, whatever its handles; `UnusablePackage` if it is missing or does not start."""
    root = logging.getLogger()
    level, outputs = root.level, root.handlers[:]
    try:
        import mscclpp
        from mscclpp import _mscclpp
    except ModuleNotFoundError as error:
        if error.name == "mscclpp":
            raise UnusablePackage("MSCCL++ is not installed", INSTALL) from None
        raise UnusablePackage(f"MSCCL++ needs the package {error.name}, which is not installed",
                              "pip install 'mscclpp[cuda13]'") from None
    except (ImportError, OSError) as error:
        raise UnusablePackage(f"MSCCL++ is installed, but does not start ({error})",
                              f"build it for this Python and this CUDA: {INSTALL}") from None
    finally:
        root.setLevel(level)                                     # it configures logging for the whole program
        root.handlers[:] = outputs
    return Package(mscclpp, _mscclpp, str(getattr(mscclpp, "__version__", "of unknown version")))


def handle_sizes(package):
    """Bytes of a PortChannel's and of a MemoryChannel's handle, 0 where there is none to see.  Needs no GPU."""
    def size(name):
        make = getattr(package.cpp, name, None)
        return len(getattr(make(), "raw", b"")) if make else 0
    return size("CppPortChannelDeviceHandle"), size("CppMemoryChannelDeviceHandle")


def require_layout(port_bytes, memory_bytes, version):
    """`UnusablePackage` unless handles have the sizes that `pyep.channels.handles` describes."""
    if (port_bytes, memory_bytes) != (handles.PORT_BYTES, handles.MEMORY_BYTES):
        like = f" (as in {BEFORE[port_bytes]})" if port_bytes in BEFORE else ""
        raise UnusablePackage(f"MSCCL++ {version} has PortChannel handles of {port_bytes} bytes{like} and MemoryChannel handles of "
                              f"{memory_bytes}, where kernels expect {handles.PORT_BYTES} and {handles.MEMORY_BYTES}",
                              f"take {OLDEST}: {INSTALL}")


def require_port_handle(raw, fifo_size, dst_memory, src_memory):
    """`UnusablePackage` unless the bytes of a PortChannel's handle hold what it was made of where kernels look for it.

    Sizes may agree by chance; a put through a handle that was misread would end the process, or write anywhere.
    """
    fields = {"FIFO size": ("i", handles.SIZE, fifo_size), "FIFO mask": ("q", handles.MASK, fifo_size - 1),
              "FIFO shift": ("q", handles.SHIFT, fifo_size.bit_length() - 1),
              "destination memory": ("I", handles.MEMORIES, dst_memory), "source memory": ("I", handles.MEMORIES + 4, src_memory)}
    for what, (form, offset, expected) in fields.items():
        found, = struct.unpack_from(form, raw, offset)
        if found != expected:
            raise UnusablePackage(f"byte {offset} of MSCCL++'s PortChannel handle, where kernels look for the {what}, holds "
                                  f"{found} instead of {expected}", f"take {OLDEST}: {INSTALL}")
