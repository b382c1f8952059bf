"""Numbers of a step for the log: x-axes, shares of sources, seconds, downstream tasks."""

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from statistics import median
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq import parallel
from curriq.config import EvalConfig
from curriq.softq.equations import effective_batch_size, entropy
from curriq.state import Saved
from curriq.types import NO_COST, Cost, Metrics, Score, Stateful, Step

log = logging.getLogger("curriq")


PREDICTING_STEPS = 10
"""Steps from which the later ones are predicted."""


@runtime_checkable
class Signal(Stateful, Protocol):
    """Measures of every step whether Q predicts effects; `softq.signal` has the implementation."""

    def measure(self, step: Step) -> Metrics: ...
    def summary(self) -> Metrics: ...


@dataclass(eq=False)
class Meter(Saved):
    """Counts windows, tokens, operations and seconds, and adds up windows read and weight by source.

    Attributes:
        source_names: in the order of `Windows.source`.
        window: T, tokens per window.
        forward_flops: operations of one window's forward pass; backward costs twice as much.
        passes: forward passes per trained window (2 with dropout).
        trains: windows that a backward pass is run on, of those that are forwarded; all when None.
        signal: how much of the measured effects Q recovers.
        cost_per_window: what a forwarded window costs beside these passes: a reference model, recomputation
            under gradient checkpointing.
        peak_flops: operations per second that all devices of the run can do at most; None where nobody knows.
    """

    SAVED = (
        "windows_read",
        "windows_proposed",
        "windows_trained",
        "effective_windows",
        "flops",
        "seconds",
        "epoch",
        "weight_by_source",
        "read_by_source",
        "kl_from_uniform",
        "steps",
        "signal",
    )

    source_names: tuple[str, ...]
    _: KW_ONLY
    window: int
    forward_flops: int
    passes: int = 1
    trains: int | None = None
    cost_per_window: Cost = NO_COST
    peak_flops: float | None = None
    signal: Signal

    def __post_init__(self) -> None:
        self.windows_read = self.windows_proposed = self.windows_trained = self.flops = 0
        self.effective_windows = self.seconds = 0.0
        self.epoch: float | None = None
        self.weight_by_source = torch.zeros(len(self.source_names), dtype=torch.float64)
        self.read_by_source = torch.zeros(len(self.source_names), dtype=torch.int64)
        self.kl_from_uniform, self.steps = 0.0, 0

    def measure(self, step: Step, seconds: float) -> Metrics:
        """Add one step and return its metrics."""
        weights = step.weights.cpu().double()
        proposed, scored = len(step.offer), len(step.trained)
        effective = effective_batch_size(weights).item()
        weight_share = self._by_source(step.trained.windows.source, weights)
        read = torch.bincount(step.offer.sources_read, minlength=len(self.source_names))
        flops, trained = self.flops, self.windows_trained
        self._count(step.cost + self.cost_per_window * scored, scored)
        flops, trained = self.flops - flops, self.windows_trained - trained
        self.windows_proposed += proposed
        self.effective_windows += effective
        self.seconds += seconds
        self.weight_by_source += weight_share
        self.read_by_source += read
        # Of the policy: what a step draws from it and trains on may be a single window.
        kl = max(0.0, math.log(scored) - entropy(step.policy).item())
        self.kl_from_uniform += kl
        self.steps += 1
        metrics = {
            **self.signal.measure(step),
            **{f"x/{name}": total for name, total in self.totals().items()},
            "data/windows_read": float(step.offer.cost.windows_read),
            "train/mean_loss": step.features.loss.double().mean().item(),
            "policy/entropy": entropy(weights).item(),
            "policy/effective_batch_size": effective,
            "policy/effective_batch_fraction": effective / proposed,
            "policy/max_weight": weights.max().item(),
            "policy/kl_from_uniform": kl,
            "time/step": seconds,
            "time/propose_share": step.metrics.get("time/propose", 0.0) / max(seconds, 1e-9),
            "time/windows_per_second": proposed / max(seconds, 1e-9),
            "perf/tokens_per_second": trained * self.window / max(seconds, 1e-9),
        }
        if self.peak_flops is not None:
            metrics["perf/mfu"] = flops / max(seconds, 1e-9) / self.peak_flops
        if step.offer.epoch is not None:
            self.epoch = metrics["data/epoch"] = float(step.offer.epoch)
        families = {"weight_share": weight_share}
        if read.any():  # a proposer may live on what it has read before
            families["offered_share"] = read.double() / read.sum()
        for family, shares in families.items():
            for name, share in zip(self.source_names, shares.tolist(), strict=True):
                metrics[f"select/{family}/{name}"] = share
        return metrics

    def _count(self, cost: Cost, scored: int) -> None:
        """Add what a step read and computed.

        A forward pass over what is scored, and a backward pass, twice a forward, over what is trained on.
        With two passes every window is scored first; those that are trained on are forwarded again.
        """
        trained = scored if self.trains is None else min(scored, self.trains)
        forwards = scored + (self.passes - 1) * trained + 2 * trained + cost.forwards
        self.windows_read += cost.windows_read
        self.windows_trained += trained
        self.flops += forwards * self.forward_flops + cost.extra_flops

    def totals(self) -> Metrics:
        """The x-axes, by their names without `x/`."""
        return {
            "windows_read": self.windows_read,
            "windows_proposed": self.windows_proposed,
            "windows_trained": self.windows_trained,
            "effective_windows": self.effective_windows,
            "tokens": self.windows_trained * self.window,
            "flops": self.flops,
            "seconds": self.seconds,
        }

    def verdict(self) -> Metrics:
        """What the policy did to windows and whether Q predicted their effects, for the summary."""
        return {"kl_from_uniform": self.kl_from_uniform / max(1, self.steps)} | self.signal.summary()

    def shares(self) -> dict[str, dict[str, float]]:
        """`weight` and `read` → source → its share of all mixture weight, or of all windows read, so far."""
        totals = {"weight": self.weight_by_source, "read": self.read_by_source.double()}
        return {
            kind: dict(zip(self.source_names, (total / total.sum().clamp(min=1e-12)).tolist(), strict=True))
            for kind, total in totals.items()
        }

    def _by_source(self, source: Int[Tensor, "n"], values: Float[Tensor, "n"]) -> Float[Tensor, "S"]:
        return torch.zeros(len(self.source_names), dtype=torch.float64).index_add_(0, source, values)


def peak_memory(device: torch.device) -> Metrics:
    """Bytes that this process has had in memory at most, on the device of the model; nothing on Windows."""
    if device.type == "cuda":
        return {"memory/peak": float(torch.cuda.max_memory_allocated(device))}
    if sys.platform == "win32":
        return {}
    import resource

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory/peak": float(resident if sys.platform == "darwin" else 1024 * resident)}


class Prediction:
    """What a run's steps will take, from its first ones."""

    def __init__(self) -> None:
        self._seen = 0
        self._ordinary: list[float] = []
        self._held_out: list[float] = []

    def metrics(self, row: Metrics) -> Metrics:
        """`perf/predicted_seconds` of a step, once it is known, from the rows before this one."""
        measures, found = "time/reward" in row, {}
        ready = len(self._ordinary) >= PREDICTING_STEPS and (self._held_out or not measures)
        if ready:
            extra = median(self._held_out) if measures else 0.0
            found = {"perf/predicted_seconds": median(self._ordinary) + extra}
        if self._seen >= 1:  # the first step allocates, compiles and reads ahead
            if len(self._ordinary) < PREDICTING_STEPS:
                self._ordinary.append(row["time/step"] - held_out_seconds(row))
            if measures and len(self._held_out) < PREDICTING_STEPS:
                self._held_out.append(held_out_seconds(row))
        self._seen += 1
        return found


def held_out_seconds(row: Metrics) -> float:
    """Seconds of what a step measured on held-out text."""
    return row.get("time/reward", 0.0) + row.get("time/probe", 0.0)


class TaskProbe:
    """Scores θ_{k+1} on downstream tasks, on rank 0, every so many steps and after the last.

    Args:
        scores: judges the model in memory; `lm.harness.Harness.scores` does.
        config: when.
        steps: of the whole run.
    """

    def __init__(self, scores: Callable[[], list[Score]], config: EvalConfig, steps: int) -> None:
        self._scores = scores
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
        """The scores under the names of the log, which holds finite numbers only."""
        began = time.perf_counter()
        metrics: Metrics = {}
        for score in self._scores():
            name = f"task/{score.task}/{score.measure}"
            if math.isfinite(score.value):
                values = {"": score.value, "/stderr": score.stderr, "/chance_level": score.chance_level}
                metrics |= {name + end: value for end, value in values.items() if value is not None}
            elif name not in self._left_out:
                self._left_out.add(name)
                log.warning(f"{name} is {score.value} as yet: the model is too bad for it. It is not logged.")
        return metrics | {"time/tasks": time.perf_counter() - began}
