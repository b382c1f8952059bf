"""All settings of a run, and the pairs of settings that exclude each other."""

import dataclasses
import functools
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, get_type_hints

from curriq.config import sections
from curriq.config.aliases import rename_settings
from curriq.config.checks import Pairs, Section, flag
from curriq.config.critic import PRE_FORWARD_FEATURES, CriticConfig
from curriq.config.langevin import WITHOUT_Q, LangevinConfig, RetrievalConfig
from curriq.config.values import refuse_unknown, source_tables, validated


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Everything that defines a run."""

    data: sections.DataConfig = field(default_factory=sections.DataConfig)
    tokenizer: sections.TokenizerConfig = field(default_factory=sections.TokenizerConfig)
    lm: sections.LMConfig = field(default_factory=sections.LMConfig)
    optim: sections.OptimConfig = field(default_factory=sections.OptimConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    select: sections.SelectConfig = field(default_factory=sections.SelectConfig)
    langevin: LangevinConfig = field(default_factory=LangevinConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    train: sections.TrainConfig = field(default_factory=sections.TrainConfig)
    log: sections.LogConfig = field(default_factory=sections.LogConfig)
    tasks: sections.EvalConfig = field(default_factory=sections.EvalConfig)

    def illegal_pairs(self) -> Pairs:
        for rules in (_sizes, _dsir_score, _stream_filter, _langevin_rag):
            yield from rules(self)

    def value(self, name: str) -> Any:
        """A setting by its flat name."""
        return getattr(getattr(self, field_owners()[name]), name)

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
        for name, value in rename_settings(values, self.train.max_read_ratio).items():
            refuse_unknown([name], owners)
            section = changed.setdefault(owners[name], dict(vars(getattr(self, owners[name]))))
            section[name] = source_tables(value) if name == "sources" else value
        # `dataclasses.replace` alone would not check the types.
        made = {name: validated(type(getattr(self, name)), s, flag) for name, s in changed.items()}
        return dataclasses.replace(self, **made)


def _sizes(config: RunConfig) -> Pairs:
    """Sizes that another size bounds, and what the bandit needs."""
    select, train, either = config.select, config.train, "lower the one or raise the other"
    if train.reward_windows > config.data.reward_set_size:
        yield "reward_windows", "reward_set_size", f"no more can be drawn; {either}"
    if select.selector == "random-k" and select.random_k > train.num_candidates:
        yield "random_k", "num_candidates", f"no more can be drawn; {either}"
    if train.train_subset_size > train.num_candidates:
        yield "train_subset_size", "num_candidates", f"no more can be drawn; {either}"
    if select.selector == "bandit" and train.reward_every > 1:
        yield "selector", "reward_every", "it learns from every step's reward; use --reward-every 1"


def _no_stream(config: RunConfig) -> list[str]:
    """The settings by which candidates come from elsewhere than the stream."""
    is_set = (config.langevin.proposer != "stream", bool(config.data.curriculum))
    return list(compress(("proposer", "curriculum"), is_set))


def _dsir_score(config: RunConfig) -> Pairs:
    if config.method == "soft-q" and "dsir_score" in config.critic.q_features:
        for name in _no_stream(config):
            why = "dsir_score compares each window with the stream that it is read from"
            yield "q_features", name, f"{why}; use other --q-features, or drop the latter"


def _stream_filter(config: RunConfig) -> Pairs:
    """What a policy that is applied before the forward pass excludes."""
    critic, train = config.critic, config.train
    this, off = "max_read_ratio", "--max-read-ratio 1"
    if config.method != "soft-q" or train.max_read_ratio == 1:
        return
    for name in _no_stream(config):
        yield this, name, f"the filter needs a stream to read; drop the latter, or use {off}"
    late = " and ".join(name for name in critic.q_features if name not in PRE_FORWARD_FEATURES)
    if late:
        use = f"use {' or '.join(PRE_FORWARD_FEATURES)}, or {off}"
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
    if langevin.proposer not in WITHOUT_Q and config.select.selector != "soft-q":
        use = "use --selector soft-q, and for uniform weights --no-q-weighting"
        yield "proposer", "selector", f"the proposer needs Q, and the selector learns none; {use}"
    if langevin.proposer not in WITHOUT_Q and unknown:
        yield "q_features", "proposer", f"a string that is searched {last_mean}"
    if retrieval.encoder == "hidden-state" and unknown:
        yield "encoder", "q_features", f"it embeds the inputs of Q, and a query {last_mean}"
    if langevin.query_start == "buffer" and langevin.query_tokens > config.data.window:
        yield "query_tokens", "window", "--query-start buffer takes tokens of a window; lower --query-tokens"
    first = retrieval.buffer_initial or retrieval.buffer_size
    if config.queries > first:
        chains = "chains" if langevin.chains else "num_candidates"
        held = "buffer_initial" if retrieval.buffer_initial else "buffer_size"
        yield chains, held, "each query needs a window of its own; lower the one or raise the other"


@functools.cache
def field_owners() -> dict[str, str]:
    """Flat field name → section of RunConfig that owns it."""
    sections = get_type_hints(RunConfig)
    return {f.name: name for name, section in sections.items() for f in dataclasses.fields(section)}


def differences(ours: RunConfig, theirs: RunConfig) -> list[tuple[str, Any, Any]]:
    """Flat name, value here, value there, of every setting that differs."""
    both = [(name, ours.value(name), theirs.value(name)) for name in field_owners()]
    return [(name, a, b) for name, a, b in both if a != b]
