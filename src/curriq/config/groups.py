"""What the command line says of settings: their groups, types and help texts."""

import ast
import functools
import inspect
from itertools import pairwise
from typing import Any, get_type_hints

from curriq.config.run import RunConfig, field_owners

FIRST = (
    *("sources", "target", "window", "model", "steps", "num_candidates", "lm_lr"),
    *("selector", "max_read_ratio", "seed", "run_dir"),
)
"""The settings that most runs change."""

GROUPS = {
    "data": "the stream of candidate windows, the held-out sets, a recorded curriculum",
    "tokenizer": "which tokenizer, or how one is trained",
    "model": "the language model θ: weights, precision, device",
    "optimizer": "of θ: learning rate and its schedule, gradient clipping, micro-batches",
    "q-network": "φ: inputs of Q, credit, learning, experience replay",
    "policy": "from Q to weights, or to a stream filter: temperature, sharpness, noise",
    "selector": "the paper's method or a baseline, and the settings of the baselines",
    "langevin": "Langevin search (Algorithm 2): queries of high Q",
    "retrieval": "retrieval buffer (Algorithm 2): what queries retrieve from, and how",
    "loop": "steps, candidates, rewards, seed, threads, ablations",
    "log": "log and checkpoints: where, how often, how much",
    "tasks": "downstream tasks during training",
}
"""Group of settings → what is in it."""

_SECTIONS = dict(lm="model", optim="optimizer", critic="q-network", select="selector", train="loop")
_POLICY = (
    *("temperature", "beta", "beta_lr", "effective_batch_fraction", "accept_fraction", "max_read_ratio"),
    *("min_target_accept_rate", "corr_for_full_sharpness", "uniform_share", "dirichlet_concentration"),
    *("q_weighting", "train_subset_size"),
)


def group_of(name: str) -> str:
    """The group of a setting: its section, except for the settings of the policy."""
    section = field_owners()[name]
    return "policy" if name in _POLICY else _SECTIONS.get(section, section)


@functools.cache
def describe() -> dict[str, tuple[Any, str]]:
    """Flat name of every setting → its type, and the docstring under its field."""
    described = {}
    for section in get_type_hints(RunConfig).values():
        kinds, tree = get_type_hints(section), ast.parse(inspect.getsource(section))
        for field, text in pairwise(node for node in ast.walk(tree) if isinstance(node, ast.stmt)):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name = ast.unparse(field.target)
                described[name] = kinds[name], " ".join(ast.literal_eval(text.value).split())
    return described
