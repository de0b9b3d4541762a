"""`--check`: what a dispatch and a combine returned against the oracle, bit for bit."""
import numpy as np

from .. import reference
from . import inputs


class Difference(Exception):
    """The results are not those of the oracle.  Raised on every rank."""


def differences(operations, args, comm):
    """What differs after a dispatch and a combine: sentences, the same on every rank; none if all is well."""
    dispatched, combined = expected(operations, args, comm)
    down = operations.library.down
    found = compare_dispatched(dispatched, operations.dispatched, down) + compare("combined_x", down(operations.out), combined)
    return [f"rank {rank}: {text}" for rank, texts in enumerate(comm.allgather(found)) for text in texts]


def expected(operations, args, comm):
    """What the oracle says that this rank holds: a `reference.Dispatched`, and combined_x [T, H]."""
    point, topk_idx = operations.point, operations.all_topk_idx
    shape = point.tokens, point.experts
    x = [inputs.tokens(point, args.seed, rank) for rank in range(comm.size)]
    weights = [inputs.weights(point, args.seed, rank) for rank in range(comm.size)]
    y = [inputs.outputs(point, args.layout, topk_idx, args.seed, rank) for rank in range(comm.size)]
    options = dict(operations.options, topk_weights=weights if args.combine == "reduced" else None)
    dispatched = reference.low_latency_dispatch(x, topk_idx, *shape, **options)
    if args.layout == "rank-major":
        combined = reference.low_latency_combine_rank_major(y, topk_idx, *shape)
    elif args.combine == "reduced":
        combined = reference.low_latency_combine_reduced(y, topk_idx, weights, *shape)
    else:
        combined = reference.low_latency_combine(y, topk_idx, weights, *shape)
    return dispatched[comm.rank], combined[comm.rank]


def compare_dispatched(want, got, down):
    """Sentences on what differs between the oracle's result and an operation's.  Rows that hold no token are not looked at."""
    counts = down(got.recv_count)
    found = compare("recv_count", counts, want.recv_count)
    if found:
        return found                                             # of other rows there is nothing to say
    valid = np.arange(want.src_info.shape[1]) < counts[:, None]  # [groups, rows]
    found += compare("src_info", down(got.handle[0])[valid], want.src_info[valid])
    found += compare("layout_range", down(got.handle[1]), want.layout_range)
    pairs = zip(got.recv_x, want.recv_x) if isinstance(want.recv_x, tuple) else [(got.recv_x, want.recv_x)]
    for name, (ours, theirs) in zip(("recv_x", "scales of recv_x"), pairs):
        found += compare(name, down(ours)[valid], theirs[valid])
    for name in ("recv_topk_idx", "recv_topk_weights"):
        if getattr(want, name) is not None:
            found += compare(name, down(getattr(got, name)), getattr(want, name))
    return found


def compare(name, got, want):
    """No sentence if two NumPy arrays have the same type, shape and bits, else one."""
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return [f"{name} is {got.dtype} {list(got.shape)}, the oracle's is {want.dtype} {list(want.shape)}"]
    integer = f"u{got.dtype.itemsize}"
    differ = np.ascontiguousarray(got).view(integer) != np.ascontiguousarray(want).view(integer)
    if not differ.any():
        return []
    first = tuple(np.argwhere(differ)[0].tolist())
    return [f"{differ.sum()} of {differ.size} values of {name} differ, first at {first}: {got[first]} instead of {want[first]}"]
