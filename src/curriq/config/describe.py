"""What is declared of the settings beside their values: types and the docstrings under the fields."""

import ast
import functools
import inspect
from itertools import pairwise
from typing import Any, get_type_hints

from curriq.config.run import RunConfig


@functools.cache
def describe() -> dict[str, tuple[Any, str]]:
    """Flat name of every setting → its type, and the docstring under its field."""
    described: dict[str, tuple[Any, str]] = {}
    for section in get_type_hints(RunConfig).values():
        described |= describe_fields(section)
    return described


def describe_fields(kind: type) -> dict[str, tuple[Any, str]]:
    """Name of every field of a dataclass → its type, and the docstring under it."""
    types, (definition,) = get_type_hints(kind), ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        name: (types[name], " ".join(ast.literal_eval(text.value).split()))
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        for name in [ast.unparse(field.target)]
    }
