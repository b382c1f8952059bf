"""Former names of settings, of sources' keys and of values: all still read, each with a notice in the log."""

import functools
import logging
from typing import Any

from curriq.config.checks import flag

logger = logging.getLogger("curriq")

SETTINGS = {
    "oversample": "max_read_ratio",
    "target_kept": "min_target_accept_rate",
    "full_calibration": "corr_for_full_sharpness",
    "weight_jitter": "dirichlet_concentration",
    "train_subset": "train_subset_size",
    "replay_size": "q_replay_size",
    "replay_batch": "q_replay_batch",
    "replay_updates": "q_replay_updates",
}
"""Former name of a setting → its name."""

SPLIT = "target_fraction"
"""Former name of `accept_fraction` where a stream filter selects, of `effective_batch_fraction` elsewhere."""

FORMER = (*SETTINGS, SPLIT)
"""All former names of settings."""

VALUES = {"temperature": {"governed": "gated"}, "q_features": {"likeness": "dsir_score"}}
"""Setting → former value → its name."""

SOURCE_KEYS = {"dirt": "corruption"}
"""Former key of a source → its name."""


def rename_settings(settings: dict[str, Any], max_read_ratio: int) -> dict[str, Any]:
    """Settings by flat name, under the names and values of today; of two spellings the later one counts.

    Args:
        settings: flat name, former or not → value, which may be a string from the command line.
        max_read_ratio: of the configuration that the settings are laid over.
    """
    named = {SETTINGS.get(name, name): value for name, value in settings.items()}
    filters = str(named.get("max_read_ratio", max_read_ratio)) != "1"
    names = SETTINGS | {SPLIT: "accept_fraction" if filters else "effective_batch_fraction"}
    renamed: dict[str, Any] = {}
    for former, value in settings.items():
        name = names.get(former, former)
        if name != former:
            _notify(flag(former), flag(name))
        renamed[name] = _rename_value(name, value)
    return renamed


def rename_source_keys(source: dict[str, Any]) -> dict[str, Any]:
    """A source's table under the keys of today."""
    for former in source.keys() & SOURCE_KEYS.keys():
        _notify(f"the source key {former!r}", repr(SOURCE_KEYS[former]))
    return {SOURCE_KEYS.get(key, key): value for key, value in source.items()}


def _rename_value(name: str, value: Any) -> Any:
    """A setting's value, or each of its values, under the name of today."""
    if isinstance(value, list | tuple):
        return [_rename_value(name, item) for item in value]
    former = VALUES.get(name, {})
    if not isinstance(value, str) or value not in former:
        return value
    _notify(f"{flag(name)} {value}", former[value])
    return former[value]


@functools.cache
def _notify(former: str, name: str) -> None:
    """Log once per process that something has another name now."""
    logger.warning("%s is now %s", former, name)
