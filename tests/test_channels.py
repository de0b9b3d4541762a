"""MemoryChannels and PortChannels in kernels that run on any engine: on the CPU over transport "host", on GPUs over "mscclpp"."""
import gc

import numpy as np
import pytest
import ranks
from engine import choose_gpu, down, on_gpu

from pyep import EPTimeoutError
from pyep.channels.handles import PORT_BYTES
from pyep.channels.memory import wait_number
from pyep.channels.memory_channel import put as store
from pyep.channels.memory_channel import signal as signal_mapped
from pyep.channels.memory_channel import wait as wait_mapped
from pyep.channels.port import flush, put, put_with_signal, signal
from pyep.channels.port import wait as wait_signal
from pyep.kernels.lang import fetch_add8, ld8_relaxed, num_threads, st8, syncthreads, syncthreads_or, thread_rank
from pyep.own_kernels import Channels

TRANSPORT = "mscclpp" if on_gpu() else "host"
ROOM, SIGNALLED, FLUSHED, WORDS = 201, 202, 203, 204            # the numbers of the waits in the kernels below
WAITS = {ROOM: "room for a trigger", SIGNALLED: "a signal", FLUSHED: "a flush", WORDS: "a record"}
SENT, COME = 1 << 10, 1 << 21                                   # where a rank has what it sends, and what comes; below, counts
NBYTES = 1 << 22


@pytest.fixture(autouse=True)
def need_mscclpp():
    """On GPUs."""
    if on_gpu():
        pytest.importorskip("mscclpp")


def open_channels(comm, per_node, **options):
    """`Channels` of ranks on nodes of so many."""
    choose_gpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_RANKS_PER_NODE", str(per_node))
        return Channels(comm=comm, nbytes=NBYTES, waits=WAITS, **dict(transport=TRANSPORT, timeout_s=20) | options)


# ---- kernels: one block ----------------------------------------------------------------------------------------------

def word(rank, turn, i):
    return (rank + 1) << 48 | turn << 24 | i


def fill(at, words, rank, turn):
    """All threads write what a rank sends in a turn."""
    i = thread_rank()
    while i < words:
        st8(at + 8 * i, word(rank, turn, i))
        i += num_threads()
    syncthreads()


def count_wrong(at, words, rank, turn, wrong):
    """All threads compare what has come with what a rank sent."""
    i = thread_rank()
    while i < words:
        fetch_add8(wrong, 0 if ld8_relaxed(at + 8 * i) == word(rank, turn, i) else 1)
        i += num_threads()
    syncthreads()


def by_port(base, timeout, me, peer, handle, memory, words, turns, how, wrong):
    """Put new words in every turn, and look at the peer's.  how: 0 put with signal; 1 put, signal, flush."""
    watch, turn = (base, timeout, 0), 1
    while turn <= turns:
        fill(base + memory + SENT, words, me, turn)
        ok = 1
        if thread_rank() == 0:
            if how == 0:
                ok = put_with_signal(watch, ROOM, peer, handle, memory + COME, memory + SENT, 8 * words)
            else:
                ok = put(watch, ROOM, peer, handle, memory + COME, memory + SENT, 8 * words)
                ok &= signal(watch, ROOM, peer, handle)
                ok &= flush(watch, FLUSHED, peer, handle)
            ok &= wait_signal(watch, SIGNALLED, peer, handle)
        syncthreads()
        count_wrong(base + memory + COME, words, peer, turn, wrong)
        if thread_rank() == 0:                                   # both have looked: both may write
            ok &= signal(watch, ROOM, peer, handle) & wait_signal(watch, SIGNALLED, peer, handle)
        turn = turns + 1 if syncthreads_or(1 - ok) else turn + 1


def by_record(base, timeout, me, peer, handle, memory, words, turns, how, wrong):
    """As `by_port`, but a second put behind the data says that it has come: 16 bytes, both words the turn, of which either may come
    first.  how: 0."""
    watch, turn, record = (base, timeout, 0), 1, memory + 256
    while turn <= turns:
        fill(base + memory + SENT, words, me, turn)
        ok = 1
        if thread_rank() == 0:
            st8(base + record, turn)
            st8(base + record + 8, turn)
            ok = put(watch, ROOM, peer, handle, memory + COME, memory + SENT, 8 * words)
            ok &= put(watch, ROOM, peer, handle, record + 128, record, 16)
            for come in record + 128, record + 136:
                ok &= 1 if wait_number(watch, WORDS, peer, base + come, turn) == turn else 0
        syncthreads()
        count_wrong(base + memory + COME, words, peer, turn, wrong)
        if thread_rank() == 0:
            ok &= signal(watch, ROOM, peer, handle) & wait_signal(watch, SIGNALLED, peer, handle)
            fetch_add8(wrong, 1 - ok)
        turn = turns + 1 if syncthreads_or(1 - ok) else turn + 1


def by_memory(base, timeout, me, peer, handle, memory, words, turns, how, wrong):
    """As `by_port`, through a MemoryChannel: all threads store.  how: 0."""
    watch, turn = (base, timeout, 0), 1
    while turn <= turns:
        fill(base + memory + SENT, words, me, turn)
        ok = 1
        store(handle, memory + COME, memory + SENT, 8 * words, thread_rank(), num_threads())
        syncthreads()
        if thread_rank() == 0:
            signal_mapped(handle)
            ok = wait_mapped(watch, SIGNALLED, peer, handle)
        syncthreads()
        count_wrong(base + memory + COME, words, peer, turn, wrong)
        if thread_rank() == 0:
            signal_mapped(handle)
            ok &= wait_mapped(watch, SIGNALLED, peer, handle)
        turn = turns + 1 if syncthreads_or(1 - ok) else turn + 1


def wait_in_vain(base, timeout, me, peer, handle, memory, words, turns, how, wrong):
    watch = base, timeout, 0
    signal(watch, ROOM, peer, handle)
    wait_signal(watch, SIGNALLED, peer, handle)
    wait_signal(watch, SIGNALLED, peer, handle)


# ---- on ranks --------------------------------------------------------------------------------------------------------

KERNELS = {"port": by_port, "record": by_record, "memory": by_memory, "in vain": wait_in_vain}
SIZES = 16, 1008, 4096, 1 << 18                                 # bytes


def wrong_words(channels, name, peer, handle, nbytes, turns=10, how=0):
    """Run a kernel with a peer that runs it too: how many words came wrong."""
    channels.memory[:] = 0
    channels.synchronize()
    channels.meet()                                              # now both are clean
    kernel = channels.kernel(KERNELS[name], threads=256)
    wrong = channels._connection.transport.base + channels.offset
    channels.launch(kernel, channels.rank, peer, handle, channels.offset, nbytes // 8, turns, how, wrong)
    channels.synchronize()
    return int(down(channels.array((1,), np.int64))[0])


def partner(comm):
    """Ranks in pairs of neighbours, or in pairs of one from each half: whom this one exchanges with, by node."""
    return comm.rank ^ 1, (comm.rank + comm.size // 2) % comm.size


def exchange(comm, per_node, name, shape="1,4,2"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_CPU_SHAPE", shape)
        with open_channels(comm, per_node) as channels:
            near, far = partner(comm)
            peer = near if name == "memory" else far
            handle = (channels.channels if name == "memory" else channels.ports)[peer]
            assert handle and channels.transport == TRANSPORT
            return [wrong_words(channels, name, peer, handle, nbytes, how=how)
                    for nbytes in SIZES for how in ((0, 1) if name == "port" else (0,))]


@pytest.mark.parametrize("n, per_node, name", [(2, 1, "port"), (2, 1, "record"), (2, 2, "memory"), (4, 1, "port"), (4, 2, "port"),
                                               (4, 2, "record"), (4, 2, "memory")])
def test_exchange(n, per_node, name):
    """Ranks on nodes of one, of two and all on one: what a kernel puts comes, whole, and before what says so."""
    for wrong in ranks.run(n, exchange, per_node, name):
        assert not any(wrong), wrong


def exchange_with_all(comm, proxies, per_peer):
    """With every other rank, through each of the channels to it, the same on both sides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_NUM_PROXIES", str(proxies))
        with open_channels(comm, 1, num_qps_per_rank=per_peer) as channels:
            wrong = []
            for distance in range(1, comm.size):
                peer = comm.rank ^ distance
                for i in range(per_peer):
                    wrong.append(wrong_words(channels, "port", peer, channels.ports[peer] + PORT_BYTES * i, 4096))
            return wrong


@pytest.mark.parametrize("n, proxies, per_peer", [(2, 2, 2), (4, 1, 1), (4, 2, 1), (4, 3, 2)])
def test_several_proxies(n, proxies, per_peer):
    for wrong in ranks.run(n, exchange_with_all, proxies, per_peer):
        assert len(wrong) == (n - 1) * per_peer and not any(wrong), wrong


def overfill(comm):
    """A FIFO of two triggers, where a turn pushes four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyep.channels.mscclpp.fifo_size" if on_gpu() else "pyep.channels.host_ports.FIFO_SIZE",
                      (lambda num_peers: 2) if on_gpu() else 2)
        with open_channels(comm, 1) as channels:
            peer = 1 - comm.rank
            return wrong_words(channels, "port", peer, channels.ports[peer], 4096, turns=100, how=1)


def test_a_small_fifo():
    assert ranks.run(2, overfill) == [0, 0]


def give_up(comm):
    """Each waits for two signals, and gets one: what the error says."""
    with pytest.raises(EPTimeoutError) as caught, open_channels(comm, 1, timeout_s=2) as channels:
        peer = 1 - comm.rank
        channels.meet()
        wrong_words(channels, "in vain", peer, channels.ports[peer], 16)
    return str(caught.value)


def test_what_an_error_says_of_the_proxy():
    for rank, text in enumerate(ranks.run(2, give_up)):
        peer, pushed = 1 - rank, 256 if on_gpu() else 1          # by each thread
        assert text.startswith(f"rank {rank} waited 2 s for rank {peer}: a signal; expected ") and text.endswith(
            f"Rank {peer} is reached through a port: proxy 0: FIFO head {pushed}, tail {pushed}, last trigger signal on channel 0; "
            "the proxy runs"), text


KEPT = []


def end_in_every_way(comm):
    peer = 1 - comm.rank

    def use(channels):
        assert wrong_words(channels, "port", peer, channels.ports[peer], 1008) == 0
    with open_channels(comm, 1) as channels:
        use(channels)
    with pytest.raises(KeyError), open_channels(comm, 1) as channels:
        use(channels)
        raise KeyError("on all ranks")
    channels = open_channels(comm, 1)
    use(channels)
    comm.barrier()
    channels = None                                              # forgotten
    gc.collect()
    comm.barrier()
    KEPT.append(open_channels(comm, 1))                          # alive when the interpreter ends
    use(KEPT[0])


def test_ends():
    """After `close`, after an exception, of channels that nobody closes, and at exit: no process aborts."""
    done = ranks.launch(2, end_in_every_way)
    assert done.results == [None, None] and done.returncode == 0 and "terminate" not in done.stderr, done
