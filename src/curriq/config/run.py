"""All settings of a run, the pairs that exclude each other, and their form as plain values and TOML."""

import dataclasses
import functools
import logging
import os
import re
import reprlib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from curriq.config import search, sections
from curriq.config.aliases import FORMER, rename_settings, rename_source_keys
from curriq.config.bounds import Pairs, Section
from curriq.config.checks import errors_name, flag, refuse_unknown, require
from curriq.config.synonyms import MEANINGS, OURS, SOURCE_KEYS, plain
from curriq.errors import CurriqError

logger = logging.getLogger("curriq")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Everything that defines a run."""

    data: sections.DataConfig = field(default_factory=sections.DataConfig)
    tokenizer: sections.TokenizerConfig = field(default_factory=sections.TokenizerConfig)
    lm: sections.LMConfig = field(default_factory=sections.LMConfig)
    optim: sections.OptimConfig = field(default_factory=sections.OptimConfig)
    critic: sections.CriticConfig = field(default_factory=sections.CriticConfig)
    select: sections.SelectConfig = field(default_factory=sections.SelectConfig)
    langevin: search.LangevinConfig = field(default_factory=search.LangevinConfig)
    retrieval: search.RetrievalConfig = field(default_factory=search.RetrievalConfig)
    train: sections.TrainConfig = field(default_factory=sections.TrainConfig)
    log: sections.LogConfig = field(default_factory=sections.LogConfig)
    tasks: sections.EvalConfig = field(default_factory=sections.EvalConfig)

    def illegal_pairs(self) -> Pairs:
        for rules in (_sizes, _stream_inputs, _trained, _stream_filter, _langevin_rag, _sharded):
            yield from rules(self)

    def value(self, name: str) -> Any:
        """A setting by its flat name."""
        return getattr(getattr(self, field_owners()[name]), name)

    @property
    def queries(self) -> int:
        """K, queries per step of Langevin-RAG."""
        return self.langevin.chains or self.train.num_candidates

    @property
    def drawn(self) -> int:
        """Windows that a step trains on after it has scored all; 0 where it trains on all that it scores."""
        return 1 if self.train.train_on == "action" else self.train.train_subset_size

    @property
    def method(self) -> str:
        """What weighs the candidates: the selector's name, or `replay` for those of a recorded curriculum."""
        replays = bool(self.data.curriculum) and self.data.curriculum_weights
        return "replay" if replays else self.select.selector

    @property
    def filters_by_q(self) -> bool:
        """Whether Q decides before the forward pass which windows of the stream are taken. Where candidates
        come from a buffer, what is read into it is filtered by the prior alone."""
        streams = self.langevin.proposer == "stream"
        return self.method == "soft-q" and self.train.max_read_ratio > 1 and streams

    def override(self, **values: Any) -> "RunConfig":
        """A copy with fields replaced by their flat names: `config.override(beta=0.1, steps=50)`; CurriqError
        for an unknown name, a value of the wrong type, or one that its component refuses."""
        owners = field_owners()
        changed: dict[str, dict[str, Any]] = {}
        for name, value in _completed(self, rename_settings(values, self.train.max_read_ratio)).items():
            refuse_unknown([name], owners)
            section = changed.setdefault(owners[name], dict(vars(getattr(self, owners[name]))))
            value = _path_text(value) if isinstance(value, os.PathLike) else value
            plain_value = _expanded(name, value) if isinstance(value, str) else value
            section[name] = _source_tables(value) if name == "sources" else plain_value
        made, errors = dict[str, Any](), list[CurriqError]()
        for name, settings in changed.items():
            try:  # `dataclasses.replace` alone would not check the types
                made[name] = validated(type(getattr(self, name)), settings, flag)
            except CurriqError as error:
                errors.append(error)
        if errors:
            raise CurriqError.together(errors)
        return dataclasses.replace(self, **made)


def _path_text(path: os.PathLike[str]) -> str:
    """A path object as text; a bare name would be taken for a model of the hub."""
    text = os.fspath(path)
    return text if os.sep in text else os.path.join(os.curdir, text)


SIZES = ("reward_set_size", "validation_set_size", "test_set_size")
"""Sizes of the held-out sets."""


def _completed(base: RunConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The values with those that follow from them: sizes of held-out sets that somebody has set are meant
    exactly, and sources without the target of `base` have another one.

    Raises:
        CurriqError: of several sources none is named as the target, or one has no name.
    """
    if "held_out_sizes" not in values and any(name in values for name in SIZES):
        values["held_out_sizes"] = "exact"
    if "sources" in values and "target" not in values:
        values["sources"] = _source_tables(values["sources"])
        names = [_name_of(source) for source in values["sources"]]
        if len(names) == 1 and names[0] != base.data.target:
            values["target"] = names[0]
            _tell(f"--target is not given: it is {names[0]!r}, the only source.")
        elif names and base.data.target not in names:
            for number, (name, source) in enumerate(zip(names, values["sources"], strict=True), 1):
                require(bool(name), f"source {number} has no name: write name=NAME,path={_path_of(source)}.")
            raise CurriqError(
                f"--target is missing: name the source whose text the model should get better at, one of "
                f"{names}."
            )
    return values


@functools.cache
def _tell(notice: str) -> None:
    """Log a notice, once per process."""
    logger.info(notice)


def _name_of(source: Any) -> str:
    return str(source.get("name", "")) if isinstance(source, dict) else source.name


def _path_of(source: Any) -> str:
    return str(source.get("path", "PATH")) if isinstance(source, dict) else source.path


@functools.cache
def field_owners() -> dict[str, str]:
    """Flat field name → section of RunConfig that owns it."""
    owned = get_type_hints(RunConfig)
    return {f.name: name for name, section in owned.items() for f in dataclasses.fields(section)}


def differences(ours: RunConfig, theirs: RunConfig) -> list[tuple[str, Any, Any]]:
    """Flat name, value here, value there, of every setting that differs."""
    both = [(name, ours.value(name), theirs.value(name)) for name in field_owners()]
    return [(name, a, b) for name, a, b in both if a != b]


# Pairs of settings that exclude each other ------------------------------------------------------------


def _sizes(config: RunConfig) -> Pairs:
    """Sizes that another size bounds, and what the bandit needs."""
    bounds = {"reward_windows": "reward_set_size", "train_subset_size": "num_candidates"}
    if config.select.selector == "random-k":
        bounds["random_k"] = "num_candidates"
    for name, bound in bounds.items():
        if config.value(name) > config.value(bound):
            yield name, bound, "no more can be drawn; lower the one or raise the other"
    shards, n = config.data.stream_shards, config.train.num_candidates
    if n % shards and config.langevin.proposer == "stream" and not config.data.curriculum:
        use = f"use --num-candidates {n - n % shards or shards}, or a number of shards that divides {n}"
        yield "stream_shards", "num_candidates", f"every shard gives as many windows to a step; {use}"
    if config.select.selector == "bandit" and config.train.reward_every > 1:
        yield "selector", "reward_every", "it learns from every step's reward; use --reward-every 1"


def _stream_inputs(config: RunConfig) -> Pairs:
    """What needs the stream, when candidates come from elsewhere."""
    if config.method not in ("soft-q", "filter"):
        return
    searches = config.langevin.proposer != "stream"
    other = {"proposer": searches, "curriculum": bool(config.data.curriculum)}
    why = "a static score compares each window with the stream that it is read from"
    for name in (name for name, given in other.items() if given):
        if "static_score" in config.critic.q_features:
            yield "q_features", name, f"{why}; use other --q-features, or drop the latter"
    if config.data.curriculum:
        if config.select.prior:
            yield "prior", "curriculum", f"{why}; drop either"
        if config.train.max_read_ratio > 1:
            why = "the filter needs a stream to read; drop the latter, or use --max-read-ratio 1"
            yield "max_read_ratio", "curriculum", why
    if not searches:
        return
    ratio, filters = config.train.max_read_ratio, config.select.prior or config.method == "filter"
    if filters and config.data.stream_shards > 1:
        yield "stream_shards", "proposer", "one filter reads into the buffer; use --stream-shards 1"
    if config.select.prior and ratio == 1:
        why = "the prior decides which windows come into the buffer"
        yield "prior", "max_read_ratio", f"{why}; use --max-read-ratio 8, or drop --prior"
    if ratio > 1 and not filters:
        why = "only a prior filters what is read into the buffer"
        yield "max_read_ratio", "proposer", f"{why}; add --prior, or use --max-read-ratio 1"


def _trained(config: RunConfig) -> Pairs:
    """What the windows that are trained on exclude: what is credited must have been trained on."""
    train, credit = config.train, config.critic.credit
    if train.train_subset_size and config.method == "soft-q" and credit == "sampled":
        why = "the sampled window need not be in the subset; for one window use --train-on action, otherwise"
        yield "train_subset_size", "credit", f"{why} --credit mixture or counterfactual"
    if train.train_on == "mixture":
        return
    if config.method != "soft-q":
        yield "train_on", "selector", "only soft-q draws an action; use --train-subset-size 1"
    if train.train_subset_size:
        yield "train_on", "train_subset_size", "the action is one window; drop the latter"
    if train.max_read_ratio > 1:
        why = "the filter has drawn the windows already"
        yield "train_on", "max_read_ratio", f"{why}; use --max-read-ratio 1, or --train-on mixture"


def _stream_filter(config: RunConfig) -> Pairs:
    """What a policy that is applied before the forward pass excludes."""
    critic, train = config.critic, config.train
    this, off = "max_read_ratio", "--max-read-ratio 1"
    if config.method == "filter" and train.max_read_ratio == 1:
        why = "a filter needs more windows to choose from than it trains on; use --max-read-ratio 8"
        yield "selector", this, why
    if not config.filters_by_q:
        return
    late = " and ".join(name for name in critic.q_features if name not in sections.PRE_FORWARD_FEATURES)
    if late:
        use = f"use {' or '.join(sections.PRE_FORWARD_FEATURES)}, or {off}"
        yield this, "q_features", f"{late} of a window is not known before its forward pass; {use}"
    if critic.credit != "counterfactual":
        why = "the filter's temperature is fit to measured effects"
        yield this, "credit", f"{why}; use --credit counterfactual, or {off}"
    if critic.accept_fraction * train.max_read_ratio < 1:
        why = f"it must be at least 1/{train.max_read_ratio}, or the filter cannot read enough windows"
        yield this, "accept_fraction", f"{why}; raise either"
    for name in ("dirichlet_concentration", "uniform_share"):
        if getattr(critic, name):
            yield this, name, f"accepted windows all weigh the same; use {flag(name)} 0, or {off}"
    if not critic.q_weighting:
        yield this, "q_weighting", f"without a policy there is no filter; drop the latter, or use {off}"
    if train.train_subset_size:
        yield this, "train_subset_size", "both select by the policy; use one of them"


def _langevin_rag(config: RunConfig) -> Pairs:
    """What Langevin-RAG and its controls exclude."""
    langevin, retrieval = config.langevin, config.retrieval
    if langevin.proposer == "stream":
        return
    unknown = sorted({"loss", "source"} & set(config.critic.q_features))
    last_mean = f"has no {' and no '.join(unknown)}; use --q-features last, mean, or both"
    if langevin.proposer not in search.WITHOUT_Q and config.select.selector != "soft-q":
        use = "use --selector soft-q, and for uniform weights --no-q-weighting"
        yield "proposer", "selector", f"the proposer needs Q, and the selector learns none; {use}"
    if langevin.proposer not in search.WITHOUT_Q and unknown:
        yield "q_features", "proposer", f"a string that is searched {last_mean}"
    if retrieval.encoder == "hidden-state" and unknown:
        yield "encoder", "q_features", f"it embeds the inputs of Q, and a query {last_mean}"
    if langevin.query_start != "random" and langevin.query_tokens > config.data.window:
        start = f"--query-start {langevin.query_start}"
        yield "query_tokens", "window", f"{start} takes tokens of a window; lower --query-tokens"
    if langevin.query_start == "best" and langevin.proposer in search.WITHOUT_Q:
        yield "query_start", "proposer", "the best beginnings are those of greatest Q; use another start"
    if langevin.proposer == "vector-langevin":
        if retrieval.encoder != "hidden-state":
            why = "Q is a function of the retriever's vectors only where these are what Q reads"
            yield "proposer", "encoder", f"{why}; use --encoder hidden-state"
        elif not config.critic.q_layer_norm:
            why = "Q of a vector needs inputs of one length"
            yield "proposer", "q_layer_norm", f"{why}; use --q-layer-norm"
        if langevin.query_start in ("random", "best"):
            why = "chains of vectors begin at rows of the buffer or at reward windows"
            yield "query_start", "proposer", f"{why}; use --query-start buffer or reward"
    if config.queries > (retrieval.buffer_initial or retrieval.buffer_size):
        chains = "chains" if langevin.chains else "num_candidates"
        held = "buffer_initial" if retrieval.buffer_initial else "buffer_size"
        yield chains, held, "each query needs a window of its own; lower the one or raise the other"


def _sharded(config: RunConfig) -> Pairs:
    """What reads the weights by itself, when each process holds a part of them only."""
    if config.lm.engine not in ("fsdp", "hsdp"):
        return
    use = "use --engine ddp, or drop the latter"
    if config.langevin.proposer != "stream":
        yield "engine", "proposer", f"the search reads the model's embeddings by itself; {use}"
    if config.critic.td_into_theta:
        yield "engine", "td_into_theta", f"its gradient takes another way into the model; {use}"
    if config.lm.lora_rank:
        yield "engine", "lora_rank", f"adapters are small, so there is nothing to share; {use}"
    scores = config.select.prior or config.select.selector == "filter"
    if scores and config.data.stream_shards > 1 and config.select.static_score == "rho":
        why = "every process scores its own windows, and none can run a model in parts by itself"
        yield "engine", "static_score", f"{why}; use --engine ddp, or --stream-shards 1"
    if config.tasks.eval_tasks:
        why = "the tasks are scored by one process, which holds a part of the model only"
        yield "engine", "eval_tasks", f"{why}; score a checkpoint with `curriq eval`, or use --engine ddp"


# Plain values, of TOML files or of the command line ---------------------------------------------------


def validated(kind: type, values: dict[str, Any], spell: Callable[[str], str]) -> Any:
    """A dataclass from plain values, which may be strings; CurriqError for all that are missing, of the wrong
    type or refused by the dataclass, with their fields named as `spell` writes them."""
    from pydantic import ValidationError

    for name, value in values.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, bool) and not _takes_bool(kind, name):
                raise CurriqError(f"{spell(name)} = {str(one).lower()}: a number or text belongs here.")
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise CurriqError.together([_refused(one, spell) for one in error.errors()]) from None


@functools.cache
def _takes_bool(kind: type, name: str) -> bool:
    """Whether a field may be true or false, or is none of the dataclass; pydantic takes these for 1 and 0."""
    wanted = get_type_hints(kind).get(name, bool)
    return wanted is bool or bool in get_args(wanted) or Any in (wanted, *get_args(wanted))


@functools.cache
def _adapter(kind: type) -> Any:
    """Pydantic's validator of a dataclass. Building it takes ten times as long as using it, and a
    comparison has hundreds of configurations."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _refused(error: Any, spell: Callable[[str], str]) -> CurriqError:
    """One of pydantic's errors in our words."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, CurriqError):
        return cause
    name = ".".join((spell(str(error["loc"][0])), *map(str, error["loc"][1:])))
    value = reprlib.repr(error["input"])  # it may be a text of megabytes
    if error["type"] == "missing":
        return CurriqError(f"{name} is missing in {value}.")
    return CurriqError(f"{name} = {value}: {error['msg']}.")


def _source_tables(sources: Any) -> list[Any]:
    """Sources as `validated` takes them: objects as they are, tables with today's keys and paths expanded."""
    kinds = dict | sections.SourceConfig
    listed = isinstance(sources, list | tuple) and all(isinstance(source, kinds) for source in sources)
    rule = 'write each source as a table of its own, [[data.sources]] with name = "…" and path = "…".'
    require(listed, f"data.sources = {sources!r}: {rule}")
    tables = [_source_table(source) if isinstance(source, dict) else source for source in sources]
    for table in tables:
        weight = table.get("weight") if isinstance(table, dict) else table.weight
        require(not isinstance(weight, bool), f"weight = {str(weight).lower()}: a number belongs here.")
    return tables


def _source_table(table: dict[str, Any]) -> dict[str, Any]:
    table = rename_source_keys(table)
    known = sections.SourceConfig.__dataclass_fields__
    for name in table:
        if name not in known and (ours := SOURCE_KEYS.get(plain(name))):
            raise CurriqError(f"unknown source key {name!r}. Did you mean {ours!r}?")
    refuse_unknown(table, known, kind="source key")
    if isinstance(path := table.get("path"), str):
        table["path"] = _expanded("path", path)
    return table


def _expanded(setting: str, text: str) -> str:
    """The text with the values of environment variables, written ${NAME} or ${NAME:-DEFAULT}."""

    def expand(variable: re.Match[str]) -> str:
        name, default = variable.groups()
        value = os.environ.get(name) or default
        if value is None:
            state = "empty" if name in os.environ else "not set"
            raise CurriqError(
                f"{setting} = {text!r}: the environment variable {name} is {state}; set it, or write a "
                f"default as in ${{{name}:-data}}."
            )
        return value

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", expand, text)


def source_table(source: sections.SourceConfig) -> dict[str, Any]:
    """A source as a table of a run file, without what is at its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(source)}
    return {key: value for key, value in vars(source).items() if value != defaults[key]}


def format_source(source: sections.SourceConfig) -> str:
    """A source as one word of key=value pairs, without what is at its default; the command line reads it."""
    return ",".join(f"{key}={value}" for key, value in source_table(source).items())


def flat_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Flat name → plain value, from nested plain values; CurriqError for an unknown section or key."""
    _refuse_misplaced([name for name in values if name not in RunConfig.__dataclass_fields__], "")
    refuse_unknown(values, RunConfig.__dataclass_fields__)
    flat: dict[str, Any] = {}
    for section, settings in values.items():
        require(isinstance(settings, dict), f"[{section}] must be a table of settings, not {settings!r}.")
        own = [name for name, owner in field_owners().items() if owner == section]
        _refuse_misplaced([name for name in settings if name not in own], f"[{section}] ")
        refuse_unknown([name for name in settings if name not in FORMER], own, f"[{section}] ")
        flat |= settings
    return flat


def _refuse_misplaced(names: list[str], where: str) -> None:
    """Raise CurriqError for the first name that is a setting of another section, or another program's name of
    one; `where` is how the error begins."""
    owners = field_owners()
    for name in names:
        if name in owners:
            raise CurriqError(f"{where}{name} is a setting of [{owners[name]}]: write it there.")
        if ours := OURS.get(plain(name)):
            what = f"{ours} of [{owners[ours]}] ({MEANINGS[ours]})"
            raise CurriqError(f"{where}unknown setting {name!r}. Did you mean {what}?")


def from_dict(values: dict[str, Any], base: RunConfig | None = None) -> RunConfig:
    """A RunConfig from nested plain values over `base` (the defaults when None); CurriqError for an unknown
    section or key, a value of the wrong type, or a refused one."""
    return (base or RunConfig()).override(**flat_settings(values))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values, in TOML's and JSON's types; `from_dict(to_dict(c)) == c`."""
    return {
        section: {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}
        for section, settings in dataclasses.asdict(config).items()
    }


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; CurriqError if it is missing, unreadable or invalid."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CurriqError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise CurriqError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # the latter of thousands of nested brackets
        raise CurriqError(f"{path} is not valid TOML: {error}.") from None


def load_toml(path: str | Path, base: RunConfig | None = None) -> RunConfig:
    """The settings of a run file over `base` (the defaults when None); a CurriqError names the file."""
    values = read_tables(Path(path))
    with errors_name(path):
        return from_dict(values, base)


def load_run_config(run_dir: Path) -> RunConfig:
    """The configuration that a run wrote into its folder; CurriqError if there is none or it is invalid."""
    file = run_dir / "config.toml"
    require(file.exists(), f"{run_dir} is not the folder of a run: there is no {file.name} in it.")
    return load_toml(file)


def to_toml(config: RunConfig) -> str:
    """The whole configuration as a TOML document that `load_toml` reads back."""
    import tomlkit

    return tomlkit.dumps(to_dict(config))
