"""The oracle of the high-throughput operations against hand-worked values, dense matrices and what the interface promises."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16, float8_e4m3fn

from pyep import reference

INF, NAN = math.inf, math.nan


def bf16(values):
    return np.array(values, bfloat16)


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Worked by hand

# Two ranks of two experts. Token 0 of rank 0 goes to both ranks, token 1 to rank 1 for both of its experts, token 2
# nowhere; token 0 of rank 1 goes to rank 0 alone, although it names it twice, and token 1 to rank 1.
TOPK_IDX = [np.array([[0, 3], [3, 2], [-1, -1]]), np.array([[1, 1], [-1, 2]])]
WEIGHTS = [np.float32([[0.5, 2], [1, 4], [NAN, NAN]]), np.float32([[8, 16], [NAN, 32]])]
X = [bf16([[1, 2], [3, 4], [5, 6]]), bf16([[7, 8], [9, 10]])]


def test_layout_by_hand():
    rank0, rank1 = reference.get_dispatch_layout(TOPK_IDX, 4)
    assert same_bits(rank0.num_tokens_per_rank, np.int32([1, 2]))
    assert same_bits(rank0.num_tokens_per_expert, np.int32([1, 0, 1, 2]))
    assert same_bits(rank0.is_token_in_rank, np.array([[True, True], [False, True], [False, False]]))
    assert same_bits(rank1.num_tokens_per_rank, np.int32([1, 1]))
    assert same_bits(rank1.num_tokens_per_expert, np.int32([0, 2, 1, 0]))  # a repeated expert counts for each entry
    assert same_bits(rank1.is_token_in_rank, np.array([[True, False], [False, True]]))
    assert rank0.num_tokens_per_rdma_rank is None


def test_dispatch_by_hand():
    layout = reference.get_dispatch_layout(TOPK_IDX, 4)
    rank0, rank1 = reference.dispatch(X, layout, TOPK_IDX, WEIGHTS)

    assert same_bits(rank0.recv_x, bf16([[1, 2], [7, 8]]))
    assert same_bits(rank0.recv_topk_idx, np.int64([[0, -1], [1, 1]]))
    assert same_bits(rank0.recv_topk_weights, np.float32([[0.5, 0], [8, 16]]))
    assert rank0.num_recv_tokens_per_expert_list == [1, 2]
    assert same_bits(rank0.handle.recv_src_idx, np.int32([0, 0]))
    assert same_bits(rank0.handle.send_rows, np.int32([[0, 0], [-1, 1], [-1, -1]]))

    assert same_bits(rank1.recv_x, bf16([[1, 2], [3, 4], [9, 10]]))
    assert same_bits(rank1.recv_topk_idx, np.int64([[-1, 1], [1, 0], [-1, 0]]))
    assert same_bits(rank1.recv_topk_weights, np.float32([[0, 2], [1, 4], [0, 32]]))
    assert rank1.num_recv_tokens_per_expert_list == [2, 2]
    assert same_bits(rank1.handle.recv_src_idx, np.int32([0, 1, 1]))
    assert same_bits(rank1.handle.send_rows, np.int32([[0, -1], [-1, 0]]))

    for got, of_rank in zip((rank0, rank1), layout):
        assert same_bits(got.handle.rank_prefix_matrix, np.int32([[1, 2], [2, 3]]))
        assert got.handle.is_token_in_rank is of_rank.is_token_in_rank


def test_dispatch_with_room_for_the_worst_by_hand():
    """Each rank has its own number of rows; the tail holds no expert and no weight."""
    layout = reference.get_dispatch_layout(TOPK_IDX, 4)
    rank0, rank1 = reference.dispatch(X, layout, TOPK_IDX, WEIGHTS, expert_alignment=8, num_worst_tokens=[4, 3])
    assert same_bits(rank0.recv_x[:2], bf16([[1, 2], [7, 8]])) and rank0.recv_x.shape == (4, 2)
    assert same_bits(rank0.recv_topk_idx, np.int64([[0, -1], [1, 1], [-1, -1], [-1, -1]]))
    assert same_bits(rank0.recv_topk_weights, np.float32([[0.5, 0], [8, 16], [0, 0], [0, 0]]))
    assert same_bits(rank0.handle.recv_src_idx[:2], np.int32([0, 0])) and len(rank0.handle.recv_src_idx) == 4
    assert same_bits(rank1.recv_x, bf16([[1, 2], [3, 4], [9, 10]]))
    assert rank0.num_recv_tokens_per_expert_list == rank1.num_recv_tokens_per_expert_list == []
    out = reference.combine([got.recv_x for got in (rank0, rank1)], [got.handle for got in (rank0, rank1)])
    assert same_bits(out[0][0], bf16([[2, 4], [3, 4], [0, 0]]))


def test_combine_by_hand():
    handles = reference.make_handles(reference.get_dispatch_layout(TOPK_IDX, 4))
    y = [bf16([[10, 20], [70, 80]]), bf16([[1, 2], [3, 4], [9, NAN]])]
    weights = [np.float32([[1, 0], [8, 16]]), np.float32([[0.5, 2], [1, 4], [0, 32]])]
    (out0, w0), (out1, w1) = reference.combine(y, handles, weights)
    assert same_bits(out0, bf16([[11, 22], [3, 4], [0, 0]]))
    assert same_bits(w0, np.float32([[1.5, 2], [1, 4], [0, 0]]))
    np.testing.assert_array_equal(out1.astype(float), [[70, 80], [9, NAN]])
    assert same_bits(w1, np.float32([[8, 16], [0, 32]]))

    one = [bf16([[100, 200]] * 3), bf16([[0.5, -0.0]] * 2)]
    (out0, none), (out1, _) = reference.combine(y, handles, bias=one)
    assert same_bits(out0, bf16([[111, 222], [103, 204], [100, 200]])) and none is None
    np.testing.assert_array_equal(out1.astype(float), [[70.5, 80], [9.5, NAN]])

    (out0, _), _ = reference.combine(y, handles, bias=[(b, -b) for b in one])
    assert same_bits(out0, bf16([[11, 22], [3, 4], [0, 0]]))


@pytest.mark.parametrize(
    "bias, outputs, expected",
    [
        ([], [2**30, 1, -(2**30)], 0),  # rank order: the 1 is lost
        ([], [2**30, -(2**30), 1], 1),
        ([], [1, 2**-8, 2**-8], 1 + 2**-7),  # the sum is fp32, rounded once
        ([], [1, 2**-8, 0], 1),  # ties of that rounding go to even
        ([], [-0.0, -0.0, -0.0], 0.0),  # added to +0.0
        ([-0.0, -0.0], [-0.0, -0.0, -0.0], 0.0),  # a bias too
        ([-0.0, 0.0], [-0.0, -0.0, -0.0], 0.0),
        ([2**30], [1, -(2**30), 1], 1),  # the bias comes first
        ([2**30, 1], [-(2**30), 0, 0], 0),
        ([2**30, -(2**30)], [1, 0, 0], 1),  # the two biases are summed before anything else
        ([1, 2**-8], [2**-8, 0, 0], 1 + 2**-7),  # in fp32
        ([], [INF, 1, -1], INF),
        ([], [INF, 1, -INF], NAN),
        ([INF], [1, 1, -INF], NAN),
        ([NAN], [1, 1, 1], NAN),
        ([], [2.0**127, 2.0**127, -(2.0**127)], INF),  # an overflow on the way stays one
    ],
)
def test_combine_recipe(bias, outputs, expected):
    """A token of rank 1, of three ranks, that goes to all; k runs the other way."""
    topk_idx = [np.zeros((0, 3), int), np.array([[2, 1, 0]]), np.zeros((0, 3), int)]
    handles = reference.make_handles(reference.get_dispatch_layout(topk_idx, 3))
    biases = [tuple(np.full((len(idx), 1), b, bfloat16) for b in bias) for idx in topk_idx]
    biases = {0: None, 1: [b[0] for b in biases if b], 2: biases}[len(bias)]
    out = reference.combine([bf16([[v]]) for v in outputs], handles, [np.float32([[v] * 3]) for v in outputs], biases)
    np.testing.assert_array_equal(out[1][0].astype(float), [[expected]])
    assert math.isnan(expected) or np.signbit(out[1][0]) == np.signbit(expected)
    if not bias:  # weights: the same sum, not rounded to bf16
        with np.errstate(all="ignore"):
            weight = (np.float32(0) + np.float32(outputs[0]) + np.float32(outputs[1])) + np.float32(outputs[2])
        np.testing.assert_array_equal(out[1][1], np.full((1, 3), weight))
    assert [o.shape for o, _ in out] == [(0, 1), (1, 1), (0, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Properties


@st.composite
def routings(draw):
    """(topk_idx, E): up to 4 ranks, ranks without tokens, -1 entries and repeated experts included."""
    ranks, local_experts, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    entries = st.integers(-1, ranks * local_experts - 1)
    tokens = st.lists(st.lists(entries, min_size=top_k, max_size=top_k), max_size=5)
    topk_idx = [np.array(draw(tokens), draw(st.sampled_from([np.int32, np.int64]))).reshape(-1, top_k) for _ in range(ranks)]
    return topk_idx, ranks * local_experts


def tagged_tokens(topk_idx):
    """x that names itself: column 0 is the source rank, column 1 the source token."""
    return [bf16([[r, t] for t in range(len(idx))]).reshape(-1, 2) for r, idx in enumerate(topk_idx)]


def numbered_weights(topk_idx):
    """Weights that name their selection, none of them 0."""
    return [np.arange(1, idx.size + 1, dtype=np.float32).reshape(idx.shape) + 1000 * r for r, idx in enumerate(topk_idx)]


@given(routings(), st.sampled_from([1, 2, 7, 128]))
@settings(max_examples=100)
def test_every_token_arrives_once_per_rank_and_in_order(routing, alignment):
    topk_idx, E = routing
    R, L = len(topk_idx), E // len(topk_idx)
    weights = numbered_weights(topk_idx)
    layout = reference.get_dispatch_layout(topk_idx, E)
    for r, got in enumerate(reference.dispatch(tagged_tokens(topk_idx), layout, topk_idx, weights, alignment)):
        own = range(r * L, r * L + L)
        wanted = [(s, t) for s, idx in enumerate(topk_idx) for t, row in enumerate(idx.tolist()) if any(e in own for e in row)]
        assert [tuple(row) for row in got.recv_x.astype(int)] == wanted
        assert got.handle.recv_src_idx.tolist() == [t for _, t in wanted]
        for i, (s, t) in enumerate(wanted):
            here = [e in own for e in topk_idx[s][t].tolist()]
            assert got.recv_topk_idx[i].tolist() == [e - r * L if h else -1 for e, h in zip(topk_idx[s][t].tolist(), here)]
            assert got.recv_topk_weights[i].tolist() == [w if h else 0 for w, h in zip(weights[s][t].tolist(), here)]
        entries = np.concatenate(topk_idx).ravel().tolist()
        for e, count in zip(own, got.num_recv_tokens_per_expert_list):
            assert count % alignment == 0 and 0 <= count - entries.count(e) < alignment
        assert len(got.num_recv_tokens_per_expert_list) == L
        ends = [sum(s <= i for s, _ in wanted) for i in range(R)]
        assert got.handle.rank_prefix_matrix[:, r].tolist() == ends
        assert got.recv_x.dtype == bfloat16 and got.recv_topk_idx.dtype == np.int64
        assert got.recv_topk_weights.dtype == np.float32 and type(got.num_recv_tokens_per_expert_list[0]) is int
        assert {a.dtype for a in got.handle} == {np.dtype(np.int32), np.dtype(bool)}


@given(routings())
@settings(max_examples=100)
def test_rows_sent_and_rows_received_are_inverse(routing):
    """Whoever follows a token by the source's send_rows finds, in the destination's recv_src_idx, that token; and all rows
    are found so."""
    topk_idx, E = routing
    handles = reference.make_handles(reference.get_dispatch_layout(topk_idx, E))
    found = [np.zeros(len(h.recv_src_idx), int) for h in handles]
    for s, sender in enumerate(handles):
        for t, rows in enumerate(sender.send_rows.tolist()):
            for j, row in enumerate(rows):
                assert (row >= 0) == sender.is_token_in_rank[t, j]
                if row >= 0:
                    begin = handles[j].rank_prefix_matrix[s - 1, j] if s else 0
                    assert begin + row < handles[j].rank_prefix_matrix[s, j]
                    assert handles[j].recv_src_idx[begin + row] == t
                    found[j][begin + row] += 1
    assert all((f == 1).all() for f in found)


@given(routings())
@settings(max_examples=50)
def test_layout_counts(routing):
    topk_idx, E = routing
    R, L = len(topk_idx), E // len(topk_idx)
    for idx, got in zip(topk_idx, reference.get_dispatch_layout(topk_idx, E)):
        to_ranks = [{e // L for e in row if e >= 0} for row in idx.tolist()]
        assert got.is_token_in_rank.tolist() == [[r in ranks for r in range(R)] for ranks in to_ranks]
        assert got.num_tokens_per_rank.tolist() == [sum(r in ranks for ranks in to_ranks) for r in range(R)]
        assert got.num_tokens_per_expert.tolist() == [idx.ravel().tolist().count(e) for e in range(E)]
        assert got.is_token_in_rank.shape == (len(idx), R) and got.is_token_in_rank.dtype == bool
        assert got.num_tokens_per_rank.dtype == got.num_tokens_per_expert.dtype == np.int32


def dense(topk_idx, E):
    """Dispatch as one matrix per rank: D[r][i, j] = 1 if row i of rank r is token j, the tokens of all ranks in order."""
    L = E // len(topk_idx)
    everything = np.concatenate(topk_idx)
    return [np.eye(len(everything))[((everything >= r * L) & (everything < r * L + L)).any(axis=1)] for r in range(len(topk_idx))]


@given(routings(), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_gradients(routing, seed):
    """Dispatch multiplies by the dense D, combine by its transpose: each is the gradient of the other.

    Small integers, whose sums are exact in bf16.
    """
    (topk_idx, E), rng, H = routing, np.random.default_rng(seed), 3
    D, layout = dense(topk_idx, E), reference.get_dispatch_layout(topk_idx, E)
    integers = lambda rows: rng.integers(-8, 9, (rows, H)).astype(bfloat16)  # noqa: E731
    x = [integers(len(idx)) for idx in topk_idx]
    forward = reference.dispatch(x, layout)
    handles = [got.handle for got in forward]
    for got, d in zip(forward, D):
        np.testing.assert_array_equal(got.recv_x.astype(float), d @ np.concatenate(x).astype(float))
    gradients = [integers(len(d)) for d in D]
    backward = np.concatenate([out for out, _ in reference.combine(gradients, handles)])
    np.testing.assert_array_equal(backward.astype(float), sum(d.T @ g.astype(float) for d, g in zip(D, gradients)))
    # <D x, g> = <x, D^T g>, which is what makes one the gradient of the other
    inner = lambda a, b: sum((u.astype(float) * v.astype(float)).sum() for u, v in zip(a, b))  # noqa: E731
    assert inner([got.recv_x for got in forward], gradients) == inner([np.concatenate(x)], [backward])


@given(routings())
@settings(max_examples=50)
def test_weights_come_back(routing):
    """A selection's weight is on one rank alone, so that the sum over ranks is what was sent; a -1 comes back as 0."""
    topk_idx, E = routing
    weights, layout = numbered_weights(topk_idx), reference.get_dispatch_layout(topk_idx, E)
    got = reference.dispatch(tagged_tokens(topk_idx), layout, topk_idx, weights)
    out = reference.combine([g.recv_x for g in got], [g.handle for g in got], [g.recv_topk_weights for g in got])
    for (_, combined), w, idx in zip(out, weights, topk_idx):
        assert same_bits(combined, np.where(idx >= 0, w, np.float32(0)))


@given(routings(), st.lists(st.integers(0, 3), min_size=4, max_size=4))
@settings(max_examples=50)
def test_worst_rows_only_add_a_tail(routing, spare):
    topk_idx, E = routing
    weights, layout = numbered_weights(topk_idx), reference.get_dispatch_layout(topk_idx, E)
    args = tagged_tokens(topk_idx), layout, topk_idx, weights
    plain = reference.dispatch(*args)
    rows = [len(got.recv_x) + more for got, more in zip(plain, spare)]
    for a, b, n in zip(plain, reference.dispatch(*args, num_worst_tokens=rows), rows):
        N = len(a.recv_x)
        for whole, part in (b.recv_x, a.recv_x), (b.recv_topk_idx, a.recv_topk_idx), (b.recv_topk_weights, a.recv_topk_weights):
            assert len(whole) == n and same_bits(whole[:N], part)
        assert (b.recv_topk_idx[N:] == -1).all() and (b.recv_topk_weights[N:] == 0).all()
        assert b.num_recv_tokens_per_expert_list == []
        assert same_bits(b.handle.rank_prefix_matrix, a.handle.rank_prefix_matrix)
        assert same_bits(b.handle.send_rows, a.handle.send_rows)


@given(routings(), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_fp8_and_cached_move_the_same_rows(routing, seed):
    """Rows are moved whole, whatever they are: the same handle, the same place, the same bits."""
    (topk_idx, E), rng = routing, np.random.default_rng(seed)
    layout = reference.get_dispatch_layout(topk_idx, E)
    data = [rng.integers(0, 256, (len(idx), 256), dtype=np.uint8).view(float8_e4m3fn) for idx in topk_idx]
    scales = [rng.integers(0, 2**32, (len(idx), 2), dtype=np.uint32).view(np.float32) for idx in topk_idx]
    first = reference.dispatch(tagged_tokens(topk_idx), layout, topk_idx, numbered_weights(topk_idx), 4)
    cached = reference.dispatch(list(zip(data, scales)), layout, expert_alignment=4)
    for a, b in zip(first, cached):
        source, token = a.recv_x.astype(int).T
        want = [(data[s][t].tobytes(), scales[s][t].tobytes()) for s, t in zip(source, token)]
        assert [(d.tobytes(), s.tobytes()) for d, s in zip(*b.recv_x)] == want
        assert b.recv_x[0].dtype == float8_e4m3fn and b.recv_x[1].dtype == np.float32
        assert b.recv_x[0].shape == (len(source), 256) and b.recv_x[1].shape == (len(source), 2)
        assert b.recv_topk_idx is None and b.recv_topk_weights is None
        assert b.num_recv_tokens_per_expert_list == a.num_recv_tokens_per_expert_list
        assert all(same_bits(u, v) for u, v in zip(a.handle, b.handle))


def test_no_tokens_anywhere():
    nothing = [np.zeros((0, 2), np.int64)] * 2
    layout = reference.get_dispatch_layout(nothing, 4)
    got = reference.dispatch([np.zeros((0, 8), bfloat16)] * 2, layout, nothing, [np.zeros((0, 2), np.float32)] * 2, 8)
    assert [g.recv_x.shape for g in got] == [(0, 8)] * 2 and [g.recv_topk_idx.shape for g in got] == [(0, 2)] * 2
    assert [g.num_recv_tokens_per_expert_list for g in got] == [[0, 0]] * 2
    out = reference.combine([g.recv_x for g in got], [g.handle for g in got], [g.recv_topk_weights for g in got])
    assert [(o.shape, w.shape) for o, w in out] == [((0, 8), (0, 2))] * 2


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


@pytest.mark.parametrize(
    "topk_idx, E, words",
    [([[[0]], [[0]]], 3, "divide"), ([[[0]]], 0, "divide"), ([[[2]]], 2, "-1..1"), ([[[-2]]], 2, "-1..1")],
)
def test_impossible_routing_is_refused(topk_idx, E, words):
    with pytest.raises(ValueError, match=words):
        reference.get_dispatch_layout([np.array(idx) for idx in topk_idx], E)


# What is wrong: (what is changed in the accepted arguments of a dispatch, words of the error).
WRONG = {
    "weights alone": (dict(topk_idx=None), "topk_weights need topk_idx"),
    "alignment 0": (dict(expert_alignment=0), "expert_alignment is 0"),
    "too few rows": (dict(num_worst_tokens=[2, 2]), r"receive \[2, 3\] tokens, num_worst_tokens is \[2, 2\]"),
    "x of other tokens": (dict(x=X[::-1]), "its layout is of 3"),
    "topk_idx of other tokens": (dict(topk_idx=TOPK_IDX[::-1], topk_weights=None), "its layout is of 3"),
    "weights of another K": (dict(topk_weights=[w[:, :1] for w in WEIGHTS]), "topk_weights of rank 0 has shape"),
    "an expert too much": (dict(topk_idx=[idx + 1 for idx in TOPK_IDX]), "-1..3"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_impossible_dispatches_are_refused(wrong):
    change, words = WRONG[wrong]
    right = dict(x=X, layout=reference.get_dispatch_layout(TOPK_IDX, 4), topk_idx=TOPK_IDX, topk_weights=WEIGHTS)
    reference.dispatch(**right)
    with pytest.raises(ValueError, match=words):
        reference.dispatch(**right | change)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(num_tokens_per_rank=np.int32([2, 1])), "num_tokens_per_rank of rank 0"),
        (dict(num_tokens_per_expert=np.zeros(6, np.int32)), "differs in length"),
        (dict(is_token_in_rank=np.zeros((2, 2), bool), num_tokens_per_rank=np.zeros(2, np.int32)), "its layout is of 2"),
    ],
)
def test_impossible_layouts_are_refused(change, words):
    layout = reference.get_dispatch_layout(TOPK_IDX, 4)
    layout[0] = layout[0]._replace(**change)
    with pytest.raises(ValueError, match=words):
        reference.dispatch(X, layout)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(x=[bf16([[0, 0]])] * 2), "x of rank 0 has 1 rows, it received 2"),
        (dict(topk_weights=[np.zeros((2, 1), np.float32)] * 2), "topk_weights of rank 1 has 2 rows, it received 3"),
        (dict(bias=[bf16([[0, 0]])] * 2), "bias of rank 0"),
        (dict(bias=[(bf16([[0, 0]] * 3), bf16([[0]] * 3))] * 2), "bias of rank 0"),
    ],
)
def test_impossible_combines_are_refused(change, words):
    handles = reference.make_handles(reference.get_dispatch_layout(TOPK_IDX, 4))
    right = dict(x=[bf16([[0, 0]] * 2), bf16([[0, 0]] * 3)], handles=handles)
    reference.combine(**right)
    with pytest.raises(ValueError, match=words):
        reference.combine(**right | change)
