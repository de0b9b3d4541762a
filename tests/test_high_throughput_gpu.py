"""High throughput on GPUs: graphs, streams, bounded SMs."""
import pytest
import ranks
from engine import SPIN, make_high_throughput_buffer, up
from high_throughput_case import ROUTINGS, Case, assert_combined, assert_dispatched, combine, dispatch, run_round

import pyep
from pyep.config import Config
from pyep.events import EventOverlap

pytestmark = pytest.mark.gpu
HEAP = 2**25
TOKENS, HIDDEN, LOCAL, TOPK = 200, 256, 4, 3
WORST = 210                                                      # rows for each rank of which a token comes


def made(seed, n, **fields):
    """A case whose arrays have the same shapes for every seed, as a graph needs: only what is in them differs."""
    rows = (WORST * n,) * n
    return Case(seed, tuple(TOKENS - 10 * r for r in range(n)), HIDDEN, LOCAL * n, TOPK, ROUTINGS[seed % len(ROUTINGS)], rows=rows,
                bias=1, sum_weights=True, **fields).make()


def captured(buf, stream, arrays, async_finish=False):
    """A graph of layout, dispatch with rows for the worst, cached dispatch and combine, and what these return; the layout too,
    since CuPy would lend its memory to others while the graph still writes there."""
    n, options = buf.group_size, dict(async_finish=async_finish)
    idx, weights, x, y, y_weights, bias = arrays
    stream.begin_capture()
    layout = per_rank, per_node, per_expert, in_rank, event = buf.get_dispatch_layout(idx, LOCAL * n, **options)
    event.current_stream_wait()
    got = buf.dispatch(x, None, per_rank, per_node, in_rank, per_expert, idx, weights, num_worst_tokens=WORST * n, **options)
    got[5].current_stream_wait()
    again = buf.dispatch(x, got[4], **options)
    again[5].current_stream_wait()
    out = buf.combine(y, got[4], topk_weights=y_weights, bias=bias, **options)
    out[2].current_stream_wait()
    return stream.end_capture(), got, again, out, layout


def inputs(of_all, me):
    """What the graph reads, of one rank."""
    return of_all.topk_idx[me], of_all.topk_weights[me], of_all.x[me], of_all.y[me], of_all.y_weights[me], of_all.bias[me][0]


def done(result):
    """A result with another event: one that was recorded in a graph cannot be waited for."""
    return *result[:-1], EventOverlap()


def replay_graph(comm, replays, async_finish):
    """Replays with other tokens and routing; in between eager operations, which take and give back memory beside the graph's."""
    import cupy
    me, n = comm.rank, comm.size
    with make_high_throughput_buffer(comm, HEAP) as buf, cupy.cuda.Stream(non_blocking=True) as stream:
        first = made(0, n)
        run_round(buf, first.case)                               # compiles: that cannot be captured
        arrays = [up(a) for a in inputs(first, me)]
        graph, got, again, out, _layout = captured(buf, stream, arrays, async_finish)
        held = dispatch(buf, first)                              # lies beside the graph's results, and stays
        for seed in range(replays):
            now = made(seed, n)
            for array, values in zip(arrays, inputs(now, me)):
                array.set(values, stream=stream)
            graph.launch(stream)
            stream.synchronize()
            buf._connection.check()
            assert_dispatched(done(got), now.dispatched[me], me)
            assert_dispatched(done(again), now.cached(now.x)[me], me)
            assert_combined(done(out), now.combined[me])
            if seed % 3 == 0:
                run_round(buf, Case(seed, (50, 0, 33, 7)[:n], HIDDEN, LOCAL * n, TOPK))
            if seed % 3 == 1:                                    # eager, by the handle that the graph writes
                assert_combined(combine(buf, now, got[4]), now.combined[me])
        assert_dispatched(held, first.dispatched[me], me)


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.multi_gpu)])
@pytest.mark.parametrize("async_finish", [False, True])
def test_graph_replays(n, async_finish):
    """No host is needed in between: counts, places and epochs come from the device."""
    ranks.run(n, replay_graph, 40, async_finish)


def many_replays(comm, replays):
    """Replays back to back; the last result must be the first one's."""
    import cupy
    me, n = comm.rank, comm.size
    with make_high_throughput_buffer(comm, HEAP) as buf, cupy.cuda.Stream(non_blocking=True) as stream:
        now = made(3, n)
        run_round(buf, now.case)
        graph, got, _, out, _layout = captured(buf, stream, [up(a) for a in inputs(now, me)])
        for _ in range(replays):
            graph.launch(stream)
        stream.synchronize()
        buf._connection.check()
        assert_dispatched(got, now.dispatched[me], me)
        assert_combined(out, now.combined[me])


@pytest.mark.multi_gpu
def test_thousands_of_replays():
    ranks.run(2, many_replays, 3000)


def grids_of(buf, case, **options):
    """The blocks of every launch of a round."""
    from pyep.kernels.cuda import CudaKernel
    grids, launch = [], CudaKernel.launch

    def recorded(kernel, *args):
        grids.append(kernel._config.gridDimX)
        launch(kernel, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CudaKernel, "launch", recorded)
        run_round(buf, case, **options)
    return grids


def count_blocks(comm):
    n, before = comm.size, pyep.Buffer.num_sms
    with make_high_throughput_buffer(comm, HEAP) as buf:
        try:
            for sms in 2, 20, 64:
                case = Case(sms, (TOKENS,) * n, HIDDEN, LOCAL * n, TOPK)
                grids = grids_of(buf, case, config=Config(sms))
                assert grids and max(grids[1:]) <= sms           # the first is the layout's, which is given no Config
                pyep.Buffer.set_num_sms(sms)
                grids = grids_of(buf, case)
                assert grids and max(grids) <= sms, (sms, grids)
        finally:
            pyep.Buffer.num_sms = before


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.multi_gpu)])
def test_bounded_sms(n):
    """No launch has more blocks than the Config, or else `set_num_sms`, allows."""
    ranks.run(n, count_blocks)


def memory_used_again(comm):
    """Memory is dropped while the caller's stream still reads it, and taken again by an operation on another stream: with
    previous_event, that would not wait for the reading. It must not be written before that has ended."""
    import cupy
    me, n = comm.rank, comm.size
    one, other = (Case(seed, (TOKENS,) * n, HIDDEN, LOCAL * n, TOPK, "all ranks").make() for seed in (1, 2))
    spin = cupy.RawKernel(SPIN, "spin")
    with make_high_throughput_buffer(comm, HEAP) as buf, cupy.cuda.Stream(non_blocking=True) as stream:
        run_round(buf, one.case)
        spin((1,), (1,), (0,))                                   # compiles
        for previous in False, True:
            for _ in range(5):
                got = dispatch(buf, one)
                before = buf.capture()
                spin((1,), (1,), (20_000_000,))
                copy = got[0].copy()                             # runs after the spin, and reads what is dropped now
                del got
                options = dict(async_finish=True) | (dict(previous_event=before) if previous else {})
                later = dispatch(buf, other, **options)
                later[5].current_stream_wait()
                stream.synchronize()
                assert_dispatched(later, other.dispatched[me], me)
                assert (copy.get().view("u2") == one.dispatched[me].recv_x.view("u2")).all()


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.multi_gpu)])
def test_dropped_memory_is_not_written_early(n):
    ranks.run(n, memory_used_again)


def bad_expert(comm):
    import cupy
    with make_high_throughput_buffer(comm, HEAP) as buf:
        run_round(buf, made(1, comm.size).case)
        idx = cupy.full((5, TOPK), LOCAL * comm.size + 5, "int64")
        with pytest.raises((pyep.EPRoutingError, ValueError), match=f"expert {LOCAL * comm.size + 5}"):
            buf.get_dispatch_layout(idx, LOCAL * comm.size)[4].synchronize()


def test_an_expert_that_does_not_exist():
    """A GPU finds it in the kernel, and the host hears of it when it waits."""
    ranks.run(1, bad_expert)


def late_timeout(comm):
    with make_high_throughput_buffer(comm, HEAP, timeout_s=2) as buf:
        now = made(2, comm.size)
        run_round(buf, now.case)
        comm.Barrier()
        if comm.rank == 0:
            got = dispatch(buf, now)                             # rows for the worst: the host does not wait
            with pytest.raises(pyep.EPTimeoutError, match="rank 0 waited 2 s for rank 1"):
                got[5].synchronize()


@pytest.mark.multi_gpu
def test_a_peer_that_does_not_come():
    ranks.run(2, late_timeout)
