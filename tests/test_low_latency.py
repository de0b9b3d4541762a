"""Low-latency dispatch and combine against the oracle, bit for bit, on real MPI ranks."""
import functools
import os
import time

import numpy as np
import pytest
import ranks
from case import ROUTINGS, VALUES, Case, assert_dispatched, assert_same, run_round
from engine import down, make_buffer, up
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyep import reference
from pyep.channels.memory import LAST_EPOCH

EXAMPLES = int(os.environ.get("PYEP_TEST_EXAMPLES", 75))        # random cases for each number of ranks
# (max tokens, hidden, experts per rank, top-k, dtype of topk_idx).  Few, since each compiles kernels; what is in them is random.
SHAPES = ((8, 64, 4, 3, np.int64), (1, 8, 1, 1, np.int64), (21, 4104, 7, 6, np.int32))
WIDE = ("2,8,4", "3,16,8", "1,64,32", "5,1,1")                  # blocks, threads, warp of the CPU engine
cpu_only = pytest.mark.skipif(os.environ.get("PYEP_DEVICE") == "cuda", reason="shapes of the CPU engine")


@functools.cache
def shared_buffer(comm_size):
    """One buffer for all tests of a pool of ranks, so that operations of all shapes and tests follow each other in it."""
    from mpi4py import MPI
    experts = max(s[2] for s in SHAPES) * comm_size
    return make_buffer(MPI.COMM_WORLD, max(s[0] for s in SHAPES), max(s[1] for s in SHAPES), experts, max(s[3] for s in SHAPES))


@st.composite
def cases(draw, n):
    max_tokens, hidden, per_rank, topk, index_dtype = draw(st.sampled_from(SHAPES))
    tokens = draw(st.tuples(*[st.integers(0, max_tokens)] * n))
    return Case(draw(st.integers(0, 2**32)), max_tokens, hidden, per_rank * n, min(topk, per_rank * n), tokens,
                draw(st.sampled_from(ROUTINGS)), draw(st.sampled_from(VALUES)), index_dtype)


def one_round(comm, case, **options):
    run_round(shared_buffer(comm.size), case, **options)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_random_cases(n):
    """Any routing, any values, any number of tokens, with and without hooks, zero copy and preallocated outputs."""
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(n), st.tuples(st.booleans(), st.booleans()), st.booleans(), st.booleans())
    def check(case, hooks, zero_copy, out):
        ranks.run(n, one_round, case, hooks=hooks, zero_copy=zero_copy, out=out)
    check()


def wide_rounds(comm, shape):
    os.environ["PYEP_CPU_SHAPE"] = shape
    try:
        with make_buffer(comm, 6, 136, 3 * comm.size, 3) as buf:
            for seed, routing in enumerate(ROUTINGS):
                tokens = tuple((seed + 5 * r) % 7 for r in range(comm.size))
                run_round(buf, Case(seed, 6, 136, 3 * comm.size, 3, tokens, routing, "bits"), hooks=(seed % 2 == 0, seed % 3 == 0))
    finally:
        del os.environ["PYEP_CPU_SHAPE"]


@cpu_only
@pytest.mark.parametrize("shape", WIDE)
def test_wide_shapes(shape):
    """Lanes, warps and blocks do their part: the CPU engine in the shapes of a GPU."""
    ranks.run(3, wide_rounds, shape)


def back_to_back(comm, rounds):
    """Rounds without any pause or barrier but random sleeps; rank 0 never has a token, so it never has to wait for data."""
    buf, me = shared_buffer(comm.size), comm.rank
    shape = 8, 4 * comm.size
    prepared = []
    for seed in range(5):
        case = Case(seed, 8, 64, shape[1], 3, (0, *[(seed * r) % 9 for r in range(1, comm.size)]), ROUTINGS[seed])
        x, idx, w, y = case.make()
        prepared.append(([up(a[me]) for a in (x, idx, w, y)], reference.low_latency_dispatch(x, idx, *shape)[me],
                         reference.low_latency_combine(y, idx, w, *shape)[me]))
    rng = np.random.default_rng(me)
    for i in range(rounds):
        (x, idx, w, y), dispatched, combined = prepared[i % 5]
        got = buf.low_latency_dispatch(x, idx, *shape, use_fp8=False)
        if rng.random() < 0.05:
            time.sleep(rng.random() * 0.01)
        out, event, _ = buf.low_latency_combine(y, idx, w, got.handle)
        if i % 10 == 0 or i > rounds - 10:
            event.synchronize()
            assert_dispatched(got, dispatched)
            assert_same(down(out), combined, f"round {i}")


def test_thousand_rounds_with_an_idle_rank():
    """Nobody overruns a peer, however late that is."""
    ranks.run(3, back_to_back, 1000)


def rounds_from_epoch(comm, epoch):
    with make_buffer(comm, 8, 64, 4 * comm.size, 3) as buf:
        comm.Barrier()
        buf._write_control(epoch)
        comm.Barrier()
        for seed in range(12):
            tokens = tuple((seed + 3 * r) % 9 for r in range(comm.size))
            run_round(buf, Case(seed, 8, 64, 4 * comm.size, 3, tokens), hooks=(seed % 2 == 0, seed % 3 == 0))


@pytest.mark.parametrize("epoch", [LAST_EPOCH - 9, LAST_EPOCH - 8, LAST_EPOCH, 2**31 - 9])
def test_epoch_wraps_around(epoch):
    """The 32-bit epoch starts over, and changes its sign, in the middle of the rounds."""
    ranks.run(2, rounds_from_epoch, epoch)


def two_in_flight(comm, order):
    """Two dispatches are sent before either is received; odd ranks call their hooks in the given order, even ones at once."""
    buf, me = shared_buffer(comm.size), comm.rank
    shape = 8, 4 * comm.size
    for seed in range(0, 20, 2):
        made = [Case(seed + i, 8, 64, shape[1], 3, (8,) * comm.size).make() for i in (0, 1)]
        got = []
        for x, idx, _, _ in made:
            got.append(buf.low_latency_dispatch(up(x[me]), up(idx[me]), *shape, use_fp8=False, return_recv_hook=True))
            if me % 2 == 0:
                got[-1].hook()
        for i in order if me % 2 else ():
            got[i].hook()
        for (x, idx, _, _), g in zip(made, got):
            g.event.synchronize()
            assert_dispatched(g, reference.low_latency_dispatch(x, idx, *shape)[me])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_in_flight(order):
    """Hooks may be called in any order, while other ranks do not use them."""
    ranks.run(3, two_in_flight, order)


def combines_of_one_dispatch(comm):
    buf, me = shared_buffer(comm.size), comm.rank
    case = Case(1, 8, 64, 4 * comm.size, 3, tuple(range(5, 5 + comm.size)))
    x, idx, w, y = case.make()
    got = buf.low_latency_dispatch(up(x[me]), up(idx[me]), 8, case.experts, use_fp8=False)
    for scale in range(1, 20):
        y_scaled = [(a.astype(np.float32) * scale).astype(a.dtype) for a in y]
        out, event, _ = buf.low_latency_combine(up(y_scaled[me]), up(idx[me]), up(w[me]), got.handle)
        event.synchronize()
        assert_same(down(out), reference.low_latency_combine(y_scaled, idx, w, 8, case.experts)[me], f"combine {scale}")


def test_a_handle_serves_many_combines():
    ranks.run(2, combines_of_one_dispatch)


def combine_masked(comm):
    """Selections masked between dispatch and combine add nothing, and leave nothing behind for the next operation."""
    buf, me = shared_buffer(comm.size), comm.rank
    case = Case(2, 8, 64, 4 * comm.size, 3, (8,) * comm.size)
    x, idx, w, y = case.make()
    for turn in range(4):
        got = buf.low_latency_dispatch(up(x[me]), up(idx[me]), 8, case.experts, use_fp8=False)
        masked = [np.where(np.arange(3) == turn, -1, i) for i in idx]
        out, event, _ = buf.low_latency_combine(up(y[me]), up(masked[me]), up(w[me]), got.handle)
        event.synchronize()
        kept = [np.where(m >= 0, v, 0).astype(np.float32) for m, v in zip(masked, w)]       # finite outputs: 0 adds nothing
        assert_same(down(out), reference.low_latency_combine(y, idx, kept, 8, case.experts)[me], f"turn {turn}")
        run_round(buf, case)


def test_combine_with_masked_selections():
    ranks.run(2, combine_masked)


def results_in_turn(comm):
    buf = shared_buffer(comm.size)
    idx = up(np.zeros((1, 3), np.int64) + np.arange(3))
    got = [buf.low_latency_dispatch(up(np.full((1, 64), i, "bfloat16")), idx, 8, 4, use_fp8=False) for i in range(3)]
    values = [float(down(g.recv_x)[0, 0, 0]) for g in got]
    return values


def test_results_live_until_the_second_next_dispatch():
    """Two sets of results are used in turn."""
    assert ranks.run(1, results_in_turn) == [[2.0, 1.0, 2.0]]
