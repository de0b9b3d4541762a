"""Which points to measure: from the options, the environment and the sweeps."""
import argparse
import contextlib
import itertools
import os

from ..checks import check_shape


def whole(text, least=1):
    """A whole number of at least `least`."""
    with contextlib.suppress(ValueError):
        if int(text) >= least:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")


def sweep(fields, text):
    """("tokens", [1, 2, 4]) of "tokens=1,2,4"."""
    name, _, values = text.partition("=")
    if name not in fields:
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=N,N,... with NAME one of {', '.join(fields)}")
    return name, [whole(value) for value in values.split(",")]


def points(args, num_ranks):
    """Every point to measure: all combinations of the sweeps."""
    sweeps = dict(args.sweep)
    if len(sweeps) < len(args.sweep):
        raise ValueError("--sweep names a quantity twice; give all its values at once: --sweep tokens=1,2,4")
    fixed = default_point(args, num_ranks)
    values = (sweeps.get(name, [value]) for name, value in fixed._asdict().items())
    found = [fixed._make(combination) for combination in itertools.product(*values)]
    for point in found:
        check_shape(point.tokens, point.hidden, num_ranks, point.experts, point.topk, topk_name="--topk")
    return found


def default_point(args, num_ranks):
    """What is not swept: the options, else the environment, else the benchmark's defaults."""
    def number(name):
        return getattr(args, name) or from_environment(args.benchmark.environment, name)

    def experts():
        if args.experts_per_rank:
            return args.experts_per_rank * num_ranks
        return number("experts") or num_ranks * (number("experts_per_rank") or 0)
    defaults = args.benchmark.defaults
    return defaults._make((experts() if name == "experts" else number(name)) or value for name, value in defaults._asdict().items())


def from_environment(variables, name):
    """The number in the environment variable for `name`; None if there is none."""
    text = os.environ.get(variables.get(name, ""))
    if not text:
        return None
    try:
        return whole(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"environment variable {variables[name]}: {error}") from None
