"""The oracle against hand-worked values, exact arithmetic and the properties that the interface promises."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

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


def exact_fma(a, b, c):
    """fp32 a * b + c of finite numbers, through rationals, as a Python float."""
    q = Fraction(a) * Fraction(b) + Fraction(c)
    if q == 0:
        return a * b + c  # both steps are exact in double precision here, and set the sign of zero as IEEE 754 says
    exponent = abs(q.numerator).bit_length() - q.denominator.bit_length()
    if abs(q) < Fraction(2) ** exponent:
        exponent -= 1  # now 2**exponent <= |q| < 2**(exponent + 1)
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(q / ulp) * ulp  # round() of a Fraction is half to even
    return math.copysign(INF if abs(rounded) >= 2**128 else float(abs(rounded)), q)


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
@settings(max_examples=100, deadline=None)
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


def test_an_expert_named_twice_takes_two_rows():
    x, topk_idx = [bf16([[1], [2]])], [np.array([[1, 0, 1], [-1, 1, -1]])]
    (got,) = reference.low_latency_dispatch(x, topk_idx, 3, 2)
    assert same_bits(got.recv_x[..., 0], bf16([[1, 0, 0], [1, 1, 2]]))
    assert same_bits(got.src_info, np.int32([[0, -1, -1], [0, 0, 1]]))
    assert same_bits(got.layout_range, np.int64([[1], [3]]))
    y = [bf16([[[1], [0], [0]], [[10], [20], [40]]])]  # the two rows may differ: k tells them apart
    (out,) = reference.low_latency_combine(y, topk_idx, [np.float32([[1, 2, 3], [0, 1, 0]])], 3, 2)
    assert same_bits(out, bf16([[72], [40]]))


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
@settings(max_examples=100, deadline=None)
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


@given(routings(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
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


@given(routings(), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_combine_follows_the_recipe_in_exact_arithmetic(routing, seed):
    topk_idx, M, E = routing
    R, L, rng = len(topk_idx), E // len(topk_idx), np.random.default_rng(seed)
    y = [rng.standard_normal((L, R * M, 2)).astype(bfloat16) for _ in range(R)]
    weights = [rng.standard_normal(idx.shape).astype(np.float32) for idx in topk_idx]
    out = reference.low_latency_combine(y, topk_idx, weights, M, E)
    rows_used = [0] * E
    for r, idx in enumerate(topk_idx):
        for t in range(len(idx)):
            total = [0.0, 0.0]
            for k, e in enumerate(idx[t].tolist()):
                if e >= 0:
                    row = y[e // L][e % L, rows_used[e]].astype(float)
                    total = [exact_fma(float(weights[r][t, k]), v, s) for v, s in zip(row.tolist(), total)]
                    rows_used[e] += 1
            assert same_bits(out[r][t], np.array(total, np.float32).astype(bfloat16))


def test_no_tokens_anywhere():
    nothing = [np.zeros((0, 2), np.int64)] * 2
    dispatched = reference.low_latency_dispatch([np.zeros((0, 8), bfloat16)] * 2, nothing, 1, 4)
    assert all((got.recv_count == 0).all() and (got.layout_range == 0).all() for got in dispatched)
    out = reference.low_latency_combine(
        [got.recv_x for got in dispatched], nothing, [np.zeros((0, 2), np.float32)] * 2, 1, 4
    )
    assert [o.shape for o in out] == [(0, 8)] * 2
