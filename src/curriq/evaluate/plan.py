"""Reads the TOML of a comparison into the list of its runs, and refuses what would not compare."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curriq.config import (
    RunConfig,
    SourceConfig,
    differences,
    field_owners,
    format_source,
    from_dict,
    load_toml,
    require,
    require_at_least,
    unknown_key,
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
class CompareConfig:
    """The table [compare]."""

    seeds: tuple[int, ...]
    baseline: str
    workers: int = 1
    base: str = ""
    """Preset that everything starts from; the defaults when empty."""
    config: str = ""
    """Run file over the preset."""
    allow_constant_lr: bool = False
    """Compare at a learning rate that has not decayed."""

    def __post_init__(self) -> None:
        require(bool(self.seeds), "seeds is empty: list at least one, and six or more for a verdict.")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds = {list(self.seeds)}: one is there twice.")
        require(min(self.seeds) >= 0, f"seeds = {list(self.seeds)}: a seed is 0 or greater.")
        require_at_least(1, workers=self.workers)


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
    tables = _read(file)
    try:
        for table in tables:
            if table not in ("compare", "arms", "streams"):
                raise CurriqError(unknown_key(table, ["compare", "arms", "streams"], "table"))
        settings = tables.get("compare", {})
        compare = _compare_config(settings if workers is None else settings | {"workers": workers})
        arms = _named(tables.get("arms", {}), "arms")
        streams = _named(tables.get("streams", {}), "streams") or {"default": {}}
        if compare.baseline not in arms:
            raise CurriqError("[compare] baseline: " + unknown_key(compare.baseline, list(arms), "arm"))
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
    except CurriqError as error:
        raise CurriqError(f"{file}: {error}") from None
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


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CurriqError(f"{file}: there is no such file; examples/compare.toml is one.") from None
    except OSError as error:
        raise CurriqError(f"{file} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CurriqError(f"{file} is not valid TOML: {error}.") from None


def _compare_config(table: Any) -> CompareConfig:
    from pydantic import TypeAdapter, ValidationError

    require(isinstance(table, dict), "[compare] must be a table of settings.")
    known = list(CompareConfig.__dataclass_fields__)
    for name in table:
        if name not in known:
            raise CurriqError("[compare] " + unknown_key(name, known))
    for name in ("seeds", "baseline"):
        require(name in table, f"[compare] lacks {name}: write seeds = [0, 1, …] and baseline = ARM.")
    try:
        return TypeAdapter(CompareConfig).validate_python(table)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, CurriqError):
            raise CurriqError(f"[compare] {cause}") from None
        where = ".".join(map(str, first["loc"]))
        raise CurriqError(f"[compare] {where} = {first['input']!r}: {first['msg']}.") from None


def _named(tables: Any, kind: str) -> dict[str, dict[str, Any]]:
    """Check the names and keys of [arms.*] or [streams.*], and put in what their presets say."""
    require(
        isinstance(tables, dict) and all(isinstance(table, dict) for table in tables.values()),
        f"[{kind}] holds one table per name: write [{kind}.NAME] and its settings below.",
    )
    owners = list(field_owners())
    for name, settings in tables.items():
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
            f"[{kind}.{name!r}]: the name becomes a folder, so use letters, digits, '.', '_' and '-'.",
        )
        for setting in (name for name in settings if name != "preset"):
            if setting in OWN:
                raise CurriqError(f"[{kind}.{name}] {setting}: take it out; {OWN[setting]}.")
            if setting not in owners:
                raise CurriqError(f"[{kind}.{name}] " + unknown_key(setting, owners))
    return {name: _with_preset(settings) for name, settings in tables.items()}


def _with_preset(settings: dict[str, Any]) -> dict[str, Any]:
    """`preset = NAME` stands for the settings in which that preset differs from the defaults."""
    if "preset" not in settings:
        return settings
    own = {name: value for name, value in settings.items() if name != "preset"}
    return own_settings(settings["preset"]) | own


def _resolve(
    start: RunConfig, stream: str, of_stream: dict[str, Any], arm: str, of_arm: dict[str, Any]
) -> RunConfig:
    """The stream's settings over the base, the arm's over both, checked together."""
    owners = field_owners()
    nested: dict[str, dict[str, Any]] = {}
    for name, value in (of_stream | of_arm).items():
        nested.setdefault(owners[name], {})[name] = value
    try:
        return from_dict(nested, start)
    except CurriqError as error:
        raise CurriqError(f"[arms.{arm}] on [streams.{stream}]: {error}") from None


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
