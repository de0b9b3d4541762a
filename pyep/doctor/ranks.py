"""Who the ranks are, what connects each with each, and how much memory an operation takes of them.  Collective."""
import collections
import platform
from typing import NamedTuple

from .. import layout, layout_boxes
from ..channels import infiniband, mscclpp_package, parting
from ..channels.boards import open_board
from ..channels.bootstrap import Bootstrap
from ..channels.nodes import find_nodes
from ..channels.reach import kinds_of, port_transport
from ..channels.transport import host_identity
from ..choices import choose_device, choose_transport
from ..errors import EPTransportError
from .finding import Finding, Section, examine
from .hardware import cuda_runtime

TIMEOUT_S = 30
SHAPE = 128, 7168, 256, 8               # DeepSeek-V3's, decoding: tokens of a rank, hidden, experts, top-k
MANY = 16                               # ranks above which the table of pairs is not printed
WORDS = {"shared": "memory that processes share", "mapped": "mapped GPU memory", "mpi": "a port, served by MPI",
         "ipc": "a port, served by CUDA IPC", "ib": "a port, served by InfiniBand", "none": "nothing: take transport mscclpp"}


class OneRankBootstrap:
    """As `Bootstrap`, for one rank, which need not have MPI."""

    rank, size = 0, 1

    def allgather(self, value, timeout_s, what):
        return [value]


class Rank(NamedTuple):
    """What a rank says of itself.  transport: what "auto" is there; kinds: how it reaches each rank, "self" or a key of WORDS;
    wrong: why there is neither."""

    host: str
    device: str = ""
    transport: str = ""
    kinds: tuple = ()
    wrong: str = ""


def look(comm):
    """The sections of this file, on every rank."""
    if comm.size == 1:
        return look_together(OneRankBootstrap())
    bootstrap = Bootstrap(open_board(None, comm), TIMEOUT_S)
    try:
        return look_together(bootstrap)
    finally:
        parting.leave(parting.Parting(bootstrap, []), 0)


def look_together(bootstrap):
    try:
        nodes = find_nodes(bootstrap, TIMEOUT_S)                 # fails on all ranks, or on none
    except (EPTransportError, ValueError) as error:
        return [Section("ranks", [Finding("nodes", "cannot be told", str(error))])]
    hosts = bootstrap.allgather(host_identity(), TIMEOUT_S, "doctor: comparing hosts")
    ranks = bootstrap.allgather(this_rank(hosts, nodes), TIMEOUT_S, "doctor: comparing transports")
    return [Section("ranks", [describe(rank, told, nodes) for rank, told in enumerate(ranks)]),
            Section("from each rank to each", pairs([told.kinds for told in ranks])),
            Section("memory", examine("low latency", memory, nodes))]


def this_rank(hosts, nodes):
    """The `Rank` that tells of this rank.  hosts: `host_identity` of each."""
    try:
        device = choose_device()
        name = choose_transport("auto", device, nodes.count).name
        where = gpu_of(hosts, nodes.rank) if device == "cuda" else "CPU"
        found = Rank(platform.node(), where, name, kinds(name, hosts, nodes))
        if name == "mscclpp":
            mscclpp_package.load()
        if "ib" in found.kinds:
            infiniband.choose(nodes.local_rank)
        return found
    except (EPTransportError, ValueError) as error:
        return Rank(platform.node(), wrong=str(error))


def gpu_of(hosts, rank):
    """The GPU that a Buffer takes where the program has chosen none."""
    _, count = cuda_runtime().cudaGetDeviceCount()
    return f"GPU {hosts[:rank].count(hosts[rank]) % count}"


def kinds(name, hosts, nodes):
    """How this rank reaches each rank over the transport of that name."""
    if name == "mscclpp":
        return tuple(kinds_of(hosts, nodes, port_transport()))
    near, far = ("shared", "mpi") if name == "host" else ("mapped", "none")
    return tuple("self" if rank == nodes.rank else near if nodes.holds(rank) else far for rank in range(len(hosts)))


def describe(rank, told, nodes):
    """told: the `Rank` of a rank."""
    found = f"host {told.host}, node {nodes.of[rank]}, "
    found += "no transport" if told.wrong else f"{told.device}, transport {told.transport}"
    return Finding(f"rank {rank}", found, told.wrong)


def pairs(kinds):
    """A table of who reaches whom by what; of many ranks only how many pairs there are of each kind."""
    if () in kinds or len(kinds) == 1:
        return []
    count = collections.Counter(kind for row in kinds for kind in row if kind != "self")
    legend = [Finding(kind, f"{WORDS[kind]} ({number} pairs)") for kind, number in count.items()]
    if len(kinds) > MANY:
        return legend
    rows = [["", *range(len(kinds))], *([rank, *row] for rank, row in enumerate(kinds))]
    lines = ["".join(f"{'.' if cell == 'self' else cell:>7}" for cell in row) for row in rows]
    return [Finding("pairs", "row reaches column through\n" + "\n".join(lines)), *legend]


def memory(nodes):
    """What a low-latency buffer of a usual shape takes on each rank."""
    tokens, hidden, experts, topk = SHAPE
    experts -= experts % len(nodes.of)
    ranks = len(nodes.of)
    nbytes = layout.low_latency_size_hint(tokens, hidden, ranks, experts, topk)
    *_, last = layout_boxes.boxes(nbytes, layout_boxes.most_port_peers(nodes.of), layout.half_capacity(nbytes, ranks))
    between = f", and {(last.end - nbytes) / 2**20:.0f} MiB for what travels between nodes" if nodes.count > 1 else ""
    return Finding("low latency", f"{nbytes / 2**20:.0f} MiB for {tokens} tokens a rank, hidden {hidden}, top-{topk} of {experts} "
                   f"experts: num_rdma_bytes={nbytes}{between}")
