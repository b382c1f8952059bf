"""What a run will cost, from a few steps of it: time, memory and disk."""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from curriq.config import RunConfig
from curriq.errors import CurriqError
from curriq.train.build import Run
from curriq.train.meter import held_out_seconds
from curriq.types import Metrics

log = logging.getLogger("curriq")

TIMED_STEPS = 3
"""Steps that are timed, after one that pays for what is allocated or read once."""
REHEARSED_FILL = 1024
"""Windows that a buffer is filled with at the most to estimate how long it takes to fill it."""
BYTES_PER_CANDIDATE = 30
"""Of a line of the candidates table on the disk: ids do not compress."""
BYTES_PER_TOKEN = 2
"""Of a logged token on the disk, for vocabularies below 65,536."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of a whole run.

    Attributes:
        timed_steps: steps that the estimate rests on.
        seconds_per_step: wall time, with the share of a step in the measurements that only some steps have.
        startup_seconds: what the first step took beyond that, such as reading ahead for a static filter.
        evaluation_seconds: of one evaluation on the validation set.
        seconds: of all steps and evaluations; without start-up of the program and saving.
        peak_memory_bytes: most memory so far, see `memory/peak`; None where the system does not say.
        checkpoint_bytes: of one checkpoint.
        log_bytes: of the whole log.
        disk_bytes: of the log and of all checkpoints, the one that is being written included.
        initial_validation_loss: of the model as it is, nats per token.
    """

    timed_steps: int
    seconds_per_step: float
    startup_seconds: float
    evaluation_seconds: float
    seconds: float
    peak_memory_bytes: float | None
    checkpoint_bytes: int
    log_bytes: int
    disk_bytes: int
    initial_validation_loss: float


def estimate(run: Run) -> Estimate:
    """The cost of a run that has been built and not started. Its session is used up: build another to train.

    Raises:
        ArithmeticError: a loss or a score is not finite.
        CurriqError: the stream cannot be read, or the model gives no finite loss.
    """
    config, session = run.config, run.session
    log.info(f"timing {TIMED_STEPS} steps of {config.method} …")
    fill = shorten_fill(run)
    initial, evaluation = initial_loss(run)
    rows = session.rehearse(1)
    drop_read_ahead(run)
    rows += session.rehearse(min(TIMED_STEPS, config.train.steps - 1))
    ordinary = [row["time/step"] - held_out_seconds(row) for row in rows]
    usual = median(ordinary[1:] or ordinary)
    measured = [held_out_seconds(row) for row in rows if "time/reward" in row]
    per_step = usual + (measured[-1] / config.train.reward_every if measured else 0.0)
    startup = max(0.0, ordinary[0] - usual)
    return whole_run(run, config, rows, per_step, startup, initial, evaluation, fill)


def shorten_fill(run: Run) -> float:
    """How many times as many windows a buffer takes before the first step as it will take now, at least 1;
    1 without a buffer."""
    shorten = getattr(run.session.components.proposer, "shorten_fill", None)
    return 1.0 if shorten is None else shorten(max(REHEARSED_FILL, run.config.queries))


def past_the_start(config: RunConfig) -> RunConfig:
    """`config` as it is once its sharp start is over, during which steps read more than later; unless most
    steps of the run may belong to that. For a run that is built to be timed."""
    per_step = config.train.num_candidates * config.train.max_read_ratio
    if config.train.steps * per_step < 2 * config.select.sharp_start:
        return config
    return config.override(sharp_start=0)


def drop_read_ahead(run: Run) -> None:
    """Lose the windows that were scored before the first step: the next ones would get them for nothing."""
    drop: Callable[[], None] | None = getattr(run.session.components.proposer, "drop_read_ahead", None)
    if drop is not None:
        drop()


def initial_loss(run: Run) -> tuple[float, float]:
    """The validation loss of the model as it is, nats per token, and the seconds of measuring it; CurriqError
    where it is not finite."""
    began = time.perf_counter()
    initial = run.session.validate()
    if not math.isfinite(initial):
        raise CurriqError(
            f"the validation loss before any training is {initial}: check --model and --precision."
        )
    return initial, time.perf_counter() - began


def whole_run(
    run: Run,
    config: RunConfig,
    rows: list[Metrics],
    per_step: float,
    startup: float,
    initial: float,
    evaluation: float,
    fill: float,
) -> Estimate:
    """The cost of all steps of `config`, from those that have been taken.

    Args:
        rows: of the steps that have been taken, the first one included.
        per_step: seconds of a step.
        startup: seconds of the first step beyond that.
        initial: validation loss before any step.
        evaluation: seconds of one evaluation.
        fill: `shorten_fill` of the run.
    """
    missing = getattr(run.session.components.proposer, "left_out_bytes", 0)
    startup *= fill
    test = evaluation * len(run.corpus.held_out.test) / len(run.corpus.held_out.validation)
    evaluations = evaluation * (1 + config.train.steps / config.log.eval_every) + test
    weights = {id(p): p.numel() * p.element_size() for p in run.lm.network.parameters() if _saved(config, p)}
    checkpoint, exported = run.session.state_bytes() + missing, sum(weights.values())
    if not run.session.sharded:  # else the weights are in the state, and exported once, at the end
        checkpoint, exported = checkpoint + exported, 0
    logged = _log_bytes(config, rows)
    return Estimate(
        timed_steps=max(1, len(rows) - 1),
        seconds_per_step=per_step,
        startup_seconds=startup,
        evaluation_seconds=evaluation,
        seconds=startup + per_step * config.train.steps + evaluations,
        peak_memory_bytes=rows[-1].get("memory/peak"),
        checkpoint_bytes=checkpoint,
        log_bytes=logged,
        disk_bytes=(config.log.checkpoint_keep + 1) * checkpoint + exported + logged,
        initial_validation_loss=initial,
    )


def _saved(config: RunConfig, parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad or not config.lm.lora_rank  # of adapters the base model is not saved


def _log_bytes(config: RunConfig, rows: list[Metrics]) -> int:
    """Rows, twice where they are mirrored, the candidates table and the kept windows."""
    steps, log, last = config.train.steps, config.log, rows[-1]
    read = steps * last["data/windows_read"]
    tokens = min(read * config.data.window, log.log_windows_mb * 1e6 / 4)
    candidates = read * BYTES_PER_CANDIDATE if log.log_candidates else 0
    text = steps * len(json.dumps(last)) * (2 if log.tensorboard else 1)
    return int(text + candidates + tokens * BYTES_PER_TOKEN)
