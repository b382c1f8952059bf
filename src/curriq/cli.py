"""The command line: `COMMANDS` names its commands.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

import argparse
import contextlib
import functools
import inspect
import json
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import curriq
from curriq.boundary import STATUSES, exit_status
from curriq.config.aliases import FORMER
from curriq.config.checks import flag, refuse_unknown, require, require_one_process
from curriq.config.describe import describe
from curriq.config.run import RunConfig, differences, field_owners, load_run_config, load_toml, to_toml
from curriq.config.search import PROPOSERS
from curriq.config.sections import SELECTORS, SourceConfig
from curriq.errors import CurriqError
from curriq.parser import Parser, parsers_of
from curriq.presets import PRESETS, preset
from curriq.terminal import escaped_output

if TYPE_CHECKING:
    from curriq.train.result import RunResult

USAGE = """curriq: a language model that learns which data to learn from.

  curriq train                          the embedded default: minutes on a laptop, no download
  curriq train --preset paper           the published method and numbers
  curriq train --config FILE --seed 1   a run file, with settings overridden
  curriq train --help                   the settings that most runs change; --help-all explains all
  curriq check [--SETTING VALUE …]      all faults of data and settings, and what the run will cost
  curriq plan [--SETTING VALUE …]       seconds, memory and cores of a run, and on paper of many GPUs
  curriq try [--SETTING VALUE …]        does it help on my data? a comparison within some minutes
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
  curriq export RUN --model             the Hugging Face folder, where the model was saved in parts (fsdp)
  curriq push RUN OWNER/NAME            upload the trained model to the Hugging Face hub
  curriq runs list [FOLDER]             runs, how far they came, and what they take on the disk
  curriq runs prune RUN…                remove the checkpoints that nothing needs any more
  curriq presets [NAME]                 list the presets, or print one as a run file
  curriq schema                         the JSON Schema of a run file, for editors
  curriq completion SHELL               a script by which the shell completes all of this
  curriq --version                      the version of this program

Exit statuses:"""

FIRST = (
    *("sources", "target", "window", "model", "steps", "num_candidates", "lm_lr"),
    *("selector", "max_read_ratio", "seed", "run_dir"),
)
"""The settings that most runs change."""

_POLICY = (
    *("temperature", "beta", "beta_lr", "effective_batch_fraction", "max_read_ratio", "accept_fraction"),
    *("min_accept_fraction", "min_target_accept_rate", "corr_for_full_sharpness", "uniform_share"),
    *("dirichlet_concentration", "q_weighting", "train_subset_size"),
)
_NAMES = {"lm": "model", "optim": "optimizer", "critic": "q-network", "select": "selector", "train": "loop"}

GROUPS: dict[str, str] = {}
"""Group of settings → what is in it: the sections, and the policy."""
for _section, _type in get_type_hints(RunConfig).items():
    GROUPS[_NAMES.get(_section, _section)] = _type.__doc__
    if _section == "critic":
        GROUPS["policy"] = "How Q becomes weights or a stream filter: temperature, sharpness, noise."


AGAINST: dict[str, dict[str, Any]] = {"--against": {"type": lambda name: None if name == "none" else name}}
TRAIN_OPTIONS: dict[str, dict[str, Any]] = {"--dry-run": {"action": "store_true"}, **AGAINST}
"""Options of `curriq train` that are no settings of a run."""


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
    if command in ("resume", "check", "plan", "try") and rest[:1] in (["-h"], ["--help"]):
        print(inspect.getdoc(COMMANDS[command]))  # elsewhere `--help` explains the settings
        return 0
    return _run(command, rest)


def _run(command: str, arguments: list[str]) -> int:
    if command in ("plan", "try", "compare", "select", "score", "eval"):
        require_one_process(f"curriq {command}", "it works in one; call it without torchrun")
    run = COMMANDS[command]
    return import_module(run).main(arguments) if isinstance(run, str) else run(arguments)


def train_command(arguments: list[str]) -> int:
    """`curriq train`: a preset or a run file, with overrides, from the first step to the last."""
    own, words = own_options(arguments, TRAIN_OPTIONS)
    if own.dry_run:
        if own.against is not None:
            _check_against(words, own.against)
        return check_command(words)
    config = parse_run_config(words)
    from curriq.data.survey import require_usable

    require_usable(config)  # before torch is loaded, which takes seconds
    from curriq.train.run import train

    return _with_other(config, own.against, lambda: train(config))


def _with_other(config: RunConfig, name: str | None, run: "Callable[[], RunResult]") -> int:
    """Train a run and say how it ended; then, where `--against` names another, that one and what differs."""
    if name is None:
        return _report(run())
    from curriq.evaluate.beside import check_against, go_on_command, train_beside

    check_against(config, name)
    result = run()
    if status := _report(result):
        print(f"Go on with both, and compare, by `{go_on_command(result, name)}`.")
        return status
    return train_beside(result, name)


def _check_against(words: list[str], name: str) -> None:
    """Refuse another run that cannot be trained beside this one; faults of this one are others' to name."""
    from curriq.evaluate.beside import check_against

    try:
        config = parse_run_config(words)
    except CurriqError:
        return
    check_against(config, name)


def check_command(arguments: list[str]) -> int:
    """usage: curriq check [--json] [--data-only] [train's arguments]

    Check the sources, the settings and the model of a run without starting it: every fault at once with a way
    to fix it, the sizes of the held-out sets, the loss of the model as it is, and from three timed steps how
    long the run takes and what it needs. `curriq train … --dry-run` is the same. Exit status: 0 where the run
    can start, 1 where there are faults.

    --data-only  only the sources, in a second, without loading the model
    --json       machine-readable, as docs/check.md describes

    `curriq train --help` lists train's arguments.
    """
    flags = {name: {"action": "store_true"} for name in ("--json", "--data-only")}
    own, words = own_options(arguments, flags)
    config, faults = None, tuple[str, ...]()
    try:
        config = parse_run_config(words, prog="curriq check")
    except CurriqError as error:
        faults = error.faults
        with contextlib.suppress(CurriqError):  # its sources can be looked at, where they can be read at all
            config = parse_run_config(words, prog="curriq check", only=("sources", "target"))
    from curriq.evaluate.check import check, report

    return report(check(config, faults, data_only=own.data_only), as_json=own.json)


def plan_command(arguments: list[str]) -> int:
    """usage: curriq plan [RUN.toml] [--gpus N …] [--bandwidth GB/S] [--no-alternatives] [--json]
                       [train's arguments]

    Say what a run will take, from ten small steps on this machine: seconds per step and of what, what the
    method costs beyond plain training and the gain at which it breaks even, how long the run takes, memory
    and the largest model that fits, cores that reading needs, and what checkpoints cost. Then, on paper, the
    same on many GPUs like this device. On a CPU other --threads and --precision bf16 are timed too, and the
    fastest are named. No file is kept.

    --gpus N …         numbers of GPUs to plan for (default: 8 to 1024)
    --bandwidth GB/S   of a GPU's links to the others, in each direction (default: 50)
    --no-alternatives  time the settings as they are alone
    --json             machine-readable, as docs/plan.md describes

    `curriq train --help` lists train's arguments.
    """
    file, rest = arguments[:1], arguments[1:]
    if file and not file[0].startswith("-"):
        twice = any(word.partition("=")[0] == "--config" for word in rest)
        require(not twice, f"curriq plan {file[0]} with --config: give one run file.")
        arguments = ["--config", *file, *rest]
    flags: dict[str, dict[str, Any]] = {
        "--gpus": {"type": int, "nargs": "*"},
        "--bandwidth": {"type": float, "default": 50.0},
        "--no-alternatives": {"action": "store_true"},
        "--json": {"action": "store_true"},
    }
    own, words = own_options(arguments, flags)
    config = parse_run_config(words, prog="curriq plan")
    from curriq.evaluate.forecast import GPUS, forecast, report

    gpus = GPUS if own.gpus is None else own.gpus
    for count in gpus:
        require(1 <= count <= 10**6, f"--gpus {count}: give numbers of GPUs from 1 to 1,000,000.")
    rule = f"--bandwidth {own.bandwidth:g}: give GB/s of a GPU's links, from 0.001 to 1,000,000."
    require(1e-3 <= own.bandwidth <= 1e6, rule)
    from curriq.data.survey import require_usable

    require_usable(config)
    plan = forecast(config, gpus, 1e9 * own.bandwidth, alternatives=not own.no_alternatives)
    return report(plan, as_json=own.json)


def own_options(
    arguments: list[str], flags: dict[str, dict[str, Any]]
) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, and the words that are left: arguments of `curriq train`."""
    parser = Parser(is_last=False, add_help=False, help_command="curriq train --help-all")
    for name, how in flags.items():
        parser.add_argument(name, **how)
    return parser.parse_known_args(arguments)


DECIDED_BY_TRY = {
    "seed": "a try has the seeds 0 … N−1, as many as --seeds says",
    "split_seed": "each seed has a held-out split of its own",
    "run_dir": "--out is the folder of all runs",
    "threads": "each of the --workers has an equal share of the cores",
}
"""Settings of a run that a try decides, and how."""


def try_command(arguments: list[str]) -> int:
    """usage: curriq try [--minutes 10] [--seeds 3] [--out DIR] [--workers 1] [train's arguments]
           curriq try --resume [--seeds 6] [--out DIR] [--workers 1]

    Find out whether selection helps on my data: train the same model plainly, with static filters and with
    the preset recommended, on several seeds, and judge the result. As many steps are taken as fit the
    minutes, unless --steps is given. DIR gets a comparison file that `curriq compare` runs too, a report,
    figures and LaTeX tables. docs/try.md says how to read them.

    --minutes M  time for all runs together (default: 10)
    --seeds N    seeds 0 … N−1 (default: 3; six or more are needed for a verdict)
    --out DIR    folder of the runs and the results (default: runs/try)
    --workers N  runs at a time (default: 1)
    --resume     go on with the try in DIR, with more seeds if --seeds says so

    `curriq train --help` lists train's arguments.
    """
    flags: dict[str, dict[str, Any]] = {
        "--minutes": {"type": float},
        "--seeds": {"type": int},
        "--out": {"type": Path, "default": Path("runs/try")},
        "--workers": {"type": int},
        "--resume": {"action": "store_true"},
    }
    own, words = own_options(arguments, flags)
    refused = [*words, *(["--minutes"] if own.minutes is not None else [])]
    require(
        not own.resume or not refused,
        f"curriq try --resume {' '.join(refused)}: a try goes on with its own settings. Give --seeds, "
        "--workers and --out only, or start another one in a new --out.",
    )
    for name, why in DECIDED_BY_TRY.items():
        require(not _given(words, name), f"{flag(name)}: leave it out; {why}.")
    config = None if own.resume else parse_run_config(words, prog="curriq try")
    from curriq.evaluate import trial  # loads torch

    if config is None:
        return trial.resume(own.out, own.seeds, own.workers)
    return trial.start(config, own.out, own.minutes, own.seeds, own.workers, steps=_given(words, "steps"))


def _given(words: list[str], name: str) -> bool:
    """Whether a setting is among the words."""
    return any(word == flag(name) or word.startswith(f"{flag(name)}=") for word in words)


def resume_command(arguments: list[str]) -> int:
    """usage: curriq resume RUN [--SETTING VALUE ...] [--against NAME] [--help [GROUP] | --help-all]

    Resume the run in the folder RUN from its newest valid checkpoint, bitwise as if it had never stopped.
    Settings that change neither the data nor the model's shape may follow, such as --steps 600.

    --against NAME  then train NAME (uniform, or a preset) with the same settings, or go on with it, and
                    compare the two, as `curriq train --against NAME` does
    """
    own, words = own_options(arguments, AGAINST)
    parser = _settings_parser("curriq resume", RunConfig())
    parser.add_argument("RUN", type=Path, help="folder of the run, as in curriq resume runs/soft-q-0")
    first = [word for word in words[:1] if not word.startswith("-")]
    folder = parser.parse_args(first).RUN
    saved = load_run_config(folder)
    wanted = parse_run_config(words[1:], saved, prog=f"curriq resume {folder}")
    changed = {name: value for name, value, _ in differences(wanted, saved)}
    from curriq.train.result import finished_run
    from curriq.train.run import resume

    recorded = finished_run(folder) if own.against and not changed else None
    return _with_other(wanted, own.against, lambda: recorded or resume(folder, **changed))


def report_command(arguments: list[str]) -> int:
    """`curriq report RUN…`: one page from the logs alone, and its charts as pictures."""
    from curriq.report.command import main as report

    def load_embed(encoder: str) -> Any:  # the report itself loads no model
        from curriq.data.encoder import load_encoder

        return load_encoder(encoder).encode

    return report(arguments, load_embed)


def select_command(arguments: list[str]) -> int:
    """`curriq select`: the documents worth keeping, by a run or a target."""
    from curriq.curate.arguments import select_options

    options = select_options(arguments)  # before torch is loaded
    from curriq.curate.command import select_main

    return select_main(options)


def score_command(arguments: list[str]) -> int:
    """`curriq score`: the scores of every window and document."""
    from curriq.curate.arguments import score_options

    options = score_options(arguments)  # before torch is loaded
    from curriq.curate.command import score_main

    return score_main(options)


def presets_command(arguments: list[str]) -> int:
    """`curriq presets [NAME]`: the names of the presets, or one of them as a run file."""
    parser = Parser(prog="curriq presets", description="List the presets, or print one as a run file (TOML).")
    parser.add_argument("NAME", nargs="?", choices=tuple(PRESETS), metavar="NAME", help="the one to print")
    name = parser.parse_args(arguments).NAME
    if name:
        print(to_toml(preset(name)), end="")
    else:
        for name, function in PRESETS.items():
            print(f"{name:14} {function.__doc__}")
    return 0


def schema_command(arguments: list[str]) -> int:
    """`curriq schema [FILE]`: the JSON Schema of a run file, or of the file of a comparison."""
    kinds = {"run": "curriq.config.schema", "comparison": "curriq.evaluate.schema"}
    parser = Parser(
        prog="curriq schema",
        description="Print the JSON Schema by which an editor completes and checks a TOML file.",
        epilog="docs/howto.md shows how an editor finds it.",
    )
    what = "what the file describes, a run (default) or a comparison"
    parser.add_argument("FILE", nargs="?", choices=tuple(kinds), default="run", help=what)
    kind = parser.parse_args(arguments).FILE
    print(json.dumps(getattr(import_module(kinds[kind]), f"{kind}_schema")(), indent=1, ensure_ascii=False))
    return 0


def completion_command(arguments: list[str]) -> int:
    """`curriq completion SHELL`: a script, made from the parsers of all commands, that starts no Python."""
    import shtab

    parser = Parser(
        prog="curriq completion",
        description="Print a script by which the shell completes commands, options and their values.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="bash: curriq completion bash > ~/.local/share/bash-completion/completions/curriq",
    )
    shells = tuple(shtab.SUPPORTED_SHELLS)
    parser.add_argument("SHELL", choices=shells, metavar="SHELL", help=f"one of {', '.join(shells)}")
    shell = parser.parse_args(arguments).SHELL
    print(shtab.complete(_whole_parser(), shell=shell))
    return 0


def export_command(arguments: list[str]) -> int:
    """Write what a run has learnt: its curriculum, or its model."""
    from curriq.runlog.curriculum import main
    from curriq.train.export import model_folder

    return main(arguments, model_folder)


COMMANDS: dict[str, Callable[[list[str]], int] | str] = {
    "train": train_command,
    "check": check_command,
    "plan": plan_command,
    "try": try_command,
    "resume": resume_command,
    "select": select_command,
    "score": score_command,
    "verify": "curriq.train.verify",
    "compare": "curriq.evaluate.compare",
    "eval": "curriq.evaluate.tasks",
    "report": report_command,
    "watch": "curriq.report.watch",
    "export": export_command,
    "push": "curriq.train.hub",
    "runs": "curriq.report.runs",
    "presets": presets_command,
    "schema": schema_command,
    "completion": completion_command,
}
"""Command → its function, or the module whose `main` it is."""


def _whole_parser() -> argparse.ArgumentParser:
    """One parser with all commands, each with the arguments that it parses itself; for completion alone."""
    summaries = re.findall(r"^  curriq (\w+) .*?  +(.*)$", USAGE, flags=re.MULTILINE)
    summary = dict(reversed(summaries))  # of several lines on a command the first
    whole = argparse.ArgumentParser(prog="curriq")
    whole.add_argument("-V", "--version", action="store_true", help="the version of this program")
    commands = whole.add_subparsers()
    for name in COMMANDS:
        parents = parsers_of(functools.partial(_run, name))
        for parent in parents:
            _complete_values(parent)
        commands.add_parser(name, parents=parents, add_help=False, help=summary.get(name))
    return whole


def _complete_values(parser: argparse.ArgumentParser) -> None:
    """Say what a shell offers as the values of arguments: choices, or files and folders."""
    import shtab

    known = {"preset": tuple(PRESETS), "help": tuple(GROUPS), "selector": SELECTORS, "proposer": PROPOSERS}
    for action in parser._actions:
        offered: Any = action  # argparse knows no attribute `complete`
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_values(inner)
        elif action.type is Path or action.dest in ("config", "run_dir", "curriculum"):
            offered.complete = shtab.FILE
        elif action.choices is None and action.nargs != 0:
            offered.choices = known.get(action.dest) or _choices(action.dest)


def _choices(name: str) -> tuple[str, ...] | None:
    """The values that a setting may have; None where they cannot be listed."""
    kind = describe()[name][0] if name in describe() else str
    item = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return get_args(item) if get_origin(item) is Literal else None


def parse_run_config(
    words: list[str],
    run: RunConfig | None = None,
    prog: str = "curriq train",
    only: Sequence[str] | None = None,
) -> RunConfig:
    """The preset or the run file that the words name, or the resumed `run`, with flags laid over it; of flags
    `only` those of some settings, where these are named.

    Raises:
        CurriqError: an unknown preset, flag or group, an invalid run file, or a value that is refused.
        SystemExit: the words ask for help, which is printed.
    """
    parser = _settings_parser(prog, run or RunConfig(), () if run else ("preset", "config"))
    namespace, unknown = parser.parse_known_args(words)
    values = vars(namespace)
    groups, chosen, file = (values.pop(name, None) for name in ("help", "preset", "config"))
    base = run or RunConfig()
    base = preset(chosen) if chosen else base
    base = load_toml(file, base) if file else base
    if groups is not None:
        _print_help(groups.split(), base, prog)
        raise SystemExit(0)
    if only is None:
        parser.refuse(unknown)
    if "sources" in values:
        values["sources"] = list(map(parse_source, values["sources"]))
    return base.override(**{name: value for name, value in values.items() if only is None or name in only})


def group_of(name: str) -> str:
    """The group of a setting: its section, except for the settings of the policy."""
    section = field_owners()[name]
    return "policy" if name in _POLICY else _NAMES.get(section, section)


def _settings_parser(prog: str, base: RunConfig, more: Sequence[str] = ()) -> Parser:
    """A parser with a flag for every setting, those of `more`, and the former ones."""
    parser = Parser(prog=prog, add_help=False, help_command="curriq train --help-all")
    parser.add_argument("-h", "--help", nargs="?", const="", metavar=f"{{{','.join(GROUPS)}}}")
    parser.add_argument("--help-all", dest="help", action="store_const", const=" ".join(GROUPS))
    for name in more:
        parser.add_argument(flag(name))
    for name in field_owners():
        _add_flag(parser, name, base)
    for name in FORMER:
        hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(flag(name), dest=name, nargs="?", const="", **hidden)
    return parser


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
    parser = Parser(
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
            add("--dry-run", action="store_true", help="Check everything and start nothing: `curriq check`.")
            text = "Then train NAME (uniform, or a preset) with the same settings, and compare the two."
            add("--against", metavar="NAME", help=text)
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
