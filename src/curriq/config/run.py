"""All settings of a run, and their way to a dictionary or a TOML file and back."""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curriq.config.checks import flag, require, unknown_key
from curriq.config.critic import PRE_FORWARD_FEATURES, CriticConfig
from curriq.config.evaluation import EvalConfig
from curriq.config.langevin import NEEDS_Q, LangevinConfig, RetrievalConfig
from curriq.config.sections import (
    DataConfig,
    LMConfig,
    LogConfig,
    OptimConfig,
    SelectConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from curriq.errors import CurriqError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    langevin: LangevinConfig = field(default_factory=LangevinConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    tasks: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        require(
            self.train.reward_windows <= self.data.reward_set_size,
            f"--reward-windows = {self.train.reward_windows} is larger than the reward set "
            f"(--reward-set-size = {self.data.reward_set_size}): lower the one or raise the other.",
        )
        require(
            self.select.random_k <= self.train.num_candidates or self.select.selector != "random-k",
            f"--random-k = {self.select.random_k} is larger than --num-candidates = "
            f"{self.train.num_candidates}: random-k draws from the candidates.",
        )
        require(
            self.select.selector != "bandit" or self.train.reward_every == 1,
            f"--selector bandit with --reward-every {self.train.reward_every}: the bandit learns from the "
            "reward of every step; use --reward-every 1.",
        )
        require(
            self.train.train_subset <= self.train.num_candidates,
            f"--train-subset = {self.train.train_subset} is larger than --num-candidates = "
            f"{self.train.num_candidates}: the subset is drawn from the candidates.",
        )
        self._check_retrieval()
        self._check_steering()

    def _check_steering(self) -> None:
        """What a policy over the stream asks of the other sections."""
        critic, train = self.critic, self.train
        if self.method != "soft-q":
            return
        other = [f"--proposer {self.langevin.proposer}"] * (self.langevin.proposer != "stream")
        other += [f"--curriculum {self.data.curriculum} --no-curriculum-weights"] * bool(self.data.curriculum)
        asked = " ".join(critic.q_features)
        require(
            "dsir_score" not in critic.q_features or not other,
            f"--q-features {asked} with {' '.join(other)}: dsir_score is measured on the windows of a stream "
            "as they are read; name other --q-features, or drop the latter.",
        )
        if train.max_read_ratio == 1:
            return
        steered = f"--max-read-ratio {train.max_read_ratio}"
        require(
            not other,
            f"{steered} with {' '.join(other)}: it reads on in a stream until it has taken enough windows; "
            "drop the latter, or use --max-read-ratio 1.",
        )
        late = [name for name in critic.q_features if name not in PRE_FORWARD_FEATURES]
        require(
            not late,
            f"{steered} with --q-features {asked}: {' and '.join(late)} of a window is "
            f"not known before its forward pass; use {' or '.join(PRE_FORWARD_FEATURES)}, or --max-read-ratio 1.",
        )
        require(
            critic.credit == "counterfactual",
            f"{steered} with --credit {critic.credit}: how sharply to take windows is learnt from measured "
            "effects; use --credit counterfactual, or --max-read-ratio 1.",
        )
        require(
            critic.target_fraction * train.max_read_ratio >= 1,
            f"{steered} with --target-fraction {critic.target_fraction}: that share of the windows read is "
            f"taken at the sharpest, so it must be at least 1/{train.max_read_ratio}.",
        )
        for name in ("weight_jitter", "uniform_share"):
            value = getattr(critic, name)
            require(
                not value, f"{steered} with {flag(name)} {value}: it changes weights, and these are even."
            )
        require(
            critic.q_weighting, f"{steered} with --no-q-weighting: a uniform run needs --max-read-ratio 1."
        )
        require(
            not train.train_subset,
            f"{steered} with --train-subset {train.train_subset}: both spend the policy; use one of them.",
        )

    def _check_retrieval(self) -> None:
        """What Langevin-RAG and its controls ask of the other sections."""
        proposer, retrieval = self.langevin.proposer, self.retrieval
        if proposer == "stream":
            return
        require(
            proposer not in NEEDS_Q or self.select.selector == "soft-q",
            f"--proposer {proposer} climbs Q, which --selector {self.select.selector} has not: use "
            "--selector soft-q; to train uniformly on what was retrieved add --no-q-weighting.",
        )
        unknown = sorted({"loss", "source"} & set(self.critic.q_features))
        require(
            proposer not in NEEDS_Q or not unknown,
            f"--q-features {' '.join(self.critic.q_features)} with --proposer {proposer}: a string "
            f"that is searched has no {' and no '.join(unknown)}; use --q-features last, mean, or both.",
        )
        require(
            retrieval.encoder != "hidden-state" or not unknown,
            f"--encoder hidden-state with --q-features {' '.join(self.critic.q_features)}: it embeds what Q "
            f"reads, and a query has no {' and no '.join(unknown)}; use --q-features last, mean, or both.",
        )
        require(
            self.langevin.query_start == "random" or self.langevin.query_tokens <= self.data.window,
            f"--query-start buffer with --query-tokens = {self.langevin.query_tokens}: windows have "
            f"--window = {self.data.window} tokens; lower --query-tokens.",
        )
        first = min(retrieval.buffer_size, retrieval.buffer_initial or retrieval.buffer_size)
        require(
            self.queries <= first,
            f"--chains = {self.queries} is more than the {first} windows that the buffer holds in the first "
            "step (--buffer-size, --buffer-initial): raise these, or lower --chains (0 means "
            "--num-candidates).",
        )

    @property
    def queries(self) -> int:
        """K, queries per step of Langevin-RAG."""
        return self.langevin.chains or self.train.num_candidates

    @property
    def method(self) -> str:
        """What weighs the candidates: the selector's name, or `replay` for those of a recorded curriculum."""
        replays = bool(self.data.curriculum) and self.data.curriculum_weights
        return "replay" if replays else self.select.selector

    def override(self, **values: Any) -> "RunConfig":
        """A copy with fields replaced by their flat names: `config.override(beta=0.1, steps=50)`.

        Raises:
            CurriqError: an unknown name, a value of the wrong type, or one that its component refuses.
        """
        owners = field_owners()
        changed: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name not in owners:
                raise CurriqError(unknown_key(name, list(owners)))
            changed.setdefault(owners[name], {})[name] = value
        check_source_tables([s for s in values.get("sources", ()) if not isinstance(s, SourceConfig)])
        sections = {
            section: _replaced(getattr(self, section), fields, section) for section, fields in changed.items()
        }
        return dataclasses.replace(self, **sections)


def field_owners() -> dict[str, str]:
    """Flat field name → section of RunConfig that owns it."""
    defaults = RunConfig()
    return {
        setting.name: section.name
        for section in dataclasses.fields(RunConfig)
        for setting in dataclasses.fields(getattr(defaults, section.name))
    }


def differences(ours: RunConfig, theirs: RunConfig) -> list[tuple[str, Any, Any]]:
    """Flat name, value here, value there, of every setting that differs."""
    found = []
    for name, section in field_owners().items():
        a, b = getattr(getattr(ours, section), name), getattr(getattr(theirs, section), name)
        if a != b:
            found.append((name, a, b))
    return found


def from_dict(values: dict[str, Any], base: RunConfig | None = None) -> RunConfig:
    """A RunConfig from nested plain values; what is absent keeps the value it has in `base`.

    Raises:
        CurriqError: an unknown section or key, a value of the wrong type, or a refused value.
    """
    base = base or RunConfig()
    sections: dict[str, Any] = {}
    for section, settings in values.items():
        if section not in RunConfig.__dataclass_fields__:
            raise CurriqError(unknown_key(section, list(RunConfig.__dataclass_fields__)))
        if not isinstance(settings, dict):
            raise CurriqError(f"[{section}] must be a table of settings, not {settings!r}.")
        current = getattr(base, section)
        known = [f.name for f in dataclasses.fields(current)]
        for name in settings:
            if name not in known:
                raise CurriqError(f"[{section}] " + unknown_key(name, known))
        check_source_tables(settings.get("sources", []))
        sections[section] = _replaced(current, settings, section)
    return dataclasses.replace(base, **sections)


def source_from_dict(values: dict[str, Any]) -> SourceConfig:
    """One source from plain values.

    Raises:
        CurriqError: an unknown key, a missing one, a value of the wrong type, or a refused value.
    """
    check_source_tables([values])
    return _validated(SourceConfig, values, "sources")


def format_source(source: SourceConfig) -> str:
    """A source as one word of key=value pairs, without what is at its default; the command line reads it."""
    shown = [
        f"{field.name}={getattr(source, field.name)}"
        for field in dataclasses.fields(source)
        if field.default is dataclasses.MISSING or getattr(source, field.name) != field.default
    ]
    return ",".join(shown)


def _replaced(current: Any, settings: dict[str, Any], name: str) -> Any:
    """A copy of a section with some settings replaced; `dataclasses.replace` would not check their types."""
    merged = {f.name: getattr(current, f.name) for f in dataclasses.fields(current)} | settings
    return _validated(type(current), merged, name)


def _validated(kind: type, values: dict[str, Any], name: str) -> Any:
    """A dataclass from plain values, which may be strings.

    Raises:
        CurriqError: the first value that is missing, of the wrong type, or refused by the dataclass.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, CurriqError):
            raise CurriqError(str(cause)) from None
        if first["type"] == "missing":
            raise CurriqError(f"{where} is missing in {first['input']!r}.") from None
        raise CurriqError(f"{where} = {first['input']!r}: {first['msg']}.") from None


def check_source_tables(sources: Any) -> None:
    """Refuse what is no list of source tables, and keys that no source has."""
    known = list(SourceConfig.__dataclass_fields__)
    if not isinstance(sources, list | tuple) or not all(isinstance(source, dict) for source in sources):
        raise CurriqError(
            f"data.sources = {sources!r}: write each source as a table of its own, [[data.sources]] "
            'with name = "…" and path = "…".'
        )
    for source in sources:
        for name in source:
            if name not in known:
                raise CurriqError("[[data.sources]] " + unknown_key(name, known))


def load_toml(path: str | Path, base: RunConfig | None = None) -> RunConfig:
    """Read a run file over `base` (the defaults when None).

    Raises:
        CurriqError: no such file, no valid TOML, or a setting that `from_dict` refuses.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CurriqError(f"--config {path}: there is no such file.") from None
    except OSError as error:
        raise CurriqError(f"--config {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CurriqError(f"--config {path} is not valid TOML: {error}.") from None
    try:
        return from_dict(values, base)
    except CurriqError as error:
        raise CurriqError(f"{path}: {error}") from None


def load_run_config(run_dir: Path) -> RunConfig:
    """The configuration that a run wrote into its folder.

    Raises:
        CurriqError: the folder holds no run, or its configuration cannot be read.
    """
    settings = run_dir / "config.toml"
    if not settings.exists():
        raise CurriqError(f"{run_dir} is not the folder of a run: there is no {settings.name} in it.")
    return load_toml(settings)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values, in TOML's and JSON's types; `from_dict(to_dict(c)) == c`."""
    return {
        section: {
            name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()
        }
        for section, settings in dataclasses.asdict(config).items()
    }


def to_toml(config: RunConfig) -> str:
    """The whole configuration as a TOML document that `load_toml` reads back."""
    import tomlkit

    return tomlkit.dumps(to_dict(config))
