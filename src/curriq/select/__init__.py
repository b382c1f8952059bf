"""Methods that decide which data to learn from: the paper's and every baseline, as scores in one loop."""

from collections.abc import Callable

from curriq.config import RunConfig
from curriq.plugins import find_builder
from curriq.select import bandit, competence, recorded, references, soft_q
from curriq.select.base import Context, Method, RandomK, Uniform, plain
from curriq.select.loss import ByLoss, Uncertainty, build_rho
from curriq.select.recorded import reorder
from curriq.types import Selector

__all__ = ["METHODS", "builder", "reorder"]

Builder = Callable[[RunConfig, Context], Method]


def _plain(make: Callable[[RunConfig, Context], Selector]) -> Builder:
    return lambda config, context: plain(make(config, context), config, context)


METHODS: dict[str, Builder] = {
    "soft-q": soft_q.build,
    "filter": references.build,
    "uniform": _plain(lambda config, context: Uniform()),
    "random-single": _plain(lambda config, context: RandomK(1, context.generators("random-k"))),
    "random-k": _plain(
        lambda config, context: RandomK(config.select.random_k, context.generators("random-k"))
    ),
    "high-loss": _plain(lambda config, context: ByLoss(config.select.selector_temperature, +1)),
    "low-loss": _plain(lambda config, context: ByLoss(config.select.selector_temperature, -1)),
    "uncertainty": _plain(lambda config, context: Uncertainty(config.select.selector_temperature)),
    "competence": competence.build,
    "rho": build_rho,
    "bandit": bandit.build,
    "replay": recorded.build,
}
"""The values of `--selector`, and `replay` for the weights of a recorded curriculum."""


def builder(name: str) -> Builder:
    """The function that builds the method called `name`, built in or the user's own.

    Raises:
        CurriqError: there is no such method.
    """
    return find_builder(name, METHODS, setting="--selector", group="curriq.selectors")
