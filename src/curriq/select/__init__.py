"""Methods that decide which data to learn from: the paper's and every baseline, as scores in one loop."""

from collections.abc import Callable

from curriq.config import RunConfig
from curriq.plugins import find_builder
from curriq.select import bandit, base, competence, loss, recorded, soft_q
from curriq.select.base import Context, Method
from curriq.select.recorded import reorder

__all__ = ["METHODS", "builder", "reorder"]

METHODS: dict[str, Callable[[RunConfig, Context], Method]] = {
    "soft-q": soft_q.build,
    "uniform": base.build_uniform,
    "random-single": base.build_random_single,
    "random-k": base.build_random_k,
    "high-loss": loss.build_high_loss,
    "low-loss": loss.build_low_loss,
    "uncertainty": loss.build_uncertainty,
    "competence": competence.build,
    "rho": loss.build_rho,
    "bandit": bandit.build,
    "replay": recorded.build,
}
"""The values of `--selector`, and `replay` for the weights of a recorded curriculum."""


def builder(name: str) -> Callable[[RunConfig, Context], Method]:
    """The function that builds the method called `name`, built in or the user's own.

    Raises:
        CurriqError: there is no such method.
    """
    return find_builder(name, METHODS, setting="--selector", group="curriq.selectors")
