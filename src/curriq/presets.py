"""Named full runs: plain functions that return a RunConfig. `curriq presets` lists them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from curriq.config import (
    EMBEDDED_SOURCES,
    SIZES,
    RunConfig,
    SourceConfig,
    field_owners,
    flat_settings,
    refuse_unknown,
    to_dict,
)


def default() -> RunConfig:
    """A small model from scratch on Python's own documentation and source, mostly corrupted; minutes."""
    return RunConfig()


def recommended() -> RunConfig:
    """What gained most on the development streams: a filter by a static prior that measurements correct."""
    return weighted().override(
        prior=True,
        accept_target_source=True,
        bellman=False,  # y is one number for all windows of a step: it changes no run measurably
        max_read_ratio=8,
        sharp_start=20_000,
        accept_fraction=0.5,
        min_accept_fraction=0.125,
        q_features=("source", "static_score"),
        probe_windows=24,
        reward_every=16,
        q_replay_size=512,
    )


def dsir() -> RunConfig:
    """A static filter, nothing learned: the best eighth of the stream by n-gram importance weights."""
    return RunConfig().override(selector="filter", static_rule="share", max_read_ratio=8)


def prior() -> RunConfig:
    """What `recommended` chooses by as long as its gate is shut: nothing is measured or learned."""
    return dsir().override(static_rule="posterior", accept_target_source=True, sharp_start=20_000)


def classifier() -> RunConfig:
    """`dsir` with a linear classifier of n-grams, target against stream."""
    return dsir().override(static_score="classifier")


def embedding() -> RunConfig:
    """`dsir` with the similarity of embeddings to those of the target."""
    return dsir().override(static_score="embedding")


def oracle() -> RunConfig:
    """A static filter by the labels alone: the target's own source."""
    return dsir().override(static_score="labels", static_rule="posterior")


MEASURED_CREDIT: dict[str, Any] = {
    "selector": "soft-q",
    "credit": "counterfactual",
    "probe_windows": 16,
    "reward": "paired",
    "temperature": "gated",
    "q_standardise": True,
    "q_layer_norm": True,
    "q_weight_decay": 1.0,
    "q_replay_batch": 128,
    "q_replay_updates": 8,
}
"""A critic that learns from measured effects; its inputs and its windows are up to the preset."""


def weighted() -> RunConfig:
    """Measured effects without a prior: the policy weighs the windows of the stream and filters none."""
    return RunConfig().override(
        **MEASURED_CREDIT,
        reward_windows=8,
        reward_every=4,
        effective_batch_fraction=0.7,
        q_features=("source", "loss"),
        q_replay_size=2048,
    )


def small() -> RunConfig:
    """A size for comparisons: two layers of width 64, 400 steps of 32 windows of 32 tokens."""
    return RunConfig().override(
        model="random:llama:hidden_size=64,intermediate_size=192,num_hidden_layers=2,num_attention_heads=4",
        steps=400,
        window=32,
        vocab_size=1024,
        validation_set_size=192,
        test_set_size=384,
        held_out_sizes="fit",
        eval_every=20,
        checkpoint_every=200,
        micro_batch=32,
        head_chunk_tokens=1024,
    )


def paper() -> RunConfig:
    """The method as published: GPT-2 (124M) on OpenWebText, N = M = 256, T = 512, literal credit rule."""
    openwebtext = SourceConfig(
        name="openwebtext",
        path="hub:Skylion007/openwebtext",
        hub_revision="refs/convert/parquet",  # `datasets` no longer runs the main branch's loading script
    )
    return RunConfig().override(
        sources=(openwebtext,),
        target="openwebtext",
        window=512,
        held_out_share=0.05,
        reward_set_size=2048,
        validation_set_size=512,
        test_set_size=1024,
        held_out_sizes="fit",
        model="gpt2",
        lm_lr=5e-5,
        lr_schedule="constant",
        lr_warmup_steps=0,
        grad_clip=1.0,
        selector="soft-q",
        beta=1.0,
        gamma=0.9,
        polyak_tau=0.01,
        q_lr=1e-3,
        q_grad_clip=1.0,
        q_hidden=32,
        reforward_action=True,
        td_step="own",
        steps=10_000,
        num_candidates=256,
        reward_windows=256,
        eval_every=100,
        checkpoint_every=500,
    )


def paper_replay() -> RunConfig:
    """`paper` with the authors' published Q replay: 256 pairs, one batch of 32 per step."""
    return paper().override(q_replay_size=256, q_replay_batch=32, q_replay_updates=1)


def paper_langevin() -> RunConfig:
    """Algorithm 2 as published: `paper` with 64 chains of 64 tokens; its search changes no token."""
    return paper().override(
        proposer="langevin",
        chains=64,
        query_tokens=64,
        langevin_steps=40,
        langevin_step_size=0.01,
        langevin_noise_scale=1.0,
        langevin_margin=10.0,
        langevin_gradient="clip",
        langevin_limit=1.0,
        energy_temperature=1.0,
        bridge_temperature_start=2.0,
        bridge_temperature_end=0.5,
        buffer_size=50_000,
        ingest=100,
        retrieval_top_k=16,
        retrieval_temperature=0.1,
        retrieval_duplicates="drop",
        mark_used=False,
    )


def langevin_rag() -> RunConfig:
    """Algorithm 2 on the embedded corpus: a search that changes tokens, a buffer of what a prior accepts."""
    return small().override(
        **MEASURED_CREDIT,
        steps=200,
        num_candidates=16,
        eval_every=50,
        checkpoint_every=100,
        reward_windows=16,
        reward_every=2,
        q_weighting=False,
        q_features=("mean",),
        q_hidden=0,
        q_replay_size=1024,
        proposer="langevin",
        query_tokens=16,
        langevin_steps=10,
        langevin_gradient="position",
        langevin_step_size=8.0,
        query_start="buffer",
        prior=True,
        max_read_ratio=8,
        buffer_size=512,
        ingest=32,
        encoder="hidden-state",
        centre_queries=True,
        refresh=64,
        retrieval_probe=16,
    )


def reference() -> RunConfig:
    """A reference model for `--selector rho`: the default model, trained on the default target alone."""
    sources = tuple(replace(source, weight=float(source.name == "prose")) for source in EMBEDDED_SOURCES)
    return RunConfig().override(sources=sources, selector="uniform", steps=200)


def smoke() -> RunConfig:
    """A tiny model for a dozen steps, to see in seconds whether everything works here."""
    return RunConfig().override(
        model="random:gpt2:hidden_size=32,num_hidden_layers=1,num_attention_heads=2",
        steps=12,
        num_candidates=8,
        window=32,
        vocab_size=512,
        tokenizer_sample_bytes=200_000,
        shuffle_buffer=64,
        reward_set_size=16,
        validation_set_size=8,
        test_set_size=8,
        held_out_sizes="fit",
        reward_windows=4,
        eval_every=6,
        checkpoint_every=6,
        lr_warmup_steps=2,
    )


_FUNCTIONS = (
    *(default, recommended, weighted, paper, paper_replay, langevin_rag, paper_langevin),
    *(prior, dsir, classifier, embedding, oracle, reference, smoke, small),
)
PRESETS: dict[str, Callable[[], RunConfig]] = {f.__name__.replace("_", "-"): f for f in _FUNCTIONS}


_RULE = (
    *("selector", "credit", "reward", "reward_every", "temperature", "q_features", "q_standardise"),
    *("q_layer_norm", "prior", "uniform_share", "dirichlet_concentration", "train_on", "train_subset_size"),
    *("max_read_ratio", "curriculum"),
)
"""Settings that make the learning rule of `paper`, whatever its sizes."""
_SEARCH = (
    *("proposer", "langevin_gradient", "query_start", "fluency", "retrieval_duplicates", "retrieval_draw"),
    *("mark_used", "centre_queries"),
)
"""Settings that make the search and the retrieval of `paper-langevin`."""


def paper_differences(config: RunConfig) -> list[str]:
    """What a run that follows the paper's lines does otherwise, or where the paper leaves it open.

    Empty for a run that does not follow them: another credit, reward, temperature, input of Q or draw.
    """
    td = config.critic.td_step == "own" if config.critic.td_into_theta else config.critic.reforward_action
    searches = config.langevin.proposer != "stream"
    published, names = (paper_langevin(), _RULE + _SEARCH) if searches else (paper(), _RULE)
    if not td or any(config.value(name) != published.value(name) for name in names):
        return []
    found = ["rewards, scores and evaluations are measured without dropout"]
    if config.lm.dropout == 0:
        found.append("training is without dropout too, so that one pass scores and trains (--dropout)")
    found.append("held-out windows come from documents whose near-copies are kept out of the stream")
    if searches:
        found.append("a_k is drawn from softmax(q/β) over the retrieved windows, which the paper leaves open")
        found.append("chains use ordinary tokens only, no special ones")
        if config.retrieval.encoder in ("hidden-state", "hashing"):
            found.append(f"the retriever is {config.retrieval.encoder}, not MiniLM")
    if config.critic.q_replay_size:
        found.append("Q is trained on replayed pairs too, as in the authors' code (--q-replay-size)")
    return found


def preset(name: str) -> RunConfig:
    """The configuration of a preset; CurriqError if there is none of this name."""
    refuse_unknown([str(name)], PRESETS, kind="preset")
    return PRESETS[name]()


_LOOP_RULE = (
    *("proposer", "max_read_ratio", "train_on", "train_subset_size", "reward", "reward_windows"),
    *("reward_every", "q_warmup_steps", "reset_theta", "alternating_period"),
)
"""Settings of the loop that belong to a selection rule, and the proposer; without one that searches, the
others of the search have no effect."""
_RULE_SECTIONS = ("critic", "select")


def is_rule(name: str) -> bool:
    """Whether a setting belongs to the rule by which windows are selected, and not to the data, the model,
    the sizes of a run or its log. A reference model is a resource, which several rules may share."""
    in_section = field_owners()[name] in _RULE_SECTIONS and name != "reference_model"
    return in_section or name in _LOOP_RULE


def rule_settings(name: str) -> dict[str, Any]:
    """The settings of an arm that is a preset: all of its rule, also those at their defaults, so that nothing
    of another rule remains; of the others those in which the preset differs from the defaults."""
    chosen = flat_settings(to_dict(preset(name)))
    return {setting: chosen[setting] for setting in chosen if is_rule(setting)} | own_settings(name)


def own_settings(name: str) -> dict[str, Any]:
    """The settings in which a preset differs from the defaults: flat name → plain value, for `override`."""
    chosen, defaults = flat_settings(to_dict(preset(name))), flat_settings(to_dict(RunConfig()))
    own = {setting: value for setting, value in chosen.items() if value != defaults[setting]}
    # Sizes alone would be meant exactly.
    return own | {"held_out_sizes": chosen["held_out_sizes"]} if own.keys() & set(SIZES) else own
