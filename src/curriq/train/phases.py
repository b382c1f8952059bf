"""In which steps θ is put back after the update, so that only Q learns."""

from collections.abc import Callable

from curriq.config import TrainConfig

Resets = Callable[[int], bool]


def never(step: int) -> bool:
    return False


def always(step: int) -> bool:
    """The reset-θ ablation."""
    return True


def until(last: int) -> Resets:
    """Q warm-up: the first `last` steps."""
    return lambda step: step < last


def alternating(period: int) -> Resets:
    """Reset for `period` steps, train for `period` steps, and so on."""
    return lambda step: (step // period) % 2 == 0


def resets(config: TrainConfig) -> Resets:
    """θ is put back in a step in which any of the configured phases says so."""
    phases: list[Resets] = []
    if config.reset_theta:
        phases.append(always)
    if config.q_warmup_steps:
        phases.append(until(config.q_warmup_steps))
    if config.alternating_period:
        phases.append(alternating(config.alternating_period))
    return (lambda step: any(phase(step) for phase in phases)) if phases else never
