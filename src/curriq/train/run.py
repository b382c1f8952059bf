"""Starts, resumes and opens runs; `train/build.py` puts them together."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from curriq import parallel
from curriq.config import (
    RunConfig,
    differences,
    field_owners,
    flag,
    from_dict,
    load_run_config,
    refuse_unknown,
    require,
)
from curriq.config.effect import set_by_user, without_effect
from curriq.data import Corpus, changed_files, check_fingerprint, locate, open_corpus, pin_revision
from curriq.data.survey import require_usable
from curriq.errors import CurriqError
from curriq.lm.contract import log_own_loss
from curriq.lm.hardware import cpu_threads
from curriq.lm.load import check_model_name, load_language_model, pick_device
from curriq.plugins import changed_code
from curriq.presets import paper_differences
from curriq.rng import Generators
from curriq.runlog.checkpoints import in_training, require_new_run
from curriq.runlog.read import recorded
from curriq.runlog.storage import is_locked
from curriq.select.base import Context
from curriq.train.build import MethodBuilder, Run, build_method, build_session
from curriq.train.checkpoint import LoadedCheckpoint, latest_checkpoint
from curriq.train.result import RunResult
from curriq.train.session import Probe

logger = logging.getLogger("curriq")

FIXED = (
    *("run_dir", "num_candidates", "model", "lora_rank", "lora_alpha", "lora_targets", "lora_dropout"),
    *("selector", "difficulty", "prior", "static_score", "q_hidden", "q_replay_size"),
    *("proposer", "buffer_size", "encoder", "encoder_precision", "curriculum", "curriculum_weights"),
)
"""Settings that a resume cannot change, beside those of the data, which the fingerprint guards."""


@dataclass(frozen=True, kw_only=True)
class Own:
    """Parts of a run that the caller brings, in place of those that the configuration names.

    Attributes:
        method: builds the proposer, the selector and the critic, for instance around a selector of one's own;
            `curriq.select.base` has the types.
        corpus: opens the text.
        probes: measure something of every step for the log, under names that begin with `own/`.
    """

    method: MethodBuilder = build_method
    corpus: Callable[..., Corpus] = open_corpus
    probes: tuple[Probe, ...] = ()


DEFAULT_PARTS = Own()
PARTS = tuple(part.name for part in fields(Own))


def train(config: RunConfig, **own: Any) -> RunResult:
    """Start a run and carry it to its end.

    Args:
        config: of the run.
        own: parts that the caller brings, see `Own`: `method=…`, `corpus=…`, `probes=…`.

    Raises:
        CurriqError: the configuration does not fit the data, the model or the machine; or training
            met a number that is not finite.
    """
    require(
        isinstance(config, RunConfig),
        f"run(config) needs a RunConfig, not {config!r}: curriq.preset('default') gives one.",
    )
    if config.log.run_dir:
        require_new_run(Path(config.log.run_dir))  # before the data are read
    for name in (name for name in own if name in field_owners()):
        raise CurriqError(f"run(config, {name}=…): settings go into the config, config.override({name}=…).")
    refuse_unknown(own, PARTS, "run: ", kind="part")
    return prepare(config, own=Own(**own)).session.train()


def resume(run_dir: str | Path, /, own: Own = DEFAULT_PARTS, **overrides: Any) -> RunResult:
    """Go on with a run from its newest valid checkpoint, bitwise as if it had never stopped.

    Args:
        run_dir: folder of the run.
        own: the parts that the caller brought when it started; or each by its name, as for `run`.
        overrides: settings to change from here on by flat name, for instance `steps=600` or
            `lm_lr=1e-4`. The result is then that of another run, of course.

    Raises:
        CurriqError: no usable checkpoint, the data are not those of the run, a setting was changed that a
            resume cannot change, or the run is finished.
    """
    require(not is_locked(Path(run_dir)), in_training(Path(run_dir)))  # before seconds of reading
    return load_run(run_dir, own, **overrides).session.train()


def load_run(run_dir: str | Path, /, own: Own = DEFAULT_PARTS, *, at: str = "", **overrides: Any) -> Run:
    """A run at its newest valid checkpoint, or `at` the one of this name, not trained on; it raises as
    `resume` does, but opens a finished run too, and one that is being trained."""
    run_dir = Path(run_dir)
    own = replace(own, **{name: overrides.pop(name) for name in PARTS if name in overrides})
    saved = load_run_config(run_dir).override(run_dir=str(run_dir))
    config = saved.override(**overrides)
    # With LoRA a random base model is made again from the seed.
    remade = bool(saved.lm.lora_rank) and not saved.lm.pretrained
    fixed = (*FIXED, "seed") if remade else FIXED
    changed = differences(config, saved)
    for name, after, before in changed:
        require(
            name not in fixed,
            f"{flag(name)} = {after!r}: this run has {before!r}, and a resume cannot change it. Leave it "
            "out, or start a new run with `curriq train`.",
        )
    _say_without_effect(config, own, [name for name, _, _ in changed])
    for name in changed_code(recorded(run_dir, "code"), config):
        logger.warning(f"the file of {name} has changed since this run was trained by it.")
    checkpoint = latest_checkpoint(run_dir, at)
    for name, now, then in differences(saved, from_dict(checkpoint.manifest["settings"])):
        if name not in (*overrides, "run_dir"):
            logger.warning(
                f"{flag(name)} = {now!r} in {run_dir / 'config.toml'}; it was {then!r} when the checkpoint "
                f"of step {checkpoint.step} was written."
            )
    try:
        return prepare(config, checkpoint, own)
    except Exception as error:
        if checkpoint.path.exists():
            raise
        raise CurriqError(
            f"{run_dir} is being trained: its checkpoint of step {checkpoint.step} gave way to a newer one "
            "while it was read. Call again, or wait for the end of the run."
        ) from error


def _check_names(config: RunConfig) -> None:
    """Refuse names of models that cannot exist, before anything is read."""
    check_model_name(config.lm)
    if config.tokenizer.tokenizer not in ("auto", "train"):
        locate("--tokenizer", config.tokenizer.tokenizer)
    if config.select.reference_model:
        try:
            locate("--reference-model", config.select.reference_model)
        except CurriqError as error:
            raise CurriqError(f"{error} `curriq train --preset reference` trains one.") from None


def prepare(config: RunConfig, checkpoint: LoadedCheckpoint | None = None, own: Own = DEFAULT_PARTS) -> Run:
    """A run that is built and not started, in the state of the checkpoint when there is one."""
    parallel.start()
    require_memory(config)
    if config.train.threads > 4 * parallel.cores():
        logger.warning(f"--threads = {config.train.threads}: this machine has {parallel.cores()} cores.")
    device = pick_device(config.lm.device)
    config = config.override(threads=config.train.threads or cpu_threads(device))
    torch.set_num_threads(config.train.threads)
    if checkpoint is None:
        if own.corpus is open_corpus:
            require_usable(config)
        _check_names(config)
        # The configuration names the commits of hub data sets, so that a resume reads the same ones.
        config = config.override(sources=tuple(map(pin_revision, config.data.sources)))
        if differences_from_paper := paper_differences(config):
            logger.info("follows the paper's lines, except: " + "; ".join(differences_from_paper) + ".")
        _say_without_effect(config, own, set_by_user(config))
    elif checkpoint.manifest["threads"] != config.train.threads:
        logger.warning(
            f"--threads = {config.train.threads}: the checkpoint was written with "
            f"{checkpoint.manifest['threads']}, so the last bits of what follows will differ from those of "
            "an uninterrupted run."
        )
    corpus = own.corpus(config, read_ahead=device.type != "cpu" and os.name == "posix")
    require(
        parallel.all_equal(json.dumps(corpus.fingerprint(), sort_keys=True).encode()),
        "the processes of this run read different text: --sources must name the same files on every machine.",
    )
    if checkpoint is not None:
        changed = changed_files(recorded(Path(config.log.run_dir), "files"), corpus.files)
        check_fingerprint(checkpoint.state["fingerprint"], corpus.fingerprint(), changed)
    saved = None if checkpoint is None else checkpoint.lm
    seed, window = config.train.seed, config.data.window
    lm = load_language_model(config.lm, corpus.tokenizer, window, seed, device, saved)
    if checkpoint is None:
        log_own_loss(lm, corpus.held_out.validation.take(slice(2)))
    context = Context(corpus=corpus, lm=lm, generators=Generators(config.train.seed))
    session = build_session(config, context, own.method, own.probes)
    if checkpoint is not None:
        _require_method(session.method, checkpoint.manifest)
        session.load(checkpoint)
    return Run(config=config, corpus=corpus, lm=lm, session=session)


def _say_without_effect(config: RunConfig, own: Own, names: list[str]) -> None:
    """Warn of the named settings that the run does not read; a method of the caller's own may read any."""
    for sentence in without_effect(config, names) if own.method is build_method else ():
        logger.warning(f"{sentence}.")


def _require_method(method: str, manifest: dict[str, Any]) -> None:
    """Refuse to go on with another method than that of the run, as without the one that was brought."""
    trained = manifest.get("method", method)  # earlier versions did not write it down
    require(
        trained == method,
        f"this run is one of the method {trained}, and would go on with {method}. Bring what its settings do "
        f"not name: curriq.resume(folder, method={trained}).",
    )


def require_memory(config: RunConfig) -> None:
    """Raise CurriqError, before any is filled, for a store of windows that the memory cannot hold."""
    stores = ["shuffle_buffer", "reward_set_size", "validation_set_size", "test_set_size", "num_candidates"]
    if config.langevin.proposer != "stream":
        stores.append("buffer_size")
    for name in stores:
        taken, memory = 4 * config.value(name) * config.data.window, parallel.memory_bytes()
        require(
            taken <= memory,
            f"{flag(name)} = {config.value(name)}: these windows of {config.data.window} tokens take "
            f"{taken / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB: lower it, or --window.",
        )
