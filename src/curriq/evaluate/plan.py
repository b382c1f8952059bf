"""Reads the TOML of a comparison into the list of its runs, and refuses what would not compare."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curriq.config import (
    FORMER,
    Count,
    RunConfig,
    Section,
    SourceConfig,
    differences,
    errors_name,
    field_owners,
    flat_settings,
    format_source,
    load_toml,
    read_tables,
    refuse_unknown,
    require,
    validated,
)
from curriq.errors import CurriqError
from curriq.presets import own_settings, preset

OWN = {
    "seed": "[compare] seeds lists the seeds of all arms",
    "run_dir": "--out says where the comparison writes",
    "threads": "each worker gets an equal share of the cores",
    "progress": "the workers have no display of their own",
}
"""Settings of a run that the comparison decides, and where."""

SHARED = ("steps", "num_candidates", "eval_every", "model")
"""Settings that all arms of a stream must share, beside those of the data and the tokenizer."""

WORKER_LOG = "worker.log"
"""File in a run's folder with what its worker said."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Section):
    """The table [compare]."""

    seeds: tuple[int, ...]
    baseline: str
    workers: Count = 1
    base: str = ""
    """Preset that everything starts from; the defaults when empty."""
    config: str = ""
    """Run file over the preset."""
    allow_constant_lr: bool = False
    """Compare at a learning rate that has not decayed."""

    def check(self) -> None:
        require(bool(self.seeds), "seeds is empty: list at least one, and six or more for a verdict.")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds = {list(self.seeds)}: one is there twice.")
        require(min(self.seeds) >= 0, f"seeds = {list(self.seeds)}: a seed is 0 or greater.")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One cell of arms × seeds × streams; `config` is complete but for the threads."""

    stream: str
    arm: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{self.stream}/{self.arm}-{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.config.log.run_dir)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All runs of a comparison. Arms of one seed stand side by side, so that a stop leaves whole pairs."""

    file: Path
    out: Path
    compare: CompareConfig
    streams: tuple[str, ...]
    arms: dict[str, dict[str, Any]]
    """Name → its own settings."""
    runs: tuple[PlannedRun, ...]


def load_plan(file: Path, out: Path | None = None, workers: int | None = None) -> Plan:
    """Read and check the whole file.

    Args:
        file: TOML with the tables [compare], [arms.NAME] and, when there is more than one stream or it
            needs settings, [streams.NAME]; docs/compare.md describes them.
        out: folder of the comparison; runs/NAME of the file when None.
        workers: instead of the file's.

    Raises:
        CurriqError: no such file, no valid TOML, an unknown or refused setting, or arms that would not
            compare.
    """
    out = out or Path("runs") / file.stem
    tables = read_tables(file)
    with errors_name(file):
        refuse_unknown(tables, ("compare", "arms", "streams"), kind="table")
        compare = _compare_config(tables.get("compare", {}), workers)
        arms = _named(tables.get("arms", {}), "arms", file.parent)
        streams = _named(tables.get("streams", {}), "streams", file.parent) or {"default": {}}
        refuse_unknown([compare.baseline], arms, "[compare] baseline: ", "arm")
        require(len(arms) > 1, "there is one arm only: a comparison needs the baseline and another.")
        start = preset(compare.base) if compare.base else RunConfig()
        start = load_toml(compare.config, start) if compare.config else start
        configs = {
            (stream, arm): _resolve(start, stream, of_stream, arm, of_arm)
            for stream, of_stream in streams.items()
            for arm, of_arm in arms.items()
        }
        for (stream, arm), config in configs.items():
            _require_comparable(config, configs[stream, compare.baseline], arm, compare)
    runs = tuple(
        PlannedRun(
            stream=stream,
            arm=arm,
            seed=seed,
            config=configs[stream, arm].override(
                seed=seed, run_dir=str(out / stream / f"{arm}-{seed}"), threads=0, progress="none"
            ),
        )
        for stream in streams
        for seed in compare.seeds
        for arm in arms
    )
    return Plan(file=file, out=out, compare=compare, streams=tuple(streams), arms=arms, runs=runs)


def _compare_config(table: Any, workers: int | None) -> CompareConfig:
    require(isinstance(table, dict), "[compare] must be a table of settings.")
    refuse_unknown(table, CompareConfig.__dataclass_fields__, "[compare] ")
    for name in ("seeds", "baseline"):
        require(name in table, f"[compare] lacks {name}: write seeds = [0, 1, …] and baseline = ARM.")
    given = table if workers is None else table | {"workers": workers}
    return validated(CompareConfig, given, "[compare] {}".format)


def _named(tables: Any, kind: str, folder: Path) -> dict[str, dict[str, Any]]:
    """[arms.*] or [streams.*], checked, with the settings of their presets and files put in."""
    require(
        isinstance(tables, dict) and all(isinstance(table, dict) for table in tables.values()),
        f"[{kind}] holds one table per name: write [{kind}.NAME] and its settings below.",
    )
    for name, settings in tables.items():
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
            f"[{kind}.{name!r}]: the name becomes a folder, so use letters, digits, '.', '_' and '-'.",
        )
        own = [setting for setting in settings if setting not in ("preset", "file", *FORMER)]
        for setting in own:
            require(setting not in OWN, f"[{kind}.{name}] {setting}: take it out; {OWN.get(setting)}.")
        refuse_unknown(own, field_owners(), f"[{kind}.{name}] ")
    return {name: _expanded(settings, folder) for name, settings in tables.items()}


def _expanded(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A table's settings over those of its `file`, a run file beside the plan, over those of its `preset`."""
    own = dict(settings)
    preset_name, file = own.pop("preset", None), own.pop("file", None)
    expanded = {} if preset_name is None else own_settings(str(preset_name))
    if file is not None:
        tables = read_tables(folder / str(file))
        with errors_name(folder / str(file)):
            expanded |= flat_settings(tables)
    return expanded | own


def _resolve(
    start: RunConfig, stream: str, of_stream: dict[str, Any], arm: str, of_arm: dict[str, Any]
) -> RunConfig:
    """The stream's settings over the base, the arm's over both, checked together."""
    with errors_name(f"[arms.{arm}] on [streams.{stream}]"):
        return start.override(**(of_stream | of_arm))


def _require_comparable(config: RunConfig, baseline: RunConfig, arm: str, compare: CompareConfig) -> None:
    for name, ours, theirs in differences(config, baseline):
        if field_owners()[name] in ("data", "tokenizer") or name in SHARED:
            raise CurriqError(
                f"[arms.{arm}] {name} = {shown(ours)}, but [arms.{compare.baseline}] has {shown(theirs)}: "
                "arms must share the data, the model, the steps and N, or their losses do not compare. Put "
                "it into [streams.NAME], or into the base."
            )
    require(
        config.optim.lr_schedule != "constant" or compare.allow_constant_lr,
        f'[arms.{arm}] lr_schedule = "constant": a loss at full learning rate is mostly noise of the last '
        'steps. Use "cosine" or "linear", or set allow_constant_lr = true under [compare].',
    )


def shown(value: Any) -> str:
    """A value as an error message shows it; sources by what is not at its default."""
    if isinstance(value, tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, SourceConfig):
        return format_source(value)
    return repr(value)
