"""Functions of the user's own where a setting takes a built-in name, as in `--selector my_package:build`."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from curriq.config import require_known
from curriq.errors import CurriqError

HOW_TO_NAME = "write package.module:name or path/to/file.py:name"
Builder = Callable[..., Any]


def find_builder(name: str, built_in: Mapping[str, Builder], *, setting: str, group: str) -> Builder:
    """The function that `setting` names: built in, an entry point of the group, or as in `load_object`.

    Raises:
        CurriqError: there is no such function.
    """
    if name in built_in:
        return built_in[name]
    require_known(setting, name, built_in, group)
    installed = entry_points(group=group, name=name)
    found = next(iter(installed)).load() if installed else load_object(name)
    if not callable(found):
        raise CurriqError(f"{setting} {name}: {found!r} is not a function; name one that builds the object.")
    return found


def load_object(reference: str) -> Any:
    """The object that `package.module:name` or `path/to/file.py:name` refers to.

    Raises:
        CurriqError: no such module, file or name. Errors inside the module itself pass through.
    """
    place, _, name = reference.rpartition(":")
    if place.endswith(".py"):
        path = Path(os.path.expanduser(place))  # without an error for ~NAME of nobody's
        spec = importlib.util.spec_from_file_location(str(path.resolve()), path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise CurriqError(f"{reference!r}: there is no file {place} in {Path.cwd()}; {HOW_TO_NAME}.")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
        spec.loader.exec_module(module)
    elif all(part.isidentifier() for part in place.split(".")):
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not f"{place}.".startswith(f"{error.name}."):
                raise  # the module is there, but not a module that it imports
            raise CurriqError(f"{reference!r}: there is no module {error.name!r}; {HOW_TO_NAME}.") from None
    else:
        raise CurriqError(f"{reference!r}: {HOW_TO_NAME}.")
    if not hasattr(module, name):
        raise CurriqError(f"{reference!r}: {place} has no {name!r}; {HOW_TO_NAME}.")
    return getattr(module, name)
