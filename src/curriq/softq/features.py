"""What Q_φ sees of a window: φ's input vector, made of features of the forward pass.

The paper's input is the hidden state of the last token. The other inputs are remedies: the mean over the
tokens says more about a window than its last token, its loss says how well it is known, its source, where a
run has several, is what generalises fastest from few measured effects, and its dsir_score to the target is
known of every window, labelled or not. The last two need no forward pass.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from curriq.config import FeatureName
from curriq.state import Saved
from curriq.types import Features

LOSS_SCALE = 2.0
DSIR_SCALE = 2.0
SOURCE_SCALE = 4.0
STATE_SCALE = 0.2
"""Sizes of the entries, and so how fast Q learns from them. A normalised hidden state has many entries, which
can explain much of what is chance in a few measured effects; the loss and the source have few, and what they
explain lasts. experiments/LOG.md has the comparison."""
LOSS_MEMORY = 0.95
"""Share of the loss's running mean and spread that stays per step."""


class QInputs(Saved):
    """Builds φ's input [n, width] from the features of some windows; each row from one window alone.

    Args:
        names: which features, concatenated in this order.
        hidden: d, width of a hidden state.
        sources: number of the run's sources.
        layer_norm: give each hidden state mean 0 and standard deviation `STATE_SCALE` first, so that its own
            scale, which grows in training, does not matter.

    Attributes:
        hidden: d.
        width: entries of an input.
    """

    SAVED = ("_loss_mean", "_loss_spread")

    def __init__(
        self, names: Sequence[FeatureName], hidden: int, sources: int = 1, *, layer_norm: bool = False
    ) -> None:
        assert names
        self._names = tuple(names)
        self.hidden = hidden
        self._sources = sources
        self._layer_norm = layer_norm
        self._parts: dict[str, Callable[[Features], Tensor]] = {
            "last": lambda features: self._state(features.hidden),
            "mean": lambda features: self._state(_present(features.pooled, "pooled")),
            "loss": self._loss,
            "source": self._source,
            "dsir_score": self._dsir_score,
        }
        widths = {"last": hidden, "mean": hidden, "loss": 1, "source": sources, "dsir_score": 1}
        self.width = sum(widths[name] for name in self._names)
        self._loss_mean: float | None = None
        self._loss_spread = 0.0

    def __call__(self, features: Features) -> Float[Tensor, "n w"]:
        parts = [self._parts[name](features) for name in self._names]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def observe(self, features: Features) -> None:
        """Let the scale of the loss follow the windows of a step (all of them)."""
        if "loss" not in self._names:
            return
        loss = features.loss.double()
        mean, spread = loss.mean().item(), loss.std(correction=0).item()
        if self._loss_mean is None:
            self._loss_mean, self._loss_spread = mean, spread
        self._loss_mean += (1 - LOSS_MEMORY) * (mean - self._loss_mean)
        self._loss_spread += (1 - LOSS_MEMORY) * (spread - self._loss_spread)

    def _state(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return STATE_SCALE * F.layer_norm(hidden, (self.hidden,)) if self._layer_norm else hidden

    def _loss(self, features: Features) -> Float[Tensor, "n 1"]:
        """Distance from the running mean in running standard deviations; 0 before the first step."""
        if self._loss_mean is None or self._loss_spread <= 0:
            return torch.zeros_like(features.loss)[:, None]
        return LOSS_SCALE * (features.loss[:, None] - self._loss_mean) / self._loss_spread

    def _source(self, features: Features) -> Float[Tensor, "n S"]:
        one_hot = F.one_hot(_present(features.source, "source"), self._sources)
        return SOURCE_SCALE * one_hot.to(features.loss.dtype)

    def _dsir_score(self, features: Features) -> Float[Tensor, "n 1"]:
        return DSIR_SCALE * _present(features.known.get("dsir_score"), "dsir_score")[:, None]


def _present(value: Tensor | None, name: str) -> Tensor:
    assert value is not None, f"Q reads features.{name}, but the forward pass has not filled it in"
    return value
