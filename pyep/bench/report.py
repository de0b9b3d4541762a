"""What rank 0 prints and writes: a table, JSON, a plot."""
import json
import sys
from pathlib import Path

from tabulate import tabulate

from .options import Point

OPERATIONS = "dispatch", "combine", "pair"
OPTIONS = "dtype", "round_scale", "ue8m0", "layout", "combine", "iterations", "repeats", "warm_up", "seed", "check", "link_gbps"
HEADERS = ("mode", "operation", "us\nmax", "us\navg", "us\nmin", "us\nspread", "us\nbound", "selections GB/s\nper rank",
           "selections GB/s\naggregate", "wire GB/s\nper rank", "wire GB/s\naggregate")
LEGEND = """\
us          of one operation: the median of a rank's repeats, then max, avg and min over ranks
spread      the slowest minus the fastest repeat of a rank, of the rank where it is largest
dispatch    {iterations} in a row; combine: {iterations} that reuse one dispatch output; pair: a dispatch and its combine
bound       {bound}
selections  bytes of all valid (token, expert) pairs, local ones too, / us max
wire        bytes that really cross to other ranks / us max"""


def write(args, machine, results):
    """Everything that was asked for."""
    table = sys.stderr if args.json == "-" else sys.stdout
    print(heading(args, machine), rows(args, results), legend(args), sep="\n\n", file=table, flush=True)
    if args.json:
        chosen = {name: getattr(args, name) for name in OPTIONS}
        text = json.dumps({"machine": machine, "options": chosen, "results": results}, indent=1)
        if args.json == "-":
            print(text, flush=True)
        else:
            Path(args.json).write_text(text + "\n")
    if args.plot:
        from .plot import draw                                   # matplotlib takes a second to import
        draw(args, machine, results)


def heading(args, machine):
    """Machine, versions and what all rows have in common."""
    devices = ", ".join(f"{name} ({count} ranks)" for name, count in machine["devices"].items())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    checked = "; results equal the oracle's, bit for bit" if args.check else ""
    return (f"Low-latency dispatch and combine, {machine['ranks']} ranks on {machine['hosts']} host(s)\n"
            f"engine      {args.engine} on {devices}, transport {args.transport_name}, {args.array} arrays\n"
            f"versions    {versions}\n"
            f"shape       {shape(args)}\n"
            f"operation   {operation(args)}{checked}\n"
            f"method      {args.repeats} repeats of {args.iterations} operations, after {args.warm_up} repeats to warm up")


def shape(args):
    """The shape in words; the values of what is swept stand elsewhere."""
    words = zip(Point._fields, ("{} tokens a rank", "hidden {}", "top-{}", "{} experts"), args.points[0])
    return ", ".join(f"{name} swept" if name in dict(args.sweep) else text.format(value) for name, text, value in words)


def operation(args):
    dtype = args.dtype + " round-scale" * args.round_scale + " ue8m0" * args.ue8m0
    return f"dispatch {dtype}, {args.layout}; combine bf16, {args.combine}"


def rows(args, results):
    """The table: a row for each point, mode and operation."""
    swept = list(dict(args.sweep))
    cells = [[*(result[name] for name in swept), result["mode"], name, *numbers(result[name])]
             for result in results for name in OPERATIONS]
    return tabulate(cells, [*swept, *HEADERS], floatfmt=".2f")


def numbers(figures):
    """The cells of an operation, in the order of HEADERS."""
    us, gbps = figures["latency_us"], figures["gbps"]
    return [us["max"], us["avg"], us["min"], us["spread"], figures["bound_us"],
            *(gbps[name][of] for name in ("selections", "wire") for of in ("per_rank", "aggregate"))]


def legend(args):
    bound = "memcpy of what the CPU engine copies, by all ranks at once, in this run"
    if args.link_gbps:
        bound = f"wire bytes of the busiest rank and direction / {args.link_gbps:g} GB/s"
    return LEGEND.format(iterations=args.iterations, bound=bound)
