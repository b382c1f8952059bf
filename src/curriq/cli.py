"""The command line: train, resume, compare, eval, report, watch, export, presets.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

import argparse
import functools
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

import curriq
from curriq.config import (
    FORMER,
    RunConfig,
    SourceConfig,
    did_you_mean,
    differences,
    field_owners,
    flag,
    load_run_config,
    load_toml,
    refuse_unknown,
    source_from_dict,
    to_toml,
)
from curriq.config.groups import FIRST, GROUPS, describe, group_of
from curriq.errors import CurriqError
from curriq.presets import PRESETS, preset

if TYPE_CHECKING:
    from curriq.report.topics import Embed
    from curriq.train.session import RunResult

USAGE = """curriq: a language model that learns which data to learn from.

  curriq train                          the embedded default: minutes on a laptop, no download
  curriq train --preset paper           the published method and numbers
  curriq train --config run.toml --beta 0.1
                                        a run file, with settings overridden
  curriq train --help                   the settings that most runs change; --help-all explains all
  curriq resume runs/soft-q-0           go on after Ctrl-C, a crash, or with more --steps
  curriq compare FILE.toml              arms × seeds × streams, with intervals and a verdict
  curriq eval RUN                       downstream tasks: HellaSwag, MMLU, LAMBADA, WikiText
  curriq report RUN…                    one page that shows what runs did, from their logs
  curriq watch RUN                      the same page while the run goes on, on this machine only
  curriq export RUN                     the learned order and weights, for curriq train --curriculum
  curriq presets [NAME]                 list the presets, or print one as a run file
  curriq --version                      the version of this program
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 a mistake of the user's, 130 interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("curriq").setLevel(logging.INFO)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"curriq {curriq.__version__}")
        return 0
    command, *rest = arguments
    try:
        refuse_unknown([command], COMMANDS, kind="command")
        status = COMMANDS[command](rest)
        sys.stdout.flush()
        return status
    except CurriqError as error:
        print(f"curriq: {error}", file=sys.stderr)
        return 2
    except SystemExit as exit:  # the argument parsers', after their help or error
        return exit.code if isinstance(exit.code, int) else 0
    except KeyboardInterrupt:
        print("curriq: stopped at once; the last checkpoint stands.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone (`| head`); Python must not flush into the pipe again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def train_command(arguments: list[str]) -> int:
    """`curriq train`: a preset or a run file, with overrides, from the first step to the last."""
    config = parse_run_config(arguments)
    from curriq.train.run import train

    return _report(train(config))


def resume_command(arguments: list[str]) -> int:
    """`curriq resume RUN`: go on from the newest valid checkpoint."""
    parser = argparse.ArgumentParser(
        prog="curriq resume",
        description="Go on with a run from its newest valid checkpoint, bitwise as if it had never stopped.",
        epilog="Any setting of `curriq train --help-all` that changes neither the data nor the shape of the "
        "model may follow, for instance --steps 600 or --lm-lr 1e-4.",
    )
    parser.add_argument("RUN", type=Path, help="folder of the run")
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments[:1])  # help, or what is missing
    folder, rest = Path(arguments[0]), arguments[1:]
    saved = load_run_config(folder)
    wanted = _parse(rest, saved, prog=f"curriq resume {folder}")
    changed = {name: value for name, value, _ in differences(wanted, saved)}
    from curriq.train.run import resume

    return _report(resume(folder, **changed))


def report_command(arguments: list[str]) -> int:
    """`curriq report RUN…`: one page from the logs alone, and its charts as pictures."""
    from curriq.report.command import main as report

    return report(arguments, _load_embed)


def _load_embed(encoder: str) -> "Embed":
    """Embeds texts with a model, which the report itself does not load."""
    from curriq.data.encoder import load_encoder

    return load_encoder(encoder).encode


def presets_command(arguments: list[str]) -> int:
    """`curriq presets [NAME]`: the list, or one preset as a run file."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: curriq presets [NAME]\n\nList the presets, or print one as a run file (TOML).")
    elif arguments:
        print(to_toml(preset(arguments[0])), end="")
    else:
        for name, function in PRESETS.items():
            print(f"{name:14} {(function.__doc__ or '').splitlines()[0]}")
    return 0


def _main_of(module: str) -> Callable[[list[str]], int]:
    """The command that a module defines; the module is imported when the command runs."""
    return lambda arguments: import_module(module).main(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "resume": resume_command,
    "compare": _main_of("curriq.evaluate.compare"),
    "eval": _main_of("curriq.evaluate.tasks"),
    "report": report_command,
    "watch": _main_of("curriq.report.watch"),
    "export": _main_of("curriq.runlog.curriculum"),
    "presets": presets_command,
}


def parse_run_config(arguments: list[str]) -> RunConfig:
    """The settings of `curriq train`: the preset or the run file, and the flags laid over it."""
    chooser = _Parser(prog="curriq train", add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset")
    chooser.add_argument("--config")
    chosen, rest = chooser.parse_known_args(arguments)
    base = preset(chosen.preset) if chosen.preset else RunConfig()
    if chosen.config:
        base = load_toml(chosen.config, base)
    return _parse(rest, base, prog="curriq train")


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        raise CurriqError(f"{message} `curriq train --help-all` explains every setting.")


def _parse(arguments: list[str], base: RunConfig, prog: str) -> RunConfig:
    """`base` with flags laid over it; where help is asked for, prints it instead and exits.

    Raises:
        CurriqError: an unknown flag or group, or a value that its component refuses.
    """
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", nargs="?", const="")
    parser.add_argument("--help-all", dest="help", action="store_const", const=" ".join(GROUPS))
    for name in field_owners():
        _add_flag(parser, name, base)
    for name in FORMER:
        parser.add_argument(flag(name), dest=name, default=argparse.SUPPRESS)
    options, unknown = parser.parse_known_args(arguments)
    values = vars(options)
    if (groups := values.pop("help")) is not None:
        _print_help(groups.split(), base, prog)
        raise SystemExit(0)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument {unknown[0]!r}.{did_you_mean(unknown[0], known)}")
    if "sources" in values:
        values["sources"] = tuple(map(parse_source, values["sources"]))
    return base.override(**values)


def _add_flag(parser: Any, name: str, base: RunConfig) -> None:
    """Add the flag of a setting. Its values stay words, because `override` converts and checks them."""
    (kind, text), value = describe()[name], base.value(name)
    several = isinstance(value, tuple)
    shown = " ".join(getattr(item, "name", str(item)) for item in (value if several else (value,)))
    text = f"{text} (default: {shown or 'none'})".replace("%", "%%")
    add = functools.partial(parser.add_argument, flag(name), dest=name, default=argparse.SUPPRESS, help=text)
    if kind is bool:
        add(action=argparse.BooleanOptionalAction)
    else:
        item = get_args(kind)[0] if several else kind
        choices = f"{{{','.join(get_args(item))}}}" if get_origin(item) is Literal else "TEXT"
        known = {int: "INT", float: "FLOAT", SourceConfig: "KEY=VALUE,..."}
        add(nargs="*" if several else None, metavar=known.get(item, choices))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)  # flags stay whole


def _print_help(groups: list[str], base: RunConfig, prog: str) -> None:
    """Print the settings of these groups; of none, those that most runs change, and the list of groups."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--SETTING VALUE ...] [--help [GROUP] | --help-all]",
        description="Defaults are those of the preset or the run file, which may hold every setting.",
        add_help=False,
        formatter_class=functools.partial(_HelpFormatter, max_help_position=30),
    )
    refuse_unknown(groups, GROUPS, kind="group of settings")
    for group in groups:
        section = parser.add_argument_group(group, GROUPS[group])
        for name in field_owners():
            if group_of(name) == group:
                _add_flag(section, name, base)
    if not groups:
        section = parser.add_argument_group("settings that most runs change")
        if prog == "curriq train":
            section.add_argument("--preset", metavar="NAME", help="start from a preset; see `curriq presets`")
            section.add_argument(
                "--config", metavar="RUN.toml", help="start from a run file, over the preset"
            )
        for name in FIRST:
            _add_flag(section, name, base)
        lines = (f"  {group:12} {content}" for group, content in GROUPS.items())
        parser.epilog = "\n".join(("more settings, with --help GROUP, or --help-all:", *lines))
    parser.print_help()


def parse_source(text: str) -> SourceConfig:
    """`name=web,path=data/*.jsonl,weight=0.3` → SourceConfig.

    Raises:
        CurriqError: not key=value, an unknown or repeated key, or a refused value.
    """
    pairs: dict[str, str] = {}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if not separator:
            raise CurriqError(
                f"--sources {text!r}: {part!r} is not key=value. Write each source as "
                "name=NAME,path=PATH[,weight=W,…]; a path with a comma must go into a run file "
                "([[data.sources]])."
            )
        if key in pairs:
            raise CurriqError(
                f"--sources {text!r}: {key} is given twice, as {pairs[key]!r} and {value!r}: keep one of "
                "them. Two sources are two words with a space between them."
            )
        pairs[key] = value
    return source_from_dict(pairs)


def _report(result: "RunResult") -> int:
    """Print how the run ended, on the rank that wrote it."""
    from curriq import parallel
    from curriq.report.summary import print_summary

    if parallel.rank() == 0:
        print_summary(result.run_dir, result.summary)
    return 0 if result.finished else 130


if __name__ == "__main__":
    sys.exit(main())
