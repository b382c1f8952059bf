"""Builds a run from its configuration: what decides, what learns, what measures, and the session."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from curriq import langevin, parallel, select
from curriq.config import SELECTORS, RunConfig
from curriq.data import Corpus
from curriq.data.shards import ShardedStream
from curriq.data.tokenizer import serialised
from curriq.lm.beside import Beside
from curriq.lm.hardware import peak_flops
from curriq.lm.harness import Harness
from curriq.lm.held_out import build_probe, build_reward, held_out_loss, held_out_losses
from curriq.lm.learner import Learner
from curriq.lm.mixture import gumbel_top, one_action
from curriq.lm.model import LanguageModel, forward_flops, trunk_flops
from curriq.select.base import Context, Method, UniformUntil
from curriq.select.own import OwnProbe, OwnSelector, require_method
from curriq.softq.signal import CreditSignal
from curriq.train.loop import (
    Components,
    HeldOut,
    LoopState,
    NoHeldOut,
    SampledAction,
    theta_reset_schedule,
    trained_action,
)
from curriq.train.meter import Meter, TaskProbe
from curriq.train.model_card import model_card
from curriq.train.session import Probe, Session
from curriq.train.topic import build_topic_similarity
from curriq.types import Cost, Metrics

MethodBuilder = Callable[[RunConfig, Context], Method]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is built and ready: for inspection, or for `session.train()`."""

    config: RunConfig
    corpus: Corpus
    lm: LanguageModel
    session: Session


def build_method(config: RunConfig, context: Context) -> Method:
    """The selector that the configuration names, on the windows that it asks for."""
    method = require_method(select.builder(config.method)(config, context), f"--selector {config.method}")
    if config.langevin.proposer != "stream":
        method = langevin.build(method, config, context)
    if config.data.curriculum and config.method != "replay":
        method = select.reorder(method, config, context)
    return method


def build_session(
    config: RunConfig, context: Context, builder: MethodBuilder, probes: tuple[Probe, ...] = ()
) -> Session:
    """Everything of a run, ready to start, or to be put into the state of a checkpoint."""
    corpus, lm, train = context.corpus, context.lm, config.train
    name = config.method if builder is build_method else getattr(builder, "__name__", "own")
    method = require_method(builder(config, context), f"method={name}")
    flops = _flops(config, lm)  # before θ may be cut into shards
    learner = _learner(config, context)
    held_out = _held_out(config, context, method, learner)
    own = builder is not build_method or name not in (*SELECTORS, "replay")
    selector = OwnSelector(method.selector) if own else method.selector
    if train.q_warmup_steps:
        selector = UniformUntil(selector, train.q_warmup_steps)
    components = Components(
        proposer=method.proposer,
        selector=selector,
        critic=method.critic,
        learner=learner,
        held_out=held_out,
        theta_resets=theta_reset_schedule(
            always=train.reset_theta, warmup=train.q_warmup_steps, period=train.alternating_period
        ),
        act=trained_action if train.train_on == "action" else _sampled(method, context),
        beside=partial(Beside, device=lm.device),
        # Ranks send each other what they propose, and the messages would wait for the gradient's.
        proposes_early=lm.device.type == "cuda" and parallel.world_size() == 1,
    )
    session = Session(
        config=config,
        method=name,
        own_method=own,
        components=components,
        state=LoopState(),
        meter=_meter(config, context, method, learner, flops),
        probes=[
            *build_topic_similarity(config, corpus),
            *_task_probes(config, context),
            *map(OwnProbe, probes),
        ],
        generators=context.generators,
        fingerprint=corpus.fingerprint(),
        files={name: asdict(state) for name, state in corpus.files.items()},
        skipped_rows=corpus.skipped_rows,
        save_lm=lambda folder: _save_lm(context, session, folder),
        validate=lambda: held_out_loss(lm, corpus.held_out.validation),
        test=lambda: held_out_losses(lm, corpus.held_out.test),
        device=lm.device,
        shared=method.shared,
        replicas=() if lm.engine.sharded else lm.parameters,
        sharded=lm.engine.sharded,
        collective=isinstance(corpus.stream, ShardedStream),
        lm_parts=lm.parts,
        load_lm=lm.load_parts,
        tokenizer=serialised(corpus.tokenizer),
    )
    return session


def _sampled(method: Method, context: Context) -> SampledAction:
    return SampledAction(method.critic, context.generators("action"))


def _learner(config: RunConfig, context: Context) -> Learner:
    draw = None
    if subset := config.train.train_subset_size:
        draw = gumbel_top(subset, context.generators("subset"))
    if config.train.train_on == "action":
        draw = one_action(context.generators("action"))
    own_td_step = config.critic.td_into_theta and config.critic.td_step == "own"
    return Learner(
        context.lm,
        config.optim,
        config.train.steps,
        draw=draw,
        own_td_step=own_td_step,
        engine=config.lm.engine,
    )


def _flops(config: RunConfig, lm: LanguageModel) -> tuple[int, int]:
    """Operations of a window's forward pass, and those repeated for its backward pass: under gradient
    checkpointing the trunk is forwarded once more."""
    window = config.data.window
    return forward_flops(lm, window), trunk_flops(lm, window) if config.lm.gradient_checkpointing else 0


def _meter(
    config: RunConfig, context: Context, method: Method, learner: Learner, flops: tuple[int, int]
) -> Meter:
    forward, recomputed = flops
    return Meter(
        context.corpus.source_names,
        window=config.data.window,
        forward_flops=forward,
        passes=learner.passes,
        trains=config.drawn or None,
        cost_per_window=method.cost + Cost(extra_flops=recomputed),
        peak_flops=_peak(config, context.lm),
        signal=CreditSignal(),
    )


def _peak(config: RunConfig, lm: LanguageModel) -> float | None:
    """Peak of all devices of the run, operations per second."""
    told = 1e12 * config.log.peak_tflops
    one = told or peak_flops(lm.device, config.lm.precision)
    return one and one * parallel.world_size()


def _held_out(config: RunConfig, context: Context, method: Method, learner: Learner) -> HeldOut:
    """Rewards where the critic or the selector needs them, and effects where credit needs those."""
    if not (method.critic.needs_reward or method.selector.needs_reward):
        return NoHeldOut()
    reward = build_reward(config, context.lm, context.corpus.held_out.reward, context.generators)
    credit = config.critic
    effects = method.critic.needs_reward and (credit.credit == "counterfactual" or credit.measure_effects)
    if not effects:
        return reward
    probe = build_probe(config, learner, reward, context.generators)
    context.lm.recurring = probe.sizes
    return probe


def _task_probes(config: RunConfig, context: Context) -> list[Probe]:
    """Built before the first step, so that an unknown task is refused before any work."""
    tasks = config.tasks
    if not tasks.eval_tasks:
        return []
    harness = Harness(
        context.lm,
        context.corpus.tokenizer,
        tasks.eval_tasks,
        limit=tasks.eval_tasks_limit or None,
        fewshot=None if tasks.eval_tasks_fewshot < 0 else tasks.eval_tasks_fewshot,
        path=tasks.eval_tasks_path,
        batch_size=config.optim.windows_at_once,
    )
    return [TaskProbe(harness.scores, tasks, config.train.steps)]


def _save_lm(context: Context, session: Session, folder: Path) -> None:
    """Weights, tokenizer and model card."""
    context.lm.save(folder, context.corpus.tokenizer)
    totals = session.meter.totals()
    facts: Metrics = {
        "steps": session.state.step,
        "windows read": totals["windows_read"],
        "windows proposed": totals["windows_proposed"],
        "tokens": totals["tokens"],
        "FLOPs": totals["flops"],
    }
    if session.last_validation is not None:
        facts["validation loss"] = session.last_validation
    card = model_card(session.config, facts, session.meter.shares())
    (folder / "README.md").write_text(card, encoding="utf-8")
