"""Wrong arguments: an error before anything is launched that names the argument, what it was and what is accepted."""
import re
import time
from functools import partial

import numpy as np
import pytest
import ranks
from case import Case, assert_dispatched, assert_same, run_round
from engine import down, make_buffer, on_gpu, up
from ml_dtypes import bfloat16
from rejection import read_only, rejected, zeros

from pyep import Buffer, EPBufferTooSmallError, EPClosedError, EPRoutingError, EPTransportError, reference
from pyep.config import Config

T, M, H, E, K = 5, 8, 64, 4, 3  # tokens, and a shape whose kernels test_low_latency.py compiles too; E: of one rank
CASE = Case(1, M, H, E, K, (T,))
OTHER = Case(2, M, H, E, K, (M,))
SMALL = Case(3, 1, 8, 1, 1, (1,))


def accepted(case, buf):
    """Arguments of a dispatch and of a combine that the buffer accepts, by operation."""
    x, topk_idx, topk_weights, y = (up(of_all[0]) for of_all in case.make())
    dispatch = dict(x=x, topk_idx=topk_idx, num_max_dispatch_tokens_per_rank=case.max_tokens,
                    num_experts=case.experts, use_fp8=False)
    handle = buf.low_latency_dispatch(**dispatch).handle
    combine = dict(x=y, topk_idx=topk_idx, topk_weights=topk_weights, handle=handle)
    return dict(low_latency_dispatch=dispatch, low_latency_combine=combine)


# ---- construction ----------------------------------------------------------------------------------------------------

# What is wrong: (environment, arguments of Buffer, error, words in its message).
CONSTRUCTOR = {
    "no group": ({}, dict(comm=None), ValueError, "group=", "comm=", "either"),
    "group and comm": ({}, dict(group=object()), ValueError, "group=", "comm=", "not both"),
    "comm a string": ({}, dict(comm="world"), TypeError, "comm", "world", "mpi4py"),
    "transport": ({}, dict(transport="carrier pigeon"), ValueError, "transport", "carrier pigeon", "host", "ipc"),
    "transport None": ({}, dict(transport=None), ValueError, "transport", "None", "host", "ipc"),
    "PYEP_TRANSPORT": (dict(PYEP_TRANSPORT="pigeon"), {}, ValueError, "PYEP_TRANSPORT", "pigeon", "host", "ipc"),
    "transport of the other engine": ({}, dict(transport="host" if on_gpu() else "ipc"), EPTransportError,
                                      "transport", "host" if on_gpu() else "ipc", "cuda" if on_gpu() else "cpu"),
    "PYEP_DEVICE": (dict(PYEP_DEVICE="tpu"), {}, ValueError, "PYEP_DEVICE", "tpu", "cpu", "cuda"),
    "num_rdma_bytes -1": ({}, dict(num_rdma_bytes=-1), ValueError, "num_rdma_bytes", "-1", "bytes"),
    "num_rdma_bytes 0.5": ({}, dict(num_rdma_bytes=0.5), (TypeError, ValueError), "num_rdma_bytes", "0.5", "bytes"),
    "num_rdma_bytes None": ({}, dict(num_rdma_bytes=None), (TypeError, ValueError), "num_rdma_bytes", "None"),
    "timeout_s 0": ({}, dict(timeout_s=0), ValueError, "timeout_s", "0", "seconds"),
    "timeout_s -1": ({}, dict(timeout_s=-1), ValueError, "timeout_s", "-1", "seconds"),
    "timeout_s NaN": ({}, dict(timeout_s=float("nan")), ValueError, "timeout_s", "nan", "seconds"),
    "timeout_s infinite": ({}, dict(timeout_s=float("inf")), ValueError, "timeout_s", "inf", "seconds"),
    "timeout_s a string": ({}, dict(timeout_s="3"), (TypeError, ValueError), "timeout_s", "'3'", "seconds"),
    "num_nvl_bytes negative": ({}, dict(num_nvl_bytes=-1), ValueError, "num_nvl_bytes", "-1", "bytes"),
    "num_nvl_bytes a float": ({}, dict(num_nvl_bytes=1e6), ValueError, "num_nvl_bytes", "1000000.0", "bytes"),
    "enable_shrink": ({}, dict(enable_shrink=True), NotImplementedError, "enable_shrink=False"),
}
if not on_gpu():  # where CUDA is used already, it would not notice the environment
    CONSTRUCTOR |= {
        "PYEP_DEVICE=cuda without a GPU": (dict(PYEP_DEVICE="cuda", CUDA_VISIBLE_DEVICES=""), {}, EPTransportError,
                                           "PYEP_DEVICE=cuda"),
        "PYEP_CPU_SHAPE": (dict(PYEP_CPU_SHAPE="1,2"), {}, ValueError, "PYEP_CPU_SHAPE", "1,2", "blocks,threads,warp"),
    }


def construct_wrongly(comm, wrong):
    environment, arguments, error, *words = CONSTRUCTOR[wrong]
    with pytest.MonkeyPatch.context() as patch, rejected(error, *words):
        for name, value in environment.items():
            patch.setenv(name, value)
        Buffer(**dict(comm=comm, low_latency_mode=True) | arguments)


@pytest.mark.parametrize("wrong", CONSTRUCTOR)
def test_constructor(wrong):
    ranks.run(1, construct_wrongly, wrong)


def construct_unequally(comm, more):
    size = Buffer.get_low_latency_rdma_size_hint(M, H, comm.size, comm.size * E, K)
    with pytest.raises(ValueError, match="num_rdma_bytes"):
        make_buffer(comm, M, H, comm.size * E, K, num_rdma_bytes=size + comm.rank * more, timeout_s=3)


@pytest.mark.parametrize("more", [256, 2**20], ids=["within a page", "many pages"])
def test_ranks_disagree_on_the_bytes(more):
    """Their memories would be laid out differently."""
    ranks.run(2, construct_unequally, more)


# ---- the size hint ---------------------------------------------------------------------------------------------------

# What is wrong: (arguments of the size hint, error, words in its message).
HINT = {
    "no tokens": ((0, H, 1, E, K), ValueError, "num_max_dispatch_tokens_per_rank", "0", "at least 1"),
    "tokens a float": ((8.5, H, 1, E, K), TypeError, "num_max_dispatch_tokens_per_rank", "8.5"),
    "tokens a string": (("8", H, 1, E, K), TypeError, "num_max_dispatch_tokens_per_rank", "'8'"),
    "hidden 12": ((M, 12, 1, E, K), ValueError, "hidden", "12", "multiple of 8"),
    "hidden 0": ((M, 0, 1, E, K), ValueError, "hidden", "0", "multiple of 8"),
    "hidden a float": ((M, 64.0, 1, E, K), TypeError, "hidden", "64.0"),
    "no ranks": ((M, H, 0, E, K), ValueError, "num_ranks", "0", "at least 1"),
    "ranks negative": ((M, H, -1, E, K), ValueError, "num_ranks", "-1", "at least 1"),
    "experts of no rank": ((M, H, 2, 5, K), ValueError, "num_experts", "5", "multiple of the 2 ranks"),
    "no experts": ((M, H, 1, 0, K), ValueError, "num_experts", "0", "multiple of the 1 ranks"),
    "many experts": ((M, H, 1, 4096, K), ValueError, "num_experts", "4096", "at most 2047"),
    "top-k 0": ((M, H, 1, E, 0), ValueError, "num_topk", "0", "1 to num_experts = 4"),
    "top-k -1": ((M, H, 1, E, -1), ValueError, "num_topk", "-1", "1 to num_experts = 4"),
    "top-k above experts": ((M, H, 1, E, E + 1), ValueError, "num_topk", "5", "1 to num_experts = 4"),
}


@pytest.mark.parametrize("wrong", HINT)
def test_size_hint(wrong):
    arguments, error, *words = HINT[wrong]
    with rejected(error, *words):
        Buffer.get_low_latency_rdma_size_hint(*arguments)


def use_too_small(comm, missing):
    needed = Buffer.get_low_latency_rdma_size_hint(M, H, 1, E, K)
    given = 0 if missing is None else needed - missing
    with make_buffer(comm, M, H, E, K, num_rdma_bytes=given) as buf:
        with rejected(EPBufferTooSmallError, f"num_rdma_bytes is {given},", str(needed)) as caught:
            run_round(buf, CASE)
        if missing == 1:
            run_round(buf, SMALL)  # there is room for this one
    call = re.search(r"Buffer\.get_low_latency_rdma_size_hint\(.*?\)", str(caught.value))[0]
    assert eval(call, dict(Buffer=Buffer)) == needed
    with make_buffer(comm, M, H, E, K, num_rdma_bytes=needed) as buf:
        run_round(buf, CASE)


@pytest.mark.parametrize("missing", [1, 1024, None], ids=["a byte", "some", "all"])
def test_buffer_too_small(missing):
    """The message has the bytes given, the bytes needed and the call that computes them; and they suffice."""
    ranks.run(1, use_too_small, missing)


# ---- operations ------------------------------------------------------------------------------------------------------

# What is wrong: (what is changed in the accepted arguments, a function of them; error; words in its message).
DISPATCH = {
    "x a list": (lambda a: dict(x=[[1.0] * H]), TypeError, "x", "list", "NumPy"),
    "x None": (lambda a: dict(x=None), TypeError, "x", "None", "NumPy"),
    "x float32": (lambda a: dict(x=a["x"].astype("float32")), TypeError, "x", "float32", "bfloat16"),
    "x of one dimension": (lambda a: dict(x=a["x"][0]), ValueError, "x", "[64]", "[T, H]"),
    "x of three dimensions": (lambda a: dict(x=a["x"][None]), ValueError, "x", "[1, 5, 64]", "[T, H]"),
    "x not contiguous": (lambda a: dict(x=zeros(T, 2 * H)[:, ::2]), ValueError, "x", "not contiguous"),
    "x not aligned": (lambda a: dict(x=zeros(T * H + 1)[1:].reshape(T, H)), ValueError, "x", "address", "16 bytes"),
    "hidden 12": (lambda a: dict(x=zeros(T, 12)), ValueError, "hidden", "12", "multiple of 8"),
    "more tokens than M": (lambda a: dict(x=zeros(9, H), topk_idx=zeros(9, K, dtype="int64")), ValueError,
                           "x", "9 tokens", "num_max_dispatch_tokens_per_rank = 8"),
    "M of another rank": (lambda a: dict(num_max_dispatch_tokens_per_rank=4), ValueError,
                          "x", "5 tokens", "num_max_dispatch_tokens_per_rank = 4"),
    "M 0": (lambda a: dict(x=zeros(0, H), topk_idx=zeros(0, K, dtype="int64"), num_max_dispatch_tokens_per_rank=0),
            ValueError, "num_max_dispatch_tokens_per_rank", "0", "at least 1"),
    "M a float": (lambda a: dict(num_max_dispatch_tokens_per_rank=8.5), TypeError,
                  "num_max_dispatch_tokens_per_rank", "8.5"),
    "topk_idx a list": (lambda a: dict(topk_idx=[[0] * K] * T), TypeError, "topk_idx", "list", "NumPy"),
    "topk_idx of other rows": (lambda a: dict(topk_idx=a["topk_idx"][1:]), ValueError, "topk_idx", "[4, 3]", "[5, K]"),
    "topk_idx of one dimension": (lambda a: dict(topk_idx=a["topk_idx"][:, 0].copy()), ValueError,
                                  "topk_idx", "[5]", "[5, K]"),
    "topk_idx float32": (lambda a: dict(topk_idx=a["topk_idx"].astype("float32")), TypeError,
                         "topk_idx", "float32", "int64 or int32"),
    "topk_idx uint64": (lambda a: dict(topk_idx=a["topk_idx"].astype("uint64")), TypeError,
                        "topk_idx", "uint64", "int64 or int32"),
    "topk_idx not contiguous": (lambda a: dict(topk_idx=zeros(T, 2 * K, dtype="int64")[:, ::2]), ValueError,
                                "topk_idx", "not contiguous"),
    "K 0": (lambda a: dict(topk_idx=zeros(T, 0, dtype="int64")), ValueError, "topk_idx", "0", "1 to num_experts = 4"),
    "K above E": (lambda a: dict(topk_idx=zeros(T, 5, dtype="int64")), ValueError,
                  "topk_idx", "5", "1 to num_experts = 4"),
    "E 0": (lambda a: dict(num_experts=0), ValueError, "num_experts", "0", "multiple of the 1 ranks"),
    "E above what one rank can have": (lambda a: dict(num_experts=2048), ValueError,
                                       "num_experts", "2048", "at most 2047"),
    "E a float": (lambda a: dict(num_experts=4.5), TypeError, "num_experts", "4.5"),
    "out a list": (lambda a: dict(out=[1]), TypeError, "out", "list", "NumPy"),
    "out float32": (lambda a: dict(out=zeros(E, M, H, dtype="float32")), TypeError, "out", "float32", "bfloat16"),
    "out of another shape": (lambda a: dict(out=zeros(M, E, H)), ValueError, "out", "[8, 4, 64]", "[4, 8, 64]"),
    "out not contiguous": (lambda a: dict(out=zeros(E, M, 2 * H)[..., ::2]), ValueError, "out", "not contiguous"),
    "FP8 by default, hidden 64": (lambda a: dict(use_fp8=True), ValueError, "hidden", "64", "multiple of 128", "use_fp8=True"),
    "UE8M0, hidden 128": (lambda a: dict(x=zeros(T, 128), use_fp8=True, round_scale=True, use_ue8m0=True), ValueError,
                          "hidden", "128", "multiple of 512", "use_ue8m0=True"),
    "UE8M0 without powers of two": (lambda a: dict(x=zeros(T, 512), use_fp8=True, use_ue8m0=True), ValueError,
                                    "use_ue8m0=True", "round_scale=False", "round_scale=True"),
    "round_scale of BF16": (lambda a: dict(round_scale=True), ValueError, "round_scale=True", "use_fp8=False", "use_fp8=True"),
    "use_ue8m0 of BF16": (lambda a: dict(use_ue8m0=True), ValueError, "use_ue8m0=True", "use_fp8=False", "use_fp8=True"),
    "out with FP8": (lambda a: dict(x=zeros(T, 128), use_fp8=True, out=zeros(E, M, 128)), ValueError,
                     "out", "use_fp8=True", "None"),
    "layout": (lambda a: dict(output_layout="token_major"), ValueError,
               "output_layout", "'token_major'", "expert_major", "rank_major"),
    "layout None": (lambda a: dict(output_layout=None), ValueError, "output_layout", "None", "expert_major", "rank_major"),
    "out of the other layout": (lambda a: dict(output_layout="rank_major", out=zeros(E, M, H)), ValueError,
                                "out", "[4, 8, 64]", "[1, 8, 64]"),
    "weights a list": (lambda a: dict(topk_weights=[[1.0] * K] * T), TypeError, "topk_weights", "list", "NumPy"),
    "weights float64": (lambda a: dict(topk_weights=zeros(T, K, dtype="float64")), TypeError,
                        "topk_weights", "float64", "float32"),
    "weights of another shape": (lambda a: dict(topk_weights=zeros(T, K + 1, dtype="float32")), ValueError,
                                 "topk_weights", "[5, 4]", "[5, 3]"),
    "statistics a list": (lambda a: dict(cumulative_local_expert_recv_stats=[0] * E), TypeError,
                          "cumulative_local_expert_recv_stats", "list", "NumPy"),
    "statistics int64": (lambda a: dict(cumulative_local_expert_recv_stats=zeros(E, dtype="int64")), TypeError,
                         "cumulative_local_expert_recv_stats", "int64", "int32"),
    "statistics of another shape": (lambda a: dict(cumulative_local_expert_recv_stats=zeros(E + 1, dtype="int32")), ValueError,
                                    "cumulative_local_expert_recv_stats", "[5]", "[4]"),
    "costs int32": (lambda a: dict(dispatch_wait_recv_cost_stats=zeros(1, dtype="int32")), TypeError,
                    "dispatch_wait_recv_cost_stats", "int32", "int64"),
    "costs of another shape": (lambda a: dict(dispatch_wait_recv_cost_stats=zeros(1, 1, dtype="int64")), ValueError,
                               "dispatch_wait_recv_cost_stats", "[1, 1]", "[1]"),
    "async_finish with a hook": (lambda a: dict(async_finish=True, return_recv_hook=True), ValueError,
                                 "async_finish=True", "return_recv_hook=True", "at most one"),
    "previous_event of another kind": (lambda a: dict(async_finish=True, previous_event=3), TypeError,
                                       "previous_event", "int", "Buffer.capture"),
}
COMBINE = {
    "handle None": (lambda a: dict(handle=None), TypeError, "handle", "None", "low_latency_dispatch"),
    "handle a plain tuple": (lambda a: dict(handle=tuple(a["handle"])), TypeError,
                             "handle", "tuple", "low_latency_dispatch"),
    "x a list": (lambda a: dict(x=[1]), TypeError, "x", "list", "NumPy"),
    "x float32": (lambda a: dict(x=a["x"].astype("float32")), TypeError, "x", "float32", "bfloat16"),
    "x of fewer experts": (lambda a: dict(x=a["x"][1:]), ValueError, "x", "[3, 8, 64]", "[4, 8, 64]"),
    "x of two dimensions": (lambda a: dict(x=a["x"].reshape(-1, H)), ValueError, "x", "[32, 64]", "[4, 8, 64]"),
    "x not contiguous": (lambda a: dict(x=zeros(E, M, 2 * H)[..., ::2]), ValueError, "x", "not contiguous"),
    "topk_idx of other rows": (lambda a: dict(topk_idx=a["topk_idx"][1:]), ValueError, "topk_idx", "[4, 3]", "[5, 3]"),
    "topk_idx of another K": (lambda a: dict(topk_idx=a["topk_idx"][:, 1:].copy()), ValueError,
                              "topk_idx", "[5, 2]", "[5, 3]"),
    "topk_idx float32": (lambda a: dict(topk_idx=a["topk_idx"].astype("float32")), TypeError,
                         "topk_idx", "float32", "int64 or int32"),
    "weights None": (lambda a: dict(topk_weights=None), TypeError, "topk_weights", "None", "NumPy"),
    "weights float64": (lambda a: dict(topk_weights=a["topk_weights"].astype("float64")), TypeError,
                        "topk_weights", "float64", "float32"),
    "weights bfloat16": (lambda a: dict(topk_weights=a["topk_weights"].astype(bfloat16)), TypeError,
                         "topk_weights", "bfloat16", "float32"),
    "weights of another shape": (lambda a: dict(topk_weights=a["topk_weights"].ravel()), ValueError,
                                 "topk_weights", "[15]", "[5, 3]"),
    "out float32": (lambda a: dict(out=zeros(T, H, dtype="float32")), TypeError, "out", "float32", "bfloat16"),
    "out of another shape": (lambda a: dict(out=zeros(M, H)), ValueError, "out", "[8, 64]", "[5, 64]"),
    "x not aligned": (lambda a: dict(x=zeros(E * M * H + 1)[1:].reshape(E, M, H)), ValueError, "x", "address", "16 bytes"),
    "out not aligned": (lambda a: dict(out=zeros(T * H + 1)[1:].reshape(T, H)), ValueError, "out", "address", "16 bytes"),
    "zero_copy of no array": (lambda a: dict(zero_copy=True), ValueError, "zero_copy=True", "get_next_low_latency_combine_buffer"),
    "use_logfmt": (lambda a: dict(use_logfmt=True), NotImplementedError, "use_logfmt=True", "use_logfmt=False"),
    "costs int32": (lambda a: dict(combine_wait_recv_cost_stats=zeros(1, dtype="int32")), TypeError,
                    "combine_wait_recv_cost_stats", "int32", "int64"),
    "costs of another shape": (lambda a: dict(combine_wait_recv_cost_stats=zeros(2, dtype="int64")), ValueError,
                               "combine_wait_recv_cost_stats", "[2]", "[1]"),
    "async_finish with a hook": (lambda a: dict(async_finish=True, return_recv_hook=True), ValueError,
                                 "async_finish=True", "return_recv_hook=True", "at most one"),
    "previous_event of another kind": (lambda a: dict(previous_event=object()), TypeError,
                                       "previous_event", "object", "Buffer.capture"),
    "previous_event without out": (lambda a: dict(async_finish=True, previous_event=Buffer.capture()), ValueError,
                                   "out is None", "async_finish=True", "previous_event"),
}
if on_gpu():  # there only the kernel sees the values of topk_idx
    DISPATCH |= {
        "x on the host": (lambda a: dict(x=down(a["x"])), TypeError, "x", "cpu memory", "GPU"),
        "topk_idx on the host": (lambda a: dict(topk_idx=down(a["topk_idx"])), TypeError,
                                 "topk_idx", "numpy array in cpu memory", "cupy arrays"),
    }
else:
    DISPATCH |= {
        "expert E": (lambda a: dict(topk_idx=a["topk_idx"] + 1), ValueError, "topk_idx", "1 to 4", "-1 to 3"),
        "expert -2": (lambda a: dict(topk_idx=a["topk_idx"] - 2), ValueError, "topk_idx", "-2 to 1", "-1 to 3"),
        "statistics read-only": (lambda a: dict(cumulative_local_expert_recv_stats=read_only(zeros(E, dtype="int32"))), ValueError,
                                 "cumulative_local_expert_recv_stats", "read-only"),
    }
OPERATIONS = dict(low_latency_dispatch=DISPATCH, low_latency_combine=COMBINE)


def operate_wrongly(comm, operation, wrong):
    change, error, *words = OPERATIONS[operation][wrong]
    with make_buffer(comm, M, H, E, K) as buf:
        arguments = accepted(CASE, buf)[operation]
        with rejected(error, *words):
            getattr(buf, operation)(**arguments | change(arguments))
        run_round(buf, CASE)  # the buffer is as good as before


@pytest.mark.parametrize("wrong", DISPATCH)
def test_dispatch(wrong):
    ranks.run(1, operate_wrongly, "low_latency_dispatch", wrong)


@pytest.mark.parametrize("wrong", COMBINE)
def test_combine(wrong):
    ranks.run(1, operate_wrongly, "low_latency_combine", wrong)


def combine_wrongly_reduced(comm):
    x, topk_idx, topk_weights, y = (up(of_all[0]) for of_all in CASE.make())
    with make_buffer(comm, M, H, E, K) as buf:
        got = buf.low_latency_dispatch(x, topk_idx, M, E, use_fp8=False, topk_weights=topk_weights, output_layout="rank_major")
        with rejected(ValueError, "x", "[4, 8, 64]", "[1, 8, 64]"):
            buf.low_latency_combine(y, None, None, got.handle)
        out, _, _ = buf.low_latency_combine(got.recv_x, "not", "looked at", got.handle)
        assert out.shape == (T, H)


def test_combine_of_the_rank_major_layout():
    """Its outputs have another shape; indices and weights are not looked at."""
    ranks.run(1, combine_wrongly_reduced)


def ask_for_combine_buffer(comm):
    with make_buffer(comm, M, H, E, K) as buf:
        handle = accepted(CASE, buf)["low_latency_combine"]["handle"]
        for wrong in (None, 3, tuple(handle)):
            with rejected(TypeError, "handle", type(wrong).__name__, "low_latency_dispatch"):
                buf.get_next_low_latency_combine_buffer(wrong)
        run_round(buf, CASE, zero_copy=True)


def test_combine_buffer_of_no_handle():
    ranks.run(1, ask_for_combine_buffer)


def operate_wrongly_together(comm):
    from mpi4py import MPI
    case = Case(4, M, H, 2 * E, K, (T, M))
    with make_buffer(comm, M, H, 2 * E, K) as buf, make_buffer(MPI.COMM_SELF, M, H, E, K) as alone:
        arguments = accepted(CASE, alone)
        with rejected(ValueError, "num_experts", "7", "multiple of the 2 ranks"):
            buf.low_latency_dispatch(**arguments["low_latency_dispatch"] | dict(num_experts=7))
        with rejected((TypeError, ValueError), "handle", "low_latency_dispatch"):
            buf.low_latency_combine(**arguments["low_latency_combine"])
        run_round(buf, case)


def test_arguments_that_do_not_fit_the_ranks():
    """Experts that do not divide; a handle that another number of ranks made."""
    ranks.run(2, operate_wrongly_together)


def disagree_on_the_shape(comm):
    mine = Case(5, M, H, 2 * E, K, (M, M)) if comm.rank == 0 else Case(5, 1, 8, 2, 1, (1, 1))
    buf = make_buffer(comm, M, H, 2 * E, K, timeout_s=30)
    with rejected(ValueError, "first use", f"max_tokens={mine.max_tokens}", f"ranks [{1 - comm.rank}]"):
        run_round(buf, mine)
    start = time.monotonic()
    with pytest.raises(EPClosedError, match="another shape"):
        run_round(buf, mine)
    buf.destroy()
    return time.monotonic() - start


def test_ranks_disagree_on_the_shape():
    """Every rank hears of it, and none waits for another."""
    assert max(ranks.run(2, disagree_on_the_shape)) < 5


# ---- queries and settings --------------------------------------------------------------------------------------------

def ask_wrongly(comm):
    with make_buffer(comm, M, H, E, K) as buf:
        for call in (lambda: buf.low_latency_update_mask_buffer(0, True), buf.low_latency_clean_mask_buffer,
                     lambda: buf.low_latency_query_mask_buffer(zeros(1, dtype="int32"))):
            with rejected(NotImplementedError, "enable_shrink=True", "EPTimeoutError"):
                call()
        assert len(buf.get_local_buffer_tensor("uint8")) == 0    # no num_nvl_bytes
        for memory in partial(buf.get_local_buffer_tensor, use_rdma_buffer=True), buf.symmetric_memory:
            for offset in (-8, 4, 2**40):
                with rejected(ValueError, "offset", str(offset), "multiple of 8"):
                    memory("int64", offset=offset)
            with rejected(ValueError, "size", f"[{2**30}, 2]", "room"):
                memory("int64", (2**30, 2))
        run_round(buf, CASE)


def test_queries():
    ranks.run(1, ask_wrongly)


# What is wrong: (the call, error, words in its message).
SETTINGS = {
    "odd SMs": (lambda: Buffer.set_num_sms(3), ValueError, "num_sms", "3", "even"),
    "no SMs": (lambda: Buffer.set_num_sms(0), ValueError, "num_sms", "0", "at least 2"),
    "SMs a string": (lambda: Buffer.set_num_sms("20"), ValueError, "num_sms", "'20'", "even"),
    "no ranks": (lambda: Buffer.get_dispatch_config(0), ValueError, "num_ranks", "0", "at least 1"),
    "ranks a float": (lambda: Buffer.get_combine_config(8.0), ValueError, "num_ranks", "8.0", "int"),
    "config of a float": (lambda: Config(20, 6.5), TypeError, "num_max_nvl_chunked_send_tokens", "6.5", "int"),
    "config of nothing": (lambda: Config(20, 6, 0), ValueError, "num_max_nvl_chunked_recv_tokens", "0", "at least 1"),
    "hint of a float": (lambda: Buffer.get_high_throughput_size_hint(4096.5, 7168, 4, 8), TypeError, "num_max_tokens", "4096.5"),
    "hint of hidden 12": (lambda: Buffer.get_high_throughput_size_hint(9, 12, 4, 8), ValueError, "hidden", "12", "multiple of 8"),
    "hint of no ranks": (lambda: Buffer.get_high_throughput_size_hint(9, 8, 0, 8), ValueError, "num_ranks", "0", "at least 1"),
    "hint of no results": (lambda: Buffer.get_high_throughput_size_hint(1, 8, 1, 1, num_results=0), ValueError, "num_results", "0"),
    "event of a list": (lambda: Buffer.capture([1]), TypeError, "like", "list", "NumPy"),
}


@pytest.mark.parametrize("wrong", SETTINGS)
def test_settings(wrong):
    call, error, *words = SETTINGS[wrong]
    with rejected(error, *words):
        call()


# ---- values that the CPU engine's host looks at; where kernels find out: test_low_latency_void.py --------------------

def route_wrongly_at_first(comm):
    """Rank 0 alone names an expert that is not there, before any rank has used the shape; then all want too much of one expert."""
    case = Case(1, M, H, E * comm.size, K, (M,) * comm.size)
    x, topk_idx, _, _ = (of_all[comm.rank] for of_all in case.make())
    with make_buffer(comm, M, H, case.experts, K, timeout_s=30) as buf:
        if comm.rank == 0:
            with rejected(ValueError, "topk_idx", str(case.experts), f"-1 to {case.experts - 1}"):
                buf.low_latency_dispatch(x, np.full_like(topk_idx, case.experts), M, case.experts, use_fp8=False)
        for _ in range(2):
            with rejected(EPRoutingError, f"topk_idx of rank {comm.rank}", "expert 2", "24 times", f"{M} rows", "more than once"):
                buf.low_latency_dispatch(x, np.full_like(topk_idx, 2), M, case.experts, use_fp8=False)
            run_round(buf, case)


def test_routing_that_cannot_be_served():
    """On the CPU engine it is refused before anything is launched, or any rank is waited for; the buffer is as before."""
    if on_gpu():
        pytest.skip("there kernels find out")
    ranks.run(2, route_wrongly_at_first)


def call_with_numpy_numbers(comm):
    with make_buffer(comm, np.int32(M), np.int64(H), np.int64(E), np.int16(K)) as buf:
        arguments = accepted(CASE, buf)["low_latency_dispatch"]
        arguments |= dict(num_max_dispatch_tokens_per_rank=np.int32(M), num_experts=np.uint8(E))
        got = buf.low_latency_dispatch(**arguments)
        assert_is(got, CASE)
        assert [type(n) for n in got.handle[2:]] == [int] * 3
        buf.clean_low_latency_buffer(np.int32(M), np.int64(H), np.uint16(E))


def test_numbers_may_be_those_of_numpy():
    ranks.run(1, call_with_numpy_numbers)


# ---- the life of a buffer and of its hooks ---------------------------------------------------------------------------

def use_destroyed(comm):
    buf = make_buffer(comm, M, H, E, K)
    arguments = accepted(CASE, buf)
    dispatch, combine = (arguments[operation] for operation in OPERATIONS)
    hook = buf.low_latency_dispatch(**dispatch, return_recv_hook=True).hook
    assert buf.is_available()
    buf.destroy()
    buf.destroy()
    assert not buf.is_available()
    for use in (lambda: buf.low_latency_dispatch(**dispatch), lambda: buf.low_latency_combine(**combine), hook,
                lambda: buf.get_next_low_latency_combine_buffer(combine["handle"])):
        with rejected(EPClosedError, "destroyed"):
            use()
    with make_buffer(comm, M, H, E, K) as again:
        run_round(again, CASE)


def test_destroyed():
    """Every operation says that the buffer was destroyed; destroying it again does nothing."""
    ranks.run(1, use_destroyed)


def assert_is(got, case):
    """A dispatch's results, of one rank, are those of the case."""
    x, topk_idx, _, _ = case.make()
    assert_dispatched(got, reference.low_latency_dispatch(x, topk_idx, case.max_tokens, case.experts)[0])


class Array(np.ndarray):
    """As programs define them."""


def dispatch_kinds_of_arrays(comm, folder):
    x, topk_idx, topk_weights, y = (of_all[0] for of_all in CASE.make())
    with make_buffer(comm, M, H, E, K) as buf:
        for kind in "subclass", "memory-mapped, read-only":
            made = []
            for i, array in enumerate((x, topk_idx, topk_weights, y)):
                if kind != "subclass":
                    np.memmap(f"{folder}/{i}", array.dtype, "w+", shape=array.shape)[...] = array
                made.append(array.view(Array) if kind == "subclass" else np.memmap(f"{folder}/{i}", array.dtype, "r",
                                                                                   shape=array.shape))
            x_made, idx_made, weights_made, y_made = made
            got = buf.low_latency_dispatch(x_made, idx_made, M, E, use_fp8=False)
            out, _, _ = buf.low_latency_combine(y_made, idx_made, weights_made, got.handle)
            assert type(got.recv_x) is type(out) is np.ndarray, kind
            assert_is(got, CASE)
            assert_same(out, CASE.combined([y], [topk_idx], [topk_weights])[0], f"combined_x of {kind}")


@pytest.mark.skipif(on_gpu(), reason="about NumPy's arrays")
def test_kinds_of_arrays(tmp_path):
    ranks.run(1, dispatch_kinds_of_arrays, str(tmp_path))


def call_hooks_wrongly(comm):
    with make_buffer(comm, M, H, E, K) as buf:
        one, other = (accepted(case, buf)["low_latency_dispatch"] for case in (CASE, OTHER))
        first = buf.low_latency_dispatch(**one, return_recv_hook=True)
        second = buf.low_latency_dispatch(**other, return_recv_hook=True)
        with rejected(RuntimeError, "at most two", "hook"):
            buf.low_latency_dispatch(**one)
        first.hook()
        assert_is(first, CASE)
        with rejected(RuntimeError, "hook", "already"):
            first.hook()
        third = buf.low_latency_dispatch(**one, return_recv_hook=True)
        second.hook()
        third.hook()
        assert_is(second, OTHER)
        assert_is(third, CASE)
        with rejected(RuntimeError, "hook", "already"):
            second.hook()
        run_round(buf, CASE)


def test_hooks():
    """A third operation while two wait for their hooks, and a hook called twice, are refused and change nothing."""
    ranks.run(1, call_hooks_wrongly)


def fail_between(comm, wrong):
    with make_buffer(comm, M, H, E, K) as buf:
        one, other = (accepted(case, buf)["low_latency_dispatch"] for case in (CASE, OTHER))
        first = buf.low_latency_dispatch(**one)
        with rejected((TypeError, ValueError)):
            buf.low_latency_dispatch(**other | DISPATCH[wrong][0](other))
        second = buf.low_latency_dispatch(**other)
        assert_is(first, CASE)
        assert_is(second, OTHER)


@pytest.mark.parametrize("wrong", ["x float32", "topk_idx of other rows", "out a list", "out of another shape"])
def test_a_failed_dispatch_is_no_dispatch(wrong):
    """Results live until the second next dispatch; one that was refused does not count."""
    ranks.run(1, fail_between, wrong)


def shapes_in_turn(comm):
    with make_buffer(comm, M, H, E, K) as buf:
        one, other, small = (accepted(case, buf)["low_latency_dispatch"] for case in (CASE, OTHER, SMALL))
        first = buf.low_latency_dispatch(**one)
        buf.low_latency_dispatch(**small)
        second = buf.low_latency_dispatch(**other)
        assert_is(first, CASE)
        assert_is(second, OTHER)


def test_shapes_in_turn():
    """Results live until the second next dispatch of their shape, whatever other shapes come between."""
    ranks.run(1, shapes_in_turn)
