"""Engines: how the passes over θ run on the processes of a run, and where θ and its gradient lie.

An engine knows no policy. It runs a piece of work where the weights can be read, then the backward pass from
what the work has left, and gives the gradient summed over ranks. One process, replicated weights (torch's
DistributedDataParallel) and sharded weights (torch's `fully_shard`) then differ in nothing that the learner
or the probe sees: under `Sharded` the parameters, gradients and moments are DTensors, on which the same
arithmetic runs shard by shard.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from curriq import parallel
from curriq.config import require
from curriq.lm.compute import blocks_of
from curriq.lm.stored import Stored, read_stored

Result = TypeVar("Result")


class Round(NamedTuple):
    """One forward pass of a loop over windows.

    Attributes:
        rows: of this rank's windows.
        idle: whether this rank has no windows left, and runs the pass for the others' sake.
        last: whether it is the last.
        reduced: whether its backward pass sums the gradient over ranks.
    """

    rows: slice
    idle: bool
    last: bool
    reduced: bool


@runtime_checkable
class Engine(Protocol):
    """Passes over θ.

    Attributes:
        parameters: θ as the optimizer and the probe see it; the trainable ones.
        sharded: whether each rank holds a part of θ, so that all must take part when it is read, and each
            saves its own.
    """

    sharded: bool
    parameters: list[nn.Parameter]

    def rounds(self, n: int, size: int, *, gradient: bool = False) -> Iterator[Round]:
        """The passes over n windows of this rank, in pieces of `size`; `gradient` says that they run backward
        too. All ranks get as many as they must make together."""
        ...

    def inside(self, work: Callable[[], Result], round_: Round | None = None) -> Result:
        """What `work` returns, run where θ can be read. It may run backward passes through the head."""
        ...

    def backward(self, hidden: Tensor, gradient: Tensor, round_: Round) -> None:
        """Backward from what the work of this round left, onto the gradient of θ."""
        ...

    def gradients(self) -> list[Tensor]:
        """All gradients that there are now, as this rank's plain tensors; changes in place count."""
        ...

    def clip(self, most: float) -> Tensor:
        """Norm of the gradient, which is at most `most` afterwards; a scalar on its device."""
        ...


class OneProcess:
    """θ and its gradient as they are."""

    sharded = False

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        # Once: to walk through all modules takes longer than most of what is done with the list.
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def rounds(self, n: int, size: int, *, gradient: bool = False) -> Iterator[Round]:
        for start in range(0, n, size):
            yield Round(slice(start, start + size), idle=False, last=start + size >= n, reduced=False)

    def inside(self, work: Callable[[], Result], round_: Round | None = None) -> Result:
        return work()

    def backward(self, hidden: Tensor, gradient: Tensor, round_: Round) -> None:
        assert parallel.world_size() == 1 or round_.reduced, "several processes call LanguageModel.distribute"
        hidden.backward(gradient)

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def clip(self, most: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters, most)


class _Root(nn.Module):
    """The module that is called: runs any work on the network inside its own forward pass, where the wrappers
    of torch have made the weights readable and watch what comes out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class Replicated(OneProcess):
    """θ whole on every rank; the gradient is summed in buckets while the last backward pass runs.

    Args:
        head: parameters whose gradient the work itself leaves, so that the backward pass does not reach them.
    """

    def __init__(self, network: nn.Module, head: Sequence[nn.Parameter]) -> None:
        super().__init__(network)
        self._head = [parameter for parameter in head if parameter.requires_grad]
        # An expert that no token is routed to has no gradient; only then torch must look for such.
        unused = has_experts(network)
        self._root = DistributedDataParallel(
            _Root(network), find_unused_parameters=unused, forward_sync_buffers=False
        )
        self._root.register_comm_hook(None, _sum)

    def rounds(self, n: int, size: int, *, gradient: bool = False) -> Iterator[Round]:
        if not n and gradient:
            yield Round(slice(0, 0), idle=True, last=True, reduced=True)
        for round_ in super().rounds(n, size):
            yield round_._replace(reduced=gradient and round_.last)

    def inside(self, work: Callable[[], Result], round_: Round | None = None) -> Result:
        if round_ is None or not torch.is_grad_enabled():
            return work()
        if not round_.reduced:
            with self._root.no_sync():
                return self._root(work)
        return self._root(lambda: _reaching(work(), self._head))

    def backward(self, hidden: Tensor, gradient: Tensor, round_: Round) -> None:
        with nullcontext() if round_.reduced else self._root.no_sync():
            hidden.backward(gradient)


def _reaching(result: Any, head: Sequence[Tensor]) -> Any:
    """The result of some work, whose hidden states (its first entry) depend on the head in torch's eyes: the
    work itself has left the head's gradient, and a rank without windows has none."""
    hidden, *others = result
    return (_Reaching.apply(hidden, *head), *others)


class _Reaching(torch.autograd.Function):
    """The identity, with a gradient of 0 for other tensors, so that torch counts them as reached."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return hidden.clone()  # of a view torch warns

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(other.new_zeros(()).expand_as(other) for other in ctx.saved_tensors)


def _sum(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Gradients are summed: each rank's part is weighted already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class Sharded(OneProcess):
    """θ, its gradient and the optimizer's moments cut into shards, one per rank.

    A block's weights are gathered while it runs, forward and backward, and its gradient is reduced into
    shards after its backward pass. All ranks run the same number of passes.

    Args:
        head: the module whose gradient the work itself leaves.
        blocks: modules whose weights are gathered together.
        precision: dtype in which weights are gathered and passes run; gradients are reduced in float32.
        mesh: ranks; of two dimensions, the first holds copies and the second shards.
    """

    sharded = True

    def __init__(
        self,
        network: nn.Module,
        head: nn.Module,
        blocks: Sequence[nn.Module],
        precision: torch.dtype | None,
        mesh: DeviceMesh,
    ) -> None:
        self._head = head
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=precision and torch.float32)
        self._root: Any = _Root(network)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self._root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # each rank's part is weighted already
                module.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
        super().__init__(network)  # now: inside a pass the network's parameters are the gathered ones

    def rounds(self, n: int, size: int, *, gradient: bool = False) -> Iterator[Round]:
        count = int(parallel.reduce_max(math.ceil(n / size)))
        for i in range(count):
            rows = slice(i * size, (i + 1) * size)
            yield Round(rows, idle=rows.start >= n, last=i + 1 == count, reduced=gradient)

    def inside(self, work: Callable[[], Result], round_: Round | None = None) -> Result:
        if torch.is_grad_enabled():
            return self._root(lambda: _reaching(work(), list(self._head.parameters())))
        try:
            return self._root(work)
        finally:
            self._root.reshard()  # a backward pass would do it; the next pass must see the new weights

    def gradients(self) -> list[Tensor]:
        """Those of the shards, and inside a pass that of the gathered head."""
        parameters = {id(p): p for p in [*self.parameters, *self.network.parameters()]}
        return [local(p.grad) for p in parameters.values() if p.grad is not None]

    def clip(self, most: float) -> Tensor:
        gradients = self.gradients()
        norm = total_norm([p.grad for p in self.parameters if p.grad is not None])
        factor = min(1.0, most / (norm.item() + 1e-6))  # as torch clips
        if factor < 1:
            torch._foreach_mul_(gradients, factor)
        return norm.float()


def make_engine(
    name: str, network: nn.Module, head: nn.Module, precision: torch.dtype | None, device: torch.device
) -> Engine:
    """The engine of this name; in a single process always the one that shares nothing."""
    world = parallel.world_size()
    if world == 1:
        return OneProcess(network)
    if name in ("auto", "ddp"):
        return Replicated(network, list(head.parameters()))
    require(
        not has_experts(network),
        f"--engine {name}: an expert of this model may have a gradient on one rank and none on another, "
        "to which no token was routed; torch's fully_shard cannot add these up. Use --engine ddp.",
    )
    here = parallel.processes_here()
    shape = (
        {"copies": world // here, "shards": here} if name == "hsdp" and here < world else {"shards": world}
    )
    mesh = init_device_mesh(device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    return Sharded(network, head, blocks_of(network), precision, mesh)


def has_experts(network: nn.Module) -> bool:
    """Whether the model routes tokens to experts, so that a weight may have no gradient."""
    return any("expert" in name for name, _ in network.named_modules())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(values: Sequence[Tensor | Stored], others: Sequence[Tensor]) -> list[Tensor]:
    """Whole or stored tensors where others of their shapes lie: on their devices, and sharded as they are."""
    placed, unread = list[Tensor](), list[tuple[Stored, Tensor]]()
    for value, other in zip(values, others, strict=True):
        if isinstance(value, Stored):
            placed.append(torch.empty_like(other, requires_grad=False))
            unread.append((value, placed[-1]))
        elif isinstance(value, DTensor) or not isinstance(other, DTensor):
            placed.append(value.to(other.device))
        else:
            mesh = other.device_mesh
            # Every rank has loaded the whole, so nothing has to be sent.
            whole = value.to(mesh.device_type)
            placed.append(distribute_tensor(whole, mesh, other.placements, src_data_rank=None))
    if unread:
        read_stored(unread)
    return placed


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all entries, those on other ranks too; a float64 scalar on their device."""
    norm = torch.stack(torch._foreach_norm([local(tensor.detach()) for tensor in tensors])).double().norm()
    sharded = next((tensor for tensor in tensors if isinstance(tensor, DTensor)), None)
    if sharded is None:
        return norm
    mesh, placements = sharded.device_mesh, sharded.placements
    copies = math.prod(mesh.size(i) for i, p in enumerate(placements) if isinstance(p, Replicate))
    return (parallel.reduce_sum_(norm.square()) / copies).sqrt()
