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

_POLICY = (
    *("temperature", "beta", "beta_lr", "effective_batch_fraction", "max_read_ratio", "accept_fraction"),
    *("min_target_accept_rate", "corr_for_full_sharpness", "uniform_share", "dirichlet_concentration"),
    *("q_weighting", "train_subset_size"),
)
_NAMES = {"lm": "model", "optim": "optimizer", "critic": "q-network", "select": "selector", "train": "loop"}


GROUPS: dict[str, str] = {}
"""Group of settings → what is in it: the sections, and the policy."""
for _section, _type in get_type_hints(RunConfig).items():
    GROUPS[_NAMES.get(_section, _section)] = _type.__doc__
    if _section == "critic":
        GROUPS["policy"] = "How Q becomes weights or a stream filter: temperature, sharpness, noise."


def group_of(name: str) -> str:
    """The group of a setting: its section, except for the settings of the policy."""
    section = field_owners()[name]
    return "policy" if name in _POLICY else _NAMES.get(section, section)


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
