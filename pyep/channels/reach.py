"""What connects a rank with each other rank, where GPUs are on several nodes."""
import os

from ..errors import EPTransportError

PORT_TRANSPORTS = "auto", "ipc", "ib"


def port_transport():
    """PYEP_PORT_TRANSPORT: what carries the puts to port peers, one of PORT_TRANSPORTS."""
    name = os.environ.get("PYEP_PORT_TRANSPORT") or "auto"
    if name not in PORT_TRANSPORTS:
        raise ValueError(f"PYEP_PORT_TRANSPORT is {name!r}; expected {', '.join(PORT_TRANSPORTS)}")
    return name


def kinds_of(hosts, nodes, setting):
    """How this rank reaches each: "self"; "mapped", of its node; "ipc" or "ib", through a port that CUDA IPC or InfiniBand serves.

    hosts: `host_identity` of each rank.  setting: "auto" takes CUDA IPC within a host and InfiniBand beyond; the others take one
    of them for all port peers.  EPTransportError where CUDA IPC does not reach.
    """
    kinds = [kind_of(rank, hosts, nodes, setting) for rank in range(len(hosts))]
    far = [rank for rank, kind in enumerate(kinds) if kind == "ipc" and hosts[rank] != hosts[nodes.rank]]
    if far:
        raise EPTransportError(f"PYEP_PORT_TRANSPORT=ipc, but ranks {far} run on other hosts (or in other containers) than rank "
                               f"{nodes.rank}, where CUDA IPC does not reach: set it to auto or ib")
    return kinds


def kind_of(rank, hosts, nodes, setting):
    """How this rank reaches one rank, see `kinds_of`."""
    if rank == nodes.rank:
        return "self"
    if nodes.holds(rank):
        return "mapped"
    if setting == "auto":
        return "ipc" if hosts[rank] == hosts[nodes.rank] else "ib"
    return setting
