"""Reads the TOML of a comparison into the list of its runs, and refuses what would not compare."""

import re
from dataclasses import dataclass
from itertools import product
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
    base: str = ""  # preset that everything starts from; the defaults when empty
    config: str = ""  # run file over the preset
    allow_constant_lr: bool = False  # compare at a learning rate that has not decayed

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
    arms: dict[str, dict[str, Any]]  # name → its own settings
    runs: tuple[PlannedRun, ...]


def load_plan(file: Path, out: Path | None = None, workers: int | None = None) -> Plan:
    """The comparison that a TOML file describes (docs/compare.md), in the folder `out` (runs/NAME of the file
    when None) and with so many workers (the file's when None).

    Raises:
        CurriqError: no such file, no valid TOML, an unknown or refused setting, or arms that do not compare.
    """
    out = out or Path("runs") / file.stem
    require(file.exists(), f"{file}: there is no such file; examples/compare.toml is one.")
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
        configs = {}
        for stream, arm in product(streams, arms):
            with errors_name(f"[arms.{arm}] on [streams.{stream}]"):
                configs[stream, arm] = start.override(**(streams[stream] | arms[arm]))
        for (stream, arm), config in configs.items():
            _require_comparable(config, configs[stream, compare.baseline], arm, compare)
    runs = []
    for stream, seed, arm in product(streams, compare.seeds, arms):
        own = {"seed": seed, "run_dir": str(out / stream / f"{arm}-{seed}")}
        config = configs[stream, arm].override(**own, threads=0, progress="none")
        runs.append(PlannedRun(stream=stream, arm=arm, seed=seed, config=config))
    return Plan(file=file, out=out, compare=compare, streams=tuple(streams), arms=arms, runs=tuple(runs))


def _compare_config(table: Any, workers: int | None) -> CompareConfig:
    require(isinstance(table, dict), "[compare] must be a table of settings.")
    refuse_unknown(table, CompareConfig.__dataclass_fields__, "[compare] ")
    for name in ("seeds", "baseline"):
        require(name in table, f"[compare] lacks {name}: write seeds = [0, 1, …] and baseline = ARM.")
    given = table if workers is None else table | {"workers": workers}
    return validated(CompareConfig, given, "[compare] {}".format)


def _named(tables: Any, kind: str, folder: Path) -> dict[str, dict[str, Any]]:
    """[arms.*] or [streams.*], checked: a table's settings over those of its `file`, a run file beside the
    plan, over those of its `preset`."""
    require(
        isinstance(tables, dict) and all(isinstance(table, dict) for table in tables.values()),
        f"[{kind}] holds one table per name: write [{kind}.NAME] and its settings below.",
    )
    expanded = {}
    for name, settings in tables.items():
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
            f"[{kind}.{name!r}]: the name becomes a folder, so use letters, digits, '.', '_' and '-'.",
        )
        own = dict(settings)
        start, file = own.pop("preset", None), own.pop("file", None)
        known = [setting for setting in own if setting not in FORMER]
        for setting in known:
            require(setting not in OWN, f"[{kind}.{name}] {setting}: take it out; {OWN.get(setting)}.")
        refuse_unknown(known, field_owners(), f"[{kind}.{name}] ")
        expanded[name] = {} if start is None else own_settings(str(start))
        if file is not None:
            path = folder / str(file)
            of_file = read_tables(path)
            with errors_name(path):
                expanded[name] |= flat_settings(of_file)
        expanded[name] |= own
    return expanded


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
    return format_source(value) if isinstance(value, SourceConfig) else repr(value)
