"""Floating-point operations of one window, counted by torch, not estimated from the parameter count."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from curriq.lm.model import LanguageModel


def forward_flops(lm: LanguageModel, window: int) -> int:
    """Operations of one window's forward pass through trunk and head (a multiply-add counts as two).

    A backward pass costs twice as much. Attention is run through its plain-matmul form while counting,
    because fused CPU kernels are unknown to the counter.
    """
    return _count(lm, window, lambda tokens: lm.head(lm.trunk(tokens)))


def trunk_flops(lm: LanguageModel, window: int) -> int:
    """The part of `forward_flops` up to the last hidden states, without the head."""
    return _count(lm, window, lm.trunk)


def _count(lm: LanguageModel, window: int, part: Callable[[Int[Tensor, "1 T"]], Tensor]) -> int:
    tokens = torch.zeros((1, window), dtype=torch.long, device=lm.device)
    counter = FlopCounterMode(display=False)
    with lm.measuring(), sdpa_kernel(SDPBackend.MATH), counter:
        part(tokens)
    return counter.get_total_flops()
