"""The options that all benchmarks have, what they default to, and which of them go together."""
import argparse
import contextlib
import functools
import importlib.util
import math
from pathlib import Path

from ..choices import TRANSPORTS, choose_device, choose_transport, install
from ..errors import EPTransportError
from .points import points, sweep, whole

DESCRIPTION = """Latency and bandwidth of {}, over all ranks of mpiexec.  docs/benchmark.md says what each figure means.
Environment variables named below are defaults; options win."""
WORDS = {"tokens": "tokens of each rank", "hidden": "values of a token", "topk": "experts that a token selects",
         "experts": "experts in all", "experts_per_rank": "or experts of each rank", "num_sms": "SMs of a dispatch or combine"}
METHOD = "iterations", "repeats", "warm_up", "seed", "check", "link_gbps"                        # for the JSON
ARRAYS = {"cpu": ("numpy", "torch"), "cuda": ("cupy", "torch")}  # by engine; the first is the default
MODES = {"eager": ["eager"], "graph": ["graph"], "host": ["host"], "both": ["eager", "graph"], "all": ["eager", "graph", "host"]}
LINK_GBPS = 450.0                                                # NVLink 4, one direction of one GPU
PACKAGES = {"tabulate": "the table", "tqdm": "the progress bar", "matplotlib": "--plot"}         # the extra `bench`


def speed(text):
    """A number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def libraries(text):
    """["cupy", "torch"] of "cupy,torch"."""
    known, names = sorted({name for names in ARRAYS.values() for name in names}), text.split(",")
    for name in names:
        if name not in known or names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{text!r}; expected some of {', '.join(known)}, each once")
    return names


def add_arguments(parser, benchmark):
    _add_shape(parser.add_argument_group("shape"), benchmark)
    _add_operation(parser.add_argument_group("operation"), benchmark)
    _add_method(parser.add_argument_group("method"), benchmark)
    _add_output(parser.add_argument_group("output"))


def _add_shape(group, benchmark):
    experts = group.add_mutually_exclusive_group()

    def add(parent, name, default):
        default = ", or ".join(filter(None, (benchmark.environment.get(name), default)))
        parent.add_argument(option(name), type=whole, metavar="N", help=f"{WORDS[name]} (default: {default})")
    for name, value in benchmark.defaults._asdict().items():
        add(experts if name == "experts" else group, name, str(value))
        if name == "experts":
            add(experts, "experts_per_rank", "--experts")
    fields = benchmark.defaults._fields
    group.add_argument("--sweep", type=functools.partial(sweep, fields), action="append", default=[], metavar="NAME=N,N,...",
                       help=f"measure each of these values of {', '.join(fields)}; several sweeps give all combinations")


def option(name):
    """How a quantity is called on the command line."""
    return f"--{name.replace('_', '-')}"


def _add_operation(group, benchmark):
    add = group.add_argument
    benchmark.add_options(add)
    add("--transport", choices=("auto", *TRANSPORTS), default="auto", help="default: %(default)s")
    add("--arrays", type=libraries, metavar="NAME,...", help="the libraries of inputs and results, one after the other: cupy and "
        "torch on GPUs, numpy and torch on the CPU (default: the first)")


def _add_method(group, benchmark):
    add, iterations = group.add_argument, benchmark.iterations
    add("--mode", choices=MODES, help="one call after the other (eager), one CUDA graph of them (graph), the time of the host for "
        "a call (host) (default: all on GPUs, eager on the CPU)")
    add("--iterations", type=whole, metavar="N", help="operations in a graph, or in a row (default: "
        f"{iterations['cuda']} on GPUs, {iterations['cpu']} on the CPU)")
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
        choose_transport(args.transport, args.engine)            # for its errors: "auto" depends on the nodes
    except EPTransportError as error:
        raise ValueError(str(error)) from error
    on_gpu = args.engine == "cuda"
    args.arrays = args.arrays or [ARRAYS[args.engine][0]]
    args.modes = MODES[args.mode or ("all" if on_gpu else "eager")]
    args.iterations = args.iterations or args.benchmark.iterations[args.engine]
    args.link_gbps = args.link_gbps or (LINK_GBPS if on_gpu else None)
    args.points = points(args, num_ranks)
    check_together(args)
    args.benchmark.complete(args)


def require_packages(names):
    """ValueError that says what to install, for packages that are missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{PACKAGES[name]} needs the package {name}, which is not installed: {install('bench')}")


def check_together(args):
    """ValueError for options that do not fit each other or this machine, whatever is measured."""
    for name in args.arrays:
        if name not in ARRAYS[args.engine]:
            raise ValueError(f"--arrays {name} is not for the {args.engine} engine; expected {' or '.join(ARRAYS[args.engine])}")
    if args.modes != ["eager"] and args.engine == "cpu":
        raise ValueError(f"--mode {args.mode} needs a GPU: the CPU engine has no graphs, and its host does all the work")
    if args.plot and not args.sweep:
        raise ValueError("--plot draws over a swept quantity: add --sweep, for instance --sweep tokens=1,2,4,8")
    if args.plot and args.modes == ["host"]:
        raise ValueError("--plot draws what --mode eager and graph measure, but --mode is host")
    for file in (args.json, args.plot):
        if file and not Path(file).resolve().parent.is_dir():
            raise ValueError(f"{file}: its folder does not exist")


def require_blocks(args, block, why):
    """ValueError unless every hidden size that is asked for is a multiple of `block`."""
    for hidden in {point.hidden for point in args.points}:
        if hidden % block:
            raise ValueError(f"--hidden {hidden} is not a multiple of {block}, as {why} needs")
