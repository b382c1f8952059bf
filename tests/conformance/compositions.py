"""Every method that a run can be made of, as settings of a tiny run."""

from pathlib import Path
from typing import Any

from tests.runs import SETTINGS

from curriq.config import SELECTORS, RunConfig, field_owners
from curriq.config.effect import unread
from curriq.presets import preset

CONTROLS = Path(__file__).resolve().parents[2] / "experiments" / "control_samplers.py"
RAG: dict[str, Any] = {
    "encoder": "hashing",
    "buffer_size": 48,
    "ingest": 12,
    "query_tokens": 5,
    "langevin_steps": 3,
}
"""Algorithm 2 in miniature; the ring goes round once in six steps."""
RECOMMENDED = {
    name: getattr(getattr(preset("recommended"), section), name)
    for name, section in field_owners().items()
    if (section in ("critic", "train") and name not in SETTINGS and name not in ("reward_windows", "seed"))
    or name in ("prior", "accept_target_source", "static_score", "static_rule")
    or name in ("sharp_start", "target_passes")
}
STATIC = {"selector": "filter", "max_read_ratio": 4, "static_share": 0.3}
WEIGHTED_CREDIT = {"credit": "counterfactual", "reward": "paired", "q_features": ("source", "static_score")}
EXTRAS: dict[str, dict[str, Any]] = {
    "no q-weighting": {"q_weighting": False},
    "td into theta": {"td_into_theta": True, "td_lambda": 0.5},
    "mixture credit": {"credit": "mixture", "dirichlet_concentration": 2.0},
    "counterfactual credit": {"credit": "counterfactual", "reward": "paired", "q_features": ("mean", "loss")},
    "recommended": RECOMMENDED | {"reward_every": 2, "probe_windows": 5, "q_replay_batch": 16},
    "steered": {
        "credit": "counterfactual",
        "reward_every": 2,
        "max_read_ratio": 3,
        "q_features": ("source", "static_score"),
        "temperature": "fraction",
        "accept_fraction": 0.4,
    },
    "prior": WEIGHTED_CREDIT
    | {"prior": True, "max_read_ratio": 4, "accept_fraction": 0.4, "temperature": "fraction"}
    | {"reward_every": 2, "static_score": "classifier", "static_rule": "share", "static_share": 0.4},
    "weights by the prior": WEIGHTED_CREDIT | {"prior": True, "uniform_share": 0.1},
    "classifier": STATIC | {"static_score": "classifier", "static_rule": "resample"},
    "embedding": STATIC | {"static_score": "embedding", "static_rule": "quantile"},
    "perplexity": STATIC | {"static_score": "perplexity", "accept_target_source": True},
    "excess loss": STATIC | {"static_score": "rho", "static_rule": "share"},
    "oracle": STATIC | {"static_score": "labels"},
    "solved temperature": {"temperature": "fraction", "effective_batch_fraction": 0.5, "uniform_share": 0.1},
    "learned temperature": {"temperature": "learned", "beta_lr": 0.1},
    "rewards in some steps": {"reward_every": 3, "reward": "paired"},
    "subset": {"train_subset_size": 3, "credit": "mixture"},
    "single action": {"train_on": "action", "q_replay_size": 3, "q_replay_batch": 4},
    "single action, td into theta": {"train_on": "action", "td_into_theta": True, "td_step": "own"},
    "reforwarded action": {"reforward_action": True},
    "replay": {"q_replay_size": 3, "q_replay_batch": 4, "q_replay_updates": 2},
    "q warm-up": {"q_warmup_steps": 2},
    "reset theta": {"reset_theta": True},
    "alternating": {"alternating_period": 2},
    "warm-up, then a bandit": {"selector": "bandit", "q_warmup_steps": 2},
    "competence by length": {"selector": "competence", "difficulty": "length"},
    "competence by rarity": {"selector": "competence", "difficulty": "rarity"},
    "competence by label": {"selector": "competence", "difficulty": "label"},
    "topic-coherent": {"topic_coherent": True, "topic_encoder": "hashing", "topic_pool_size": 64},
    "topic similarity": {"topic_similarity_every": 2, "topic_encoder": "hashing"},
    "dropout": {"dropout": 0.2},
    "dropout and td into theta": {"dropout": 0.2, "td_into_theta": True, "td_step": "own"},
    "bf16": {"precision": "bf16"},
    "fused loss": {"cross_entropy": "fused"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "pretrained": {"model": "REFERENCE"},
    "langevin": RAG | {"proposer": "langevin", "retrieval_probe": 4},
    "langevin, uniform mixture": RAG | {"proposer": "langevin", "q_weighting": False},
    "langevin, td into theta": RAG | {"proposer": "langevin", "td_into_theta": True},
    "langevin, faiss and fluency": RAG
    | {"proposer": "langevin", "index": "faiss", "fluency": 0.1, "query_start": "buffer"},
    "langevin, what q reads": RAG
    | {"proposer": "langevin", "encoder": "hidden-state", "centre_queries": True, "refresh": 10}
    | {"q_features": ("mean",), "q_layer_norm": True, "q_hidden": 0, "q_standardise": True}
    | {"credit": "counterfactual", "reward": "paired", "q_replay_size": 64, "q_lr": 0.1},
    "langevin on what the prior accepts": RAG
    | {"proposer": "langevin", "prior": True, "max_read_ratio": 4, "query_start": "best", "direct_pool": 16}
    | {"retrieval_draw": "set", "search_every": 3, "q_weighting": False},
    "vector-langevin": RAG
    | {
        "proposer": "vector-langevin",
        "encoder": "hidden-state",
        "q_features": ("mean",),
        "q_layer_norm": True,
    }
    | {"query_start": "buffer", "langevin_step_size": 0.2, "refresh": 10, "refresh_below": 0.999}
    | {"search_every": 2},
    "reward-queries": RAG | {"proposer": "reward-queries", "selector": "uniform"},
    "static filter over the buffer": RAG | STATIC | {"proposer": "uniform-buffer"},
    "embedding-langevin": RAG | {"proposer": f"{CONTROLS}:embedding_langevin", "encode_ahead": False},
    "swaps": RAG | {"proposer": f"{CONTROLS}:swaps"},
    "best-of-random": RAG | {"proposer": "best-of-random", "random_strings": 3},
    "random-queries, no critic": RAG | {"proposer": "random-queries", "selector": "uniform"},
    "direct-q": RAG | {"proposer": "direct-q", "direct_pool": 16},
    "uniform-buffer": RAG | {"proposer": "uniform-buffer", "selector": "low-loss"},
}
COMPOSITIONS = {name: {"selector": name} for name in SELECTORS} | {"filter": STATIC} | EXTRAS
FILTERING = {name for name, settings in COMPOSITIONS.items() if settings.get("max_read_ratio", 1) > 1}
RETRIEVING = {name for name, settings in EXTRAS.items() if "proposer" in settings}
OTHER: dict[str, Any] = {
    **{"lora_alpha": 3, "lora_targets": ("q_proj",), "lora_dropout": 0.5, "vocab_size": 999},
    **{"tokenizer_sample_bytes": 60_000, "topic_pool_size": 5, "topic_temperature": 9.0},
    **{"topic_encoder": "x"},
    **{"eval_tasks_every": 1, "eval_tasks_limit": 3, "eval_tasks_fewshot": 2, "eval_tasks_path": "x"},
    **{"curriculum_weights": False, "reward": "paired", "reward_windows": 5, "reward_every": 2},
    **{"temperature": "gated", "beta": 0.3, "beta_lr": 0.7, "effective_batch_fraction": 0.21},
    **{"accept_fraction": 0.77, "min_accept_fraction": 0.66, "min_target_accept_rate": 0.33},
    **{"corr_for_full_sharpness": 0.03, "uniform_share": 0.4, "dirichlet_concentration": 0.5, "gamma": 0.2},
    **{"polyak_tau": 0.6, "q_lr": 0.9, "q_grad_clip": 0.1, "q_hidden": 7, "q_features": ("mean", "last")},
    **{"q_layer_norm": True, "q_standardise": True, "q_weight_decay": 0.3, "q_weighting": False},
    **{"td_step": "own", "credit": "counterfactual", "measure_effects": True, "probe_windows": 3},
    **{"probe_decay": 0.4, "shuffle_effects": True, "bellman": False, "q_replay_size": 9},
    **{"q_replay_batch": 3, "q_replay_updates": 4, "max_read_ratio": 2, "selector_temperature": 0.01},
    **{"random_k": 5, "competence_initial": 0.7, "competence_steps": 2, "difficulty": "length"},
    **{"bandit_exploration": 0.9, "bandit_lr": 0.9, "static_score": "embedding", "static_rule": "quantile"},
    **{"static_share": 0.9, "static_quantile": 0.7, "static_sharpness": 1.0, "static_encoder": "x"},
    **{"accept_target_source": True, "target_passes": 4.0, "sharp_start": 7},
    **{"chains": 3, "query_tokens": 3, "query_start": "buffer", "search_every": 4, "langevin_steps": 2},
    **{"langevin_step_size": 0.1, "langevin_noise_scale": 7.0, "langevin_margin": 1.0},
    **{"langevin_gradient": "clip", "langevin_limit": 0.1, "energy_temperature": 0.1, "target_pull": 0.1},
    **{"bridge_temperature_start": 5.0, "bridge_temperature_end": 4.0, "fluency": 0.9, "random_strings": 6},
    **{"bridge_precision": "bf16", "buffer_size": 40, "buffer_initial": 20, "ingest": 3, "encoder": "x"},
    **{"encoder_precision": "bf16", "encode_ahead": False, "index": "faiss", "retrieval_top_k": 2},
    **{"retrieval_temperature": 9.0, "retrieval_draw": "top-1", "retrieval_duplicates": "drop"},
    **{"mark_used": False, "centre_queries": True, "refresh_below": 0.4, "direct_pool": 4},
    **{"retrieval_probe": 3},
}
"""Another value of every setting that some composition does not read."""
BOUND = {"td_into_theta", "td_lambda", "reforward_action", "refresh", "reference_model"}
"""Settings that are checked beside others, or opened, whether or not they are read."""


def otherwise(config: RunConfig) -> RunConfig:
    """The same run by settings that differ in all that it does not read."""
    return config.override(**{name: OTHER[name] for name in unread(config) if name not in BOUND})
