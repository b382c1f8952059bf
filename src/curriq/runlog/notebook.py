"""Results as small HTML tables, for notebooks: no script, no style sheet, and no text that acts."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from curriq.errors import CurriqError
from curriq.runlog.read import read_columns
from curriq.terminal import visible

MOST_POINTS = 120
"""Points of a sparkline: more than it has pixels show nothing."""
_CELL = "padding:.15em .7em;white-space:nowrap;text-align:{align};border-top:1px solid rgba(128,128,128,.3)"


@dataclass(frozen=True)
class Sparkline:
    """A curve that fills a cell.

    Attributes:
        values: from left to right; the lowest is drawn at the bottom.
        label: what it shows, for those who do not see it.
    """

    values: Sequence[float]
    label: str

    def svg(self, width: int = 120, height: int = 24) -> str:
        """The curve as an inline SVG; nothing for fewer than two finite values."""
        y = np.asarray(self.values, dtype=float)
        y = y[np.isfinite(y)]
        if len(y) < 2:
            return ""
        span = float(np.ptp(y)) or 1.0
        x = np.linspace(1, width - 1, len(y))
        rows = 2 + (y.max() - y) / span * (height - 4)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, rows, strict=True))
        label = _text(f"{self.label}, from {y[0]:.4g} to {y[-1]:.4g}")
        return (
            f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{label}"><title>{label}</title><polyline points="{points}" fill="none" '
            'stroke="#0081F1" stroke-width="1.5" stroke-linejoin="round"/></svg>'
        )


def table_html(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str | Sparkline]], note: str = ""
) -> str:
    """A table under its title; its first column is text, the others are set to the right."""
    heads = (f'<th style="{_cell(i)}">{_text(heading)}</th>' for i, heading in enumerate(header))
    lines = (
        "<tr>"
        + "".join(f'<td style="{_cell(i)}">{_content(cell)}</td>' for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div style="margin:.4em 0"><strong>{_text(title)}</strong>'
        '<table style="border-collapse:collapse;margin:.3em 0;font-size:.92em">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        + (f'<div style="opacity:.75;font-size:.88em">{_text(note)}</div>' if note else "")
        + "</div>"
    )


def run_html(run_dir: Path, summary: dict[str, Any]) -> str:
    """How a run ended: losses, the course of the validation loss, and the share of each source."""
    try:
        curve = read_columns(run_dir).thinned("validation/loss", MOST_POINTS).mean.tolist()
    except CurriqError:  # the result stands without its log
        curve = []
    rows: list[list[str | Sparkline]] = [
        ["validation loss", _number(summary.get("validation_loss")), Sparkline(curve, "validation loss")],
        ["test loss", _number(summary.get("test_loss")), ""],
    ]
    offered, weight = summary.get("offered_share", {}), summary.get("weight_share", {})
    shares = [[name, f"{offered.get(name, 0.0):.1%}", f"{share:.1%}"] for name, share in weight.items()]
    state = "finished" if summary.get("finished") else "stopped"
    title = f"{run_dir}: {summary.get('selector', '?')}, {state} after {summary.get('steps', '?')} steps"
    return table_html(title, ["", "nats per token", "over the run"], rows) + table_html(
        "What the model learned from", ["source", "read", "weight"], shares
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _cell(column: int) -> str:
    return _CELL.format(align="right" if column else "left")


def _content(cell: str | Sparkline) -> str:
    return cell.svg() if isinstance(cell, Sparkline) else _text(cell)


def _text(text: object) -> str:
    return escape(visible(str(text)))
