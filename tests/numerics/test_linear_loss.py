"""The fused head and cross-entropy against torch's own, in float64, with padding and ignored targets."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from curriq.lm.linear_loss import PAD, TORCH, RowKernels, linear_cross_entropy, padded_copy
from curriq.types import IGNORED


def inputs(rows: int, entries: int, width: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states, weights, targets of which every third is ignored, and weights of the rows."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(entries, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(entries, (rows,), generator=generator)
    targets[::3] = IGNORED
    return hidden, weight, targets, torch.rand(rows, generator=generator, dtype=torch.float64)


def plain(hidden, weight, targets, shares):
    """Losses and the gradients of Σ share · loss, by torch in float64."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden.detach(), weight.detach()))
    losses = F.cross_entropy(hidden @ weight.T, targets, reduction="none", ignore_index=IGNORED)
    gradients = torch.autograd.grad((shares * losses).sum(), (hidden, weight))
    return losses.detach(), *gradients


def fused(hidden, weight, targets, shares, kernels: RowKernels = TORCH, dtype=torch.float64):
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    losses = linear_cross_entropy(hidden, weight, padded_copy(weight, dtype), targets, kernels)
    gradients = torch.autograd.grad((shares.to(losses) * losses).sum(), (hidden, weight))
    return losses.detach(), *gradients


@given(rows=st.integers(1, 9), entries=st.integers(1, 2 * PAD + 1), width=st.integers(1, 5))
def test_losses_and_gradients_are_those_of_torch(rows, entries, width):
    given = inputs(rows, entries, width)
    for ours, theirs in zip(fused(*given), plain(*given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_in_bfloat16_the_error_is_that_of_rounding_the_logits():
    hidden, weight, targets, shares = inputs(64, 300, 32)
    hidden, weight = hidden.float(), weight.float() / 6
    ours = fused(hidden, weight, targets, shares, dtype=torch.bfloat16)
    rounded = (hidden.bfloat16(), weight.bfloat16())
    theirs = plain(*rounded, targets, shares)
    for found, exact in zip(ours, theirs, strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 0.01 * exact.norm()


def test_padding_takes_no_part():
    """Padded logits are 0, far above the others here: had they a part, they would be all of it."""
    hidden, weight, targets, shares = inputs(4, 5, 3)
    hidden, weight = hidden.abs(), -weight.abs() * 50
    assert padded_copy(weight, torch.float64).shape == (PAD, 3)
    for ours, theirs in zip(
        fused(hidden, weight, targets, shares), plain(hidden, weight, targets, shares), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_a_nan_reaches_the_loss():
    hidden, weight, targets, _ = inputs(4, 5, 3)
    hidden[1, 0] = torch.nan
    losses = linear_cross_entropy(hidden, weight, padded_copy(weight, torch.float64), targets, TORCH)
    assert losses.isnan().tolist() == [False, True, False, False]


def test_a_second_backward_pass_is_refused():
    """The first one has turned the logits into their gradient."""
    hidden, weight, targets, _ = inputs(4, 5, 3)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, padded_copy(weight, torch.float64), targets, TORCH).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def check_triton(device: str) -> None:
    """Both kernels against torch's operations: one block of columns, several, one column too many; NaN."""
    from curriq.lm.linear_loss_triton import BLOCK, TRITON

    for entries in (5, 300, BLOCK, 2 * BLOCK + 1):
        logits = 3 * torch.randn(7, -(-entries // PAD) * PAD)
        logits[2, entries // 2] = 90.0
        logits[4, 0] = torch.nan
        targets = torch.randint(entries, (7,))
        targets[3] = IGNORED
        weights = torch.rand(7)
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs = (logits.to(device, dtype).clone() for _ in range(2))
            targets, weights = targets.to(device), weights.to(device)
            found, expected = (k.losses(x, targets, entries) for k, x in ((TRITON, ours), (TORCH, theirs)))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
            for k, x in ((TRITON, ours), (TORCH, theirs)):
                k.gradient_(x, expected[1], targets, weights, entries)
            tolerance = 1e-5 if dtype == torch.float32 else 8e-3
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-6, equal_nan=True)


HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_kernels_in_its_interpreter():
    """In a process of its own: triton decides when it is imported whether it interprets."""
    code = "from tests.numerics.test_linear_loss import check_triton; check_triton('cpu')"
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}
    )


@pytest.mark.gpu
@pytest.mark.skipif(not (HAS_TRITON and torch.cuda.is_available()), reason="needs a GPU and triton")
def test_triton_kernels_on_a_gpu():
    check_triton("cuda")
