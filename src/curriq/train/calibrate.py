"""What the parts of a step cost on this machine, from a few steps of a run, and what other steps would take.

A step is reading, passes over the windows, measurements on held-out text, and the rest: Q, the policy, the
meter. Passes are timed on few windows and on three times as many, and measurements on held-out text more
often than the run makes them, so that a step of many windows is known from steps of few.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from curriq.config import RunConfig, require
from curriq.data.corpus import most_steps_ahead
from curriq.lm.model import trunk_flops
from curriq.state import Saved
from curriq.train.build import Run
from curriq.train.estimate import drop_read_ahead, past_the_start
from curriq.train.meter import held_out_seconds
from curriq.types import Metrics, Offer, Proposer

CALIBRATION_STEPS = 10
"""Steps that are timed, after the first ones."""
WARM_UP = 4
"""Steps before: what is allocated, compiled or read once, and the optimizer's first moments."""
PROBE_EVERY = 3
"""Steps between measurements on held-out text while parts are timed: in one step they are made, in the next Q
learns from them, and the third has neither."""
LEAST_STEPS = WARM_UP + PROBE_EVERY
"""Of a run that has not more."""
READING_SECONDS = 1.0
"""For which the stream alone is read, at least."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A cost that grows by `slope` per unit beside what it costs always, in seconds."""

    fixed: float
    slope: float

    def at(self, amount: float) -> float:
        return self.fixed + self.slope * amount

    @staticmethod
    def through(points: Sequence[tuple[float, float]]) -> "Line":
        """The line through the medians at the smallest and the greatest amount; through 0 where there is one
        amount, or where what it costs always would be negative."""
        amounts = [amount for amount, _ in points]
        low, high = min(amounts), max(amounts)
        below, above = (median(cost for amount, cost in points if amount == end) for end in (low, high))
        slope = (above - below) / (high - low) if high > low else above / high if high else 0.0
        fixed = above - slope * high
        if slope < 0:
            return Line(fixed=above, slope=0.0)
        return Line(fixed=fixed, slope=slope) if fixed >= 0 else Line(fixed=0.0, slope=above / high)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Costs of the parts of a step, in seconds.

    Attributes:
        windows: N of the configuration.
        trained: windows that a step trains on; fewer than N where it draws some of those that it has scored.
        scoring: share of what passes take for each window that scores alone: in a pass of its own, or under a
            second model.
        read_per_step: windows that a step reads.
        propose: of a step: reading, and choosing or searching among what was read.
        searches: whether candidates come from a search, which every process makes whole.
        passes: forward and backward, by windows.
        held_out: of a step that has them, by forward passes of a window.
        held_out_forwards: of a step of N windows that has measurements; 0 where none has.
        reward_every: steps between them.
        rest: Q, the policy and the meter, by windows, in a step in which Q learns nothing.
        learning: what Q and the policy take beside that for each measurement.
        reading_rate: windows per second that a core reads, without choosing among them.
        readers: processes that read ahead; 0 where the one that trains reads.
    """

    windows: int
    trained: int
    scoring: float
    read_per_step: float
    propose: float
    searches: bool
    passes: Line
    held_out: Line
    held_out_forwards: float
    reward_every: int
    rest: Line
    learning: float
    reading_rate: float
    readers: int

    def reading(self, windows: float) -> float:
        """Seconds that reading so many windows takes of a step, without choosing among them."""
        return min(self.propose, windows / self.reading_rate / max(1, self.readers))

    @property
    def held_out_per_step(self) -> float:
        """Seconds of measuring on held-out text, spread over the steps between."""
        return self.held_out.at(self.held_out_forwards) / self.reward_every if self.held_out_forwards else 0.0

    @property
    def rest_per_step(self) -> float:
        """Seconds of Q, the policy and the meter, with what Q takes for each measurement."""
        learning = self.learning / self.reward_every if self.held_out_forwards else 0.0
        return self.rest.at(self.windows) + learning

    def reading_cores(self, seconds: float) -> float:
        """Cores that read as fast as steps of so many seconds use windows up."""
        return reading_cores(self.read_per_step, seconds, self.reading_rate)

    @property
    def seconds_per_step(self) -> float:
        return self.propose + self.passes.at(self.windows) + self.held_out_per_step + self.rest_per_step

    @property
    def plain_seconds_per_step(self) -> float:
        """The same of training on as many windows as they come, in one pass, without scoring any before."""
        passes = self.passes.fixed + (1 - self.scoring) * self.passes.slope * self.windows
        return self.reading(self.trained) + passes

    @property
    def overhead(self) -> float:
        """Seconds per step over those of plain training."""
        return self.seconds_per_step / max(1e-9, self.plain_seconds_per_step)


def reading_cores(windows: float, seconds: float, rate: float) -> float:
    """Cores that read so many windows in so many seconds, where each reads `rate` per second."""
    return windows / rate / seconds


class Trimmed(Saved):
    """Offers the first windows of what another proposer offers."""

    SAVED = ("_inner",)

    def __init__(self, inner: Proposer, windows: int) -> None:
        self._inner = inner
        self.windows = windows

    def propose(self, step: int) -> Offer:
        return self._inner.propose(step).take(slice(self.windows))


def for_calibration(config: RunConfig) -> RunConfig:
    """The run that is built to be calibrated: `config` past its start, with more frequent measurements on
    held-out text."""
    every = min(PROBE_EVERY, config.train.reward_every)
    return past_the_start(config).override(reward_every=every)


def calibrate(run: Run, config: RunConfig) -> tuple[Calibration, list[Metrics]]:
    """The costs of the steps of `config`, from a run that was built `for_calibration`, and the rows of the
    steps that were taken. The session is used up.

    Raises:
        ArithmeticError: a loss or a score is not finite.
        CurriqError: the stream cannot be read, or a recorded curriculum has too few steps.
    """
    session, n = run.session, config.train.num_candidates
    steps = WARM_UP + CALIBRATION_STEPS
    if config.data.curriculum:  # what follows its last step is not known
        steps = min(steps, config.train.steps)
        require(
            steps >= LEAST_STEPS,
            f"--curriculum {config.data.curriculum} with --steps {config.train.steps}: a plan times "
            f"{LEAST_STEPS} steps of it at least. Give more --steps, as far as it has them; `curriq check` "
            "times four.",
        )
    original = session.components
    on_gpu = run.lm.device.type == "cuda"
    trimmed = Trimmed(original.proposer, n if on_gpu else _few(run, config))  # a GPU's size is chosen for N
    session.components = replace(original, proposer=trimmed)
    rows = session.rehearse(1)
    drop_read_ahead(run)
    few = _few(run, config)
    sizes = few, min(n, 3 * few)
    timed: list[tuple[int, Metrics]] = []
    for k in range(1, steps):
        trimmed.windows = sizes[k // PROBE_EVERY % 2]  # each with and without a measurement
        (row,) = session.rehearse(1)
        rows.append(row)
        if k >= WARM_UP:
            timed.append((trimmed.windows, row))
    session.components = original
    return _fitted(timed, rows, run, config), rows


def _few(run: Run, config: RunConfig) -> int:
    """Windows of a small step: a full pass, and not less than the method chooses."""
    least = max(run.lm.pieces.micro_batch, config.drawn, config.select.random_k * _random_k(config))
    return min(config.train.num_candidates, least)


def _random_k(config: RunConfig) -> bool:
    return config.select.selector == "random-k"


def _fitted(
    timed: list[tuple[int, Metrics]], rows: list[Metrics], run: Run, config: RunConfig
) -> Calibration:
    n = config.train.num_candidates
    totals = [row["x/windows_trained"] for row in rows[-len(timed) - 1 :]]
    trained = Line.through([(m, b - a) for (m, _), a, b in zip(timed, totals, totals[1:], strict=False)])
    held_out = [(m, row) for m, row in timed if "time/reward" in row]
    forwards = [(row["held_out/forwards"], held_out_seconds(row)) for _, row in held_out]
    largest = max((m for m, _ in timed), default=n)
    more = min(n, config.critic.probe_windows) - min(largest, config.critic.probe_windows)
    # Where the run measures as often as here, every step counts as it is.
    spread = config.train.reward_every >= PROBE_EVERY and bool(held_out)
    quiet = [(m, row) for m, row in timed if not spread or row["step"] % PROBE_EVERY == PROBE_EVERY - 1]
    rest = Line.through([(m, _rest(row)) for m, row in quiet])
    learning = 0.0
    if spread:
        beyond = [(row["step"] % PROBE_EVERY, _rest(row) - rest.at(m)) for m, row in timed]
        learning = sum(median(b for phase, b in beyond if phase == wanted) for wanted in (0, 1))
    effects = any("time/probe" in row and row["time/probe"] > 0 for _, row in held_out)
    return Calibration(
        windows=n,
        trained=round(trained.at(n)),
        scoring=_scoring_share(run, config),
        read_per_step=mean(row["data/windows_read"] for _, row in timed),
        propose=mean(row["time/propose"] for _, row in timed),
        searches=config.langevin.proposer != "stream",
        passes=Line.through([(m, row["time/train"]) for m, row in timed]),
        held_out=Line.through(forwards) if forwards else Line(fixed=0.0, slope=0.0),
        held_out_forwards=max((f for f, _ in forwards), default=0.0) + (max(0, more) if effects else 0),
        reward_every=config.train.reward_every,
        rest=rest,
        learning=max(0.0, learning),
        reading_rate=_reading_rate(run),
        readers=run.corpus.readers,
    )


def _scoring_share(run: Run, config: RunConfig) -> float:
    """By their operations, of which a backward pass takes those of two forward passes."""
    meter = run.session.meter
    if config.drawn and meter.passes > 1:
        return 1.0  # what is trained on is forwarded again
    recomputed = trunk_flops(run.lm, config.data.window) if config.lm.gradient_checkpointing else 0
    beside = meter.passes - 1 + (meter.cost_per_window.extra_flops - recomputed) / meter.forward_flops
    return beside / (beside + 3 + recomputed / meter.forward_flops)


def _rest(row: Metrics) -> float:
    parts = row["time/propose"] + row["time/train"] + held_out_seconds(row)
    return max(0.0, row["time/step"] - parts)


def _reading_rate(run: Run) -> float:
    """Windows per second that are read, tokenized and packed, by one core."""
    size = max(1, run.config.train.num_candidates)
    # What has been read ahead would count as read at once.
    for _ in range(most_steps_ahead(run.config) if run.corpus.readers else 1):
        run.corpus.stream.read(size)
    count, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < READING_SECONDS:
        read = len(run.corpus.stream.read(size))
        if not read:
            break
        count += read
    return count / max(seconds, 1e-9) / max(1, run.corpus.readers)
