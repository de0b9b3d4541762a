"""Process groups of torch.distributed in which Buffers are made: whatever other groups there are, also when they are gone.

Skipped where PyTorch is not installed.
"""
import os
import signal
import time

import pytest
import ranks
from test_faults import SLACK
from test_lifetimes import LONG, PATIENCE, held, small

import pyep
from pyep import EPTimeoutError
from pyep.channels import parting

pytest.importorskip("torch")


def begin(comm, folder, store="file"):
    """torch.distributed with its default group; store: where its ranks meet."""
    import torch.distributed as dist
    if store == "file":
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=comm.rank, world_size=comm.size)
    else:
        server = dist.TCPStore("127.0.0.1", 0, comm.size, True, wait_for_workers=False) if comm.rank == 0 else None
        port = comm.bcast(server.port if server else None)
        dist.init_process_group("gloo", store=server or dist.TCPStore("127.0.0.1", port, comm.size, False),
                                rank=comm.rank, world_size=comm.size)
    return dist


def on(group, **options):
    """A Buffer of a process group, for which nothing is compiled."""
    return pyep.Buffer(group, **dict(num_nvl_bytes=2**12, timeout_s=LONG) | options)


def keys(dist, group):
    """How many keys the group's store has."""
    return dist.distributed_c10d._world.pg_map[group][1].num_keys()


def make_in_groups(comm, folder, store):
    dist = begin(comm, folder, store)
    world = dist.group.WORLD
    dist.new_group([0])                                          # ranks belong to different numbers of groups
    pair, alone = dist.new_group([0, 2]), [dist.new_group([r]) for r in range(3)][comm.rank]
    on(world).destroy()
    before, many = held(), []
    for _ in range(3):
        bufs = [on(world)] + ([on(pair)] if comm.rank != 1 else []) + [on(alone)]
        assert [b.group_size for b in bufs] == ([3, 2, 1] if comm.rank != 1 else [3, 1])
        assert comm.rank == 1 or bufs[1].rank == comm.rank // 2
        for buf in bufs if comm.rank else bufs[::-1]:            # in another order
            buf.destroy()
        del buf, bufs
        for _ in range(2):                                       # all have said that they leave, then all have seen it
            comm.barrier()
            parting.tidy()
        comm.barrier()
        many.append(keys(dist, world) if store == "tcp" else 0)
        comm.barrier()
    assert held() == before
    assert many[2] <= many[0], many                              # not more and more
    if comm.rank == 1:
        with pytest.raises(ValueError, match="group is GroupMember.NON_GROUP_MEMBER.*; expected"):
            on(pair)
    kept = on(world)
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="group is .* which was destroyed.*; expected"):
        on(world)
    kept.destroy()
    assert held()[0] == before[0]
    return "done"


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_groups(store, tmp_path):
    """Of all, of some, of one rank; destroyed in any order, and after the group."""
    done = ranks.launch(3, make_in_groups, tmp_path, store)
    assert done.results == ["done"] * 3, done


def never_come(comm, folder):
    dist = begin(comm, folder)
    if comm.rank != 1:
        start = time.monotonic()
        with pytest.raises(EPTimeoutError, match=rf"rank {comm.rank} waited 2 s for ranks \[1\], which have not come|has failed"):
            on(dist.group.WORLD, timeout_s=2)
        assert time.monotonic() - start < 2 + SLACK
    comm.barrier()
    if comm.rank == 1:
        with pytest.raises(EPTimeoutError, match="rank . has failed: EPTimeoutError"):         # it need not wait for them
            on(dist.group.WORLD)
    comm.barrier()
    on(dist.group.WORLD).destroy()
    return "done"


def test_a_rank_never_comes(tmp_path):
    """The error names it; the next time all find together."""
    done = ranks.launch(3, never_come, tmp_path)
    assert done.results == ["done"] * 3, done


def lose_the_store(comm, folder):
    begin(comm, folder, "tcp")
    import torch.distributed as dist
    pids, buf, more = comm.allgather(os.getpid()), on(dist.group.WORLD), on(dist.group.WORLD)
    comm.barrier()
    if comm.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    with pytest.raises(EPTimeoutError, match="does not answer"):
        on(dist.group.WORLD, timeout_s=1)
    buf.destroy()
    os.kill(pids[0], signal.SIGKILL)
    more.destroy()
    return len(held()[0])


def test_the_rank_with_the_store_stops_and_dies(tmp_path):
    done = ranks.launch(2, lose_the_store, tmp_path)
    assert done.results[1] == 0, done


def mistake_one_for_the_other(comm, folder):
    dist = begin(comm, folder)
    with pytest.raises(TypeError, match="comm is .*; expected an mpi4py communicator; pass .* as group="):
        small(dist.group.WORLD)
    with pytest.raises(TypeError, match="group is .*; expected .*; pass an mpi4py communicator as comm="):
        on(comm)
    with pytest.raises(TypeError, match="group is .*; expected .*; of a DeviceMesh pass get_group"):
        on(dist.init_device_mesh("cpu", (1,)))
    return "done"


def test_wrong_kinds(tmp_path):
    done = ranks.launch(1, mistake_one_for_the_other, tmp_path, timeout=PATIENCE)
    assert done.results == ["done"], done
