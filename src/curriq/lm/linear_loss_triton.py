"""The passes of `lm.linear_loss` over a buffer of logits, as one GPU kernel each; needs triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from curriq.lm.linear_loss import RowKernels
from curriq.types import IGNORED

BLOCK = 4096
WARPS = 8


@triton.jit
def _losses_kernel(
    logits, targets, losses, normalisers, stride, entries, ignored: tl.constexpr, block: tl.constexpr
):
    """One program per row: an online softmax, each lane over its own columns, joined at the end."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, block)
    first = tl.load(logits + columns, mask=columns < entries, other=float("-inf")).to(tl.float32)
    peak, total = first, tl.where(columns < entries, 1.0, 0.0)
    for start in range(block, entries, block):
        at = start + columns
        x = tl.load(logits + at, mask=at < entries, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, x)
        # A lane without any logit yet has −∞ − (−∞) here; it counts for nothing. A NaN must reach the loss.
        total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(peak - higher) + tl.exp(x - higher))
        peak = higher
    highest = tl.max(peak, 0)
    normaliser = highest + tl.log(tl.sum(tl.where(total != 0.0, total * tl.exp(peak - highest), 0.0), 0))
    target = tl.load(targets + row)
    at_target = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    tl.store(normalisers + row, normaliser)
    tl.store(losses + row, tl.where(target == ignored, 0.0, normaliser - at_target))


@triton.jit
def _gradient_kernel(
    logits, normalisers, targets, weights, stride, entries, width, ignored: tl.constexpr, block: tl.constexpr
):
    """One program per row: weight · (softmax − one-hot) in place, 0 in the padded columns."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    normaliser = tl.load(normalisers + row)
    target = tl.load(targets + row)
    weight = tl.where(target == ignored, 0.0, tl.load(weights + row))
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        x = tl.load(logits + columns, mask=columns < entries, other=float("-inf")).to(tl.float32)
        gradient = weight * (tl.exp(x - normaliser) - tl.where(columns == target, 1.0, 0.0))
        gradient = tl.where(columns < entries, gradient, 0.0)
        tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < width)


def _losses(logits: Tensor, targets: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    targets = targets.contiguous()
    losses = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    normalisers = torch.empty_like(losses)
    arguments = logits, targets, losses, normalisers, logits.stride(0), entries
    _losses_kernel[(len(logits),)](*arguments, ignored=IGNORED, block=BLOCK, num_warps=WARPS)
    return losses, normalisers


def _gradient_(logits: Tensor, normalisers: Tensor, targets: Tensor, weights: Tensor, entries: int) -> None:
    arguments = logits, normalisers, targets.contiguous(), weights, logits.stride(0), entries, logits.shape[1]
    _gradient_kernel[(len(logits),)](*arguments, ignored=IGNORED, block=BLOCK, num_warps=WARPS)


TRITON = RowKernels(_losses, _gradient_)
