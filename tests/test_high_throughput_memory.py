"""High-throughput results in little memory: in place or copied, they never lack room, and what is too large is refused by all."""
import os
import re

import held_results
import ml_dtypes
import numpy as np
import pytest
import ranks
from engine import make_high_throughput_buffer, up
from high_throughput_case import Case, assert_combined, assert_dispatched, combine, dispatch, run_round, up_x
from held_results import HIDDEN, LOCAL, TOPK, Held
from hypothesis import given, settings
from hypothesis import strategies as st

from pyep import Buffer, EPBufferTooSmallError

EXAMPLES = int(os.environ.get("PYEP_TEST_EXAMPLES", 100))
LIMIT = 3600                            # seconds for one loop, in a campaign
GROWTH = 16 * 2**20                     # bytes: the allocator's own ups and downs
MOST = held_results.FEW                 # tokens of a rank in the cases here


def case_of(seed, tokens, **fields):
    """A case of one of few shapes, so that there is little to compile."""
    tokens = tuple(map(int, tokens))
    return Case(seed, tokens, HIDDEN, LOCAL * len(tokens), TOPK, **fields)


# ---- results that are held -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_results_held_in_random_order(n):
    """No error, whatever is held; every row right; in place and copied; no growth, as far as so few steps show it."""
    for of_rank in ranks.run(n, held_results.run, "hint", n, 150 * max(1, EXAMPLES // 100), timeout=LIMIT):
        assert 0 < of_rank.copied_results < of_rank.dispatches and of_rank.copied_bytes > 0
        assert_no_growth(of_rank.own_bytes)


@pytest.mark.parametrize("n", [1, 3])
def test_results_held_in_the_memory_of_a_config(n):
    """That is much memory: only in a campaign so many large results are held at once that some are copied."""
    counted = ranks.run(n, held_results.run, "config", n, 20 * max(1, EXAMPLES // 100), timeout=LIMIT)
    assert EXAMPLES < 10_000 or any(of_rank.copied_results for of_rank in counted)
    for of_rank in counted:
        assert_no_growth(of_rank.own_bytes)


def assert_no_growth(own_bytes):
    """In the second half of a run; in the first one fills what it keeps in mind."""
    half = len(own_bytes) // 2
    assert own_bytes[-1] < max(own_bytes[:half]) + GROWTH, own_bytes


def hold_all(comm, num_nvl_bytes):
    """A hundred results, all held, then dropped at once."""
    me, made = comm.rank, case_of(1, (MOST,) * comm.size, routing="all ranks").make()
    with make_high_throughput_buffer(comm, num_nvl_bytes) as buf:
        held = [Held(buf, made) for _ in range(100)]
        copied = buf.copied_results
        assert 90 < copied < 100
        rows = MOST * comm.size
        assert buf.copied_bytes == copied * rows * (2 * HIDDEN + 4 + 12 * TOPK)          # x, source tokens, indices, weights
        for one in held:
            one.check(me)
        handle = held[-1].got[4]
        held.clear()
        del one
        for _ in range(5):
            got = dispatch(buf, made)
            assert_combined(combine(buf, made, handle), made.combined[me])
            assert_combined(combine(buf, made, got[4]), made.combined[me])
        assert buf.copied_results == copied                      # in place again


@pytest.mark.parametrize("n", [1, 2])
def test_results_in_place_as_many_as_were_asked_for(n):
    ranks.run(n, hold_all, Buffer.get_high_throughput_size_hint(MOST, HIDDEN, n, TOPK, num_results=5))


def copied_tails(comm):
    """Nothing but the operations' room: every result is copied, rows that no token came to too."""
    me, held = comm.rank, []
    size = Buffer.get_high_throughput_size_hint(MOST, HIDDEN, comm.size, TOPK)
    with make_high_throughput_buffer(comm, size) as buf:
        buf._connection.heap._free.take(buf._connection.heap.nbytes - buf._connection.heap.operations_room)
        for seed in range(6):
            tokens = [(MOST - 12 - 7 * seed * r) % 30 for r in range(comm.size)]
            case = case_of(seed, tokens, carried=("weights", "indices")[seed % 2])
            held.append(Held(buf, case.with_room(seed).make()))
            run_round(buf, case.with_room(seed), async_finish=seed % 3 == 0)
            run_round(buf, case)
        for one in held:
            one.check(me)
        assert buf.copied_results == 6 * 5


@pytest.mark.parametrize("n", [1, 3])
def test_copied_results(n):
    ranks.run(n, copied_tails)


# ---- one operation that is too large -------------------------------------------------------------------------------------

def refuse_and_follow_advice(comm, case, num_nvl_bytes, operation):
    """An operation is too large, on all ranks alike; the buffer stays usable; with the advised bytes it works."""
    me, made = comm.rank, case.make()
    with make_high_throughput_buffer(comm, num_nvl_bytes, timeout_s=20) as buf:
        if num_nvl_bytes > 2**14:
            run_round(buf, case_of(7, (2,) * comm.size))
        with pytest.raises(EPBufferTooSmallError) as caught:
            operation(buf, made)
        if num_nvl_bytes > 2**14:
            run_round(buf, case_of(7, (2,) * comm.size))
    text = str(caught.value)
    assert f"num_nvl_bytes is {num_nvl_bytes}, of which" in text and "bytes, for" in text
    call = re.search(r"Buffer\.get_high_throughput_size_hint\(.*?\)", text)[0]
    texts = comm.allgather(text)
    assert len(set(texts)) == 1 or case.rows
    advised = max(eval(call, dict(Buffer=Buffer)) for call in comm.allgather(call))
    assert advised > num_nvl_bytes
    with make_high_throughput_buffer(comm, advised) as buf:
        got = dispatch(buf, made)
        assert_dispatched(got, made.dispatched[me], me)
        assert_combined(combine(buf, made, got[4]), made.combined[me])


def first_dispatch(buf, made):
    dispatch(buf, made)


def large_combine(buf, made):
    """Of rows that are longer than those of the dispatch."""
    handle = dispatch(buf, made)[4]
    buf.combine(up_x(np.zeros((handle.known.num_rows, 4096), made.y[0].dtype)), handle)


def large_cached_dispatch(buf, made):
    handle = dispatch(buf, made)[4]
    buf.dispatch(up_x(np.zeros((len(made.x[buf.rank]), 4096), made.y[0].dtype)), handle)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("num_nvl_bytes", [0, 2**15])
def test_too_large_a_dispatch(n, num_nvl_bytes):
    """Ranks with few tokens, and few rows, hear of it too."""
    case = case_of(1, (300, 2, 0)[:n], routing="all ranks" if n != 2 else "one rank", sum_weights=True)
    ranks.run(n, refuse_and_follow_advice, case, num_nvl_bytes, first_dispatch)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("operation", [large_combine, large_cached_dispatch])
def test_too_large_an_operation_of_a_handle(n, operation):
    """Only one rank sends, or receives, more than there is room for: all know, from the exchange."""
    case = case_of(2, (20, 1, 0)[:n], routing="all ranks" if operation == large_combine else "one rank")
    advised = ranks.run(n, refuse_and_follow_handle, case, operation)
    assert len(set(advised)) == 1


def refuse_and_follow_handle(comm, case, operation):
    made = case.make()
    with make_high_throughput_buffer(comm, 2**15, timeout_s=20) as buf:
        with pytest.raises(EPBufferTooSmallError) as caught:
            operation(buf, made)
        run_round(buf, case)
    call = re.search(r"Buffer\.get_high_throughput_size_hint\(.*?\)", str(caught.value))[0]
    with make_high_throughput_buffer(comm, eval(call, dict(Buffer=Buffer))) as buf:
        operation(buf, made)
    return call


def refused_and_called_again(comm):
    """Rank 0 has no token, hears at once that the call is too large, and makes the next one while rank 1 still numbers its
    tokens."""
    num_tokens = 2**19 if comm.rank else 0
    x, in_rank = np.zeros((num_tokens, HIDDEN), ml_dtypes.bfloat16), np.zeros((num_tokens, 2), bool)
    in_rank[:, 0] = True
    per_rank, per_expert = np.array([num_tokens, 0], np.int32), np.zeros(2 * LOCAL, np.int32)
    with make_high_throughput_buffer(comm, held_results.MEMORIES["hint"].nbytes(2), timeout_s=20) as buf:
        x, in_rank, per_rank, per_expert = map(up, (x, in_rank, per_rank, per_expert))
        for seed in range(4):
            run_round(buf, case_of(seed, (3, 4), carried="nothing"))
            comm.barrier()
            with pytest.raises(EPBufferTooSmallError):
                buf.dispatch(x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert)
            run_round(buf, case_of(seed, (5, 2), carried="nothing"))


def test_a_refused_dispatch_and_the_next():
    """Counts of the next call do not overwrite those that a slow rank has not read."""
    ranks.run(2, refused_and_called_again)


def test_too_many_worst_tokens():
    """Each rank refuses its own number by itself, before anything is launched."""
    ranks.run(2, refuse_and_follow_advice, case_of(3, (4, 7)).with_room(400), 2**15, first_dispatch)


@settings(max_examples=EXAMPLES)
@given(st.integers(1, 9), st.integers(1, 64), st.integers(0, 2**20), st.integers(0, 9), st.integers(0, 40), st.booleans(),
       st.lists(st.integers(0, 500), min_size=1, max_size=9), st.sampled_from(["dispatch", "combine"]))
def test_advice_suffices(num_ranks, blocks, given_bytes, topk, scale_bytes, bf16, sent, operation):
    """Of every operation that is too small: what the words advise has room for it, and for what follows it."""
    from pyep.high_throughput import Shape
    from pyep.high_throughput_errors import too_small
    from pyep.layout import combined_rows, operations_room
    shape = Shape(operation, num_ranks, 16 * blocks, "bfloat16" if bf16 or operation == "combine" else "uint8",
                  0 if bf16 or operation == "combine" else scale_bytes, "", topk, topk > 0)
    received, most_sent = sum(sent), max(sent) * (num_ranks - 1)
    rows = received if operation == "dispatch" else most_sent
    text = str(too_small(given_bytes, shape, rows, received, most_sent))
    advised = eval(re.search(r"Buffer\.get_high_throughput_size_hint\(.*?\)", text)[0], dict(Buffer=Buffer))
    assert shape.rows.nbytes(rows) <= operations_room(advised)
    assert combined_rows(shape.hidden, topk).nbytes(most_sent) <= operations_room(advised)
    assert advised > given_bytes or shape.rows.nbytes(rows) <= operations_room(given_bytes)
