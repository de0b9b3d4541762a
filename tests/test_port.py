"""PortChannels: triggers bit by bit, the FIFO, the proxies of the CPU engine between ranks, and what happens when they fail."""
import contextlib
import gc
import os
import re
import signal as signals
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import ranks
from engine import on_gpu
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyep import EPTimeoutError, EPTransportError
from pyep.channels.fifo import Fifo
from pyep.channels.handles import DATA, FLUSH, PORT_BYTES, SIGNAL, Trigger, decode, port_handle
from pyep.channels.link import INLINE
from pyep.channels.memory import wait_number
from pyep.channels.memory_channel import put as memory_put
from pyep.channels.memory_channel import signal as memory_signal
from pyep.channels.memory_channel import wait as memory_wait
from pyep.channels.port import flush, put, put_with_signal, signal
from pyep.channels.port import wait as wait_signal
from pyep.channels.proxy import Proxy
from pyep.kernels.cpu import CpuKernel
from pyep.kernels.lang import block_rank, fetch_add8, ld8, num_threads, st8, syncthreads, thread_rank
from pyep.kernels.op import Cpu
from pyep.own_kernels import Channels

pytestmark = [pytest.mark.timeout(300, method="thread"),
              pytest.mark.skipif(on_gpu(), reason="about the ports of the CPU engine; see test_mscclpp.py")]

ROOM, SIGNALLED, FLUSHED, WORDS = 201, 202, 203, 204        # the numbers of the waits in the kernels below
WAITS = {ROOM: "room for a trigger", SIGNALLED: "a signal", FLUSHED: "a flush", WORDS: "words"}
OFFSETS = dict(STATUS=0, FAILED=8)                          # of a symmetric memory that has nothing but these words
EXAMPLES = int(os.environ.get("PYEP_TEST_EXAMPLES", "100"))
SHORT = 0.3                                                 # a timeout in seconds for waits that are in vain


# ---- triggers, bit by bit --------------------------------------------------------------------------------------------

def push_all(base, timeout, handle, dst, src, nbytes, results):
    """One trigger of each kind, into slots of their own."""
    watch = base, timeout, 0
    st8(results, put(watch, ROOM, 1, handle, dst, src, nbytes))
    st8(results + 8, signal(watch, ROOM, 1, handle))
    st8(results + 16, put_with_signal(watch, ROOM, 1, handle, dst, src, nbytes))
    st8(results + 24, flush(watch, FLUSHED, 1, handle))


def written(dst, src, nbytes, semaphore, dst_memory, src_memory, kind):
    """The words of a trigger in the first lap, as MSCCL++ documents them: written out as a string of bits, highest first."""
    first = f"{src:032b}{nbytes:032b}"
    second = "1" + f"{semaphore:010b}{kind:03b}{dst_memory:09b}{src_memory:09b}{dst:032b}"
    assert len(first) == len(second) == 64
    return [int(bits, 2) for bits in (first, second)]


class Rig:
    """A FIFO, a handle and control words in plain memory; nobody serves the FIFO, or the test does."""

    def __init__(self, size, semaphore=0, dst_memory=1, src_memory=0, timeout_s=SHORT):
        self.fifo, self.control, self.status = Fifo(size), np.zeros(2, np.int64), np.zeros(7, np.int64)
        self.control[0] = self.status.ctypes.data
        self.words = np.zeros(3, np.int64)                       # inbound, expected, flush_done
        at = self.words.ctypes.data
        self.handle = np.array(port_handle(semaphore, at, at + 8, self.fifo, at + 16, dst_memory, src_memory), np.int64)
        self.timeout = int(timeout_s * 1e9)

    def run(self, kernel, *args, shape=(1, Cpu())):
        addresses = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in args]
        compiled(kernel, *shape).launch(None, self.control.ctypes.data, self.timeout, self.handle.ctypes.data, *addresses)

    @property
    def slots(self):
        """The words of the FIFO, [size, 2]."""
        return self.fifo._slots.ravel()[:2 * self.fifo.size].reshape(-1, 2).view(np.uint64)


KERNELS = {}


def compiled(kernel, blocks, machine):
    key = kernel, blocks, machine
    if key not in KERNELS:
        KERNELS[key] = CpuKernel(kernel, blocks, machine, 0, OFFSETS)
    return KERNELS[key]


OFFSET, MEMORY = st.integers(0, 2**32 - 1), st.integers(0, 511)


@given(OFFSET, OFFSET, OFFSET, st.integers(0, 1023), MEMORY, MEMORY)
@example(2**32 - 1, 0, 0, 0, 0, 0)
@example(0, 2**32 - 1, 0, 0, 0, 511)
@example(0, 0, 2**32 - 1, 0, 511, 0)
@example(0, 0, 0, 1023, 0, 0)
@settings(max_examples=50)
def test_trigger_bits(dst, src, nbytes, semaphore, dst_memory, src_memory):
    rig, results = Rig(4, semaphore, dst_memory, src_memory), np.zeros(4, np.int64)
    rig.words[2] = 2**62                                         # so that the flush need not wait
    rig.run(push_all, dst, src, nbytes, results)
    assert results.tolist() == [1] * 4
    moved, ids = (dst, src, nbytes), (semaphore, dst_memory, src_memory)
    kinds = [(moved, 1), ((0, 0, 0), 2), (moved, 3), ((0, 0, 0), 4)]
    assert rig.slots.tolist() == [written(*move, *ids, kind) for move, kind in kinds]
    got = [decode(*words) for words in rig.slots.view(np.int64).tolist()]
    assert got == [Trigger(kind, semaphore, dst_memory, move[0], src_memory, move[1], move[2], 1) for move, kind in kinds]


def test_handle_bytes():
    """As a C compiler lays out MSCCL++'s structures: 4-byte fields at 0, 56, 88 and 92, addresses elsewhere."""
    rig = Rig(8, semaphore=3, dst_memory=5, src_memory=7)
    raw, fifo, words = rig.handle.tobytes(), rig.fifo, rig.words.ctypes.data
    assert len(raw) == PORT_BYTES == 96
    assert {at: int.from_bytes(raw[at:at + 4], "little") for at in (0, 56, 88, 92)} == {0: 3, 56: 8, 88: 5, 92: 7}
    assert {at: int.from_bytes(raw[at:at + 8], "little") for at in (8, 16, 24, 32, 40, 48, 64, 72, 80)} == {
        8: words, 16: words + 8, 24: fifo.triggers, 32: fifo.head, 40: fifo.tail, 48: fifo.tail_cache, 64: 7, 72: 3, 80: words + 16}


# ---- the FIFO --------------------------------------------------------------------------------------------------------

def push_many(base, timeout, handle, n, pushed):
    """Each thread pushes n puts that tell thread and number; `pushed` counts those that found room."""
    watch = base, timeout, 0
    thread, i = block_rank() * num_threads() + thread_rank(), 0
    while i < n:
        ok = put(watch, ROOM, 1, handle, thread, i, 8)
        i = i + 1 if ok else n
        fetch_add8(pushed, ok)


def in_thread(function, *args, **kwargs):
    thread = threading.Thread(target=function, args=args, kwargs=kwargs)
    thread.start()
    return thread


SHAPES = {"one thread": (1, Cpu()), "2,8,4": (2, Cpu(8, 4))}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [1, 4, 64])
def test_laps_with_a_slow_proxy(size, shape):
    """Many times around: every trigger comes once, those of a thread in order, and none is overwritten before it was taken."""
    threads, n = shape[0] * shape[1].threads, 40
    rig, pushed, seen = Rig(size, timeout_s=60), np.zeros(1, np.int64), []
    kernel = in_thread(rig.run, push_many, n, pushed, shape=shape)
    while len(seen) < threads * n:
        trigger = rig.fifo.next()
        if trigger is None:
            time.sleep(20e-6)
            continue
        if len(seen) % 7 == 0:
            time.sleep(1e-3)
        assert trigger == rig.fifo.next()                        # it stays until it is popped
        assert pushed[0] <= len(seen) + size                     # nobody went further than a lap
        seen.append((trigger.destination, trigger.source))
        rig.fifo.pop()
    kernel.join()
    assert pushed[0] == threads * n and rig.fifo.next() is None
    assert rig.fifo.state() == f"FIFO head {threads * n}, tail {threads * n}"
    for thread in range(threads):
        assert [i for t, i in seen if t == thread] == list(range(n))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_proxy(shape):
    """Pushes that find no room give up, with a record for the host; those that found some stay."""
    rig, pushed = Rig(4), np.zeros(1, np.int64)
    start = time.monotonic()
    rig.run(push_many, 10, pushed, shape=shape)
    assert SHORT <= time.monotonic() - start < SHORT + 2
    assert pushed[0] == 4 and rig.control[1] == 1                # all waits of the rank end
    state, wait, peer, address, expected, seen, _ = rig.status.tolist()
    assert (state, wait, peer, seen) == (1, ROOM, 1, 0) and expected >= 1
    assert address + rig.control.ctypes.data == rig.fifo.tail


# ---- between ranks ---------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def connected(comm, per_node=1, nbytes=1 << 18, timeout_s=30, fifo=512, queue_pairs=24, **variables):
    """`Channels` of ranks on nodes of so many; `variables` of the environment beside."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(PYEP_RANKS_PER_NODE=per_node, **variables).items():
            patch.setenv(name, str(value))
        patch.setattr("pyep.channels.host_ports.FIFO_SIZE", fifo)
        with Channels(comm=comm, nbytes=nbytes, waits=WAITS, timeout_s=timeout_s, num_qps_per_rank=queue_pairs) as channels:
            yield channels


def slowly(patch, seed, longest_s=2e-3):
    """Have this rank's proxies sleep now and then before they serve a trigger."""
    serve, random = Proxy.serve, np.random.default_rng(seed)

    def sleep_and_serve(self, trigger):
        if random.random() < 0.3:
            time.sleep(longest_s * random.random())
        serve(self, trigger)
    patch.setattr(Proxy, "serve", sleep_and_serve)


def port_peers(channels):
    return [r for r in range(channels.size) if channels.ports[r]]


# Random puts.  A rank sends from the first bytes of its memory; each source has a region of its own behind them.

SENT, REGION = 1 << 14, 1 << 14


class Move(NamedTuple):
    """An entry of a rank's list, six words."""

    to: int
    port: int
    dst: int
    src: int
    nbytes: int
    kind: int


def work_off(base, timeout, moves, n, sources, num_sources):
    """Make the moves of a list one after another, then wait for a signal of each source: [rank, port] each."""
    watch, i = (base, timeout, 0), 0
    while i < n:
        move = moves + 48 * i
        to, handle, kind = ld8(move), ld8(move + 8), ld8(move + 40)
        dst, src, nbytes = ld8(move + 16), ld8(move + 24), ld8(move + 32)
        if kind == DATA:
            put(watch, ROOM, to, handle, dst, src, nbytes)
        if kind == SIGNAL:
            signal(watch, ROOM, to, handle)
        if kind == DATA | SIGNAL:
            put_with_signal(watch, ROOM, to, handle, dst, src, nbytes)
        if kind == FLUSH:
            flush(watch, FLUSHED, to, handle)
        i += 1
    i = 0
    while i < num_sources:
        wait_signal(watch, SIGNALLED, ld8(sources + 16 * i), ld8(sources + 16 * i + 8))
        i += 1


SIZES = st.sampled_from([0, 1, 7, 8, 16, INLINE - 1, INLINE, INLINE + 1, REGION]) | st.integers(0, REGION)
PUT = st.tuples(SIZES, st.floats(0, 1), st.floats(0, 1), st.sampled_from([DATA, DATA, DATA, FLUSH]), st.integers(0, 3))


def make_moves(puts, rank, channels):
    """The list of a rank: the puts that all make, each to a peer of its own choice, and in the end a signal to all."""
    peers, moves = port_peers(channels), []
    for nbytes, where, whence, kind, who in puts:
        to = peers[(who + rank) % len(peers)]
        dst, src = int(where * (REGION - nbytes)), int(whence * (SENT - nbytes))
        at = channels.offset + SENT + REGION * rank
        moves.append(Move(to, channels.ports[to], at + dst, channels.offset + src, nbytes, kind))
    if puts:                                                     # one signal comes with data
        moves[-1] = moves[-1]._replace(kind=DATA | SIGNAL)
    with_data = moves[-1].to if puts else None
    return moves + [Move(to, channels.ports[to], 0, 0, 0, SIGNAL) for to in peers if to != with_data]


def sent_by(rank):
    return np.random.default_rng(rank).integers(0, 256, SENT, np.uint8)


def put_at_random(comm, per_node, puts, slow, variables):
    with pytest.MonkeyPatch.context() as patch, connected(comm, per_node, fifo=8, **variables) as channels:
        if slow:
            slowly(patch, comm.rank)
        memory, peers = channels.memory, port_peers(channels)
        memory[:SENT] = sent_by(comm.rank)
        moves = np.array(make_moves(puts, comm.rank, channels), np.int64)
        sources = np.array([(r, channels.ports[r]) for r in peers], np.int64)
        channels.meet()
        channels.launch(channels.kernel(work_off), moves.ctypes.data, len(moves), sources.ctypes.data, len(sources))
        want = np.zeros_like(memory)
        want[:SENT] = sent_by(comm.rank)
        for source in peers:
            for move in make_moves(puts, source, channels_of(channels, source)):
                if move.to == comm.rank and move.kind & DATA:
                    dst, src = move.dst - channels.offset, move.src - channels.offset
                    want[dst:dst + move.nbytes] = sent_by(source)[src:src + move.nbytes]
        np.testing.assert_array_equal(memory, want)
        channels.meet()


def channels_of(channels, rank):
    """What `make_moves` looks at, as another rank has it."""
    nodes = channels.nodes._replace(rank=rank)
    ports = [int(not nodes.holds(r)) for r in range(channels.size)]
    return SimpleNamespace(offset=channels.offset, size=channels.size, ports=ports)


@pytest.mark.parametrize("n, per_node, variables", [
    (2, 1, {}), (3, 1, {}), (3, 2, {}), (4, 2, {}), (4, 1, dict(PYEP_NUM_PROXIES=2)), (4, 1, dict(PYEP_NUM_PROXIES=3))])
@given(puts=st.lists(PUT, max_size=40), slow=st.booleans())
@example(puts=[(nbytes, 0, 0, DATA, 0) for nbytes in (REGION, 8, INLINE, INLINE + 1)], slow=True)
@settings(max_examples=max(2, EXAMPLES // 40))
def test_random_puts(n, per_node, variables, puts, slow):
    """What is there in the end is what puts one after another leave, overlapping ones too, and a signal comes after them."""
    ranks.run(n, put_at_random, per_node, puts, slow, variables)


# Rounds: data, then a record behind it that alone is waited for.

def play_rounds(base, timeout, to, handle, rounds, data, record, room, nbytes, errors):
    """Both ranks: fill `data`, put it and then a record of two words, whose source is rewritten in every round, after a flush.

    The record's words and the data all are the number of the round.  room: bytes from what is sent to where it is received.
    """
    watch, r = (base, timeout, 0), 1
    while r <= rounds:
        at = 0
        while at < nbytes:
            st8(base + data + at, r)
            at += 8
        st8(base + record, r)
        st8(base + record + 8, r)
        put(watch, ROOM, to, handle, data + room, data, nbytes)
        put(watch, ROOM, to, handle, record + room, record, 16)
        ok = flush(watch, FLUSHED, to, handle)
        seen = wait_number(watch, WORDS, to, base + record + room + 8, r)
        fetch_add8(errors, 1 if seen != r or ok == 0 or ld8(base + record + room) != r else 0)
        at = 0
        while at < nbytes:
            fetch_add8(errors + 8, 1 if ld8(base + data + room + at) != r else 0)
            at += 8
        signal(watch, ROOM, to, handle)                          # the peer may overwrite what it sent
        ok &= wait_signal(watch, SIGNALLED, to, handle)
        r = r + 1 if ok else rounds + 1


def rounds_between_two(comm, slow):
    with pytest.MonkeyPatch.context() as patch, connected(comm) as channels:
        if slow:
            slowly(patch, comm.rank)
        peer, errors, kernel = 1 - comm.rank, np.zeros(2, np.int64), channels.kernel(play_rounds)
        for nbytes in (8, 136, INLINE // 8 * 8, INLINE // 8 * 8 + 8, 5000, 1 << 16):
            data, room = channels.offset, 1 << 17
            record = data + nbytes + -nbytes % 128
            channels.memory[:] = 0
            channels.meet()
            channels.launch(kernel, peer, channels.ports[peer], 20, data, record, room, nbytes, errors.ctypes.data)
            assert errors.tolist() == [0, 0], nbytes
        return channels._connection.transport.port_state(peer)


@pytest.mark.parametrize("slow", [False, True])
def test_data_is_there_before_its_record(slow):
    for state in ranks.run(2, rounds_between_two, slow):
        assert re.fullmatch(r"proxy 0: FIFO head 480, tail \d+, last trigger \w+ on channel 0; the proxy runs", state), state


# Signals.

def send_signals(base, timeout, to, handle, n):
    watch, i = (base, timeout, 0), 0
    while i < n:
        signal(watch, ROOM, to, handle)
        i += 1


def take_signals(base, timeout, source, handle, n, taken):
    """All threads of a block take n signals together."""
    watch, i = (base, timeout, 0), thread_rank()
    while i < n:
        fetch_add8(taken, wait_signal(watch, SIGNALLED, source, handle))
        i += num_threads()


def one_signal(base, timeout, to, handle):
    signal((base, timeout, 0), ROOM, to, handle)


def count_signals(comm):
    """28 signals; the wait for one more is in vain."""
    with connected(comm, timeout_s=2, PYEP_CPU_SHAPE="1,4,2") as channels:
        peer, taken, text = 1 - comm.rank, np.zeros(1, np.int64), None
        send, take = channels.kernel(send_signals), channels.kernel(take_signals)
        channels.meet()
        if comm.rank == 0:
            channels.launch(send, peer, channels.ports[peer], 7)             # by each of four threads
        else:
            channels.launch(take, peer, channels.ports[peer], 28, taken.ctypes.data)
        if comm.rank == 1:
            with pytest.raises(EPTimeoutError) as caught:
                channels.launch(take, peer, channels.ports[peer], 1, taken.ctypes.data)
            text = str(caught.value)
        comm.barrier()
    return int(taken[0]), text


def test_signals_are_counted():
    (nothing, _), (taken, text) = ranks.run(2, count_signals)
    assert (nothing, taken) == (0, 28)
    assert text == ("rank 1 waited 2 s for rank 0: a signal; expected 29, seen 28. Rank 0 is reached through a port: "
                    "proxy 0: FIFO head 0, tail 0, last trigger none; the proxy runs")


# MemoryChannels, which speak the same interface to peers whose memory is mapped.

def through_memory(base, timeout, peer, channel, dst, src, nbytes, rounds, errors):
    """A block puts its memory into the peer's, signals, waits for the peer's, and looks whether that is one more than its own."""
    watch, r = (base, timeout, 0), 1
    while r <= rounds:
        at = 8 * thread_rank()
        while at < nbytes:
            st8(base + src + at, r)
            at += 8 * num_threads()
        syncthreads()
        memory_put(channel, dst, src, nbytes, thread_rank(), num_threads())
        syncthreads()
        if thread_rank() == 0:
            memory_signal(channel)
            fetch_add8(errors, 1 - memory_wait(watch, SIGNALLED, peer, channel))
        syncthreads()
        at = 8 * thread_rank()
        while at < nbytes:
            fetch_add8(errors + 8, 1 if ld8(base + dst + at) != r else 0)
            at += 8 * num_threads()
        syncthreads()
        if thread_rank() == 0:
            memory_signal(channel)                               # it may be overwritten
            memory_wait(watch, SIGNALLED, peer, channel)
        syncthreads()
        r += 1


def rounds_through_memory(comm, shape):
    with connected(comm, per_node=2, PYEP_CPU_SHAPE=shape) as channels:
        peer, at, errors, kernel = comm.rank ^ 1, channels.offset, np.zeros(2, np.int64), channels.kernel(through_memory)
        assert [bool(address) for address in channels.channels] == [r == peer for r in range(comm.size)]
        for nbytes in (16, 64, 16 * 67):
            channels.memory[:] = 0
            channels.meet()
            channels.launch(kernel, peer, channels.channels[peer], at + 4096, at, nbytes, 10, errors.ctypes.data)
            assert errors.tolist() == [0, 0] and not channels.memory[4096 + nbytes:].any()
            channels.meet()


@pytest.mark.parametrize("n, shape", [(2, "1,1,1"), (4, "1,8,4")])
def test_memory_channels(n, shape):
    ranks.run(n, rounds_through_memory, shape)


# ---- proxies that are late, stopped, failing -------------------------------------------------------------------------

def proxies_of(channels):
    return channels._connection.transport._ports.proxies


def push_before_the_proxy_runs(comm):
    """Fewer triggers than there is room for; they wait in the FIFO."""
    with connected(comm, fifo=64, timeout_s=30) as channels:
        peer, taken = 1 - comm.rank, np.zeros(1, np.int64)
        proxy, = proxies_of(channels)
        proxy.stop()
        channels.launch(channels.kernel(send_signals), peer, channels.ports[peer], 64)
        assert "FIFO head 64, tail 0, last trigger none; the proxy does not run" in proxy.state()
        channels.meet()
        proxy.start()
        channels.launch(channels.kernel(take_signals), peer, channels.ports[peer], 64, taken.ctypes.data)
        assert taken[0] == 64
        channels.meet()


def test_a_late_proxy():
    ranks.run(2, push_before_the_proxy_runs)


def push_without_a_proxy(comm):
    """More triggers than there is room for; the error's text."""
    with pytest.raises(EPTimeoutError) as caught, connected(comm, fifo=16, timeout_s=3) as channels:
        proxies_of(channels)[0].stop()
        channels.launch(channels.kernel(send_signals), 1 - comm.rank, channels.ports[1 - comm.rank], 20)
    return str(caught.value)


def test_a_lost_proxy():
    for rank, text in enumerate(ranks.run(2, push_without_a_proxy)):
        peer = 1 - rank
        assert text == (f"rank {rank} waited 3 s for rank {peer}: room for a trigger; expected 1, seen 0. Rank {peer} is "
                        "reached through a port: proxy 0: FIFO head 20, tail 0, last trigger none; the proxy does not run")


def fail_in_the_proxy(comm):
    """On rank 0 only, while rank 1 waits for it: (seconds, error)."""
    with pytest.raises((EPTransportError, EPTimeoutError)) as caught, connected(comm, timeout_s=3) as channels:
        def fail(trigger):
            raise MemoryError("no room to breathe")
        peer, taken = 1 - comm.rank, np.zeros(1, np.int64)
        send, take = channels.kernel(send_signals), channels.kernel(take_signals)
        if comm.rank == 0:
            proxies_of(channels)[0].serve = fail
        channels.meet()
        start = time.monotonic()
        if comm.rank == 0:
            channels.launch(send, peer, channels.ports[peer], 1)
        channels.launch(take, peer, channels.ports[peer], 1, taken.ctypes.data)
    return time.monotonic() - start, str(caught.value)


def test_an_exception_in_the_proxy():
    """It reaches the user, and at once: the waits of the rank end."""
    (seconds, text), (_, theirs) = ranks.run(2, fail_in_the_proxy)
    assert seconds < 2.7 and text == "the proxy of this rank's ports has failed: no room to breathe"
    assert theirs.startswith("rank 1 waited 3 s for rank 0: a signal; expected 1, seen 0. Rank 0 is reached through a port: ")


def put_one(base, timeout, to, handle, dst, src, nbytes):
    watch = base, timeout, 0
    put(watch, ROOM, to, handle, dst, src, nbytes)
    flush(watch, FLUSHED, to, handle)


def put_out_of_bounds(comm):
    """Refused on the host; a kernel that does it all the same ends with an error."""
    with connected(comm, nbytes=1 << 12) as channels:
        end = channels._connection.transport.nbytes
        channels.check_put(end - 8, 0, 8)
        channels.check_put(0, end, 0)
        for wrong in ((end - 7, 0, 8), (0, end - 7, 8), (0, 0, end + 1), (-1, 0, 8), (0, -8, 8), (0, 0, -1), (2**32, 0, 8)):
            with pytest.raises(ValueError, match=r"(dst|src|nbytes) is "):
                channels.check_put(*wrong)
        channels.meet()
    peer, texts = 1 - comm.rank, []
    for dst, src, nbytes in ((0, 1, 0), (1, 0, 0), (-8, 0, 9), (0, -8, 2**16)):
        with pytest.raises(EPTransportError) as caught, connected(comm, nbytes=1 << 12) as channels:
            end = channels._connection.transport.nbytes
            channels.launch(channels.kernel(put_one), peer, channels.ports[peer], end + dst, end + src, nbytes)
        texts.append(str(caught.value))
        comm.barrier()
    return texts


def test_out_of_bounds():
    for texts in ranks.run(2, put_out_of_bounds):
        assert all("the proxy of this rank's ports has failed: a kernel asked for a put of " in text for text in texts), texts
        assert all("beyond the end of the symmetric memory" in text for text in texts), texts


# ---- ranks that die --------------------------------------------------------------------------------------------------

BAD = 1                                 # the rank at fault
LARGE = 1 << 19                         # bytes that MPI does not send before the receiver is ready


def die_while_others_put(comm, how, nbytes):
    """The others put to all, the bad one too, until they wait for it in vain: (seconds in vain, those of closing, error)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_RANKS_PER_NODE", "1")
        channels = Channels(comm=comm, nbytes=LARGE, waits=WAITS, timeout_s=2)
    kernel, errors = channels.kernel(play_with_all), np.zeros(1, np.int64)
    ports = np.array([p for r, p in enumerate(channels.ports) if r != comm.rank], np.int64)
    others = np.array([r for r in range(comm.size) if r != comm.rank], np.int64)
    channels.meet()

    def play(rounds):
        channels.launch(kernel, others.ctypes.data, ports.ctypes.data, comm.size - 1, channels.offset, nbytes, rounds,
                        errors.ctypes.data)
    play(3)
    channels.meet()                                              # what the bad rank's proxy had to send has come
    if comm.rank == BAD:
        how()
    start = time.monotonic()
    with pytest.raises((EPTimeoutError, EPTransportError)) as caught:
        play(1000)
    took, start = time.monotonic() - start, time.monotonic()
    channels.close()
    return took, time.monotonic() - start, str(caught.value), threading.active_count()


def play_with_all(base, timeout, others, ports, n, offset, nbytes, rounds, errors):
    watch, r = (base, timeout, 0), 0
    while r < rounds:
        i, ok = 0, 1
        while i < n:
            ok &= put_with_signal(watch, ROOM, ld8(others + 8 * i), ld8(ports + 8 * i), offset, offset, nbytes)
            i += 1
        i = 0
        while i < n:
            ok &= wait_signal(watch, SIGNALLED, ld8(others + 8 * i), ld8(ports + 8 * i))
            i += 1
        fetch_add8(errors, 1 - ok)
        r = r + 1 if ok else rounds


def exits():
    os._exit(3)


def is_killed():
    os.kill(os.getpid(), signals.SIGKILL)


def is_stopped():
    os.kill(os.getpid(), signals.SIGSTOP)


@pytest.mark.parametrize("how, nbytes", [(exits, 8), (is_killed, LARGE), (is_stopped, LARGE)])
def test_a_rank_dies(how, nbytes):
    done = ranks.launch(3, die_while_others_put, how, nbytes, timeout=60)
    assert not done.errors and done.results[BAD] is None, done
    for rank in (0, 2):
        took, closing, text, threads = done.results[rank]
        assert took < 4 and closing < 1.9, done.results
        assert "for rank 1" in text or "the proxy of this rank's ports has failed" in text, text


# ---- nothing is left -------------------------------------------------------------------------------------------------

def remains():
    """What a `Channels` could leave behind: threads of proxies, memory that is mapped."""
    threads = [t.name for t in threading.enumerate() if "pyep" in t.name]
    return threads, [line for line in Path("/proc/self/maps").read_text().splitlines() if "pyep" in line and " rw-s " in line]


def put_in_vain(channels):
    """A put that MPI does not send, since nobody receives it."""
    peer, at = 1 - channels.rank, channels.offset
    if channels.rank == 1:
        proxies_of(channels)[0].stop()
    channels.meet()
    if channels.rank == 0:
        channels.launch(channels.kernel(put_one), peer, channels.ports[peer], at, at, LARGE)
    else:
        channels.launch(channels.kernel(take_signals), peer, channels.ports[peer], 1, np.zeros(1, np.int64).ctypes.data)


KEPT = []


def end_in_every_way(comm):
    def some_puts(channels):
        peer, errors, at = 1 - comm.rank, np.zeros(2, np.int64), channels.offset
        channels.meet()
        channels.launch(channels.kernel(play_rounds), peer, channels.ports[peer], 3, at, at + 4096, 1 << 14, 2048,
                        errors.ctypes.data)

    with connected(comm) as channels:
        some_puts(channels)
        assert len(remains()[0]) == len(remains()[1]) == 1
    channels = None
    assert remains() == ([], [])
    with pytest.raises(KeyError), connected(comm) as channels:
        some_puts(channels)
        raise KeyError("on all ranks")
    channels = None
    assert remains() == ([], [])
    with connected(comm) as channels:
        peer = 1 - comm.rank
        channels.launch(channels.kernel(send_signals), peer, channels.ports[peer], 99)       # which nobody takes
    channels = None
    assert remains() == ([], [])
    with connected(comm) as channels:
        proxy, = proxies_of(channels)
        proxy.serve = lambda trigger: proxy.end()                # as garbage collection may do it, in the thread itself
        channels.launch(channels.kernel(one_signal), 1 - comm.rank, channels.ports[1 - comm.rank])
    channels = proxy = None
    gc.collect()
    assert remains() == ([], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_RANKS_PER_NODE", "1")
        channels = Channels(comm=comm, nbytes=1 << 16, waits=WAITS)
    some_puts(channels)
    comm.barrier()
    channels = None                                              # forgotten
    gc.collect()
    assert remains() == ([], [])
    with pytest.raises(EPTimeoutError), connected(comm, nbytes=LARGE, timeout_s=3) as channels:
        put_in_vain(channels)
    comm.barrier()                                               # the peer's MPI may still want what it could not send
    comm.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_RANKS_PER_NODE", "1")
        KEPT.append(Channels(comm=comm, nbytes=1 << 16, waits=WAITS))
    some_puts(KEPT[0])                                           # alive to the end of the interpreter


def test_ends_that_leave_nothing():
    done = ranks.launch(2, end_in_every_way)
    assert done.results == [None, None] and done.returncode == 0 and not done.stderr, done


# ---- several proxies -------------------------------------------------------------------------------------------------

def use_all_channels(comm, per_peer):
    """Each of a peer's channels has a proxy, a semaphore and a FIFO of its own."""
    with connected(comm, PYEP_NUM_PROXIES=3, queue_pairs=per_peer) as channels:
        proxies = proxies_of(channels)
        for peer in port_peers(channels):
            handles = [channels.ports[peer] + PORT_BYTES * i for i in range(per_peer)]
            taken = np.zeros(1, np.int64)
            channels.meet()
            for i, handle in enumerate(handles):
                channels.launch(channels.kernel(send_signals), peer, handle, 10 + i)
            for i, handle in enumerate(handles):
                channels.launch(channels.kernel(take_signals), peer, handle, 10 + i, taken.ctypes.data)
        assert taken[0] == sum(10 + i for i in range(per_peer))
        channels.meet()
    return sorted(proxy._fifo.position for proxy in proxies)


@pytest.mark.parametrize("per_peer, triggers", [(1, [0, 0, 10]), (2, [0, 10, 11]), (3, [10, 11, 12])])
def test_several_proxies(per_peer, triggers):
    assert ranks.run(2, use_all_channels, per_peer) == [triggers, triggers]
