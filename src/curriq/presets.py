"""Named full runs: plain functions that return a RunConfig. `curriq presets` lists them."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from curriq.config import (
    EMBEDDED_SOURCES,
    CorruptionName,
    CriticConfig,
    DataConfig,
    LMConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
    SelectConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
    to_dict,
    unknown_key,
)
from curriq.errors import CurriqError


def default() -> RunConfig:
    """A small model from scratch on Python's own documentation and source, mostly corruption; minutes on a CPU."""
    return RunConfig()


def recommended() -> RunConfig:
    """The remedies that gained on the development streams: a stream steered by measured credit."""
    return weighted().override(
        max_read_ratio=8,
        target_fraction=0.25,
        corr_for_full_sharpness=0.1,
        q_features=("source", "dsir_score"),
        probe_windows=32,
        reward_every=8,
        replay_size=512,
    )


MEASURED_CREDIT: dict[str, Any] = {
    "selector": "soft-q",
    "credit": "counterfactual",
    "probe_windows": 16,
    "reward": "paired",
    "temperature": "gated",
    "q_standardise": True,
    "q_layer_norm": True,
    "q_weight_decay": 1.0,
    "replay_batch": 128,
    "replay_updates": 8,
}
"""A critic that learns from measured effects, whatever its inputs and wherever its windows come from."""


def weighted() -> RunConfig:
    """As `recommended`, but the policy weighs the windows that the stream offers, as in the paper."""
    return RunConfig().override(
        **MEASURED_CREDIT,
        reward_windows=8,
        reward_every=4,
        target_fraction=0.7,
        q_features=("source", "loss"),
        replay_size=2048,
    )


def small() -> RunConfig:
    """A size for comparisons: two layers of width 64, 400 steps of 32 windows of 32 tokens."""
    return RunConfig(
        lm=LMConfig(
            model="random:llama:hidden_size=64,intermediate_size=192,num_hidden_layers=2,num_attention_heads=4"
        )
    ).override(
        steps=400,
        window=32,
        vocab_size=1024,
        validation_set_size=192,
        test_set_size=384,
        eval_every=20,
        checkpoint_every=200,
        micro_batch=32,
        head_chunk_tokens=1024,
    )


def dev_dirty() -> RunConfig:
    """Development stream (a): the embedded default, prose among code and four kinds of corruption."""
    return RunConfig()


def dev_web() -> RunConfig:
    """Development stream (b): web pages among OCR noise, chat, other languages, duplicates, shuffled text."""
    return _development(
        "web",
        _source("web", "openwebtext_sample/train.jsonl.gz", 0.2),
        _source("ocr", "ocr_noise/*.jsonl.gz", 0.15),
        _source("chat", "ubuntu_irc/logs.jsonl.gz", 0.2),
        _source("foreign", "udhr_multilingual/docs.jsonl.gz", 0.2),
        _source("duplicates", "c4_sample/train.jsonl.gz", 0.1, corruption="duplicates"),
        _source("shuffled", "c4_sample/train.jsonl.gz", 0.15, corruption="shuffled-tokens"),
    )


def dev_domain() -> RunConfig:
    """Development stream (c): Stack Exchange as the target in a mixture of other domains."""
    return _development(
        "stackexchange",
        _source("stackexchange", "redpajama_domains/stackexchange.jsonl.gz", 0.15),
        _source("arxiv", "redpajama_domains/arxiv.jsonl.gz", 0.25),
        _source("common-crawl", "redpajama_domains/common_crawl.jsonl.gz", 0.05),
        _source("c4", "c4_sample/train.jsonl.gz", 0.3),
        _source("bulgarian", "redpajama_domains/wikipedia_bg.jsonl.gz", 0.25),
    )


def dev_levels() -> RunConfig:
    """Development stream (d): news at three reading levels, with labels for competence."""
    return _development(
        "news", _source("news", "onestop_english/texts.jsonl.gz", 1, difficulty_field="level")
    )


def dev_clean() -> RunConfig:
    """Development stream (e): one clean source, where there is nothing to select."""
    return _development("c4", _source("c4", "c4_sample/train.jsonl.gz", 1))


def dev_half() -> RunConfig:
    """Development stream (e'): half prose, half code, both clean, with prose as the target."""
    clean = tuple(dataclasses.replace(source, weight=0.5) for source in EMBEDDED_SOURCES[:2])
    return RunConfig(data=DataConfig(sources=clean, target="prose"))


def dev_shuffled() -> RunConfig:
    """Development stream (f): (a) with measured effects that mean nothing; the policy must stay uniform."""
    return recommended().override(shuffle_effects=True)


def _development(target: str, *sources: SourceConfig) -> RunConfig:
    return RunConfig(data=DataConfig(sources=sources, target=target))


def _source(
    name: str, file: str, weight: float, corruption: CorruptionName = "none", difficulty_field: str = ""
) -> SourceConfig:
    """A file of the development streams, in the folder $CURRIQ_DEV_DATA (default: data)."""
    folder = os.environ.get("CURRIQ_DEV_DATA", "data")
    return SourceConfig(
        name=name,
        path=f"{folder}/{file}",
        weight=weight,
        corruption=corruption,
        difficulty_field=difficulty_field,
    )


def paper() -> RunConfig:
    """The method as published: GPT-2 (124M) on OpenWebText, N = M = 256, T = 512, literal credit rule."""
    return RunConfig(
        data=DataConfig(
            sources=(
                SourceConfig(
                    name="openwebtext",
                    path="hub:Skylion007/openwebtext",
                    # The main branch holds a loading script, which `datasets` no longer runs.
                    hub_revision="refs/convert/parquet",
                ),
            ),
            target="openwebtext",
            window=512,
            held_out_share=0.05,
            reward_set_size=2048,
            validation_set_size=512,
            test_set_size=1024,
        ),
        tokenizer=TokenizerConfig(tokenizer="auto"),
        lm=LMConfig(model="gpt2"),
        optim=OptimConfig(
            lm_lr=5e-5, lr_schedule="constant", lr_warmup_steps=0, micro_batch=8, grad_clip=1.0
        ),
        critic=CriticConfig(beta=1.0, gamma=0.9, polyak_tau=0.01, q_lr=1e-3, q_grad_clip=1.0, q_hidden=32),
        select=SelectConfig(selector="soft-q"),
        train=TrainConfig(steps=10_000, num_candidates=256, reward_windows=256),
        log=LogConfig(eval_every=100, checkpoint_every=500),
    )


def paper_replay() -> RunConfig:
    """`paper` with the authors' published Q replay: 256 pairs, one batch of 32 per step."""
    return paper().override(replay_size=256, replay_batch=32, replay_updates=1)


def paper_langevin() -> RunConfig:
    """Algorithm 2 as published: `paper` with 64 chains of 64 tokens; the search changes no token."""
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
    )


def langevin_rag() -> RunConfig:
    """Algorithm 2 on the embedded corpus, with settings at which tokens do change; minutes on a CPU."""
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
        replay_size=1024,
        proposer="langevin",
        query_tokens=16,
        langevin_steps=10,
        langevin_gradient="position",
        langevin_step_size=8.0,
        query_start="buffer",
        buffer_size=1024,
        ingest=64,
        encoder="hidden-state",
        centre_queries=True,
        refresh=256,
        retrieval_probe=16,
    )


def reference() -> RunConfig:
    """A reference model for `--selector rho`: the default model, trained on the default target alone."""
    sources = tuple(
        dataclasses.replace(source, weight=float(source.name == "prose")) for source in EMBEDDED_SOURCES
    )
    return RunConfig(data=DataConfig(sources=sources)).override(selector="uniform", steps=200)


def smoke() -> RunConfig:
    """Seconds, not minutes: a tiny model for a dozen steps, to see whether everything works here."""
    return RunConfig(
        lm=LMConfig(model="random:gpt2:hidden_size=32,num_hidden_layers=1,num_attention_heads=2")
    ).override(
        steps=12,
        num_candidates=8,
        window=32,
        vocab_size=512,
        tokenizer_sample_bytes=200_000,
        shuffle_buffer=64,
        reward_set_size=16,
        validation_set_size=8,
        test_set_size=8,
        reward_windows=4,
        eval_every=6,
        checkpoint_every=6,
        lr_warmup_steps=2,
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        default,
        recommended,
        weighted,
        paper,
        paper_replay,
        langevin_rag,
        paper_langevin,
        reference,
        smoke,
        small,
        dev_dirty,
        dev_web,
        dev_domain,
        dev_levels,
        dev_clean,
        dev_half,
        dev_shuffled,
    )
}


def preset(name: str) -> RunConfig:
    """The configuration of a preset.

    Raises:
        CurriqError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise CurriqError(unknown_key(name, list(PRESETS), "preset"))
    return PRESETS[name]()


def own_settings(name: str) -> dict[str, Any]:
    """The settings in which a preset differs from the defaults: flat name → plain value, for `override`.

    Raises:
        CurriqError: there is no preset of this name.
    """
    chosen, plain = to_dict(preset(name)), to_dict(RunConfig())
    return {
        setting: value
        for section, values in chosen.items()
        for setting, value in values.items()
        if value != plain[section][setting]
    }
