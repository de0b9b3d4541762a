"""`deep_ep.utils.envs`: how a DeepEP program that spawns its ranks makes them a process group."""
import os
import random

import torch
import torch.distributed as dist

from pyep.choices import choose_device


def init_dist(local_rank, num_local_ranks, seed=0):
    """Join the process group of all ranks: (rank, number of ranks, a group of all).

    local_rank, num_local_ranks: this process, and how many there are, on this node.  Environment: MASTER_ADDR and MASTER_PORT
    (default 127.0.0.1:8361); WORLD_SIZE, RANK: the number of nodes and this node's (default 1 and 0).
    seed: of torch's and Python's generators, plus the rank.

    From here on new tensors are bf16, and on GPUs they are made on this rank's.  The back end is NCCL where each rank has a GPU of
    its own; else gloo, and on GPUs ranks take them in turn.
    """
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "8361")
    nodes, node = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    backend = "gloo"
    if choose_device() == "cuda":
        gpus = torch.cuda.device_count()
        torch.cuda.set_device(local_rank % gpus)
        torch.set_default_device("cuda")
        backend = "nccl" if num_local_ranks <= gpus else "gloo"
    num_ranks, rank = nodes * num_local_ranks, node * num_local_ranks + local_rank
    dist.init_process_group(backend, init_method=f"tcp://{address}:{port}", world_size=num_ranks, rank=rank)
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(seed + rank)
    random.seed(seed + rank)
    return rank, num_ranks, dist.new_group(list(range(num_ranks)))
