"""Which number of threads and which precision would be the fastest on this CPU, by measurement.

Nothing is changed: other settings give other last bits, so the choice is the user's.
"""

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from curriq import parallel
from curriq.lm.hardware import cpu_has_bf16, physical_cores
from curriq.lm.mixture import weighted_gradient
from curriq.train.build import Run
from curriq.train.calibrate import Calibration
from curriq.types import Windows

HOPELESS = 2.0
"""Times what the present settings take for one window, beyond which an alternative is given up: one thread of
sixty-four would take minutes for nothing."""
TRIES, PATIENCE = 3, 0.5
"""Passes over one window, and seconds of them, at least, before a setting is given up."""
ROUNDS = 3
"""Passes over a micro-batch in each setting, at least; ratios are taken within a round."""
MOST_ROUNDS = 15
ENOUGH_SECONDS = 2.0
"""After which no round begins beyond the least number."""
WORTHWHILE = 0.95
"""Share of a step's time above which an alternative is not called faster: less is noise."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Threads of torch and precision of the passes, as `--threads` and `--precision` have them."""

    threads: int
    precision: str

    def flags(self, present: "Setting") -> str:
        """The flags that turn the present settings into this one."""
        threads = f"--threads {self.threads}" if self.threads != present.threads else ""
        precision = f"--precision {self.precision}" if self.precision != present.precision else ""
        return f"{threads} {precision}".strip()


def settings_to_try(present: Setting, cores: int, physical: int | None, bf16: bool) -> list[Setting]:
    """The alternatives, those with most threads first: 1, half, all physical and all cores, each in fp32 and,
    where the processor has bfloat16 products, in bf16.

    Args:
        cores: of this machine, hyperthreads included.
        physical: without them; None where nobody knows.
        bf16: whether the processor has bfloat16 products.
    """
    own = min(physical or cores, cores)
    threads = {1, max(1, own // 2), own, cores, present.threads}
    precisions = ["fp32", "bf16"] if bf16 else ["fp32"]
    every = [Setting(threads=t, precision=p) for p in precisions for t in sorted(threads, reverse=True)]
    return [setting for setting in every if setting != present]


def compare(
    present: Setting,
    others: Sequence[Setting],
    seconds: Callable[[Setting, bool], float],
) -> dict[Setting, float]:
    """Seconds of a pass in each setting over those in the present one, medians over interleaved rounds.

    Of settings that are hopeless it is the ratio on one window; still fewer threads are left out.

    Args:
        seconds: of a forward and backward pass in a setting, over one window or, if the flag is set, over a
            whole micro-batch.
    """
    seconds(present, False)  # pays for what is allocated once
    ratios: dict[Setting, list[float]] = {}
    hopeless: dict[Setting, list[float]] = {}
    for setting in others:
        fewer = [h for h in hopeless if setting.threads < h.threads < present.threads]
        if any(h.precision == setting.precision for h in fewer):
            continue  # with fewer threads than were too few it gets no better
        tried = _tries(present, setting, seconds)
        if min(tried) > HOPELESS:
            hopeless[setting] = tried
        else:
            ratios[setting] = []
    hopeful = list(ratios)
    spent, rounds = 0.0, 0
    while hopeful and (rounds < ROUNDS or (spent < ENOUGH_SECONDS and rounds < MOST_ROUNDS)):
        took = {setting: seconds(setting, True) for setting in (present, *hopeful)}
        for setting in hopeful:
            ratios[setting].append(took[setting] / took[present])
        spent, rounds = spent + sum(took.values()), rounds + 1
    return {setting: median(values) for setting, values in (ratios | hopeless).items()}


def _tries(present: Setting, setting: Setting, seconds: Callable[[Setting, bool], float]) -> list[float]:
    """Seconds for one window over those in the present settings, until once they are not hopeless: another
    program may have had the processor for a while."""
    ratios, spent = [], 0.0
    while len(ratios) < TRIES or spent < PATIENCE:
        here, there = seconds(present, False), seconds(setting, False)
        ratios.append(there / here)
        if ratios[-1] <= HOPELESS:
            break
        spent += here + there
    return ratios


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Settings that the run does not have, and what they would take.

    Attributes:
        flags: that ask for them.
        passes: seconds of a forward and backward pass, over those in the present settings.
        step: the same of a whole step, of which the passes are a part.
    """

    flags: str
    threads: int
    precision: str
    passes: float
    step: float

    @property
    def faster(self) -> bool:
        """Whether it takes less time by more than noise."""
        return self.step < WORTHWHILE


def timed_alternatives(run: Run, made: Calibration) -> list[Alternative]:
    """What other threads and another precision would take on this CPU, the fastest first.

    Empty on a GPU, and where blocks are compiled, which takes a minute for each.

    Args:
        run: which was calibrated; nothing of its settings changes.
        made: its calibration.
    """
    config, lm = run.config, run.lm
    if lm.device.type != "cpu" or config.lm.compile == "on":
        return []
    present = Setting(threads=torch.get_num_threads(), precision=config.lm.precision)
    others = settings_to_try(present, parallel.cores(), physical_cores(), cpu_has_bf16())
    windows = run.corpus.stream.read(min(made.windows, lm.pieces.micro_batch)).windows
    if not others or not len(windows):
        return []

    def seconds(setting: Setting, whole: bool) -> float:
        with _in(run, setting):
            if whole:
                _pass(run, windows.take(slice(1)))  # threads start, weights are converted for the first time
            return _pass(run, windows if whole else windows.take(slice(1)))

    ratios = compare(present, others, seconds)
    run.lm.zero_grad()
    found = [
        Alternative(
            flags=setting.flags(present),
            threads=setting.threads,
            precision=setting.precision,
            passes=ratio,
            step=step_share(made, ratio),
        )
        for setting, ratio in ratios.items()
        if math.isfinite(ratio)
    ]
    return sorted(found, key=lambda one: one.step)


def step_share(made: Calibration, passes: float) -> float:
    """Seconds of a step over those now, if its passes take this share of their time; what passes cost beside
    their windows, which is the optimizer, and all that is no pass stays."""
    moved = made.passes.slope * made.windows
    return 1 - (1 - passes) * moved / made.seconds_per_step


@contextmanager
def _in(run: Run, setting: Setting) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        with run.lm.in_precision(setting.precision):
            yield
    finally:
        torch.set_num_threads(before)


def _pass(run: Run, windows: Windows) -> float:
    """Seconds of a forward and backward pass."""
    run.lm.zero_grad()
    began = time.perf_counter()
    with run.lm.without_dropout():
        loss = weighted_gradient(run.lm, windows, torch.full((len(windows),), 1 / len(windows))).item()
    took = time.perf_counter() - began
    return (
        took if math.isfinite(loss) else math.inf
    )  # a precision in which the model has no loss is no choice
