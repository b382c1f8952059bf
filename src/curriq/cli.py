"""The command line: train, resume, select, score, verify, compare, eval, report, watch, export, presets.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

import argparse
import ast
import functools
import inspect
import logging
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import curriq
from curriq.boundary import STATUSES, exit_status
from curriq.config.aliases import FORMER
from curriq.config.checks import did_you_mean, flag, refuse_unknown, require
from curriq.config.run import RunConfig, differences, field_owners, load_run_config, load_toml, to_toml
from curriq.config.sections import SourceConfig
from curriq.errors import CurriqError
from curriq.presets import PRESETS, preset
from curriq.terminal import escaped_output

if TYPE_CHECKING:
    from curriq.train.session import RunResult

USAGE = """curriq: a language model that learns which data to learn from.

  curriq train                          the embedded default: minutes on a laptop, no download
  curriq train --preset paper           the published method and numbers
  curriq train --config FILE --seed 1   a run file, with settings overridden
  curriq train --help                   the settings that most runs change; --help-all explains all
  curriq resume runs/soft-q-0           go on after Ctrl-C, a crash, or with more --steps
  curriq select --target FILE FILES…    the filtered corpus: documents of the target's kind, no training
  curriq select RUN [FILES…]            the filtered corpus by what a run has learnt
  curriq score …                        the scores of every window, as Parquet
  curriq verify RUN                     whether checkpoints, log and data are as they were written
  curriq compare FILE.toml              arms × seeds × streams, with intervals and a verdict
  curriq eval RUN                       downstream tasks: HellaSwag, MMLU, LAMBADA, WikiText
  curriq report RUN…                    one page that shows what runs did, from their logs
  curriq watch RUN                      the same page while the run goes on, on this machine only
  curriq export RUN                     the learned order and weights, for curriq train --curriculum
  curriq presets [NAME]                 list the presets, or print one as a run file
  curriq --version                      the version of this program

Exit statuses:"""

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, which `boundary.STATUSES` lists."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with escaped_output():
        return exit_status(functools.partial(_command, arguments))


def _command(arguments: list[str]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("curriq").setLevel(logging.INFO)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, *(f"  {status:3}  {meaning}" for status, meaning in STATUSES.items()), sep="\n")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"curriq {curriq.__version__}")
        return 0
    command, *rest = arguments
    refuse_unknown([command], COMMANDS, kind="command")
    run = COMMANDS[command]
    if run in (resume_command, presets_command) and rest[:1] in (["-h"], ["--help"]):
        print(inspect.getdoc(run))  # the other commands have parsers of their own
        return 0
    return import_module(run).main(rest) if isinstance(run, str) else run(rest)


def train_command(arguments: list[str]) -> int:
    """`curriq train`: a preset or a run file, with overrides, from the first step to the last."""
    config = parse_run_config(arguments)
    from curriq.train.run import train

    return _report(train(config))


def resume_command(arguments: list[str]) -> int:
    """usage: curriq resume RUN [--SETTING VALUE ...] [--help [GROUP] | --help-all]

    Resume the run in the folder RUN from its newest valid checkpoint, bitwise as if it had never stopped.
    Settings that change neither the data nor the model's shape may follow, such as --steps 600.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    require(named, "the folder of the run is missing: write curriq resume RUN [--SETTING VALUE ...].")
    folder, rest = Path(arguments[0]), arguments[1:]
    saved = load_run_config(folder)
    wanted = parse_run_config(rest, saved, prog=f"curriq resume {folder}")
    changed = {name: value for name, value, _ in differences(wanted, saved)}
    from curriq.train.run import resume

    return _report(resume(folder, **changed))


def report_command(arguments: list[str]) -> int:
    """`curriq report RUN…`: one page from the logs alone, and its charts as pictures."""
    from curriq.report.command import main as report

    def load_embed(encoder: str) -> Any:  # the report itself loads no model
        from curriq.data.encoder import load_encoder

        return load_encoder(encoder).encode

    return report(arguments, load_embed)


def select_command(arguments: list[str]) -> int:
    """`curriq select`: the documents worth keeping, by a run or a target."""
    from curriq.curate.command import select_main

    return select_main(arguments)


def score_command(arguments: list[str]) -> int:
    """`curriq score`: the scores of every window and document."""
    from curriq.curate.command import score_main

    return score_main(arguments)


def presets_command(arguments: list[str]) -> int:
    """usage: curriq presets [NAME]

    List the presets, or print one as a run file (TOML).
    """
    if arguments:
        print(to_toml(preset(arguments[0])), end="")
    else:
        for name, function in PRESETS.items():
            print(f"{name:14} {(function.__doc__ or '').splitlines()[0]}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int] | str] = {
    "train": train_command,
    "resume": resume_command,
    "select": select_command,
    "score": score_command,
    "verify": "curriq.train.verify",
    "compare": "curriq.evaluate.compare",
    "eval": "curriq.evaluate.tasks",
    "report": report_command,
    "watch": "curriq.report.watch",
    "export": "curriq.runlog.curriculum",
    "presets": presets_command,
}
"""Command → its function, or the module whose `main` it is."""


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?")) else "."  # argparse writes none
        raise CurriqError(f"{message}{end} `curriq train --help-all` explains every setting.")


def parse_run_config(words: list[str], run: RunConfig | None = None, prog: str = "curriq train") -> RunConfig:
    """The preset or the run file that the words name, or the resumed `run`, with flags laid over it.

    Raises:
        CurriqError: an unknown preset, flag or group, an invalid run file, or a value that is refused.
        SystemExit: the words ask for help, which is printed.
    """
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", nargs="?", const="")
    parser.add_argument("--help-all", dest="help", action="store_const", const=" ".join(GROUPS))
    for name in () if run else ("preset", "config"):
        parser.add_argument(flag(name))
    base = run or RunConfig()
    for name in field_owners():
        _add_flag(parser, name, base)
    for name in FORMER:
        parser.add_argument(flag(name), dest=name, nargs="?", const="", default=argparse.SUPPRESS)
    namespace, unknown = parser.parse_known_args(words)
    values = vars(namespace)
    groups, chosen, file = (values.pop(name, None) for name in ("help", "preset", "config"))
    base = preset(chosen) if chosen else base
    base = load_toml(file, base) if file else base
    if groups is not None:
        _print_help(groups.split(), base, prog)
        raise SystemExit(0)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument {unknown[0]!r}.{did_you_mean(unknown[0], known)}")
    if "sources" in values:
        values["sources"] = list(map(parse_source, values["sources"]))
    return base.override(**values)


def group_of(name: str) -> str:
    """The group of a setting: its section, except for the settings of the policy."""
    section = field_owners()[name]
    return "policy" if name in _POLICY else _NAMES.get(section, section)


@functools.cache
def describe() -> dict[str, tuple[Any, str]]:
    """Flat name of every setting → its type, and the docstring under its field."""
    described = {}
    for section in get_type_hints(RunConfig).values():
        kinds, (definition,) = get_type_hints(section), ast.parse(inspect.getsource(section)).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name = ast.unparse(field.target)
                described[name] = kinds[name], " ".join(ast.literal_eval(text.value).split())
    return described


def _add_flag(parser: Any, name: str, base: RunConfig) -> None:
    """Add the flag of a setting. Its values stay words, because `override` converts and checks them."""
    (kind, text), value = describe()[name], base.value(name)
    several = isinstance(value, tuple)
    shown = " ".join(getattr(item, "name", str(item)) for item in (value if several else (value,)))
    how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    if kind is bool:
        shown = "on" if value else "off"
    else:
        item = get_args(kind)[0] if several else kind
        choices = f"{{{','.join(get_args(item))}}}" if get_origin(item) is Literal else "TEXT"
        known = {int: "INT", float: "FLOAT", SourceConfig: "SOURCE"}
        how = {"nargs": "*" if several else None, "metavar": known.get(item, choices)}
    text = f"{text} (default: {shown or 'none'})".replace("%", "%%")
    parser.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=text, **how)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)  # flags stay whole


def _print_help(groups: list[str], base: RunConfig, prog: str) -> None:
    """Print the settings of these groups; of none, those that most runs change, and the list of groups."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--SETTING VALUE ...] [--help [GROUP] | --help-all]",
        description="Flags override the run file, which overrides the preset; defaults shown include both.",
        add_help=False,
        formatter_class=functools.partial(_HelpFormatter, max_help_position=30),
    )
    refuse_unknown(groups, GROUPS, kind="group of settings")
    shown = {group: [name for name in field_owners() if group_of(name) == group] for group in groups}
    if not groups:
        if prog == "curriq train":
            add = parser.add_argument_group("where settings come from").add_argument
            add("--preset", metavar="NAME", help="Start from a preset; `curriq presets` lists them.")
            add("--config", metavar="RUN.toml", help="Start from a run file, over the preset.")
        shown = {"settings that most runs change": FIRST}
        lines = (f"  {group:12} {content}" for group, content in GROUPS.items())
        parser.epilog = "\n".join(("more settings, with --help GROUP, or --help-all:", *lines))
    for title, names in shown.items():
        section = parser.add_argument_group(title, GROUPS.get(title))
        for name in names:
            _add_flag(section, name, base)
    parser.print_help()


def parse_source(text: str) -> dict[str, str]:
    """`name=web,path=data/*.jsonl,weight=0.3` → key → value; CurriqError if it is not of this form."""
    pairs: dict[str, str] = {}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if not separator:
            how = "Write each source as name=NAME,path=PATH[,weight=W,…]"
            comma = "a path with a comma must go into a run file ([[data.sources]])"
            raise CurriqError(f"--sources {text!r}: {part!r} is not key=value. {how}; {comma}.")
        if key in pairs:
            twice = f"{key} is given twice, as {pairs[key]!r} and {value!r}: keep one of them"
            raise CurriqError(f"--sources {text!r}: {twice}. Separate two sources by a space.")
        pairs[key] = value
    return pairs


def _report(result: "RunResult") -> int:
    """Print how the run ended, on the rank that wrote it."""
    from curriq import parallel
    from curriq.report.summary import print_summary

    if parallel.rank() == 0:
        print_summary(result.run_dir, result.summary)
    return 0 if result.finished else 130
