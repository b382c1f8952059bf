"""How sharp the policy is: β, fixed, solved for an effective batch, or learned; and who decides how sharp.

The single-pass step needs β before it has seen the scores of its batch, so a solved β is that of the batches
before. Q's spread moves slowly against a step, and the log shows the fraction that came out.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.config import CriticConfig
from curriq.softq.equations import boltzmann, entropy
from curriq.state import Saved
from curriq.types import Effects, Metrics, Stateful


@runtime_checkable
class Temperature(Stateful, Protocol):
    """Gives β, in nats per token; constant within a step.

    Attributes:
        beta: β of the step that is under way; ∞ is the uniform policy.
    """

    @property
    def beta(self) -> float: ...

    def observe(self, q: Float[Tensor, "N"], effects: Effects | None) -> Metrics:
        """The end of a step: its Q-values and what was measured. β is that of the next step afterwards."""
        ...

    def status(self) -> str:
        """What β follows, in words for a display; empty where there is nothing to tell."""
        ...


@runtime_checkable
class Sharpness(Stateful, Protocol):
    """Decides the effective batch fraction 1/(N‖π‖²) that the policy should have, or another such share.

    Attributes:
        fraction: in (0, 1]; 1 is uniform.
    """

    @property
    def fraction(self) -> float: ...

    def observe(self, q: Float[Tensor, "N"], effects: Effects | None) -> Metrics: ...

    def status(self) -> str:
        """The evidence in words; empty where there is none to tell of."""
        ...


@dataclass
class FixedBeta(Saved):
    """The paper's β."""

    beta: float

    def observe(self, q: Float[Tensor, "N"], effects: Effects | None) -> Metrics:
        return {}

    def status(self) -> str:
        return ""


@dataclass
class FixedFraction(Saved):
    """Always the same fraction."""

    fraction: float

    def observe(self, q: Float[Tensor, "N"], effects: Effects | None) -> Metrics:
        return {}

    def status(self) -> str:
        return ""


POWER = 0.8
"""Probability at which a gate that should open is expected to have opened."""


class Evidence(Saved):
    """Exponentially weighted mean of some measurements and its standard error, from their own scatter.

    Args:
        memory: measurements that the mean reaches back, about.
        z: standard errors from the mean to either confidence bound.
        least: measurements before there are bounds.
    """

    SAVED = ("count", "_sums")

    def __init__(self, memory: float = 20.0, *, z: float = 2.0, least: int = 4) -> None:
        self._keep = 1 - 1 / memory
        self._z = z
        self._least = least
        self.count = 0
        # Sums of the weights, of their squares, and of the weighted x and x².
        self._sums = torch.zeros(4, dtype=torch.float64)

    def add(self, x: float) -> None:
        self.count += 1
        self._sums *= torch.tensor([self._keep, self._keep**2, self._keep, self._keep], dtype=torch.float64)
        self._sums += torch.tensor([1.0, 1.0, x, x**2], dtype=torch.float64)

    def mean_and_error(self) -> tuple[float, float]:
        """Of at least one measurement; the error of a single one is 1."""
        weight, squares, total, total_squares = self._sums.tolist()
        mean = total / weight
        count = weight**2 / squares
        if count <= 1:
            return mean, 1.0
        scatter = max(0.0, total_squares / weight - mean**2) * count / (count - 1)
        return mean, math.sqrt(scatter / count)

    def measurements_until(self, error: float, scatter: float) -> float:
        """Measurements after which the mean has so small a standard error, when one scatters by `scatter`; ∞
        where the memory is too short for it.

        n of them count as (1 + k)(1 − kⁿ)/((1 − k)(1 + kⁿ)) independent ones, with the share k that stays.
        """
        keep, wanted = self._keep, (scatter / error) ** 2
        share = wanted * (1 - keep) / (1 + keep)
        if share >= 1:
            return math.inf
        return max(self._least, math.ceil(math.log((1 - share) / (1 + share), keep)))

    def bounds(self) -> tuple[float, float]:
        """Lower and upper confidence bound of the mean; infinite before there is enough evidence."""
        if self.count < self._least:
            return -math.inf, math.inf
        mean, error = self.mean_and_error()
        return mean - self._z * error, mean + self._z * error


class CalibrationGate(Saved):
    """Sharpness follows the confidence that Q ranks windows rightly: uniform without any.

    At every probe it takes Spearman's rank correlation ρ between the Q-values of the probed windows and their
    measured effects, before Q has learnt from them. The exponentially weighted mean ρ̄ of the probes has a
    standard error s; the confidence is the lower bound ρ̄ − z s as a share of the correlation at which it is
    complete, and the fraction goes from 1 to `sharpest` with it. Where the bound is r > 1 times as great, the
    fraction is `sharpest`^r, down to `lowest`. A Q that ranks no better than chance, because the reward is
    noise or all windows are alike, costs its probes and little more: as the bound is looked at after every
    probe, 24 probes of 16 windows open the gate for a while in one run of six, and on average for 3 % of the
    steps.

    Args:
        sharpest: fraction at full confidence.
        lowest: fraction that it may fall on to from there; 1 for none.
        full: ρ of full confidence.
        z: standard errors that the bound lies below the mean.
        least: probes before there is any confidence.
    """

    SAVED = ("_evidence",)

    def __init__(
        self, sharpest: float, *, lowest: float = 1.0, full: float = 0.2, z: float = 2.0, least: int = 4
    ) -> None:
        self._sharpest = sharpest
        self._lowest = min(lowest, sharpest)
        self._full = full
        self._z = z
        self._evidence = Evidence(z=z, least=least)

    @property
    def fraction(self) -> float:
        if self._evidence_of_full <= 1:
            return 1 - (1 - self._sharpest) * self.confidence
        return max(self._lowest, self._sharpest**self._evidence_of_full)

    @property
    def confidence(self) -> float:
        """In [0, 1]."""
        return min(1.0, max(0.0, self._evidence_of_full))

    @property
    def _evidence_of_full(self) -> float:
        """The lower bound of ρ as a multiple of that of full confidence."""
        lower, _ = self._evidence.bounds()
        return lower / self._full

    def status(self) -> str:
        probes = self._evidence.count
        return f"confidence {self.confidence:.1f} of 1, {probes} probe{'s' * (probes != 1)}"

    def probes_to_open(self, windows: int) -> float:
        """Probes of so many windows after which the gate will probably have opened; ∞ for never.

        Probably: with a probability of `POWER`, where Q ranks as well as full confidence asks for. ρ of one
        probe scatters by 1/√(m − 1), as it does without any correlation, and the lower bound ρ̄ − z s is above
        0 with that probability once s = ρ/(z + z_0.8).
        """
        if windows < 2:
            return math.inf
        scatter = 1 / math.sqrt(windows - 1)
        return self._evidence.measurements_until(
            self._full / (self._z + NormalDist().inv_cdf(POWER)), scatter
        )

    def observe(self, q: Float[Tensor, "N"], effects: Effects | None) -> Metrics:
        if effects is None:
            return {}
        rho = rank_correlation(q[effects.rows], effects.effect)
        self._evidence.add(rho)
        mean, error = self._evidence.mean_and_error()
        return {
            "gate/rank_correlation": rho,
            "gate/calibration": mean,
            "gate/calibration_error": error,
            "gate/confidence": self.confidence,
            "gate/target_fraction": self.fraction,
        }


class PriorTrust(Saved):
    """How far the prior is trusted: fully, unless measured effects show that it ranks windows wrongly.

    The policy accepts with π₀^t. At every probe it takes Spearman's ρ between the prior of the probed windows
    and their effects. The exponent t is 1 as long as the upper bound ρ̄ + z s is not negative; from there it
    falls to 0, the uniform policy, at −`full`. A prior is a hypothesis with reasons of its own, so what it
    takes to reject it is strong evidence against it: text that has been learnt well has small effects, which
    is no reason to train on noise.

    Args:
        full: −ρ at which nothing of the prior is left.
        z: standard errors that the bound lies above the mean.
        least: probes before the prior can be doubted.
    """

    SAVED = ("_evidence",)

    def __init__(self, *, full: float = 0.5, z: float = 3.0, least: int = 8) -> None:
        self._full = full
        self._evidence = Evidence(z=z, least=least)

    @property
    def exponent(self) -> float:
        """t in [0, 1]."""
        _, upper = self._evidence.bounds()
        return min(1.0, max(0.0, 1 + upper / self._full))

    def observe(self, prior: Float[Tensor, "m"], effect: Float[Tensor, "m"]) -> Metrics:
        """The prior of the probed windows and their effects, nats per token."""
        rho = rank_correlation(prior, effect)
        self._evidence.add(rho)
        return {"prior/rank_correlation": rho, "prior/trust": self.exponent}


class SolvedBeta(Saved):
    """β at which the policy is as sharp as `sharpness` asks for; ∞, the uniform policy, where it asks for 1.

    Args:
        sharpness: the fraction.
        memory: batches of Q-values that it is solved on, each centred: one batch alone would make β noisy.
        share: what the fraction is a share of.
    """

    SAVED = ("_sharpness", "_recent", "beta")

    def __init__(self, sharpness: Sharpness, *, memory: int = 8, share: "Share | None" = None) -> None:
        self._sharpness = sharpness
        self._share = share or effective_batch_fraction
        self._recent: deque[Tensor] = deque(maxlen=memory)
        self.beta = math.inf if sharpness.fraction >= 1 else 1.0

    def status(self) -> str:
        return self._sharpness.status()

    def observe(self, q: Float[Tensor, "N"], effects: Effects | None) -> Metrics:
        metrics = self._sharpness.observe(q, effects)
        self._recent.append((q - q.mean()).detach().double().cpu())
        recent = torch.cat(list(self._recent))
        self.beta = solve_beta(recent, self._sharpness.fraction, self._share) or self.beta
        return metrics


@dataclass
class LearnedBeta(Saved):
    """β as soft actor-critic learns its temperature (Haarnoja et al. 2018, Section 5).

    log β descends β-weighted entropy excess: log β ← log β − η (H(π) − H̄), with H̄ = log(N f) for the fraction
    f that `sharpness` asks for and the learning rate η.
    """

    SAVED = ("sharpness", "beta")

    sharpness: Sharpness
    beta: float
    learning_rate: float

    def status(self) -> str:
        return self.sharpness.status()

    def observe(self, q: Float[Tensor, "N"], effects: Effects | None) -> Metrics:
        metrics = self.sharpness.observe(q, effects)
        wanted = math.log(max(1.0, len(q) * self.sharpness.fraction))
        excess = entropy(boltzmann(q.double(), self.beta)).item() - wanted
        # A uniform policy has no more entropy to give: without a bound β would grow for ever.
        self.beta = min(1e6, max(1e-12, self.beta * math.exp(-self.learning_rate * excess)))
        return metrics


Share = Callable[[Float[Tensor, "b n"]], Float[Tensor, "b"]]
"""How even softmax(z) is, from 1/n or less (all on the greatest) to 1 (uniform), for each row z = q/β."""


def effective_batch_fraction(z: Float[Tensor, "b n"]) -> Float[Tensor, "b"]:
    """1/(n‖π‖²) of π = softmax(z)."""
    return 1 / (z.shape[1] * z.softmax(1).square().sum(1))


ALWAYS_ACCEPT_QUANTILE = 0.1
"""Share of the stream that counts as best, and is always accepted. With more the policy is a filter: good
among much noise, harmful where all is of one kind; experiments/LOG.md has the comparison."""


@dataclass(frozen=True)
class Acceptance:
    """The acceptance probability min(1, exp((q − c)/β)) of a window; as a `Share`, the mean over windows.

    Args:
        always_accept: share of the windows that lie at c or above, and so are accepted at any β. With 0, c is
            the greatest q; but the greatest of some noisy values is the noisiest, and few windows that stand
            out are not worth a batch of their own.
    """

    always_accept: float = 0.0

    def prob(self, z: Float[Tensor, "*b n"], sample: Float[Tensor, "*b m"]) -> Float[Tensor, "*b n"]:
        """Of windows with z = q/β, with c measured on an on-distribution sample."""
        c = sample.quantile(1 - self.always_accept, dim=-1, keepdim=True, interpolation="higher")
        return (z - c).exp().clamp(max=1.0)

    def __call__(self, z: Float[Tensor, "b n"]) -> Float[Tensor, "b"]:
        return self.prob(z, z).mean(1)


def build_temperature(
    critic: CriticConfig, fraction: float, *, share: Share, lowest: float = 1.0, memory: int = 8
) -> Temperature:
    """The temperature that `--temperature` names; its policy has at its sharpest the `share` `fraction`, or
    where it is gated and Q ranks very well, down to `lowest`."""
    if critic.temperature == "fixed":
        return FixedBeta(critic.beta)
    if critic.temperature == "learned":
        return LearnedBeta(FixedFraction(fraction), critic.beta, critic.beta_lr)
    sharpness = calibration_gate(critic, fraction, lowest) or FixedFraction(fraction)
    return SolvedBeta(sharpness, memory=memory, share=share)


def calibration_gate(critic: CriticConfig, fraction: float, lowest: float = 1.0) -> CalibrationGate | None:
    """The gate of `--temperature gated`, with nothing observed yet; None for another temperature."""
    gated = critic.temperature == "gated"
    return CalibrationGate(fraction, lowest=lowest, full=critic.corr_for_full_sharpness) if gated else None


def solve_beta(
    q: Float[Tensor, "n"], fraction: float, share: Share = effective_batch_fraction
) -> float | None:
    """β at which softmax(q/β) has the share `fraction`; log β to 1e-8 by successive grids.

    The share grows with β from (ties at the maximum)/n to 1. Asked for less than that it is the end of a
    bracket, 1e-3 standard deviations of q; asked for 1, ∞.

    Returns:
        None when all q are equal and the share is below 1: every β gives the uniform policy.
    """
    if fraction >= 1:
        return math.inf
    spread = q.std(correction=0).item()
    if not spread > 0:
        return None
    low, high = math.log(1e-3 * spread), math.log(1e6 * spread)
    for _ in range(6):  # each time 32 times finer, in one call instead of five bisections
        grid = torch.linspace(low, high, 33, dtype=torch.float64, device=q.device)
        enough = share(q.double() / grid.exp()[:, None]) >= fraction
        first = int(enough.int().argmax()) if bool(enough.any()) else 32
        low, high = grid[max(0, first - 1)].item(), grid[first].item()
    return math.exp(high)


def rank_correlation(a: Float[Tensor, "m"], b: Float[Tensor, "m"]) -> float:
    """Spearman's ρ with midranks for ties; 0 where either is constant."""
    if len(a) < 2:
        return 0.0
    ranks = torch.stack([_midranks(a), _midranks(b)])
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    if not bool((norms > 0).all()):
        return 0.0
    return ((centred[0] @ centred[1]) / (norms[0] * norms[1])).item()


def _midranks(values: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, counts = values.detach().cpu().double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts + 1) / 2)[place].double()
