"""Operations that finish in different ways: what waits for what, seen without a GPU; then on ranks, against the oracle."""
from functools import partial

import numpy as np
import pytest
import ranks
from case import Case, assert_dispatched, assert_same
from engine import down, make_buffer, up

from pyep.events import EventOverlap
from pyep.streams import Streams

CALLER, COMM = 7, 9                     # streams
SHAPE = (8, 64, 4, 3)                   # max tokens, hidden, experts per rank, top-k: test_low_latency.py compiles it too

# What happens: (in this order, the waits that come of it as (stream, what it waits for)).
ORDERS = {
    "the caller's stream": (["sync", "sync"], []),
    "async": (["async"], [(COMM, CALLER)]),
    "async after sync": (["sync", "async"], [(COMM, CALLER)]),
    "sync after async": (["async", "sync", "sync"], [(COMM, CALLER), (CALLER, COMM)]),
    "async after async": (["async", "async"], [(COMM, CALLER)] * 2),
    "async after an event": (["event", "async after it"], [(COMM, "event")]),
    "the event covers an operation": (["sync", "event", "async after it"], [(COMM, "event")]),
    "the event is older": (["event", "sync", "async after it"], [(COMM, "event"), (COMM, CALLER)]),
    "the event is older, but both on one stream": (["event", "async", "async after it"], [(COMM, CALLER), (COMM, "event")]),
    "sync after an event": (["event", "sync after it", "sync"], [(CALLER, "event")]),
    "async after an event of nothing": (["an event of nothing", "async after it"], []),
    "async after an operation's event": (["async", "its event", "sync", "async after it"],
                                         [(COMM, CALLER), (CALLER, COMM), (COMM, "event"), (COMM, CALLER)]),
    "all captured": (["capture both", "async", "sync"], [(COMM, CALLER), (CALLER, COMM)]),
    "captured after async": (["async", "capture the caller's", "sync"], [(COMM, CALLER)]),
}


@pytest.fixture
def gpu(monkeypatch):
    """The waits that are asked for and the streams that are captured, with no GPU behind them."""
    pytest.importorskip("cuda.core")
    pytest.importorskip("numba_cuda")
    from pyep.kernels import cuda
    waits, captured = [], set()
    monkeypatch.setattr(cuda, "stream_wait", lambda stream, other: waits.append((stream, other)))
    monkeypatch.setattr(cuda, "synchronize", lambda other: waits.append(("host", other)))
    monkeypatch.setattr(cuda, "is_capturing", lambda stream: stream in captured)
    return waits, captured


class Engine:
    name, comm_stream = "cuda", COMM


class Library:
    """An array library whose current stream the test sets."""

    engine, current = "cuda", CALLER

    def stream(self):
        return self.current


@pytest.mark.parametrize("order", ORDERS)
def test_order(gpu, order):
    waits, captured = gpu
    happens, expected = ORDERS[order]
    streams, event = Streams(Engine), None
    for what in happens:
        if what.startswith("capture"):
            captured |= {CALLER, COMM} if what == "capture both" else {CALLER}
        elif what in ("event", "its event"):
            event = EventOverlap("event", None, Library(), CALLER)
        elif what == "an event of nothing":
            event = EventOverlap()
        else:
            asynchronous = what.startswith("async")
            stream = streams.enter(CALLER, asynchronous, event if what.endswith("after it") else None)
            assert stream == (COMM if asynchronous else CALLER)
    assert waits == expected


def test_an_event_keeps_arrays(gpu):
    """Until the stream whose memory they are in waits for the operation, or the host does."""
    waits, _ = gpu
    for wait in "stream", "with", "host":
        library = Library()
        event = EventOverlap("event", ("arrays",), library, CALLER)
        library.current = 8
        event.current_stream_wait()
        assert event.extra_tensors == ("arrays",)
        library.current = CALLER
        if wait == "with":
            with event as same:
                assert same.extra_tensors == ("arrays",)
        else:
            event.current_stream_wait() if wait == "stream" else event.synchronize()
        assert event.extra_tensors is None
        assert waits[-2:] == [(8, "event"), ("host" if wait == "host" else CALLER, "event")]


def test_an_event_of_the_callers_stream(gpu):
    """Nothing was recorded: other streams wait for the whole stream, it itself for nothing."""
    waits, _ = gpu
    library = Library()
    event = EventOverlap(None, None, library, CALLER)
    event.current_stream_wait()
    assert waits == []
    library.current = 8
    event.current_stream_wait()
    event.synchronize()
    assert waits == [(8, CALLER), ("host", CALLER)]


# ---- on ranks, on any engine -----------------------------------------------------------------------------------------

WAYS = ("sync", "hook", "async", "with", "host", "nobody waits", "after an event", "sync after an event")


def operate(how, operation, capture):
    """What an operation returns that finishes in one of these ways."""
    options = {"sync": {}, "hook": dict(return_recv_hook=True)}.get(how) or dict(async_finish=not how.startswith("sync"))
    if how.endswith("after an event"):
        options["previous_event"] = capture()
    result = operation(**options)
    *_, event, hook = result
    assert (hook is None) == (how != "hook")
    if how == "hook":
        hook()
    elif how == "with":
        with event:
            pass
    elif how in ("async", "after an event"):
        event.current_stream_wait()
    elif how == "host":
        event.synchronize()
    return result                                                # "nobody waits": the buffer's next operation does


def round_of(buf, seed, first, second):
    """A dispatch that finishes in the first way, a combine in the second, and one that is waited for."""
    max_tokens, hidden, per_rank, topk = SHAPE
    me, experts = buf.rank, per_rank * buf.group_size
    tokens = tuple((seed + 5 * r) % (max_tokens + 1) for r in range(buf.group_size))
    case = Case(seed, max_tokens, hidden, experts, topk, tokens)
    x, idx, w, y = case.make()
    mine = [up(a[me]) for a in (x, idx, w, y)]                   # kept to the end: nobody may have waited before
    out = up(np.empty_like(x[me]))
    got = operate(first, partial(buf.low_latency_dispatch, *mine[:2], max_tokens, experts, use_fp8=False), buf.capture)
    combine = partial(buf.low_latency_combine, mine[3], *mine[1:3], got.handle)
    operate(second, partial(combine, out=out), buf.capture)
    again, event, _ = combine()
    event.synchronize()                                          # this one ran on the caller's stream, after all others
    assert_dispatched(got, case.dispatched(x, idx, w)[me])
    for combined in out, again:
        assert_same(down(combined), case.combined(y, idx, w)[me], f"combined_x of round {seed}: {first}, {second}")


def finish_in_all_ways(comm):
    """Each rank in another order, so that those with hooks, with events and with neither meet in one operation."""
    max_tokens, hidden, per_rank, topk = SHAPE
    with make_buffer(comm, max_tokens, hidden, per_rank * comm.size, topk) as buf:
        for seed in range(len(WAYS) ** 2):
            first, second = divmod(seed, len(WAYS))
            round_of(buf, seed, WAYS[(first + comm.rank) % len(WAYS)], WAYS[(second + 3 * comm.rank) % len(WAYS)])


@pytest.mark.parametrize("n", [1, 3])
def test_ways_to_finish(n):
    ranks.run(n, finish_in_all_ways)
