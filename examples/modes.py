"""A dispatch and a combine in each of three modes: PASS if what comes back is what the oracle says, bit for bit.

    mpiexec -n 2 python -m mpi4py examples/modes.py
"""

import importlib

import ml_dtypes
import numpy as np
from mpi4py import MPI

import pyep
from pyep import reference as oracle

comm = MPI.COMM_WORLD
tokens, hidden, local, topk = 16, 512, 4, 3  # every rank has `local` experts
experts, rng = local * comm.size, np.random.default_rng(comm.rank)
x = rng.standard_normal((tokens, hidden)).astype(ml_dtypes.bfloat16)
idx = np.stack([rng.choice(experts, topk, replace=False) for _ in range(tokens)])
weights = rng.random((tokens, topk), np.float32)
all_x, all_idx, all_weights = (comm.allgather(a) for a in (x, idx, weights))  # the oracle wants those of all ranks
MODES = {  # options of dispatch; whether the weights go with it; the oracle's combine
    "FP8": (dict(use_fp8=True), False, oracle.low_latency_combine),
    "rank-reduced": (dict(use_fp8=False), True, oracle.low_latency_combine_reduced),
    "rank-major": (dict(use_fp8=False, output_layout="rank_major"), True,
                   lambda y, idx, _, *shape: oracle.low_latency_combine_rank_major(y, idx, *shape)),
}


def my_experts(rank, got):
    """What the experts of a rank make of what dispatch brought: expert e multiplies by e + 1."""
    factors = rank * local + 1 + np.arange(local, dtype=np.float32)
    with np.errstate(all="ignore"):  # rows to which no token came may hold anything
        if isinstance(got.recv_x, tuple):  # FP8: values, and a scale for every 128 of them
            values, scales = map(to_numpy, got.recv_x)
            y = values.view(ml_dtypes.float8_e4m3fn) * np.repeat(scales, 128, axis=2) * factors[:, None, None]
        elif got.recv_topk_idx is None:  # expert-major: [local experts, rows, hidden]
            y = to_numpy(got.recv_x) * factors[:, None, None]
        else:  # rank-major: [ranks, rows, hidden], each row for several experts; where the index is -1, the weight is 0
            row_factors = factors[to_numpy(got.recv_topk_idx)] * to_numpy(got.recv_topk_weights)
            y = to_numpy(got.recv_x) * row_factors.sum(axis=2, keepdims=True)
        return y.astype(ml_dtypes.bfloat16)


size = pyep.Buffer.get_low_latency_rdma_size_hint(tokens, hidden, comm.size, experts, num_topk=topk)
with pyep.Buffer(comm=comm, num_rdma_bytes=size, low_latency_mode=True) as buf:
    xp = importlib.import_module("cupy" if buf.engine == "cuda" else "numpy")  # arrays of the engine that pyep chose
    to_numpy, same = getattr(xp, "asnumpy", np.asarray), []
    x, idx, weights = map(xp.asarray, (x, idx, weights))
    for options, weighted, oracle_combine in MODES.values():
        got = buf.low_latency_dispatch(x, idx, tokens, experts, topk_weights=weights if weighted else None, **options)
        out, _, _ = buf.low_latency_combine(xp.asarray(my_experts(comm.rank, got)), idx, weights, got.handle)
        all_got = oracle.low_latency_dispatch(all_x, all_idx, tokens, experts, all_weights if weighted else None, **options)
        want = oracle_combine([my_experts(*each) for each in enumerate(all_got)], all_idx, all_weights, tokens, experts)
        same.append(np.array_equal(to_numpy(out).view(np.uint16), want[comm.rank].view(np.uint16)))

passed = all(sum(comm.allgather(same), []))
if comm.rank == 0:
    print(f"{'PASS' if passed else 'FAIL'}: {', '.join(MODES)}, on {comm.size} ranks")
raise SystemExit(not passed)
