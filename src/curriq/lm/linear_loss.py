"""Next-token losses straight from hidden states: the vocabulary head and its cross-entropy as one operation.

The plain way keeps logits in the compute dtype, their float32 copy, log-probabilities and their gradient.
Here there is one buffer of logits, in the dtype of the passes: the loss of each position is read off it once,
and the backward pass overwrites it with its own gradient. The buffer's columns, and the rows of the weights
that make them, are padded to a multiple of `PAD`, because matrix products with an odd leading dimension
(GPT-2 has 50,257 tokens) run at a fraction of a GPU's rate. Padded columns have no part in the loss, and a
gradient of 0.

The two passes over a buffer are a pair of functions: `TORCH`, in terms of torch's own operations, and
`TRITON` (`lm.linear_loss_triton`), one GPU kernel each. They compute in float32, or in float64 for a float64
model.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from curriq.types import IGNORED

PAD = 128
"""Vocabulary entries are padded to a multiple of this: 256 bytes in bfloat16, the widest tile."""


class RowKernels(NamedTuple):
    """The two passes over a buffer of logits [m, V'], of which the first V columns count.

    Attributes:
        losses: (logits, targets, V) → the loss of each row, 0 where the target is `IGNORED`, and the
            logarithm of its normaliser.
        gradient_: (logits, normalisers, targets, weights, V): overwrite the logits with the gradient of
            Σ weight · loss.
    """

    losses: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    gradient_: Callable[[Tensor, Tensor, Tensor, Tensor, int], None]


def padded_copy(weight: Float[Tensor, "V d"], dtype: torch.dtype) -> Float[Tensor, "V2 d"]:
    """The head's weights in the dtype of the passes, with rows of zeros up to a multiple of `PAD`."""
    entries, width = weight.shape
    copy = weight.new_zeros((-(-entries // PAD) * PAD, width), dtype=dtype)
    copy[:entries] = weight.detach()
    return copy


def linear_cross_entropy(
    hidden: Float[Tensor, "m d"],
    weight: Float[Tensor, "V d"],
    compute_weight: Float[Tensor, "V2 d"],
    targets: Int[Tensor, "m"],
    kernels: RowKernels,
) -> Float[Tensor, "m"]:
    """−log softmax(hidden · weightᵀ) at each target, nats; 0 where the target is `IGNORED`.

    Args:
        weight: gets the gradient.
        compute_weight: `padded_copy` of it, of whose dtype the logits are.
    """
    return _LinearCrossEntropy.apply(hidden, weight, compute_weight, targets, kernels)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, compute_weight: Tensor, targets: Tensor, kernels: RowKernels
    ) -> Tensor:
        inputs = hidden.to(compute_weight.dtype)
        logits = inputs @ compute_weight.T
        losses, normalisers = kernels.losses(logits, targets, len(weight))
        ctx.save_for_backward(inputs, weight, compute_weight, targets, logits, normalisers)
        ctx.kernels, ctx.dtype = kernels, hidden.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        inputs, weight, compute_weight, targets, logits, normalisers = ctx.saved_tensors
        ctx.kernels.gradient_(logits, normalisers, targets, weights.contiguous(), len(weight))
        # A second backward pass would take the gradient for logits; torch refuses it by this count.
        torch.autograd.graph.increment_version(logits)
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        of_hidden = (logits @ compute_weight).to(ctx.dtype) if wants_hidden else None
        of_weight = _product(logits.T, inputs, weight.dtype)[: len(weight)] if wants_weight else None
        return of_hidden, of_weight, None, None, None


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, added up in it where the device can."""
    if left.is_cuda and left.dtype != dtype and _widens(left.device, left.dtype, dtype):
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


@cache
def _widens(device: torch.device, inputs: torch.dtype, outputs: torch.dtype) -> bool:
    """Whether the device's products of one dtype can be given in another."""
    one = torch.ones(16, 16, device=device, dtype=inputs)
    try:
        torch.mm(one.T, one, out_dtype=outputs)
    except (RuntimeError, TypeError):  # of this device; of this version of torch
        return False
    return True


# In terms of torch's operations -----------------------------------------------------------------------


def _torch_losses(logits: Tensor, targets: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    exact = logits[:, :entries].to(torch.promote_types(logits.dtype, torch.float32))
    normalisers = torch.logsumexp(exact, 1)
    at_target = exact.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(targets == IGNORED, 0.0, normalisers - at_target), normalisers


def _torch_gradient_(
    logits: Tensor, normalisers: Tensor, targets: Tensor, weights: Tensor, entries: int
) -> None:
    weights = torch.where(targets == IGNORED, 0.0, weights)[:, None]
    gradient = torch.exp(logits[:, :entries].to(normalisers.dtype) - normalisers[:, None]) * weights
    gradient.scatter_add_(1, targets.clamp(min=0)[:, None], -weights)
    logits[:, :entries] = gradient
    logits[:, entries:] = 0


TORCH = RowKernels(_torch_losses, _torch_gradient_)
