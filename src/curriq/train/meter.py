"""The x-axes of a run, and what each source's share of the learning was."""

import copy
import time

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.softq.equations import effective_batch_size, entropy
from curriq.train.loop import HeldOut, StepRecord
from curriq.types import Candidates, Effects, Metrics, Mixture, State


class Meter:
    """Counts windows, tokens, operations and seconds, and adds up weight by source.

    Args:
        source_names: in the order of `Candidates.source`.
        window: T, tokens per window.
        forward_flops: operations of one window's forward pass; backward costs twice as much.
        passes: forward passes per trained window (2 with dropout).
        trains: windows that a backward pass is run on, of those that are forwarded; all when None.
        extra_flops_per_window: operations that a trained window costs beside these passes: a reference model,
            recomputation under gradient checkpointing.
        flops_per_td_update: operations of TD-into-θ, in steps that have a previous transition.
    """

    def __init__(
        self,
        source_names: tuple[str, ...],
        *,
        window: int,
        forward_flops: int,
        passes: int = 1,
        trains: int | None = None,
        extra_flops_per_window: int = 0,
        flops_per_td_update: int = 0,
    ) -> None:
        self.source_names = source_names
        self._window = window
        self._forward = forward_flops
        self._passes = passes
        self._trains = trains
        self._extra = extra_flops_per_window
        self._per_td_update = flops_per_td_update
        self.windows_read = 0
        self.windows_proposed = 0
        self.windows_trained = 0
        self.effective_windows = 0.0
        self.flops = 0
        self.seconds = 0.0
        self.epoch: float | None = None
        self.weight_by_source = torch.zeros(len(source_names), dtype=torch.float64)
        self.offered_by_source = torch.zeros(len(source_names), dtype=torch.float64)

    def measure(self, record: StepRecord, seconds: float) -> Metrics:
        """Add one step and return its metrics."""
        weights = record.mixture.weights.cpu().double()
        offered = record.proposed.source
        if record.proposed.rejected is not None:
            offered = torch.cat([offered, record.proposed.rejected.source])
        n_proposed, n_scored = len(record.proposed), len(record.trained)
        n_trained = n_scored if self._trains is None else min(n_scored, self._trains)
        effective = effective_batch_size(weights).item()
        weight_share = self._by_source(record.trained.source, weights)
        offered_share = self._by_source(offered, torch.ones(len(offered), dtype=torch.float64) / len(offered))
        self.windows_read += int(record.proposed.metrics.get("data/windows_read", n_proposed))
        self.windows_proposed += n_proposed
        self.windows_trained += n_trained
        self.effective_windows += effective
        self.flops += self._training_flops(n_scored, n_trained) + record.proposed.flops
        self.flops += self._per_td_update if "critic/td_loss" in record.metrics else 0
        self.flops += int(record.metrics.get("held_out/forwards", 0)) * self._forward
        self.seconds += seconds
        self.epoch = record.proposed.metrics.get("data/epoch", self.epoch)
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
            "train/mean_loss": record.mixture.features.loss.double().mean().item(),
            "policy/entropy": entropy(weights).item(),
            "policy/effective_batch_size": effective,
            "policy/effective_batch_fraction": effective / n_proposed,
            "policy/max_weight": weights.max().item(),
            "time/step": seconds,
            "time/windows_per_second": n_proposed / max(seconds, 1e-9),
        }
        for name, weight, offer in zip(self.source_names, weight_share, offered_share, strict=True):
            metrics[f"select/weight_share/{name}"] = weight.item()
            metrics[f"select/offered_share/{name}"] = offer.item()
        return metrics

    def _training_flops(self, scored: int, trained: int) -> int:
        """A forward pass over what is scored, and a backward pass, twice a forward, over what is trained on.

        With two passes every window is scored first; those that are trained on are forwarded again.
        """
        forwards = scored + (self._passes - 1) * trained + 2 * trained
        return forwards * self._forward + scored * self._extra

    def shares(self) -> dict[str, dict[str, float]]:
        """Per source, its share of all mixture weight and of all proposed windows so far."""
        weight, offered = (
            (total / total.sum().clamp(min=1e-12)).tolist()
            for total in (self.weight_by_source, self.offered_by_source)
        )
        return {
            name: {"weight": w, "offered": o}
            for name, w, o in zip(self.source_names, weight, offered, strict=True)
        }

    def state_dict(self) -> State:
        return {name: copy.deepcopy(getattr(self, name)) for name in self._COUNTED}

    def load_state_dict(self, state: State) -> None:
        for name in self._COUNTED:
            setattr(self, name, copy.deepcopy(state[name]))

    _COUNTED = (
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

    def _by_source(self, source: Int[Tensor, "n"], values: Float[Tensor, "n"]) -> Float[Tensor, "S"]:
        return torch.zeros(len(self.source_names), dtype=torch.float64).index_add_(0, source, values)


class Stopwatch:
    """Seconds that parts of a step took; a part that was not asked is absent."""

    def __init__(self) -> None:
        self._seconds: Metrics = {}

    def around(self, held_out: HeldOut) -> HeldOut:
        """The same measurements, their seconds logged as `time/probe` and `time/reward`."""
        return _Timed(held_out, self._seconds)

    def measure(self, record: StepRecord) -> Metrics:
        """The seconds of the step that has just ended."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


class _Timed:
    """A `HeldOut` whose calls are timed; steps in which it measured nothing leave no time."""

    def __init__(self, inner: HeldOut, seconds: Metrics) -> None:
        self._inner = inner
        self._seconds = seconds
        self._before = 0.0

    def before(self, step: int, candidates: Candidates, mixture: Mixture) -> Effects | None:
        began = time.perf_counter()
        effects = self._inner.before(step, candidates, mixture)
        self._before = time.perf_counter() - began
        return effects

    def after(self, step: int) -> tuple[float | None, Metrics]:
        began = time.perf_counter()
        reward, metrics = self._inner.after(step)
        if reward is not None:
            self._seconds["time/reward"] = time.perf_counter() - began
            self._seconds["time/probe"] = self._before
        return reward, metrics

    def state_dict(self) -> State:
        return self._inner.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._inner.load_state_dict(state)


class NeedleProbe:
    """What the method makes of the needle among the haystack (needle-in-a-haystack experiment)."""

    def __init__(self, needle_source: int) -> None:
        self._needle_source = needle_source

    def measure(self, record: StepRecord) -> Metrics:
        """Weight, rank by weight (1 is best, ties share the middle), and Q advantage over the haystack.

        A window that the selector did not let through has weight 0.
        """
        weights = torch.zeros(len(record.proposed))
        weights[record.trained.rows] = record.mixture.weights.float().cpu()
        is_needle = record.proposed.source == self._needle_source
        needle, others = weights[is_needle].max(), weights[~is_needle]
        ties = (others == needle).sum().item()
        metrics = {
            "needle/weight": needle.item(),
            "needle/rank": 1 + (others > needle).sum().item() + ties / 2,
        }
        trained_needle = record.trained.source == self._needle_source
        if record.q is not None and trained_needle.any() and not trained_needle.all():
            q = record.q.cpu()
            metrics["needle/q_advantage"] = (q[trained_needle].max() - q[~trained_needle].mean()).item()
        return metrics
