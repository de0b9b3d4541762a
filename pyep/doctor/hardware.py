"""What this host has: NVIDIA driver, GPUs, how they reach each other, InfiniBand."""
import ctypes
import os
from pathlib import Path

from ..channels import infiniband
from ..choices import install
from .finding import Finding, Section, examine
from .software import DRIVER, gpus_wanted, has_driver

OLDEST_CUDA = 13000                     # of the driver: what nvidia-nvvm 13.0 writes PTX for
PEER_MEMORY = Path("/sys/module/nvidia_peermem")


def look():
    """The sections of this file."""
    return [Section("GPUs", gpu_findings()), Section("InfiniBand", examine("adapters", adapters))]


def gpu_findings():
    if not has_driver():
        return [Finding("driver", f"none ({DRIVER} is not there): the CPU engine is used")]
    return [*examine("driver", driver), *examine("GPUs", gpus), *examine("peer access", peer_access)]


def driver():
    """The newest CUDA that the driver serves."""
    version = ctypes.c_int()
    error = ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(version))
    if error:
        return Finding("driver", f"there, but cuDriverGetVersion fails with error {error}", "see `nvidia-smi`",
                       optional=not gpus_wanted())
    found = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if version.value < OLDEST_CUDA:
        fix = "install a driver of CUDA 13.0 or newer (release 580)"
        return Finding("driver", f"{found}; pyep needs 13.0", fix, optional=not gpus_wanted())
    return Finding("driver", found)


def gpus():
    """A line for each GPU that this process sees."""
    runtime = cuda_runtime()
    if runtime is None:
        return Finding("GPUs", "cannot be looked at without the package cuda-bindings", install("cuda"),
                       optional=not gpus_wanted())
    error, count = runtime.cudaGetDeviceCount()
    if error or not count:
        hidden = f" (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']})" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
        return Finding("GPUs", f"none is visible{hidden}", "see `nvidia-smi` and CUDA_VISIBLE_DEVICES", optional=not gpus_wanted())
    return [Finding(f"GPU {i}", describe(runtime, i)) for i in range(count)]


def cuda_runtime():
    """CUDA's runtime as a module, or None if the package is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    return runtime


def describe(runtime, index):
    """A GPU in words."""
    error, gpu = runtime.cudaGetDeviceProperties(index)
    if error:
        return f"cudaGetDeviceProperties fails: {error.name}"
    fp8 = "" if (gpu.major, gpu.minor) >= (8, 9) else ", cannot send FP8"
    return (f"{gpu.name.decode()}, {gpu.totalGlobalMem / 2**30:.0f} GiB, {gpu.multiProcessorCount} SMs, compute capability "
            f"{gpu.major}.{gpu.minor}{fp8}, PCI {gpu.pciDomainID:04x}:{gpu.pciBusID:02x}:{gpu.pciDeviceID:02x}")


def peer_access():
    """Which GPU can access which other's memory."""
    runtime = cuda_runtime()
    error, count = runtime.cudaGetDeviceCount() if runtime else (1, 0)
    if error or count < 2:
        return []
    can = [[i == j or bool(runtime.cudaDeviceCanAccessPeer(i, j)[1]) for j in range(count)] for i in range(count)]
    if all(map(all, can)):
        return Finding("peer access", f"all {count} GPUs access each other's memory")
    rows = ["".join(f"{j:>4}" for j in range(count)), *("".join(f"{'yes' if c else 'no':>4}" for c in row) for row in can)]
    table = "\n".join(f"{label:>3}{row}" for label, row in zip(["", *range(count)], rows))
    return Finding("peer access", f"row accesses column:\n{table}", "ranks of one node need it: see `nvidia-smi topo -p2p r`; or "
                   "put each on a node of its own, PYEP_RANKS_PER_NODE=1 PYEP_PORT_TRANSPORT=ib")


def adapters():
    """The ports of all InfiniBand adapters, and what MSCCL++ needs to use them for GPU memory."""
    ports = infiniband.ports()
    if not ports:
        return Finding("adapters", f"none ({infiniband.SYSFS} is empty): no ports to other hosts")
    found = [Finding(f"{p.adapter}/{p.number}", f"{p.state}, {p.link}, {p.rate}") for p in ports]
    if not any(p.state == "ACTIVE" for p in ports):
        found.append(Finding("adapters", "no port is active", "see `ibstat`: cable, subnet manager", optional=True))
    return [*found, *examine("libibverbs", libibverbs), *examine("peer memory", peer_memory)]


def libibverbs():
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return Finding("libibverbs", "not installed", "apt-get install libibverbs1 ibverbs-providers", optional=True)
    return Finding("libibverbs", "installed")


def peer_memory():
    """What lets an adapter read a GPU's memory: a kernel module, or the kernel's own dma-buf, which cannot be seen from here."""
    if PEER_MEMORY.exists():
        return Finding("peer memory", "the module nvidia_peermem is loaded")
    return Finding("peer memory", "the module nvidia_peermem is not loaded; with the open GPU kernel modules dma-buf does instead")
