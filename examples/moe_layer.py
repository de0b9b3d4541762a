"""A Mixture-of-Experts layer over the bytes of a text file, its experts spread over the ranks.

    mpiexec -n 4 python -m mpi4py examples/moe_layer.py
    mpiexec -n 4 python -m mpi4py examples/moe_layer.py book.txt --preset mixtral-8x7b --scale 1/8 --tokens 64
    mpiexec -n 4 python -m mpi4py examples/moe_layer.py --preset deepseek-v3 --scale 1 --limit 4096       # on GPUs

Every byte becomes a token. Each rank takes a contiguous part of them and, batch after batch, asks the gate for the
experts of each token, dispatches, runs its own experts on what arrives, and combines. Rank 0 then computes the same
layer densely (all experts, no dispatch) and compares.
"""

import argparse
import collections
import contextlib
import math
import os
import time
import zlib
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

if "OMP_NUM_THREADS" not in os.environ:  # before NumPy is imported, for its BLAS: the ranks already fill the cores
    os.environ["OMP_NUM_THREADS"] = "1"

import ml_dtypes
import numpy as np

import pyep

BF16 = np.dtype(ml_dtypes.bfloat16)  # also CuPy's, since CuPy 14
xp = np  # the array module; use_engine() may change it

# Both layers round to bf16 at the same places. They differ where a float32 sum, taken in another order, falls on the
# other side of a rounding boundary: an activation or a result is then the next bf16 value, at most 2^-7 away from it.
# Two such steps are allowed, relative to the largest value of the token.
TOLERANCE = 2.0**-6


class Shape(NamedTuple):
    hidden: int
    experts: int
    topk: int
    inter: int


PRESETS = {
    "deepseek-v3": Shape(7168, 256, 8, 2048),
    "deepseek-v2-lite": Shape(2048, 64, 6, 1408),
    "qwen3-30b-a3b": Shape(2048, 128, 8, 768),
    "mixtral-8x7b": Shape(4096, 8, 2, 14336),
    "gpt-oss-20b": Shape(2880, 32, 4, 2880),
}


def scaled(shape, scale, ranks):
    """`shape` with hidden and intermediate size times `scale`, in multiples of 8; top-k and experts stay the model's.

    The number of experts is rounded up to a multiple of `ranks`.
    """
    hidden, inter = (max(8, round(size * scale / 8) * 8) for size in (shape.hidden, shape.inter))
    return Shape(hidden, math.ceil(shape.experts / ranks) * ranks, shape.topk, inter)


def use_engine(buf):
    """Sets `xp` to CuPy where pyep runs on GPUs."""
    global xp
    if buf.engine == "cuda":
        import cupy as xp


def synchronize():
    """Waits for the GPU."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def to_host(a):
    return a if isinstance(a, np.ndarray) else a.get()


def to_f32(a):
    """bf16 -> float32, exact: bf16 is the upper half of a float32."""
    return (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_bf16(a):
    """float32 (no NaN) -> bf16, to nearest, ties to even. By integers: the same bits in NumPy and in any CuPy."""
    bits = a.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(BF16)


def uniform(shape, std, name, start=0):
    """Random float32 `shape`, mean 0, exact in bf16: number i of the table `name` is a hash of (name, start + i).

    So any rank can make any part of any table, and gets the same bits on a GPU as on a CPU.
    """
    h = xp.arange(math.prod(shape), dtype=np.uint32) + np.uint32(start % 2**32)
    for salt in (0, zlib.crc32(name.encode())):
        h ^= np.uint32(salt)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the finalizer of MurmurHash3
            h ^= h >> shift
            h *= np.uint32(factor)
    a = (h >> 8).astype(np.float32) * 2.0**-23 - 1  # in [-1, 1), whose standard deviation is 1 / sqrt(3)
    return to_f32(to_bf16(a * (std * math.sqrt(3)))).reshape(shape)


def embed(data, first, hidden, seed):
    """Tokens [T, H] bf16 of the bytes `data` [T], the first of which is byte `first` of the file.

    The sum of a byte and a position embedding: no two tokens are equal, so that none can pass for another.
    """
    table = uniform((256, hidden), 0.8, f"{seed}/byte")
    return to_bf16(table[xp.asarray(data)] + uniform((len(data), hidden), 0.6, f"{seed}/position", first * hidden))


def make_gate(shape, seed):
    """The weights of the gate, [H, E]."""
    return uniform((shape.hidden, shape.experts), shape.hidden**-0.5, f"{seed}/gate").astype(np.float64)


def gate(x, weights, topk):
    """The experts of each token, topk_idx [T, K] int64, and their weights [T, K] float32, which sum to one.

    The scores are summed in float64, so that a token gets the same experts whatever batch it is in.
    """
    scores = (to_f32(x).astype(np.float64) @ weights).astype(np.float32)
    topk_idx = xp.ascontiguousarray(xp.argsort(-scores, axis=1, kind="stable")[:, :topk])
    # A sigmoid is flat where the best scores lie, above 2. Moved by 4, it gives the experts of a token unequal weights.
    sigmoid = 1 / (1 + xp.exp(4 - xp.take_along_axis(scores, topk_idx, axis=1)))
    return topk_idx, sigmoid / sigmoid.sum(axis=1, keepdims=True)


def make_expert(e, shape, seed):
    """The weights of expert `e`: gate [H, I], up [H, I] and down [I, H], float32 values exact in bf16."""
    h, i = shape.hidden, shape.inter
    parts = ("gate", (h, i)), ("up", (h, i)), ("down", (i, h))
    return [uniform(size, size[0] ** -0.5, f"{seed}/expert {e}/{name}") for name, size in parts]


def expert(x, weights):
    """SwiGLU of the rows `x` [n, H] bf16 -> [n, H] bf16; the activations [n, I] in between are rounded to bf16."""
    gate_weights, up_weights, down_weights = weights
    x = to_f32(x)
    g = x @ gate_weights
    activations = to_bf16(g / (1 + xp.exp(-g)) * (x @ up_weights))
    return to_bf16(to_f32(activations) @ down_weights)


def layer_dense(x, shape, seed):
    """The layer on one rank, `x` [N, H] bf16 -> [N, H] bf16: every expert in turn, on the tokens that chose it."""
    topk_idx, topk_weights = gate(x, make_gate(shape, seed), shape.topk)
    out = xp.zeros(x.shape, np.float32)
    for e in range(shape.experts):
        token, k = xp.nonzero(topk_idx == e)
        if len(token):  # the expert is made here and dropped again: one GPU may not hold all of them
            out[token] += topk_weights[token, k, None] * to_f32(expert(x[token], make_expert(e, shape, seed)))
    return to_bf16(out)


class ParallelLayer:
    """The same layer, its experts spread over the ranks of `comm`; a batch has at most `max_tokens` tokens a rank."""

    def __init__(self, comm, buf, max_tokens, shape, seed):
        self.comm, self.buf, self.max_tokens, self.shape = comm, buf, max_tokens, shape
        self.local = shape.experts // comm.size  # rank r owns experts r * local to (r + 1) * local - 1
        self.gate = make_gate(shape, seed)
        self.experts = [make_expert(comm.rank * self.local + e, shape, seed) for e in range(self.local)]
        self.y = xp.empty((self.local, comm.size * max_tokens, shape.hidden), BF16)
        self.log = collections.defaultdict(list)  # name -> a number per batch: rows, or seconds of a phase

    def __call__(self, x):
        """One batch, `x` [T, H] bf16 -> [T, H] bf16. Collective; T may differ between ranks and be 0."""
        topk_idx, topk_weights = gate(x, self.gate, self.shape.topk)
        with self.phase("dispatch"):
            recv_x, recv_count, handle, _, _ = self.buf.low_latency_dispatch(
                x, topk_idx, self.max_tokens, self.shape.experts, use_fp8=False
            )
        with self.phase("experts"):
            counts = recv_count.tolist()
            for e, n in enumerate(counts):
                if n:  # the rows from n on hold nothing: dispatch writes none there and combine reads none
                    self.y[e, :n] = expert(recv_x[e, :n], self.experts[e])
        with self.phase("combine"):
            out, _, _ = self.buf.low_latency_combine(self.y, topk_idx, topk_weights, handle)
        # A token crosses once to each other rank that owns some of its experts, and is delivered once per expert.
        owners = (topk_idx // self.local).tolist()
        self.log["sent"].append(sum(len({*ranks} - {self.comm.rank}) for ranks in owners))
        self.log["delivered"].append(sum(counts))
        return out

    @contextlib.contextmanager
    def phase(self, name):
        """Times the body. All ranks start together, so that no rank's time contains the lateness of another."""
        synchronize()
        self.comm.Barrier()
        start = time.perf_counter()
        yield
        synchronize()
        self.log[name].append(time.perf_counter() - start)


def run_file(layer, data, seed):
    """The layer over this rank's part of the bytes `data`, in batches -> [T, H] bf16 bits (uint16) on the host."""
    rank, ranks, step = layer.comm.rank, layer.comm.size, layer.max_tokens
    begin, end = len(data) * rank // ranks, len(data) * (rank + 1) // ranks
    x = embed(data[begin:end], begin, layer.shape.hidden, seed)
    layer(x[:step])  # the first batch compiles: run it once before, uncounted
    layer.log.clear()
    out = np.empty(x.shape, np.uint16)
    for at in range(0, math.ceil(len(data) / ranks), step):  # the longest part sets the number of batches of all ranks
        out[at : at + step] = to_host(layer(x[at : at + step]).view(np.uint16))  # at a rank's end fewer rows, or none
    return out


def worst_error(out, expected):
    """The largest |out - expected| of any token, relative to the largest value of that token; both [N, H] float32."""
    return float((abs(out - expected).max(axis=1) / abs(expected).max(axis=1)).max())


def report(args, shape, logs, out, expected):
    """Prints the table from the log of every rank and both outputs [N, H] float32; returns whether they agree."""
    sent, delivered = (sum(sum(log[name]) for log in logs) for name in ("sent", "delivered"))
    slowest = {name: np.max([log[name] for log in logs], axis=0) for name in ("dispatch", "experts", "combine")}
    times = ", ".join(f"{name} {seconds.mean() * 1e3:.3f} ms" for name, seconds in slowest.items())
    batches, mb, error = len(slowest["dispatch"]), shape.hidden * 2 / 1e6, worst_error(out, expected)
    extra = shape.experts - PRESETS[args.preset].experts
    added = f" ({extra} added to divide)" if extra else ""
    print(f"preset     {args.preset}, scale {args.scale}: hidden {shape.hidden}, intermediate {shape.inter}")
    print(f"experts    {shape.experts}{added}, top-{shape.topk}; on {len(logs)} ranks, computed by {xp.__name__}")
    print(f"tokens     {len(out):,} bytes of {args.file}; {batches} batches of at most {args.tokens} tokens a rank")
    print(f"sent       {sent:,} rows, {sent * mb:.2f} MB to other ranks (a token once per rank)")
    print(f"delivered  {delivered:,} rows, {delivered * mb:.2f} MB to experts (a token once per expert)")
    print(f"time       {times} a batch")
    print("           (mean, of the slowest rank; one batch before the first, to warm up, is not counted)")
    print(f"error      {error:.5f} of a token's largest value (allowed {TOLERANCE:.5f});", end=" ")
    print(f"{(out == expected).mean():.3%} of the values identical")
    passed = error <= TOLERANCE  # False for NaN
    print("PASS" if passed else "FAIL", flush=True)
    return passed


def share(comm, passed):
    """Rank 0's `passed` on all ranks. They sleep until it comes: MPI would spin on the cores that rank 0 needs."""
    flag = np.array([passed])
    request = comm.Ibcast(flag)
    while not request.Test():
        time.sleep(0.01)
    return bool(flag[0])


def parse():
    readme = os.path.relpath(Path(__file__).resolve().parent.parent / "README.md")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", nargs="?", default=readme, help="the text whose bytes are the tokens (default: %(default)s)")
    add("--preset", choices=PRESETS, default="deepseek-v3", help="model that gives the shape (default: %(default)s)")
    add("--scale", type=Fraction, default="1/16", help="hidden and intermediate size times this (default: %(default)s)")
    add("--tokens", type=int, default=128, help="most tokens of a rank in a batch (default: %(default)s)")
    add("--limit", type=int, help="read no more than this many bytes of the file (default: all)")
    add("--seed", type=int, default=0, help="of all weights (default: %(default)s)")
    args = parser.parse_args()
    if not 0 < args.scale <= 1 or args.tokens < 1:
        parser.error("--scale must be in (0, 1] and --tokens at least 1")
    return args


def main():
    from mpi4py import MPI  # not above: it starts MPI, which the tests of single functions do without

    args, comm = parse(), MPI.COMM_WORLD
    text = comm.bcast(Path(args.file).read_bytes()[: args.limit] if comm.rank == 0 else None)
    if not text:
        raise SystemExit(f"{args.file} is empty")
    data = np.frombuffer(text, np.uint8)
    shape = scaled(PRESETS[args.preset], args.scale, comm.size)
    hint = pyep.Buffer.get_low_latency_rdma_size_hint
    size = hint(args.tokens, shape.hidden, comm.size, shape.experts, num_topk=shape.topk)
    with pyep.Buffer(comm=comm, num_rdma_bytes=size, low_latency_mode=True) as buf:
        use_engine(buf)
        layer = ParallelLayer(comm, buf, args.tokens, shape, args.seed)
        outs, logs = comm.gather(run_file(layer, data, args.seed)), comm.gather(layer.log)
        del layer  # and with it the experts' weights

    passed = False
    if comm.rank == 0:
        expected = layer_dense(embed(data, 0, shape.hidden, args.seed), shape, args.seed)
        out, expected = to_f32(np.concatenate(outs)), to_f32(to_host(expected.view(np.uint16)))
        passed = report(args, shape, logs, out, expected)
    raise SystemExit(not share(comm, passed))


if __name__ == "__main__":
    main()
