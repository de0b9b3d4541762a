"""Latency and bandwidth of both kinds of channels: how long bytes take there and back between two kernels, with no host between.

    PYEP_RANKS_PER_NODE=2 mpiexec -n 3 python -m mpi4py examples/ping_pong.py

Rank 0 plays with rank 1, of its own node, through a MemoryChannel: a block of threads stores into memory that both map.  Then with
rank 2, of another node, through a PortChannel: a thread asks a proxy to move the bytes.  Two ranks play through one kind only, with
PYEP_RANKS_PER_NODE=1 the port.  On GPUs, ports need transport "mscclpp".  PASS if what was received is what was sent.
"""

import importlib

import numpy as np
from mpi4py import MPI

from pyep.channels.memory_channel import put, signal
from pyep.channels.memory_channel import wait as memory_wait
from pyep.channels.port import put_with_signal
from pyep.channels.port import wait as port_wait
from pyep.kernels.lang import clock_ns, num_threads, st8, syncthreads, syncthreads_or, thread_rank
from pyep.own_kernels import Channels

SIZES = [16 << 2 * i for i in range(9)]  # 16 bytes to 1 MiB
SENT, RECEIVED, RESULT = 0, SIZES[-1], 2 * SIZES[-1]  # where things are in the channels' memory, in bytes
END = RESULT + 8
ROOM, TURN = 1, 2  # what kernels wait for
WAITS = {ROOM: "room for a trigger", TURN: "the signal that it is our turn"}
PORT = 0  # 1: through a PortChannel; a template parameter, compiled in


def send(watch, peer, channel, dst, src, nbytes):
    """A block puts bytes into the peer's memory, then signals."""
    if PORT:
        if thread_rank() == 0:
            put_with_signal(watch, ROOM, peer, channel, dst, src, nbytes)
    else:
        put(channel, dst, src, nbytes, thread_rank(), num_threads())
        syncthreads()
        if thread_rank() == 0:
            signal(channel)


def receive(watch, peer, channel):
    """A block waits for the peer's signal, and with it for its bytes: 1, or 0 if it never came."""
    come = 1
    if thread_rank() == 0:
        come = port_wait(watch, TURN, peer, channel) if PORT else memory_wait(watch, TURN, peer, channel)
    return 1 - syncthreads_or(1 - come)


def play(base, timeout, peer, channel, begins, dst, src, nbytes, rounds, result):
    """One block plays so many rounds, there and back, and stores how many nanoseconds they took at the offset `result`.

    base, timeout: from `Channels.launch`.  begins: 1 on the rank that sends first.  dst, src, nbytes: of each put.
    """
    watch, start, played = (base, timeout, 0), clock_ns(), 0
    while played < rounds:
        if begins:
            send(watch, peer, channel, dst, src, nbytes)
        if receive(watch, peer, channel) == 0:
            return  # the host raises what the wait has left for it
        if not begins:
            send(watch, peer, channel, dst, src, nbytes)
        played += 1
    if thread_rank() == 0:
        st8(base + result, clock_ns() - start)


def bytes_of(rank):
    """What a rank sends."""
    return np.random.default_rng(rank).integers(0, 256, SIZES[-1], np.uint8)


def measure(channels, kernel, peer, channel, nbytes):
    """Both ranks play: microseconds one way, and whether what the peer has sent is here."""
    src, dst, result = (channels.offset + offset for offset in (SENT, RECEIVED, RESULT))
    channels.check_put(dst, src, nbytes)
    for rounds in 3, max(10, min(300, (1 << 24) // nbytes)):  # the first time to warm up
        channels.launch(kernel, peer, channel, int(channels.rank == 0), dst, src, nbytes, rounds, result)
        channels.synchronize()
    nanoseconds = int(channels.array((1,), np.int64, RESULT)[0])
    right = channels.array((nbytes,), np.uint8, RECEIVED).tolist() == bytes_of(peer)[:nbytes].tolist()
    return nanoseconds / rounds / 2e3, right


comm = MPI.COMM_WORLD
if comm.size == 1:
    raise SystemExit("ping_pong.py needs two ranks or more: see its docstring")
columns, right = {}, []
with Channels(comm=comm, nbytes=END, waits=WAITS) as channels:
    xp = importlib.import_module("cupy" if channels.engine == "cuda" else "numpy")  # arrays of the engine that pyep chose
    channels.array((SIZES[-1],), np.uint8, SENT)[:] = xp.asarray(bytes_of(comm.rank))
    here = channels.nodes.of[0]  # rank 0's node
    partners = {"memory": [r for r in range(1, comm.size) if channels.nodes.of[r] == here],
                "port": [r for r in range(1, comm.size) if channels.nodes.of[r] != here]}
    for kind, (partner, *_) in ((kind, found) for kind, found in partners.items() if found):
        channels.meet()
        if comm.rank in (0, partner):
            peer = partner - comm.rank
            channel = (channels.ports if kind == "port" else channels.channels)[peer]
            kernel = channels.kernel(play, threads=1024, PORT=int(kind == "port"))
            measured = [measure(channels, kernel, peer, channel, nbytes) for nbytes in SIZES]
            columns[kind] = [us for us, _ in measured]
            right += [ok for _, ok in measured]

passed = all(sum(comm.allgather(right), []))
if comm.rank == 0:
    print("one way, us and GB/s" + "".join(f"{kind:>22}" for kind in columns))
    for nbytes, *times in zip(SIZES, *columns.values()):
        print(f"{nbytes:>20,}" + "".join(f"{us:12.2f}{nbytes / us / 1e3:10.3f}" for us in times))
    print(f"{'PASS' if passed else 'FAIL'}: {' and '.join(columns)}, transport {channels.transport}")
raise SystemExit(not passed)
