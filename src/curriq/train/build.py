"""Builds a run from its configuration: the only file that knows the concrete classes."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from curriq.config import (
    CriticConfig,
    RunConfig,
    SelectorName,
    TokenizerConfig,
    require,
)
from curriq.data import Corpus
from curriq.data.stream import StreamProposer, Windows
from curriq.data.tokenizer import load_tokenizer, serialised
from curriq.errors import CurriqError
from curriq.langevin.build import buffer_proposer
from curriq.langevin.energy import QFunction
from curriq.lm.flops import forward_flops, trunk_flops
from curriq.lm.harness import Harness
from curriq.lm.held_out import EffectProbe, HeldOutReward, NoReward, held_out_loss, window_losses_of
from curriq.lm.learner import Learner, ReforwardedAction
from curriq.lm.load import load_language_model
from curriq.lm.mixture import gumbel_top, subset_pass
from curriq.lm.model import LanguageModel
from curriq.rng import Generators
from curriq.runlog.curriculum import Curriculum
from curriq.select import (
    ByLoss,
    Competence,
    DirichletNoise,
    ExcessLoss,
    RandomK,
    SoftQ,
    SourceBandit,
    Uncertainty,
    Uniform,
    UniformUntil,
)
from curriq.select.competence import (
    Difficulty,
    LabelDifficulty,
    LabelOrRarity,
    LengthDifficulty,
    RarityDifficulty,
    token_characters,
)
from curriq.select.needle import NeedleProposer
from curriq.select.recorded import CurriculumProposer, Replay
from curriq.select.stream_filter import DsirStream, FilteredStream, StreamFilter
from curriq.softq.critic import NoCritic, TDCritic, stored_action
from curriq.softq.features import QInputs
from curriq.softq.temperature import (
    ALWAYS_ACCEPT_QUANTILE,
    Acceptance,
    CalibrationGate,
    FixedBeta,
    FixedFraction,
    LearnedBeta,
    SolvedBeta,
    Temperature,
    effective_batch_fraction,
)
from curriq.train.loop import Components, HeldOut, LoopState, resets
from curriq.train.meter import Meter, NeedleProbe, Stopwatch
from curriq.train.model_card import write_model_card
from curriq.train.session import Probe, Session
from curriq.train.tasks import TaskProbe
from curriq.types import Critic, Metrics, Proposer, Selector


@dataclass(kw_only=True)
class Workshop:
    """What the builders below share."""

    config: RunConfig
    corpus: Corpus
    lm: LanguageModel
    generators: Generators
    curriculum: Curriculum | None = None
    stream: Windows = dataclasses.field(init=False)
    critic: Critic = dataclasses.field(default_factory=NoCritic)
    extra_flops_per_window: int = 0
    steering: StreamFilter | None = None
    flops_per_td_update: int = 0

    def __post_init__(self) -> None:
        self.stream = self.corpus.stream

    @property
    def sizes(self) -> dict[str, int]:
        """Pieces in which windows are forwarded."""
        optim = self.config.optim
        return {"micro_batch": optim.micro_batch, "chunk_tokens": optim.head_chunk_tokens}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is built and ready: for inspection, or for `session.train()`."""

    config: RunConfig
    corpus: Corpus
    lm: LanguageModel
    session: Session


def build_session(shop: Workshop) -> Session:
    """Everything of a run, ready to start, or to be put into the state of a checkpoint."""
    config = shop.config
    subset = config.train.train_subset_size
    learner = Learner(
        shop.lm,
        config.optim,
        config.train.steps,
        mixture_pass=subset_pass(gumbel_top(subset, shop.generators("subset"))) if subset else None,
    )
    clock = Stopwatch()
    flops = forward_flops(shop.lm, config.data.window)
    selector = SELECTORS[config.select.selector](shop) if config.method != "replay" else _replay(shop)
    if config.train.q_warmup_steps:
        selector = UniformUntil(selector, config.train.q_warmup_steps)
    components = Components(
        proposer=_proposer(shop),
        selector=selector,
        critic=shop.critic,
        learner=learner,
        held_out=clock.around(_held_out(shop, learner, selector)),
        resets=resets(config.train),
        action_generator=shop.generators("action"),
    )
    meter = Meter(
        shop.corpus.source_names,
        window=config.data.window,
        forward_flops=flops,
        passes=learner.passes,
        trains=subset or None,
        extra_flops_per_window=shop.extra_flops_per_window + _recomputed_flops(shop),
        flops_per_td_update=shop.flops_per_td_update,
    )
    sizes = shop.sizes
    probes: list[Probe] = [clock]
    if config.tasks.eval_tasks:
        probes.append(_task_probe(shop))
    if config.data.needle:
        probes.append(NeedleProbe(shop.corpus.source_names.index("needle")))
    session = Session(
        config=config,
        components=components,
        state=LoopState(),
        meter=meter,
        probes=probes,
        generators=shop.generators,
        fingerprint=shop.corpus.fingerprint(),
        save_lm=lambda folder: _save_lm(shop, session, folder),
        validate=lambda: held_out_loss(shop.lm, shop.corpus.held_out.validation, **sizes),
        test=lambda: held_out_loss(shop.lm, shop.corpus.held_out.test, **sizes),
        device=shop.lm.device,
        tokenizer=serialised(shop.corpus.tokenizer),
    )
    return session


def _save_lm(shop: Workshop, session: Session, folder: Path) -> None:
    """Weights, tokenizer and model card."""
    shop.lm.save(folder, shop.corpus.tokenizer)
    meter = session.meter
    facts: Metrics = {
        "steps": session.state.step,
        "windows read": meter.windows_read,
        "windows seen": meter.windows_proposed,
        "tokens": meter.windows_trained * shop.config.data.window,
        "FLOPs": meter.flops,
    }
    if session.last_validation is not None:
        facts["validation loss"] = session.last_validation
    write_model_card(folder, shop.config, facts, meter.shares())


def _replay(shop: Workshop) -> Selector:
    assert shop.curriculum is not None
    return Replay(shop.curriculum)


def _task_probe(shop: Workshop) -> Probe:
    """Built before the first step, so that an unknown task is refused before any work."""
    tasks = shop.config.tasks
    harness = Harness(
        shop.lm,
        shop.corpus.tokenizer,
        tasks.eval_tasks,
        limit=tasks.eval_tasks_limit or None,
        fewshot=None if tasks.eval_tasks_fewshot < 0 else tasks.eval_tasks_fewshot,
        path=tasks.eval_tasks_path,
        batch_size=shop.config.optim.micro_batch,
    )
    return TaskProbe(harness, tasks, shop.config.train.steps)


def _held_out(shop: Workshop, learner: Learner, selector: Selector) -> HeldOut:
    """Rewards where the critic or the selector needs them, and effects where credit needs those."""
    train, critic = shop.config.train, shop.config.critic
    if not (shop.critic.needs_reward or selector.needs_reward):
        return NoReward()
    reward = HeldOutReward(
        shop.lm,
        shop.corpus.held_out.reward,
        train.reward_windows,
        shop.generators("reward"),
        every=train.reward_every,
        paired=train.reward == "paired",
        **shop.sizes,
    )
    if not (shop.critic.needs_reward and critic.credit == "counterfactual"):
        return reward
    return EffectProbe(
        learner,
        reward,
        windows=critic.probe_windows,
        decay=critic.probe_decay,
        generator=shop.generators("probe"),
        shuffle=critic.shuffle_effects,
        **shop.sizes,
    )


def _proposer(shop: Workshop) -> Proposer:
    n = shop.config.train.num_candidates
    if shop.curriculum is not None:
        return CurriculumProposer(shop.curriculum, shop.corpus.source_names)
    if shop.config.data.needle:
        return NeedleProposer(shop.corpus, n, shop.generators("needle"))
    if shop.config.langevin.proposer != "stream":
        q, parameters = differentiable_q(shop.critic)
        return buffer_proposer(shop.config, shop.corpus, shop.lm, shop.generators, q, parameters)
    return StreamProposer(shop.stream, n) if shop.steering is None else _steered(shop, shop.steering)


def _steered(shop: Workshop, steering: StreamFilter) -> Proposer:
    """In the steps that probe effects half of the windows are a fair sample: Q is judged by these, and a
    source that is passed over today is looked at again."""
    train = shop.config.train
    return FilteredStream(
        shop.stream,
        train.num_candidates,
        most=train.max_read_ratio,
        probability=steering.probability,
        num_unfiltered=lambda k: math.ceil(train.num_candidates / 2) if k % train.reward_every == 0 else 0,
        generator=shop.generators("steer"),
    )


def differentiable_q(critic: Critic) -> tuple[QFunction | None, list[nn.Parameter]]:
    """Q_φ with a gradient into the features, and φ; nothing without a critic that learns."""
    if not isinstance(critic, TDCritic):
        return None, []
    return critic.differentiable, list(critic.online.parameters())


def _recomputed_flops(shop: Workshop) -> int:
    """Gradient checkpointing forwards the trunk of a window once more for its backward pass."""
    return trunk_flops(shop.lm, shop.config.data.window) if shop.config.lm.gradient_checkpointing else 0


def _soft_q(shop: Workshop) -> Selector:
    """The paper's method: the critic learns, and its values weigh the mixture unless told not to."""
    critic = shop.config.critic
    previous_action = stored_action
    if critic.td_into_theta:
        previous_action = ReforwardedAction(shop.lm, critic.td_lambda)
        trunk = trunk_flops(shop.lm, shop.config.data.window)
        shop.flops_per_td_update = 3 * trunk + _recomputed_flops(shop)
    corpus = shop.corpus
    sources = len(corpus.source_names)
    inputs = QInputs(critic.q_features, shop.lm.width, sources, layer_norm=critic.q_layer_norm)
    steers = shop.config.train.max_read_ratio > 1
    acceptance = Acceptance(min(ALWAYS_ACCEPT_QUANTILE, critic.accept_fraction))
    solve: Solve = {"share": acceptance, "memory": 1} if steers else {"share": effective_batch_fraction}
    fraction = critic.accept_fraction if steers else critic.effective_batch_fraction
    temperature = TEMPERATURES[critic.temperature](critic, fraction, solve)
    shop.critic = TDCritic(critic, inputs, temperature, shop.lm.device, shop.generators, previous_action)
    target = None
    if "dsir_score" in critic.q_features:
        shop.stream = dsir_score = DsirStream(corpus.stream, corpus.held_out.reward, shop.lm.device)
        target = dsir_score.of_target
    if steers:
        keep = critic.min_target_accept_rate
        shop.steering = StreamFilter(shop.critic, temperature, acceptance, target=target, keep=keep)
        return shop.steering
    selector: Selector = SoftQ(shop.critic, temperature, critic.uniform_share)
    if not critic.q_weighting:
        selector = Uniform()
    return (
        DirichletNoise(selector, critic.dirichlet_concentration, shop.generators("jitter"))
        if critic.dirichlet_concentration
        else selector
    )


def _random(k: int | None = None) -> Callable[[Workshop], Selector]:
    return lambda shop: RandomK(k or shop.config.select.random_k, shop.generators("random-k"))


def _by_loss(sign: Literal[1, -1]) -> Callable[[Workshop], Selector]:
    return lambda shop: ByLoss(shop.config.select.selector_temperature, sign)


def _competence(shop: Workshop) -> Selector:
    select = shop.config.select
    total = select.competence_steps or max(1, shop.config.train.steps // 2)
    return Competence(DIFFICULTIES[select.difficulty](shop), total, select.competence_initial)


def _excess_loss(shop: Workshop) -> Selector:
    """RHO: losses under a second model, frozen, of the same vocabulary."""
    config = shop.config
    reference_config = dataclasses.replace(config.lm, model=config.select.reference_model, dropout=0.0)
    try:
        reference = load_language_model(
            reference_config, shop.corpus.tokenizer, config.data.window, config.train.seed, shop.lm.device
        )
        theirs = load_tokenizer(TokenizerConfig(tokenizer=config.select.reference_model), config.lm, list)
    except CurriqError as error:
        # The loaders speak of --model and of training from scratch, which is no way out here.
        reason = (str(error.__cause__ or error).strip().splitlines() or [""])[0].rstrip(" .")
        raise CurriqError(
            f"--reference-model {config.select.reference_model!r} cannot be used "
            f"({reason.replace('--model', '--reference-model')}). Give the folder or hub name of a trained "
            "causal language model with its tokenizer; `curriq train --preset reference` trains one."
        ) from error
    require(
        shop.corpus.tokenizer.get_vocab() == theirs.get_vocab(),
        f"--reference-model {config.select.reference_model!r} was trained with another tokenizer than this "
        "run uses, so its losses cannot be compared: train the reference with this run's --tokenizer and "
        "sources.",
    )
    shop.extra_flops_per_window = forward_flops(reference, config.data.window)

    def reference_loss(tokens: torch.Tensor) -> torch.Tensor:
        return window_losses_of(reference, tokens, **shop.sizes)

    return ExcessLoss(reference_loss, config.select.selector_temperature)


def _bandit(shop: Workshop) -> Selector:
    select = shop.config.select
    return SourceBandit(
        shop.corpus.source_names, select.bandit_exploration, select.bandit_lr, shop.generators("bandit")
    )


SELECTORS: dict[SelectorName, Callable[[Workshop], Selector]] = {
    "soft-q": _soft_q,
    "uniform": lambda shop: Uniform(),
    "random-single": _random(1),
    "random-k": _random(),
    "high-loss": _by_loss(+1),
    "low-loss": _by_loss(-1),
    "uncertainty": lambda shop: Uncertainty(shop.config.select.selector_temperature),
    "competence": _competence,
    "rho": _excess_loss,
    "bandit": _bandit,
}
"""The values of `--selector`."""

DIFFICULTIES: dict[str, Callable[[Workshop], Difficulty]] = {
    "auto": lambda shop: LabelOrRarity(shop.lm.vocab_size),
    "label": lambda shop: LabelDifficulty(),
    "length": lambda shop: LengthDifficulty(
        token_characters(lambda ids: str(shop.corpus.tokenizer.decode(ids)), shop.lm.vocab_size)
    ),
    "rarity": lambda shop: RarityDifficulty(shop.lm.vocab_size),
}
"""The values of `--difficulty`."""

Solve = dict[str, Any]
"""What β is solved for: weights of a batch, or the share of the stream taken (`StreamFilter` remembers it)."""

TEMPERATURES: dict[str, Callable[[CriticConfig, float, Solve], Temperature]] = {
    "fixed": lambda critic, fraction, solve: FixedBeta(critic.beta),
    "fraction": lambda critic, fraction, solve: SolvedBeta(FixedFraction(fraction), **solve),
    "gated": lambda critic, fraction, solve: SolvedBeta(
        CalibrationGate(fraction, full=critic.corr_for_full_sharpness), **solve
    ),
    "learned": lambda critic, fraction, solve: LearnedBeta(
        FixedFraction(fraction), critic.beta, critic.beta_lr
    ),
}
"""The values of `--temperature`."""
