"""Nothing of the user's text acts on a terminal, whoever prints it."""

import contextlib
import io
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriq.report.chart import Table
from curriq.report.figures import print_table
from curriq.report.page import render
from curriq.terminal import EscapedStream, console, escaped_output, visible

ESC = "\x1b]0;title\x07\x1b[2J\x1b[31mred"
MARKUP = "a[/b] [red]b[/red] :smile: [link=x]"


@given(st.text())
def test_what_is_visible_is_as_repr_writes_it_and_stays_so(text: str) -> None:
    shown = visible(text)
    shown.encode()  # no half of a surrogate pair is left
    assert all(c in "\t\n" or c >= " " for c in shown)
    assert not any("\x7f" <= c <= "\x9f" or "\u202a" <= c <= "\u202e" for c in shown)
    assert visible(shown) == shown
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize("text", ["\x1b[2J", "\x07", "\x9b31m", "\u202e", "\udc80", "\r", "\x00", "\u2028"])
def test_controls_are_escaped_as_python_does(text: str) -> None:
    assert visible(text) == repr(text)[1:-1].replace("\\\\", "\\") or len(text) > 1
    assert visible(f"a{text[0]}b") == f"a{text[0]!r}b".replace("'", "")


def test_every_stream_of_the_program_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with escaped_output():
        print("name", ESC)
        print(f"\r{ESC}", file=sys.stderr)
        handler = logging.StreamHandler()
        handler.emit(logging.LogRecord("x", 30, "", 0, ESC, (), None))
        console().print(ESC, style="bold")
        console(stderr=True).print(ESC)
        with escaped_output():  # a command that calls another
            print("twice", ESC)
    assert sys.stdout is out
    assert "\x1b" not in out.getvalue() + err.getvalue()
    assert out.getvalue().count("\\x1b]0;title\\x07") == 3
    assert err.getvalue().startswith("\r\\x1b]0;")  # progress bars draw over their own line
    assert "twice \\x1b]" in out.getvalue()


def test_a_stream_that_cannot_encode_a_character_gets_its_escape() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii", line_buffering=True)
    with contextlib.redirect_stdout(stream), escaped_output():
        print("naïve – \udc80")
        console().print("─ ü")
    assert raw.getvalue() == b"na\\xefve \\u2013 \\udc80\n\\u2500 \\xfc\n"


def test_the_console_shows_markup_as_it_is_and_its_own_styles_work() -> None:
    file = io.StringIO()
    screen = console(file=file, force_terminal=True, width=100)
    screen.print(MARKUP + ESC, style="red")
    print_table(screen, Table(MARKUP, ["name", ESC], [[MARKUP, "1"], [ESC, "2"]]))
    text = file.getvalue()
    assert text.count(MARKUP) == 3
    assert "\x1b[31m" in text  # the style
    assert "\x1b]0" not in text
    assert "\x1b[2J" not in text
    lines = [line for line in text.splitlines() if line.rstrip().endswith(("1", "2"))]
    assert len({len(line.rstrip()) for line in lines}) == 1  # the escapes have been counted for the columns


def test_the_page_holds_no_control_character() -> None:
    """Its title escapes them; its data are JSON, and the scripts write ⟨U+202E⟩ (tests/browser)."""
    page = render(ESC, [], [(f"{ESC}\udc80", [])], facts="")
    assert page.encode()
    assert "\x1b" not in page
    assert "<title>\\x1b]0;title" in page


def test_the_stream_passes_on_what_is_asked_of_it() -> None:
    with open("/dev/null", "w") as raw:
        stream = EscapedStream(raw)
        assert stream.fileno() == raw.fileno()
        assert stream.encoding == raw.encoding
        assert not stream.isatty()
        assert stream.write("a\x1b") == 5
        stream.writelines(["a", "b"])
