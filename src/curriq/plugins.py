"""Functions of the user's own where a setting takes a built-in name, as in `--selector my_package:build`."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from curriq.config import RunConfig, require_known
from curriq.config.effect import one_spelling
from curriq.errors import OWN_FILES, CurriqError

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
    if installed := next(iter(entry_points(group=group, name=name)), None):
        _remember(source_file(f"{installed.module}:{installed.attr}"))
    found = installed.load() if installed else load_object(name)
    if not callable(found):
        raise CurriqError(f"{setting} {name}: {found!r} is not a function; name one that builds the object.")
    return found


def load_object(reference: str) -> Any:
    """The object that `package.module:name` or `path/to/file.py:name` refers to.

    Raises:
        CurriqError: no such module, file or name. Errors inside the module itself pass through.
    """
    place, _, name = reference.rpartition(":")
    file = _remember(source_file(reference))
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(str(Path(file).resolve()), file)
        if not Path(file).is_file() or spec is None or spec.loader is None:
            raise CurriqError(f"{reference!r}: there is no file {place} in {Path.cwd()}; {HOW_TO_NAME}.")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
        _executed(reference, partial(spec.loader.exec_module, module))
    elif all(part.isidentifier() for part in place.split(".")):
        try:
            module = _executed(reference, partial(importlib.import_module, place))
        except ModuleNotFoundError as error:
            if not f"{place}.".startswith(f"{error.name}."):
                raise  # the module is there, but not a module that it imports
            raise CurriqError(f"{reference!r}: there is no module {error.name!r}; {HOW_TO_NAME}.") from None
    else:
        raise CurriqError(f"{reference!r}: {HOW_TO_NAME}.")
    if not hasattr(module, name):
        raise CurriqError(f"{reference!r}: {place} has no {name!r}; {HOW_TO_NAME}.")
    return getattr(module, name)


def _remember(file: str) -> str:
    """The file, noted as one in which an error is none of curriq's."""
    if file:
        OWN_FILES.add(file)
    return file


def _executed(reference: str, work: Callable[[], Any]) -> Any:
    """What the work gives; CurriqError where it meets a line that is no Python."""
    try:
        return work()
    except SyntaxError as error:
        raise CurriqError(f"{reference!r}: {error.filename}, line {error.lineno}: {error.msg}.") from None


def own_components(config: RunConfig) -> dict[str, str]:
    """Flag → name of each component of the user's own that the settings refer to by module or file."""
    named = {"--selector": config.select.selector, "--proposer": config.langevin.proposer}
    return {flag: name for flag, name in named.items() if ":" in name}


def own_code(config: RunConfig) -> dict[str, str]:
    """Flag and name → SHA-256 of the file of each of these components."""
    files = {f"{flag} {name}": Path(source_file(name)) for flag, name in own_components(config).items()}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()
    }


def changed_code(recorded: Mapping[str, str], config: RunConfig) -> list[str]:
    """The components of the user's own whose files are no more what a run recorded of them."""
    return [name for name, digest in own_code(config).items() if recorded.get(name, digest) != digest]


def source_file(reference: str) -> str:
    """The absolute path of the file of `package.module:name` or `path/to/file.py:name`, there or not; empty
    for a module that is not found."""
    place = reference.rpartition(":")[0]
    if place.endswith(".py"):
        return one_spelling(reference).rpartition(":")[0]
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        return ""
    return "" if spec is None or spec.origin is None else spec.origin
