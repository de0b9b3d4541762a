"""From times and bytes to the figures that are printed.  The definitions are in docs/benchmark.md."""
import numpy as np

from .traffic import Phase


def latency(us):
    """us: [R, repeats], microseconds of one operation.  The median of a rank's repeats, then over the ranks."""
    medians = np.median(us, axis=1)
    return {"max": float(medians.max()), "avg": float(medians.mean()), "min": float(medians.min()),
            "spread": float(np.ptp(us, axis=1).max()), "by_rank": medians.tolist()}


def bandwidth(nbytes, us):
    """nbytes: [R], what each rank moves in `us` microseconds.  GB/s of a rank on average, and of all ranks together."""
    total = float(nbytes.sum()) / us / 1e3
    return {"per_rank": total / len(nbytes), "aggregate": total}


def figures(us, phase, bound_us):
    """All figures of one operation: us [R, repeats], the `Phase` that it moves, the time that its bytes alone take."""
    over_ranks = latency(us)
    slowest = over_ranks["max"]
    return {"latency_us": over_ranks, "bound_us": bound_us,
            "gbps": {"selections": bandwidth(phase.selections, slowest), "wire": bandwidth(phase.sent, slowest)},
            "bytes": {"selections": phase.selections.tolist(), "sent": phase.sent.tolist(), "received": phase.received.tolist()}}


def of_all(times, phases, bounds_us):
    """The figures by operation.  times: by operation; phases, bounds_us: of dispatch and of combine; a pair is both in turn."""
    both = Phase(*(sum(bytes_of) for bytes_of in zip(*phases)))
    return {"dispatch": figures(times["dispatch"], phases[0], bounds_us[0]),
            "combine": figures(times["combine"], phases[1], bounds_us[1]),
            "pair": figures(times["pair"], both, sum(bounds_us))}
