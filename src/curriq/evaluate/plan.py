"""Reads the TOML of a comparison into the list of its runs, and refuses what would not compare."""

import logging
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from curriq.config import (
    FORMER,
    RunConfig,
    Section,
    SourceConfig,
    Within,
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
from curriq.config.effect import settings_read, unread, without_effect
from curriq.errors import CurriqError
from curriq.presets import own_settings, preset, rule_settings

logger = logging.getLogger("curriq")

OWN = {
    "seed": "[compare] seeds lists the seeds of all arms",
    "run_dir": "--out says where the comparison writes",
    "threads": "each worker gets an equal share of the cores",
    "progress": "the workers have no display of their own",
}
"""Settings of a run that the comparison decides, and where."""
SPLIT = {
    "split_seed": "each seed has a held-out split of its own; for one that all seeds share, set "
    "vary_split = false under [compare]"
}
"""The same while `vary_split` is true."""
SHARED = ("steps", "num_candidates", "eval_every", "model")
"""Settings that all arms of a stream must share, beside those of the data and the tokenizer."""
REPLAY = ("curriculum", "curriculum_weights")
"""Settings of the data that an arm may have to itself: a replay has the held-out sets of the others."""
OFFSET = "seed_offset"
"""Key of an arm: its training seed is the comparison's seed plus this, on the split of the latter."""
ONE_FUNCTION = (
    " A component of your own has no settings of its own: name one function per value, such as "
    'selector = "mine.py:level_4".'
)
WORKER_LOG = "worker.log"
"""File in a run's folder with what its worker said."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Section):
    """The table [compare]."""

    seeds: tuple[int, ...]
    baseline: str
    workers: Annotated[int, Within("[1, 1024]", above="each is a process with a model of its own")] = 1
    base: str = ""  # preset that everything starts from; the defaults when empty
    config: str = ""  # run file over the preset
    vary_split: bool = True  # each seed holds out other documents: split_seed = seed
    allow_constant_lr: bool = False  # compare at a learning rate that has not decayed

    def check(self) -> None:
        require(bool(self.seeds), "seeds is empty: list at least one, and six or more for a verdict.")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds = {list(self.seeds)}: one is there twice.")
        for seed in self.seeds:
            require(0 <= seed < 2**63, f"seeds: {seed}: a seed is 0 or greater, and has at most 63 bits.")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One cell of arms × seeds × streams; `config` is complete but for the threads.

    `seed` is the comparison's; an arm with `seed_offset` trains with another one on the same split.
    """

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
    arms: dict[str, dict[str, Any]]  # name → its own settings, `seed_offset` included
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
        decided = OWN | SPLIT if compare.vary_split else OWN
        arms = _named(tables.get("arms", {}), "arms", file.parent, decided)
        streams = _named(tables.get("streams", {}), "streams", file.parent, decided) or {"default": {}}
        refuse_unknown([compare.baseline], arms, "[compare] baseline: ", "arm")
        require(len(arms) > 1, "there is one arm only: a comparison needs the baseline and another.")
        start = preset(compare.base) if compare.base else RunConfig()
        start = load_toml(compare.config, start) if compare.config else start
        configs = {}
        for stream, arm in product(streams, arms):
            with errors_name(f"[arms.{arm}] on [streams.{stream}]"):
                settings = streams[stream] | arms[arm]
                configs[stream, arm] = start.override(**{k: v for k, v in settings.items() if k != OFFSET})
        for (stream, arm), config in configs.items():
            _require_comparable(config, configs[stream, compare.baseline], arm, compare)
        _require_distinct(configs, arms)
        _say_without_effect(configs, tables["arms"])
    runs = []
    for stream, seed, arm in product(streams, compare.seeds, arms):
        own: dict[str, Any] = {"seed": seed + arms[arm].get(OFFSET, 0)}
        own |= {"split_seed": seed} if compare.vary_split else {}
        folder = str(out / stream / f"{arm}-{seed}")
        config = configs[stream, arm].override(**own, run_dir=folder, threads=0, progress="none")
        runs.append(PlannedRun(stream=stream, arm=arm, seed=seed, config=config))
    return Plan(file=file, out=out, compare=compare, streams=tuple(streams), arms=arms, runs=tuple(runs))


def _compare_config(table: Any, workers: int | None) -> CompareConfig:
    require(isinstance(table, dict), "[compare] must be a table of settings.")
    refuse_unknown(table, CompareConfig.__dataclass_fields__, "[compare] ")
    for name in ("seeds", "baseline"):
        require(name in table, f"[compare] lacks {name}: write seeds = [0, 1, …] and baseline = ARM.")
    given = table if workers is None else table | {"workers": workers}
    return validated(CompareConfig, given, "[compare] {}".format)


def _named(tables: Any, kind: str, folder: Path, decided: dict[str, str]) -> dict[str, dict[str, Any]]:
    """[arms.*] or [streams.*], checked: a table's settings over those of its `file`, a run file beside the
    plan, over those of its `preset`. `decided` has the settings that the comparison decides, and where."""
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
        offset = _offset(own, f"[{kind}.{name}]", of_arm=kind == "arms")
        known = [setting for setting in own if setting not in FORMER]
        for setting in known:
            why = decided.get(setting, "")
            require(not why, f"[{kind}.{name}] {setting}: take it out; {why}.")
        own_parts = any(":" in str(own.get(setting, "")) for setting in ("selector", "proposer"))
        refuse_unknown(known, field_owners(), f"[{kind}.{name}] ", how=ONE_FUNCTION if own_parts else "")
        # An arm's preset is a whole rule, which leaves nothing of the rule of the base.
        settings_of = rule_settings if kind == "arms" else own_settings
        expanded[name] = {} if start is None else settings_of(str(start))
        if file is not None:
            path = folder / str(file)
            of_file = read_tables(path)
            with errors_name(path):
                expanded[name] |= flat_settings(of_file)
        expanded[name] |= own | offset
    return expanded


def _offset(own: dict[str, Any], where: str, *, of_arm: bool) -> dict[str, int]:
    """`seed_offset` with its value, taken out of a table's own settings; empty without one."""
    if OFFSET not in own:
        return {}
    value = own.pop(OFFSET)
    require(of_arm, f"{where} {OFFSET} = {value!r}: only an arm has one; put it into [arms.NAME].")
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    require(whole, f"{where} {OFFSET} = {value!r}: it must be a whole number of at least 0, such as 100.")
    return {OFFSET: value}


def _require_comparable(config: RunConfig, baseline: RunConfig, arm: str, compare: CompareConfig) -> None:
    if compare.vary_split:
        split, curriculum = config.data.split_seed, config.data.curriculum
        require(split == 0, f"split_seed = {split} in a run file: take it out; {SPLIT['split_seed']}.")
        require(
            not curriculum,
            f"curriculum = {curriculum!r}: its windows belong to one held-out split and may be test text of "
            "another; set vary_split = false under [compare], and split_seed to that of the recorded run.",
        )
    for name, ours, theirs in differences(config, baseline):
        of_data = field_owners()[name] in ("data", "tokenizer") and name not in REPLAY
        if of_data or name in SHARED:
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


def _require_distinct(configs: dict[tuple[str, str], RunConfig], arms: dict[str, dict[str, Any]]) -> None:
    """Refuse two arms of one stream that differ in nothing that is read, once presets, files and spellings
    are resolved: their runs would be the same, bit by bit."""
    seen: dict[tuple[str, int], list[tuple[str, dict[str, Any]]]] = {}
    for (stream, arm), config in configs.items():
        others, ours = seen.setdefault((stream, arms[arm].get(OFFSET, 0)), []), settings_read(config)
        for other, theirs in others:
            require(
                ours != theirs,
                f"[arms.{other}] and [arms.{arm}] have the same settings on the stream {stream!r}"
                f"{_but_unread(config, configs[stream, other])}, so they would train the same model twice. "
                "Take one out or change it; plain training is "
                'selector = "uniform", and how much two runs differ by chance alone shows an arm with the '
                f"baseline's settings and {OFFSET} = 100.",
            )
        others.append((arm, ours))


def _but_unread(config: RunConfig, other: RunConfig) -> str:
    """What differs and is not read, for an error; empty where nothing differs."""
    reasons = without_effect(config, [name for name, _, _ in differences(config, other)], str)
    return f", but for what is not read ({'; '.join(reasons)})" if reasons else ""


def _say_without_effect(configs: dict[tuple[str, str], RunConfig], own: dict[str, dict[str, Any]]) -> None:
    """Warn of what an arm's own table sets and no stream reads."""
    for arm, table in own.items():
        of_arm = [config for (_, name), config in configs.items() if name == arm]
        nowhere = set.intersection(*(set(unread(config)) for config in of_arm))
        for sentence in without_effect(of_arm[0], [name for name in table if name in nowhere], str):
            logger.warning(f"[arms.{arm}] {sentence}.")


def shown(value: Any) -> str:
    """A value as an error message shows it; sources by what is not at its default."""
    if isinstance(value, tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    return format_source(value) if isinstance(value, SourceConfig) else repr(value)
