"""Collective operations over the processes of a run; every function is the identity in a single process.

Candidates are sharded over the ranks of `torch.distributed`; the running maximum and normaliser of the
mixture step, the gathered features and the reward are reduced here, so that one global policy results.
"""

import math
import os

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> None:
    """Join the process group that `torchrun` describes in the environment; nothing without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)
        dist.init_process_group()  # gloo for tensors on the CPU, nccl for those on a GPU


def cores() -> int:
    """CPU cores for each process on this machine."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def memory_bytes() -> float:
    """Main memory of this machine; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return math.inf


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def shard() -> slice:
    """The positions of a global batch that belong to this rank."""
    return slice(rank(), None, world_size())


def reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def reduce_max(value: float) -> float:
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank, so all ranks take the same branch."""
    return reduce_max(float(flag)) > 0


def gather_rows(local: Tensor, total: int) -> Tensor:
    """Put the rows of every rank's shard back into the order of the global batch of `total` rows."""
    if world_size() == 1:
        return local
    gathered = local.new_zeros((total, *local.shape[1:]))
    gathered[shard()] = local
    return reduce_sum_(gathered)


def barrier() -> None:
    """Wait until every rank has reached this point."""
    reduce_max(0.0)  # dist.barrier would need a GPU for each rank where the machine has any
