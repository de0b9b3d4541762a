"""What rank 0 prints and writes: a table, JSON, a plot."""
import json
import sys
from pathlib import Path

from tabulate import tabulate

from .options import METHOD

WORDS = {"tokens": "{} tokens a rank", "hidden": "hidden {}", "topk": "top-{}", "experts": "{} experts", "num_sms": "{} SMs"}
HEADERS = ("mode", "operation", "us\nmax", "us\navg", "us\nmin", "us\nspread", "us\nbound", "selections GB/s\nper rank",
           "selections GB/s\naggregate", "wire GB/s\nper rank", "wire GB/s\naggregate")
LEGEND = """\
us          of one operation: the median of a rank's repeats, then max, avg and min over ranks{host}
spread      the slowest minus the fastest repeat of a rank, of the rank where it is largest
{rows}
bound       {bound}
selections  bytes of all valid (token, expert) pairs, local ones too, / us max
wire        bytes that really cross to other ranks / us max"""


HOST = """
host        what the host needs for a call, waiting for the GPU left out: of a repeat the median of its calls"""


def write(args, machine, results):
    """Everything that was asked for."""
    table = sys.stderr if args.json == "-" else sys.stdout
    print(heading(args, machine), rows(args, results), legend(args), sep="\n\n", file=table, flush=True)
    if args.json:
        chosen = {name: getattr(args, name) for name in (*args.benchmark.options, *METHOD)}
        found = {"benchmark": args.benchmark.name, "machine": machine, "options": chosen, "results": results}
        text = json.dumps(found, indent=1)
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
    title = args.benchmark.title.capitalize()
    return (f"{title}, {machine['ranks']} ranks on {machine['hosts']} host(s)\n"
            f"engine      {args.engine} on {devices}, transport {args.transport_name}, {' and '.join(args.arrays)} arrays\n"
            f"versions    {versions}\n"
            f"shape       {shape(args)}\n"
            f"operation   {args.benchmark.operation(args)}{checked}\n"
            f"method      {args.repeats} repeats of {args.iterations} operations, after {args.warm_up} repeats to warm up")


def shape(args):
    """The shape in words; the values of what is swept stand elsewhere."""
    fixed = {name: value for name, value in args.points[0]._asdict().items() if value is not None}
    return ", ".join(f"{name} swept" if name in dict(args.sweep) else WORDS[name].format(value) for name, value in fixed.items())


def rows(args, results):
    """The table: a row for each point, mode and operation."""
    swept = list(dict(args.sweep)) + ["array"] * (len(args.arrays) > 1)
    cells = [[*(result[name] for name in swept), result["mode"], name, *numbers(result[name])]
             for result in results for name in args.benchmark.rows_of(result["mode"])]
    return tabulate(cells, [*swept, *HEADERS], floatfmt=".2f")


def numbers(figures):
    """The cells of an operation, in the order of HEADERS; without bytes, only times."""
    us = [figures["latency_us"][name] for name in ("max", "avg", "min", "spread")]
    if "gbps" not in figures:
        return us
    gbps = (figures["gbps"][name][of] for name in ("selections", "wire") for of in ("per_rank", "aggregate"))
    return [*us, figures["bound_us"], *gbps]


def legend(args):
    bound = "memcpy of what the CPU engine copies, by all ranks at once, in this run"
    if args.link_gbps:
        bound = f"wire bytes of the busiest rank and direction / {args.link_gbps:g} GB/s"
    host = HOST * ("host" in args.modes)
    return LEGEND.format(host=host, rows=args.benchmark.legend.format(iterations=args.iterations), bound=bound)
