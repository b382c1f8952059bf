"""How charts look, on the page and in pictures alike, and the files of the report that are no Python."""

from importlib.resources import files

from curriq.runlog.read import AXES

LIGHT = ("#0081F1", "#955319", "#16A55E", "#FB53AC", "#B88907", "#1F5868", "#000000")
"""Colours of the lines on white: the hues of Okabe and Ito (2008), of which some are too pale for lines.
Darkening these alone made two of them one colour to deuteranopes, so all were searched for: the greatest
least distance under the three dichromacies at a contrast of 3."""
DARK = ("#4AA8E0", "#F0813A", "#2CC295", "#DE94BC", "#E8A81C", "#8CCBF2", "#E6E9EC")
"""The same hues for a dark ground."""
DASHES = ((), (4, 2), (1, 1.6))
"""Lengths of dashes and gaps in widths of the line, one pattern per round through the colours."""
LINE_WIDTH = 1.8
"""In pixels of the page."""
BAND_OPACITY, LAYER_OPACITY = 0.17, 0.85
MOST_DOTS = 24
"""Measurements of a line that are also marked by dots."""
AXIS_LABELS = {axis: axis for axis in AXES} | {"windows": "windows proposed", "read": "windows read"}


def asset(name: str) -> str:
    """The text of a file in `assets/`."""
    return files("curriq.report").joinpath("assets", name).read_text(encoding="utf-8")
