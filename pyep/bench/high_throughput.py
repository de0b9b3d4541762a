"""`python -m pyep bench ht`: high-throughput layout, dispatch (with and without the exchange of counts), combine, and the period of
both."""
from typing import NamedTuple

from ..buffer import Buffer
from .benchmark import Benchmark
from .high_throughput_operations import Operations
from .options import require_blocks


class Point(NamedTuple):
    """One shape to measure, and within how many SMs."""

    tokens: int                         # of every rank
    hidden: int
    topk: int
    experts: int                        # of all ranks together
    num_sms: int | None                 # of a dispatch or combine; the CPU engine has none


class HighThroughput(Benchmark):
    """`bench ht`: the layout, dispatch with and without the exchange of counts, combine, and pairs."""

    name, title = "ht", "high-throughput dispatch and combine"
    defaults = Point(tokens=4096, hidden=7168, topk=8, experts=256, num_sms=Buffer.num_sms)
    environment = {name: f"MSCCLPP_EP_BENCH_{name.upper()}" for name in ("tokens", "hidden", "topk", "experts")}
    environment["num_sms"] = "MSCCLPP_EP_NUM_SMS"
    iterations = {"cuda": 50, "cpu": 1}
    rows = {"layout": (), "dispatch": ("dispatch",), "dispatch + exchange": ("dispatch",), "combine": ("combine",),
            "pair": ("dispatch", "combine")}
    host_rows = "layout", "dispatch", "dispatch + exchange", "dispatch, worst case", "combine", "pair"
    options = ("dtype",)
    legend = """\
layout      {iterations} get_dispatch_layout in a row
dispatch    {iterations} with the handle of an earlier one: only tokens move
+ exchange  {iterations} without: ranks tell each other their counts first; then (eager) the host waits for them, or (graph) room is
            for the worst case
combine     {iterations} of one dispatch's output; pair: a dispatch + exchange and its combine"""

    def add_options(self, add):
        add("--dtype", choices=("bf16", "fp8"), default="bf16", help="of dispatched tokens; fp8: e4m3 and its scales; combine is "
            "bf16 (default: %(default)s)")

    def complete(self, args):
        if args.dtype == "fp8":
            require_blocks(args, 128, "--dtype fp8")
        if args.engine == "cpu":
            if args.num_sms or "num_sms" in dict(args.sweep):
                raise ValueError("--num-sms needs a GPU: the CPU engine has no SMs")
            args.points = [point._replace(num_sms=None) for point in args.points]

    def operation(self, args):
        return f"dispatch {args.dtype}, combine bf16"

    def make_buffer(self, point, args, comm):
        size = Buffer.get_high_throughput_size_hint(point.tokens, point.hidden, comm.size, point.topk, num_results=held(args))
        return Buffer(comm=comm, num_nvl_bytes=size, transport=args.transport)

    def make_operations(self, buf, library, point, args):
        return Operations(buf, library, point, args)


def held(args):
    """BF16 results that are held at a time: of the dispatch whose handle is used, and of the latest.  Operations in graphs have
    memory of their own, for as much; and results for the worst case are larger."""
    return 4 if {"graph", "host"} & {*args.modes} else 2
