"""Every method that a run can be made of, as settings of a tiny run."""

from pathlib import Path
from typing import Any

from tests.runs import SETTINGS

from curriq.config import SELECTORS, field_owners
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
