"""The paper's method: a critic that learns from rewards, and its values as the policy."""

import logging
import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.config import CriticConfig, RunConfig
from curriq.lm.held_out import REJECTED_SHARE
from curriq.lm.learner import ReforwardedAction, TDIntoTheta
from curriq.lm.model import LanguageModel, trunk_flops
from curriq.rng import Generators
from curriq.select.base import POLICY_SPREAD, Context, Method, PlainSelector, Uniform, always, plain
from curriq.select.references import accepted_by_prior, window_scorer
from curriq.select.sharded import stream_proposer
from curriq.select.static import WindowScorer
from curriq.select.stream_filter import build_filter
from curriq.softq.critic import PreviousAction, QInputs, TDCritic
from curriq.softq.temperature import (
    Temperature,
    build_temperature,
    calibration_gate,
    effective_batch_fraction,
)
from curriq.state import Saved
from curriq.types import (
    Cost,
    Critic,
    Features,
    Metrics,
    Offer,
    Reading,
    Selector,
    Step,
    readings_of,
    status_of,
)

logger = logging.getLogger("curriq")


class SoftQ(PlainSelector):
    """Score q/β, so that the mixture weights are the Boltzmann policy of Eq. 6.

    Args:
        critic: a critic with values; its learning belongs to the loop, not to the selector.
        temperature: gives β, and learns it from what the steps show.
        weighs_by_prior: whether the windows' prior π₀ is a factor of their weights.
        uniform_share: ε; about this share of the weight is spread evenly over all windows. The weights of a
            step are known one micro-batch at a time, so the even share is ε/(1 − ε) times the mean of
            π₀ exp(q/β) in the step before.
    """

    SAVED = ("_temperature", "_floor")
    readings = (Reading("reward", "reward"), POLICY_SPREAD)

    def __init__(
        self,
        critic: Critic,
        temperature: Temperature,
        uniform_share: float = 0.0,
        *,
        weighs_by_prior: bool = False,
    ) -> None:
        self._critic = critic
        self._weighs_by_prior = weighs_by_prior
        self._temperature = temperature
        self._log_odds = math.log(uniform_share / (1 - uniform_share)) if uniform_share else -math.inf
        self._floor = -math.inf

    def status(self) -> str:
        evidence, beta = self._temperature.status(), self._temperature.beta
        if not evidence:
            return ""
        return f"{'steering off' if beta == math.inf else f'β {beta:.2g}'}: {evidence}"

    def score(self, step: int, offer: Offer, features: Features) -> Float[Tensor, "n"]:
        q = self._critic.values(features)
        assert q is not None, "soft-q needs a critic that has values"
        scores = q / self._temperature.beta
        if self._weighs_by_prior:
            scores = scores + _log_prior(offer).to(scores)
        return scores if self._floor == -math.inf else torch.logaddexp(scores, scores.new_tensor(self._floor))

    def observe(self, step: Step) -> Metrics:
        """The temperature learns from Q as it was in this step, before it has learnt from the effects."""
        assert step.q is not None, "soft-q needs a critic that has values"
        beta = self._temperature.beta
        metrics = self._temperature.observe(step.q, step.effects)
        if self._log_odds > -math.inf:
            scores = step.q.double().cpu() / self._temperature.beta
            if self._weighs_by_prior:
                scores = scores + _log_prior(step.trained)
            mean = torch.logsumexp(scores, 0).item() - math.log(len(scores))
            self._floor = mean + self._log_odds
        return ({"policy/beta": beta} if math.isfinite(beta) else {}) | metrics


def _log_prior(offer: Offer) -> Float[Tensor, "n"]:
    """log π₀ on the CPU; in float64, because π₀ may be less than float32 can hold."""
    return offer.known["prior"].double().cpu().log()


class DirichletNoise(Saved):
    """`inner` with weights that vary at random: π̃_i ∝ π_i g_i with g_i ~ Gamma(c)/c, independent.

    With uniform weights π̃ is a draw from the symmetric Dirichlet distribution of concentration c. Mixture
    credit needs such variation: under a policy that hardly varies there is nothing to regress on. The
    effective batch fraction is about c/(1 + c) of the inner one's.
    """

    SAVED = ("_inner", "_generator")

    def __init__(self, inner: Selector, concentration: float, generator: torch.Generator) -> None:
        self._inner = inner
        self._concentration = concentration
        self._generator = generator
        self._noise = torch.zeros(0)
        self.needs_entropy = inner.needs_entropy
        self.needs_reward = inner.needs_reward
        self.readings = readings_of(inner)

    def status(self) -> str:
        return status_of(self._inner)

    def admit(self, step: int, offer: Offer) -> Offer:
        shape = torch.full((int(offer.rows.max()) + 1,), self._concentration)
        gamma = torch._standard_gamma(shape, generator=self._generator)
        self._noise = torch.log(gamma.clamp(min=1e-30) / self._concentration)
        return self._inner.admit(step, offer)

    def score(self, step: int, offer: Offer, features: Features) -> Float[Tensor, "n"]:
        scores = self._inner.score(step, offer, features)
        return scores + self._noise[offer.rows].to(scores)

    def observe(self, step: Step) -> Metrics:
        return self._inner.observe(step)


def build(config: RunConfig, context: Context) -> Method:
    """Soft Q-learning: weights on the windows of the stream, or a filter before the forward pass."""
    settings = config.critic
    if warning := few_probes(config):
        logger.warning(warning)
    reads_score = config.select.prior or "static_score" in settings.q_features
    scorer = window_scorer(config, context) if reads_score else None
    if config.filters_by_q:
        return _filtering(config, context, scorer)
    policy, critic = _weighting(config, context)
    selector: Selector = policy
    if not settings.q_weighting:
        selector = Uniform()
    if concentration := settings.dirichlet_concentration:
        selector = DirichletNoise(selector, concentration, context.generators("jitter"))
    method = plain(selector, config, context)
    if scorer is not None:
        accept_prob = accepted_by_prior if config.train.max_read_ratio > 1 else None
        proposer = stream_proposer(config, context, scorer, accept_prob, foreseeable=always)
        method = replace(method, proposer=proposer)
    return replace(method, critic=critic, shared=list(critic.online.parameters()))


def few_probes(config: RunConfig) -> str:
    """A warning where a run has probably too few probes for its Q to have a say; empty elsewhere."""
    train, critic = config.train, config.critic
    filters = config.filters_by_q
    gate = calibration_gate(critic, 1.0) if filters or critic.q_weighting else None
    if gate is None:
        return ""
    # Of a filter's probed windows those that it rejected do not count for the gate.
    share = 1 - REJECTED_SHARE if filters else 1.0
    probes, windows = -(-train.steps // train.reward_every), min(critic.probe_windows, train.num_candidates)
    needed = gate.probes_to_open(round(share * windows))
    if needed < probes:
        return ""
    until = (
        "until then the static prior alone chooses" if config.select.prior else "until then training is plain"
    )
    ways = ["more --probe-windows"]
    if needed < math.inf:
        ways = [f"--steps {needed * train.reward_every} or more", *ways]
        if (every := train.steps // (needed + 1)) > 0:
            ways = [f"--reward-every {every}", *ways]
    enough = f"about {needed}" if needed < math.inf else "more than there can be"
    return (
        f"--steps {train.steps} with --reward-every {train.reward_every} gives Q {probes} "
        f"probe{'s' * (probes != 1)} to show that it ranks windows rightly, and with probes of "
        f"{round(share * windows)} windows it probably needs {enough}: {until}. For Q to take part, use "
        f"{', or '.join(ways)}."
    )


def _filtering(config: RunConfig, context: Context, scorer: WindowScorer | None) -> Method:
    """The policy before the forward pass; what it accepts is weighed evenly."""
    policy, critic = build_filter(
        config,
        len(context.corpus.source_names),
        context.generators,
        target=None if scorer is None else scorer.of_target,
    )
    every = config.train.reward_every

    def foreseeable(step: int, learns: bool) -> bool:
        # β changes with a measurement only, and where it is infinite Q has no say.
        return step % every != 0 and not (learns and math.isfinite(policy.beta))

    proposer = stream_proposer(config, context, scorer, policy.accept_prob, policy, foreseeable)
    shared = list(critic.online.parameters())
    return Method(proposer=proposer, selector=policy, critic=critic, shared=shared)


def _weighting(config: RunConfig, context: Context) -> tuple[SoftQ, TDCritic]:
    settings, lm = config.critic, context.lm
    return build_weighting(
        settings,
        lm.width,
        len(context.corpus.source_names),
        context.generators,
        device=lm.device,
        previous_action=_previous_action(config, lm),
        prior=config.select.prior and config.train.max_read_ratio == 1,
    )


def _previous_action(config: RunConfig, lm: LanguageModel) -> PreviousAction | None:
    forward = trunk_flops(lm, config.data.window)
    if config.critic.td_into_theta:
        passes = 3 + config.lm.gradient_checkpointing
        return TDIntoTheta(lm, config.critic.td_lambda, Cost(extra_flops=passes * forward))
    return ReforwardedAction(lm, Cost(extra_flops=forward)) if config.critic.reforward_action else None


def build_weighting(
    settings: CriticConfig,
    width: int,
    sources: int,
    generators: Generators,
    *,
    device: torch.device | str = "cpu",
    previous_action: PreviousAction | None = None,
    prior: bool = False,
) -> tuple[SoftQ, TDCritic]:
    """The learned weights and their critic, on `device`; `width` is that of the hidden states, `prior` says
    whether windows come with one, and `previous_action` is as in `TDCritic`."""
    fraction = settings.effective_batch_fraction
    temperature = build_temperature(settings, fraction, share=effective_batch_fraction)
    inputs = QInputs(settings.q_features, width, sources, layer_norm=settings.q_layer_norm)
    critic = TDCritic(
        settings,
        inputs,
        temperature,
        device,
        generators,
        previous_action,
        weighs_by_prior=prior,
    )
    selector = SoftQ(critic, temperature, settings.uniform_share, weighs_by_prior=prior)
    return selector, critic
