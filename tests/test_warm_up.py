"""`Buffer.warm_up`: after it, what was listed compiles nothing, and what it says of wrong lists."""
import contextlib
import io

import numpy as np
import ranks
from case import Case, run_round
from engine import make_buffer, up
from ml_dtypes import bfloat16
from rejection import rejected
from test_low_latency import counting_kernels

from pyep import Buffer

M, H, LOCAL, K = 8, 64, 4, 3                                     # a shape whose kernels test_low_latency.py compiles too


def buffer_for_both(comm):
    nbytes = Buffer.get_high_throughput_size_hint(M, H, comm.size, K)
    return make_buffer(comm, M, H, LOCAL * comm.size, K, num_nvl_bytes=2 * nbytes)


def train(buf, experts):
    """A dispatch and a combine of high throughput, then those of a backward pass."""
    idx = np.arange(M * K).reshape(M, K) % experts
    x, idx, weights = up(np.ones((M, H), bfloat16)), up(idx), up(np.ones((M, K), np.float32))
    per_rank, _, per_expert, in_rank, _ = buf.get_dispatch_layout(idx, experts)
    recv_x, _, recv_weights, _, handle, _ = buf.dispatch(
        x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=idx,
        topk_weights=weights)
    buf.combine(recv_x, handle)
    grad, *_ = buf.dispatch(x, handle)
    buf.combine(grad, handle, topk_weights=recv_weights)


def operate_warm(comm):
    """How many kernels were made, and what rank 0 showed."""
    experts = LOCAL * comm.size
    with buffer_for_both(comm) as buf, counting_kernels(buf) as made:
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            buf.warm_up(low_latency=[dict(hidden=H, num_topk=K, num_max_dispatch_tokens_per_rank=M, num_experts=experts,
                                          use_fp8=False)],
                        high_throughput=[dict(hidden=H, num_topk=K, num_experts=experts, weighted=True, cached=True)])
        compiled = len(made)
        for max_tokens in M, M - 3:
            run_round(buf, Case(1, max_tokens, H, experts, K, (max_tokens,) * comm.size))
        train(buf, experts)
        assert made[compiled:] == []
        return compiled, shown.getvalue()


def test_nothing_is_compiled_after_a_warm_up():
    (compiled, shown), (_, quiet) = ranks.run(2, operate_warm)
    assert compiled >= 4 + 4 and "warm_up" in shown and "2/2" in shown and quiet == ""


def warm_up_wrongly(comm):
    with buffer_for_both(comm) as buf:
        entry = dict(hidden=H, num_topk=K, num_experts=LOCAL)
        with rejected(TypeError, "low_latency", "without hidden, num_topk"):
            buf.warm_up(low_latency=[dict(num_experts=LOCAL)])
        with rejected(TypeError, "num_max_dispatch_tokens_per_rank"):
            buf.warm_up(low_latency=[entry], progress=False)
        with rejected(TypeError, "num_max_tokens"):
            buf.warm_up(low_latency=[entry | dict(num_max_tokens=M)], progress=False)
        with rejected(TypeError, "like", "list"):
            buf.warm_up(low_latency=[entry], like=[1])


def test_wrong_lists():
    ranks.run(1, warm_up_wrongly)
