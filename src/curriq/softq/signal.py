"""The credit's signal: how much of the windows' measured effects Q has recovered."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.softq.temperature import Evidence, rank_correlation
from curriq.state import Saved
from curriq.types import Metrics, Step


class CreditSignal(Saved):
    """Regression of Q on the measured effects of a step's windows, over the last `memory` probes or so.

    A slope of 1 is the whole scale: Q tells two windows as far apart as their effects do. The paper's rule,
    which credits a window sampled from a mixture of N, recovers about 1/N of it.
    """

    SAVED = ("_probes", "_sums", "_correlation")

    def __init__(self, memory: float = 20.0) -> None:
        self._keep = 1 - 1 / memory
        self._probes = 0
        # Of e², eq and q², each less its step's mean, and the degrees of freedom.
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._correlation = Evidence(memory)

    def measure(self, step: Step) -> Metrics:
        """Of the probed windows that were trained on; nothing where Q or the effects are equal for all."""
        if step.q is None or step.effects is None:
            return {}
        self._probes += 1
        rows = step.effects.rows.cpu()
        own = rows < len(step.trained)
        return self.observe(step.q.cpu()[rows[own]], step.effects.effect.cpu()[own])

    def observe(self, q: Float[Tensor, "m"], effect: Float[Tensor, "m"]) -> Metrics:
        q, effect = (x.double() - x.double().mean() for x in (q, effect))
        if len(q) < 2 or not q.any() or not effect.any():
            return {}
        step = torch.stack([effect @ effect, effect @ q, q @ q, torch.tensor(len(q) - 1.0)])
        self._sums = self._keep * self._sums + step
        correlation = rank_correlation(q, effect)
        self._correlation.add(correlation)
        slope, error = self._slope()
        return {
            "critic/effect_correlation": correlation,
            "critic/recovered_scale": slope,
            "critic/recovered_scale_error": error,
        }

    def summary(self) -> Metrics:
        """Number of probes; the correlation over the last of them and the slope, with their errors."""
        if not self._correlation.count:
            return {"probes": self._probes}
        names = ("effect_correlation", "effect_correlation_error", "recovered_scale", "recovered_scale_error")
        values = (*self._correlation.mean_and_error(), *self._slope())
        return {"probes": self._probes} | dict(zip(names, values, strict=True))

    def _slope(self) -> tuple[float, float]:
        effects, both, values, freedom = self._sums.tolist()
        slope = both / effects
        residual = max(0.0, values - slope * both) / max(freedom - 1, 1.0)
        return slope, math.sqrt(residual / effects)
