"""Floating-point operations of one window, counted by torch, not estimated from the parameter count."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from curriq.lm.model import LanguageModel


def forward_flops(lm: LanguageModel, window: int) -> int:
    """Operations of one window's forward pass through trunk and head (a multiply-add counts as two).

    A backward pass costs twice as much. Attention is run through its plain-matmul form while counting,
    because fused CPU kernels are unknown to the counter.
    """
    tokens = torch.zeros((1, window), dtype=torch.long, device=lm.device)
    counter = FlopCounterMode(display=False)
    with lm.measuring(), sdpa_kernel(SDPBackend.MATH), counter:
        lm.head(lm.trunk(tokens))
    return counter.get_total_flops()
