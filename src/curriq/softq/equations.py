"""Eqs. 3–10 and 17–19 of "Learning to Learn: Curriculum Selection via Soft Q-Learning", as pure functions.

One short function per equation, its number in the docstring. Q, rewards and losses are in nats per
token, and so are β and V, because β divides Q. Every function works in float32 and in float64.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def td_target(reward: float, next_value: Float[Tensor, ""], gamma: float) -> Float[Tensor, ""]:
    """Eq. 3, the normalised soft Bellman target y = (1 − γ) r_k + γ V_φ̄(s_{k+1}).

    The factor 1 − γ keeps Q on the scale of one reward: a constant reward r has the fixed point Q = r.
    """
    return (1 - gamma) * reward + gamma * next_value


def soft_value(
    q: Float[Tensor, "N"], beta: float, prior: Float[Tensor, "N"] | None = None
) -> Float[Tensor, ""]:
    """Eq. 4, the normalised soft value V = β [logsumexp(Q/β) − log N]; with a prior, V = β log Σ π₀ exp(Q/β).

    Both agree where the prior is uniform. V lies between the mean of Q under the prior (β → ∞) and its
    maximum where the prior is positive (β → 0), and V = q when all Q equal q.

    Args:
        prior: π₀, which sums to one; None for the uniform one.
    """
    # With m = max Q this is m + β log E[exp((Q − m)/β)], the same number. expm1 and log1p keep the digits
    # that logsumexp − log N cancels away when β is much larger than the spread of Q, the usual case.
    if beta == math.inf:  # the limit
        return q.mean() if prior is None else prior @ q
    greatest = (q if prior is None else q[prior > 0]).max()
    z = ((q - greatest) / beta).clamp(max=0)
    if prior is None:
        return greatest + beta * torch.log1p(torch.expm1(z).mean())
    excess = prior @ torch.expm1(z)
    # Where the greatest Q has next to no prior the sum is rounded to −1, and logsumexp is the exact one.
    far = torch.logsumexp(z + prior.log(), dim=0)
    return greatest + beta * torch.where(excess > -0.5, torch.log1p(excess.clamp(min=-0.5)), far)


@torch.no_grad()
def polyak_(target: Iterable[Tensor], online: Iterable[Tensor], tau: float) -> None:
    """Eq. 5, φ̄ ← τ φ + (1 − τ) φ̄, in place over pairs of parameters."""
    for slow, fast in zip(target, online, strict=True):
        slow.lerp_(fast, tau)


def boltzmann(
    q: Float[Tensor, "N"], beta: float, prior: Float[Tensor, "N"] | None = None
) -> Float[Tensor, "N"]:
    """Eq. 6, the Boltzmann policy π = softmax(Q/β); with a prior π ∝ π₀ exp(Q/β).

    A constant added to every Q, or a factor on every π₀, changes nothing.
    """
    return torch.softmax(q / beta if prior is None else q / beta + prior.log(), dim=0)


def mixture_loss(policy: Float[Tensor, "N"], losses: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """Eq. 7, L = Σ π_i ℓ_i, nats per token.

    Its gradient with π held fixed is the exact expectation of ∇ℓ_a over a ~ π (Eq. 8).
    """
    return policy @ losses


def uniform_policy(q: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Eqs. 9–10, π_i = 1/N for as many candidates as `q` has, on its device and in its precision."""
    return torch.full_like(q, 1 / q.shape[0])


def effective_batch_size(policy: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """1/‖π‖²: N for the uniform policy, 1 when one candidate has all the weight; in windows."""
    return 1 / policy.square().sum()


def entropy(policy: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """H(π) = −Σ π_i log π_i in nats, with 0 log 0 = 0."""
    return torch.special.entr(policy).sum()


def kl_from_prior(policy: Float[Tensor, "N"], prior: Float[Tensor, "N"] | None = None) -> Float[Tensor, ""]:
    """KL(π ‖ π₀) in nats, log N − H(π) where π₀ is uniform (None); ∞ where π is positive and π₀ is 0."""
    if prior is None:
        return math.log(policy.shape[0]) - entropy(policy)
    return torch.special.xlogy(policy, policy / prior).where(policy > 0, 0.0).sum()


def free_energy(
    policy: Float[Tensor, "N"], q: Float[Tensor, "N"], beta: float, prior: Float[Tensor, "N"] | None = None
) -> Float[Tensor, ""]:
    """Eqs. 17–18, F(π) = −E_π[Q] + β KL(π ‖ p_0), with a uniform p_0 unless a prior is given.

    The Boltzmann policy over Q with this prior is its only minimum, and the minimum is −V of Eq. 4.
    """
    return -(policy @ q) + beta * kl_from_prior(policy, prior)


def elbo(
    policy: Float[Tensor, "N"], q: Float[Tensor, "N"], beta: float, prior: Float[Tensor, "N"] | None = None
) -> Float[Tensor, ""]:
    """Eq. 19, E_π[Q]/β − KL(π ‖ p_0), with a uniform p_0 unless a prior is given; at most log p(optimal).

    With p(optimal | i) = exp(Q_i/β), log p(optimal) = log Σ p_0(i) exp(Q_i/β) = V/β. The bound is
    tight at the Boltzmann policy.
    """
    return policy @ q / beta - kl_from_prior(policy, prior)


def sample_action(policy: Float[Tensor, "N"], generator: torch.Generator) -> int:
    """a_k ~ π_k by inversion of the cumulative distribution, with one draw from a CPU generator.

    Probabilities are summed in float64 on the CPU, so that one state of the generator and one policy
    give one action, whatever device the policy lies on. Candidates of probability 0 are never drawn.

    Raises:
        FloatingPointError: the policy is not finite.
    """
    cumulative = policy.detach().cpu().double().cumsum(0)
    total = cumulative[-1]
    if not total.isfinite():
        raise FloatingPointError("the policy over candidates is not finite")
    draw = torch.rand((), generator=generator, dtype=torch.float64) * total
    return int(torch.searchsorted(cumulative, draw, right=True))
