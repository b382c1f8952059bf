"""The parser of every command: its errors read like all others, and completion is made from it."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

from curriq.config import did_you_mean, other_name
from curriq.errors import CurriqError

_KINDS = {"int": "a whole number", "float": "a number"}
_search: ContextVar["list[Parser] | None"] = ContextVar("_search", default=None)
"""The parsers found so far, while they are looked for."""


class _Found(BaseException):
    """Ends a command at the moment at which it parses its words; no error, so that nothing handles it."""


class Parser(argparse.ArgumentParser):
    """An `argparse` parser that raises its errors as CurriqError, and accepts no abbreviated options.

    Args:
        help_command: command that explains the options, for the end of an error (default: `PROG --help`).
        is_last: whether no other parser gets the words that this one does not know.
    """

    def __init__(self, *, help_command: str = "", is_last: bool = True, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._help_command = help_command or f"{self.prog} --help"
        self._is_last = is_last

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file or sys.stderr)  # argparse passes over what a full disk refuses

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        self.refuse(unknown)
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if (found := _search.get()) is not None:
            found.append(self)
            if self._is_last:
                raise _Found
        return super().parse_known_args(args, namespace)

    def refuse(self, unknown: Sequence[str]) -> None:
        """Raise CurriqError for the first word that the parser does not know, if there is one."""
        if not unknown:
            return
        word = unknown[0].partition("=")[0] if unknown[0].startswith("--") else unknown[0]
        shown = (action for action in self._actions if action.help != argparse.SUPPRESS)  # no former names
        known = [option for action in shown for option in action.option_strings]
        near = (other_name(word, known) or did_you_mean(word, known)) if word.startswith("-") else ""
        self.error(f"unknown argument {word!r}.{near}")

    def error(self, message: str) -> NoReturn:
        """Raise CurriqError with argparse's message in our words."""
        message = self._missing(message) or self._refused(message) or message
        end = "" if message.endswith((".", "?")) else "."  # argparse writes none
        raise CurriqError(f"{message}{end} `{self._help_command}` explains every option.")

    def _missing(self, message: str) -> str:
        """The message for arguments that were not given; empty for another mistake."""
        _, separator, names = message.partition("arguments are required: ")
        if not separator:
            return ""
        helps = {
            name: action.help
            for action in self._actions
            for name in (str(action.metavar or action.dest), *action.option_strings)
        }
        first, *others = names.split(", ")
        also = f" So {'is' if len(others) == 1 else 'are'} {' and '.join(others)}." if others else ""
        return f"{first} is missing: {helps.get(first) or 'give it'}.{also}"

    def _refused(self, message: str) -> str:
        """The message for the value of one argument; empty for another mistake."""
        match = re.match(r"argument ([^:]+): (.*)", message, flags=re.DOTALL)
        if match is None:
            return ""
        name, why = match[1].rpartition("/")[2], match[2]
        actions = (
            action
            for action in self._actions
            if name in (action.dest, action.metavar, *action.option_strings)
        )
        action = next(actions, None)
        if kind := re.match(r"invalid (\w+) value: (.*)", why):
            return f"{name} = {kind[2]}: it must be {_KINDS.get(kind[1], f'a {kind[1]}')}."
        if (value := re.match(r"invalid choice: (.*) \(choose from", why)) and action and action.choices:
            known = [str(choice) for choice in action.choices]
            near = did_you_mean(value[1].strip("'\""), known)
            return f"{name} = {value[1]}: choose from {', '.join(known)}.{near}"
        if why.startswith("expected"):
            return f"{name} has no value: write it behind, as in {name} {_example(action)}."
        return f"{name}: {why}"


def _example(action: argparse.Action | None) -> str:
    """A value that an option takes, as its help shows it."""
    if action is None:
        return "VALUE"
    first = next(iter(action.choices), None) if action.choices else None
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return str(first or metavar)


def parsers_of(command: Callable[[list[str]], Any]) -> list[Parser]:
    """The parsers with which a command parses its words, one after another; none when it parses none."""
    found: list[Parser] = []
    token = _search.set(found)
    try:
        command([])
    except (_Found, CurriqError, SystemExit):  # the others are of a parser that is none of ours
        pass
    finally:
        _search.reset(token)
    return found
