"""Former names of settings, values and sources' keys: all are still read, each with a notice in the log."""

import functools
import logging
from typing import Any

from curriq.config.checks import flag

logger = logging.getLogger("curriq")

_SETTINGS = {
    "oversample": "max_read_ratio",
    "target_kept": "min_target_accept_rate",
    "full_calibration": "corr_for_full_sharpness",
    "weight_jitter": "dirichlet_concentration",
    "train_subset": "train_subset_size",
    "replay_size": "q_replay_size",
    "replay_batch": "q_replay_batch",
    "replay_updates": "q_replay_updates",
}
_SPLIT = "target_fraction"  # meant `accept_fraction` with a stream filter, `effective_batch_fraction` without
_VALUES = {
    ("temperature", "governed"): "gated",
    ("q_features", "likeness"): "dsir_score",
    ("proposer", "swaps"): "experiments/control_samplers.py:swaps",
    ("proposer", "embedding-langevin"): "experiments/control_samplers.py:embedding_langevin",
}
_LEFT = {
    "needle": "experiments/needle.py",
    "swap_candidates": "a constant of experiments/control_samplers.py",
    "swap_top_k": "a constant of experiments/control_samplers.py",
}
"""Settings that left the package, and where what they did is now; older run files are read without them."""
_SOURCE_KEYS = {"dirt": "corruption"}
FORMER = (*_SETTINGS, _SPLIT)
"""Former names of settings."""


def rename_settings(settings: dict[str, Any], max_read_ratio: int) -> dict[str, Any]:
    """Settings under today's flat names and values; if both names of one are there, the later counts.

    Args:
        settings: flat name → value, which may be a word of the command line.
        max_read_ratio: of the configuration that the settings are laid over.
    """
    ratio = {_SETTINGS.get(name, name): value for name, value in settings.items()}.get("max_read_ratio")
    filters = str(ratio or max_read_ratio) != "1"
    names = _SETTINGS | {_SPLIT: "accept_fraction" if filters else "effective_batch_fraction"}
    renamed: dict[str, Any] = {}
    for former, value in settings.items():
        if former in _LEFT:
            _notify(flag(former), _LEFT[former])
            continue
        name = names.get(former, former)
        if name != former:
            _notify(flag(former), flag(name))
        several = isinstance(value, list | tuple)
        renamed[name] = [_value(name, v) for v in value] if several else _value(name, value)
    return renamed


def rename_source_keys(source: dict[str, Any]) -> dict[str, Any]:
    """A source's table under today's keys."""
    for former in _SOURCE_KEYS.keys() & source.keys():
        _notify(f"the source key {former}", _SOURCE_KEYS[former])
    return {_SOURCE_KEYS.get(key, key): value for key, value in source.items()}


def _value(name: str, value: Any) -> Any:
    """One value of a setting under today's name."""
    new = _VALUES.get((name, value), value) if isinstance(value, str) else value
    if new is not value:
        _notify(f"{flag(name)} {value}", new)
    return new


@functools.cache
def _notify(former: str, name: str) -> None:
    """Log, once per process, that something is called otherwise now."""
    logger.warning("%s is now %s", former, name)
