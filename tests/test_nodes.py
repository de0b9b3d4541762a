"""Which ranks form a node, what a `Buffer` says of it, and what is refused between nodes."""
import numpy as np
import pytest
import ranks
from engine import make_buffer, make_high_throughput_buffer, on_gpu
from mpi4py import MPI

import pyep
from pyep import EPTransportError
from pyep.channels.nodes import Nodes, find_nodes
from pyep.channels.transport import channels_per_peer, proxy_of
from pyep.own_kernels import Channels

cpu_only = pytest.mark.skipif(on_gpu(), reason="about the ports of the CPU engine")


class Told:
    """A bootstrap of ranks on these hosts, which all have this environment; as rank 0 sees it."""

    def __init__(self, *hosts, sizes=None):
        self.hosts, self.sizes, self.rank = hosts, sizes, 0

    def allgather(self, value, timeout_s, what):
        return [(host, self.sizes[r] if self.sizes else value[1]) for r, host in enumerate(self.hosts)]


def found(monkeypatch, per_node, *hosts, **options):
    monkeypatch.setenv("PYEP_RANKS_PER_NODE", per_node)
    return find_nodes(Told(*hosts, **options), 1).of


def test_hosts_are_nodes(monkeypatch):
    assert found(monkeypatch, "", "b", "b", "a", "b", "a", "c") == (0, 0, 1, 0, 1, 2)
    monkeypatch.delenv("PYEP_RANKS_PER_NODE")
    assert find_nodes(Told("x"), 1).of == (0,)


@pytest.mark.parametrize("per_node, want", [
    ("1", (0, 1, 2, 3, 4)), ("2", (0, 0, 1, 1, 2)), ("3", (0, 0, 0, 1, 1)), ("9", (0,) * 5)])
def test_nodes_of_a_number_of_ranks(monkeypatch, per_node, want):
    assert found(monkeypatch, per_node, *"hhhhh") == want


def test_nodes_do_not_span_hosts(monkeypatch):
    assert found(monkeypatch, "1", *"aabb") == (0, 1, 2, 3)
    assert found(monkeypatch, "2", *"aabb") == (0, 0, 1, 1)
    with pytest.raises(EPTransportError, match=r"=3 makes a node of ranks \[0, 1, 2\], which run on several hosts"):
        found(monkeypatch, "3", *"aabb")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", " "])
def test_numbers_that_are_none(monkeypatch, text):
    with pytest.raises(ValueError, match="PYEP_RANKS_PER_NODE is .*; expected a positive number of ranks"):
        found(monkeypatch, text, "h")
    monkeypatch.setenv("PYEP_NUM_PROXIES", text)
    with pytest.raises(ValueError, match="PYEP_NUM_PROXIES is .*; expected a positive number of proxies"):
        channels_per_peer(1)


def test_ranks_with_different_numbers(monkeypatch):
    with pytest.raises(ValueError, match=r"PYEP_RANKS_PER_NODE differs between ranks: \[1, 2, None\], by rank"):
        found(monkeypatch, "1", *"hhh", sizes=(1, 2, None))


def test_what_nodes_tell():
    some = Nodes((0, 0, 1, 0, 1, 2), 4)
    assert (some.count, some.mine, some.ranks, some.local_rank) == (3, 1, [2, 4], 1)
    assert [some.holds(r) for r in range(6)] == [False, False, True, False, True, False]


@pytest.mark.parametrize("proxies", [1, 2, 3, 8])
def test_channels_are_dealt_to_proxies(monkeypatch, proxies):
    monkeypatch.setenv("PYEP_NUM_PROXIES", str(proxies))
    assert [channels_per_peer(n) for n in (1, 2, 24)] == [1, min(2, proxies), min(24, proxies)]
    dealt = np.array([[[proxy_of(a, b, c) for c in range(proxies)] for b in range(9)] for a in range(9)])
    assert (dealt == dealt.swapaxes(0, 1)).all()                                 # both ranks agree
    assert (np.sort(dealt, axis=2) == np.arange(proxies)).all()                  # a pair's channels have different proxies
    counts = np.bincount(dealt[0, 1:, 0], minlength=proxies)
    assert counts.max() - counts.min() <= 1                                      # peers are dealt evenly


# ---- what a Buffer says ----------------------------------------------------------------------------------------------

def ask(comm, per_node):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_RANKS_PER_NODE", per_node)
        with make_buffer(comm, 8, 64, 4 * comm.size, 3) as buf:
            answer = buf.get_num_rdma_ranks(), buf.get_rdma_rank(), buf.is_internode_available(), buf.is_available()
        assert not buf.is_internode_available() and buf.get_rdma_rank() == answer[1]
    return answer


@cpu_only
def test_what_a_buffer_says():
    assert ranks.run(3, ask, "1") == [(3, r, True, True) for r in range(3)]
    assert ranks.run(3, ask, "2") == [(2, r // 2, True, True) for r in range(3)]
    assert ranks.run(3, ask, "3") == [(1, 0, False, True)] * 3


# ---- what is refused -------------------------------------------------------------------------------------------------

def try_high_throughput(comm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_RANKS_PER_NODE", "1")
        with make_high_throughput_buffer(comm, 1 << 20) as buf:
            for name, args in (("get_dispatch_layout", (None, 8)), ("dispatch", (None,)), ("combine", (None, None))):
                with pytest.raises(NotImplementedError, match=rf"{name} between nodes is not .*nodes are \[0, 1\]"):
                    getattr(buf, name)(*args)
            assert buf.is_available()


@cpu_only
def test_high_throughput_is_refused():
    ranks.run(2, try_high_throughput)


def refused(comm, nbytes=1 << 12, **changed):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(EPTransportError) as caught:
        patch.setenv("PYEP_RANKS_PER_NODE", "1")
        for name, value in changed.items():
            patch.setattr(MPI, name, value)
        Channels(comm=comm, nbytes=nbytes)
    return str(caught.value)


def refuse_threads(comm):
    return refused(comm, Query_thread=lambda: MPI.THREAD_SERIALIZED)


@cpu_only
def test_mpi_without_threads():
    for text in ranks.run(2, refuse_threads):
        assert "thread level MULTIPLE, but MPI was initialized with SERIALIZED" in text and "mpi4py.rc.thread_level" in text


def refuse_settings(comm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_RANKS_PER_NODE", "1")
        with pytest.raises(ValueError, match=r"num_qps_per_rank differs between ranks: \[1, 2\], by rank"):
            patch.setenv("PYEP_NUM_PROXIES", "2")
            Channels(comm=comm, num_qps_per_rank=1 + comm.rank)
        with pytest.raises(ValueError, match=r"PYEP_NUM_PROXIES differs between ranks: \[3, 4\], by rank"):
            patch.setenv("PYEP_NUM_PROXIES", str(3 + comm.rank))
            Channels(comm=comm)


@cpu_only
def test_ranks_with_different_settings():
    ranks.run(2, refuse_settings)


def refuse_size(comm):
    return refused(comm, nbytes=1 << 32)


@cpu_only
def test_more_memory_than_offsets():
    for text in ranks.run(2, refuse_size):
        assert "PortChannels reach 4294967296 (4 GiB)" in text and "num_rdma_bytes and num_nvl_bytes" in text


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", None])
def test_bad_numbers_of_channels(value):
    with pytest.raises(ValueError, match="num_qps_per_rank is .*; expected a number of channels, at least 1"):
        pyep.Buffer(comm=MPI.COMM_SELF, num_qps_per_rank=value)
