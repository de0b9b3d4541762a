"""High-throughput layout, dispatch and combine against the oracle, bit for bit, on real MPI ranks.

test_high_throughput_memory: results in little memory; test_high_throughput_opaque: rows and scales of all types and strides.
"""
import dataclasses
import functools
import os
import time

import numpy as np
import pytest
import ranks
from engine import down, make_high_throughput_buffer, on_gpu, up
from high_throughput_case import (CARRIED, ROUTINGS, VALUES, Case, assert_bits, assert_combined, assert_dispatched, combine,
                                  dispatch, run_round, up_x)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from pyep import Buffer, EPClosedError, EPRoutingError, layout
from pyep.channels.memory import LAST_EPOCH
from pyep.config import Config

EXAMPLES = int(os.environ.get("PYEP_TEST_EXAMPLES", 100))       # random cases for each number of ranks
HEAP = 2**25                                                    # bytes: room for a few results of every case here

# Kernels may be compiled for each pair of a shape and a mode, so pairs are few; what is in them is random.
# A shape: (most tokens, hidden, experts per rank, top-k, dtype of topk_idx, FP8).
SHAPES = ((150, 64, 4, 3, np.int64, False), (300, 8, 1, 1, np.int64, False), (21, 4104, 7, 6, np.int32, False),
          (40, 128, 2, 2, np.int64, True),                      # one scale: 132 bytes
          (21, 4480, 7, 6, np.int32, True))                     # 35 scales
# A mode: (what is carried, whether rows are for the worst, arrays of bias, whether combine sums weights).
MODES = tuple((carried, (i + j) % 2 == 1, (i + 2 * j) % 3, (i + j) % 2 == 0) for i, carried in enumerate(CARRIED) for j in (0, 1))
# Blocks, threads, warp of the CPU engine: pairs, with few tokens
WIDE = {
    "2,8,4": (((70, 136, 3, 3, np.int64, False), MODES[0]), ((20, 384, 3, 3, np.int64, True), MODES[1])),
    "3,16,8": (((70, 136, 3, 3, np.int64, False), MODES[3]), ((20, 384, 3, 3, np.int64, True), MODES[2])),
    "1,64,32": (((70, 136, 3, 3, np.int64, False), MODES[0]), ((70, 136, 3, 3, np.int64, False), MODES[3])),
    "5,1,1": (((70, 136, 3, 3, np.int64, False), MODES[0]),),
}
cpu_only = pytest.mark.skipif(on_gpu(), reason="shapes of the CPU engine")


def pairs(n):
    """The (shape, mode) pairs that n ranks try: 1 to 4 ranks together try all of MODES, and every shape in four of them."""
    return [(SHAPES[0], MODES[(n + i) % 6]) for i in (1, 3)] + [(shape, MODES[(n + i) % 6]) for i, shape in enumerate(SHAPES)]


def case_of(pair, seed, tokens, routing="random", values="normal", alignment=1, stray=False, spare=0):
    (_, hidden, per_rank, topk, index_dtype, fp8), (carried, worst, bias, sum_weights) = pair
    experts = per_rank * len(tokens)
    case = Case(seed, tokens, hidden, experts, min(topk, experts), routing, values, index_dtype, fp8, carried, alignment, (), bias,
                sum_weights, stray)
    return case.with_room(spare) if worst else case


def plain(seed, tokens, **fields):
    """A case of the first shape, 4 experts a rank, whose top-k travels."""
    return Case(seed, tuple(tokens), 64, 4 * len(tokens), 3, **fields)


@functools.cache
def shared_buffer(comm_size):
    """One buffer for all tests of a pool of ranks, so that operations of all shapes, modes and tests follow each other in it."""
    from mpi4py import MPI
    return make_high_throughput_buffer(MPI.COMM_WORLD, HEAP)


# ---- random cases ------------------------------------------------------------------------------------------------------

@st.composite
def cases(draw, n):
    pair = draw(st.sampled_from(pairs(n)))
    tokens = draw(st.tuples(*[st.integers(0, pair[0][0])] * n))
    return case_of(pair, draw(st.integers(0, 2**32)), tokens, draw(st.sampled_from(ROUTINGS)), draw(st.sampled_from(VALUES)),
                   draw(st.sampled_from((1, 4, 128))), draw(st.booleans()), draw(st.sampled_from((0, 1, 100))))


def one_round(comm, case):
    run_round(shared_buffer(comm.size), case)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_random_cases(n):
    """Any mode, any routing, any values, any number of tokens; each dispatch is followed by a cached one and by combines."""
    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(cases(n))
    def check(case):
        ranks.run(n, one_round, case)
    check()


def wide_rounds(comm, shape, pair):
    """A round of each routing, with other values, numbers of tokens and options every time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_CPU_SHAPE", shape)
        with make_high_throughput_buffer(comm, HEAP) as buf:
            for seed, routing in enumerate(ROUTINGS):
                tokens = tuple((pair[0][0] - seed - 31 * r) % (pair[0][0] + 1) for r in range(comm.size))
                run_round(buf, case_of(pair, seed, tokens, routing, VALUES[seed % 2], (1, 4, 128)[seed % 3], seed % 4 == 3, seed))


@cpu_only
@pytest.mark.parametrize("shape, pair", [pytest.param(shape, pair, id=f"{shape}-{i}")
                                         for shape, all_pairs in WIDE.items() for i, pair in enumerate(all_pairs)])
def test_wide_shapes(shape, pair):
    """Lanes, warps and blocks do their part: the CPU engine in the shapes of a GPU."""
    ranks.run(3, wide_rounds, shape, pair)


def many_tokens(comm, tokens):
    with make_high_throughput_buffer(comm, HEAP) as buf:
        for seed, routing in enumerate(("random", "one expert")):
            run_round(buf, Case(seed, tokens, 8, comm.size, 1, routing, carried="indices", sum_weights=seed == 0))


@pytest.mark.parametrize("tokens", [(5000, 64), (65, 9000, 4097)], ids=str)
def test_many_tokens(tokens):
    """So many that whatever is done in chunks takes many of them, or large ones; beside ranks with few."""
    ranks.run(len(tokens), many_tokens, tokens)


# ---- special routing and numbers of tokens -----------------------------------------------------------------------------

def rounds_of(comm, all_cases):
    for case in all_cases:
        run_round(shared_buffer(comm.size), case)


@pytest.mark.parametrize("carried", CARRIED)
@pytest.mark.parametrize("worst", [False, True])
def test_shrinking_tokens(carried, worst):
    """Fewer and fewer tokens, then more again, in rows that an earlier call has filled: no stale tails."""
    each = [(150, 150, 150), (150, 20, 80), (30, 30, 2), (1, 0, 30), (0, 0, 0), (0, 1, 0), (149, 0, 150)]
    ranks.run(3, rounds_of, [plain(seed, tokens, carried=carried, rows=(460,) * 3 if worst else (), sum_weights=True)
                             for seed, tokens in enumerate(each)])


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_rank_with_zero_tokens(n):
    """Each in turn; and all but one."""
    tokens = [tuple(0 if r == empty else 40 + r for r in range(n)) for empty in range(n)]
    tokens += [tuple(40 if r == full else 0 for r in range(n)) for full in range(n)]
    ranks.run(n, rounds_of, [plain(seed, t, routing=ROUTINGS[seed % 2]) for seed, t in enumerate(tokens)])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("routing", ["one rank", "one expert", "none", "own rank"])
def test_everything_to_one_rank(n, routing):
    """Or nothing to anyone, or all that a rank has to itself; with and without room for the worst."""
    case = plain(7, (70, 1, 130, 64)[:n], routing=routing, sum_weights=True, alignment=4)
    ranks.run(n, rounds_of, [case, case.with_room(0), case.with_room(5)])


@pytest.mark.parametrize("bias", [0, 1, 2])
def test_bias_of_all_bits(bias):
    """It is added first, infinities and NaNs included, for tokens that went nowhere too."""
    ranks.run(2, rounds_of, [plain(seed, (50, 33), routing=routing, values="bits", bias=bias, sum_weights=True)
                             for seed, routing in enumerate(("sparse", "none", "random"))])


# ---- handles -----------------------------------------------------------------------------------------------------------

def handles_in_turn(comm):
    """Three dispatches, then cached dispatches and combines of their handles in any order, the same one on all ranks."""
    buf, me = shared_buffer(comm.size), comm.rank
    made = [plain(1, range(20, 20 + 9 * comm.size, 9), sum_weights=True).make(),
            plain(2, range(9 * comm.size, 0, -9), routing="sparse", bias=1).with_room(4).make(),
            Case(3, (5, 0, 21, 3)[:comm.size], 4104, 7 * comm.size, 6, "repeated", index_dtype=np.int32, bias=2).make()]
    got = [dispatch(buf, m) for m in made]
    rng = np.random.default_rng(0)
    for _ in range(30):
        i = int(rng.integers(3))
        if rng.random() < 0.4:
            x = made[i].more_x(rng)
            assert_dispatched(buf.dispatch(up_x(x[me]), got[i][4]), made[i].cached(x)[me], me)
        else:
            assert_combined(combine(buf, made[i], got[i][4]), made[i].combined[me])
    for m, g in zip(made, got):
        assert_dispatched(g, m.dispatched[me], me)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_interleaved_handles(n):
    """A handle serves any number of cached dispatches and combines, whatever other handles do in between."""
    ranks.run(n, handles_in_turn)


def cached_is_uncached(comm):
    buf, me = shared_buffer(comm.size), comm.rank
    for seed in range(6):
        for fp8, hidden in (False, 64), (True, 128):
            case = Case(seed, tuple((11 + 7 * seed * r) % 60 for r in range(comm.size)), hidden, 4 * comm.size, 3, fp8=fp8,
                        routing=ROUTINGS[seed], values="bits", alignment=1 + seed, carried="nothing")
            case = case.with_room(seed) if seed % 2 else case
            made = case.make()
            first = dispatch(buf, made)
            again = buf.dispatch(up_x(made.x[me]), first[4])
            for got in first, again:
                assert_dispatched(got, made.dispatched[me], me)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_cached_is_uncached(n):
    """All that a dispatch returns, where it is given the same tokens, the list of counts too."""
    ranks.run(n, cached_is_uncached)


def fp8_by_a_handle_of_bf16(comm):
    buf, me = shared_buffer(comm.size), comm.rank
    case = Case(1, (30, 7, 44)[:comm.size], 128, 4 * comm.size, 3)
    made, made8 = case.make(), dataclasses.replace(case, fp8=True).make()
    handle, handle8 = dispatch(buf, made)[4], dispatch(buf, made8)[4]
    assert_dispatched(buf.dispatch(up_x(made8.x[me]), handle), made.cached(made8.x)[me], me)
    assert_dispatched(buf.dispatch(up_x(made.x[me]), handle8), made8.cached(made.x)[me], me)


def test_a_handle_moves_any_rows():
    """A handle says where rows lie, not what they are: FP8 by one of BF16, and the reverse."""
    ranks.run(3, fp8_by_a_handle_of_bf16)


# ---- both directions of both passes ------------------------------------------------------------------------------------

def gradients(comm):
    """The loss is <G, experts' input> + <Gw, their weights> for fixed G: its gradient by x is what combine makes of G.

    Against the dense matrices of dispatch, D[r][i, j] = 1 if row i of rank r is token j; small integers, whose sums are exact.
    """
    buf, me = shared_buffer(comm.size), comm.rank
    case = plain(5, (23, 0, 40, 9)[:comm.size], routing="sparse")
    made, rng, L = case.make(), np.random.default_rng(5), 4
    everything = np.concatenate(made.topk_idx)
    D = [np.eye(len(everything))[((everything >= r * L) & (everything < r * L + L)).any(axis=1)] for r in range(comm.size)]
    integers = lambda rows, columns, dtype: rng.integers(-8, 9, (rows, columns)).astype(dtype)  # noqa: E731
    x, P = ([integers(t, 64, bfloat16) for t in case.tokens] for _ in range(2))
    G, Gw = [integers(len(d), 64, bfloat16) for d in D], [integers(len(d), 3, np.float32) for d in D]
    own = slice(sum(case.tokens[:me]), sum(case.tokens[:me + 1]))

    # dispatch and its gradient
    recv_x, recv_topk_idx, _, _, handle, event = dispatch(buf, made, x=up(x[me]))
    event.synchronize()
    np.testing.assert_array_equal(down(recv_x).astype(float), D[me] @ np.concatenate(x).astype(float))
    Gw = comm.allgather(np.where(down(recv_topk_idx) >= 0, Gw[me], np.float32(0)))       # the 0 beside a -1 is a constant
    grad_x, grad_weights, event = buf.combine(up(G[me]), handle, topk_weights=up(Gw[me]))
    event.synchronize()
    dense = sum(d.T @ g.astype(float) for d, g in zip(D, G))[own]
    np.testing.assert_array_equal(down(grad_x).astype(float), dense)
    np.testing.assert_array_equal(down(grad_weights), sum(d.T @ g for d, g in zip(D, Gw))[own])

    # combine and its gradient: the loss is <P, combined_x>, whose gradient by the experts' output is what dispatch makes of P
    combined_x, _, event = buf.combine(recv_x, handle)           # in place, from symmetric memory
    event.synchronize()
    grad_y, *_, event = buf.dispatch(up(P[me]), handle)
    event.synchronize()
    np.testing.assert_array_equal(down(grad_y).astype(float), D[me] @ np.concatenate(P).astype(float))
    inner = lambda a, b: float((a.astype(float) * b.astype(float)).sum())  # noqa: E731
    here = inner(down(combined_x), P[me]), inner(down(recv_x), down(grad_y))
    assert len(set(np.sum(comm.allgather(here), axis=0))) == 1


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_gradient_of_dispatch_is_combine_and_the_reverse(n):
    ranks.run(n, gradients)


# ---- memory ------------------------------------------------------------------------------------------------------------

def results_live(comm):
    """As many dispatches as there are, all held; then all compared, views of some that were dropped too."""
    buf, me = shared_buffer(comm.size), comm.rank
    made = [plain(seed, tuple((50 + seed * (r + 3)) % 60 for r in range(comm.size)), routing=ROUTINGS[seed % 3]).make()
            for seed in range(12)]
    got = [dispatch(buf, m) for m in made]
    combined = [combine(buf, m, g[4]) for m, g in zip(made, got)]
    rows = [(g[0][1:3], m.dispatched[me].recv_x[1:3]) for m, g in zip(made, got)][::2]
    for m, g in zip(made, got):
        assert_dispatched(g, m.dispatched[me], me)
    for m, c in zip(made, combined):
        assert_combined(c, m.combined[me])
    del got, g, c
    for seed in range(20):
        run_round(buf, plain(seed, (55,) * comm.size))
    for row, want in rows:
        assert_bits(down(row), want, "a view of a result that was dropped")


@pytest.mark.parametrize("n", [1, 3])
def test_results_stay_valid(n):
    """Ordinary lifetimes: later operations leave earlier results alone, however many there are."""
    ranks.run(n, results_live)


def thousands(comm, dispatches):
    """Each result is dropped when the next has come, in a heap that holds but a few; handles and views outlive others."""
    tokens, me = (40,) * comm.size, comm.rank
    made = [plain(seed, tokens, sum_weights=True).make() for seed in range(3)] + [plain(3, tokens).with_room(2).make()]
    wanted = [(m.dispatched, m.combined) for m in made]          # made once: the oracle takes longer than the operations
    with make_high_throughput_buffer(comm, 2**15 * (1 + comm.size)) as buf:
        kept, handle = None, None
        for i in range(dispatches):
            m, (dispatched, combined) = made[i % 4], wanted[i % 4]
            got = dispatch(buf, m)
            kept = got[0][-1:] if i % 7 == 0 else kept           # a view, which keeps its memory
            handle = got[4]
            out = combine(buf, m, handle)
            if i % 100 < 4:
                assert_dispatched(got, dispatched[me], me)
                assert_combined(out, combined[me])
            if i % 50 == 0:
                cached = buf.dispatch(up_x(m.x[me]), handle)
                assert_bits(down(cached[0])[:len(m.dispatched[me].recv_x)][:1], m.dispatched[me].recv_x[:1], "cached")
        assert kept is not None


def test_memory_comes_back():
    ranks.run(2, thousands, 3000)


# ---- rows for the worst ------------------------------------------------------------------------------------------------

def too_few_rows(comm, short):
    """Rank `short` has a row too few, the others more than enough."""
    case = plain(3, (50, 40, 45)[:comm.size]).with_room(20)
    made, me = case.make(), comm.rank
    rows = [int(n) for n in made.handles[0].rank_prefix_matrix[-1]]
    buf = make_high_throughput_buffer(comm, HEAP, timeout_s=20)
    held = dispatch(buf, made)
    n = rows[me] - 1 if me == short else rows[me] + 20
    start = time.monotonic()
    with pytest.raises(EPRoutingError, match=rf"(?s)num_worst_tokens.*{rows[short] - 1}|{rows[short]}.*num_worst_tokens"):
        got = dispatch(buf, made, num_worst_tokens=n)
        got[5].synchronize()
    assert time.monotonic() - start < 10                         # nobody waits for the timeout
    for part, want in zip(held[:3], made.dispatched[me][:3]):    # nothing was overwritten
        assert_bits(down(part)[:rows[me]], want[:rows[me]], "what an earlier dispatch has received")
    with pytest.raises(EPClosedError, match="unusable"):
        run_round(buf, case)
    buf.destroy()


@pytest.mark.parametrize("n, short", [(1, 0), (2, 0), (3, 2)])
def test_too_few_worst_tokens(n, short):
    """EPRoutingError on every rank, also on those that have room."""
    ranks.run(n, too_few_rows, short)


# ---- how an operation is asked for -------------------------------------------------------------------------------------

WAYS = ("sync", "async", "with", "host", "nobody waits", "after an event", "sync after an event", "allocated on comm")


def operate(how, operation, capture):
    """What an operation returns that finishes in one of these ways."""
    options = dict(async_finish=not how.startswith("sync"))
    if how.endswith("after an event") or how == "allocated on comm":
        options["previous_event"] = capture()
    if how == "allocated on comm":
        options["allocate_on_comm_stream"] = True
    result = operation(**options)
    event = result[-1]
    if how == "with":
        with event:
            pass
    elif how == "host":
        event.synchronize()
    elif not how.startswith("sync") and how != "nobody waits":
        event.current_stream_wait()
    return result                                                # "nobody waits": the buffer's next operation does


def finish_in_all_ways(comm):
    """Each rank in another order, so that different ways meet in one operation."""
    buf, me = shared_buffer(comm.size), comm.rank
    for seed in range(len(WAYS) ** 2):
        first, second = divmod(seed, len(WAYS))
        first, second = WAYS[(first + me) % len(WAYS)], WAYS[(second + 3 * me) % len(WAYS)]
        case = plain(seed, tuple((seed + 17 * r) % 50 for r in range(comm.size)), carried=CARRIED[seed % 3])
        made = (case.with_room(seed % 4) if seed % 2 else case).make()
        idx, x, y = up(made.topk_idx[me]), up_x(made.x[me]), up(made.y[me])      # kept to the end: nobody may have waited before
        travels = dict(dict(weights=dict(topk_idx=idx, topk_weights=up(made.topk_weights[me])), indices=dict(topk_idx=idx),
                            nothing={})[case.carried], num_worst_tokens=made.case.rows[me] if made.case.rows else 0)
        per_rank, _, per_expert, in_rank, _ = operate(first, functools.partial(buf.get_dispatch_layout, idx, case.experts),
                                                      buf.capture)
        got = operate(second, functools.partial(buf.dispatch, x, None, per_rank, None, in_rank, per_expert, **travels), buf.capture)
        again = operate(first, functools.partial(buf.dispatch, x, got[4]), buf.capture)
        out = operate(second, functools.partial(buf.combine, y, got[4]), buf.capture)
        last = buf.combine(y, got[4])
        last[2].synchronize()                                    # this one ran on the caller's stream, after all others
        assert_dispatched(got, made.dispatched[me], me)
        assert_dispatched(again, made.cached(made.x)[me], me)
        for combined in out, last:
            assert_combined(combined, made.combined[me])


@pytest.mark.parametrize("n", [1, 3])
def test_ways_to_finish(n):
    """async_finish, previous_event and allocate_on_comm_stream, in any order and different on every rank."""
    ranks.run(n, finish_in_all_ways)


def few_sms(comm):
    buf, before = shared_buffer(comm.size), Buffer.num_sms
    try:
        for sms in 2, 20, 8:
            run_round(buf, plain(sms, (50, 7, 33)[:comm.size], routing="sparse"), config=Config(sms))
            run_round(buf, plain(sms, (33, 50, 7)[:comm.size]), config=Buffer.get_dispatch_config(comm.size))
            Buffer.set_num_sms(sms)
            run_round(buf, plain(sms, (7, 33, 50)[:comm.size]))
    finally:
        Buffer.num_sms = before


@pytest.mark.parametrize("n", [1, 3])
def test_any_number_of_sms(n):
    """By a Config, and by `set_num_sms`, changed between operations; the results are the same."""
    ranks.run(n, few_sms)


def back_to_back(comm, rounds):
    """Rounds without any pause or barrier but random sleeps; rank 0 never has a token."""
    buf, me = shared_buffer(comm.size), comm.rank
    prepared = []
    for seed in range(5):
        case = plain(seed, (0, *[(7 * seed * r) % 30 for r in range(1, comm.size)]), routing=ROUTINGS[seed])
        prepared.append((case.with_room(seed) if seed % 2 else case).make())
        prepared[-1].wanted = prepared[-1].dispatched[me], prepared[-1].combined[me]
    rng = np.random.default_rng(me)
    for i in range(rounds):
        made = prepared[i % 5]
        got = dispatch(buf, made)
        if rng.random() < 0.05:
            time.sleep(rng.random() * 0.01)
        out = combine(buf, made, got[4])
        if i % 10 == 0 or i > rounds - 10:
            assert_dispatched(got, made.wanted[0], me)
            assert_combined(out, made.wanted[1])


def test_thousand_rounds_with_an_idle_rank():
    """Nobody overruns a peer, however late that is."""
    ranks.run(3, back_to_back, 1000)


# ---- epochs ------------------------------------------------------------------------------------------------------------

def latest_epoch(buf):
    region = layout.control(buf.group_size)["ht_epoch"]
    return int(down(buf.symmetric_memory("int64", (1,), region.offset))[0])


def rounds_from_epoch(comm, epoch):
    with make_high_throughput_buffer(comm, HEAP) as buf:
        comm.Barrier()
        buf._connection.write_control(epoch)
        comm.Barrier()
        assert latest_epoch(buf) == epoch
        for seed in range(12):
            case = plain(seed, tuple((seed + 13 * r) % 90 for r in range(comm.size)))
            run_round(buf, case.with_room(seed) if seed % 3 == 1 else case)
        return latest_epoch(buf)


@pytest.mark.parametrize("epoch", [LAST_EPOCH - 9, LAST_EPOCH - 8, LAST_EPOCH, 2**31 - 9])
def test_epoch_wraps_around(epoch):
    """The 32-bit epoch of this family starts over, and changes its sign, in the middle of the rounds."""
    ends = ranks.run(2, rounds_from_epoch, epoch)
    assert ends[0] == ends[1] and (ends[0] < 1000 if epoch > 2**31 else ends[0] > 2**31)


# ---- beside low latency ------------------------------------------------------------------------------------------------

def both_families(comm):
    from case import Case as LowLatencyCase
    from case import run_round as low_latency_round
    size = Buffer.get_low_latency_rdma_size_hint(8, 64, comm.size, 4 * comm.size, num_topk=3)
    with make_high_throughput_buffer(comm, HEAP, num_rdma_bytes=size, low_latency_mode=True) as buf:
        held = dispatch(buf, made := plain(99, (20,) * comm.size).make())
        for seed in range(10):
            low_latency_round(buf, LowLatencyCase(seed, 8, 64, 4 * comm.size, 3, (8, 0, 5)[:comm.size]))
            run_round(buf, plain(seed, (40, 3, 22)[:comm.size], routing=ROUTINGS[seed % 6]))
        assert_dispatched(held, made.dispatched[comm.rank], comm.rank)


def test_both_families_in_one_buffer():
    """Low-latency and high-throughput operations in turn, each in memory of its own."""
    ranks.run(3, both_families)
