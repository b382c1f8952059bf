"""One policy on all processes of a run: rank 0 decides, and what is more than rounding stops the run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curriq import parallel
from curriq.types import Step

ROUNDING = 0.01
"""Greatest relative distance from rank 0's numbers that rounding explains after one step: Adam moves a weight
by the learning rate along the sign of its gradient, which rounding may turn where that is nearly 0."""


def share_policy(shared: Sequence[Tensor], step: Step) -> None:
    """Let every rank go on with rank 0's φ, after a step.

    Ranks compute φ from equal numbers, so on equal devices it is equal already, to the bit. On unequal ones
    the last bits differ, and would grow into another policy on each rank.

    Args:
        shared: φ; changed in place.
        step: the step that has ended.

    Raises:
        RanksDiffer: on all ranks, where φ, β, the weights or the gradient differ by more than rounding.
    """
    if parallel.world_size() == 1:
        return
    beta = torch.tensor([step.metrics.get("policy/beta", 0.0)], dtype=torch.float64)
    norm = torch.tensor([step.metrics["train/grad_norm"]], dtype=torch.float64)
    weights = step.weights.clone()
    gaps = parallel.adopt_({"Q": shared, "β": [beta], "the weights": [weights], "the gradient": [norm]})
    for name, gap in gaps.items():
        if gap > ROUNDING:
            raise parallel.RanksDiffer(
                f"the ranks differ in {name} by {gap:.2g} of its size, where rounding explains {ROUNDING:g}"
            )


def require_same_weights(replicas: Sequence[Tensor]) -> None:
    """Raise RanksDiffer, on all ranks, where a tensor's norm differs from rank 0's by more than rounding.

    Every rank takes the same step on θ, so copies that were equal stay equal; it is read once per checkpoint.
    """
    if parallel.world_size() == 1 or not replicas:
        return
    norms = torch.stack([tensor.detach().double().norm() for tensor in replicas]).cpu()
    gap = max(parallel.adopt_({str(i): [norm] for i, norm in enumerate(norms.clone())}).values())
    if gap > ROUNDING:
        raise parallel.RanksDiffer(
            f"the ranks differ in the model's weights, one of them by {gap:.2g} of its size"
        )
