"""The smallest pyep program: tokens go to their experts and come back, PASS if nothing changed on the way.

    mpiexec -n 4 python -m mpi4py examples/round_trip.py
"""

import importlib

import ml_dtypes
import numpy as np
from mpi4py import MPI

import pyep

comm = MPI.COMM_WORLD
tokens, hidden, experts, topk = 32, 512, 8 * comm.size, 4
rng = np.random.default_rng(comm.rank)
x = rng.standard_normal((tokens, hidden)).astype(ml_dtypes.bfloat16)
topk_idx = np.stack([rng.choice(experts, topk, replace=False) for _ in range(tokens)])
topk_weights = rng.dirichlet(np.ones(topk), tokens).astype(np.float32)  # the weights of a token sum to one

size = pyep.Buffer.get_low_latency_rdma_size_hint(tokens, hidden, comm.size, experts, num_topk=topk)
with pyep.Buffer(comm=comm, num_rdma_bytes=size, low_latency_mode=True) as buf:
    xp = importlib.import_module("cupy" if buf.engine == "cuda" else "numpy")  # arrays of the engine that pyep chose
    idx, weights = xp.asarray(topk_idx), xp.asarray(topk_weights)
    recv_x, recv_count, handle, _, _ = buf.low_latency_dispatch(xp.asarray(x), idx, tokens, experts, use_fp8=False)
    y = recv_x  # [local experts, ranks * tokens, hidden]: identity experts, so the weighted sum is x again
    out, _, _ = buf.low_latency_combine(y, idx, weights, handle)
    same = bool((out == xp.asarray(x)).all())

passed = all(comm.allgather(same))
if comm.rank == 0:
    print(f"{'PASS' if passed else 'FAIL'}: {comm.size * tokens} tokens through {experts} experts on {comm.size} ranks")
raise SystemExit(not passed)
