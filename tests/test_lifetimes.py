"""How Buffers come and go: made together or in vain, destroyed in any order, dropped, outlived by results, used from any thread."""
import atexit
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest
import ranks
from case import Case, run_round
from engine import choose_gpu, make_buffer, on_gpu
from high_throughput_case import dispatch as ht_dispatch
from test_faults import H, K, LOCAL, M, a_round, case_of, mappings
from test_high_throughput_faults import HEAP, made_for

import pyep
from pyep import EPClosedError, EPError, EPTimeoutError, EPTransportError

LONG = 60                               # a timeout_s that nobody should wait for: calls on ranks end before
PATIENCE = 40                           # of a call on ranks

cpu_only = pytest.mark.skipif(on_gpu(), reason="about the shared memory of the CPU engine")


def small(comm, **options):
    """A Buffer for which nothing is compiled."""
    return pyep.Buffer(**dict(comm=comm, num_nvl_bytes=2**12, timeout_s=LONG) | options)


def held():
    """What a Buffer could leave behind: mappings, how many files, the threads of proxies."""
    return mappings(), len(os.listdir("/proc/self/fd")), [t.name for t in threading.enumerate() if "pyep" in t.name]


# ---- dropped -----------------------------------------------------------------------------------------------------------

def drop_many(comm, per_node):
    from pyep.channels.mpi_board import board_of
    with pytest.MonkeyPatch.context() as patch:
        if per_node:
            patch.setenv("PYEP_RANKS_PER_NODE", str(per_node))
        small(comm).destroy()                                    # MPI keeps files of its first messages
        board, before = board_of(comm).comm, held()
        gc.disable()                                             # references alone must do
        try:
            for _ in range(30):
                buf = small(comm)
                gone = weakref.ref(buf)
                assert len(mappings() - before[0]) == (1 if per_node else comm.size)
                del buf
                assert gone() is None and held() == before
        finally:
            gc.enable()
    assert board_of(comm).comm is board                          # one duplicate serves all
    return "nothing is left"


@cpu_only
@pytest.mark.parametrize("n, per_node", [(2, None), (2, 1)], ids=["one node", "ports"])
def test_dropped_buffers_leave_nothing(n, per_node):
    assert ranks.run(n, drop_many, per_node) == ["nothing is left"] * n


def drop_after_use(comm):
    before, gc_was = mappings(), gc.isenabled()
    gc.disable()
    try:
        buf = make_buffer(comm, M, H, LOCAL * comm.size, K, num_nvl_bytes=HEAP, timeout_s=LONG)
        a_round(buf)
        made = made_for(comm.size)
        received = ht_dispatch(buf, made)
        with pytest.raises(TypeError):
            buf.low_latency_combine(None, None, None, "no handle")
        comm.barrier()                                           # all have received
        array, event, copy = received[0], received[5], np.array(received[0])
        del buf, received
        kept = mappings() - before
        assert len(kept) == 1                                    # its own memory, in which the result lies, and no peer's
        assert (array.view(np.uint16) == copy.view(np.uint16)).all()
        event.synchronize()                                      # of a Buffer that is no more: nothing to wait for
        del array, event
        assert mappings() == before
    finally:
        if gc_was:
            gc.enable()


@cpu_only
def test_results_outlive_their_buffer():
    ranks.run(2, drop_after_use)


def drop_after_an_error(comm):
    before, texts = mappings(), []
    gc.disable()
    try:
        buf = make_buffer(comm, M, H, LOCAL * comm.size, K, timeout_s=2)
        a_round(buf)
        comm.barrier()
        if comm.rank == 0:
            try:
                a_round(buf)
            except EPTimeoutError as error:
                texts.append(str(error))
            assert texts and not buf.is_available()
        del buf                                                  # though it has kept the error, which has seen it
        assert mappings() == before
    finally:
        gc.enable()
        comm.barrier()


@cpu_only
def test_a_kept_error_keeps_nothing():
    ranks.run(2, drop_after_an_error)


def break_a_promise(comm):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        promised = small(comm, explicitly_destroy=True)
        promised.destroy()
        small(comm)
        assert not caught
        small(comm, explicitly_destroy=True)
        gc.collect()
    assert [w.category for w in caught] == [ResourceWarning] and "destroy() was not called" in str(caught[0].message)


def test_a_promise_to_destroy_is_remembered():
    ranks.run(2, break_a_promise)


# ---- destroyed ---------------------------------------------------------------------------------------------------------

def destroy_in_orders(comm, per_node):
    before = mappings()
    with pytest.MonkeyPatch.context() as patch:
        if per_node:
            patch.setenv("PYEP_RANKS_PER_NODE", str(per_node))
        for turn in range(2):
            bufs = [small(comm) for _ in range(3)]
            orders = list(itertools.permutations(bufs))
            for buf in orders[(turn + comm.rank * 3) % 6]:
                buf.destroy()
                buf.destroy()
                assert not buf.is_available()
                with pytest.raises(EPClosedError):
                    buf.get_local_buffer_tensor(np.uint8)
        small(comm).destroy()
    assert on_gpu() or mappings() == before


@pytest.mark.parametrize("n, per_node", [(2, None), (3, None), (2, 1)])
def test_any_order(n, per_node):
    ranks.run(n, destroy_in_orders, per_node, timeout=PATIENCE)


def one_keeps_its_buffer(comm):
    buf = small(comm)
    if comm.rank == 0:
        buf.destroy()                                            # the other one is never destroyed while this one waits
    comm.barrier()
    buf.destroy()


def test_destroy_waits_for_nobody():
    ranks.run(2, one_keeps_its_buffer, timeout=PATIENCE)


def one_is_killed(comm, per_node):
    with pytest.MonkeyPatch.context() as patch:
        if per_node:
            patch.setenv("PYEP_RANKS_PER_NODE", str(per_node))
        bufs = [small(comm) for _ in range(2)]
    comm.barrier()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    bufs[0].destroy()
    del bufs
    return len(mappings())


@pytest.mark.parametrize("per_node", [None, 1], ids=["one node", "ports"])
def test_a_rank_is_killed_while_others_destroy(per_node):
    done = ranks.launch(3, one_is_killed, per_node, timeout=PATIENCE)
    assert not done.errors and done.results == [0, None, 0], done


KEPT = []


def end_with_the_interpreter(comm):
    KEPT.extend(small(comm) for _ in range(3))
    atexit.register(KEPT[0].destroy)
    KEPT.append([KEPT[1]])
    KEPT[-1].append(KEPT[-1])                                    # a cycle: only garbage collection finds it
    small(comm)                                                  # dropped: parked when the interpreter ends


def test_ends_with_the_interpreter():
    done = ranks.launch(2, end_with_the_interpreter, timeout=PATIENCE)
    assert done.results == [None, None] and done.returncode == 0 and not done.stderr, done


def free_the_communicator_first(comm):
    from pyep.channels.mpi_board import board_of
    mine = comm.Dup()
    buf, board = make_buffer(mine, M, H, LOCAL * comm.size, K, timeout_s=LONG), board_of(mine)
    mine.Free()
    a_round(buf)                                                 # it does not need the caller's communicator
    buf.destroy()
    comm.barrier()
    small(comm).destroy()                                        # looks after what was left
    comm.barrier()
    small(comm).destroy()
    assert board.comm is None
    other = comm.Dup()
    small(other).destroy()
    board = board_of(other)
    other.Free()
    assert board.comm is None                                    # its duplicate went with it


def test_a_communicator_goes_first():
    ranks.run(2, free_the_communicator_first)


# ---- made in vain ------------------------------------------------------------------------------------------------------

def fail_alone(comm, arguments, environment):
    small(comm).destroy()                                        # from now on ranks can tell each other
    before, told = held(), None
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == 1:
            for name, value in environment.items():
                patch.setenv(name, value)
        with pytest.raises((EPError, ValueError, OSError)) as caught:
            small(comm, **arguments if comm.rank == 1 else {})
        told, caught = (type(caught.value), str(caught.value)), None
    gc.collect()                                                 # the errors, and what their tracebacks refer to
    assert held() == before
    comm.barrier()                                               # else the others might find together with its second attempt
    small(comm).destroy()                                        # and ranks find together again
    return told


@cpu_only
@pytest.mark.parametrize("arguments, environment, error", [
    (dict(timeout_s=-1), {}, ValueError), (dict(transport="pigeon"), {}, ValueError),
    ({}, dict(PYEP_CPU_SHAPE="1,2"), ValueError), ({}, dict(PYEP_RANKS_PER_NODE="some"), ValueError)])
def test_one_rank_fails_to_make_one(arguments, environment, error):
    """All hear of it, though their own arguments were good, and nobody waits."""
    told = ranks.run(3, fail_alone, arguments, environment, timeout=PATIENCE)
    assert told[1][0] is error
    for rank in (0, 2):
        assert told[rank][0] is EPTransportError and told[1][1] in told[rank][1] and "rank 1 has failed" in told[rank][1], told


def come_too_late(comm):
    small(comm).destroy()
    comm.barrier()
    if comm.rank == 0:
        with pytest.raises(EPTimeoutError, match=r"rank 0 waited 0.5 s for ranks \[1\], which have not come|at the same time"):
            small(comm, timeout_s=0.5)
    comm.barrier()
    with small(comm):                                            # rank 0's second attempt, and rank 1's first
        pass
    if comm.rank == 1:
        with pytest.raises(EPTimeoutError):
            small(comm, timeout_s=0.5)
    comm.barrier()
    small(comm).destroy()


def test_ranks_find_together_after_one_gave_up():
    ranks.run(2, come_too_late, timeout=PATIENCE)


def give_no_communicator(comm):
    from mpi4py import MPI
    with pytest.raises(ValueError, match="comm is MPI.COMM_NULL; expected"):
        small(MPI.COMM_NULL)
    with pytest.raises(TypeError, match="group is .*; expected .*pass an mpi4py communicator as comm="):
        pyep.Buffer(comm, num_nvl_bytes=2**12)
    with pytest.raises(TypeError, match="group is 'world'; expected"):
        pyep.Buffer("world", num_nvl_bytes=2**12)


def test_no_communicator():
    ranks.run(1, give_no_communicator)


def test_numbers_of_numpy():
    ranks.run(1, make_with_numpy)


def make_with_numpy(comm):
    with small(comm, num_nvl_bytes=np.int64(2**12), num_rdma_bytes=np.uint16(2**10), num_qps_per_rank=np.int8(2),
               timeout_s=np.float32(2.5)) as buf:
        assert buf._connection.timeout_ns == 2_500_000_000
    with small(comm, timeout_s=np.int32(7)) as buf:
        assert buf._connection.timeout_s == 7


# ---- handles -----------------------------------------------------------------------------------------------------------

def use_stale_handles(comm):
    def make():
        return make_buffer(comm, M, H, LOCAL * comm.size, K, num_nvl_bytes=HEAP, timeout_s=LONG)
    made = made_for(comm.size)
    x, topk_idx, weights, y = (of_all[comm.rank] for of_all in case_of(comm.size).make())
    old = make()
    low = old.low_latency_dispatch(x, topk_idx, M, LOCAL * comm.size, use_fp8=False).handle
    received = ht_dispatch(old, made)
    high, rows = received[4], received[0]
    old.destroy()
    del old
    with make() as buf:
        for call in (lambda: buf.low_latency_combine(y, topk_idx, weights, low), lambda: buf.combine(rows, high),
                     lambda: buf.dispatch(made.x[comm.rank], high), lambda: buf.get_next_low_latency_combine_buffer(low)):
            with pytest.raises(ValueError, match="handle is of another Buffer"):
                call()
    addresses, numbers = set(), set()
    for _ in range(20):
        buf = small(comm)
        addresses.add(id(buf))
        numbers.add(buf._connection.number)
        buf.destroy()
        del buf
    assert len(numbers) == 20 > len(addresses)                   # the number tells apart what the address does not


@cpu_only
def test_handles_of_a_buffer_that_is_gone():
    ranks.run(2, use_stale_handles)


# ---- threads -----------------------------------------------------------------------------------------------------------

def in_a_thread(function, *args):
    """What a function returns or raises in a thread of its own."""
    outcome = []

    def call():
        try:
            choose_gpu()                                         # a thread begins on the first one
            outcome.append((function(*args), None))
        except BaseException as error:
            outcome.append((None, error))
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def change_threads(comm, shape):
    def mapped():
        return sum("pyep" in m[1] for m in mappings())
    before = mapped()                                            # other tests' Buffers, that they share
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_CPU_SHAPE", shape)
        wide = Case(1, 6, 136, 3 * comm.size, 3, (6,) * comm.size)      # its kernels are those of test_low_latency.py
        buf = in_a_thread(make_buffer, comm, wide.max_tokens, wide.hidden, wide.experts, wide.topk)
    run_round(buf, wide)
    in_a_thread(run_round, buf, wide)
    run_round(buf, wide)
    in_a_thread(buf.destroy)
    kept = [small(comm)]
    in_a_thread(kept.clear)                                      # the last reference goes there
    assert on_gpu() or mapped() <= before


@pytest.mark.parametrize("shape", ["1,1,1", "2,8,4"])
def test_calls_from_several_threads(shape):
    ranks.run(2, change_threads, shape)


NO_MPI = """
import sys, numpy as np, torch.distributed as dist, pyep
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
buf = pyep.Buffer(dist.group.WORLD, num_nvl_bytes=np.int64(4096), timeout_s=5)
dist.destroy_process_group()
buf.destroy()
assert not [m for m in sys.modules if m.startswith("mpi4py")], "MPI would be initialized"
"""


def test_without_mpi():
    """Processes that torchrun starts may not initialize MPI."""
    pytest.importorskip("torch")
    environment = {k: v for k, v in os.environ.items() if k != "PYEP_RANKS_PER_NODE"}
    done = subprocess.run([sys.executable, "-c", NO_MPI], env=environment, capture_output=True, text=True, timeout=ranks.TIMEOUT)
    assert done.returncode == 0, done.stderr
