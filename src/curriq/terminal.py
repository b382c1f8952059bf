"""Output to a terminal in which nothing of the user's data acts: control characters are shown as escapes.

Names of sources, columns and files, and the texts of errors, may hold escape sequences that set colours or
titles, or move the cursor over what was printed before. `escaped_output` covers every stream of the program,
whoever writes to it; `console` gives the one rich console, on which markup is off.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but for tab and line feed
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # line separators, marks that reverse the direction
    "\ud800-\udfff]"  # halves of surrogate pairs: bytes of file names that are not UTF-8
)


def visible(text: str) -> str:
    """The text with control characters as `repr` writes them, `\\x1b` for ESC, but for tab and line feed."""
    return _ACTING.sub(lambda match: repr(match[0])[1:-1], text)


class EscapedStream:
    """A text stream that passes on what is `visible`; in all else it is `raw_stream`, the one beneath."""

    def __init__(self, raw_stream: Any) -> None:
        self.raw_stream = raw_stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw_stream, name)

    def write(self, text: str) -> int:
        # Progress bars of libraries begin a write with a carriage return, to draw over themselves.
        start = "\r" if text.startswith("\r") else ""
        return self.raw_stream.write(start + visible(text.removeprefix("\r")))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


@contextlib.contextmanager
def escaped_output() -> Generator[None]:
    """Standard output and standard error escape all that is written to them inside."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is escaped too, and never an error
            stream.reconfigure(errors="backslashreplace")
    with open(os.devnull, "w") as nowhere:  # for a stream that was closed when the program began
        raw = (raw_stream(stream) or nowhere for stream in (sys.stdout, sys.stderr))
        out, err = (cast(TextIO, EscapedStream(stream)) for stream in raw)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield


def raw_stream(stream: Any) -> Any:
    """The stream beneath an `EscapedStream`; any other stream itself."""
    return getattr(stream, "raw_stream", stream)


def console(*, stderr: bool = False, file: Any = None, **options: Any) -> "Console":
    """A rich console on standard output, standard error or a file that shows text as it is: no markup, no
    emoji codes, no highlighting, and control characters as escapes. Styles come as `style=…` or as
    `rich.text.Text`."""
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

    class Plain(Console):
        def render_str(self, text: str, **how: Any) -> Any:
            return super().render_str(visible(text), **how)  # here, so that columns have the right widths

        def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Any:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    # On the stream beneath, because rich's own escape sequences must pass.
    file = file or raw_stream(sys.stderr if stderr else sys.stdout)
    return Plain(file=file, markup=False, emoji=False, highlight=False, **options)
