"""`--check`: what operations returned against what the oracle says, bit for bit."""
import numpy as np
from ml_dtypes import float8_e4m3fn


class Difference(Exception):
    """The results are not those of the oracle.  Raised on every rank."""


def of_all_ranks(found, comm):
    """The sentences that each rank found: the same list on every rank; empty if all is well."""
    return [f"rank {rank}: {text}" for rank, texts in enumerate(comm.allgather(found)) for text in texts]


def compare(name, got, want):
    """No sentence if two NumPy arrays have the same type, shape and bits, else one."""
    if got.dtype == np.uint8 and want.dtype == float8_e4m3fn:
        got = got.view(want.dtype)                               # CuPy has no FP8: its bytes
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return [f"{name} is {got.dtype} {list(got.shape)}, the oracle's is {want.dtype} {list(want.shape)}"]
    integer = f"u{got.dtype.itemsize}"
    differ = np.ascontiguousarray(got).view(integer) != np.ascontiguousarray(want).view(integer)
    if not differ.any():
        return []
    first = tuple(np.argwhere(differ)[0].tolist())
    return [f"{differ.sum()} of {differ.size} values of {name} differ, first at {first}: {got[first]} instead of {want[first]}"]


def compare_parts(name, got, want, down, valid):
    """The same for tokens, which may be pairs of values and scales.  valid: the rows to look at; down: see `devices`."""
    pairs = zip(got, want) if isinstance(want, tuple) else [(got, want)]
    return [text for part, (ours, theirs) in zip((name, f"scales of {name}"), pairs)
            for text in compare(part, down(ours)[valid], theirs[valid])]
