"""High-throughput results in little memory: in place or copied, they never lack room, and what is too large is refused by all."""
import os
import re

import numpy as np
import pytest
import ranks
from engine import make_high_throughput_buffer
from high_throughput_case import Case, assert_combined, assert_dispatched, combine, dispatch, run_round, up_x
from hypothesis import given, settings
from hypothesis import strategies as st

from pyep import Buffer, EPBufferTooSmallError
from pyep.config import Config

EXAMPLES = int(os.environ.get("PYEP_TEST_EXAMPLES", 100))
MOST, HIDDEN, LOCAL, TOPK = 48, 64, 4, 3        # of the cases here: tokens of a rank, H, experts of a rank, top-k


def case_of(seed, tokens, **fields):
    """A case of one of few shapes, so that there is little to compile."""
    tokens = tuple(map(int, tokens))
    return Case(seed, tokens, HIDDEN, LOCAL * len(tokens), TOPK, **fields)


# ---- results that are held -----------------------------------------------------------------------------------------------

class Held:
    """A dispatch whose results are held, and what it is made of."""

    def __init__(self, buf, made):
        self.made, self.got = made, dispatch(buf, made)

    def check(self, me):
        assert_dispatched(self.got, self.made.dispatched[me], me)


def hint_of(kind, size):
    """Bytes as a user would compute them."""
    if kind == "hint":
        return Buffer.get_high_throughput_size_hint(MOST, HIDDEN, size, TOPK)
    return Config(4).get_nvl_buffer_size_hint(2 * HIDDEN, size)


def hold_in_random_order(comm, kind, seed, steps):
    """Steps of random sizes; 1 to 6 results are held, some of them only in part, and dropped in random order.  Handles serve
    combines and cached dispatches as long as they are there.  Returns how many dispatches there were, and how many were copied."""
    me, rng, held, handles, dispatches = comm.rank, np.random.default_rng(seed), [], [], 0
    with make_high_throughput_buffer(comm, hint_of(kind, comm.size)) as buf:
        for step in range(steps):
            most = int(rng.integers(1, 7))
            while len(held) >= most:
                held.pop(int(rng.integers(len(held)))).check(me)
            tokens = rng.integers(0, MOST + 1, comm.size) if rng.random() < 0.7 else [MOST] * comm.size
            case = case_of(int(rng.integers(2**32)), tokens, routing=("random", "all ranks", "one rank")[step % 3])
            made = (case.with_room(int(rng.integers(4))) if rng.random() < 0.2 and max(tokens) < MOST - 12 else case).make()
            held.append(Held(buf, made))
            dispatches += 1
            one = held[int(rng.integers(len(held)))]
            if rng.random() < 0.3:
                assert_combined(combine(buf, one.made, one.got[4]), one.made.combined[me])
            if rng.random() < 0.3:
                x = one.made.more_x(rng)
                again = buf.dispatch(up_x(x[me]), one.got[4])
                assert_dispatched(again, one.made.cached(x)[me], me)
                dispatches += 1
            if rng.random() < 0.2:
                handles.append((one.made, one.got[4]))           # outlives its rows
            if len(handles) > 3:
                made, handle = handles.pop(0)
                assert_combined(combine(buf, made, handle), made.combined[me])
        for one in held:
            one.check(me)
        return dispatches, buf.copied_results, buf.copied_bytes


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_results_held_in_random_order(n):
    """No error, whatever is held; every row right; in place and copied."""
    for i in range(max(1, EXAMPLES // 100)):
        counted = ranks.run(n, hold_in_random_order, "hint", 10 * n + i, 150, timeout=600)
        for dispatches, copied, copied_bytes in counted:
            assert 0 < copied < dispatches and copied_bytes > 0


@pytest.mark.parametrize("n", [1, 3])
def test_results_held_in_the_memory_of_a_config(n):
    """Far more than these small shapes need: nothing is copied."""
    assert all(copied == 0 for _, copied, _ in ranks.run(n, hold_in_random_order, "config", n, 60))


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
