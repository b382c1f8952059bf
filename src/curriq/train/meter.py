"""The x-axes of a run, and what each source's share of the learning was."""

import time

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.softq.equations import effective_batch_size, entropy
from curriq.state import Saved
from curriq.train.loop import HeldOut
from curriq.types import NO_COST, Cost, Effects, Metrics, Mixture, Offer, Step


class Meter(Saved):
    """Counts windows, tokens, operations and seconds, and adds up weight by source.

    Args:
        source_names: in the order of `Windows.source`.
        window: T, tokens per window.
        forward_flops: operations of one window's forward pass; backward costs twice as much.
        passes: forward passes per trained window (2 with dropout).
        trains: windows that a backward pass is run on, of those that are forwarded; all when None.
        cost_per_window: what a forwarded window costs beside these passes: a reference model, recomputation
            under gradient checkpointing.
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
        "offered_by_source",
    )

    def __init__(
        self,
        source_names: tuple[str, ...],
        *,
        window: int,
        forward_flops: int,
        passes: int = 1,
        trains: int | None = None,
        cost_per_window: Cost = NO_COST,
    ) -> None:
        self.source_names = source_names
        self._window = window
        self._forward = forward_flops
        self._passes = passes
        self._trains = trains
        self._cost_per_window = cost_per_window
        self.windows_read = 0
        self.windows_proposed = 0
        self.windows_trained = 0
        self.effective_windows = 0.0
        self.flops = 0
        self.seconds = 0.0
        self.epoch: float | None = None
        self.weight_by_source = torch.zeros(len(source_names), dtype=torch.float64)
        self.offered_by_source = torch.zeros(len(source_names), dtype=torch.float64)

    def measure(self, step: Step, seconds: float) -> Metrics:
        """Add one step and return its metrics."""
        weights = step.weights.cpu().double()
        parts = [step.offer] if step.offer.rejected is None else [step.offer, step.offer.rejected]
        offered = torch.cat([part.windows.source for part in parts])
        n_proposed, n_scored = len(step.offer), len(step.trained)
        n_trained = n_scored if self._trains is None else min(n_scored, self._trains)
        effective = effective_batch_size(weights).item()
        weight_share = self._by_source(step.trained.windows.source, weights)
        offered_share = self._by_source(offered, torch.ones(len(offered), dtype=torch.float64) / len(offered))
        self._count(step.cost + self._cost_per_window * n_scored, n_scored, n_trained)
        self.windows_proposed += n_proposed
        self.windows_trained += n_trained
        self.effective_windows += effective
        self.seconds += seconds
        self.weight_by_source += weight_share
        self.offered_by_source += offered_share
        metrics = {
            "x/windows_read": self.windows_read,
            "x/windows_proposed": self.windows_proposed,
            "x/windows_trained": self.windows_trained,
            "x/effective_windows": self.effective_windows,
            "x/tokens": self.windows_trained * self._window,
            "x/flops": self.flops,
            "x/seconds": self.seconds,
            "data/windows_read": float(step.offer.cost.windows_read),
            "train/mean_loss": step.features.loss.double().mean().item(),
            "policy/entropy": entropy(weights).item(),
            "policy/effective_batch_size": effective,
            "policy/effective_batch_fraction": effective / n_proposed,
            "policy/max_weight": weights.max().item(),
            "time/step": seconds,
            "time/windows_per_second": n_proposed / max(seconds, 1e-9),
        }
        if step.offer.epoch is not None:
            self.epoch = metrics["data/epoch"] = float(step.offer.epoch)
        for name, weight, offer in zip(self.source_names, weight_share, offered_share, strict=True):
            metrics[f"select/weight_share/{name}"] = weight.item()
            metrics[f"select/offered_share/{name}"] = offer.item()
        return metrics

    def _count(self, cost: Cost, scored: int, trained: int) -> None:
        """Add what a step read and computed.

        A forward pass over what is scored, and a backward pass, twice a forward, over what is trained on.
        With two passes every window is scored first; those that are trained on are forwarded again.
        """
        forwards = scored + (self._passes - 1) * trained + 2 * trained + cost.forwards
        self.windows_read += cost.windows_read
        self.flops += forwards * self._forward + cost.extra_flops

    def shares(self) -> dict[str, dict[str, float]]:
        """Per source, its share of all mixture weight and of all windows read so far."""
        weight, offered = (
            (total / total.sum().clamp(min=1e-12)).tolist()
            for total in (self.weight_by_source, self.offered_by_source)
        )
        return {
            name: {"weight": w, "offered": o}
            for name, w, o in zip(self.source_names, weight, offered, strict=True)
        }

    def _by_source(self, source: Int[Tensor, "n"], values: Float[Tensor, "n"]) -> Float[Tensor, "S"]:
        return torch.zeros(len(self.source_names), dtype=torch.float64).index_add_(0, source, values)


class Stopwatch:
    """Seconds that parts of a step took; a part that did not run is absent."""

    def __init__(self) -> None:
        self._seconds: Metrics = {}

    def around(self, held_out: HeldOut) -> HeldOut:
        """The same measurements, their seconds logged as `time/probe` and `time/reward`."""
        return _Timed(held_out, self._seconds)

    def measure(self, step: Step) -> Metrics:
        """The seconds of the step that has just ended."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


class _Timed(Saved):
    """A `HeldOut` whose calls are timed; steps in which it measured nothing leave no time."""

    SAVED = ("_inner",)

    def __init__(self, inner: HeldOut, seconds: Metrics) -> None:
        self._inner = inner
        self._seconds = seconds
        self._before = 0.0

    def before(self, step: int, offer: Offer, mixture: Mixture) -> Effects | None:
        began = time.perf_counter()
        effects = self._inner.before(step, offer, mixture)
        self._before = time.perf_counter() - began
        return effects

    def after(self, step: int) -> tuple[float | None, Cost]:
        began = time.perf_counter()
        reward, cost = self._inner.after(step)
        if reward is not None:
            self._seconds["time/reward"] = time.perf_counter() - began
            self._seconds["time/probe"] = self._before
        return reward, cost
