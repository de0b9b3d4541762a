"""Wrong arguments of high-throughput operations: an error before anything is launched that names the argument, what it was and what
is accepted; and the buffer is as good as before."""
import numpy as np
import pytest
import ranks
from engine import down, make_high_throughput_buffer, on_gpu, up
from high_throughput_case import Case, carried, counts_of, dispatch, run_round
from ml_dtypes import bfloat16, float8_e4m3fn
from rejection import rejected, zeros

from pyep import Buffer
from pyep.config import Config

T, H, E, K = 5, 128, 4, 3  # tokens, hidden, experts of one rank, top-k
HEAP = 2**22
CASE = Case(1, (T,), H, E, K)
N = int(CASE.make().handles[0].rank_prefix_matrix[-1, 0])  # the rows that come


def e4m3(*shape):
    """Zeros; CuPy has no e4m3, there its bytes go as uint8."""
    return up(np.zeros(shape, np.uint8 if on_gpu() else float8_e4m3fn))


def pair(tokens=T, hidden=H, columns=1):
    return e4m3(tokens, hidden), zeros(tokens, columns, dtype="float32")


# What is wrong: (what is changed in the accepted arguments, a function of them; error; words in its message).
LAYOUT = {
    "topk_idx a list": (lambda a: dict(topk_idx=[[0] * K] * T), TypeError, "topk_idx", "list", "NumPy"),
    "topk_idx None": (lambda a: dict(topk_idx=None), TypeError, "topk_idx", "None", "NumPy"),
    "topk_idx of one dimension": (lambda a: dict(topk_idx=a["topk_idx"][:, 0].copy()), ValueError, "topk_idx", "[5]"),
    "topk_idx float32": (lambda a: dict(topk_idx=a["topk_idx"].astype("float32")), TypeError,
                         "topk_idx", "float32", "int64 or int32"),
    "topk_idx not contiguous": (lambda a: dict(topk_idx=zeros(T, 2 * K, dtype="int64")[:, ::2]), ValueError,
                                "topk_idx", "not contiguous"),
    "K 0": (lambda a: dict(topk_idx=zeros(T, 0, dtype="int64")), ValueError, "topk_idx", "0"),
    "E 0": (lambda a: dict(num_experts=0), ValueError, "num_experts", "0", "expected"),
    "E negative": (lambda a: dict(num_experts=-4), ValueError, "num_experts", "-4"),
    "E above what one rank can have": (lambda a: dict(num_experts=2048), ValueError, "num_experts", "2048", "at most 2047"),
    "E a float": (lambda a: dict(num_experts=4.5), TypeError, "num_experts", "4.5"),
    "previous_event of another kind": (lambda a: dict(previous_event=3), TypeError, "previous_event", "int", "Buffer.capture"),
}
DISPATCH = {
    "x a list": (lambda a: dict(x=[[1.0] * H]), TypeError, "x", "list", "NumPy"),
    "x None": (lambda a: dict(x=None), TypeError, "x", "None", "NumPy"),
    "x float32": (lambda a: dict(x=a["x"].astype("float32")), TypeError, "x", "float32", "bfloat16", "one byte"),
    "x bool": (lambda a: dict(x=zeros(T, H, dtype="bool")), TypeError, "x", "bool", "one byte"),
    "x of one dimension": (lambda a: dict(x=a["x"][0]), ValueError, "x", "[128]", "[T, H]"),
    "x not contiguous": (lambda a: dict(x=zeros(T, 2 * H)[:, ::2]), ValueError, "x", "not contiguous"),
    "x by column": (lambda a: dict(x=zeros(H, T).T), ValueError, "x", "not contiguous"),
    "rows of x not aligned": (lambda a: dict(x=zeros(T, H + 4)[:, :H]), ValueError, "x", "264 bytes apart", "multiple of 16"),
    "x not aligned": (lambda a: dict(x=zeros(T, H + 8)[:, 4:-4]), ValueError, "x", "begins at address", "multiple of 16"),
    "x like one that was accepted, but not aligned": (lambda a: dict(x=zeros(T * H + 4)[4:].reshape(T, H)), ValueError,
                                                      "x", "begins at address", "multiple of 16"),
    "x of other tokens": (lambda a: dict(x=zeros(T + 1, H)), ValueError, "6", "5"),
    "hidden 12": (lambda a: dict(x=zeros(T, 12)), ValueError, "hidden", "12", "multiple of 8"),
    "hidden 24 of bytes": (lambda a: dict(x=zeros(T, 24, dtype="uint8")), ValueError, "hidden", "24", "multiple of 16", "uint8"),
    "x of three": (lambda a: dict(x=(*pair(), 1)), (TypeError, ValueError), "x", "pair"),
    "x a pair of BF16": (lambda a: dict(x=(a["x"], pair()[1])), TypeError, "x", "bfloat16", "float8_e4m3fn"),
    "scales float64": (lambda a: dict(x=(pair()[0], zeros(T, 1, dtype="float64"))), TypeError, "scales", "float64", "float32"),
    "scales a list": (lambda a: dict(x=(pair()[0], [1.0] * T)), TypeError, "scales", "list", "NumPy"),
    "scales of other tokens": (lambda a: dict(x=(pair()[0], pair(T + 1)[1])), ValueError, "scales", "[6, 1]", "[5, S]"),
    "no scales": (lambda a: dict(x=pair(columns=0)), ValueError, "scales", "[5, 0]", "[5, S]"),
    "scales of three dimensions": (lambda a: dict(x=(pair()[0], zeros(T, 1, 1, dtype="float32"))), ValueError,
                                   "scales", "[5, 1, 1]"),
    "FP8 of hidden 24": (lambda a: dict(x=pair(hidden=24)), ValueError, "hidden", "24", "multiple of 16"),
    "no num_tokens_per_rank": (lambda a: dict(num_tokens_per_rank=None), (TypeError, ValueError), "num_tokens_per_rank", "None"),
    "num_tokens_per_rank a list": (lambda a: dict(num_tokens_per_rank=[T]), TypeError, "num_tokens_per_rank", "list"),
    "num_tokens_per_rank int64": (lambda a: dict(num_tokens_per_rank=zeros(1, dtype="int64")), TypeError,
                                  "num_tokens_per_rank", "int64", "int32"),
    "num_tokens_per_rank of other ranks": (lambda a: dict(num_tokens_per_rank=zeros(2, dtype="int32")), ValueError,
                                           "num_tokens_per_rank", "[2]", "[1]"),
    "no num_tokens_per_expert": (lambda a: dict(num_tokens_per_expert=None), (TypeError, ValueError),
                                 "num_tokens_per_expert", "None"),
    "num_tokens_per_expert int64": (lambda a: dict(num_tokens_per_expert=zeros(E, dtype="int64")), TypeError,
                                    "num_tokens_per_expert", "int64", "int32"),
    "num_tokens_per_expert of no experts": (lambda a: dict(num_tokens_per_expert=zeros(0, dtype="int32")), ValueError,
                                            "num_tokens_per_expert", "0"),
    "no is_token_in_rank": (lambda a: dict(is_token_in_rank=None), (TypeError, ValueError), "is_token_in_rank", "None"),
    "is_token_in_rank int32": (lambda a: dict(is_token_in_rank=zeros(T, 1, dtype="int32")), TypeError,
                               "is_token_in_rank", "int32", "bool"),
    "is_token_in_rank of other tokens": (lambda a: dict(is_token_in_rank=zeros(T - 1, 1, dtype="bool")), ValueError,
                                         "is_token_in_rank", "[4, 1]", "[5, 1]"),
    "is_token_in_rank of other ranks": (lambda a: dict(is_token_in_rank=zeros(T, 2, dtype="bool")), ValueError,
                                        "is_token_in_rank", "[5, 2]", "[5, 1]"),
    "topk_idx of other tokens": (lambda a: dict(topk_idx=a["topk_idx"][1:]), ValueError, "topk_idx", "[4, 3]", "[5, K]"),
    "topk_idx float32": (lambda a: dict(topk_idx=a["topk_idx"].astype("float32")), TypeError,
                         "topk_idx", "float32", "int64 or int32"),
    "weights without indices": (lambda a: dict(topk_idx=None), ValueError, "topk_weights", "topk_idx"),
    "weights float64": (lambda a: dict(topk_weights=zeros(T, K, dtype="float64")), TypeError, "topk_weights", "float64", "float32"),
    "weights of another shape": (lambda a: dict(topk_weights=zeros(T, K + 1, dtype="float32")), ValueError,
                                 "topk_weights", "[5, 4]", "[5, 3]"),
    "alignment 0": (lambda a: dict(expert_alignment=0), ValueError, "expert_alignment", "0", "at least 1"),
    "alignment a float": (lambda a: dict(expert_alignment=1.5), TypeError, "expert_alignment", "1.5", "int"),
    "worst -1": (lambda a: dict(num_worst_tokens=-1), ValueError, "num_worst_tokens", "-1"),
    "worst a float": (lambda a: dict(num_worst_tokens=8.5), TypeError, "num_worst_tokens", "8.5", "int"),
    "config an int": (lambda a: dict(config=20), TypeError, "config", "int", "Config"),
    "previous_event of another kind": (lambda a: dict(async_finish=True, previous_event=object()), TypeError,
                                       "previous_event", "object", "Buffer.capture"),
}
CACHED = {
    "handle a plain tuple": (lambda a: dict(handle=tuple(a["handle"])), TypeError, "handle", "tuple", "dispatch"),
    "handle a string": (lambda a: dict(handle="cached"), TypeError, "handle", "str", "dispatch"),
    "x of other tokens": (lambda a: dict(x=zeros(T + 1, H)), ValueError, "x", "6", "5"),
    "with topk_idx": (lambda a: dict(topk_idx=zeros(T, K, dtype="int64")), ValueError, "topk_idx", "handle", "None"),
    "with topk_weights": (lambda a: dict(topk_weights=zeros(T, K, dtype="float32")), ValueError, "topk_weights", "handle", "None"),
    "with num_tokens_per_rank": (lambda a: dict(num_tokens_per_rank=zeros(1, dtype="int32")), ValueError,
                                 "num_tokens_per_rank", "handle", "None"),
    "with num_tokens_per_expert": (lambda a: dict(num_tokens_per_expert=zeros(E, dtype="int32")), ValueError,
                                   "num_tokens_per_expert", "handle", "None"),
    "with is_token_in_rank": (lambda a: dict(is_token_in_rank=zeros(T, 1, dtype="bool")), ValueError,
                              "is_token_in_rank", "handle", "None"),
}
COMBINE = {
    "handle None": (lambda a: dict(handle=None), TypeError, "handle", "None", "dispatch"),
    "handle a plain tuple": (lambda a: dict(handle=tuple(a["handle"])), TypeError, "handle", "tuple", "dispatch"),
    "x a list": (lambda a: dict(x=[1]), TypeError, "x", "list", "NumPy"),
    "x float32": (lambda a: dict(x=a["x"].astype("float32")), TypeError, "x", "float32", "bfloat16"),
    "x a pair": (lambda a: dict(x=pair(N)), TypeError, "x", "tuple"),
    "x of other rows": (lambda a: dict(x=zeros(N + 1, H)), ValueError, "x", f"[{N + 1}, {H}]", f"[{N}, "),
    "x of three dimensions": (lambda a: dict(x=zeros(1, N, H)), ValueError, "x", f"[1, {N}, {H}]", f"[{N}, "),
    "x not contiguous": (lambda a: dict(x=zeros(N, 2 * H)[:, ::2]), ValueError, "x", "not contiguous"),
    "x not aligned": (lambda a: dict(x=zeros(N * H + 4)[4:].reshape(N, H)), ValueError, "x", "begins at address", "multiple of 16"),
    "hidden 12": (lambda a: dict(x=zeros(N, 12)), ValueError, "hidden", "12", "multiple of 8"),
    "weights float64": (lambda a: dict(topk_weights=zeros(N, K, dtype="float64")), TypeError, "topk_weights", "float64", "float32"),
    "weights of other rows": (lambda a: dict(topk_weights=zeros(N + 1, K, dtype="float32")), ValueError,
                              "topk_weights", f"[{N + 1}, 3]", f"[{N}, "),
    "bias float32": (lambda a: dict(bias=zeros(T, H, dtype="float32")), TypeError, "bias", "float32", "bfloat16"),
    "bias of another shape": (lambda a: dict(bias=zeros(T - 1, H)), ValueError, "bias", "[4, 128]", "[5, 128]"),
    "bias not aligned": (lambda a: dict(bias=zeros(T * H + 4)[4:].reshape(T, H)), ValueError,
                         "bias", "begins at address", "multiple of 16"),
    "bias a number": (lambda a: dict(bias=1.0), TypeError, "bias", "float"),
    "three biases": (lambda a: dict(bias=(zeros(T, H),) * 3), (TypeError, ValueError), "bias", "3"),
    "second bias of another shape": (lambda a: dict(bias=(zeros(T, H), zeros(T, 8))), ValueError, "bias", "[5, 8]", "[5, 128]"),
    "bias not contiguous": (lambda a: dict(bias=zeros(T, 2 * H)[:, ::2]), ValueError, "bias", "not contiguous"),
    "config a dict": (lambda a: dict(config=dict(num_sms=20)), TypeError, "config", "dict", "Config"),
    "previous_event of another kind": (lambda a: dict(previous_event="now"), TypeError, "previous_event", "str", "Buffer.capture"),
}
if on_gpu():
    DISPATCH["x on the host"] = (lambda a: dict(x=down(a["x"])), TypeError, "x", "cpu memory", "GPU")
    COMBINE["bias on the host"] = (lambda a: dict(bias=np.zeros((T, H), bfloat16)), TypeError, "bias", "numpy", "cpu memory")
else:  # on a GPU only the kernel sees the values of topk_idx
    LAYOUT |= {
        "expert E": (lambda a: dict(topk_idx=a["topk_idx"] + 1), ValueError, "topk_idx", "1 to 4", "-1 to 3"),
        "expert -2": (lambda a: dict(topk_idx=a["topk_idx"] - 2), ValueError, "topk_idx", "-2 to 1", "-1 to 3"),
    }
    DISPATCH["expert E"] = (lambda a: dict(topk_idx=a["topk_idx"] + 1), ValueError, "topk_idx", "1 to 4", "-1 to 3")
OPERATIONS = dict(get_dispatch_layout=LAYOUT, dispatch=DISPATCH, cached=CACHED, combine=COMBINE)


def accepted(buf, operation):
    """Arguments that the buffer accepts."""
    made = CASE.make()
    if operation == "get_dispatch_layout":
        return dict(topk_idx=up(made.topk_idx[0]), num_experts=E)
    if operation == "dispatch":
        return dict(x=up(made.x[0]), **counts_of(made.layout[0]), **carried(made, 0))
    return dict(x=up(made.x[0] if operation == "cached" else made.y[0]), handle=dispatch(buf, made)[4])


def operate_wrongly(comm, operation, wrong):
    change, error, *words = OPERATIONS[operation][wrong]
    with make_high_throughput_buffer(comm, HEAP) as buf:
        arguments = accepted(buf, operation)
        function = getattr(buf, "dispatch" if operation == "cached" else operation)
        function(**arguments)[-1].synchronize()
        with rejected(error, *words):
            function(**arguments | change(arguments))
        run_round(buf, CASE)                                     # the buffer is as good as before


@pytest.mark.parametrize("operation, wrong", [(operation, wrong) for operation in OPERATIONS for wrong in OPERATIONS[operation]])
def test_operations(operation, wrong):
    ranks.run(1, operate_wrongly, operation, wrong)


def operate_wrongly_together(comm):
    from mpi4py import MPI
    case = Case(4, (T, 9), H, 2 * E, K)
    made, me = case.make(), comm.rank
    with make_high_throughput_buffer(comm, HEAP) as buf, make_high_throughput_buffer(MPI.COMM_SELF, HEAP) as alone:
        handle = dispatch(alone, CASE.make())[4]
        with rejected(ValueError, "num_experts", "7", "multiple of the 2 ranks"):
            buf.get_dispatch_layout(up(made.topk_idx[me]), 7)
        with rejected(ValueError, "num_tokens_per_expert", "7"):
            dispatch(buf, made, num_tokens_per_expert=zeros(7, dtype="int32"))
        with rejected(ValueError, "handle", "another Buffer"):
            buf.combine(zeros(N, H), handle)
        with rejected(ValueError, "handle", "another Buffer"):
            buf.dispatch(zeros(T, H), handle)
        run_round(buf, case)


def test_arguments_that_do_not_fit_the_ranks():
    """Experts that do not divide; a handle that another buffer made."""
    ranks.run(2, operate_wrongly_together)


def hints():
    return Buffer.get_dispatch_config(4), Buffer.get_combine_config(4), Config(num_sms=8)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 160])
def test_size_hints_of_a_config(num_ranks):
    """Bytes for any number of ranks, more for longer rows."""
    for config in hints():
        sizes = [config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) for hidden_bytes in (16, 2 * 7168, 4 * 7168)]
        assert all(type(n) is int and n > 0 for n in sizes) and sizes == sorted(sizes)
        assert type(config.get_rdma_buffer_size_hint(2 * 7168, num_ranks)) is int
        for rows in 2 * 7168, 7168 + 7168 // 32:                 # DeepEP's programs have 4096 tokens, in BF16 or FP8
            least = Buffer.get_high_throughput_size_hint(4096, 7168, num_ranks, 8, hidden_bytes=rows)
            assert config.get_nvl_buffer_size_hint(2 * 7168, num_ranks) >= least


def numpy_integers(comm):
    """Integers of NumPy, of any size, are integers everywhere."""
    made, me = CASE.make(), 0
    size = Buffer.get_high_throughput_size_hint(np.int16(4096), np.int16(7168), np.uint8(4), np.int8(8), num_results=np.int64(2))
    assert type(size) is int and size == Buffer.get_high_throughput_size_hint(4096, 7168, 4, 8)
    config = Config(np.int64(4), num_max_nvl_chunked_recv_tokens=np.int16(256))
    assert type(config.num_sms) is int
    assert config.get_nvl_buffer_size_hint(np.int16(14336), np.int8(8)) == Config(4).get_nvl_buffer_size_hint(14336, 8)
    with make_high_throughput_buffer(comm, HEAP) as buf:
        per_rank, _, per_expert, in_rank, _ = buf.get_dispatch_layout(up(made.topk_idx[me]), np.int32(E))
        for worst in np.int64(8), 0, np.uint8(9), 8, np.int16(0):
            got = buf.dispatch(up(made.x[me]), None, per_rank, None, in_rank, per_expert, up(made.topk_idx[me]),
                               expert_alignment=np.int32(4), num_worst_tokens=worst, config=config)
            assert type(got[0].shape[0]) is int and got[0].shape[0] == (int(worst) or N)
            assert all(type(n) is int for n in got[3]) and len(got[3]) == (0 if worst else E)
            assert_dispatched_rows(got, made)
            buf.combine(got[0], got[4], config=config)[2].synchronize()
    run_round_with_rows(comm)


def assert_dispatched_rows(got, made):
    got[5].synchronize()
    assert (down(got[0])[:N].view("u2") == made.dispatched[0].recv_x.view("u2")).all()


def run_round_with_rows(comm):
    """Options that were ints before are no others when they come as integers of NumPy."""
    with make_high_throughput_buffer(comm, HEAP) as buf:
        run_round(buf, CASE.with_room(np.int64(3)))
        run_round(buf, CASE)


def test_integers_of_numpy():
    ranks.run(1, numpy_integers)


def without_any_tokens(comm):
    """Arrays of no rows have no address; the operations are called all the same."""
    with make_high_throughput_buffer(comm, HEAP) as buf:
        case = Case(1, (0,) * comm.size, H, E * comm.size, K, sum_weights=True, bias=2)
        run_round(buf, case)
        run_round(buf, case.with_room(0))
        run_round(buf, Case(1, (0,) * comm.size, H, E * comm.size, K, fp8=True))


@pytest.mark.parametrize("n", [1, 2])
def test_no_tokens_at_all(n):
    ranks.run(n, without_any_tokens)
