"""Every kernel of a grid of shapes, modes and engines, to be compiled.  By hand:

    PYTHONPATH=.:tests python -m kernel_grid                             # how many there are: days of one core
    PYTHONPATH=.:tests python -m kernel_grid --kernels 0:2000            # compile the first ones, on all cores; then 2000:4000, ..

The grid has each mode with each top-k, each number of ranks and each engine.  What else there is to a shape is drawn for each of
these, by a seed; another seed draws others.  Kernels are in an order that is random and always the same, so any part is a sample of
the whole.
"""
import argparse
import itertools
import os
import random
import sys
import time
from typing import NamedTuple

from compiling import Job, compile_all
from launches import OnCpu, launches

from pyep.high_throughput import Kernels, Shape
from pyep.high_throughput_errors import COMBINE, DISPATCH
from pyep.kernels import cache
from pyep.kernels.low_latency_boxes import UNORDERED
from pyep.kernels.op import CUDA
from pyep.layout import DATA, LowLatency

TOPK, RANKS = range(1, 17), range(1, 9)
HIDDEN = 512, 2560, 4096, 7168                  # multiples of 512, for which every mode is possible
HIDDEN_OF_BF16 = 8, 64, 136, 5000, *HIDDEN
LOCAL_EXPERTS = 1, 2, 7, 32, 64
MAX_TOKENS = *range(1, 33), 128                 # on the CPU engine kernels do not depend on it
NUM_SMS = 2, 20, 24, 64
X = {                                           # of high throughput: rows and scales, and bytes of scales that are moved at a time
    "bf16": lambda hidden: (dict(), 0),
    "e4m3, fp32 scales": lambda hidden: (dict(dtype="float8_e4m3fn", scale_bytes=hidden // 32, scale_dtype="float32"), 4),
    "bytes, 8-bit scales": lambda hidden: (dict(dtype="uint8", scale_bytes=hidden // 32 - 1, scale_dtype="uint8"), 1),
    "bytes, 16-bit scales": lambda hidden: (dict(dtype="uint8", scale_bytes=hidden // 16 - 2, scale_dtype="bfloat16"), 2),
}
CPU = {f"CPU engine, {shape}": OnCpu(shape) for shape in ("1,1,1", "2,8,4")}


class Whose(NamedTuple):
    """A kernel of a shape: what a report says of it."""

    engine: str
    kernel: str
    shape: object
    options: dict

    def __str__(self):
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.engine}: {self.kernel} of {self.shape}, {options}"


def low_latency(draw, name, engine):
    """(`Whose`, launch) of all kernels of low latency on an engine."""
    for data, rank_major, weighted, topk, num_ranks in itertools.product(DATA, (False, True), (False, True), TOPK, RANKS):
        local = draw.choice([n for n in LOCAL_EXPERTS if n * num_ranks >= topk])
        hidden = draw.choice(HIDDEN if data != "bf16" else HIDDEN_OF_BF16)
        shape = LowLatency(num_ranks, draw.choice(MAX_TOKENS), hidden, local * num_ranks, topk, data, rank_major, weighted)
        options = dict(index_bytes=draw.choice((8, 4)), ports=draw.choice((0, 1, UNORDERED) if num_ranks > 1 else (0,)))
        for kernel, launch in launches(engine, shape, **options).items():
            yield Whose(name, f"low-latency {kernel}", shape, options), launch


def high_throughput(draw, name, engine):
    """The same of high throughput, where topk_idx may be None."""
    for x, weighted, topk, num_ranks in itertools.product(X, (False, True), (0, *TOPK), RANKS):
        counts = draw.choice(("exchanged", "worst") + ("cached",) * (topk == 0))
        hidden, local = draw.choice(HIDDEN if x != "bf16" else HIDDEN_OF_BF16), draw.choice(LOCAL_EXPERTS)
        of_x, scale_item = X[x](hidden)
        experts = 0 if counts == "cached" else local * num_ranks
        options = dict(index_bytes=draw.choice((8, 4)), scale_item=scale_item, num_sms=draw.choice(NUM_SMS))
        made = Kernels(engine, num_ranks)
        dispatch = Shape(DISPATCH, num_ranks, hidden, **of_x, num_topk=topk, weighted=weighted and topk > 0, num_experts=experts,
                         counts=counts)
        combine = Shape(COMBINE, num_ranks, hidden, num_topk=topk * weighted, weighted=weighted and topk > 0)
        for shape in dispatch, combine:
            for kernel, launch in made.of(shape, **options).items():
                yield Whose(name, f"high-throughput {kernel}", shape, options), launch
        if topk and experts:
            launch, _ = made.layout(experts, num_ranks, topk, options["index_bytes"], options["num_sms"])
            yield Whose(name, "high-throughput layout", dispatch, options), launch


def jobs_of(engines, seed=0):
    """All that is to be compiled, each kernel once, in random order.  engines: by name."""
    draw, jobs = random.Random(seed), {}
    for name, engine in engines.items():
        for whose, launch in itertools.chain(low_latency(draw, name, engine), high_throughput(draw, name, engine)):
            fn, machine = launch.fn, getattr(engine, "machine", CUDA)
            used = {constant: value for constant, value in launch.constants.items() if constant in cache.global_names(fn)}
            jobs.setdefault((name, fn, launch.threads, *sorted(used.items())),
                            Job(str(whose), fn, machine, launch.threads, launch.constants))
    jobs = list(jobs.values())
    draw.shuffle(jobs)
    return jobs


def engines(gpu=False):
    """By name; with gpu that of a GPU too, which need not be there."""
    if not gpu:
        return CPU
    os.environ.setdefault("PYEP_DEVICE", "cpu")                  # for the tests that are imported here
    from test_gpu_code import Gpu
    return CPU | {"GPU": Gpu()}


def main():
    parser = argparse.ArgumentParser(prog="kernel_grid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", help='which ones to compile, as "0:2000", or all as "0:"')
    parser.add_argument("--gpu", action="store_true", help="also those of GPUs, for which none is needed")
    parser.add_argument("--processes", type=int, help="as many as there are cores, if not given")
    given = parser.parse_args()
    jobs = jobs_of(engines(given.gpu), given.seed)
    if not given.kernels:
        print(f"{len(jobs)} kernels")
        return
    first, last = given.kernels.split(":")
    chosen, begin, count = jobs[int(first):int(last or len(jobs))], time.monotonic(), itertools.count(1)

    def note(job, error):
        n = next(count)
        if error:
            print(f"{job.name}\n{error}", flush=True)
        elif n % 20 == 0:
            print(f"{n} of {len(chosen)} after {time.monotonic() - begin:.0f} s", flush=True)
    wrong = compile_all(chosen, given.processes, note)
    print(f"{len(chosen)} of {len(jobs)} kernels: {len(wrong)} could not be compiled")
    sys.exit(len(wrong) > 0)


if __name__ == "__main__":
    main()
