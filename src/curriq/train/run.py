"""Builds a run from its configuration: the only file that knows the concrete classes."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from curriq import parallel
from curriq.config import (
    RunConfig,
    SelectorName,
    TokenizerConfig,
    differences,
    flag,
    load_run_config,
    require,
)
from curriq.data import Corpus, check_fingerprint, open_corpus, pin_revision
from curriq.data.curriculum import Curriculum, open_curriculum
from curriq.data.tokenizer import load_tokenizer, serialised
from curriq.errors import CurriqError
from curriq.lm.flops import forward_flops, trunk_flops
from curriq.lm.harness import Harness
from curriq.lm.learner import Learner, ReforwardedHidden
from curriq.lm.loss import window_losses
from curriq.lm.model import LanguageModel, load_language_model, pick_device
from curriq.lm.reward import HeldOutReward, held_out_loss
from curriq.propose.curriculum import CurriculumProposer
from curriq.propose.needle import NeedleProposer, needle_corpus
from curriq.propose.stream import StreamProposer
from curriq.rng import Generators
from curriq.select import (
    ByLoss,
    Competence,
    ExcessLoss,
    RandomK,
    SoftQ,
    SourceBandit,
    Uncertainty,
    Uniform,
    UniformUntil,
)
from curriq.select.difficulty import (
    Difficulty,
    LabelDifficulty,
    LabelOrRarity,
    LengthDifficulty,
    RarityDifficulty,
    token_characters,
)
from curriq.select.replay import Replay
from curriq.softq.critic import NoCritic, TDCritic, stored_hidden
from curriq.train.card import write_card
from curriq.train.checkpoint import LoadedCheckpoint, latest_checkpoint
from curriq.train.loop import Components, LoopState
from curriq.train.meter import Meter, NeedleProbe, Stopwatch
from curriq.train.phases import resets
from curriq.train.session import Probe, RunResult, Session
from curriq.train.tasks import TaskProbe
from curriq.types import Critic, Metrics, Proposer, Selector

logger = logging.getLogger("curriq")

FIXED = (
    "run_dir",
    "model",
    "selector",
    "curriculum",
    "curriculum_weights",
    "difficulty",
    "q_hidden",
    "replay_size",
)
"""Settings that a resume cannot change, beside those of the data, which the fingerprint guards."""


@dataclass(kw_only=True)
class Workshop:
    """What the builders below share."""

    config: RunConfig
    corpus: Corpus
    lm: LanguageModel
    generators: Generators
    curriculum: Curriculum | None = None
    critic: Critic = dataclasses.field(default_factory=NoCritic)
    extra_flops_per_window: int = 0
    flops_per_td_update: int = 0


def train(config: RunConfig) -> RunResult:
    """Start a run and carry it to its end.

    Returns:
        Its folder, its summary, and the language model.

    Raises:
        CurriqError: the configuration does not fit the data, the model or the machine; or training
            met a number that is not finite.
    """
    return prepare(config).session.train()


def resume(run_dir: str | Path, /, **overrides: Any) -> RunResult:
    """Go on with a run from its newest valid checkpoint, bitwise as if it had never stopped.

    Args:
        run_dir: folder of the run.
        overrides: settings to change from here on by flat name, for instance `steps=600` or
            `lm_lr=1e-4`. The result is then that of another run, of course.

    Raises:
        CurriqError: no usable checkpoint, the data are not those of the run, a setting was changed that a
            resume cannot change, or the run is finished.
    """
    return load_run(run_dir, **overrides).session.train()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is built and ready: for inspection, or for `session.train()`."""

    config: RunConfig
    corpus: Corpus
    lm: LanguageModel
    session: Session


def load_run(run_dir: str | Path, /, **overrides: Any) -> Run:
    """Open a run at its newest valid checkpoint, without training on.

    Raises:
        CurriqError: as `resume`.
    """
    run_dir = Path(run_dir)
    saved = load_run_config(run_dir).override(run_dir=str(run_dir))
    config = saved.override(**overrides)
    for name, after, before in differences(config, saved):
        require(
            name not in FIXED,
            f"{flag(name)} = {after!r}: this run has {before!r}, and a resume cannot change it. Leave it "
            "out, or start a new run with `curriq train`.",
        )
    return prepare(config, latest_checkpoint(run_dir))


def prepare(config: RunConfig, checkpoint: LoadedCheckpoint | None = None) -> Run:
    """Build a run without starting it, from a checkpoint when there is one.

    Without one, hub data sets are pinned: the configuration of the run names the commits that it reads, so
    that a resume reads them too, whatever the hub has by then.
    """
    parallel.start()
    config = config.override(threads=config.train.threads or parallel.cores())
    torch.set_num_threads(config.train.threads)
    if checkpoint is None:
        config = config.override(sources=tuple(map(pin_revision, config.data.sources)))
    if checkpoint is not None and checkpoint.manifest["threads"] != config.train.threads:
        logger.warning(
            f"--threads = {config.train.threads}: the checkpoint was written with "
            f"{checkpoint.manifest['threads']}, so the last bits of what follows will differ from those of "
            "an uninterrupted run."
        )
    device = pick_device(config.lm.device)
    generators = Generators(config.train.seed)
    corpus = needle_corpus(config) if config.data.needle else open_corpus(config)
    if checkpoint is not None:
        check_fingerprint(checkpoint.state["fingerprint"], corpus.fingerprint())
    # The checkpoint's folder holds the weights and the architecture, so a resume needs no hub.
    lm_config = config.lm if checkpoint is None else dataclasses.replace(config.lm, model=str(checkpoint.lm))
    lm = load_language_model(lm_config, corpus.tokenizer, config.data.window, config.train.seed, device)
    curriculum = open_curriculum(config, corpus.fingerprint(), corpus.source_names)
    workshop = Workshop(config=config, corpus=corpus, lm=lm, generators=generators, curriculum=curriculum)
    session = _session(workshop)
    if checkpoint is not None:
        session.load(checkpoint)
    return Run(config=config, corpus=corpus, lm=lm, session=session)


def _session(shop: Workshop) -> Session:
    config = shop.config
    sizes = {"micro_batch": config.optim.micro_batch, "chunk_tokens": config.optim.head_chunk_tokens}
    learner = Learner(shop.lm, config.optim, config.train.steps)
    clock = Stopwatch()
    reward = HeldOutReward(
        shop.lm,
        shop.corpus.held_out.reward,
        config.train.reward_windows,
        shop.generators("reward"),
        **sizes,
    )
    flops = forward_flops(shop.lm, config.data.window)
    selector = SELECTORS[config.select.selector](shop) if config.method != "replay" else _replay(shop)
    if config.train.q_warmup_steps:
        selector = UniformUntil(selector, config.train.q_warmup_steps)
    components = Components(
        proposer=_proposer(shop),
        selector=selector,
        critic=shop.critic,
        learner=learner,
        measure_reward=clock.timed("time/reward", reward.measure),
        resets=resets(config.train),
        action_generator=shop.generators("action"),
    )
    meter = Meter(
        shop.corpus.source_names,
        window=config.data.window,
        forward_flops=flops,
        passes=learner.passes,
        reward_windows=config.train.reward_windows,
        extra_flops_per_window=shop.extra_flops_per_window + _recomputed_flops(shop),
        flops_per_td_update=shop.flops_per_td_update,
    )
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
        "windows seen": meter.windows_seen,
        "tokens": meter.windows_trained * shop.config.data.window,
        "FLOPs": meter.flops,
    }
    if session.last_validation is not None:
        facts["validation loss"] = session.last_validation
    write_card(folder, shop.config, facts)


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


def _proposer(shop: Workshop) -> Proposer:
    n = shop.config.train.num_candidates
    if shop.curriculum is not None:
        return CurriculumProposer(shop.curriculum, shop.corpus.source_names)
    if shop.config.data.needle:
        return NeedleProposer(shop.corpus, n, shop.generators("needle"))
    return StreamProposer(shop.corpus.stream, n)


def _recomputed_flops(shop: Workshop) -> int:
    """Gradient checkpointing forwards the trunk of a window once more for its backward pass."""
    return trunk_flops(shop.lm, shop.config.data.window) if shop.config.lm.gradient_checkpointing else 0


def _soft_q(shop: Workshop) -> Selector:
    """The paper's method: the critic learns, and its values weigh the mixture unless told not to."""
    critic = shop.config.critic
    previous_hidden = stored_hidden
    if critic.td_into_theta:
        previous_hidden = ReforwardedHidden(shop.lm, critic.td_lambda)
        trunk = trunk_flops(shop.lm, shop.config.data.window)
        shop.flops_per_td_update = 3 * trunk + _recomputed_flops(shop)
    shop.critic = TDCritic(critic, shop.lm.width, shop.lm.device, shop.generators, previous_hidden)
    return SoftQ(shop.critic, critic.beta) if critic.q_weighting else Uniform()


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
        with reference.measuring():
            losses, _ = window_losses(
                reference, reference.trunk(tokens), tokens, config.optim.head_chunk_tokens
            )
        return losses

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
