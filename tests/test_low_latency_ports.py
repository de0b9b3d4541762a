"""Low latency between nodes, which PYEP_RANKS_PER_NODE makes of one host: against the oracle, bit for bit; with proxies at fault.

What `test_low_latency` does within a node happens here again between nodes, for fewer shapes and modes.  (All of it runs between
nodes if pytest itself gets PYEP_RANKS_PER_NODE.)
"""
import functools
import os
import random
import re
import time

import numpy as np
import pytest
import ranks
import test_low_latency as within
from case import MODES, assert_dispatched, dispatch, run_round
from engine import make_buffer, on_gpu, up
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_faults import BAD, LOCAL, SLACK, TIMEOUT, H, K, M, a_round, case_of, give_up, suffer, suffer_together, warm_buffer
from test_low_latency import (BY_RANK, EXAMPLES, LATE, OTHER_SHAPES, PLAIN, REDUCED, SHAPES, cases, fused_rounds, name_of,
                              wide_rounds)

from pyep import EPError, EPTransportError
from pyep.channels import host_ports
from pyep.channels.handles import SIGNAL
from pyep.channels.host import HostTransport
from pyep.channels.memory import LAST_EPOCH
from pyep.channels.proxy import Proxy
from pyep.layout import control_bytes

pytestmark = pytest.mark.skipif(on_gpu(), reason="about the ports of the CPU engine")

# By number of ranks: the (shape, mode) pairs that they try, among them every kind of combine.  It takes long to compile more.
PAIRS = {
    2: [(SHAPES[0], MODES[0]), (OTHER_SHAPES["fp8"], ("fp8", "expert_major", True))],
    3: [(SHAPES[0], MODES[0]), (OTHER_SHAPES["fp8_ue8m0"], ("fp8_ue8m0", "rank_major", True))],
    4: [(SHAPES[0], ("", "expert_major", True))],
}
NODES = [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)]         # ranks, and how many of them make a node
groups = pytest.mark.parametrize("n, per_node", [pytest.param(*group, id="{}-by-{}".format(*group)) for group in NODES])


@pytest.fixture(scope="module", autouse=True)
def no_proxies_stay():
    """The pools end with this file: idle proxies of their buffers would cost the tests of other files half a core."""
    yield
    ranks.close_pools()


@functools.cache
def shared_buffer(per_node, comm_size):
    """One for all tests of a pool of ranks and a size of nodes; PYEP_RANKS_PER_NODE says the same."""
    from mpi4py import MPI
    max_tokens, hidden, per_rank, topk = (max(sizes) for sizes in zip(*(shape[:4] for shape, _ in PAIRS[comm_size])))
    return make_buffer(MPI.COMM_WORLD, max_tokens, hidden, per_rank * comm_size, topk)


def between_nodes(comm, per_node, body, *args, **options):
    """Run a body of this file or of `test_low_latency` with nodes of so many ranks, and with the buffer and the pairs of above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_RANKS_PER_NODE", str(per_node))
        patch.setattr(within, "shared_buffer", functools.partial(shared_buffer, per_node))
        patch.setattr(within, "pairs", PAIRS.get)
        return body(comm, *args, **options)


# ---- as within a node ------------------------------------------------------------------------------------------------

def has_nodes(comm, per_node):
    nodes = within.shared_buffer(comm.size)._connection.nodes
    assert nodes.of == tuple(r // per_node for r in range(comm.size)) and nodes.count > 1


@groups
def test_nodes_are_as_meant(n, per_node):
    """Otherwise the tests below would show nothing."""
    ranks.run(n, between_nodes, per_node, has_nodes, per_node)


def named(n, per_node, pair):
    return pytest.param(n, per_node, pair, id=f"{n}-by-{per_node}-{pair[0][1]}-{name_of(pair[1])}")


def rounds_that_leave_nothing(comm, pair):
    """Whatever was unpacked was taken out again: afterwards both halves are as they were."""
    buf = within.shared_buffer(comm.size)
    within.rounds(buf, pair)
    comm.Barrier()
    memory = buf.symmetric_memory(np.uint8)[control_bytes(comm.size):]
    for half in memory, memory[buf._connection.half_bytes:]:
        assert (half[:buf._ready_bytes] == 0xFF).all()
    comm.Barrier()


@pytest.mark.parametrize("n, per_node, pair", [named(n, per_node, pair) for n, per_node in NODES for pair in PAIRS[n]])
def test_shapes_and_modes(n, per_node, pair):
    ranks.run(n, between_nodes, per_node, rounds_that_leave_nothing, pair)


@st.composite
def grouped_cases(draw, n):
    """A case, and a size of nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(within, "pairs", PAIRS.get)
        return draw(st.sampled_from([per_node for ranks, per_node in NODES if ranks == n])), draw(cases(n))


@pytest.mark.parametrize("n", sorted(PAIRS))
def test_random_cases(n):
    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(grouped_cases(n), st.tuples(st.booleans(), st.booleans()), st.booleans(), st.booleans())
    def check(grouped, hooks, zero_copy, out):
        per_node, case = grouped
        ranks.run(n, between_nodes, per_node, within.one_round, case, hooks=hooks, zero_copy=zero_copy, out=out)
    check()


def test_a_wide_shape():
    ranks.run(3, between_nodes, 2, wide_rounds, "2,8,4", *BY_RANK)


@pytest.mark.parametrize("n, per_node, mode", [pytest.param(2, 1, PLAIN, id="direct"), pytest.param(3, 2, REDUCED, id="reduced"),
                                               pytest.param(3, 2, BY_RANK, id="rank-major")])
def test_fused_launches(n, per_node, mode):
    """Both halves in one launch, as on a GPU: blocks that pack while others unpack."""
    ranks.run(n, between_nodes, per_node, fused_rounds, "3,8,4", *mode)


@pytest.mark.parametrize("epoch", [LAST_EPOCH - 9, LAST_EPOCH - 8, 2**31 - 9])
def test_epoch_wraps_around(epoch):
    ranks.run(2, between_nodes, 1, within.rounds_from_epoch, epoch)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_in_flight(order):
    ranks.run(3, between_nodes, 2, within.two_in_flight, order)


@pytest.mark.parametrize("n, per_node", [(2, 1), (3, 2)])
def test_a_handle_serves_many_combines(n, per_node):
    ranks.run(n, between_nodes, per_node, within.combines_of_one_dispatch)


def test_combine_with_masked_selections():
    ranks.run(2, between_nodes, 1, within.combine_masked)


def waits_for_late_ranks(comm):
    """Each rank in turn comes late, by LATE; returns by turn what this one waited for each, in s: dispatch, combine."""
    buf, case, turns = within.shared_buffer(comm.size), case_of(comm.size), []
    run_round(buf, case)                                         # the first use of a shape compiles, and ranks meet
    x, idx, weights, y = case.make()
    for late in range(comm.size):
        waits = [np.zeros(comm.size, np.int64) for _ in range(2)]
        for operation in range(2):
            comm.Barrier()
            time.sleep(LATE if comm.rank == late else 0)
            if operation == 0:
                got = dispatch(buf, case, x, idx, weights, dispatch_wait_recv_cost_stats=waits[0])
            else:
                inputs = y[comm.rank], idx[comm.rank], weights[comm.rank], got.handle
                buf.low_latency_combine(*inputs, combine_wait_recv_cost_stats=waits[1])
        turns.append(np.array(waits) / 1e9)
    return turns


def test_statistics():
    """The wait for a port peer is the wait for its box; rank 2 has nothing but port peers, ranks 0 and 1 have one."""
    waited = np.array(ranks.run(3, between_nodes, 2, waits_for_late_ranks))                # [rank, late, operation, source]
    for late in range(3):
        for rank in {0, 1, 2} - {late}:
            for operation in range(2):
                assert waited[rank, late, operation].argmax() == late, waited[rank, late]
                assert waited[rank, late, operation, late] > 0.2 * LATE, waited[rank, late]


# ---- in any order of events ------------------------------------------------------------------------------------------

def always_two_in_flight(comm, rounds):
    send_ahead(within.shared_buffer(comm.size), comm, rounds, PAIRS[comm.size])


def always_two_in_flight_in_a_wide_shape(comm, rounds):
    """The kernels are those of `test_a_wide_shape`."""
    hidden, mode = BY_RANK
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_CPU_SHAPE", "2,8,4")
        with make_buffer(comm, 6, hidden, 3 * comm.size, 3) as buf:
            send_ahead(buf, comm, rounds, [((6, hidden, 3, 3, np.int64), mode)])


def send_ahead(buf, comm, rounds, pairs):
    """All ranks send operation n + 1 before they receive n, all the time: nobody has consumed more than that."""
    waiting = None
    for seed in range(rounds):
        case = within.case_of(pairs[seed % len(pairs)], seed, tuple((seed + r) % 6 for r in range(comm.size)))
        got = dispatch(buf, case, *case.make()[:3], return_recv_hook=True)
        if waiting is not None:
            before, got_before = waiting
            got_before.hook()
            assert_dispatched(got_before, before.dispatched(*before.make()[:3])[comm.rank])
        waiting = case, got
    waiting[1].hook()


@pytest.mark.parametrize("n, per_node", [(2, 1), (3, 2)])
def test_always_two_in_flight(n, per_node):
    """Nobody waits for a box that comes only after it has gone on itself."""
    ranks.run(n, between_nodes, per_node, always_two_in_flight, 30)


def with_slow_proxies(comm, body, *args):
    """Run a body while every proxy now and then takes its time before a trigger."""
    rng, serve = random.Random(comm.rank), Proxy.serve

    def slowly(proxy, trigger):
        if rng.random() < 0.1:
            time.sleep(rng.random() * 0.005)
        serve(proxy, trigger)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Proxy, "serve", slowly)
        body(comm, *args)


@pytest.mark.parametrize("n, per_node, rounds", [(2, 1, 300), (3, 2, 1000)])
def test_thousand_rounds_with_slow_proxies(n, per_node, rounds):
    """Nobody overruns a peer, however late that is, nor a box that its proxy has still to send."""
    ranks.run(n, between_nodes, per_node, with_slow_proxies, within.back_to_back, rounds)


@pytest.mark.parametrize("body", [always_two_in_flight, always_two_in_flight_in_a_wide_shape])
def test_two_in_flight_with_slow_proxies(body):
    ranks.run(3, between_nodes, 2, with_slow_proxies, body, 25)


def rounds_with_a_small_fifo(comm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_ports, "FIFO_SIZE", 1)
        with make_buffer(comm, M, H, LOCAL * comm.size, K) as buf:
            for _ in range(20):
                a_round(buf)


def test_a_small_fifo():
    """A full FIFO holds senders back until the proxy has taken a trigger."""
    ranks.run(3, between_nodes, 1, with_slow_proxies, rounds_with_a_small_fifo)


def rounds_with_two_proxies(comm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_NUM_PROXIES", "2")
        with make_buffer(comm, M, H, LOCAL * comm.size, K) as buf:
            assert len(buf._connection.transport._ports.proxies) == 2
            for _ in range(20):
                a_round(buf)


def test_two_proxies():
    """Each serves one of two peers."""
    ranks.run(3, between_nodes, 1, with_slow_proxies, rounds_with_two_proxies)


def rounds_with_unordered_puts(comm):
    serve = Proxy.serve

    def with_signal(proxy, trigger):
        assert trigger.kind & SIGNAL, trigger
        serve(proxy, trigger)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostTransport, "orders_puts", False)
        patch.setattr(Proxy, "serve", with_signal)
        with make_buffer(comm, M, H, LOCAL * comm.size, K) as buf:
            for _ in range(5):
                a_round(buf)


def test_unordered_puts():
    """Where puts may overtake each other, each goes out with a signal, which none may pass."""
    ranks.run(2, between_nodes, 1, rounds_with_unordered_puts)


# ---- at fault --------------------------------------------------------------------------------------------------------

BOX = (r"the peer's box: .+\. Slot consumed\[source 1\]: expected epoch {epoch} or later, seen epoch {seen} \(operation of epoch "
       r"{epoch}\)\. Rank 1 has exited, .+")
PORT = r"\. Rank 1 is reached through a port: proxy 0: FIFO head \d+, tail \d+, last trigger put of 16 bytes .+; the proxy runs"


def assert_blamed(text, rank, operation, epoch):
    """The rank has waited for the bad one's box."""
    pattern = rf"{operation}, receive phase: rank {rank} waited {TIMEOUT} s for rank {BAD}: "
    assert re.fullmatch(pattern + BOX.format(epoch=epoch, seen=epoch - 1) + PORT, text), text


def exits(buf):
    os._exit(3)


def exits_before_its_hook(buf):
    case = case_of(buf.group_size)
    dispatch(buf, case, *case.make()[:3], return_recv_hook=True)
    deadline = time.monotonic() + 1                              # the proxy sends what was pushed
    while "tail 6" not in buf._connection.transport.port_state(1 - BAD) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    os._exit(0)


@pytest.mark.parametrize("fault, operation, epoch", [(exits, "low_latency_dispatch", 3),
                                                     (exits_before_its_hook, "low_latency_combine", 4)])
def test_a_rank_is_gone(fault, operation, epoch):
    done = ranks.launch(2, suffer, fault, a_round, env={"PYEP_RANKS_PER_NODE": "1"})
    assert not done.errors, done.errors
    assert_blamed(done.results[0], 0, operation, epoch)


def sleeps(buf):
    time.sleep(2 * TIMEOUT)


def test_a_rank_sleeps():
    """Of 3, of which one is a mapped peer of the sleeping one."""
    mapped, _, port_peer = ranks.run(3, between_nodes, 2, suffer_together, sleeps, a_round)
    assert re.match(f"low_latency_dispatch, receive phase: rank 0 waited {TIMEOUT} s for rank 1: the peer's token counts", mapped)
    assert_blamed(port_peer, 2, "low_latency_dispatch", 3)


def loses_its_proxy(comm):
    """Both ranks' waits end: the one's that nobody hears any more, the other's that hears nobody."""
    buf = warm_buffer(comm)
    proxy, = buf._connection.transport._ports.proxies
    if comm.rank == BAD:
        proxy.stop()
    comm.barrier()
    return give_up(buf, a_round)


def test_a_lost_proxy():
    other, lost = ranks.run(2, between_nodes, 1, loses_its_proxy)
    assert_blamed(other, 0, "low_latency_dispatch", 3)
    assert re.search("rank 1 waited 2 s for rank 0: .*FIFO head 6, tail 4, last trigger put .*the proxy does not run$", lost), lost


def fills_its_fifo(comm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_ports, "FIFO_SIZE", 2)
        buf = warm_buffer(comm)
    if comm.rank == BAD:
        buf._connection.transport._ports.proxies[0].stop()
    return give_up(buf, a_round)


def test_a_full_fifo():
    text = ranks.run(3, between_nodes, 1, fills_its_fifo)[BAD]
    assert re.match(r"low_latency_dispatch, send phase: rank 1 waited 2 s for room in the FIFO of the proxy that serves rank [02]: "
                    r"expected \d+ triggers taken or more, seen \d+ \(operation of epoch 3\)\. Rank [02] is reached through a port"
                    r": proxy 0: FIFO head 12, tail 8, .*does not run$", text), text


def has_a_failing_proxy(comm):
    """Rank 1's raises; returns the error of each rank."""
    buf = warm_buffer(comm)
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == BAD:
            patch.setattr(Proxy, "serve", lambda proxy, trigger: 1 // 0)
        start = time.monotonic()
        with pytest.raises(EPError) as caught:
            a_round(buf)
            buf._connection.check()
        assert time.monotonic() - start < TIMEOUT + SLACK
    buf.destroy()
    return type(caught.value).__name__, str(caught.value)


def test_a_proxy_that_fails():
    (_, other), (kind, failed) = ranks.run(2, between_nodes, 1, has_a_failing_proxy)
    assert_blamed(other, 0, "low_latency_dispatch", 3)
    assert kind == EPTransportError.__name__ and "proxy" in failed and "division" in failed


def differ(comm):
    """Rank 1 combines where rank 0 dispatches."""
    with pytest.raises(EPError) as caught, warm_buffer(comm) as buf:
        if comm.rank == 0:
            case = case_of(comm.size)
            for _ in range(2):
                dispatch(buf, case, *case.make()[:3])
        a_round(buf)
    return str(caught.value)


def test_ranks_call_different_operations():
    for rank, text in enumerate(ranks.run(2, between_nodes, 1, differ)):
        here, there = ("dispatch", "combine") if rank == 0 else ("combine", "dispatch")
        assert text.startswith(f"rank {rank} called low_latency_{here} where rank {1 - rank} called low_latency_{there}"), text


def differ_in_shape(comm, combine):
    """Both ranks know two shapes, and use them in different orders."""
    shapes = [within.case_of(pair, 1, (pair[0][0] // 2,) * comm.size) for pair in PAIRS[comm.size]]
    with pytest.raises(EPError) as caught, make_buffer(comm, 21, 4480, 14, 6, timeout_s=TIMEOUT) as buf:
        for case in shapes:
            run_round(buf, case)
        got = [dispatch(buf, case, *case.make()[:3]) for case in (shapes if combine else ())]
        mine = shapes[comm.rank]
        if not combine:
            dispatch(buf, mine, *mine.make()[:3])
        else:
            _, idx, weights, y = mine.make()
            selections = (up(idx[comm.rank]), up(weights[comm.rank])) if mine.direct else (None, None)
            buf.low_latency_combine(up(y[comm.rank]), *selections, got[comm.rank].handle)
    return str(caught.value)


@pytest.mark.parametrize("combine", [False, True])
def test_ranks_mean_different_shapes(combine):
    """A box of another shape is not looked into."""
    for rank, text in enumerate(ranks.run(2, between_nodes, 1, differ_in_shape, combine)):
        name = "low_latency_combine" if combine else "low_latency_dispatch"
        assert text.startswith(f"rank {rank} called {name} where rank {1 - rank} called {name} of another shape"), text
