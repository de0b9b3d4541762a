"""Low-latency dispatch and combine against the oracle, bit for bit, on real MPI ranks."""
import contextlib
import dataclasses
import functools
import os
import time

import numpy as np
import pytest
import ranks
from case import MODES, ROUTINGS, VALUES, Case, assert_dispatched, assert_same, dispatch, run_round
from engine import down, make_buffer, up
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyep import EPError, EPTimeoutError, reference
from pyep.channels.memory import LAST_EPOCH
from pyep.connection import Connection
from pyep.kernels.cpu import CpuEngine

EXAMPLES = int(os.environ.get("PYEP_TEST_EXAMPLES", 100))       # random cases for each number of ranks
LATE = 2.0                                                      # seconds: nobody is late by that only because the machine is busy

# Kernels are compiled for each pair of a shape and a mode, so pairs are few; what is in them is random.
# A shape: (max tokens, hidden, experts per rank, top-k, dtype of topk_idx).
SHAPES = ((8, 64, 4, 3, np.int64), (1, 8, 1, 1, np.int64), (21, 4104, 7, 6, np.int32))          # all in the first of MODES
OTHER_SHAPES = {                                                # in the other modes, by kind of FP8
    "": SHAPES[0],
    "fp8": (21, 4480, 7, 6, np.int32),                          # 35 blocks and as many scales
    "fp8_round": (5, 128, 2, 2, np.int64),                      # one block, one scale: 132 bytes
    "fp8_ue8m0": (8, 1536, 4, 3, np.int64),                     # three words of four scales
}
PLAIN, BY_RANK, REDUCED = (136, MODES[0]), (384, ("fp8", "rank_major", True)), (512, ("fp8_ue8m0", "expert_major", True))
WIDE = {                                                        # blocks, threads, warp of the CPU engine: hidden and mode
    "2,8,4": (PLAIN, BY_RANK),
    "3,16,8": (PLAIN, REDUCED),
    "1,64,32": (PLAIN, BY_RANK, REDUCED),
    "5,1,1": (PLAIN,),
}
cpu_only = pytest.mark.skipif(os.environ.get("PYEP_DEVICE") == "cuda", reason="shapes of the CPU engine")


def pairs(n):
    """The (shape, mode) pairs that n ranks try.

    Whatever n is, every kind of FP8 occurs, and every layout with and without weights; 1 to 4 ranks together try all of MODES: four
    kinds by four, as in a Latin square.
    """
    others = [mode for i, mode in enumerate(MODES) if i and (i // 4 + i + 1 - n) % 4 == 0]
    return [(shape, MODES[0]) for shape in SHAPES] + [(OTHER_SHAPES[mode[0]], mode) for mode in others]


def name_of(mode):
    fp8, layout, weighted = mode
    return f"{fp8 or 'bf16'}-{layout}" + "-weighted" * weighted


def case_of(pair, seed, tokens, routing="random", values="normal"):
    (max_tokens, hidden, per_rank, topk, index_dtype), mode = pair
    experts = per_rank * len(tokens)
    return Case(seed, max_tokens, hidden, experts, min(topk, experts), tokens, routing, values, index_dtype, *mode)


@functools.cache
def shared_buffer(comm_size):
    """One buffer for all tests of a pool of ranks, so that operations of all shapes, modes and tests follow each other in it."""
    from mpi4py import MPI
    max_tokens, hidden, per_rank, topk = (max(sizes) for sizes in zip(*(shape[:4] for shape, _ in pairs(comm_size))))
    return make_buffer(MPI.COMM_WORLD, max_tokens, hidden, per_rank * comm_size, topk)


def rounds(buf, pair):
    """A round of each routing, with other values, numbers of tokens and options every time."""
    for seed, routing in enumerate(ROUTINGS):
        tokens = tuple((seed + 5 * r) % (pair[0][0] + 1) for r in range(buf.group_size))
        case = case_of(pair, seed, tokens, routing, VALUES[seed % len(VALUES)])
        run_round(buf, case, hooks=(seed % 2 == 0, seed % 3 == 0), zero_copy=seed % 4 == 0, out=seed == 1)


def rounds_in_shared_buffer(comm, pair):
    rounds(shared_buffer(comm.size), pair)


@pytest.mark.parametrize("n, pair", [pytest.param(n, pair, id=f"{n}-{pair[0][1]}-{name_of(pair[1])}")
                                     for n in (1, 2, 3, 4) for pair in pairs(n)])
def test_shapes_and_modes(n, pair):
    """Every pair by itself; the test's name has the number of ranks, hidden, and the mode."""
    ranks.run(n, rounds_in_shared_buffer, pair)


@st.composite
def cases(draw, n):
    pair = draw(st.sampled_from(pairs(n)))
    tokens = draw(st.tuples(*[st.integers(0, pair[0][0])] * n))
    return case_of(pair, draw(st.integers(0, 2**32)), tokens, draw(st.sampled_from(ROUTINGS)), draw(st.sampled_from(VALUES)))


def one_round(comm, case, **options):
    run_round(shared_buffer(comm.size), case, **options)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_random_cases(n):
    """Any mode, any routing, any values, any number of tokens, with and without hooks, zero copy and preallocated outputs."""
    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(cases(n), st.tuples(st.booleans(), st.booleans()), st.booleans(), st.booleans())
    def check(case, hooks, zero_copy, out):
        ranks.run(n, one_round, case, hooks=hooks, zero_copy=zero_copy, out=out)
    check()


def wide_rounds(comm, shape, hidden, mode, max_tokens=6):
    os.environ["PYEP_CPU_SHAPE"] = shape
    try:
        with make_buffer(comm, max_tokens, hidden, 3 * comm.size, 3) as buf:
            rounds(buf, ((max_tokens, hidden, 3, 3, np.int64), mode))
    finally:
        del os.environ["PYEP_CPU_SHAPE"]


@cpu_only
@pytest.mark.parametrize("shape, hidden, mode", [pytest.param(shape, *tried, id=f"{shape}-{name_of(tried[1])}")
                                                 for shape, all_tried in WIDE.items() for tried in all_tried])
def test_wide_shapes(shape, hidden, mode):
    """Lanes, warps and blocks do their part: the CPU engine in the shapes of a GPU."""
    ranks.run(3, wide_rounds, shape, hidden, mode)


def phases_of_a_gpu(engine, operation, threads, num_ranks):
    """As `CudaEngine.phases`: one launch may do both halves at once, some blocks of a dispatch sending, the others receiving."""
    blocks = engine.blocks
    both = ("both", blocks, 1, blocks - 1) if operation == "dispatch" else ("both", blocks, blocks, blocks)
    return both, ("send", blocks, blocks, 0), ("receive", blocks, 0, blocks)


@contextlib.contextmanager
def fused_buffer(comm, **options):
    """A buffer for 8 tokens of 64 values, 4 experts a rank, top-3, whose launches do both halves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuEngine, "phases", phases_of_a_gpu)
        patch.setenv("PYEP_CPU_SHAPE", "3,8,4")
        with make_buffer(comm, 8, 64, 4 * comm.size, 3, **options) as buf:
            yield buf


def fused_rounds(comm, shape, hidden, mode):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuEngine, "phases", phases_of_a_gpu)
        wide_rounds(comm, shape, hidden, mode)


@cpu_only
@pytest.mark.parametrize("shape, hidden, mode", [("3,32,32", *PLAIN), ("4,16,8", *BY_RANK),
                                                 ("3,8,4", 136, ("", "expert_major", True))])
def test_fused_launches(shape, hidden, mode):
    """Both halves in one launch, as on a GPU, where own rows and partials do not travel."""
    ranks.run(2, fused_rounds, shape, hidden, mode)


@cpu_only
def test_more_blocks_than_tokens():
    """Rank-major, where what has no token must be cleared all the same."""
    ranks.run(2, wide_rounds, "5,1,1", 8, ("", "rank_major", True), 1)


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
        buf._connection.write_control(epoch)
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
    buf, me, all_pairs = shared_buffer(comm.size), comm.rank, pairs(comm.size)
    for seed in range(20):
        chosen = [all_pairs[(seed + i * (seed % 3)) % len(all_pairs)] for i in (0, 1)]      # alike, or of other shape and mode
        two = [case_of(pair, seed + i, (pair[0][0],) * comm.size) for i, pair in enumerate(chosen)]
        got = []
        for case in two:
            got.append(dispatch(buf, case, *case.make()[:3], return_recv_hook=True))
            if me % 2 == 0:
                got[-1].hook()
        for i in order if me % 2 else ():
            got[i].hook()
        for case, g in zip(two, got):
            g.event.synchronize()
            assert_dispatched(g, case.dispatched(*case.make()[:3])[me])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_in_flight(order):
    """Hooks may be called in any order, while other ranks do not use them."""
    ranks.run(3, two_in_flight, order)


@contextlib.contextmanager
def counting_kernels(buf):
    """A list that grows by a name with every kernel that the buffer's engine makes."""
    engine, made = type(buf._connection.engine), []
    right = engine.kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "kernel", lambda self, fn, *args, **more: made.append(fn.__name__) or right(self, fn, *args, **more))
        yield made


def another_max_each_round(comm, mode):
    """What the kernels cost, then what is kept for results in all, and for M = 8 alone."""
    def nbytes(results):
        return sum(sum(a.nbytes for a in received if a is not None) for received, _ in results._turns[:2])
    with make_buffer(comm, 8, 64, 4 * comm.size, 3) as buf, counting_kernels(buf) as made:
        for seed, max_tokens in enumerate((5, 3, 8, 1, 7, 2, 8)):
            tokens = tuple((seed + 3 * r) % (max_tokens + 1) for r in range(comm.size))
            case = Case(seed, max_tokens, 64, 4 * comm.size, 3, tokens, ROUTINGS[seed % len(ROUTINGS)], "bits", np.int64, *mode)
            run_round(buf, case, hooks=(seed % 2 == 0, seed % 3 == 0), zero_copy=seed % 2 == 0, out=seed == 3)
            kernels = kernels if seed else len(made)             # those of the first round
            assert len(made) == kernels, f"M = {max_tokens} has compiled {made[kernels:]}"
        assert len(buf._results) == 1 and comm.allreduce(len(made)) == comm.size * kernels
        results, = buf._results.values()
        assert nbytes(results) == sum(a.nbytes for spec in (results._sets, [results._selected[:2]])
                                      for arrays in spec for a in arrays if a is not None)
        return nbytes(results)


@pytest.mark.parametrize("mode", [MODES[0], ("", "rank_major", True)], ids=name_of)
def test_another_max_each_round(mode):
    """num_max_dispatch_tokens_per_rank may be another each time: nothing is compiled, and there is memory for the largest only."""
    first, second = ranks.run(2, another_max_each_round, mode)
    rows = 2 * 8 * 4 if mode == MODES[0] else 2 * 8
    assert first == second and 2 * rows * 2 * 64 < first < 2 * rows * 2 * 64 * 2


def results_that_grow(comm):
    me, size = comm.rank, comm.size
    small, large = Case(1, 2, 64, 4 * size, 3, (2,) * size), Case(2, 8, 64, 4 * size, 3, (8,) * size)
    with make_buffer(comm, 8, 64, 4 * size, 3) as buf:
        held = [(case, dispatch(buf, case, *case.make()[:3])) for case in (small, large)]
        for case, got in held:
            got.event.synchronize()
            assert_dispatched(got, case.dispatched(*case.make()[:3])[me])
            x, idx, w, y = case.make()
            out, event, _ = buf.low_latency_combine(up(y[me]), up(idx[me]), up(w[me]), got.handle)
            event.synchronize()
            assert_same(down(out), case.combined(y, idx, w)[me], "combined_x")
        dispatch(buf, small, *small.make()[:3])
        with pytest.raises(ValueError, match="two more of that mode"):
            _, idx, w, y = (up(a[me]) for a in small.make())
            buf.low_latency_combine(y, idx, w, held[0][1].handle)


def test_results_live_while_others_grow():
    """Until the second next dispatch of their mode, whatever M those have."""
    ranks.run(2, results_that_grow)


def disagree(comm, change):
    """After a round of either call, rank 1 makes another one than rank 0: what each is told."""
    case = Case(1, 8, 64, 4 * comm.size, 3, (5,) * comm.size)
    other = dataclasses.replace(case, **change)
    with make_buffer(comm, 8, 512, 4 * comm.size, 3, timeout_s=60) as buf:
        for known in case, other:
            run_round(buf, known)
        comm.Barrier()
        started = time.monotonic()
        with pytest.raises(EPError, match="all ranks must make the same calls") as caught:
            run_round(buf, other if comm.rank == 1 else case)
        assert not isinstance(caught.value, EPTimeoutError) and time.monotonic() - started < 30
        return str(caught.value)


@pytest.mark.parametrize("change", [dict(max_tokens=6), dict(hidden=512), dict(layout="rank_major")], ids=str)
def test_ranks_that_disagree_are_told(change):
    """Of another M, another shape or another mode than the peer's, though kernels of both are known."""
    for rank, text in enumerate(ranks.run(2, disagree, change)):
        assert f"rank {rank} called low_latency_dispatch" in text and "another shape or mode" in text and "5 tokens" in text


def combines_of_one_dispatch(comm):
    """Those that get no weights look at none: they are given nonsense every other time."""
    buf, me = shared_buffer(comm.size), comm.rank
    for pair in pairs(comm.size):
        max_tokens = pair[0][0]
        case = case_of(pair, 1, tuple((max_tokens + r) // 2 for r in range(comm.size)))
        x, idx, w, y = case.make()
        got = dispatch(buf, case, x, idx, w)
        for scale in range(1, 6):
            y_scaled = [(a.astype(np.float32) * scale).astype(a.dtype) for a in y]
            selections = idx[me], w[me]
            if not case.direct and scale % 2:
                selections = np.full_like(idx[me], -1), np.full_like(w[me], np.nan)
            out, event, _ = buf.low_latency_combine(up(y_scaled[me]), *map(up, selections), got.handle)
            event.synchronize()
            assert_same(down(out), case.combined(y_scaled, idx, w)[me], f"combine {scale} of {pair}")


@pytest.mark.parametrize("n", [2, 3])
def test_a_handle_serves_many_combines(n):
    ranks.run(n, combines_of_one_dispatch)


def combine_masked(comm):
    """Selections masked between dispatch and combine add nothing, and leave nothing behind for the next operation."""
    mask_and_combine(shared_buffer(comm.size), comm)


def combine_masked_fused(comm):
    with fused_buffer(comm) as buf:
        mask_and_combine(buf, comm)


def mask_and_combine(buf, comm):
    me = comm.rank
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


@pytest.mark.parametrize("combine", [combine_masked, pytest.param(combine_masked_fused, marks=cpu_only)])
def test_combine_with_masked_selections(combine):
    ranks.run(2, combine)


def combine_after_a_failure(comm):
    """Rank 1 does not come; rank 0's host launches a combine before it looks at how the dispatch went.  The combine's `out`."""
    with fused_buffer(comm, timeout_s=2) as buf:
        case, me = Case(2, 8, 64, 4 * comm.size, 3, (8,) * comm.size), comm.rank
        x, idx, w, y = case.make()
        run_round(buf, case)
        comm.Barrier()
        out = np.full_like(x[me], 7)
        if me == 0:
            with pytest.MonkeyPatch.context() as unaware:
                unaware.setattr(Connection, "check", lambda connection: None)
                handle = buf.low_latency_dispatch(x[me], idx[me], 8, case.experts, use_fp8=False).handle
                buf.low_latency_combine(y[me], idx[me], w[me], handle, out=out)
            with pytest.raises(EPTimeoutError, match="low_latency_dispatch, receive phase: rank 0 waited 2 s for rank 1"):
                buf.destroy()
        comm.Barrier()
    return out.astype(np.float32)


@cpu_only
def test_nothing_is_combined_after_a_failure():
    """In a launch that reads y itself: the rows that it would read are those of another dispatch."""
    assert (ranks.run(2, combine_after_a_failure)[0] == 7).all()


def statistics(comm, shape, layout):
    """Each rank in turn comes late, by LATE; returns by turn what the ranks in time waited for whom, in s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_CPU_SHAPE", shape)
        with make_buffer(comm, 64, 64, 4 * comm.size, 3) as buf:
            case = Case(3, 64, 64, 4 * comm.size, 3, (64,) * comm.size, layout=layout)
            x, idx, w, y = (up(a[comm.rank]) for a in case.make())
            rows, turns = up(np.zeros(4, np.int32)), []
            mode = dict(use_fp8=False, output_layout=layout)
            handle = buf.low_latency_dispatch(x, idx, 64, case.experts, **mode).handle
            y = buf.get_next_low_latency_combine_buffer(handle)
            for late in range(comm.size):
                waits = [up(np.zeros(comm.size, np.int64)) for _ in range(2)]
                for operation in range(2):
                    comm.Barrier()
                    time.sleep(LATE if comm.rank == late else 0)
                    if operation == 0:
                        got = buf.low_latency_dispatch(x, idx, 64, case.experts, rows, waits[0], **mode)
                    else:
                        buf.low_latency_combine(y, idx, w, got.handle, combine_wait_recv_cost_stats=waits[1])[1].synchronize()
                turns.append([(down(a) / 1e9).tolist() for a in waits])
            selected = np.concatenate(case.make()[1])
            local = [(selected == comm.rank * 4 + e).sum() for e in range(4)]
            np.testing.assert_array_equal(down(rows), np.multiply(local, comm.size))
            return turns


@pytest.mark.parametrize("shape, layout", [("1,1,1", "expert_major"), ("2,8,4", "rank_major")])
def test_statistics(shape, layout):
    """How many rows each expert got, over all turns; and who was late: nobody else is waited for as long."""
    waited = np.array(ranks.run(3, statistics, shape, layout))   # [rank, late, operation, source]
    for late in range(3):
        for rank in {0, 1, 2} - {late}:
            for operation in range(2):
                assert waited[rank, late, operation].argmax() == late, waited[rank, late]
                assert waited[rank, late, operation, late] > 0.2 * LATE, waited[rank, late]


def results_in_turn(comm):
    buf = shared_buffer(comm.size)
    idx = up(np.zeros((1, 3), np.int64) + np.arange(3))
    got = [buf.low_latency_dispatch(up(np.full((1, 64), i, "bfloat16")), idx, 8, 4, use_fp8=False) for i in range(3)]
    values = [float(down(g.recv_x)[0, 0, 0]) for g in got]
    return values


def test_results_live_until_the_second_next_dispatch():
    """Two sets of results are used in turn."""
    assert ranks.run(1, results_in_turn) == [[2.0, 1.0, 2.0]]
