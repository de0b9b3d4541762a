"""`python -m pyep bench ll`: low-latency dispatch, combine, and the period of both."""
from typing import NamedTuple

from ..buffer import Buffer
from .benchmark import Benchmark
from .low_latency_operations import Operations
from .options import require_blocks


class Point(NamedTuple):
    """One shape to measure."""

    tokens: int                         # of every rank
    hidden: int
    topk: int
    experts: int                        # of all ranks together


class LowLatency(Benchmark):
    """`bench ll`: dispatch and combine by themselves, and in pairs."""

    name, title = "ll", "low-latency dispatch and combine"
    defaults = Point(tokens=128, hidden=7168, topk=8, experts=256)
    environment = {name: f"MSCCLPP_EP_LL_{name.upper()}" for name in ("tokens", "hidden", "topk", "experts_per_rank")}
    iterations = {"cuda": 50, "cpu": 10}
    rows = {"dispatch": ("dispatch",), "combine": ("combine",), "pair": ("dispatch", "combine")}
    host_rows = tuple(rows)
    options = "dtype", "round_scale", "ue8m0", "layout", "combine"
    legend = ("dispatch    {iterations} in a row; combine: {iterations} that reuse one dispatch output; "
              "pair: a dispatch and its combine")

    def add_options(self, add):
        add("--dtype", choices=("bf16", "fp8"), default="bf16", help="of dispatched tokens; combine is bf16 (default: %(default)s)")
        add("--round-scale", action="store_true", help="fp8: scales are powers of two")
        add("--ue8m0", action="store_true", help="fp8: scales are packed exponents (needs --round-scale)")
        add("--layout", choices=("expert-major", "rank-major"), default="expert-major", help="default: %(default)s")
        add("--combine", choices=("direct", "reduced"), help="expert-major: every output travels, or the weights travel with "
            "dispatch and one sum per rank comes back (default: direct); rank-major is always reduced")

    def complete(self, args):
        args.combine = args.combine or ("reduced" if args.layout == "rank-major" else "direct")
        if args.layout == "rank-major" and args.combine == "direct":
            raise ValueError("--combine direct needs --layout expert-major: rank-major returns one sum per rank")
        if (args.round_scale or args.ue8m0) and args.dtype != "fp8":
            raise ValueError("--round-scale and --ue8m0 need --dtype fp8")
        if args.ue8m0 and not args.round_scale:
            raise ValueError("--ue8m0 needs --round-scale: only a power of two is an exponent")
        block = {"bf16": 8, "fp8": 512 if args.ue8m0 else 128}[args.dtype]
        require_blocks(args, block, f"--dtype {args.dtype}{' --ue8m0' * args.ue8m0}")

    def operation(self, args):
        dtype = args.dtype + " round-scale" * args.round_scale + " ue8m0" * args.ue8m0
        return f"dispatch {dtype}, {args.layout}; combine bf16, {args.combine}"

    def make_buffer(self, point, args, comm):
        size = Buffer.get_low_latency_rdma_size_hint(point.tokens, point.hidden, comm.size, point.experts, num_topk=point.topk)
        return Buffer(comm=comm, num_rdma_bytes=size, low_latency_mode=True, transport=args.transport)

    def make_operations(self, buf, library, point, args):
        return Operations(buf, library, point, args)
