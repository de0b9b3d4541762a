"""What only GPUs have: graphs, streams, several ranks on one GPU, errors that arrive late."""
import pytest
import ranks
from case import Case, assert_dispatched, assert_same, run_round
from engine import down, make_buffer, up

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


def replay_graph(comm, replays):
    """One captured pair, replayed with other tokens and other routing, eager pairs in between."""
    import cupy
    with buffer_for(comm) as buf, cupy.cuda.Stream(non_blocking=True) as stream:
        me, case = comm.rank, made(comm, 0)
        x, idx, w, y = (up(a[me]) for a in case.make())
        run_round(buf, case)                                     # compiles: that cannot be captured
        stream.begin_capture()
        got = buf.low_latency_dispatch(x, idx, case.max_tokens, case.experts, use_fp8=False)
        combined, _, _ = buf.low_latency_combine(y, idx, w, got.handle)
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


@pytest.mark.multi_gpu
def test_graph_replays():
    ranks.run(2, replay_graph, 40)


def many_replays(comm, replays):
    """Replays back to back, without a host in between; the last result must be the first one's."""
    import cupy
    with buffer_for(comm) as buf, cupy.cuda.Stream(non_blocking=True) as stream:
        case = made(comm, 3)
        run_round(buf, case)
        x, idx, w, y = (up(a[comm.rank]) for a in case.make())
        stream.begin_capture()
        got = buf.low_latency_dispatch(x, idx, case.max_tokens, case.experts, use_fp8=False)
        combined, event, _ = buf.low_latency_combine(y, idx, w, got.handle)
        graph = stream.end_capture()
        for _ in range(replays):
            graph.launch(stream)
        stream.synchronize()
        buf._check()
        all_x, all_idx, all_w, all_y = case.make()
        want = reference.low_latency_combine(all_y, all_idx, all_w, case.max_tokens, case.experts)[comm.rank]
        assert_same(down(combined), want, "after many replays")


@pytest.mark.multi_gpu
def test_thousands_of_replays():
    ranks.run(2, many_replays, 5000)


def shared_gpu(comm):
    import cupy
    with make_buffer(comm, 4, 64, 2 * comm.size, 2) as buf:
        assert buf.get_local_device_id() == cupy.cuda.Device().id
        run_round(buf, Case(5, 4, 64, 2 * comm.size, 2, (4, 0, 3)[:comm.size]))
        run_round(buf, Case(6, 4, 64, 2 * comm.size, 2, (1, 4, 2)[:comm.size]), hooks=(True, True))


def test_ranks_that_share_one_gpu():
    """Two processes on one GPU take turns; everything still ends."""
    done = ranks.launch(2, shared_gpu, env={"CUDA_VISIBLE_DEVICES": "0"}, timeout=200)
    assert not done.errors, done.errors


def bad_expert(comm):
    with buffer_for(comm) as buf:
        case = made(comm, 1)
        run_round(buf, case)
        x, idx, _, _ = case.make()
        idx[comm.rank][3, 1] = case.experts + 5
        got = buf.low_latency_dispatch(up(x[comm.rank]), up(idx[comm.rank]), case.max_tokens, case.experts, use_fp8=False)
        with pytest.raises(pyep.EPRoutingError, match=f"names expert {case.experts + 5} for token 3"):
            got.event.synchronize()
        with pytest.raises(pyep.EPClosedError):
            run_round(buf, case)


def test_an_expert_that_does_not_exist():
    """A GPU finds it in the kernel, and the host hears of it when it waits."""
    ranks.run(1, bad_expert)


def late_timeout(comm):
    with make_buffer(comm, *SHAPE[:2], SHAPE[2] * comm.size, SHAPE[3], timeout_s=2) as buf:
        case = made(comm, 2)
        run_round(buf, case)
        if comm.rank == 0:
            x, idx, _, _ = case.make()
            got = buf.low_latency_dispatch(up(x[0]), up(idx[0]), case.max_tokens, case.experts, use_fp8=False)
            with pytest.raises(pyep.EPTimeoutError, match="rank 0 waited 2 s for rank 1"):
                got.event.synchronize()


@pytest.mark.multi_gpu
def test_a_peer_that_does_not_come():
    ranks.run(2, late_timeout)
