"""The policy applied before the forward pass: an online data filter, and what it learns.

A window is accepted with a probability that grows with its prior and its Q, and what is accepted is weighed
evenly. Both see what is known before the forward pass: the window's source, and a static score of its text.
"""

import logging
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq import parallel
from curriq.config import RunConfig, require
from curriq.data.stream import Unreadable
from curriq.errors import CurriqError, StreamEnded
from curriq.rng import Generators
from curriq.select.base import Foreseeable, Uniform, never
from curriq.softq.critic import QInputs, TDCritic
from curriq.softq.temperature import (
    ALWAYS_ACCEPT_QUANTILE,
    Acceptance,
    PriorTrust,
    Temperature,
    build_temperature,
    solve_beta,
)
from curriq.state import Saved, State
from curriq.types import Critic, Features, Metrics, Offer, Reading, Sampled, Step

logger = logging.getLogger("curriq")


@dataclass(eq=False)
class FilteredStream(Saved):
    """Reads the stream in its order and accepts each window with its own probability (rejection sampling).

    With probabilities p(x) = π₀(x) min(1, exp((Q(x) − c)/β)) the accepted windows are distributed as the
    stream is, tilted by π₀ exp(Q/β) below c: the Boltzmann policy with the prior π₀ over everything that the
    stream offers, applied before the forward pass, so that no pass and no part of the effective batch goes to
    what is rejected. Where all probabilities are 1 it is NEXTBATCH to the letter: it reads no window more
    than it accepts. Otherwise it reads as many at a time as it will probably need, and unreads what it did
    not need.

    Args:
        stream: where the windows come from; it must take back what is unread.
        n: N, windows accepted per step.
        max_read_ratio: windows read per window accepted, at most. When they are used up the step is filled
            with those that came nearest to being accepted.
        accept_prob: probability for each of some windows, from what is known of them without a forward pass.
        generator: CPU generator of the draws, one per window read.
        foreseeable: whether the probabilities of the next step are known during this one.
    """

    SAVED = ("stream", "generator")
    readings = (Reading("accepted", "x/windows_proposed", "{:.0%}", per="x/windows_read"),)

    stream: Unreadable
    n: int
    _: KW_ONLY
    max_read_ratio: int
    accept_prob: Callable[[Offer], Float[Tensor, "n"]]
    generator: torch.Generator
    foreseeable: Foreseeable = never

    def propose(self, step: int) -> Offer:
        """The accepted windows of a step: N, or fewer at the end of a stream that ends.

        Raises:
            StreamEnded: no window is left.
        """
        offer = self.read(self.n)
        if step == 0:
            announce(offer, self.max_read_ratio)
        return offer

    def read(self, n: int) -> Offer:
        """The next n windows that are accepted, or fewer at the end of a stream that ends.

        Raises:
            StreamEnded: no window is left.
        """
        most = self.max_read_ratio * n
        read: list[Offer] = []
        prob = draws = torch.zeros(0, dtype=torch.float64)
        accepted = torch.zeros(0, dtype=torch.bool)
        ended = False
        while (missing := n - int(accepted.sum())) > 0 and len(prob) < most:
            # As many as it will probably accept; where all are accepted, none is read that is not needed now.
            wanted = missing if not len(prob) else math.ceil(missing / max(prob.mean().item(), 1e-6))
            batch = self.stream.read(min(wanted, most - len(prob)))
            if ended := not len(batch):
                break
            new = probabilities(self.accept_prob, batch)
            drawn = torch.rand(len(batch), dtype=torch.float64, generator=self.generator)
            read.append(batch)
            prob, draws = torch.cat([prob, new]), torch.cat([draws, drawn])
            accepted = prob >= draws
        if not read:
            raise StreamEnded
        everything = Offer.cat(read)
        # What came after the last window that was needed is judged in the next step, with a new draw.
        end = int((accepted.cumsum(0) < n).sum()) + 1
        self.stream.unread(everything.take(slice(end, None)))
        everything = everything.take(slice(end))
        prob, draws = prob[:end], draws[:end]
        count = int(accepted.sum()) if ended else n
        chosen = _nearest(prob, draws, count)
        judged = replace(everything, sampled=Sampled(accept_prob=prob))
        rejected = torch.ones(len(judged), dtype=torch.bool)
        rejected[chosen] = False
        return replace(
            judged.take(chosen),
            rows=torch.arange(count),
            rejected=judged.take(rejected.nonzero().squeeze(1)),
            cost=replace(everything.cost, windows_read=len(judged)),
        )

    def drop_read_ahead(self) -> None:
        """Lose the windows that have been read for later steps."""
        self.stream.drop_unread()

    def load_state_dict(self, state: State) -> None:
        # An earlier version counted repetitions.
        super().load_state_dict({name: value for name, value in state.items() if name != "repetitions"})


class ShardFilter(FilteredStream):
    """The filter of one shard of a stream. Whoever puts the shards' offers together announces for all."""

    def propose(self, step: int) -> Offer:
        return self.read(self.n)


def probabilities(accept_prob: Callable[[Offer], Float[Tensor, "n"]], offer: Offer) -> Float[Tensor, "n"]:
    """The acceptance probabilities of the windows of an offer, in float64 on the CPU.

    Raises:
        CurriqError: what the function gives are no probabilities, one for each window.
    """
    found, owner = accept_prob(offer), getattr(accept_prob, "__self__", None)
    name = "accept_prob" if owner is None else f"accept_prob of {type(owner).__name__}"
    rows = "windows" if offer.windows.tokens.shape[1] > 1 else "examples"  # which have a number here
    rule = f"for {len(offer)} {rows}: it must give one probability each."
    try:
        prob = torch.as_tensor(found).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise CurriqError(f"{name} gave {reprlib.repr(found)} {rule}") from None
    require(prob.shape == (len(offer),), f"{name} gave shape {list(prob.shape)} {rule}")
    wrong = ~((prob >= 0) & (prob <= 1))
    require(
        not wrong.any(),
        f"{name} gave {prob[wrong][:1].tolist()}: probabilities lie between 0 and 1; of a score z, "
        "torch.sigmoid(z) is one.",
    )
    return prob


def _nearest(prob: Float[Tensor, "m"], draws: Float[Tensor, "m"], n: int) -> Int[Tensor, "n"]:
    """The n windows that were accepted by the widest margin, or came nearest to it, in the stream's order."""
    return (prob.log() - draws.log()).topk(n).indices.sort().values


def announce(offer: Offer, max_read_ratio: int) -> None:
    """Say in the log what a filter makes of the first windows."""
    logger.info(
        f"the filter trains on {len(offer)} of the first {sum(map(len, offer.judged))} windows that it read; "
        f"it reads at most {max_read_ratio} for each."
    )


@dataclass(eq=False)
class StreamFilter(Uniform):
    """The acceptance probability of a window, π₀^t min(1, exp((Q − c)/β)); what was accepted is weighed
    evenly.

    π₀ is the window's prior, and t in [0, 1] how far it is trusted: 1, unless measured effects show that it
    ranks windows the wrong way round. Q is the correction that is learnt. Without evidence β is infinite and
    the policy is π₀, from the first step. The level c and β are those of the stream as the prior has it.

    Whatever the temperature says, β is at least so great that of windows like the target's own the share
    `min_target_accept_rate` would be accepted. Among these the policy must not choose much: training on the
    target's own distribution is what all selection aims at, and where the stream has it already, to prefer a
    part of it is to lose the rest. Their Q is that of the source which is worth most, so that the target need
    not be one of the stream's.

    Args:
        critic: a critic whose inputs are known without a forward pass.
        temperature: gives β, and learns it from probes.
        acceptance: the probability that Q gives.
        target: static scores of the target's own windows [D] at this time; None where they are not measured,
            and β is the temperature's.
        min_target_accept_rate: share of these that Q must accept, in [0, 1).
        sample_size: windows on which c and β are measured, the last ones read that the prior rather accepts
            than not.
    """

    SAVED = ("temperature", "trust", "_least_beta", "_sample")

    critic: Critic
    temperature: Temperature
    acceptance: Acceptance
    _: KW_ONLY
    trust: PriorTrust
    target: Callable[[], Float[Tensor, "D"]] | None = None
    min_target_accept_rate: float = 0.0
    sample_size: int = 512

    def __post_init__(self) -> None:
        self._least_beta = 0.0
        self._sample: Features | None = None
        self._prior_rejects = False
        self._seen: Offer | None = None

    @property
    def beta(self) -> float:
        """β of the next draws, nats per token; ∞ leaves the prior as it is."""
        return max(self.temperature.beta, self._least_beta)

    def status(self) -> str:
        """What chooses now: the prior alone, Q with its β, or nothing; and what speaks for Q."""
        state = f"Q filters, β {self.beta:.2g}"
        if self.beta == math.inf:
            state = "prior only" if self._prior_rejects else "steering off"
        return ": ".join(filter(None, (state, self.temperature.status())))

    def accept_prob(self, offer: Offer) -> Float[Tensor, "n"]:
        """The acceptance probability of each window of the stream."""
        prior = _prior(offer.known, len(offer)) ** self.trust.exponent
        beta = self.beta
        if self._sample is None or beta == math.inf:
            return prior
        # Q of the sample again: φ has moved since its windows were read.
        q = self._values([self._sample, Features.before_forward(offer)])
        ours, sample = q[-len(offer) :], q[: -len(offer)]
        # β can be far below the level of Q: differences first, or they would be lost to rounding.
        level = sample.mean()
        return prior * self.acceptance.prob((ours - level) / beta, (sample - level) / beta)

    def admit(self, step: int, offer: Offer) -> Offer:
        """All windows; the sample takes in what was read."""
        self._see(offer)
        return offer

    def observe(self, step: Step) -> Metrics:
        """The sample takes in what was read, unless `admit` has seen it; temperature and trust learn from the
        effects, before Q does."""
        self._see(step.offer)
        beta, effects = self.beta, step.effects
        metrics = {"policy/beta": beta} if math.isfinite(beta) else {}
        if effects is None:
            return metrics
        effect = effects.effect.cpu()
        if "prior" in effects.features.known:
            metrics |= self.trust.observe(_prior(effects.features.known, len(effect)), effect)
        if self._sample is None:  # the prior accepts nothing: there is nothing that Q could rank
            return metrics
        # Of what the prior accepts: how Q ranks these is what it adds to the prior.
        own = (effects.rows.cpu() < len(step.trained)).nonzero().squeeze(1)
        probed = _seen_before_forward(effects.features).take(own)
        q = self._values([self._sample, probed])
        rows = torch.arange(len(self._sample), len(q))
        metrics |= self.temperature.observe(q, replace(effects, rows=rows, effect=effect[own]))
        return metrics if self.target is None else metrics | self._bound_by_target(self.target(), q)

    def _see(self, offer: Offer) -> None:
        if offer is self._seen:
            return
        self._seen = offer
        for part in offer.judged:
            self._remember(part)

    def _remember(self, offer: Offer) -> None:
        prior = _prior(offer.known, len(offer)) ** self.trust.exponent
        self._prior_rejects = self._prior_rejects or bool((prior < 1).any())
        likely = prior >= 0.5
        if not likely.any():
            return
        new = Features.before_forward(offer).take(likely.nonzero().squeeze(1))
        both = new if self._sample is None else Features.cat([self._sample, new])
        self._sample = both.take(slice(-self.sample_size, None))

    def _bound_by_target(self, score: Float[Tensor, "D"], sample: Float[Tensor, "m"]) -> Metrics:
        """Set the least β; the metric is the share of the target's own windows that Q would accept."""
        assert self._sample is not None
        assert self._sample.source is not None
        count, m = len(score), len(sample)
        kinds = self._sample.source.unique()
        of_target = Features.not_forwarded(
            count * len(kinds), kinds.repeat_interleave(count), {"static_score": score.repeat(len(kinds))}
        )
        by_source = self._values([of_target]).view(-1, count)
        q = torch.cat([sample, by_source[by_source.mean(1).argmax()]]).double()

        def accepted(z: Float[Tensor, "b n"]) -> Float[Tensor, "b"]:
            return self.acceptance.prob(z[:, m:], z[:, :m]).mean(1)

        q = q - q[:m].mean()
        rate = self.min_target_accept_rate
        self._least_beta = (solve_beta(q, rate, accepted) or 0.0) if rate else 0.0
        return {"policy/target_accept_rate": accepted(q[None] / self.beta).item()}

    def _values(self, features: list[Features]) -> Float[Tensor, "n"]:
        q = self.critic.values(Features.cat([_seen_before_forward(f) for f in features]))
        assert q is not None, "a stream is filtered by a critic that has values"
        return q

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict({**state, "sample": None})
        sample = state["sample"]
        self._sample = None if sample is None else Features.from_state_dict(sample)


def _seen_before_forward(features: Features) -> Features:
    """The part of the features that the policy may see, on the CPU, whatever a forward pass has added."""
    source = None if features.source is None else features.source.cpu()
    known = {name: column.cpu() for name, column in features.known.items() if name == "static_score"}
    return Features.not_forwarded(len(features), source, known)


def _prior(known: Mapping[str, Float[Tensor, "n"]], n: int) -> Float[Tensor, "n"]:
    """π₀ of n windows, on the CPU; uniform where nothing is known of them."""
    return known["prior"].double().cpu() if "prior" in known else torch.ones(n, dtype=torch.float64)


def build_filter(
    config: RunConfig,
    sources: int,
    generators: Generators,
    *,
    target: Callable[[], Float[Tensor, "D"]] | None,
) -> tuple[StreamFilter, TDCritic]:
    """The learned filter over so many sources and its critic; `target` as in `StreamFilter`.

    Both lie on the CPU, where what they see of a window is: on a GPU their small operations would wait for
    the model's passes.
    """
    settings = config.critic
    fraction = settings.accept_fraction
    lowest = max(settings.min_accept_fraction, 1 / config.train.max_read_ratio)  # no more can be read
    acceptance = Acceptance(min(ALWAYS_ACCEPT_QUANTILE, fraction, lowest))
    temperature = build_temperature(settings, fraction, share=acceptance, lowest=lowest, memory=1)
    inputs = QInputs(settings.q_features, 0, sources, layer_norm=settings.q_layer_norm)
    critic = TDCritic(settings, inputs, temperature, "cpu", generators, before_forward=True)
    policy = StreamFilter(
        critic,
        temperature,
        acceptance,
        trust=PriorTrust(),
        target=target,
        min_target_accept_rate=settings.min_target_accept_rate,
    )
    return policy, critic


def filtered(
    stream: Unreadable,
    config: RunConfig,
    accept_prob: Callable[[Offer], Float[Tensor, "n"]],
    generators: Generators,
    foreseeable: Foreseeable = never,
) -> FilteredStream:
    """The windows of a stream that a policy accepts, N per step, by rank 0's numbers.

    Args:
        foreseeable: as in `FilteredStream`.
    """

    def of_rank_zero(offer: Offer) -> Float[Tensor, "n"]:
        # Ranks whose probabilities differ in the last bit would, now and then, accept different windows.
        return parallel.from_rank_zero(probabilities(accept_prob, offer))

    return FilteredStream(
        stream,
        config.train.num_candidates,
        max_read_ratio=config.train.max_read_ratio,
        accept_prob=of_rank_zero,
        generator=generators("steer"),
        foreseeable=foreseeable,
    )
