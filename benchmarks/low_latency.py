"""The figures of docs/performance.md: the time of a low-latency dispatch, of a combine, and of a pair.

    mpiexec -n 4 python -m mpi4py benchmarks/low_latency.py --tokens 128 --hidden 7168 --topk 8 --experts 256

On GPUs: in one CUDA graph of 50 operations of one kind (or 50 pairs), median of 11 replays after 3 to warm up, slowest rank.
On the CPU: median of 15 calls between barriers, beside memcpy of the same bytes by all ranks at once.
"""
import argparse
import time

import ml_dtypes
import numpy as np
from mpi4py import MPI

import pyep

comm = MPI.COMM_WORLD
IN_GRAPH, WARM_UP, REPLAYS, CALLS = 50, 3, 11, 15


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 128), ("hidden", 7168), ("topk", 8), ("experts", 256), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    return parser.parse_args()


def slowest(seconds):
    """Median over repetitions, then the slowest rank, in seconds."""
    return comm.allreduce(float(np.median(seconds)), MPI.MAX)


def on_gpu(operations, check):
    """Microseconds of each operation."""
    import cupy
    stream, begin, end = cupy.cuda.get_current_stream(), cupy.cuda.Event(), cupy.cuda.Event()
    for name, operation in operations.items():
        operation()
        stream.begin_capture()
        for _ in range(IN_GRAPH):
            operation()
        graph, times = stream.end_capture(), []
        for _ in range(WARM_UP + REPLAYS):
            comm.Barrier()
            begin.record(stream)
            graph.launch(stream)
            end.record(stream)
            check()
            times.append(cupy.cuda.get_elapsed_time(begin, end) / IN_GRAPH)
        yield name, 1e3 * slowest(times[WARM_UP:]), 1e3 * (max(times[WARM_UP:]) - min(times[WARM_UP:]))


def on_cpu(operation):
    """Milliseconds of one operation of all ranks."""
    times = []
    for _ in range(CALLS):
        comm.Barrier()
        start = time.perf_counter()
        operation()
        comm.Barrier()
        times.append(time.perf_counter() - start)
    return 1e3 * slowest(times)


def run(args, buf, xp):
    rng = np.random.default_rng([args.seed, comm.rank])
    routing = np.argsort(rng.random((args.tokens, args.experts)), axis=1)[:, :args.topk].copy()
    x = xp.asarray(rng.standard_normal((args.tokens, args.hidden)).astype(ml_dtypes.bfloat16))
    topk_idx, weights = xp.asarray(routing), xp.asarray(rng.random(routing.shape, np.float32))
    out = xp.empty_like(x)
    latest = None

    def dispatch():
        nonlocal latest
        latest = buf.low_latency_dispatch(x, topk_idx, args.tokens, args.experts, use_fp8=False)

    def combine():
        return buf.low_latency_combine(latest.recv_x, topk_idx, weights, latest.handle, out=out)[1]

    def pair():
        dispatch()
        return combine()
    pair().synchronize()
    say = print if comm.rank == 0 else lambda *_: None
    say(f"{comm.size} ranks, {buf.engine} ({buf.transport}), {args.tokens} tokens x {args.hidden}, "
        f"top-{args.topk} of {args.experts}")
    if buf.engine == "cuda":
        for name, us, spread in on_gpu({"dispatch": dispatch, "combine": combine, "pair": pair}, lambda: combine().synchronize()):
            say(f"{name:10}{us:8.1f} us  (spread on rank 0: {spread:.1f})")
        return
    # Every row is copied twice: dispatch sends it once per rank and delivers it once per expert; combine sends each output
    # once and reads it again to sum.
    sent = sum(len(set(experts)) for experts in (routing // (args.experts // comm.size)).tolist())
    rows = {"dispatch": sent + routing.size, "combine": 2 * routing.size}
    for name, operation in (("dispatch", dispatch), ("combine", combine)):
        data = np.ones(rows[name] * 2 * args.hidden, np.uint8)
        copy = np.zeros_like(data)
        ms, memcpy = on_cpu(operation), on_cpu(lambda copy=copy, data=data: np.copyto(copy, data))
        say(f"{name:10}{ms:8.2f} ms; memcpy of the same {data.size / 1e6:.1f} MB a rank {memcpy:.2f} ms, {ms / memcpy:.2f} times")


def main():
    args = parse()
    size = pyep.Buffer.get_low_latency_rdma_size_hint(args.tokens, args.hidden, comm.size, args.experts, num_topk=args.topk)
    with pyep.Buffer(comm=comm, num_rdma_bytes=size, low_latency_mode=True) as buf:
        if buf.engine == "cpu":
            run(args, buf, np)
        else:
            import cupy
            with cupy.cuda.Stream(non_blocking=True):            # the default stream cannot be captured
                run(args, buf, cupy)


if __name__ == "__main__":
    main()
