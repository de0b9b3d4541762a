"""InfiniBand, as MSCCL++ uses it: which adapter (HCA) a rank takes, and the settings of its connections."""
import os
from pathlib import Path
from typing import NamedTuple

from ..errors import EPTransportError

SYSFS = Path("/sys/class/infiniband")
MAX_ADAPTERS = 8                        # that MSCCL++ tells apart: Transport.IB0 to IB7
SETTINGS = "port", "gid_index", "max_cq_size", "max_cq_poll_num", "max_send_wr", "max_recv_wr", "max_wr_per_send"


class Port(NamedTuple):
    """A port of an adapter, in the kernel's words: for instance "mlx5_0", 1, "ACTIVE", "InfiniBand", "400 Gb/sec (4X NDR)"."""

    adapter: str
    number: int
    state: str
    link: str
    rate: str


def ports():
    """All `Port`s of this host."""
    found = []
    for path in sorted(SYSFS.glob("*/ports/*")):
        def read(name, path=path):
            try:
                return (path / name).read_text().strip()
            except OSError:
                return "unknown"
        found.append(Port(path.parts[-3], int(path.name), read("state").rpartition(": ")[2], read("link_layer"), read("rate")))
    return found


def adapters():
    """Names of the adapters that ranks are dealt to: MSCCLPP_HCA_DEVICES, or all that this host has."""
    listed = [name.strip() for name in os.environ.get("MSCCLPP_HCA_DEVICES", "").split(",") if name.strip()]
    present = sorted(path.name for path in SYSFS.glob("*"))
    missing = [name for name in listed if name not in present]
    if missing:
        raise EPTransportError(f"MSCCLPP_HCA_DEVICES names {', '.join(missing)}, but this host has {', '.join(present) or 'none'} "
                               f"({SYSFS})")
    return listed or present


def choose(local_rank):
    """The index of the adapter of a rank, by its index in its node: MSCCL++'s Transport.IB<index>.

    MSCCL++ takes the i-th name of MSCCLPP_HCA_DEVICES, or the i-th adapter in the order of libibverbs.
    """
    names = adapters()
    if not names:
        raise EPTransportError(f"ranks of other hosts are reached by InfiniBand, but this host has no adapter ({SYSFS} is empty): "
                               "see `ibv_devices`; in a container, pass /dev/infiniband to it")
    return local_rank % min(len(names), MAX_ADAPTERS)


def settings():
    """PYEP_IB as a dict: what it changes in the settings of connections, for instance "port=2,max_cq_size=4096"."""
    found = {}
    for item in filter(None, os.environ.get("PYEP_IB", "").split(",")):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in SETTINGS or not value.removeprefix("-").isdecimal():
            raise ValueError(f"PYEP_IB is {os.environ['PYEP_IB']!r}; expected name=number,name=number.. with names of "
                             f"{', '.join(SETTINGS)}")
        found[name] = int(value)
    return found
