"""The options of `python -m pyep bench ll`, their defaults, and which of them go together."""
import argparse
import contextlib
import importlib.util
import itertools
import math
import os
from pathlib import Path
from typing import NamedTuple

from ..checks import check_shape
from ..choices import TRANSPORTS, choose_device, choose_transport
from ..errors import EPTransportError

DESCRIPTION = """Latency and bandwidth of low-latency dispatch and combine, over all ranks of mpiexec.  docs/benchmark.md says
what each figure means.  Environment variables named below are defaults; options win."""


class Point(NamedTuple):
    """One shape to measure."""

    tokens: int                         # of every rank
    hidden: int
    topk: int
    experts: int                        # of all ranks together


DEFAULTS = Point(tokens=128, hidden=7168, topk=8, experts=256)
ENVIRONMENT = {name: f"MSCCLPP_EP_LL_{name.upper()}" for name in ("tokens", "hidden", "topk", "experts_per_rank")}
ARRAYS = {"cpu": ("numpy", "torch"), "cuda": ("cupy", "torch")}  # by engine; the first is the default
LINK_GBPS = 450.0                                                # NVLink 4, one direction of one GPU
PACKAGES = {"tabulate": "the table", "tqdm": "the progress bar", "matplotlib": "--plot"}         # the extra `bench`


def whole(text, least=1):
    """A whole number of at least `least`."""
    with contextlib.suppress(ValueError):
        if int(text) >= least:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")


def speed(text):
    """A number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def sweep(text):
    """("tokens", [1, 2, 4]) of "tokens=1,2,4"."""
    name, _, values = text.partition("=")
    if name not in Point._fields:
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=N,N,... with NAME one of {', '.join(Point._fields)}")
    return name, [whole(value) for value in values.split(",")]


def add_arguments(parser):
    _add_shape(parser.add_argument_group("shape"))
    _add_operation(parser.add_argument_group("operation"))
    _add_method(parser.add_argument_group("method"))
    _add_output(parser.add_argument_group("output"))


def _add_shape(group):
    words = {"tokens": "tokens of each rank", "hidden": "values of a token", "topk": "experts that a token selects"}
    for name, what in words.items():
        default = getattr(DEFAULTS, name)
        group.add_argument(f"--{name}", type=whole, metavar="N", help=f"{what} (default: {ENVIRONMENT[name]}, or {default})")
    experts = group.add_mutually_exclusive_group()
    experts.add_argument("--experts", type=whole, metavar="N", help=f"experts in all (default: {DEFAULTS.experts})")
    experts.add_argument("--experts-per-rank", type=whole, metavar="N",
                         help=f"or experts of each rank (default: {ENVIRONMENT['experts_per_rank']})")
    group.add_argument("--sweep", type=sweep, action="append", default=[], metavar="NAME=N,N,...",
                       help=f"measure each of these values of {', '.join(Point._fields)}; several sweeps give all combinations")


def _add_operation(group):
    add = group.add_argument
    add("--dtype", choices=("bf16", "fp8"), default="bf16", help="of dispatched tokens; combine is bf16 (default: %(default)s)")
    add("--round-scale", action="store_true", help="fp8: scales are powers of two")
    add("--ue8m0", action="store_true", help="fp8: scales are packed exponents (needs --round-scale)")
    add("--layout", choices=("expert-major", "rank-major"), default="expert-major", help="default: %(default)s")
    add("--combine", choices=("direct", "reduced"), help="expert-major: every output travels, or the weights travel with dispatch "
        "and one sum per rank comes back (default: direct); rank-major is always reduced")
    add("--transport", choices=("auto", *TRANSPORTS), default="auto", help="default: %(default)s")
    add("--array", choices=sorted({name for names in ARRAYS.values() for name in names}),
        help="the library of inputs and results (default: cupy on GPUs, numpy on the CPU)")


def _add_method(group):
    add = group.add_argument
    add("--mode", choices=("eager", "graph", "both"), help="one call after the other, or one CUDA graph of them (default: both on "
        "GPUs, eager on the CPU)")
    add("--iterations", type=whole, metavar="N", help="operations in a graph, or in a row (default: 50 on GPUs, 10 on the CPU)")
    add("--repeats", type=whole, default=11, metavar="N", help="of the graph or the row; the median counts (default: %(default)s)")
    add("--warm-up", type=whole, default=3, metavar="N", help="repeats before, which do not count (default: %(default)s)")
    add("--seed", type=lambda text: whole(text, 0), default=0, metavar="N", help="of all random values (default: %(default)s)")
    add("--check", action="store_true", help="compare the results with the oracle first; exit status 1 if they differ")
    add("--link-gbps", type=speed, metavar="X", help="what a rank's link carries in one direction, for the bound (default: "
        f"{LINK_GBPS:g} on GPUs; the CPU's bound is a memcpy, measured)")


def _add_output(group):
    group.add_argument("--json", metavar="FILE", help="write all figures to FILE; - is stdout, and the table goes to stderr")
    group.add_argument("--plot", metavar="FILE", help="draw latency and bandwidth over the first --sweep (PNG)")


def complete(args, num_ranks):
    """Fill in what depends on the machine, the environment and other options; ValueError where options do not fit."""
    require_packages(["tabulate", "tqdm"] + ["matplotlib"] * bool(args.plot))
    try:
        args.engine = choose_device()
        args.transport_name = choose_transport(args.transport, args.engine).name
    except EPTransportError as error:
        raise ValueError(str(error)) from error
    args.array = args.array or ARRAYS[args.engine][0]
    on_gpu = args.engine == "cuda"
    mode = args.mode or ("both" if on_gpu else "eager")
    args.modes = ["eager", "graph"] if mode == "both" else [mode]
    args.combine = args.combine or ("reduced" if args.layout == "rank-major" else "direct")
    args.iterations = args.iterations or (50 if on_gpu else 10)
    args.link_gbps = args.link_gbps or (LINK_GBPS if on_gpu else None)
    args.points = points(args, num_ranks)
    check_together(args)


def require_packages(names):
    """ValueError that says what to install, for packages that are missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{PACKAGES[name]} needs the package {name}, which is not installed: pip install 'pyep[bench]'")


def points(args, num_ranks):
    """Every shape to measure: all combinations of the sweeps."""
    sweeps = dict(args.sweep)
    if len(sweeps) < len(args.sweep):
        raise ValueError("--sweep names a quantity twice; give all its values at once: --sweep tokens=1,2,4")
    fixed = default_point(args, num_ranks)
    found = [Point(*values) for values in itertools.product(*(sweeps.get(name, [getattr(fixed, name)]) for name in Point._fields))]
    for point in found:
        check_shape(point.tokens, point.hidden, num_ranks, point.experts, point.topk, topk_name="--topk")
    return found


def default_point(args, num_ranks):
    """What is not swept: the options, else the environment, else DEFAULTS."""
    tokens, hidden, topk = (getattr(args, name) or from_environment(name) or getattr(DEFAULTS, name)
                            for name in ("tokens", "hidden", "topk"))
    if args.experts:
        return Point(tokens, hidden, topk, args.experts)
    per_rank = args.experts_per_rank or from_environment("experts_per_rank")
    return Point(tokens, hidden, topk, per_rank * num_ranks if per_rank else DEFAULTS.experts)


def from_environment(name):
    """The number in the environment variable for `name`, or None."""
    text = os.environ.get(ENVIRONMENT[name])
    if not text:
        return None
    try:
        return whole(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"environment variable {ENVIRONMENT[name]}: {error}") from None


def check_together(args):
    """ValueError for options that do not fit each other or this machine."""
    if args.array not in ARRAYS[args.engine]:
        raise ValueError(f"--array {args.array} is not for the {args.engine} engine; expected {' or '.join(ARRAYS[args.engine])}")
    if "graph" in args.modes and args.engine == "cpu":
        raise ValueError(f"--mode {args.mode} needs a GPU: the CPU engine has no graphs")
    if args.layout == "rank-major" and args.combine == "direct":
        raise ValueError("--combine direct needs --layout expert-major: rank-major returns one sum per rank")
    if (args.round_scale or args.ue8m0) and args.dtype != "fp8":
        raise ValueError("--round-scale and --ue8m0 need --dtype fp8")
    if args.ue8m0 and not args.round_scale:
        raise ValueError("--ue8m0 needs --round-scale: only a power of two is an exponent")
    block = {"bf16": 8, "fp8": 512 if args.ue8m0 else 128}[args.dtype]
    for hidden in {point.hidden for point in args.points}:
        if hidden % block:
            raise ValueError(f"--hidden {hidden} is not a multiple of {block}, as --dtype {args.dtype}"
                             f"{' --ue8m0' * args.ue8m0} needs")
    if args.plot and not args.sweep:
        raise ValueError("--plot draws over a swept quantity: add --sweep, for instance --sweep tokens=1,2,4,8")
    for file in (args.json, args.plot):
        if file and not Path(file).resolve().parent.is_dir():
            raise ValueError(f"{file}: its folder does not exist")
