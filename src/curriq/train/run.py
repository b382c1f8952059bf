"""Starts, resumes and opens runs; `train/build.py` puts them together."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch

from curriq import parallel
from curriq.config import (
    RunConfig,
    differences,
    flag,
    load_run_config,
    require,
)
from curriq.data import check_fingerprint, open_corpus, pin_revision
from curriq.lm.load import load_language_model, pick_device
from curriq.rng import Generators
from curriq.runlog.curriculum import open_curriculum
from curriq.select.needle import needle_corpus
from curriq.train.build import Run, Workshop, build_session
from curriq.train.checkpoint import LoadedCheckpoint, latest_checkpoint
from curriq.train.session import RunResult

logger = logging.getLogger("curriq")

FIXED = (
    *("run_dir", "model", "selector", "difficulty", "q_hidden", "q_replay_size"),
    *("proposer", "buffer_size", "encoder", "encoder_precision", "curriculum", "curriculum_weights"),
)
"""Settings that a resume cannot change, beside those of the data, which the fingerprint guards."""


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
    read_ahead = device.type != "cpu" and os.name == "posix"
    corpus = needle_corpus(config) if config.data.needle else open_corpus(config, read_ahead=read_ahead)
    if checkpoint is not None:
        check_fingerprint(checkpoint.state["fingerprint"], corpus.fingerprint())
    # The checkpoint's folder holds the weights and the architecture, so a resume needs no hub.
    lm_config = config.lm if checkpoint is None else dataclasses.replace(config.lm, model=str(checkpoint.lm))
    lm = load_language_model(lm_config, corpus.tokenizer, config.data.window, config.train.seed, device)
    curriculum = open_curriculum(config, corpus.fingerprint(), corpus.source_names)
    workshop = Workshop(config=config, corpus=corpus, lm=lm, generators=generators, curriculum=curriculum)
    session = build_session(workshop)
    if checkpoint is not None:
        session.load(checkpoint)
    return Run(config=config, corpus=corpus, lm=lm, session=session)
