"""From times and bytes to the figures that are printed.  The definitions are in docs/benchmark.md."""
import numpy as np

from .traffic import total


def latency(us):
    """us: [R, repeats], microseconds of one operation.  The median of a rank's repeats, then over the ranks."""
    medians = np.median(us, axis=1)
    return {"max": float(medians.max()), "avg": float(medians.mean()), "min": float(medians.min()),
            "spread": float(np.ptp(us, axis=1).max()), "by_rank": medians.tolist()}


def bandwidth(nbytes, us):
    """nbytes: [R], what each rank moves in `us` microseconds.  GB/s of a rank on average, and of all ranks together."""
    aggregate = float(nbytes.sum()) / us / 1e3
    return {"per_rank": aggregate / len(nbytes), "aggregate": aggregate}


def figures(us, phase, bound_us):
    """All figures of one operation: us [R, repeats], the `Phase` that it moves, the time that its bytes alone take."""
    over_ranks = latency(us)
    slowest = over_ranks["max"]
    return {"latency_us": over_ranks, "bound_us": bound_us,
            "gbps": {"selections": bandwidth(phase.selections, slowest), "wire": bandwidth(phase.sent, slowest)},
            "bytes": {"selections": phase.selections.tolist(), "sent": phase.sent.tolist(), "received": phase.received.tolist()}}


def by_row(rows, times, phases, bounds_us):
    """The figures by row of the table.

    rows: by name, the names of the phases that a row moves, one after the other; without any there is only the latency.
    times: by row, [R, repeats].  phases, bounds_us: by phase.
    """
    return {name: figures(times[name], total([phases[part] for part in parts]), sum(bounds_us[part] for part in parts)) if parts
            else {"latency_us": latency(times[name])} for name, parts in rows.items()}
