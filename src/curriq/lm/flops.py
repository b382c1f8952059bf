"""Floating-point operations of one window, counted by torch, not estimated from the parameter count."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from curriq.lm.model import LanguageModel


def forward_flops(lm: LanguageModel, window: int) -> int:
    """Operations of one window's forward pass, half of a backward pass's; a multiply-add counts as two."""
    return _count(lm, window, lambda tokens: lm.head(lm.trunk(tokens)))


def trunk_flops(lm: LanguageModel, window: int) -> int:
    """The part of `forward_flops` up to the last hidden states, without the head."""
    return _count(lm, window, lm.trunk)


def _count(lm: LanguageModel, window: int, part: Callable[[Tensor], Tensor]) -> int:
    counter = FlopCounterMode(display=False)
    # Attention as plain matrix products: the counter does not know the fused CPU kernels.
    with lm.measuring(), sdpa_kernel(SDPBackend.MATH), counter:
        part(torch.zeros((1, window), dtype=torch.long, device=lm.device))
    return counter.get_total_flops()
