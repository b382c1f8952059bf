"""Carries the loop from the first step to the last: logs, evaluations, checkpoints, interruptions."""

import importlib.metadata
import json
import logging
import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch

import curriq
from curriq import parallel
from curriq.config import RunConfig, to_dict, to_toml
from curriq.errors import CurriqError
from curriq.rng import Generators
from curriq.train.checkpoint import Checkpointer, LoadedCheckpoint
from curriq.train.loop import Components, LoopState, StepRecord, train_step
from curriq.train.meter import Meter
from curriq.train.metrics import CandidateLog, MetricsLog, Sink, TensorBoardSink, WandbSink, write_summary
from curriq.train.progress import make_progress
from curriq.train.storage import write_atomically
from curriq.types import Metrics, merge

logger = logging.getLogger("curriq")


@runtime_checkable
class Probe(Protocol):
    """Measures something of every step for the log."""

    def measure(self, record: StepRecord) -> Metrics: ...


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_dir: its folder.
        summary: the content of `summary.json`; docs/metrics.md defines the fields.
        finished: whether the last step was reached (False after Ctrl-C).
    """

    run_dir: Path
    summary: dict[str, Any]
    finished: bool

    @property
    def model_dir(self) -> Path | None:
        """Folder that `AutoModelForCausalLM.from_pretrained` opens: the language model as it is now."""
        checkpoint = self.summary["checkpoint"]
        return None if checkpoint is None else self.run_dir / checkpoint / "lm"


@dataclass(kw_only=True)
class Session:
    """One run between its start (or resume) and its end.

    Attributes:
        validate, test: mean loss of θ on the validation and the test set, nats per token.
        save_lm: writes the language model and the tokenizer into a folder.
        fingerprint: of the data; a resume compares it.
    """

    config: RunConfig
    components: Components
    state: LoopState
    meter: Meter
    probes: list[Probe]
    generators: Generators
    fingerprint: dict[str, str]
    save_lm: Callable[[Path], object]
    validate: Callable[[], float]
    test: Callable[[], float]
    device: torch.device
    run_dir: Path = field(init=False)
    last_validation: float | None = None
    _last_saved: Path | None = None

    def __post_init__(self) -> None:
        self.run_dir = Path(self.config.log.run_dir)

    def load(self, checkpoint: LoadedCheckpoint) -> None:
        """Put every component into the state of the checkpoint; θ's weights are loaded by the builder.

        Raises:
            CurriqError: the state does not fit the components, because a setting was changed.
        """
        saved = checkpoint.state
        self.state = LoopState.from_state_dict(saved["loop"], self.device)
        try:
            for name, part in self._stateful().items():
                part.load_state_dict(saved[name])
        except (KeyError, RuntimeError, ValueError, AssertionError) as error:
            raise CurriqError(
                f"{checkpoint.path} does not fit the run's settings ({error}): a setting that shapes the model, "
                "the critic or the selector was changed. Resume without that change."
            ) from error
        self.last_validation = saved["validation"]
        self._last_saved = checkpoint.path

    def train(self) -> RunResult:
        """Run to the last step, or until Ctrl-C, and write the summary.

        Raises:
            CurriqError: a loss or gradient that is not finite. The state before the bad step is saved.
        """
        primary = parallel.rank() == 0
        if primary:
            self._open_folder()
        checkpointer = Checkpointer(self.run_dir, self.config.log.checkpoint_keep) if primary else None
        start = self.state.step
        mode = self.config.log.progress if primary else "none"
        with (
            _stop_flag() as stop,
            make_progress(mode, self.config.train.steps, start) as progress,
            (_Logs(self.config, self.run_dir, self.meter.source_names, start) if primary else nullcontext()) as logs,
        ):
            checkpoint_seconds = 0.0
            while self.state.step < self.config.train.steps and not stop():
                record, row = self._step(checkpointer, logs)
                if checkpoint_seconds:
                    row["time/checkpoint"] = checkpoint_seconds
                checkpoint_seconds = 0.0
                if logs is not None:
                    logs.write(record, row)
                progress.update(row)
                done = self.state.step
                if done % self.config.log.checkpoint_every == 0 or done == self.config.train.steps:
                    began = time.perf_counter()
                    self._save(checkpointer, logs)
                    checkpoint_seconds = time.perf_counter() - began
            finished = self.state.step >= self.config.train.steps
            if not finished:
                self._save(checkpointer, logs)
        summary = self._summary(finished)
        if primary:
            write_summary(self.run_dir, summary)
        return RunResult(run_dir=self.run_dir, summary=summary, finished=finished)

    def _step(self, checkpointer: Checkpointer | None, logs: "_Logs | None") -> tuple[StepRecord, Metrics]:
        began = time.perf_counter()
        try:
            record = train_step(self.components, self.state)
        except ArithmeticError as error:
            raise self._stopped_by(error, checkpointer, logs) from error
        counted = self.meter.measure(record, time.perf_counter() - began)
        row = merge({"step": record.step}, counted, record.metrics)
        for probe in self.probes:
            row = merge(row, probe.measure(record))
        if self.state.step % self.config.log.eval_every == 0 or self.state.step == self.config.train.steps:
            began = time.perf_counter()
            self.last_validation = self.validate()
            row["validation/loss"] = self.last_validation
            row["validation/perplexity"] = math.exp(min(self.last_validation, 700.0))
            row["time/evaluate"] = time.perf_counter() - began
        return record, row

    def _save(self, checkpointer: Checkpointer | None, logs: "_Logs | None") -> None:
        """A checkpoint of step s promises a complete log of the steps before s, so the log goes first."""
        if logs is not None:
            logs.flush()
        if checkpointer is not None:
            saved = checkpointer.save(self.state.step, self._state(), self.save_lm)
            self._last_saved = saved or self._last_saved
        parallel.barrier()

    def _state(self) -> dict[str, Any]:
        return {
            "loop": self.state.state_dict(),
            "fingerprint": self.fingerprint,
            "validation": self.last_validation,
            **{name: part.state_dict() for name, part in self._stateful().items()},
        }

    def _stateful(self) -> dict[str, Any]:
        c = self.components
        return {
            "proposer": c.proposer,
            "selector": c.selector,
            "critic": c.critic,
            "learner": c.learner,
            "meter": self.meter,
            "generators": self.generators,
        }

    def _stopped_by(
        self, error: ArithmeticError, checkpointer: Checkpointer | None, logs: "_Logs | None"
    ) -> CurriqError:
        """Save the state before the bad step, with its candidates, and say what to do."""
        pending = self.state.pending
        windows = [] if pending is None else pending.window_ids.tolist()
        self._save(checkpointer, logs)
        shown = ", ".join(map(str, windows[:8])) + (", …" if len(windows) > 8 else "")
        return CurriqError(
            f"step {self.state.step} stopped before it changed the model: {error}. Its windows: {shown}. "
            f"Everything up to this step is saved in {self._last_saved}. Go on with a smaller step, "
            f"for instance `curriq resume {self.run_dir} --lm-lr {self.config.optim.lm_lr / 3:.1g}`, "
            "or look at the windows in the data."
        )

    def _open_folder(self) -> None:
        """Make the run's folder and write down what is about to run."""
        fresh = self.state.step == 0
        if fresh and not self.config.log.run_dir:
            self.run_dir = _free_folder(Path("runs"), f"{self.config.select.selector}-{self.config.train.seed}")
        if fresh and (self.run_dir / "metrics.jsonl").exists() and self._last_saved is None:
            raise CurriqError(
                f"--run-dir {self.run_dir} holds a run already: go on with `curriq resume {self.run_dir}`, "
                "or give another folder."
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(self.run_dir / "config.toml", to_toml(self.config).encode())
        about = {
            "command": sys.argv,
            "python": platform.python_version(),
            "machine": platform.platform(),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "fingerprint": self.fingerprint,
            "versions": {
                name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")
            },
        }
        write_atomically(self.run_dir / "environment.json", json.dumps(about, indent=1).encode())

    def _summary(self, finished: bool) -> dict[str, Any]:
        """Fields of `summary.json`; the test set is touched here and nowhere else."""
        shares = self.meter.shares()
        checkpoint = self._last_saved
        summary: dict[str, Any] = {
            "curriq": curriq.__version__,
            "selector": self.config.select.selector,
            "seed": self.config.train.seed,
            "threads": torch.get_num_threads(),
            "finished": finished,
            "steps": self.state.step,
            "windows_seen": self.meter.windows_seen,
            "windows_trained": self.meter.windows_trained,
            "effective_windows": self.meter.effective_windows,
            "tokens": self.meter.windows_trained * self.config.data.window,
            "flops": self.meter.flops,
            "seconds": self.meter.seconds,
            "weight_share": {name: share["weight"] for name, share in shares.items()},
            "offered_share": {name: share["offered"] for name, share in shares.items()},
            "data_fingerprint": self.fingerprint,
            "checkpoint": None if checkpoint is None else str(checkpoint.relative_to(self.run_dir)),
        }
        if self.last_validation is not None:
            summary["validation_loss"] = self.last_validation
            summary["validation_perplexity"] = math.exp(min(self.last_validation, 700.0))
        if finished:
            loss = self.test()
            summary |= {"test_loss": loss, "test_perplexity": math.exp(min(loss, 700.0))}
        return summary


class _Logs:
    """The writers of one session, opened and closed together."""

    def __init__(self, config: RunConfig, run_dir: Path, source_names: tuple[str, ...], start: int) -> None:
        self._metrics = MetricsLog(run_dir, start)
        self._candidates = CandidateLog(run_dir, source_names, start) if config.log.log_candidates else None
        self._sinks: list[Sink] = []
        if config.log.tensorboard:
            self._sinks.append(TensorBoardSink(run_dir, start))
        if config.log.wandb:
            self._sinks.append(WandbSink(config.log.wandb, run_dir, to_dict(config)))

    def write(self, record: StepRecord, row: Metrics) -> None:
        self._metrics.append(row)
        for sink in self._sinks:
            sink.write(row)
        if self._candidates is not None:
            mixture = record.mixture
            self._candidates.append(
                record.step,
                record.proposed,
                record.trained,
                loss=mixture.features.loss,
                scores=mixture.scores,
                weights=mixture.weights,
                q=record.q,
            )

    def flush(self) -> None:
        self._metrics.flush()
        if self._candidates is not None:
            self._candidates.flush()

    def __enter__(self) -> "_Logs":
        return self

    def __exit__(self, *exception: object) -> None:
        for sink in self._sinks:
            sink.close()
        self._metrics.close()


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a request to stop after the step; a second one kills."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        logger.warning("stopping after this step and saving; press Ctrl-C again to stop at once.")

    try:
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller's own handling stands
        previous = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or the first of `name-2`, `name-3`, … that does not exist."""
    folder, count = parent / name, 1
    while folder.exists():
        count += 1
        folder = parent / f"{name}-{count}"
    return folder
