"""What the command line tells of settings: groups, types and help texts."""

import ast
import dataclasses
import functools
import inspect
from itertools import pairwise
from typing import Any, get_type_hints

from curriq.config.run import RunConfig, field_owners

GROUPS = {
    "data": "the stream of candidate windows and the held-out sets",
    "tokenizer": "which tokenizer, and how one is trained",
    "model": "the language model θ",
    "optimizer": "AdamW for θ, its schedule, micro-batches",
    "q-network": "φ: inputs of Q, credit, learning, experience replay",
    "policy": "from Q to weights, or to a stream filter: temperature and sharpness",
    "selector": "the method, and the settings of the baselines",
    "langevin": "Algorithm 2: the search for queries",
    "retrieval": "Algorithm 2: ring buffer, encoder, draws",
    "loop": "steps, candidates, rewards, seed, ablations",
    "log": "folder, evaluations, checkpoints, logs",
    "tasks": "downstream tasks during training",
}
"""Group of settings → what is in it."""

_POLICY = (
    *(
        "temperature",
        "beta",
        "beta_lr",
        "effective_batch_fraction",
        "accept_fraction",
        "min_target_accept_rate",
    ),
    *("corr_for_full_sharpness", "uniform_share", "dirichlet_concentration", "q_weighting"),
    *("max_read_ratio", "train_subset_size"),
)
_SECTIONS = {
    "lm": "model",
    "optim": "optimizer",
    "critic": "q-network",
    "select": "selector",
    "train": "loop",
}


def group_of(name: str) -> str:
    """The group of a setting: its section, but for those of the policy, which two sections hold."""
    section = field_owners()[name]
    return "policy" if name in _POLICY else _SECTIONS.get(section, section)


@functools.cache
def field_types() -> dict[str, Any]:
    """Flat name of every setting → its type."""
    return {name: kind for section in _sections() for name, kind in get_type_hints(section).items()}


@functools.cache
def help_texts() -> dict[str, str]:
    """Flat name of every setting → the docstring under its field."""
    texts = {}
    for section in _sections():
        (definition,) = ast.parse(inspect.getsource(section)).body
        for field, text in pairwise(getattr(definition, "body", [])):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                texts[field.target.id] = " ".join(ast.literal_eval(getattr(text, "value", text)).split())
    return texts


def _sections() -> list[type]:
    return [type(getattr(RunConfig(), section.name)) for section in dataclasses.fields(RunConfig)]
