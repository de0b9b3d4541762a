"""Train a Mixture-of-Experts layer with high-throughput dispatch and combine, and compare its gradients with a dense layer's.

    mpiexec -n 4 python -m mpi4py examples/train.py

Experts are matrices, spread over the ranks; each token goes to two of them, and the layer is to learn a linear map.  Of both passes
everything that crosses ranks is one operation:

    forward     x  -- dispatch -->  rows;       experts' outputs  -- combine -->  out
    backward    gradient of out  -- dispatch, with the forward's handle -->  of the outputs;    of the rows  -- combine -->  of x

On the CPU in NumPy; the gradients are written out, so that nothing is hidden in an autograd.
"""
import numpy as np
from ml_dtypes import bfloat16
from mpi4py import MPI

import pyep

HIDDEN, EXPERTS_PER_RANK, TOPK, STEPS, RATE = 64, 2, 2, 20, 0.5
TOKENS = 96                                                     # of rank 0; each next rank has 8 less


def route(topk_idx, experts, buf):
    """Who gets how many tokens, as arguments of `dispatch`."""
    per_rank, _, per_expert, in_rank, _ = buf.get_dispatch_layout(topk_idx, experts)
    return dict(num_tokens_per_rank=per_rank, num_tokens_per_expert=per_expert, is_token_in_rank=in_rank)


def forward(buf, layout, x, topk_idx, topk_weights, matrices):
    """(out [T, H], what the backward pass needs).  matrices [L, H, H] fp32: this rank's experts."""
    rows, local, weights, _, handle, _ = buf.dispatch(x.astype(bfloat16), **layout, topk_idx=topk_idx, topk_weights=topk_weights)
    rows = rows.astype(np.float32)
    outputs = np.zeros((*local.shape, x.shape[1]), np.float32)              # [N, K, H]: of each of a row's selections here
    for e, matrix in enumerate(matrices):
        outputs[local == e] = rows[np.nonzero(local == e)[0]] @ matrix
    out, _, _ = buf.combine((outputs * weights[..., None]).sum(axis=1).astype(bfloat16), handle)
    return out.astype(np.float32), (handle, rows, local, weights, outputs)


def backward(buf, grad_out, kept, matrices):
    """Gradients of x [T, H], of topk_weights [T, K], of matrices [L, H, H]."""
    handle, rows, local, weights, outputs = kept
    grad_rows, *_ = buf.dispatch(grad_out.astype(bfloat16), handle)         # of the weighted sum of a row's outputs
    grad_rows = grad_rows.astype(np.float32)
    grad_weights = np.einsum("nkh,nh->nk", outputs, grad_rows)              # 0 where the selection is not of this rank
    grad_matrices, grad_inputs = np.zeros_like(matrices), np.zeros_like(rows)
    for e, matrix in enumerate(matrices):
        row, k = np.nonzero(local == e)
        grad = grad_rows[row] * weights[row, k][:, None]
        grad_matrices[e] = rows[row].T @ grad
        np.add.at(grad_inputs, row, grad @ matrix.T)
    grad_x, grad_topk_weights, _ = buf.combine(grad_inputs.astype(bfloat16), handle, topk_weights=grad_weights)
    return grad_x.astype(np.float32), grad_topk_weights, grad_matrices


def dense(x, topk_idx, topk_weights, matrices, grad_of):
    """The same layer on one rank, with all experts: out, and the gradients for a function that makes that of out."""
    outputs = np.einsum("th,tkhj->tkj", x, matrices[topk_idx])
    out = (outputs * topk_weights[..., None]).sum(axis=1)
    grad_out = grad_of(out)
    grads = grad_out[:, None] * topk_weights[..., None]
    grad_matrices = np.zeros_like(matrices)
    np.add.at(grad_matrices, topk_idx, np.einsum("th,tkj->tkhj", x, grads))
    return out, (np.einsum("tkj,tkhj->th", grads, matrices[topk_idx]), np.einsum("tkj,tj->tk", outputs, grad_out), grad_matrices)


def difference(got, want):
    """Relative to what is wanted; bf16 makes some."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def main():
    comm = MPI.COMM_WORLD
    me, experts = comm.rank, EXPERTS_PER_RANK * comm.size
    tokens = max(0, TOKENS - 8 * me)
    rng, shared = np.random.default_rng(me), np.random.default_rng(1000)    # `shared` is the same on all ranks
    goal, everyones = (shared.standard_normal((n, HIDDEN, HIDDEN)).astype(np.float32) / HIDDEN**0.5 for n in (1, experts))
    matrices = everyones[me * EXPERTS_PER_RANK:(me + 1) * EXPERTS_PER_RANK].copy()
    x = rng.standard_normal((tokens, HIDDEN)).astype(bfloat16).astype(np.float32)
    topk_idx = np.argsort(rng.random((tokens, experts)), axis=1)[:, :TOPK].astype(np.int64)
    topk_weights = rng.dirichlet(np.ones(TOPK), tokens).astype(np.float32)
    target, in_all = x @ goal[0], comm.allreduce(tokens)

    size = pyep.Buffer.get_high_throughput_size_hint(TOKENS, HIDDEN, comm.size, TOPK, num_results=3)
    with pyep.Buffer(comm=comm, num_nvl_bytes=size) as buf:
        layout = route(topk_idx, experts, buf)
        for step in range(STEPS):
            out, kept = forward(buf, layout, x, topk_idx, topk_weights, matrices)
            loss = comm.allreduce(float(((out - target) ** 2).sum())) / in_all
            grad_x, grad_weights, grad_matrices = backward(buf, out - target, kept, matrices)
            if step == 0:
                check(comm, (x, topk_idx, topk_weights), target, everyones, out, (grad_x, grad_weights, grad_matrices))
            if me == 0 and step % 5 == 0:
                print(f"step {step:2d}  loss {loss:.3f}", flush=True)
            matrices -= RATE * experts / in_all * grad_matrices
    if me == 0:
        print(f"step {step:2d}  loss {loss:.3f}", flush=True)


def check(comm, inputs, target, matrices, out, grads):
    """Compare with the dense layer: the gradients of matrices need the tokens of all ranks."""
    *_, of_all = dense(*(np.concatenate(parts) for parts in zip(*comm.allgather(inputs))), matrices,
                       lambda out, target=np.concatenate(comm.allgather(target)): out - target)[1]
    own = slice(comm.rank * EXPERTS_PER_RANK, (comm.rank + 1) * EXPERTS_PER_RANK)
    wanted_out, (wanted_x, wanted_weights, _) = dense(*inputs, matrices, lambda out: out - target)
    wanted = dict(out=(out, wanted_out), x=(grads[0], wanted_x), topk_weights=(grads[1], wanted_weights),
                  matrices=(grads[2], of_all[own]))
    found = {name: comm.allreduce(difference(*pair), MPI.MAX) for name, pair in wanted.items()}
    if comm.rank == 0:
        words = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        print(f"{comm.size} ranks; against a dense layer, relative: {words}", flush=True)
    assert max(found.values()) < 0.02


if __name__ == "__main__":
    main()
