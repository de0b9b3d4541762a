"""Transport "mscclpp": what it needs, refuses and chooses; and on GPUs the low-latency operations over its channels."""
import importlib.util
import logging
import struct
import sys
from types import SimpleNamespace

import pytest
import ranks
from engine import make_buffer
from test_low_latency import name_of, pairs, rounds

from pyep import EPTransportError
from pyep.channels import handles, infiniband, mscclpp_package, reach
from pyep.channels.nodes import Nodes
from pyep.channels.boards import open_board
from pyep.channels.bootstrap import Bootstrap
from pyep.choices import choose_transport

SOURCE = "git+https://github.com/microsoft/mscclpp"


# ---- the package -----------------------------------------------------------------------------------------------------

@pytest.fixture
def package(monkeypatch, tmp_path):
    """A function that puts a package mscclpp of two files of these texts where it is imported from."""
    def make(init, cpp=""):
        folder = tmp_path / "mscclpp"
        folder.mkdir()
        (folder / "__init__.py").write_text(init)
        (folder / "_mscclpp.py").write_text(cpp)
        monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mscclpp"]:
        monkeypatch.delitem(sys.modules, name)
    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "mscclpp"]:
        del sys.modules[name]


def refusal(*words):
    """What `load` says of a package that it does not take; checks that all words are in it."""
    with pytest.raises(EPTransportError) as caught:
        mscclpp_package.load()
    for word in ("mscclpp", *words):
        assert word in str(caught.value), caught.value


def test_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mscclpp", None)
    refusal("not installed", SOURCE)


def test_it_lacks_a_package(package):
    package("import no_such_package_as_this")
    refusal("no_such_package_as_this", "not installed", "mscclpp[cuda13]")


def test_it_does_not_start(package):
    package("raise ImportError('libcudart.so.13: cannot open shared object file')")
    refusal("libcudart.so.13", "does not start", SOURCE)


HANDLES = """
class CppPortChannelDeviceHandle: raw = bytes({})
class CppMemoryChannelDeviceHandle: raw = bytes({})
"""


@pytest.mark.parametrize("port, memory, like", [(80, 48, "0.10"), (72, 48, "0.9"), (104, 48, ""), (96, 56, "")])
def test_handles_of_other_sizes(package, port, memory, like):
    package("__version__ = '1.2.3'", HANDLES.format(port, memory))
    refusal("1.2.3", f"{port} bytes", f"{memory}, where", "96 and 48", like, "5e038eac", SOURCE)


def test_no_handles_at_all(package):
    package("")
    refusal("of 0 bytes", SOURCE)


def test_a_package_that_fits(package):
    """And what it does to the program's logging is undone."""
    package("import logging\nlogging.basicConfig(level=logging.INFO, force=True)", HANDLES.format(96, 48))
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    assert mscclpp_package.handle_sizes(mscclpp_package.load()) == (96, 48)
    assert (root.level, root.handlers) == before


@pytest.mark.skipif(importlib.util.find_spec("mscclpp") is None, reason="needs MSCCL++")
def test_the_real_package():
    """Its empty handles can be made without a GPU; those fields that Python can set lie where `handles` says."""
    package = mscclpp_package.load()
    handle = package.cpp.CppPortChannelDeviceHandle()
    handle.semaphore_id_, handle.dst_, handle.src_, handle.fifo_.size = 3, 5, 7, 512
    expected = bytearray(handles.PORT_BYTES)
    for offset, value in ((handles.SEMAPHORE, 3), (handles.MEMORIES, 5), (handles.MEMORIES + 4, 7), (handles.SIZE, 512)):
        struct.pack_into("I", expected, offset, value)
    assert handle.raw == expected


def port_handle(size=64, dst=5, src=7):
    """The bytes of a PortChannel's handle; all addresses are wrong."""
    fifo = SimpleNamespace(triggers=1, head=2, tail=3, tail_cache=4, size=size)
    return struct.pack("12q", *handles.port_handle(3, 8, 9, fifo, 10, dst, src))


def test_a_handle_that_fits():
    mscclpp_package.require_port_handle(port_handle(), 64, 5, 7)


@pytest.mark.parametrize("what, wrong", {
    "FIFO size": dict(size=128), "destination memory": dict(dst=6), "source memory": dict(src=8)}.items())
def test_a_handle_of_an_unknown_layout(what, wrong):
    with pytest.raises(EPTransportError, match=f"{what}.* instead of"):
        mscclpp_package.require_port_handle(port_handle(**wrong), 64, 5, 7)


@pytest.mark.parametrize("what, offset", [("FIFO mask", handles.MASK), ("FIFO shift", handles.SHIFT)])
def test_a_handle_whose_words_are_shifted(what, offset):
    raw = bytearray(port_handle())
    raw[offset] ^= 1
    with pytest.raises(EPTransportError, match=f"byte {offset} .*{what}"):
        mscclpp_package.require_port_handle(bytes(raw), 64, 5, 7)


# ---- what connects whom ----------------------------------------------------------------------------------------------

def test_auto_on_gpus(monkeypatch):
    pytest.importorskip("cuda.bindings")
    monkeypatch.delenv("PYEP_TRANSPORT", raising=False)
    assert [choose_transport("auto", "cuda", nodes).name for nodes in (1, 2)] == ["ipc", "mscclpp"]
    assert choose_transport("mscclpp", "cuda", 1).name == "mscclpp"
    assert choose_transport("auto", "cpu", 2).name == "host"
    monkeypatch.setenv("PYEP_TRANSPORT", "mscclpp")
    assert choose_transport("auto", "cuda", 1).name == "mscclpp"
    with pytest.raises(EPTransportError, match='PYEP_TRANSPORT is \'mscclpp\'.* cpu engine: that has "host"'):
        choose_transport("auto", "cpu", 2)


KINDS = {       # hosts, nodes, PYEP_PORT_TRANSPORT: how rank 1 reaches each rank
    "one node": ("aaa", (0, 0, 0), "auto", "mapped self mapped"),
    "two hosts": ("aab", (0, 0, 1), "auto", "mapped self ib"),
    "three hosts": ("abc", (0, 1, 2), "auto", "ib self ib"),
    "two nodes on one host": ("aaaa", (0, 0, 1, 1), "auto", "mapped self ipc ipc"),
    "two nodes on one host, by ib": ("aaaa", (0, 0, 1, 1), "ib", "mapped self ib ib"),
    "nodes on two hosts": ("aaabbb", (0, 0, 1, 2, 3, 3), "auto", "mapped self ipc ib ib ib"),
    "ipc on one host": ("aaa", (0, 1, 2), "ipc", "ipc self ipc"),
}


@pytest.mark.parametrize("hosts, of, setting, expected", KINDS.values(), ids=KINDS)
def test_kinds(hosts, of, setting, expected):
    assert reach.kinds_of(hosts, Nodes(of, 1), setting) == expected.split()


def test_ipc_between_hosts():
    with pytest.raises(EPTransportError, match=r"PYEP_PORT_TRANSPORT=ipc.* ranks \[2, 3\] .*auto or ib"):
        reach.kinds_of("aabb", Nodes((0, 1, 2, 3), 0), "ipc")


def test_port_transport(monkeypatch):
    monkeypatch.delenv("PYEP_PORT_TRANSPORT", raising=False)
    assert reach.port_transport() == "auto"
    monkeypatch.setenv("PYEP_PORT_TRANSPORT", "smoke")
    with pytest.raises(ValueError, match="PYEP_PORT_TRANSPORT is 'smoke'; expected auto, ipc, ib"):
        reach.port_transport()


# ---- InfiniBand ------------------------------------------------------------------------------------------------------

@pytest.fixture
def adapters(monkeypatch, tmp_path):
    """A function that makes a host's adapters, each with one port."""
    def make(*names):
        for name in names:
            folder = tmp_path / name / "ports" / "1"
            folder.mkdir(parents=True)
            (folder / "state").write_text("4: ACTIVE\n")
            (folder / "rate").write_text("400 Gb/sec (4X NDR)\n")
    monkeypatch.setattr(infiniband, "SYSFS", tmp_path)
    monkeypatch.delenv("MSCCLPP_HCA_DEVICES", raising=False)
    return make


def test_no_adapter(adapters):
    assert infiniband.ports() == []
    with pytest.raises(EPTransportError, match="no adapter"):
        infiniband.choose(0)


def test_adapters_are_dealt_to_ranks(adapters, monkeypatch):
    adapters("mlx5_0", "mlx5_1", "mlx5_2")
    assert infiniband.ports()[1] == ("mlx5_1", 1, "ACTIVE", "unknown", "400 Gb/sec (4X NDR)")
    assert [infiniband.choose(rank) for rank in range(5)] == [0, 1, 2, 0, 1]
    monkeypatch.setenv("MSCCLPP_HCA_DEVICES", "mlx5_2, mlx5_0")
    assert infiniband.adapters() == ["mlx5_2", "mlx5_0"]
    assert [infiniband.choose(rank) for rank in range(5)] == [0, 1, 0, 1, 0]       # of the list
    monkeypatch.setenv("MSCCLPP_HCA_DEVICES", "mlx5_2,mlx5_7")
    with pytest.raises(EPTransportError, match="names mlx5_7, but this host has mlx5_0, mlx5_1, mlx5_2"):
        infiniband.choose(0)


def test_more_adapters_than_mscclpp_tells_apart(adapters):
    adapters(*(f"mlx5_{i:02}" for i in range(12)))
    assert [infiniband.choose(rank) for rank in (7, 8, 9)] == [7, 0, 1]


def test_settings_of_connections(monkeypatch):
    monkeypatch.delenv("PYEP_IB", raising=False)
    assert infiniband.settings() == {}
    monkeypatch.setenv("PYEP_IB", "port=2, gid_index=-1,max_cq_size=4096")
    assert infiniband.settings() == dict(port=2, gid_index=-1, max_cq_size=4096)


@pytest.mark.parametrize("text", ["speed=1", "port", "port=", "port=two", "port=1;max_cq_size=2"])
def test_wrong_settings_of_connections(monkeypatch, text):
    monkeypatch.setenv("PYEP_IB", text)
    with pytest.raises(ValueError, match="PYEP_IB is .*; expected name=number.*max_wr_per_send"):
        infiniband.settings()


# ---- limits, and errors of one rank ----------------------------------------------------------------------------------

def test_room_of_a_proxy():
    objects = pytest.importorskip("pyep.channels.mscclpp_objects")
    objects.require_room(512, 1024)
    for memories, semaphores in ((513, 512), (512, 1025)):
        with pytest.raises(EPTransportError, match="PYEP_NUM_PROXIES"):
            objects.require_room(memories, semaphores)


def test_fifo_sizes():
    fifo_size = pytest.importorskip("pyep.channels.mscclpp").fifo_size
    assert [fifo_size(peers) for peers in (0, 1, 32, 33, 511)] == [512, 512, 512, 1024, 8192]


def one_fails(comm):
    from pyep.channels.mscclpp import MscclppTransport

    def step(x):
        if comm.rank == 1:
            raise RuntimeError(17, "the dog ate it")                 # as MSCCL++ does: number and words
        return x
    transport = SimpleNamespace(_bootstrap=Bootstrap(open_board(None, comm), 10), _timeout_s=10)
    assert MscclppTransport._together(transport, "trying", lambda x: x + comm.rank, 40) == 40 + comm.rank
    with pytest.raises(EPTransportError) as caught:
        MscclppTransport._together(transport, "trying", step, 1)
    assert caught.value.__context__ is None                      # it would keep alive what was being made
    return str(caught.value)


def test_an_error_of_one_rank_is_told_by_all():
    pytest.importorskip("cuda.bindings")
    others = "trying failed on rank 1: RuntimeError: the dog ate it"
    assert ranks.run(3, one_fails) == [others, "trying failed: RuntimeError: the dog ate it", others]


# ---- low latency on GPUs ---------------------------------------------------------------------------------------------

def rounds_over(comm, per_node, pair):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYEP_RANKS_PER_NODE", str(per_node))
        (max_tokens, hidden, per_rank, topk, _), _ = pair
        with make_buffer(comm, max_tokens, hidden, per_rank * comm.size, min(topk, per_rank * comm.size),
                         transport="mscclpp", timeout_s=20) as buf:
            assert buf.transport == "mscclpp" and buf.get_num_rdma_ranks() == -(-comm.size // per_node)
            rounds(buf, pair)


CHANNELS = {"MemoryChannels": ((2, 2), (4, 4)), "PortChannels": ((2, 1), (4, 1)), "both": ((3, 2), (4, 2))}


@pytest.mark.gpu
@pytest.mark.parametrize("n, per_node, pair", [
    pytest.param(n, per_node, pair, id=f"{kind}-{n}-{pair[0][1]}-{name_of(pair[1])}")
    for kind, tried in CHANNELS.items() for n, per_node in tried for pair in pairs(n)])
def test_low_latency(n, per_node, pair):
    pytest.importorskip("mscclpp")
    ranks.run(n, rounds_over, per_node, pair)
