"""Which engine and which transport a `Buffer` uses, from its arguments, the environment and what the machine has."""
import os

from .channels.transport import host_identity
from .errors import EPTransportError

TRANSPORTS = {"host": "cpu", "ipc": "cuda", "mscclpp": "cuda"}   # the engine that each serves


def choose_device():
    """"cpu" or "cuda": PYEP_DEVICE, or the GPU where one is visible."""
    device = os.environ.get("PYEP_DEVICE", "").lower()
    if device not in ("", "cpu", "cuda"):
        raise ValueError(f"PYEP_DEVICE is {device!r}; expected cpu or cuda")
    if device == "cpu":
        return "cpu"
    try:
        from .kernels import cuda
        if cuda.device_count() > 0:
            return "cuda"
    except ImportError as error:
        if device == "cuda":
            raise EPTransportError(f"PYEP_DEVICE=cuda needs the CUDA packages ({error}): {install('cuda')}") from error
    if device == "cuda":
        raise EPTransportError("PYEP_DEVICE=cuda, but the driver shows no GPU; see `nvidia-smi` and CUDA_VISIBLE_DEVICES")
    return "cpu"


def choose_engine(device, bootstrap, timeout_s):
    """The engine of this rank; collective.  A GPU is the caller's current one, else the rank's index on its host."""
    if device == "cpu":
        from .kernels.cpu import CpuEngine
        return CpuEngine()
    from .kernels import cuda
    hosts = bootstrap.allgather(host_identity(), timeout_s, "Buffer: finding the ranks of this host")
    local_rank = hosts[:bootstrap.rank].count(hosts[bootstrap.rank])
    current = cuda.current_device()
    return cuda.CudaEngine(local_rank % cuda.device_count() if current is None else current)


def choose_transport(name, device, num_nodes=1):
    """The class of a transport by name; "auto" is PYEP_TRANSPORT, or what serves the engine on so many nodes."""
    variable = "transport"
    if name == "auto" and os.environ.get("PYEP_TRANSPORT"):
        variable, name = "PYEP_TRANSPORT", os.environ["PYEP_TRANSPORT"]
    if name == "auto":
        name = "host" if device == "cpu" else "ipc" if num_nodes == 1 else "mscclpp"
    if name not in TRANSPORTS:
        raise ValueError(f"{variable} is {name!r}; expected \"auto\", {', '.join(map(quoted, TRANSPORTS))}")
    if TRANSPORTS[name] != device:
        serve = " or ".join(quoted(n) for n, engine in TRANSPORTS.items() if engine == device)
        raise EPTransportError(f"{variable} is {name!r}, which does not serve the {device} engine: that has {serve}")
    if name == "host":
        from .channels.host import HostTransport
        return HostTransport
    if name == "ipc":
        from .channels.ipc import IpcTransport
        return IpcTransport
    from .channels.mscclpp import MscclppTransport
    return MscclppTransport


def install(extra=""):
    """The command that installs pyep, with what an extra of it has: in a checkout, since it is in no package registry."""
    target = f"'.[{extra}]'" if extra else "."
    return f"pip install --editable {target}  # in a checkout of pyep"


def quoted(name):
    return f'"{name}"'
