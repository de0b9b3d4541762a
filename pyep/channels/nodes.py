"""Nodes: sets of ranks that map each other's memory.  Between nodes there are ports."""
import os
from typing import NamedTuple

from ..errors import EPTransportError
from .transport import host_identity


class Nodes(NamedTuple):
    """of: [R] the node of each rank, from 0 on.  rank: this rank."""

    of: tuple
    rank: int

    @property
    def count(self):
        """How many nodes there are."""
        return max(self.of) + 1

    @property
    def mine(self):
        """This rank's node."""
        return self.of[self.rank]

    @property
    def ranks(self):
        """The ranks of this rank's node, this rank among them."""
        return [r for r, node in enumerate(self.of) if node == self.mine]

    @property
    def local_rank(self):
        """This rank's index in its node."""
        return self.ranks.index(self.rank)

    def holds(self, rank):
        """Whether a rank is of this rank's node."""
        return self.of[rank] == self.mine


def find_nodes(bootstrap, timeout_s):
    """The `Nodes` of a group; collective.

    They are the hosts, numbered as they first appear by rank, unless PYEP_RANKS_PER_NODE=n cuts the ranks into runs of n: so that
    several nodes can be tried on one host.
    """
    told = bootstrap.allgather((host_identity(), ranks_per_node()), timeout_s, "Buffer: finding nodes")
    hosts, sizes = zip(*told)
    if len(set(sizes)) > 1:
        raise ValueError(f"PYEP_RANKS_PER_NODE differs between ranks: {list(sizes)}, by rank")
    if sizes[0] is None:
        numbers = {host: node for node, host in enumerate(dict.fromkeys(hosts))}
        return Nodes(tuple(numbers[host] for host in hosts), bootstrap.rank)
    nodes = Nodes(tuple(r // sizes[0] for r in range(len(hosts))), bootstrap.rank)
    for node in range(nodes.count):
        ranks = [r for r, n in enumerate(nodes.of) if n == node]
        if len({hosts[r] for r in ranks}) > 1:
            raise EPTransportError(f"PYEP_RANKS_PER_NODE={sizes[0]} makes a node of ranks {ranks}, which run on several hosts (or "
                                   "containers): leave it unset, or choose a number such that no node spans hosts")
    return nodes


def ranks_per_node():
    """PYEP_RANKS_PER_NODE, or None."""
    text = os.environ.get("PYEP_RANKS_PER_NODE")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"PYEP_RANKS_PER_NODE is {text!r}; expected a positive number of ranks")
    return int(text)
