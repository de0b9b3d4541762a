"""What is installed: packages, MPI, MSCCL++, and the environment variables that change what pyep does."""
import ctypes
import importlib.metadata
import os
import platform
from typing import NamedTuple

from ..channels import mscclpp_package
from ..choices import choose_device, install
from ..errors import EPTransportError
from ..version import __version__
from .finding import Finding, Section, examine

VARIABLES = "PYEP_", "MSCCLPP_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
DRIVER = "libcuda.so.1"


class Group(NamedTuple):
    """Packages that are installed together, as an extra of pyep; "" is pyep itself."""

    what: str
    extra: str
    names: tuple
    use: str                            # when they are wanted


GROUPS = (
    Group("packages", "", ("numpy", "numba", "llvmlite", "ml_dtypes", "mpi4py"), "always"),
    Group("for GPUs", "cuda", ("numba-cuda", "cuda-core", "cuda-bindings", "nvidia-nvvm", "nvidia-cuda-nvrtc", "nvidia-nvjitlink"),
          "on GPUs"),
    Group("for CuPy", "cuda", ("cupy-cuda13x",), "for CuPy's arrays, and by MSCCL++"),
    Group("for PyTorch", "torch", ("torch",), "for its tensors"),
    Group("for bench", "bench", ("tabulate", "tqdm", "matplotlib"), "by `pyep bench`"),
)


LIBRARIES = {"nvidia-nvvm": "nvvm", "nvidia-cuda-nvrtc": "nvrtc", "nvidia-nvjitlink": "nvJitLink"}      # a CUDA toolkit has them


def look(comm):
    """The sections of this file."""
    environment = Section("environment", settings())             # before anything is imported that adds to it
    installed = [found for group in GROUPS for found in examine(group.what, packages, group)]
    return [Section("software", [*examine("pyep", pyep), *examine("engine", engine), *installed, *examine("MPI", mpi, comm),
                                 *examine("MSCCL++", mscclpp)]),
            environment]


def pyep():
    return Finding("pyep", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")


def engine():
    """Which engine a Buffer would use."""
    try:
        return Finding("engine", choose_device())
    except (EPTransportError, ValueError) as error:              # they say what to do
        return Finding("engine", "none", str(error))


def packages(group):
    """The versions of a group of packages."""
    versions = {name: version_of(name) or library_of(name) for name in group.names}
    missing = [name for name, version in versions.items() if version is None]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if not missing:
        return Finding(group.what, found)
    needed = group.use == "always" or group.use == "on GPUs" and gpus_wanted()
    lacks = f"not installed: {', '.join(missing)} (needed {group.use})"
    return Finding(group.what, "; ".join(filter(None, (found, lacks))), install(group.extra), optional=not needed)


def version_of(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def library_of(name):
    """Where the library of a package is, if a CUDA toolkit has brought it instead; else None."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
        return load_nvidia_dynamic_lib(LIBRARIES[name]).abs_path
    except (ImportError, KeyError, RuntimeError):                # RuntimeError: it is nowhere
        return None


def has_driver():
    """Whether there is an NVIDIA driver."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True


def gpus_wanted():
    """Whether a Buffer should use GPUs here: there is a driver, and PYEP_DEVICE does not say cpu."""
    return has_driver() and os.environ.get("PYEP_DEVICE", "").lower() != "cpu"


def mpi(comm):
    """The MPI library and its thread level."""
    try:
        from mpi4py import MPI

        from ..channels.host_ports import GET_MULTIPLE, thread_level
    except (ImportError, RuntimeError) as error:                 # RuntimeError: there is no MPI library
        return Finding("MPI", f"does not start: {error} (torch.distributed groups do without)",
                       f"{install('mpi')}; or install Open MPI or MPICH", optional=version_of("torch") is not None)
    level = thread_level()
    name, version = MPI.get_vendor()
    found = f"{name} {'.'.join(map(str, version))}, thread level {level}, {comm.size} rank{'s' * (comm.size > 1)}"
    if level == "MULTIPLE":
        return Finding("MPI", found)
    return Finding("MPI", f"{found} (ports of the CPU engine need MULTIPLE)", GET_MULTIPLE, optional=True)


def mscclpp():
    """MSCCL++ and the layout of its handles."""
    use = "(needed between nodes of GPUs)"
    try:
        package = mscclpp_package.load()
    except mscclpp_package.UnusablePackage as error:
        return Finding("MSCCL++", f"{error.what} {use}", error.fix, optional=True)
    sizes = mscclpp_package.handle_sizes(package)
    return Finding("MSCCL++", f"{package.version}, PortChannel handles of {sizes[0]} bytes, MemoryChannel handles of {sizes[1]}")


def settings():
    """The environment variables that are set."""
    names = sorted(name for name in os.environ if name.startswith(VARIABLES))
    return [Finding(name, os.environ[name]) for name in names] or [Finding("variables", "none of PYEP_... and MSCCLPP_... is set")]
