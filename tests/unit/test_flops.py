"""Counted operations against the formula of each architecture, by hand."""

import pytest
import torch
from tests.helpers import VOCAB, tiny_lm
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from curriq.lm.model import forward_flops, trunk_flops

D, LAYERS = 16, 2
T = 24


def attention(length: int, width: int = D, layers: int = LAYERS) -> int:
    """QKᵀ and the weighted sum of V, each 2 T² d per layer; the causal half that is masked is counted."""
    return layers * 2 * (2 * length**2 * width)


def test_gpt2() -> None:
    """Per layer: query, key and value 3d², output d², MLP 8d²; then the head."""
    matmul_parameters = LAYERS * (3 + 1 + 8) * D**2 + D * VOCAB
    assert forward_flops(tiny_lm("gpt2", window=T), T) == 2 * matmul_parameters * T + attention(T)


def test_llama() -> None:
    """Per layer: query, key, value and output 4d², gate, up and down 3 d · 32; then the head."""
    matmul_parameters = LAYERS * (4 * D**2 + 3 * D * 32) + D * VOCAB
    assert forward_flops(tiny_lm("llama", window=T), T) == 2 * matmul_parameters * T + attention(T)


def test_grouped_queries_have_smaller_keys_and_values() -> None:
    matmul_parameters = LAYERS * (2 * D**2 + 2 * D * 8 + 3 * D * 32) + D * VOCAB
    assert forward_flops(tiny_lm("qwen2", window=T), T) == 2 * matmul_parameters * T + attention(T)


def test_the_trunk_is_all_but_the_head() -> None:
    lm = tiny_lm("gpt2", window=T)
    assert forward_flops(lm, T) - trunk_flops(lm, T) == 2 * T * D * VOCAB


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "opt"])
def test_a_batch_costs_as_much_as_its_windows(architecture: str) -> None:
    lm = tiny_lm(architecture, window=T)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lm.head(lm.trunk(torch.zeros((5, T), dtype=torch.long)))
    assert counter.get_total_flops() == 5 * forward_flops(lm, T)


def test_backward_costs_twice_the_forward() -> None:
    """But for the gradient of the first layer's input, which needs none: embeddings are not multiplied."""
    lm = tiny_lm("gpt2", window=T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lm.head(lm.trunk(torch.zeros((1, T), dtype=torch.long))).sum().backward()
    assert counter.get_total_flops() == 3 * forward_flops(lm, T)


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.5}, {"precision": "bf16"}, {"gradient_checkpointing": True}]
)
def test_counting_leaves_no_trace(options: dict) -> None:
    lm = tiny_lm("gpt2", window=T, **options)
    before = {name: value.clone() for name, value in lm.network.state_dict().items()}
    state = torch.get_rng_state()
    assert forward_flops(lm, T) == forward_flops(tiny_lm("gpt2", window=T), T)
    assert torch.equal(torch.get_rng_state(), state)
    assert lm.network.training
    assert all(p.grad is None for p in lm.parameters)
    assert all(torch.equal(value, before[name]) for name, value in lm.network.state_dict().items())
