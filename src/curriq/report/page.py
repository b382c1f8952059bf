"""One HTML file that holds everything: it opens from a disk, without a network and without a library.

The charts are drawn by some hundred lines of our own (`assets/charts.js`) and not by plotly: the whole page
of a run then has a few hundred kilobytes instead of five megabytes, follows light and dark by style sheet,
and can be refreshed in place by `curriq watch`. Nothing of a run becomes markup: it travels as JSON, and the
scripts put it into text nodes. A content security policy allows that one script and no connection.
"""

import base64
import hashlib
import html
import json
import re
from typing import Any

from curriq.report import look
from curriq.report.chart import Section, section_json
from curriq.terminal import visible

SCRIPTS = ("charts.js", "steps.js", "explorer.js", "queries.js", "page.js")
LOOK = {
    "axes": look.AXIS_LABELS,
    "colours": len(look.LIGHT),
    "dashes": [" ".join(f"{look.LINE_WIDTH * length:g}" for length in dash) for dash in look.DASHES],
    "mostDots": look.MOST_DOTS,
}
"""What the scripts need of `look.py`."""


def render(
    title: str,
    overview: list[Section],
    runs: list[tuple[str, list[Section]]],
    facts: str,
    live: float | None = None,
) -> str:
    """The page: sections about all runs, and those of the run that the reader chooses.

    Args:
        title: plain text.
        facts: last line of the page. `{size}` becomes the size of the page.
        live: seconds between refreshes when `curriq watch` serves the page; None for a file.
    """
    blocks = [_data(f"run-{index}", sections) for index, (_, sections) in enumerate(runs)]
    script = "\n".join(('"use strict";', f"const LOOK = {json.dumps(LOOK)};", *map(look.asset, SCRIPTS)))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = look.asset("page.css")
    for theme, colours in (("/*LIGHT*/", look.LIGHT), ("/*DARK*/", look.DARK)):
        style = style.replace(theme, _variables(colours))
    size = len(script) + len(style) + sum(len(block.encode()) for block in blocks)
    facts = facts.replace("{size}", f"{size / 1e6:.2f} MB")
    blocks.insert(0, _data("overview", overview, runs=[label for label, _ in runs], facts=facts, live=live))
    pieces = {
        "version": hashlib.sha256("".join(blocks).encode()).hexdigest()[:16],
        "hash": f"sha256-{digest}",
        "connect": "'self'" if live else "'none'",
        "title": html.escape(visible(title)),
        "css": style,
        "script": script,
        "data": "\n".join(blocks),
    }
    # One pass, so that a piece that looks like a placeholder stays what it is.
    return re.sub(r"\{(\w+)\}", lambda match: pieces[match[1]], look.asset("page.html"))


def _data(identity: str, sections: list[Section], **more: Any) -> str:
    """A block that a browser reads as data: no `<` in it can end the block."""
    content = {"sections": list(map(section_json, sections))} | more
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    # A lone surrogate is no valid UTF-8.
    text = text.encode("utf-8", "replace").decode()
    return f'<script type="application/json" id="{identity}">{text}</script>'


def _variables(colours: tuple[str, ...]) -> str:
    sizes = {"line-width": f"{look.LINE_WIDTH}px", "band": look.BAND_OPACITY, "layer": look.LAYER_OPACITY}
    variables = {f"c{index}": colour for index, colour in enumerate(colours)} | sizes
    return " ".join(f"--{name}: {value};" for name, value in variables.items())
