"""Settings that a run does not read, because another one leaves out what they belong to.

A setting without effect is no error: bases and presets hold many. But who sets one should hear of it, and two
runs that differ by nothing else are the same run.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from curriq.config.checks import flag
from curriq.config.run import RunConfig, differences, field_owners
from curriq.config.search import PROPOSERS, WITHOUT_QUERY
from curriq.config.sections import SELECTORS

Unread = Iterator[tuple[Iterable[str], str]]
"""Names of settings, and what leaves them out."""


def unread(config: RunConfig) -> dict[str, str]:
    """Flat name → what leaves it out, of every setting that is known to change nothing in this run: neither
    the windows, the weights, the model nor the log. A component of the user's own may read any setting of the
    method, so that none of these is named then.
    """
    builtin = config.select.selector in SELECTORS and config.langevin.proposer in PROPOSERS
    rules = (_reading, *((_critic, _policy, _selectors, _static, _search) if builtin else ()))
    return {name: why for rule in rules for names, why in rule(config) for name in names}


def settings_read(config: RunConfig) -> dict[str, Any]:
    """Flat name → value, without what is unread. Runs in which these are equal are the same, bit by bit."""
    left_out = unread(config)
    read = {name: config.value(name) for name in field_owners() if name not in left_out}
    return read | {name: one_spelling(read[name]) for name in ("selector", "proposer") if name in read}


def one_spelling(component: str) -> str:
    """The name of a component, or `/the/path/of/its/file.py:function` however that is written."""
    place, _, function = component.rpartition(":")
    file = os.path.abspath(os.path.expanduser(place))  # without an error for ~NAME of nobody's
    return f"{file}:{function}" if place.endswith(".py") else component


def without_effect(config: RunConfig, names: Iterable[str], spell: Callable[[str], str] = flag) -> list[str]:
    """For each reason why some of the named settings are unread, `--gamma has no effect: REASON`."""
    reasons: dict[str, list[str]] = {}
    found = unread(config)
    for name in names:
        if name in found:
            reasons.setdefault(found[name], []).append(spell(name))
    return [
        f"{', '.join(named)} {'has' if len(named) == 1 else 'have'} no effect: {why}"
        for why, named in reasons.items()
    ]


def set_by_user(config: RunConfig) -> list[str]:
    """Names of the settings that are not at their defaults."""
    return [name for name, _, _ in differences(config, RunConfig())]


def _of(section: str, *, but: Iterable[str] = ()) -> list[str]:
    """Names of the settings of a section."""
    return [name for name, owner in field_owners().items() if owner == section and name not in but]


def _method(config: RunConfig) -> str:
    return "--curriculum" if config.method == "replay" else f"--selector {config.method}"


def _reading(config: RunConfig) -> Unread:
    """What is not of the method: adapters, a tokenizer of one's own, downstream tasks."""
    if not config.lm.lora_rank:
        yield ("lora_alpha", "lora_targets", "lora_dropout"), "--lora-rank is 0, so there are no adapters"
    kept = config.tokenizer.tokenizer == "auto" and config.lm.pretrained
    if kept or config.tokenizer.tokenizer not in ("auto", "train"):
        yield ("vocab_size", "tokenizer_sample_bytes"), "no tokenizer is trained"
    if not config.tasks.eval_tasks:
        yield _of("tasks", but=["eval_tasks"]), "--eval-tasks names none"
    if not config.data.topic_coherent:
        yield ("topic_pool_size", "topic_temperature"), "the held-out sets are not --topic-coherent"
    if not (config.data.topic_coherent or config.log.topic_similarity_every):
        yield ("topic_encoder",), "neither --topic-coherent nor --topic-similarity-every is set"
    if not config.data.curriculum:
        yield ("curriculum_weights",), "no --curriculum is given"


def _critic(config: RunConfig) -> Unread:
    """What Q learns, and from what."""
    critic, method = config.critic, config.method
    if method == "replay":
        yield ("selector",), "the weights are those of --curriculum"
    if method != "soft-q":
        yield _of("critic"), f"{_method(config)} has no Q"
        if method != "bandit" and config.langevin.proposer == "stream":
            yield ("reward", "reward_windows", "reward_every"), f"{_method(config)} learns from no reward"
        return
    if not critic.bellman:
        yield ("gamma",), "with --no-bellman Q learns no discounted value"
    if not critic.q_replay_size:
        yield ("q_replay_batch", "q_replay_updates"), "--q-replay-size is 0, so nothing is replayed"
    if critic.credit == "counterfactual":
        yield ("measure_effects",), "--credit counterfactual measures them in any case"
    elif not critic.measure_effects:
        yield ("probe_windows", "probe_decay"), f"--credit {critic.credit} measures no effects"


def _policy(config: RunConfig) -> Unread:
    """How sharp the policy is, and what it chooses among."""
    critic, rule = config.critic, config.critic.temperature
    if config.method not in ("soft-q", "filter"):
        yield ("max_read_ratio",), f"{_method(config)} filters nothing"
    if config.method != "soft-q":
        return
    if rule in ("fraction", "gated"):
        yield ("beta",), f"--temperature {rule} solves for it"
    if rule != "learned":
        yield ("beta_lr",), f"--temperature {rule} does not learn β"
    if rule != "gated":
        yield ("corr_for_full_sharpness",), f"--temperature {rule} does not ask how well Q ranks"
    if rule == "fixed":
        yield ("effective_batch_fraction", "accept_fraction"), "--temperature fixed takes --beta"
    if config.filters_by_q:
        yield ("effective_batch_fraction",), "the stream filter has --accept-fraction instead"
        if "static_score" not in critic.q_features:
            yield ("min_target_accept_rate",), "--q-features lacks static_score"
    else:
        of_filter = ("accept_fraction", "min_accept_fraction", "min_target_accept_rate")
        yield of_filter, "Q filters no stream (--max-read-ratio)"
    if rule != "gated":
        yield ("min_accept_fraction",), f"--temperature {rule} does not ask how well Q ranks"


OF_SELECTOR = {
    "selector_temperature": ("high-loss", "low-loss", "uncertainty", "rho"),
    "random_k": ("random-k",),
    "competence_initial": ("competence",),
    "competence_steps": ("competence",),
    "difficulty": ("competence",),
    "bandit_exploration": ("bandit",),
    "bandit_lr": ("bandit",),
}
"""Setting → the selectors that read it."""


def _selectors(config: RunConfig) -> Unread:
    for name, readers in OF_SELECTOR.items():
        if config.method not in readers:
            yield (name,), f"only --selector {' and '.join(readers)} reads it"


OF_RULE = {
    "static_share": ("share", "resample"),
    "static_quantile": ("quantile",),
    "static_sharpness": ("posterior",),
}
"""Setting → the static rules that read it."""


def _static(config: RunConfig) -> Unread:
    """What a static score and its rule read."""
    select, method = config.select, config.method
    accepts = method == "filter" or (method == "soft-q" and select.prior)
    scores = accepts or (method == "soft-q" and "static_score" in config.critic.q_features)
    if not scores:
        why = "no window gets a static score (--selector filter, --prior, --q-features static_score)"
        yield ("accept_target_source", *(n for n in _of("select") if n.startswith("static_"))), why
    elif select.static_score != "embedding":
        yield ("static_encoder",), f"--static-score {select.static_score} encodes nothing"
    if method != "rho" and not (scores and select.static_score in ("perplexity", "rho")):
        yield ("reference_model",), "nothing is scored under a second model"
    if not accepts:
        why = "no static filter accepts or rejects (--selector filter, --prior)"
        yield ("static_rule", "target_passes", "sharp_start"), why
    for name, rules in OF_RULE.items():
        if scores and not (accepts and select.static_rule in rules):
            rule = f"--static-rule {select.static_rule} does not read it" if accepts else "no rule is applied"
            yield (name,), rule
    if accepts and not select.accept_target_source:
        yield ("target_passes",), "the target's label is not trusted (--accept-target-source)"
    if accepts and config.lm.pretrained:
        yield ("sharp_start",), "the model is pretrained"


def _search(config: RunConfig) -> Unread:
    """What Algorithm 2 and its controls read."""
    kind = config.langevin.proposer
    this = f"--proposer {kind}"
    if kind == "stream":
        yield _of("langevin", but=["proposer"]), f"{this} searches nothing"
        yield _of("retrieval"), f"{this} has no buffer"
        return
    if kind not in ("langevin", "vector-langevin"):
        searching = [name for name in _of("langevin") if name.startswith(("langevin_", "bridge_"))]
        yield (*searching, "energy_temperature", "fluency"), f"{this} follows no gradient"
    if kind != "vector-langevin":
        yield ("target_pull",), f"{this} searches no vectors"
    if kind != "best-of-random":
        yield ("random_strings",), f"{this} draws no random strings"
    if kind in WITHOUT_QUERY:
        of_query = ("query_start", "search_every", "encoder", "encoder_precision", "index", "centre_queries")
        of_draw = ("retrieval_top_k", "retrieval_temperature", "retrieval_draw")
        yield (*of_query, *of_draw), f"{this} has no query"
    if kind != "direct-q" and config.langevin.query_start != "best":
        yield ("direct_pool",), "it is the pool of --proposer direct-q and --query-start best"
