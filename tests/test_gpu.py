"""What only GPUs have: graphs, streams, several ranks on one GPU, errors that arrive late."""
import dataclasses
import time

import pytest
import ranks
from case import Case, assert_dispatched, assert_same, run_round
from engine import SPIN, down, make_buffer, up

import pyep
from pyep import reference

pytestmark = pytest.mark.gpu
SHAPE = (16, 256, 8, 4)                                          # max tokens, hidden, experts per rank, top-k


def made(comm, seed, routing="random"):
    tokens = (SHAPE[0],) * comm.size
    if routing != "random":
        tokens = tuple((seed + 7 * r) % (SHAPE[0] + 1) for r in range(comm.size))
    return Case(seed, SHAPE[0], SHAPE[1], SHAPE[2] * comm.size, SHAPE[3], tokens, routing)


def buffer_for(comm):
    return make_buffer(comm, SHAPE[0], SHAPE[1], SHAPE[2] * comm.size, SHAPE[3])


def replay_graph(comm, replays, async_finish):
    """One captured pair, replayed with other tokens and other routing, eager pairs in between.

    With async_finish the communication stream joins the capture when it waits for the captured one, and leaves it when that one
    waits for the event.
    """
    import cupy
    with buffer_for(comm) as buf, cupy.cuda.Stream(non_blocking=True) as stream:
        me, case = comm.rank, made(comm, 0)
        x, idx, w, y = (up(a[me]) for a in case.make())
        run_round(buf, case)                                     # compiles: that cannot be captured
        stream.begin_capture()
        got = buf.low_latency_dispatch(x, idx, case.max_tokens, case.experts, use_fp8=False, async_finish=async_finish)
        got.event.current_stream_wait()
        combined, event, _ = buf.low_latency_combine(y, idx, w, got.handle, async_finish=async_finish)
        event.current_stream_wait()
        graph = stream.end_capture()
        for seed in range(replays):
            x_all, idx_all, w_all, y_all = case_inputs = made(comm, seed).make()
            for array, values in zip((x, idx, w, y), case_inputs):
                array.set(values[me], stream=stream)
            graph.launch(stream)
            stream.synchronize()
            assert_dispatched(got, reference.low_latency_dispatch(x_all, idx_all, case.max_tokens, case.experts)[me])
            want = reference.low_latency_combine(y_all, idx_all, w_all, case.max_tokens, case.experts)[me]
            assert_same(down(combined), want, f"replay {seed}")
            if seed % 3 == 0:
                run_round(buf, made(comm, seed, "sparse"), hooks=(seed % 2 == 0, seed % 4 == 0))
            if seed % 3 == 1:
                eager = buf.low_latency_dispatch(x, idx, case.max_tokens, case.experts, use_fp8=False, async_finish=True)
                out, event, _ = buf.low_latency_combine(y, idx, w, eager.handle, async_finish=True)
                event.synchronize()
                assert_same(down(out), want, f"eager, after replay {seed}")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("async_finish", [False, True])
def test_graph_replays(async_finish):
    ranks.run(2, replay_graph, 40, async_finish)


def replay_back_to_back(comm, replays, fp8, layout, weighted):
    """Replays without a host in between, each with other tokens and another routing; the GPU compares what they return."""
    import cupy
    cases = [dataclasses.replace(made(comm, seed), fp8=fp8, layout=layout, weighted=weighted) for seed in range(16)]
    with buffer_for(comm) as buf, cupy.cuda.Stream(non_blocking=True) as stream:
        me, first = comm.rank, cases[0]
        run_round(buf, first)                                    # compiles
        all_inputs = [case.make() for case in cases]
        inputs = [[up(array[me]) for array in arrays] for arrays in all_inputs]
        dispatched = [case.dispatched(x, idx, w)[me] for case, (x, idx, w, _) in zip(cases, all_inputs)]
        counts = [up(d.recv_count) for d in dispatched]
        combined = [up(case.combined(y, idx, w)[me]) for case, (_, idx, w, y) in zip(cases, all_inputs)]
        x, idx, w, y = (array.copy() for array in inputs[0])
        weights = w if weighted else None
        stream.begin_capture()
        got = buf.low_latency_dispatch(x, idx, first.max_tokens, first.experts, topk_weights=weights, **first.options)
        out, _, _ = buf.low_latency_combine(y, *((idx, w) if first.direct else (None, None)), got.handle)
        graph = stream.end_capture()
        wrong = cupy.zeros((), "int64")
        for i in range(replays):
            turn = i % len(cases)
            for array, values in zip((x, idx, w, y), inputs[turn]):
                array[...] = values
            graph.launch(stream)
            wrong += (out.view("uint16") != combined[turn].view("uint16")).sum() + (got.recv_count != counts[turn]).sum()
        stream.synchronize()
        buf._connection.check()
        assert_dispatched(got, dispatched[turn])
        assert int(wrong) == 0


@pytest.mark.multi_gpu
@pytest.mark.parametrize("mode", [("", "expert_major", False), ("", "expert_major", True), ("", "rank_major", True),
                                  ("fp8", "expert_major", False)], ids=["direct", "reduced", "rank_major", "fp8"])
def test_ten_thousand_replays(mode):
    ranks.run(2, replay_back_to_back, 10_000, *mode)


def wait_for_an_event(comm):
    """With async_finish an operation waits for the current stream; with previous_event for no more than that covers."""
    import cupy
    with buffer_for(comm) as buf, cupy.cuda.Stream(non_blocking=True) as stream:
        case, spin = made(comm, 4), cupy.RawKernel(SPIN, "spin")
        run_round(buf, case)
        all_x, all_idx, _, _ = case.make()
        x, idx = up(all_x[comm.rank]), up(all_idx[comm.rank])
        spin((1,), (1,), (0,))                                   # compiles
        stream.synchronize()
        before = buf.capture()
        for previous_event in before, None:
            spin((1,), (1,), (300_000_000,))
            got = buf.low_latency_dispatch(x, idx, case.max_tokens, case.experts, use_fp8=False, async_finish=True,
                                           previous_event=previous_event)
            got.event.synchronize()
            assert stream.done == (previous_event is None)
            stream.synchronize()
            assert_dispatched(got, reference.low_latency_dispatch(all_x, all_idx, case.max_tokens, case.experts)[comm.rank])


def test_previous_event():
    ranks.run(1, wait_for_an_event)


def go_on_meanwhile(comm):
    """Rank 1 comes late.  Meanwhile the caller's stream of rank 0 goes on, until it is told to wait."""
    import cupy
    with buffer_for(comm) as buf, cupy.cuda.Stream(non_blocking=True) as stream:
        case = made(comm, 5)
        run_round(buf, case)
        all_x, all_idx, all_w, all_y = case.make()
        x, idx, w, y = (up(a[comm.rank]) for a in (all_x, all_idx, all_w, all_y))
        all_later = made(comm, 6).make()[3]
        later = up(all_later[comm.rank])
        stream.synchronize()
        comm.Barrier()
        if comm.rank == 1:
            time.sleep(0.5)
        got = buf.low_latency_dispatch(x, idx, case.max_tokens, case.experts, use_fp8=False, async_finish=True)
        stream.synchronize()
        if comm.rank == 0:
            assert not got.event.event.is_done
        with got.event:
            y[:] = later
            stream.synchronize()
            if comm.rank == 0:
                assert not got.event.event.is_done
        stream.synchronize()
        assert got.event.event.is_done
        assert_dispatched(got, reference.low_latency_dispatch(all_x, all_idx, case.max_tokens, case.experts)[comm.rank])
        combined, event, _ = buf.low_latency_combine(y, idx, w, got.handle, async_finish=True)
        event.current_stream_wait()
        want = reference.low_latency_combine(all_later, all_idx, all_w, case.max_tokens, case.experts)[comm.rank]
        assert_same(down(combined), want, "combined_x")          # `down` copies on the caller's stream


def test_the_callers_stream_goes_on():
    ranks.run(2, go_on_meanwhile)


def stream_of_cupy(comm):
    import cupy
    with buffer_for(comm) as buf:
        stream = buf.get_comm_stream()
        assert isinstance(stream, cupy.cuda.ExternalStream) and stream.ptr == buf._connection.streams.comm
        with stream:                                             # also when it is the caller's
            run_round(buf, made(comm, 6))
            got = buf.low_latency_dispatch(*(up(a[0]) for a in made(comm, 6).make()[:2]), SHAPE[0], SHAPE[2], async_finish=True)
            got.event.current_stream_wait()
            assert_same(down(got.recv_count), made(comm, 6).dispatched(*made(comm, 6).make()[:3])[0].recv_count, "recv_count")


def test_comm_stream():
    ranks.run(1, stream_of_cupy)


def shared_gpu(comm):
    import cupy
    with make_buffer(comm, 4, 64, 2 * comm.size, 2) as buf:
        assert buf.get_local_device_id() == cupy.cuda.Device().id
        run_round(buf, Case(5, 4, 64, 2 * comm.size, 2, (4, 0, 3)[:comm.size]))
        run_round(buf, Case(6, 4, 64, 2 * comm.size, 2, (1, 4, 2)[:comm.size]), hooks=(True, True))
    return "done"


def test_ranks_that_share_one_gpu():
    """Two processes on one GPU take turns; everything still ends."""
    done = ranks.launch(2, shared_gpu, env={"CUDA_VISIBLE_DEVICES": "0"}, timeout=200)
    assert done.results == ["done"] * 2, done.stderr


def late_timeout(comm):
    with make_buffer(comm, *SHAPE[:2], SHAPE[2] * comm.size, SHAPE[3], timeout_s=2) as buf:
        case = made(comm, 2)
        run_round(buf, case)
        if comm.rank == 0:
            x, idx, _, _ = case.make()
            got = buf.low_latency_dispatch(up(x[0]), up(idx[0]), case.max_tokens, case.experts, use_fp8=False)
            with pytest.raises(pyep.EPTimeoutError, match="rank 0 waited 2 s for rank 1"):
                got.event.synchronize()


def test_a_peer_that_does_not_come():
    ranks.run(2, late_timeout)
