"""The command line: train, resume, compare, eval, report, watch, export, presets.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curriq.config import (
    RunConfig,
    SourceConfig,
    differences,
    format_source,
    load_run_config,
    load_toml,
    source_from_dict,
    to_toml,
    unknown_key,
)
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
  curriq train --help                   every setting, with what it does
  curriq resume runs/soft-q-0           go on after Ctrl-C, a crash, or with more --steps
  curriq compare FILE.toml              arms × seeds × streams, with intervals and a verdict
  curriq eval RUN                       downstream tasks: HellaSwag, MMLU, LAMBADA, WikiText
  curriq report RUN…                    one page that shows what runs did, from their logs
  curriq watch RUN                      the same page while the run goes on, on this machine only
  curriq export RUN                     the learned order and weights, for curriq train --curriculum
  curriq presets [NAME]                 list the presets, or print one as a run file
"""

SETTINGS = """--preset NAME and --config RUN.toml choose what to start from; the settings below change it.
The defaults shown are those of that choice."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 a mistake to mend, 130 interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("curriq").setLevel(logging.INFO)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise CurriqError(unknown_key(command, list(COMMANDS), "command"))
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
        epilog="Any setting of `curriq train --help` that does not change the data or the shape of the model "
        "may follow, for instance --steps 600 or --lm-lr 1e-4.",
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


def compare_command(arguments: list[str]) -> int:
    """`curriq compare FILE`: arms × seeds × streams, and which of them gains."""
    from curriq.evaluate.compare import main as compare

    return compare(arguments)


def eval_command(arguments: list[str]) -> int:
    """`curriq eval RUN`: downstream tasks, and perplexity by source."""
    from curriq.evaluate.tasks import main as evaluate

    return evaluate(arguments)


def report_command(arguments: list[str]) -> int:
    """`curriq report RUN…`: one page from the logs alone, and its charts as pictures."""
    from curriq.report.command import main as report

    return report(arguments, _load_embed)


def watch_command(arguments: list[str]) -> int:
    """`curriq watch RUN`: the report of a run that goes on."""
    from curriq.report.watch import main as watch

    return watch(arguments)


def export_command(arguments: list[str]) -> int:
    """`curriq export RUN`: the learned order and weights as Parquet."""
    from curriq.runlog.export import main as export

    return export(arguments)


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


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "resume": resume_command,
    "compare": compare_command,
    "eval": eval_command,
    "report": report_command,
    "watch": watch_command,
    "export": export_command,
    "presets": presets_command,
}


def parse_run_config(arguments: list[str]) -> RunConfig:
    """Preset or run file first, then the overrides that follow it."""
    chooser = argparse.ArgumentParser(prog="curriq train", add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset")
    chooser.add_argument("--config")
    chosen, rest = chooser.parse_known_args(arguments)
    base = preset(chosen.preset) if chosen.preset else RunConfig()
    if chosen.config:
        base = load_toml(chosen.config, base)
    return _parse(rest, base, prog="curriq train")


def _parse(arguments: list[str], base: RunConfig, prog: str) -> RunConfig:
    """Overrides over `base`; tyro prints its own help and errors, and exits.

    Raises:
        CurriqError: a value that its component refuses; tyro alone would put the message in a box under
            the name of an internal section.
    """
    import tyro

    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_source_rule)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                RunConfig,
                args=arguments,
                default=base,
                prog=prog,
                description=SETTINGS,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
                registry=registry,
            )
    except (SystemExit, _Refused) as exit:
        if (refusal := _cause(exit)) is not None:
            raise refusal from None
        sys.stderr.write(box.getvalue())
        raise


def _cause(error: BaseException) -> CurriqError | None:
    """The CurriqError that an exception was raised in answer to."""
    while error.__context__ is not None:
        error = error.__context__
        if isinstance(error, CurriqError):
            return error
    return None


def _source_rule(info: Any) -> Any:
    """Reads and prints a SourceConfig as one word of key=value pairs."""
    import tyro

    if info.type is not SourceConfig:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="KEY=VALUE,...",
        instance_from_str=lambda words: _source(words[0]),
        is_instance=lambda value: isinstance(value, SourceConfig),
        str_from_instance=lambda source: [format_source(source)],
    )


class _Refused(Exception):
    """Carries a CurriqError past tyro, which takes a ValueError for "not of this type"."""


def _source(text: str) -> SourceConfig:
    try:
        return parse_source(text)
    except CurriqError as error:
        raise _Refused from error


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
