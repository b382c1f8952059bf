"""The parser of every command: errors in one style, and the search for it that completion needs."""

import argparse
from pathlib import Path

import pytest

from curriq.errors import CurriqError
from curriq.parser import Parser, parsers_of


def make() -> Parser:
    parser = Parser(prog="curriq bake")
    parser.add_argument("LOAF", type=Path, help="the loaf to bake")
    parser.add_argument("--heat", type=int)
    parser.add_argument("--share", type=float)
    parser.add_argument("--crust", choices=("soft", "hard"))
    parser.add_argument("--former", help=argparse.SUPPRESS)
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "LOAF is missing: the loaf to bake."),
        (["rye", "--heat", "hot"], "--heat = 'hot': it must be a whole number."),
        (["rye", "--share", "x"], "--share = 'x': it must be a number."),
        (["rye", "--crust", "sof"], "--crust = 'sof': choose from soft, hard. Did you mean 'soft'?"),
        (["rye", "--heat"], "--heat has no value: write it behind, as in --heat HEAT."),
        (["rye", "--crust"], "--crust has no value: write it behind, as in --crust soft."),
        (["rye", "--heet=3"], "unknown argument '--heet'. Did you mean '--heat'?"),
        (["rye", "wheat"], "unknown argument 'wheat'."),
        (
            ["rye", "--cru", "soft"],
            "unknown argument '--cru'. Did you mean '--crust'?",
        ),  # not an abbreviation
        (["rye", "--formr", "3"], "unknown argument '--formr'."),  # former names are not suggested
    ],
)
def test_errors_are_one_line_and_name_value_rule_and_fix(words: list[str], message: str):
    with pytest.raises(CurriqError) as error:
        make().parse_args(words)
    assert str(error.value) == f"{message} `curriq bake --help` explains every option."


def test_sub_commands_speak_the_same_way():
    parser = Parser(prog="curriq oven")
    parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help="on or off").add_parser("on")
    for words, message in [
        ([], "COMMAND is missing: on or off."),
        (["of"], "COMMAND = 'of': choose from on."),
        (["on", "--x"], "unknown argument '--x'."),
    ]:
        with pytest.raises(CurriqError) as error:
            parser.parse_args(words)
        assert str(error.value).startswith(message)


def test_the_parsers_of_a_command_are_found_before_it_does_anything():
    done = []

    def bake(words: list[str]) -> None:
        first = Parser(prog="first", is_last=False, add_help=False)
        first.add_argument("--dry-run", action="store_true")
        own, left = first.parse_known_args(words)
        done.append((own.dry_run, make().parse_args(left).LOAF))

    assert [parser.prog for parser in parsers_of(bake)] == ["first", "curriq bake"]
    assert done == []
    bake(["rye", "--dry-run"])  # afterwards they parse as ever
    assert done == [(True, Path("rye"))]
    assert parsers_of(lambda words: None) == []


def test_a_foreign_parser_is_not_found_and_ends_nothing():
    def foreign(words: list[str]) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("LOAF")
        parser.parse_args(words)

    assert parsers_of(foreign) == []
