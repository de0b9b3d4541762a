"""Where the boxes of a rank are, behind all else in the symmetric memory: see `pyep.layout` for what is in them.

For each port peer a rank has an *outbox*, where what goes to it is packed, and an *inbox*, where what comes from it arrives; both
twice, by parity of the epoch.
"""
from .layout import LINE, MAX_LOCAL_EXPERTS, WORD, align, stack


def box_bytes(half_bytes):
    """Bytes of a box that is large enough for every shape that fits halves of so many, whatever the number of ranks.

    A packet's header is as long as a row of 16 bytes, but a slot has more than that beside its row.  In a combine it adds at most
    half to rows of 32 bytes or more, and outputs of 16 bytes are less than half of the slots.
    """
    return align(3 * half_bytes // 2 + WORD * (3 + MAX_LOCAL_EXPERTS) + 4 * LINE)


def boxes(start, peers, half_bytes):
    """The boxes of a rank that has so many port peers, from byte `start` on."""
    item = box_bytes(half_bytes)
    return stack(start,
                  ("outbox", ("parity", "peer"), (2, peers), item, "this rank"),
                  ("inbox", ("parity", "peer"), (2, peers), item, "peer"))


def most_port_peers(node_of):
    """The most ranks of other nodes that any rank has; node_of: [R] the node of each rank."""
    return max(sum(node != mine for node in node_of) for mine in node_of)


def box_table(node_of, me, start, half_bytes):
    """The words of `boxes` in the control memory of rank `me`: a list [2][R][4], zeros for ranks of its own node."""
    peers = most_port_peers(node_of)
    outbox, inbox = boxes(start, peers, half_bytes)

    def offset(region, parity, rank, other):
        """Of the box in the memory of `rank` that is for or from `other`."""
        before = sum(node != node_of[rank] for node in node_of[:other])
        return region.offset + (parity * peers + before) * region.item

    def entry(parity, other):
        if node_of[other] == node_of[me]:
            return [0] * 4
        return [offset(outbox, parity, me, other), offset(inbox, parity, me, other), offset(inbox, parity, other, me), 0]
    return [[entry(parity, other) for other in range(len(node_of))] for parity in (0, 1)]
