"""Downstream tasks at intervals of a run, as a probe."""

import logging
import math
import time
from typing import Protocol, runtime_checkable

from curriq import parallel
from curriq.config import EvalConfig
from curriq.types import Metrics, Score, Step

log = logging.getLogger("curriq")


@runtime_checkable
class Scorer(Protocol):
    """Judges a model as it is at the call; `lm.harness.Harness` does."""

    def scores(self) -> list[Score]: ...


class TaskProbe:
    """Scores θ_{k+1} on the tasks, on rank 0, every so many steps and after the last.

    Args:
        scorer: judges the model in memory.
        config: when.
        steps: of the whole run.
    """

    def __init__(self, scorer: Scorer, config: EvalConfig, steps: int) -> None:
        self._scorer = scorer
        self._every = config.eval_tasks_every
        self._steps = steps
        self._left_out: set[str] = set()

    def measure(self, step: Step) -> Metrics:
        return self.score() if self.due(step.index) and parallel.rank() == 0 else {}

    def due(self, step: int) -> bool:
        """Whether the tasks are scored after this step."""
        finished = step + 1
        return finished == self._steps or (self._every > 0 and finished % self._every == 0)

    def score(self) -> Metrics:
        """The scores under the names of the log."""
        began = time.perf_counter()
        metrics: Metrics = {}
        for score in self._scorer.scores():
            metrics |= self._named(score)
        return metrics | {"time/tasks": time.perf_counter() - began}

    def _named(self, score: Score) -> Metrics:
        """Names and values for the log, which holds finite numbers only."""
        name = f"task/{score.task}/{score.measure}"
        if not math.isfinite(score.value):
            if name not in self._left_out:
                self._left_out.add(name)
                log.warning(f"{name} is {score.value} as yet: the model is too bad for it. It is not logged.")
            return {}
        metrics = {name: score.value}
        if score.stderr is not None:
            metrics[f"{name}/stderr"] = score.stderr
        if score.chance_level is not None:
            metrics[f"{name}/chance_level"] = score.chance_level
        return metrics
