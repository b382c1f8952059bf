"""What `curriq try` compares: the arms, and the TOML of the comparison."""

from collections.abc import Sequence
from typing import Any

from curriq.config import SIZES, RunConfig, differences, source_table
from curriq.evaluate.plan import OWN
from curriq.presets import is_rule, rule_settings

STREAM = "data"
BASELINE, LEARNT, OWN_ARM = "plain", "recommended", "yours"
STATIC: dict[str, dict[str, Any]] = {
    "dsir-8": {"preset": "dsir"},
    "dsir-4": {"preset": "dsir", "static_share": 0.25},
    "quantile": {"preset": "dsir", "static_rule": "quantile"},
}
"""Static filters whose share the comparison chooses in hindsight, by name of the arm."""
SMALLER = ("reward_windows",)
"""Settings of a rule that a preset of sizes lowers too."""


def arms_of(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Arm → its table in the TOML. A rule of the user's own is an arm beside ours."""
    arms = {BASELINE: {"preset": "default", "selector": "uniform"}, **STATIC, LEARNT: {"preset": LEARNT}}
    # The default rule is that of somebody who has chosen none.
    for table in ({"preset": "default"}, *arms.values()):
        rule = RunConfig().override(**rule_of(table))
        if not any(name for name, _, _ in differences(config, rule) if is_rule(name) and name not in SMALLER):
            return arms
    own = {name: value for name, value, _ in differences(config, RunConfig()) if is_rule(name)}
    return arms | {OWN_ARM: {"preset": "default", **_plain(own)}}


def rule_of(table: dict[str, Any]) -> dict[str, Any]:
    """The rule of an arm's table."""
    rule = {name: value for name, value in rule_settings(table["preset"]).items() if is_rule(name)}
    return rule | {name: value for name, value in table.items() if name != "preset"}


def plan_toml(config: RunConfig, arms: dict[str, dict[str, Any]], seeds: Sequence[int], workers: int) -> str:
    """The comparison of these arms on the data, the model and the sizes of `config`."""
    import tomlkit

    shared = {
        name: value
        for name, value, _ in differences(config, RunConfig())
        if not is_rule(name) and name not in (*OWN, "split_seed")
    }
    if shared.keys() & set(SIZES):
        shared["held_out_sizes"] = config.data.held_out_sizes  # sizes alone would be meant exactly
    shared |= {name: config.value(name) for name in ("steps", "eval_every", "checkpoint_every")}
    table = {"seeds": list(seeds), "baseline": BASELINE, "workers": workers}
    document = {"compare": table, "arms": arms, "streams": {STREAM: _plain(shared)}}
    about = (
        "# Written by `curriq try`; `curriq compare FILE --out FOLDER` runs it too. See docs/compare.md.\n"
    )
    return about + tomlkit.dumps(document)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values in TOML's types; of sources what is not at its default."""
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return listed | {"sources": list(map(source_table, listed["sources"]))} if "sources" in listed else listed
