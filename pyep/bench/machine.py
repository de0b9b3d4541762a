"""What the figures were measured on."""
import collections
import contextlib
import importlib.metadata
import platform
import re
from pathlib import Path

from mpi4py import MPI

from ..version import __version__

PACKAGES = {"cpu": ("numpy", "numba", "llvmlite", "mpi4py"),
            "cuda": ("numpy", "numba", "numba-cuda", "nvidia-nvvm", "cuda-core", "cuda-bindings", "mpi4py")}
ARRAY_PACKAGES = {"numpy": (), "torch": ("torch",), "cupy": ("cupy-cuda13x",)}


def describe(args, comm):
    """A dict for the report.  Collective."""
    devices = collections.Counter(comm.allgather(_gpu() if args.engine == "cuda" else _cpu()))
    hosts = len(set(comm.allgather(platform.node())))
    return {"engine": args.engine, "transport": args.transport_name, "ranks": comm.size, "hosts": hosts,
            "devices": dict(devices), "arrays": args.arrays, "versions": _versions(args)}


def _gpu():
    from cuda.core import Device
    return Device().name                                         # the current one: the buffer's


def _cpu():
    with contextlib.suppress(OSError):
        if name := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return name[1]
    return platform.processor() or platform.machine()


def _versions(args):
    mpi, version = MPI.get_vendor()
    found = {"pyep": __version__, "python": platform.python_version(), mpi: ".".join(map(str, version))}
    for name in (*PACKAGES[args.engine], *(name for array in args.arrays for name in ARRAY_PACKAGES[array])):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):       # installed under another name
            found[name] = importlib.metadata.version(name)
    if args.engine == "cuda":
        from cuda.bindings import driver
        cuda = driver.cuDriverGetVersion()[1]
        found["CUDA of the driver"] = f"{cuda // 1000}.{cuda % 1000 // 10}"
    return found
