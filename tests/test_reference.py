"""The oracle against hand-worked values, exact arithmetic and the properties that the interface promises."""

import collections
import functools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16, float8_e4m3fn

from pyep import reference

INF, NAN = math.inf, math.nan
MAX32 = float(np.finfo(np.float32).max)


def bf16(values):
    return np.array(values, bfloat16)


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# fma32


def exponent_of(q):
    """The integer e with 2**e <= |q| < 2**(e + 1), of a rational that is not 0."""
    exponent = abs(q.numerator).bit_length() - q.denominator.bit_length()
    return exponent if abs(q) >= Fraction(2) ** exponent else exponent - 1


def exact_round(q, bits=24, least_exponent=-126):
    """The nearest binary float, ties to even, of a rational: by default fp32's, but without a largest one."""
    if q == 0:
        return q
    ulp = Fraction(2) ** (max(exponent_of(q), least_exponent) - bits + 1)
    return round(q / ulp) * ulp  # round() of a Fraction is half to even


def exact_fma(a, b, c):
    """fp32 a * b + c of finite numbers, through rationals, as a Python float."""
    q = Fraction(a) * Fraction(b) + Fraction(c)
    if q == 0:
        return a * b + c  # both steps are exact in double precision here, and set the sign of zero as IEEE 754 says
    rounded = abs(exact_round(q))
    return math.copysign(INF if rounded >= 2**128 else float(rounded), q)


def check_fma(a, b, c):
    """a, b, c: equally long sequences of finite fp32 values, as Python floats."""
    assert all(list(v) == np.float32(v).tolist() for v in (a, b, c))
    expected = [exact_fma(*abc) for abc in zip(a, b, c)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = reference.fma32(np.float32(a), np.float32(b), np.float32(c))
    with np.errstate(over="ignore"):
        assert same_bits(got, np.array(expected, np.float32))


FINITE32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FINITE32, FINITE32, FINITE32), min_size=1, max_size=30))
@settings(max_examples=100)
def test_fma32_is_exact_on_any_finite_input(triples):
    check_fma(*zip(*triples))


@pytest.mark.parametrize("low, high", [(-3, 3), (-30, 30), (-75, -60), (60, 64)], ids=str)
def test_fma32_is_exact_where_product_and_addend_interact(low, high):
    """Exponents near each other, near the subnormals (-75) and near overflow (64); every fourth triple cancels."""
    rng, n = np.random.default_rng(0), 4000
    mantissa = rng.integers(2**23, 2**24, (3, n)) * rng.choice([-1, 1], (3, n)) * 2.0**-23
    few_bits = rng.integers(1, 2**23, (3, n)) & -(2 ** rng.integers(0, 23, (3, n)))
    mantissa = np.where(rng.random((3, n)) < 0.3, 1.0 + few_bits * 2.0**-23, mantissa)
    a, b = (np.ldexp(m, rng.integers(low, high, n)) for m in mantissa[:2])
    c = np.ldexp(mantissa[2], np.clip(np.frexp(a * b)[1] + rng.integers(-50, 50, n), -149, 127))
    c[::4] = -np.clip(a * b, -MAX32, MAX32)[::4]
    a, b, c = (v.astype(np.float32).tolist() for v in (a, b, c))
    check_fma(a, b, c)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("product_sign", [1, -1])
@pytest.mark.parametrize("addend, scale", [(2**23 + 1, 47), (2**23 + 1, -126), (2**20 + 1, -149)])
def test_fma32_does_not_round_twice(addend, scale, sign, product_sign):
    """Products just under half an ulp of an odd addend: the result is the addend, at the midpoint it would not be.

    |a * b| is 2**46 - i * i in units of 2**(scale - 47), and half an ulp of the addend is 2**46. The float64 sum is
    the midpoint itself for the first i and then walks away from it, one float64 after the other.
    """
    half, i = (scale - 47) // 2, np.arange(1, 1024)
    a = sign * product_sign * np.ldexp(2.0**23 - i, half)
    b = np.ldexp(2.0**23 + i, scale - 47 - half)
    c = np.full(i.shape, sign * math.ldexp(addend, scale))
    check_fma(a.tolist(), b.tolist(), c.tolist())
    assert (reference.fma32(a, b, c) == c).all()
    assert np.float32(a * b + c)[0] != c[0], "the case is meant to fail without round-to-odd"


@pytest.mark.parametrize(
    "a, b, c, expected",
    [
        (1 + 2**-23, 1 - 2**-23, -1.0, -(2**-46)),  # cancellation: only the tail of the product is left
        (2**-75, 2**-75, 0.0, 0.0),  # the midpoint of 0 and the least subnormal goes to even
        (2**-75, 2**-75, 2**-149, 2**-148),
        (-(2**-100), 2**-100, 0.0, -0.0),
        (-1.0, 0.0, 0.0, 0.0),
        (-1.0, 0.0, -0.0, -0.0),
        (MAX32, 2.0, -MAX32, MAX32),  # no overflow on the way
        (2**51, 2**52, MAX32, INF),
        (2**51, 2**52 - 2**29, MAX32, MAX32),
        (MAX32, MAX32, -INF, -INF),
        (INF, -2.0, 1.0, -INF),
        (INF, 0.0, 1.0, NAN),
        (INF, 1.0, -INF, NAN),
        (NAN, 0.0, 0.0, NAN),
        (1.0, 1.0, NAN, NAN),
    ],
)
def test_fma32_special_values(a, b, c, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = reference.fma32(a, b, c)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.float32(expected))
    assert math.isnan(expected) or np.signbit(got) == np.signbit(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch and combine, worked by hand


def test_two_ranks_by_hand():
    """Two ranks of two experts, at most two tokens each. Expert 0 multiplies by 10, expert 3 negates."""
    M, E = 2, 4
    x = [bf16([[1, 2], [3, 4]]), bf16([[5, 6]])]
    topk_idx = [np.array([[0, 3], [3, -1]]), np.array([[3, 0]])]
    rank0, rank1 = reference.low_latency_dispatch(x, topk_idx, M, E)

    o = [0, 0]
    assert same_bits(rank0.recv_x, bf16([[[1, 2], [5, 6], o, o], [o, o, o, o]]))
    assert same_bits(rank0.recv_count, np.int32([2, 0]))
    assert same_bits(rank0.src_info, np.int32([[0, 0, -1, -1], [-1, -1, -1, -1]]))
    assert same_bits(rank0.layout_range, np.int64([[0x0_00000001, 0x1_00000001], [0, 0]]))

    assert same_bits(rank1.recv_x, bf16([[o, o, o, o], [[1, 2], [3, 4], [5, 6], o]]))
    assert same_bits(rank1.recv_count, np.int32([0, 3]))
    assert same_bits(rank1.src_info, np.int32([[-1, -1, -1, -1], [0, 1, 0, -1]]))
    assert same_bits(rank1.layout_range, np.int64([[0, 0], [0x0_00000002, 0x2_00000001]]))

    n = [NAN, NAN]  # a row that holds no token is never read, nor is the weight of a -1
    y = [
        bf16([[[10, 20], [50, 60], n, n], [n, n, n, n]]),
        bf16([[n, n, n, n], [[-1, -2], [-3, -4], [-5, -6], n]]),
    ]
    weights = [np.float32([[0.5, 2], [1, NAN]]), np.float32([[1, 0.25]])]
    out = reference.low_latency_combine(y, topk_idx, weights, M, E)
    assert same_bits(out[0], bf16([[3, 6], [-3, -4]]))  # 0.5 * [10, 20] + 2 * [-1, -2]; 1 * [-3, -4]
    assert same_bits(out[1], bf16([[7.5, 9]]))  # 1 * [-5, -6] + 0.25 * [50, 60]


def test_two_ranks_rank_major_by_hand():
    """The same routing: token 0 of rank 0 and token 0 of rank 1 go to both ranks, token 1 of rank 0 to rank 1 alone."""
    M, E = 2, 4
    x = [bf16([[1, 2], [3, 4]]), bf16([[5, 6]])]
    topk_idx = [np.array([[0, 3], [3, -1]]), np.array([[3, 0]])]
    weights = [np.float32([[0.5, 2], [1, NAN]]), np.float32([[1, 0.25]])]
    rank0, rank1 = reference.low_latency_dispatch(x, topk_idx, M, E, weights, output_layout="rank_major")

    o, none = [0, 0], [-1, -1]
    assert same_bits(rank0.recv_x, bf16([[[1, 2], o], [[5, 6], o]]))
    assert same_bits(rank0.recv_count, np.int32([1, 1]))
    assert same_bits(rank0.src_info, np.int32([[0, -1], [0, -1]]))
    assert same_bits(rank0.layout_range, np.int64([0x0_00000001, 0x2_00000001]))
    assert same_bits(rank0.recv_topk_idx, np.int64([[[0, -1], none], [[-1, 0], none]]))
    assert same_bits(rank0.recv_topk_weights, np.float32([[[0.5, 0], o], [[0, 0.25], o]]))

    assert same_bits(rank1.recv_x, bf16([[[1, 2], [3, 4]], [[5, 6], o]]))
    assert same_bits(rank1.recv_count, np.int32([2, 1]))
    assert same_bits(rank1.src_info, np.int32([[0, 1], [0, -1]]))
    assert same_bits(rank1.layout_range, np.int64([0x0_00000002, 0x2_00000001]))
    assert same_bits(rank1.recv_topk_idx, np.int64([[[-1, 1], [1, -1]], [[1, -1], none]]))
    assert same_bits(rank1.recv_topk_weights, np.float32([[[0, 2], [1, 0]], [[1, 0], o]]))

    n = [NAN, NAN]
    y = [bf16([[[1, 2], n], [[3, 4], n]]), bf16([[[10, 20], [30, 40]], [[50, 60], n]])]
    out = reference.low_latency_combine_rank_major(y, topk_idx, M, E)
    assert same_bits(out[0], bf16([[11, 22], [30, 40]]))
    assert same_bits(out[1], bf16([[53, 64]]))

    (got, _) = reference.low_latency_dispatch(x, topk_idx, M, E, output_layout="rank_major")
    assert got.recv_topk_weights is None and same_bits(got.recv_topk_idx, rank0.recv_topk_idx)


def test_an_expert_named_twice_takes_two_rows():
    x, topk_idx = [bf16([[1], [2]])], [np.array([[1, 0, 1], [-1, 1, -1]])]
    (got,) = reference.low_latency_dispatch(x, topk_idx, 3, 2)
    assert same_bits(got.recv_x[..., 0], bf16([[1, 0, 0], [1, 1, 2]]))
    assert same_bits(got.src_info, np.int32([[0, -1, -1], [0, 0, 1]]))
    assert same_bits(got.layout_range, np.int64([[1], [3]]))
    y = [bf16([[[1], [0], [0]], [[10], [20], [40]]])]  # the two rows may differ: k tells them apart
    (out,) = reference.low_latency_combine(y, topk_idx, [np.float32([[1, 2, 3], [0, 1, 0]])], 3, 2)
    assert same_bits(out, bf16([[72], [40]]))


def test_an_expert_named_twice_takes_one_row_in_the_rank_major_layout():
    """There is room for any routing: the expert-major layout has no place for these three rows."""
    x, topk_idx = [bf16([[7]])], [np.array([[0, 0, 0]])]
    (got,) = reference.low_latency_dispatch(x, topk_idx, 1, 1, output_layout="rank_major")
    assert same_bits(got.recv_x, bf16([[[7]]])) and same_bits(got.recv_topk_idx, np.int64([[[0, 0, 0]]]))
    (out,) = reference.low_latency_combine_rank_major([bf16([[[9]]])], topk_idx, 1, 1)
    assert same_bits(out, bf16([[9]]))


@pytest.mark.parametrize(
    "weights, outputs, expected",
    [
        ([1, 1, 1], [2**30, 1, -(2**30)], 0),  # k order: the 1 is lost
        ([1, 1, 1], [2**30, -(2**30), 1], 1),
        ([-(1 + 2**-7 + 2**-23), 1 + 2**-23], [1, 1 + 2**-7], 2**-30),  # fma: a rounded product would give 0
        ([1, 2**-8], [1, 1], 1),  # ties of the last rounding go to even
        ([1, 3 * 2**-8], [1, 1], 1 + 2**-6),
        ([1, 2**-8, 2**-23], [1, 1, 1], 1 + 2**-7),  # just above a tie: the sum is rounded to bf16 once, at the end
        ([-1], [0], 0.0),  # -0 added to the initial +0.0
        ([MAX32], [1], INF),
    ],
)
def test_combine_recipe(weights, outputs, expected):
    K = len(weights)
    topk_idx = [np.arange(K)[None]]
    y = [bf16(outputs).reshape(K, 1, 1)]
    (out,) = reference.low_latency_combine(y, topk_idx, [np.float32([weights])], 1, K)
    assert same_bits(out, bf16([[expected]]))


@pytest.mark.parametrize(
    "experts, weights, outputs, direct, reduced",
    [
        ([0, 1, 2], [1, 2, 4], [1, 1, 1], 7, 7),
        ([0, 2, 3], [1, 1, 1], [1, 2**-8, 2**-8], 1 + 2**-7, 1 + 2**-7),  # rank 1 sums its own: 2**-7
        ([0, 1, 2], [1, 1, 1], [1, 2**-8, 2**-8], 1 + 2**-7, 1),  # rank 0 rounds 1 + 2**-8 to 1, and so is the sum
        ([2, 0, 3], [1, 1, 1], [2**30, 1, -(2**30)], 0, 1),  # in k order, and in rank order
        ([2, 3], [-(1 + 2**-7 + 2**-23), 1 + 2**-23], [1, 1 + 2**-7], 2**-30, 2**-30),  # fma on the rank
        ([0, 2], [-(1 + 2**-7 + 2**-23), 1 + 2**-23], [1, 1 + 2**-7], 2**-30, 0),  # but not between ranks
        ([0, 3], [-1, -1], [0, 0], 0.0, 0.0),
        ([0, 2], [MAX32, -1], [1, 2.0**127], 2.0**127, INF),  # rank 0 sends a bf16, and MAX32 is beyond those
        ([-1, -1], [1, 1], [1, 1], 0.0, 0.0),
    ],
)
def test_direct_and_reduced_recipes(experts, weights, outputs, direct, reduced):
    """A token of rank 1, of two ranks with two experts each; output k is that of expert k of the list."""
    nothing = np.zeros((0, len(experts)))
    topk_idx, w = [nothing.astype(int), np.array([experts])], [nothing, np.float32([weights])]
    y = [np.full((2, 2, 1), NAN, bfloat16) for _ in range(2)]
    for e, output in zip(experts, outputs):
        if e >= 0:
            y[e // 2][e % 2, 0] = output
    out = reference.low_latency_combine(y, topk_idx, w, 1, 4)
    assert same_bits(out[1], np.float32([[direct]]).astype(bfloat16))
    out = reference.low_latency_combine_reduced(y, topk_idx, w, 1, 4)
    assert same_bits(out[1], np.float32([[reduced]]).astype(bfloat16))


@pytest.mark.parametrize(
    "outputs, expected",
    [
        ([2**30, 1, -(2**30)], 0),  # rank order
        ([2**30, -(2**30), 1], 1),
        ([-0.0, -0.0, -0.0], 0.0),
        ([1, 2**-8, 2**-8], 1 + 2**-7),  # the sum is fp32, rounded once
        ([INF, 1, 1], INF),
        ([NAN, 1, 1], NAN),
    ],
)
def test_sums_over_ranks(outputs, expected):
    """One token, of rank 2, that goes to all three ranks; k runs the other way."""
    topk_idx, y = [np.zeros((0, 3), int)] * 2 + [np.array([[2, 1, 0]])], [bf16([0, 0, v]).reshape(3, 1, 1) for v in outputs]
    out = reference.low_latency_combine_rank_major(y, topk_idx, 1, 3)[2]
    np.testing.assert_array_equal(out.astype(float), [[expected]])
    y = [bf16([v, 0, 0]).reshape(1, 3, 1) for v in outputs]
    reduced = reference.low_latency_combine_reduced(y, topk_idx, [np.ones(i.shape, np.float32) for i in topk_idx], 1, 3)
    np.testing.assert_array_equal(reduced[2].astype(float), [[expected]])
    assert math.isnan(expected) or not np.signbit([out, reduced[2]]).any()


@pytest.mark.parametrize(
    "topk_idx, M, E, words",
    [
        ([[[0]], [[0]]], 1, 3, "divide"),
        ([[[0], [0]]], 1, 1, "at most 1"),
        ([[[2]]], 1, 2, "-1..1"),
        ([[[-2]]], 1, 2, "-1..1"),
        ([[[0, 0]]], 1, 1, "room for 1"),
    ],
)
def test_impossible_routing_is_refused(topk_idx, M, E, words):
    with pytest.raises(ValueError, match=words):
        reference.places([np.array(idx) for idx in topk_idx], M, E)


# ---------------------------------------------------------------------------------------------------------------------
# Properties


@st.composite
def routings(draw):
    """(topk_idx, M, E): up to 4 ranks, ranks without tokens, -1 entries and repeated experts included."""
    ranks, local_experts, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    entries = st.integers(-1, ranks * local_experts - 1)
    tokens = st.lists(st.lists(entries, min_size=top_k, max_size=top_k), max_size=4)
    topk_idx = [np.array(draw(tokens), np.int64).reshape(-1, top_k) for _ in range(ranks)]
    everything = np.concatenate(topk_idx)
    busiest = np.bincount(everything[everything >= 0], minlength=1).max()
    least = max(1, *(len(idx) for idx in topk_idx), -(-busiest // ranks))
    return topk_idx, int(least) + draw(st.integers(0, 2)), ranks * local_experts


def tagged_tokens(topk_idx):
    """x that names itself: column 0 is the source rank, column 1 the source token."""
    return [bf16([[r, t] for t in range(len(idx))]).reshape(-1, 2) for r, idx in enumerate(topk_idx)]


@given(routings())
@settings(max_examples=100)
def test_every_selection_arrives_once_and_in_order(routing):
    topk_idx, M, E = routing
    R, L = len(topk_idx), E // len(topk_idx)
    dispatched = reference.low_latency_dispatch(tagged_tokens(topk_idx), topk_idx, M, E)
    for e in range(E):
        got, local = dispatched[e // L], e % L
        wanted = [(r, t) for r in range(R) for t, row in enumerate(topk_idx[r].tolist()) for name in row if name == e]
        n = got.recv_count[local]
        assert [tuple(row) for row in got.recv_x[local, :n].astype(int)] == wanted
        assert got.src_info[local, :n].tolist() == [t for _, t in wanted]
        assert not got.recv_x[local, n:].astype(bool).any() and (got.src_info[local, n:] == -1).all()
        next_begin = 0
        for r in range(R):
            begin, count = divmod(int(got.layout_range[local, r]), 2**32)
            assert begin == next_begin
            assert [source for source, _ in wanted[begin : begin + count]] == [r] * count
            next_begin += count
        assert next_begin == n
    for got in dispatched:
        assert got.recv_x.shape == (L, R * M, 2) and got.recv_x.dtype == bfloat16
        assert got.recv_count.dtype == got.src_info.dtype == np.int32 and got.layout_range.dtype == np.int64


@given(routings())
@settings(max_examples=100)
def test_rank_major_holds_every_token_once_for_each_rank_and_in_order(routing):
    topk_idx, M, E = routing
    R, L = len(topk_idx), E // len(topk_idx)
    weights = [np.arange(1, idx.size + 1, dtype=np.float32).reshape(idx.shape) for idx in topk_idx]
    dispatched = reference.low_latency_dispatch(tagged_tokens(topk_idx), topk_idx, M, E, weights, output_layout="rank_major")
    for r, got in enumerate(dispatched):
        own = range(r * L, r * L + L)
        for s, idx in enumerate(topk_idx):
            wanted = [t for t, row in enumerate(idx.tolist()) if any(e in own for e in row)]
            n = got.recv_count[s]
            assert got.src_info[s, :n].tolist() == wanted and (got.src_info[s, n:] == -1).all()
            assert got.recv_x[s, :n].astype(int).tolist() == [[s, t] for t in wanted]
            assert divmod(int(got.layout_range[s]), 2**32) == (s * M, n)
            for i, t in enumerate(wanted):
                here = [e in own for e in idx[t].tolist()]
                assert got.recv_topk_idx[s, i].tolist() == [e - r * L if h else -1 for e, h in zip(idx[t].tolist(), here)]
                assert got.recv_topk_weights[s, i].tolist() == [w if h else 0 for w, h in zip(weights[s][t].tolist(), here)]
            assert (got.recv_topk_idx[s, n:] == -1).all() and (got.recv_topk_weights[s, n:] == 0).all()
        assert got.recv_x.shape == (R, M, 2) and got.recv_x.dtype == bfloat16 and got.src_info.dtype == np.int32
        assert got.recv_topk_idx.dtype == np.int64 and got.recv_topk_weights.dtype == np.float32


@given(routings())
@settings(max_examples=50)
def test_both_layouts_hold_the_same_tokens(routing):
    topk_idx, M, E = routing
    by_expert, by_rank = (reference.low_latency_dispatch(tagged_tokens(topk_idx), topk_idx, M, E, output_layout=layout)
                          for layout in ("expert_major", "rank_major"))
    for em, rm in zip(by_expert, by_rank):
        in_expert_major = [(e, *em.recv_x[e, i].astype(int)) for e, i in zip(*np.nonzero(em.src_info >= 0))]
        s, i, k = np.nonzero(rm.recv_topk_idx >= 0)
        in_rank_major = zip(rm.recv_topk_idx[s, i, k], *rm.recv_x[s, i].astype(int).T)
        assert in_expert_major == sorted(in_rank_major)  # by expert, then source rank, then source token


@given(routings(), st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_identity_experts_give_the_tokens_back(routing, random):
    """Weights 1/2, 1/4, ... with the last one doubled sum to one, and every partial sum of small integers is exact."""
    topk_idx, M, E = routing
    x = [bf16([[random.randint(-15, 15) for _ in range(8)] for _ in idx]).reshape(-1, 8) for idx in topk_idx]
    weights = [np.full(idx.shape, NAN, np.float32) for idx in topk_idx]
    for idx, w in zip(topk_idx, weights):
        for t in range(len(idx)):
            (valid,) = np.nonzero(idx[t] >= 0)
            parts = [2.0 ** -(i + 1) for i in range(len(valid))]
            parts[-1:] = [2 * p for p in parts[-1:]]
            w[t, valid] = random.sample(parts, len(parts))

    dispatched = reference.low_latency_dispatch(x, topk_idx, M, E)
    for got in dispatched:
        got.recv_x[got.src_info < 0] = NAN  # unspecified rows must not matter
    out = reference.low_latency_combine([got.recv_x for got in dispatched], topk_idx, weights, M, E)
    for idx, tokens, combined in zip(topk_idx, x, out):
        selects_nothing = (idx < 0).all(axis=1)
        assert same_bits(combined, np.where(selects_nothing[:, None], bf16(0), tokens))


def selections(topk_idx):
    """Of every token, in order: (source rank, token, [(k, expert, row of that expert), ...])."""
    rows_used = collections.Counter()
    for r, idx in enumerate(topk_idx):
        for t, experts in enumerate(idx.tolist()):
            taken = []
            for k, e in enumerate(experts):
                if e >= 0:
                    taken.append((k, e, rows_used[e]))
                    rows_used[e] += 1
            yield r, t, taken


@given(routings(), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_combines_follow_their_recipes_in_exact_arithmetic(routing, seed):
    """All three: what a rank reduces in the reduced recipe is what the caller hands to the rank-major one."""
    topk_idx, M, E = routing
    R, L, rng = len(topk_idx), E // len(topk_idx), np.random.default_rng(seed)
    y = [rng.standard_normal((L, R * M)).astype(bfloat16) for _ in range(R)]
    weights = [rng.standard_normal(idx.shape).astype(np.float32) for idx in topk_idx]
    direct, reduced = ([np.full((len(idx), 1), NAN, bfloat16) for idx in topk_idx] for _ in range(2))
    y_rank_major, rows_used = [np.full((R, M, 1), NAN, bfloat16) for _ in range(R)], collections.Counter()

    for s, t, taken in selections(topk_idx):
        terms = [(e // L, float(weights[s][t, k]), float(y[e // L][e % L, row])) for k, e, row in taken]
        direct[s][t] = np.float32(exact_sum([(w, v) for _, w, v in terms]))
        partial = []
        for r in sorted({rank for rank, _, _ in terms}):
            p = np.float32(exact_sum([(w, v) for rank, w, v in terms if rank == r])).astype(bfloat16)
            y_rank_major[r][s, rows_used[r, s]] = p
            rows_used[r, s] += 1
            partial.append((1.0, float(p)))
        reduced[s][t] = np.float32(exact_sum(partial))

    of_experts = [a[..., None] for a in y], topk_idx, weights, M, E
    assert_all_same_bits(reference.low_latency_combine(*of_experts), direct)
    assert_all_same_bits(reference.low_latency_combine_reduced(*of_experts), reduced)
    assert_all_same_bits(reference.low_latency_combine_rank_major(y_rank_major, topk_idx, M, E), reduced)


def exact_sum(terms):
    """The fp32 sum of products (a, b), by fma in order from +0.0."""
    return functools.reduce(lambda total, ab: exact_fma(*ab, total), terms, 0.0)


def assert_all_same_bits(got, want):
    assert len(got) == len(want) and all(same_bits(a, b) for a, b in zip(got, want))


def test_one_rank_reduces_as_the_direct_recipe_does():
    rng = np.random.default_rng(0)
    y, idx = [rng.standard_normal((5, 9, 16)).astype(bfloat16)], [rng.permuted(np.tile(np.arange(5), (9, 1)), axis=1)[:, :3]]
    args = y, idx, [rng.standard_normal((9, 3)).astype(np.float32)], 9, 5
    assert_all_same_bits(reference.low_latency_combine_reduced(*args), reference.low_latency_combine(*args))


def test_no_tokens_anywhere():
    nothing = [np.zeros((0, 2), np.int64)] * 2
    dispatched = reference.low_latency_dispatch([np.zeros((0, 8), bfloat16)] * 2, nothing, 1, 4)
    assert all((got.recv_count == 0).all() and (got.layout_range == 0).all() for got in dispatched)
    args = [got.recv_x for got in dispatched], nothing, [np.zeros((0, 2), np.float32)] * 2, 1, 4
    for combine in reference.low_latency_combine, reference.low_latency_combine_reduced:
        assert [o.shape for o in combine(*args)] == [(0, 8)] * 2

    dispatched = reference.low_latency_dispatch([np.zeros((0, 8), bfloat16)] * 2, nothing, 1, 4, output_layout="rank_major")
    assert all((got.recv_count == 0).all() and (got.recv_topk_idx == -1).all() for got in dispatched)
    out = reference.low_latency_combine_rank_major([got.recv_x for got in dispatched], nothing, 1, 4)
    assert [o.shape for o in out] == [(0, 8)] * 2


# ---------------------------------------------------------------------------------------------------------------------
# FP8

# The bytes of e4m3 by the magnitudes that they stand for: sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7f is NaN.
MAGNITUDE = [Fraction(b & 7, 8 * 2**6) if b < 8 else Fraction(8 + (b & 7), 8) * Fraction(2) ** ((b >> 3) - 7) for b in range(127)]
BYTE = {magnitude: byte for byte, magnitude in enumerate(MAGNITUDE)}


def e4m3(values):
    return np.array(values, np.float32).astype(float8_e4m3fn)


def all_bf16():
    return np.arange(2**16, dtype=np.uint16).view(bfloat16)


def floats(values):
    """fp32 of bf16 without the warning that NumPy has for some NaNs."""
    with np.errstate(invalid="ignore"):
        return values.astype(np.float32)


def signed(byte, value):
    return byte | (0x80 if math.copysign(1, value) < 0 else 0)


def exact_e4m3(value, factor=1):
    """The byte of fp32(value * factor), of a Python float and a positive rational."""
    if math.isnan(value):
        return 0x7F
    if math.isinf(value):
        return signed(0x7E, value)
    rounded = exact_round(exact_round(abs(Fraction(value)) * factor), bits=4, least_exponent=-6)
    return signed(BYTE[min(rounded, 448)], value)


def exact_quantize(values, round_scale):
    """(bytes, scale as a float) of one block of Python floats, through rationals."""
    amax = max(abs(v) for v in values + [float(exact_round(Fraction(1, 10000)))] if not math.isnan(v))
    if amax == INF:
        return [signed(0, v) if math.isfinite(v) else 0x7F for v in values], INF
    scale, factor = exact_round(Fraction(amax) / 448), exact_round(448 / Fraction(amax))
    if round_scale:
        power = Fraction(2) ** exponent_of(scale)
        scale = power if power == scale else 2 * power
        factor = 1 / scale
    return [exact_e4m3(v, factor) for v in values], float(scale)


def test_e4m3_has_the_values_that_its_bits_say():
    """And ml_dtypes agrees. 448 is the largest; the least are multiples of 2**-9."""
    assert MAGNITUDE == sorted(MAGNITUDE) and MAGNITUDE[1] == Fraction(1, 512) and MAGNITUDE[-1] == 448
    assert np.arange(127, dtype=np.uint8).view(float8_e4m3fn).astype(float).tolist() == [float(m) for m in MAGNITUDE]


def test_to_e4m3_rounds_to_nearest_even():
    """All bf16 values, and the fp32 values at and beside every value of e4m3 and every midpoint between two."""
    points = [float(m) for m in MAGNITUDE] + [float(a + b) / 2 for a, b in zip(MAGNITUDE, MAGNITUDE[1:])] + [464, 480]
    points = np.float32(points)
    points = np.concatenate([np.nextafter(points, np.float32(0)), points, np.nextafter(points, np.float32(INF))])
    points = np.concatenate([points, -points, floats(all_bf16())])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = reference.to_e4m3(points)
    assert got.dtype == float8_e4m3fn
    assert got.view(np.uint8).tolist() == [exact_e4m3(v) for v in points.tolist()]


def test_to_e4m3_saturates():
    got = reference.to_e4m3(np.float32([448, 464.1, -1e30, INF, -INF, NAN, -NAN, 0, -0.0]))
    assert got.tobytes().hex(" ") == "7e 7e fe 7e fe 7f 7f 00 80"


@pytest.mark.parametrize(
    "head, round_scale, scale, data",
    [
        ([448, 1, -0.5], False, 1, [448, 1, -0.5]),
        ([448, 1, -0.5], True, 1, [448, 1, -0.5]),  # a power of two already
        ([1, -0.5, 0.25], False, 1 / 448, [448, -224, 112]),
        ([1, -0.5, 0.25], True, 2**-8, [256, -128, 64]),
        ([-896, 64], True, 2, [-448, 32]),
        ([450, 64], True, 2, [224, 32]),  # the next power of two above 450 / 448; 225 is nearer to 224 than to 240
        ([448, 17, 19, -17, 17.125], False, 1, [448, 16, 20, -16, 18]),  # ties go to even
        ([448, 2**-9, 2**-10, 3 * 2**-10], False, 1, [448, 2**-9, 0, 2**-8]),  # subnormals
        ([0, -0.0], False, np.float32(1e-4) / 448, [0, -0.0]),
        ([2**-14], False, np.float32(1e-4) / 448, [288]),  # below 1e-4: 2**-14 / 1e-4 * 448 = 273.4
        ([2**-14], True, 2**-22, [256]),  # 1e-4 / 448 = 0.94 * 2**-22
        ([448, NAN, -NAN], False, 1, [448, NAN, NAN]),
        ([NAN], True, 2**-22, [NAN]),
        ([INF, -INF, NAN, 3e38, -1], False, INF, [NAN, NAN, NAN, 0, -0.0]),
        ([INF, -INF, NAN, 3e38, -1], True, INF, [NAN, NAN, NAN, 0, -0.0]),
    ],
)
def test_quantize_by_hand(head, round_scale, scale, data):
    """A block that begins with `head` and goes on with zeros, beside another block."""
    x = np.zeros((1, 256), bfloat16)
    x[0, : len(head)], x[0, 128] = head, 448
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, scales = reference.quantize(x, round_scale)
    want = np.zeros((1, 256), float8_e4m3fn)
    want[0, : len(data)], want[0, 128] = e4m3(data), 448
    assert same_bits(scales, np.float32([[scale, 1]]))
    assert same_bits(got, want)


@pytest.mark.parametrize("stride", [1, 32])
@pytest.mark.parametrize("round_scale", [False, True])
def test_quantize_every_bf16_in_exact_arithmetic(stride, round_scale):
    """A block is every value of one exponent (stride 1), or values over 32 exponents, so that the small ones vanish."""
    x = all_bf16().reshape(-1, 128, stride).swapaxes(1, 2).reshape(64, 8, 128)
    got, scales = reference.quantize(x.reshape(64, 1024), round_scale)
    assert got.shape == (64, 1024) and scales.shape == (64, 8) and scales.dtype == np.float32
    got = got.reshape(x.shape).view(np.uint8)
    for at in np.ndindex(scales.shape):
        data, scale = exact_quantize(floats(x[at]).tolist(), round_scale)
        assert float(scales[at]) == scale and got[at].tolist() == data


@given(st.integers(0, 2**32 - 1), st.integers(-20, 20))
@settings(max_examples=50)
def test_quantize_loses_little(seed, exponent):
    """Data times scale is x: within 1/16, half the distance of two values of e4m3, or half of the least one."""
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.standard_normal((3, 256)), exponent + rng.integers(-8, 1, (3, 256))).astype(bfloat16)
    for round_scale in False, True:
        data, scales = reference.quantize(x, round_scale)
        scales = np.repeat(scales, 128, axis=-1).astype(float)
        error = np.abs(data.astype(float) * scales - x.astype(float))
        assert (error <= np.maximum(np.abs(x.astype(float)) / 16, scales * 2**-10) * (1 + 1e-6)).all()


def test_pack_ue8m0():
    scales = np.float32([[1, 2, 0.5, INF, 2**-22, 2**120, 1, 1], [2**-126, 1, 1, 1, 4, 4, 4, 4]])
    want = np.uint32([[0xFF_7E_80_7F, 0x7F_7F_F7_69], [0x7F_7F_7F_01, 0x81_81_81_81]]).view(np.int32)
    assert same_bits(reference.pack_ue8m0(scales), want)
    assert same_bits(reference.pack_ue8m0(np.asfortranarray(scales)), want)
    assert reference.pack_ue8m0(scales[:0]).shape == (0, 2)


@pytest.mark.parametrize("layout", ["expert_major", "rank_major"])
@pytest.mark.parametrize("options", [{}, dict(round_scale=True), dict(round_scale=True, use_ue8m0=True)], ids=str)
def test_dispatch_of_fp8_is_that_of_bf16_quantized(layout, options):
    rng, H, M, E = np.random.default_rng(1), 1024, 5, 6
    topk_idx = [rng.integers(-1, E, (t, 2)) for t in (5, 0, 2)]
    x = [rng.standard_normal((len(idx), H)).astype(bfloat16) for idx in topk_idx]
    plain = reference.low_latency_dispatch(x, topk_idx, M, E, output_layout=layout)
    fp8 = reference.low_latency_dispatch(x, topk_idx, M, E, use_fp8=True, output_layout=layout, **options)
    for a, b in zip(plain, fp8):
        data, scales = b.recv_x
        columns = H // 512 if "use_ue8m0" in options else H // 128
        assert scales.shape == (*data.shape[:2], columns) and scales.swapaxes(1, 2).flags.c_contiguous
        assert scales.dtype == (np.int32 if "use_ue8m0" in options else np.float32)
        for g, n in enumerate(a.recv_count):
            want, want_scales = reference.quantize(a.recv_x[g, :n], "round_scale" in options)
            if "use_ue8m0" in options:
                want_scales = reference.pack_ue8m0(want_scales)
            assert same_bits(data[g, :n], want) and same_bits(scales[g, :n], want_scales)
            assert not data[g, n:].view(np.uint8).any() and not scales[g, n:].any()
        for field in set(a._fields) - {"recv_x"}:
            np.testing.assert_array_equal(getattr(b, field), getattr(a, field))


@pytest.mark.parametrize(
    "hidden, options, words",
    [
        (64, dict(use_fp8=True), "hidden is 64; FP8 needs a multiple of 128"),
        (640, dict(use_fp8=True, round_scale=True, use_ue8m0=True), "hidden is 640; use_ue8m0 needs a multiple of 512"),
        (512, dict(use_fp8=True, use_ue8m0=True), "use_ue8m0 needs round_scale"),
        (64, dict(output_layout="expert-major"), "'expert-major'; expected 'expert_major' or 'rank_major'"),
    ],
)
def test_impossible_modes_are_refused(hidden, options, words):
    with pytest.raises(ValueError, match=words):
        reference.low_latency_dispatch([np.zeros((1, hidden), bfloat16)], [np.array([[0]])], 1, 1, **options)
