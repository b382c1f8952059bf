"""Collective operations over the processes of a run; every function is the identity in a single process.

Candidates are sharded over the ranks of `torch.distributed`; the maximum and normaliser of the mixture step,
the gathered features and the reward are reduced here, so that one global policy results. Every rank holds the
whole policy; where ranks may round differently, rank 0 decides.
"""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


class RanksDiffer(Exception):
    """The processes of a run hold different numbers where all must hold the same; raised on all of them."""


def start() -> None:
    """Join the process group that `torchrun` describes in the environment; nothing without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)
        dist.init_process_group()  # gloo for tensors on the CPU, nccl for those on a GPU


def cores() -> int:
    """CPU cores for each process on this machine."""
    return max(1, (os.cpu_count() or 1) // processes_here())


def processes_here() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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


def from_rank_zero(value: Value) -> Value:
    """Rank 0's value; any object that can be pickled."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: Value) -> list[Value]:
    """Every rank's value in the order of the ranks, on all of them; any object that can be pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_rank_zero(value: Value) -> list[Value]:
    """Every rank's value in the order of the ranks, on rank 0; on the others their own alone."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return [value] if values is None else values


def adopt_(groups: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Put rank 0's numbers into the tensors of all ranks, in one message.

    Returns:
        For each group, the greatest distance of any rank's numbers from rank 0's before, relative to the norm
        of rank 0's; the same on all ranks.
    """
    if world_size() == 1:
        return dict.fromkeys(groups, 0.0)
    tensors = [tensor.detach() for group in groups.values() for tensor in group]
    own = torch.cat([torch.zeros(0, dtype=torch.float64), *(t.flatten().double().cpu() for t in tensors)])
    adopted = own.clone()
    dist.broadcast(adopted, src=0)
    for tensor, part in zip(tensors, adopted.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
    sizes = [sum(tensor.numel() for tensor in group) for group in groups.values()]
    pairs = zip((own - adopted).split(sizes), adopted.split(sizes), strict=True)
    gaps = torch.stack([apart.norm() / whole.norm().clamp(min=1e-30) for apart, whole in pairs])
    gaps.nan_to_num_(nan=math.inf)
    dist.all_reduce(gaps, op=dist.ReduceOp.MAX)
    return dict(zip(groups, gaps.tolist(), strict=True))


def all_equal(content: bytes) -> bool:
    """Whether all ranks hold the same bytes."""
    if world_size() == 1:
        return True
    digest = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
    ends = torch.tensor([digest, -digest])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])


def require_same_rows(ids: Tensor, what: str) -> None:
    """Raise RanksDiffer, on all ranks, unless all of them hold the same ids in the same order."""
    ids = ids.cpu().contiguous()
    if all_equal(ids.numpy().tobytes()):
        return
    everywhere = gather_objects(ids.tolist())
    apart = next(r for r, rows in enumerate(everywhere) if rows != everywhere[0])
    only = sorted(set(everywhere[apart]) - set(everywhere[0]))
    rows = f"{', '.join(map(str, only[:4]))} only on rank {apart}" if only else "another order or number"
    raise RanksDiffer(f"ranks 0 and {apart} have different {what} ({rows})")


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
