"""Carries the loop from the first step to the last: logs, evaluations, checkpoints, interruptions."""

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

import curriq
from curriq import parallel
from curriq.config import RunConfig, to_dict, to_toml
from curriq.errors import CurriqError, Diverged
from curriq.plugins import own_code
from curriq.rng import Generators, derive_seed
from curriq.runlog import checkpoints
from curriq.runlog.promise import METRICS, PARTS, TABLES, Promise
from curriq.runlog.read import has_finished
from curriq.runlog.schema import perplexity
from curriq.runlog.storage import exclusive, new_folder, write_atomically
from curriq.runlog.writers import RunLogs, write_summary, write_test_losses
from curriq.state import State
from curriq.train.agreement import require_same_weights, share_policy
from curriq.train.checkpoint import (
    Checkpointer,
    Finish,
    LoadedCheckpoint,
    NoRoom,
    NotSaved,
    checkpoint_folders,
    require_plain,
    saved_size,
    step_of,
)
from curriq.train.environment import environment
from curriq.train.interrupt import stop_flag
from curriq.train.loop import Components, LoopState, ScoresNotFinite, train_step
from curriq.train.meter import Meter, Prediction, peak_memory
from curriq.train.parts import PartsWriter, described, parts_size, pickled, split
from curriq.train.progress import make_progress
from curriq.train.record import log_entry, on_host, open_logs, test_columns
from curriq.train.result import RunResult
from curriq.types import Metrics, Step, WindowLosses, merge, readings_of, status_of

log = logging.getLogger("curriq")


@runtime_checkable
class Probe(Protocol):
    """Measures something of every step for the log.

    One with a method `due(step)` reads nothing but the step's record where that says no; any other is asked
    before the next step begins, while θ is what the step has made of it.
    """

    def measure(self, step: Step) -> Metrics: ...


class _Later:
    """Some work, done the first time that it is called."""

    def __init__(self, work: Callable[[], object] | None = None) -> None:
        self._work = work

    def __bool__(self) -> bool:
        return self._work is not None

    def __call__(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work()


@dataclass(kw_only=True)
class Session:
    """One run between its start (or resume) and its end.

    Attributes:
        method: name of what weighs the windows, for folder and summary; with `own_method` the user's own.
        validate: mean loss of θ on the validation set, nats per token.
        test: losses of θ on the test set.
        save_lm: writes the language model and the tokenizer into a folder.
        fingerprint: of the data; a resume compares it.
        shared: φ, of which rank 0's numbers count.
        replicas: θ, where every rank holds the whole.
        sharded: whether each rank holds a part of θ, so that each writes its own and reads its own.
        collective: whether each rank holds a part of any state, so that all must be asked for it.
        lm_parts: θ by name, in parts, where it is sharded.
        load_lm: reads such parts from a checkpoint.
        files: path of every local file that a resume reads again → its size and SHA-256.
        skipped_rows: rows left out of each source that has left out any.
        tokenizer: content of its `tokenizer.json`, for the log of windows; empty when it has none.
    """

    config: RunConfig
    method: str
    own_method: bool = False
    components: Components
    state: LoopState
    meter: Meter
    probes: list[Probe]
    generators: Generators
    fingerprint: dict[str, str]
    skipped_rows: Callable[[], dict[str, int]]
    save_lm: Callable[[Path], object]
    validate: Callable[[], float]
    test: Callable[[], WindowLosses]
    device: torch.device
    shared: Sequence[torch.Tensor] = ()
    replicas: Sequence[torch.Tensor] = ()
    sharded: bool = False
    collective: bool = False
    lm_parts: Callable[[], dict[str, torch.Tensor]] = dict
    load_lm: Callable[[State], None] = lambda stored: None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: str = ""
    run_dir: Path = field(init=False)
    initial_validation: float | None = None
    last_validation: float | None = None
    _unrecorded: _Later = field(default_factory=_Later)
    _last_saved: Path | None = None
    _promise: Promise = field(default_factory=dict)
    _checkpointer: Checkpointer | None = None
    _prediction: Prediction = field(default_factory=Prediction)
    _parts: PartsWriter | None = None
    _saved: Metrics = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run_dir = Path(self.config.log.run_dir)

    def load(self, checkpoint: LoadedCheckpoint) -> None:
        """Put every component into the state of the checkpoint; θ's weights are loaded by the builder."""
        saved = dict(checkpoint.state)
        saved["held_out"] = saved["held_out"].get("inner", saved["held_out"])  # an earlier version timed it
        self.state = LoopState.from_state_dict(saved["loop"], self.device)
        try:
            self.load_lm(saved.get("lm", {}))  # in parts; whole weights are in its folder
            for name, part in self._stateful().items():
                part.load_state_dict(saved[name])
        except (KeyError, RuntimeError, ValueError, AssertionError) as error:
            if isinstance(error, CurriqError):
                raise
            raise CurriqError(
                f"{checkpoint.path} does not fit the run's settings ({error}): a setting that shapes the "
                "model, the critic or the selector was changed. Resume without that change."
            ) from error
        self.initial_validation = saved.get("initial_validation")  # which earlier versions did not measure
        self.last_validation = saved["validation"]
        self._last_saved = checkpoint.path
        self._promise = checkpoint.manifest["log"]

    def train(self) -> RunResult:
        """Run to the last step, or until Ctrl-C, and write the summary.

        A run is finished when its last checkpoint is on the disk.

        Raises:
            CurriqError: the run is finished already; its folder holds another run or cannot be written; the
                disk refuses a checkpoint or the log; or a loss or gradient is not finite. Earlier checkpoints
                are intact.
        """
        if self._finished and self._summarised:
            raise CurriqError(
                f"{self.run_dir} is finished: {self.state.step} steps are done, --steps = "
                f"{self.config.train.steps}. To train on, raise --steps (a decaying learning rate then "
                "follows the longer schedule)."
            )
        primary = parallel.rank() == 0
        with ExitStack() as held:
            if primary:
                try:
                    self._open_folder(held)
                except OSError as error:
                    raise checkpoints.unusable_folder(self.run_dir, error.strerror) from error
                about = {"settings": to_dict(self.config), "method": self.method}
                exported = parts_size(self.lm_parts()) if self.sharded else 0
                keep = self.config.log.checkpoint_keep
                self._checkpointer = Checkpointer(self.run_dir, keep, about, exported)
                held.callback(self._checkpointer.reserve.release)
            if self.sharded:
                self._parts = PartsWriter()
            try:
                return self._train(primary)
            except BrokenPipeError:
                raise  # of the terminal, not of a file
            except OSError as error:
                raise CurriqError(f"{self._stopped()}: {described(error)}. {self._go_on()}") from error

    def _train(self, primary: bool) -> RunResult:
        config, start = self.config, self.state.step
        with ExitStack() as opened:
            stop = opened.enter_context(stop_flag())
            mode = config.log.progress if primary else "none"
            shown = [reading for part in self._deciding for reading in readings_of(part)]
            progress = opened.enter_context(make_progress(mode, config.train.steps, start, readings=shown))
            logs = None
            if primary:
                logs = open_logs(
                    config, self.run_dir, start, self._promise, self.meter.source_names, self.tokenizer
                )
                opened.enter_context(logs)
            self._validate_initially()
            if self._last_saved is None:
                self._save(logs)  # a disk that is full shows now, and every later failure can be resumed
                self._settle()
            if not self._finished:
                self._hold_room()

            def record(done: Step, row: Metrics) -> None:
                if logs is not None:
                    logs.write(log_entry(done, row))
                progress.update(row, ". ".join(filter(None, map(status_of, self._deciding))))

            # What has been proposed early is trained on before the run stops.
            while not self._finished and (self.state.early is not None or not parallel.any_rank(stop())):
                self._step(record, logs, go_on=self._goes_on() and not stop())
                if self._written():
                    self._settle()  # a checkpoint that was refused stops the run now
                if self._finished:
                    self._save(logs)
                elif self.state.step % config.log.checkpoint_every == 0:
                    self._save(logs)
                    self._hold_room()
                elif self.state.step == 1:
                    self._hold_room(measured=True)  # moments and buffers are there from the first step on
            self._unrecorded()
            if not self._finished:
                self._save(logs)
            self._settle()
        tested = self.test() if self._finished else None  # the test set is touched here and nowhere else
        summary = self._summary(tested)
        if primary:
            if tested is not None:
                write_test_losses(self.run_dir, test_columns(tested))
            write_summary(self.run_dir, summary)  # last: who finds it finds the rest
        return RunResult(run_dir=self.run_dir, summary=summary, finished=self._finished)

    def rehearse(self, steps: int) -> list[Metrics]:
        """The rows of the next steps, which are taken and neither logged nor saved, for a session that is
        then thrown away."""
        rows: list[Metrics] = []
        for _ in range(steps):
            self._step(lambda done, row: rows.append(row), None, go_on=True)
        self._unrecorded()
        return rows

    def state_bytes(self) -> int:
        """Bytes that a checkpoint of the session takes beside the language model's own folder."""
        return saved_size(self._state())

    @property
    def _summarised(self) -> bool:
        """Whether the run's end is written down; a damaged summary is none, and is written again."""
        try:
            return has_finished(self.run_dir)
        except CurriqError:
            return False

    @property
    def _deciding(self) -> tuple[object, ...]:
        """The parts that say what the policy does."""
        return self.components.proposer, self.components.selector

    @property
    def _finished(self) -> bool:
        return self.state.step >= self.config.train.steps

    def _goes_on(self) -> bool:
        """Whether another step may be begun before this one has ended: it follows without a checkpoint."""
        following = self.state.step + 1
        return following < self.config.train.steps and following % self.config.log.checkpoint_every != 0

    def _step(
        self, record: Callable[[Step, Metrics], object], logs: RunLogs | None, *, go_on: bool = False
    ) -> None:
        """Take the next step and record it: at once, or while the device computes the one after it."""
        step, before = self.state.step, self._unrecorded
        try:
            began = time.perf_counter()
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                # Dropout draws from torch's global generator: a seed per step and rank needs no saved state.
                seed = derive_seed(self.config.train.seed, f"dropout/{step}/{parallel.rank()}")
                torch.manual_seed(seed)
                try:
                    done = train_step(self.components, self.state, go_on, before or None)
                finally:
                    before()  # a step that fails early has not come to it
            share_policy(self.shared, done)
            done = on_host(done)
            work = partial(self._record, done, time.perf_counter() - began, record)
            self._unrecorded = _Later(work)
            if not (go_on and self.components.proposes_early) or self._reads_theta(step):
                self._unrecorded()
        except ArithmeticError as error:
            raise self._stopped_by(error, step, logs) from error
        except parallel.RanksDiffer as error:
            raise self._ranks_differ(error, step, logs) from error

    def _reads_theta(self, step: int) -> bool:
        """Whether anything that belongs into the record of a step that has been taken reads θ."""
        probed = any(getattr(probe, "due", lambda step: True)(step) for probe in self.probes)
        return probed or self._validates

    def _record(self, done: Step, seconds: float, record: Callable[[Step, Metrics], object]) -> None:
        """Put the numbers of a step together, and hand them on."""
        counted = self.meter.measure(done, seconds)
        row = merge({"step": done.index}, counted, peak_memory(self.device), done.metrics, self._validate())
        if done.index == 0 and self.initial_validation is not None:
            row["validation/initial_loss"] = self.initial_validation
        for probe in self.probes:
            row = merge(row, probe.measure(done))
        row = merge(row, self._prediction.metrics(row))
        saved, self._saved = self._saved, {}
        record(done, merge(row, saved))

    def _validate_initially(self) -> None:
        """The validation loss of θ_0, before any step, so that a run can say what training has changed; it
        draws no random number. Where it is not finite, the first step says why."""
        if self.state.step == 0 and self.initial_validation is None:
            loss = self.validate()
            self.initial_validation = loss if math.isfinite(loss) else None

    @property
    def _validates(self) -> bool:
        """Whether the step that has been taken calls for the validation loss."""
        return self._finished or self.state.step % self.config.log.eval_every == 0

    def _validate(self) -> Metrics:
        """The validation loss where the step calls for one; `Diverged` when it is not finite."""
        if not self._validates:
            return {}
        began = time.perf_counter()
        loss = self.last_validation = self.validate()
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss after the update is {loss}")
        seconds = time.perf_counter() - began
        return {"validation/loss": loss, "validation/perplexity": perplexity(loss), "time/evaluate": seconds}

    def _save(self, logs: RunLogs | None) -> None:
        """A checkpoint of step s promises a complete log of the steps before s, so the log goes first; where
        the disk refuses either, CurriqError on all ranks. Of parts the writing is begun, see `_settle`."""
        assert self.state.early is None, "the proposer is a step ahead"
        self._settle()
        began = time.perf_counter()
        try:
            require_same_weights(self.replicas)
        except parallel.RanksDiffer as error:
            raise self._ranks_differ(error, self.state.step, logs) from error
        state = self._collected_state()
        if self._parts is None:
            self._agree(self._write(state, logs))
        else:
            self._begin_parts(self._parts, state, logs)
        self._saved["time/checkpoint"] = time.perf_counter() - began

    def _write(self, state: dict[str, Any], logs: RunLogs | None) -> str | None:
        """Log and checkpoint, on the rank that writes them; why the disk refused them, if it did."""
        if self._checkpointer is None or logs is None:
            return None
        self._checkpointer.reserve.release()
        try:
            promise = logs.flush()
            self._last_saved = self._checkpointer.save(self.state.step, state, self.save_lm, promise)
            self._saved["checkpoint/bytes"] = float(checkpoints.folder_size(self._last_saved))
        except (NotSaved, OSError, CurriqError) as error:
            return self._refusal(error)
        return None

    def _begin_parts(self, parts: PartsWriter, state: dict[str, Any], logs: RunLogs | None) -> None:
        """Begin to write a checkpoint of which each rank writes its parts."""
        plain, tensors = split(state)
        step, checkpointer, finish = self.state.step, self._checkpointer, None
        folder, refusal = None, None
        if checkpointer is not None and logs is not None:
            require_plain(plain)
            try:
                promise = logs.flush()
                folder = checkpointer.begin(step, self.save_lm, promise)
                finish = Finish(checkpointer, step, pickled(plain), promise)
            except (NotSaved, OSError, CurriqError) as error:
                refusal = self._refusal(error)
        self._agree(refusal)
        folder = parallel.from_rank_zero(folder)
        if folder is not None:  # else the same checkpoint is there already
            parts.begin(folder, tensors, finish, export=self._finished)

    @property
    def _writing(self) -> bool:
        """Whether a checkpoint is being written while training goes on; the same on all ranks."""
        return self._parts is not None and self._parts.running

    def _written(self) -> bool:
        """Whether a checkpoint that was being written has ended on all ranks."""
        return self._writing and not parallel.any_rank(self._parts is not None and not self._parts.done)

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written, if any; where it was refused, or the next one has no
        room, CurriqError on all ranks."""
        if self._parts is None or not self._parts.running:
            return
        outcome = self._parts.wait()
        if outcome.path is None:
            raise CurriqError(self._not_saved(outcome.refusal))
        if self._checkpointer is not None:
            self._last_saved = outcome.path
        self._saved |= {"time/checkpoint_written": outcome.seconds, "checkpoint/bytes": float(outcome.size)}
        if outcome.refusal and not self._finished:
            raise CurriqError(self._no_room(outcome.refusal))

    def _hold_room(self, *, measured: bool = False) -> None:
        """Keep room on the disk for the next checkpoint, `measured` on the state as it is now; where there
        is none, CurriqError on all ranks."""
        refusal = None
        state = self._collected_state() if measured else None
        # Where a checkpoint is being written, the room is taken when that has ended.
        if self._checkpointer is not None and self._last_saved is not None and not self._writing:
            try:
                self._checkpointer.hold_room(self._last_saved, state)
            except NoRoom as error:
                refusal = self._no_room(str(error))
        self._agree(refusal)

    def _agree(self, refusal: str | None) -> None:
        """Raise what stops one rank on all of them."""
        if parallel.any_rank(refusal is not None):
            raise CurriqError(refusal or "stopped: rank 0 says why.")

    def _no_room(self, reason: str) -> str:
        assert self._last_saved is not None or self._checkpointer is None
        less = " (--checkpoint-keep 1 needs less)" if self.config.log.checkpoint_keep > 1 else ""
        here = self._last_saved is not None and step_of(self._last_saved) == self.state.step
        return f"{self._stopped()}{', which is saved' if here else ''}: {reason}{less}. {self._go_on()}"

    def _refusal(self, error: Exception) -> str:
        """The message where log or checkpoint could not be written."""
        text = described(error) if isinstance(error, OSError) else str(error)
        return text if isinstance(error, CurriqError) else self._not_saved(text)

    def _not_saved(self, reason: str) -> str:
        return f"{self._stopped()}, not saved: {reason}. {self._go_on()}"

    def _stopped(self) -> str:
        return "trained" if self._finished else f"stopped at step {self.state.step}"

    def _go_on(self) -> str:
        if self._last_saved is None:
            return "Free some space and start again with the same command: it takes this folder over."
        step = step_of(self._last_saved)
        again = checkpoints.resume_command(self.run_dir)
        return f"Free some space and go on from step {step} with `{again}`."

    def _collected_state(self) -> dict[str, Any]:
        """The state on the rank that saves it, and where ranks hold parts of it on all, which must ask."""
        return self._state() if self._checkpointer is not None or self.sharded or self.collective else {}

    def _state(self) -> dict[str, Any]:
        return {
            "loop": self.state.state_dict(),
            "fingerprint": self.fingerprint,
            "initial_validation": self.initial_validation,
            "validation": self.last_validation,
            **({"lm": self.lm_parts()} if self.sharded else {}),
            **{name: part.state_dict() for name, part in self._stateful().items()},
        }

    def _stateful(self) -> dict[str, Any]:
        """Parts by name. A part that draws saves its generator too, so that it is complete by itself;
        `generators` then holds the same state once more, and those that no part owns."""
        c = self.components
        return {
            "proposer": c.proposer,
            "selector": c.selector,
            "critic": c.critic,
            "held_out": c.held_out,
            "learner": c.learner,
            "meter": self.meter,
            "generators": self.generators,
        }

    def _stopped_by(self, error: ArithmeticError, step: int, logs: RunLogs | None) -> CurriqError:
        """The error of a step that met a number that is not finite; the log is kept."""
        with suppress(CurriqError):  # this one comes first
            self._settle()
        if logs is not None:
            with suppress(OSError):  # the rows from the last checkpoint on, which a resume repeats
                logs.flush()
        proposed = self.state.proposed
        windows = [] if proposed is None else proposed.windows.ids.tolist()
        shown = ", ".join(map(str, windows[:8])) + (", …" if len(windows) > 8 else "")
        return CurriqError(
            f"step {step} stopped: {error}. Its windows: {shown}. {self._how_to_continue(error, step)}"
        )

    def _ranks_differ(self, error: parallel.RanksDiffer, step: int, logs: RunLogs | None) -> CurriqError:
        """The error of a step in which the processes no longer had one policy; nothing of it is logged."""
        if logs is not None:
            with suppress(OSError):
                logs.flush()
        return CurriqError(
            f"step {step} stopped: {error}, so the processes no longer train one model by one policy. Resume "
            f"from the last checkpoint, with `{checkpoints.resume_command(self.run_dir)}` under the same "
            "launcher; if it happens again, look for a machine with another version of torch or curriq, with "
            "other files, or with faulty memory."
        )

    def _how_to_continue(self, error: ArithmeticError, step: int) -> str:
        """The end of the error's message: which checkpoint to continue from, with which setting changed."""
        if self._checkpointer is None:
            return "Rank 0 reports how to continue."
        if not isinstance(error, Diverged):
            # It would fail again from the checkpoint right before it, whatever the learning rate.
            self._checkpointer.set_aside_from(step)
        intact = checkpoint_folders(self._checkpointer.folder)
        smaller = f"--lm-lr {self.config.optim.lm_lr / 10:.1g}"
        again, go_on = checkpoints.again_command(self.run_dir), checkpoints.resume_command(self.run_dir)
        own, theirs = self.own_method, f"They are those of {self.method}: look at its score. "
        ours = "Raise --beta (soft-q) or --selector-temperature (the others) if it is very small. "
        hint = (theirs if own else ours) if isinstance(error, ScoresNotFinite) else ""
        if intact:
            return (
                f"{hint}The log and the checkpoint of step {step_of(intact[0])} are intact: go on from there "
                f"with a smaller learning rate, for instance `{go_on} {smaller}` (if Q "
                "diverged, with a smaller --q-lr)."
            )
        if step == 0 and hint:
            return f"{hint}Start again with `{again}`{'' if own else ' and the greater value'}."
        if step == 0:
            return "The model gives no finite number before any training: check --model and --precision."
        return (
            f"{hint}There is no earlier checkpoint: start again with a smaller learning rate, for instance "
            f"`{again} {smaller}`."
        )

    def _open_folder(self, held: ExitStack) -> None:
        """Make the run's folder, hold it against other processes, and write down what is about to run."""
        if self._last_saved is None and not self.config.log.run_dir:
            name = re.sub(r"[^\w.-]+", "-", f"{self.method}-{self.config.train.seed}")
            self.run_dir = Path("runs", name)  # for the message, should `runs` be refused
            self.run_dir = new_folder(self.run_dir)
        held.enter_context(exclusive(self.run_dir, checkpoints.in_training(self.run_dir)))
        if self._last_saved is None:
            checkpoints.require_new_run(self.run_dir)
            self._set_log_aside()
        for name in ("summary.json", "test_losses.parquet"):  # the run's earlier end is not its end
            (self.run_dir / name).unlink(missing_ok=True)
        write_atomically(self.run_dir / "config.toml", to_toml(self.config).encode())
        read = {"fingerprint": self.fingerprint, "files": self.files, "code": own_code(self.config)}
        about = json.dumps(environment(self.device) | read, indent=1)
        write_atomically(self.run_dir / "environment.json", about.encode())

    def _set_log_aside(self) -> None:
        """Take over the folder of a run that left no checkpoint: no step of its log can be gone on from."""
        rows = self.run_dir / METRICS
        if not rows.exists() or not rows.stat().st_size:
            return
        aside = new_folder(self.run_dir / "earlier-log")
        for name in (METRICS, PARTS, *TABLES, "summary.json", "test_losses.parquet"):
            if (self.run_dir / name).exists():
                (self.run_dir / name).rename(aside / name)
        log.warning(
            f"{self.run_dir} holds the log of a run without a checkpoint; it was moved to {aside.name}/."
        )

    def _summary(self, tested: WindowLosses | None) -> dict[str, Any]:
        """Fields of `summary.json`, with the losses on the test set where the run is finished."""
        shares, checkpoint = self.meter.shares(), self._last_saved
        fingerprint = json.dumps(self.fingerprint, sort_keys=True)
        summary: dict[str, Any] = {
            "curriq": curriq.__version__,
            "selector": self.method,
            "seed": self.config.train.seed,
            "threads": torch.get_num_threads(),
            "finished": self._finished,
            "steps": self.state.step,
            **self.meter.totals(),
            **self.meter.verdict(),
            "skipped_rows": self.skipped_rows(),
            "weight_share": shares["weight"],
            "offered_share": shares["read"],
            "data_fingerprint": hashlib.sha256(fingerprint.encode()).hexdigest()[:16],
            "checkpoint": None if checkpoint is None else str(checkpoint.relative_to(self.run_dir)),
        }
        if self.initial_validation is not None:
            summary["initial_validation_loss"] = self.initial_validation
        if self.last_validation is not None:
            summary["validation_loss"] = self.last_validation
            summary["validation_perplexity"] = perplexity(self.last_validation)
        if self.meter.epoch is not None:
            summary["epoch"] = self.meter.epoch
        if tested is not None:
            summary |= {"test_loss": tested.mean, "test_perplexity": perplexity(tested.mean)}
        return summary
