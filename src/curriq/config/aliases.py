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
    ("q_features", "likeness"): "static_score",
    ("q_features", "dsir_score"): "static_score",
    ("proposer", "swaps"): "experiments/control_samplers.py:swaps",
    ("proposer", "embedding-langevin"): "experiments/control_samplers.py:embedding_langevin",
}
_REMOVED = {
    "needle": (False, "see experiments/needle.py"),
    "swap_candidates": (32, "it is a constant of experiments/control_samplers.py"),
    "swap_top_k": (64, "it is a constant of experiments/control_samplers.py"),
    "repeat_discount": (1.0, "it brought nothing, and did harm where what recurs is the truth"),
}
"""Settings that left the package: the value that still holds, and where to find what they did."""
FORMER = (*_SETTINGS, _SPLIT, *_REMOVED)


def rename_settings(settings: dict[str, Any], max_read_ratio: int) -> dict[str, Any]:
    """Flat settings under today's names and values, to lay over a configuration with this `max_read_ratio`.

    Values may be words of the command line. If both names of a setting are there, the later counts.
    """
    ratio = {_SETTINGS.get(name, name): value for name, value in settings.items()}.get("max_read_ratio")
    filters = str(ratio or max_read_ratio) != "1"
    names = _SETTINGS | {_SPLIT: "accept_fraction" if filters else "effective_batch_fraction"}
    renamed: dict[str, Any] = {}
    for former, value in settings.items():
        if former in _REMOVED:
            kept, where = _REMOVED[former]
            if str(value) != str(kept):
                _warn(f"{flag(former)} has no effect any more: {where}")
            continue
        name = names.get(former, former)
        if name != former:
            _warn(f"{flag(former)} is now {flag(name)}")
        several = isinstance(value, list | tuple)
        renamed[name] = [_value(name, v) for v in value] if several else _value(name, value)
    return renamed


def rename_source_keys(source: dict[str, Any]) -> dict[str, Any]:
    """A source's table under today's keys."""
    if "dirt" in source:
        _warn("the source key dirt is now corruption")
    return {"corruption" if key == "dirt" else key: value for key, value in source.items()}


def _value(name: str, value: Any) -> Any:
    """One value of a setting under today's name."""
    if not isinstance(value, str) or (name, value) not in _VALUES:
        return value
    _warn(f"{flag(name)} {value} is now {_VALUES[name, value]}")
    return _VALUES[name, value]


@functools.cache
def _warn(notice: str) -> None:
    """Log a notice, once per process."""
    logger.warning(notice)
