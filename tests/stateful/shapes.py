"""The shapes and modes that are tried: few, as kernels are compiled for each; what is in them is random."""
import dataclasses
import itertools

import case
import high_throughput_case
import numpy as np

import pyep

from .promises import M_IS_COMPILED

# ---- low latency -------------------------------------------------------------------------------------------------------

# By kind of FP8: (max tokens, hidden, experts per rank, top-k), those of test_low_latency.py where they are small.
LL_SHAPES = {"": (8, 64, 4, 3), "fp8": (5, 128, 2, 2), "fp8_round": (5, 128, 2, 2), "fp8_ue8m0": (8, 1536, 4, 3)}
LL_FEWER = 5                            # another M of the first mode, where each compiles anew


def low_latency_modes(ranks, all_modes):
    """Of `case.MODES` those that test_low_latency.py has for so many ranks, or all."""
    return [mode for i, mode in enumerate(case.MODES)
            if all_modes or i == 0 or (i // 4 + i + 1 - ranks) % 4 == 0 and mode[0] != "fp8"]


def draw_low_latency(rng, ranks, all_modes):
    """A `case.Case`: any mode, any number of tokens up to M, any routing, any values."""
    modes = low_latency_modes(ranks, all_modes)
    mode = modes[rng.integers(len(modes))]
    most, hidden, per_rank, topk = LL_SHAPES[mode[0]]
    if not M_IS_COMPILED:
        most = int(rng.integers(1, most + 1))
    elif mode == case.MODES[0] and chance(rng, 0.3):
        most = LL_FEWER
    experts = per_rank * ranks
    return case.Case(draw_seed(rng), most, hidden, experts, min(topk, experts), draw_tokens(rng, ranks, most),
                     pick(rng, case.ROUTINGS), pick(rng, case.VALUES), np.int64, *mode)


def low_latency_bytes(ranks):
    """num_rdma_bytes with room for all of them."""
    return max(pyep.Buffer.get_low_latency_rdma_size_hint(most, hidden, ranks, per_rank * ranks, num_topk=topk)
               for most, hidden, per_rank, topk in LL_SHAPES.values())


# ---- high throughput ---------------------------------------------------------------------------------------------------

# Whether rows are FP8: (hidden, experts per rank, top-k), as in test_high_throughput.py.
HT_SHAPES = {False: (64, 4, 3), True: (128, 2, 2)}
HT_MOST_TOKENS = 48
# (FP8, what is carried, whether rows are for the worst), where not all of them are tried.
HT_MODES = ((False, "weights", False), (False, "indices", False), (False, "nothing", True), (True, "weights", False))
HT_ALL_MODES = tuple(itertools.product((False, True), high_throughput_case.CARRIED, (False, True)))


def draw_high_throughput(rng, ranks, all_modes):
    """A `high_throughput_case.Made`: any mode, any number of tokens, any routing, any values."""
    fp8, carried, worst = pick(rng, HT_ALL_MODES if all_modes else HT_MODES)
    hidden, per_rank, topk = HT_SHAPES[fp8]
    experts, tokens = per_rank * ranks, draw_tokens(rng, ranks, HT_MOST_TOKENS)
    routing, values = pick(rng, high_throughput_case.ROUTINGS), pick(rng, high_throughput_case.VALUES)
    drawn = high_throughput_case.Case(draw_seed(rng), tokens, hidden, experts, min(topk, experts), routing, values, np.int64, fp8,
                                      carried, pick(rng, (1, 4, 128)), stray=chance(rng, 0.2))
    return (drawn.with_room(int(rng.integers(8))) if worst else drawn).make()


def words_of(drawn, *more):
    """A case in words, without what is always the same; and what else is not empty."""
    fields = {f.name: getattr(drawn, f.name) for f in dataclasses.fields(drawn) if f.name not in ("seed", "index_dtype")}
    return in_brackets(*(f"{name} {value}" for name, value in fields.items() if value not in ("", (), False)), *more)


def in_brackets(*words):
    words = ", ".join(str(word) for word in words if str(word))
    return f" ({words})" if words else ""


# ---- what both draw ----------------------------------------------------------------------------------------------------

def draw_tokens(rng, ranks, most):
    """How many tokens each rank has: none and all of them often."""
    return tuple(int(t) for t in rng.choice((0, most, *rng.integers(0, most + 1, 4)), ranks))


def draw_seed(rng):
    return int(rng.integers(2**32))


def pick(rng, items):
    return items[rng.integers(len(items))]


def chance(rng, probability):
    return bool(rng.random() < probability)
