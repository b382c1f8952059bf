"""The tables and figures of a comparison for a paper: LaTeX with the package booktabs, and captions."""

import re
from collections.abc import Iterable
from pathlib import Path

from curriq.report.chart import Chart, Forest, Json, Table
from curriq.report.figures import NUMBER
from curriq.report.outcome import streams_of
from curriq.runlog.storage import write_atomically

_ESCAPES = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"−": "$-$", "<": "$<$", ">": "$>$", "–": "--", "×": r"$\times$", "→": r"$\to$", "≤": r"$\le$"},
    **{"≥": r"$\ge$", "π": r"$\pi$", "θ": r"$\theta$", "β": r"$\beta$", "α": r"$\alpha$"},
    **{"…": r"\dots{}", "ⁿ": "$^n$"},
}


def escape(text: str) -> str:
    """The text as LaTeX prints it."""
    return "".join(_ESCAPES.get(sign, sign) for sign in text)


def latex_table(table: Table, label: str) -> str:
    """A floating table in the style of booktabs; columns of numbers are aligned to the right."""
    columns = zip(*table.rows, strict=True)
    numeric = [all(map(NUMBER.fullmatch, column)) for column in columns] or [False] * len(table.header)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(table.title, table.note)}}}",
        rf"\label{{{label}}}",
        rf"\begin{{tabular}}{{{''.join('r' if number else 'l' for number in numeric)}}}",
        r"\toprule",
        _row(table.header),
        r"\midrule",
        *map(_row, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def latex_figure(chart: Chart | Forest, file: str, label: str, more: str = "") -> str:
    """A floating figure with the picture in `file` and its caption, which ends with `more`."""
    note = " ".join(part for part in (chart.note, more) if part)
    lines = [
        r"\begin{figure}",
        r"\centering",
        rf"\includegraphics[width=\linewidth]{{{file}}}",
        rf"\caption{{{_caption(chart.title, note)}}}",
        rf"\label{{{label}}}",
        r"\end{figure}",
    ]
    return "\n".join(lines) + "\n"


def write_latex(result: Json, folder: Path, figures: str = "figures") -> list[str]:
    """Write `verdict.tex`, the tables of a comparison.json, and `figures.tex`, its pictures in the folder
    `figures` beside it with captions; returns a line for each.

    `\\input` them after `\\usepackage{booktabs, graphicx}`.
    """
    tables, pictures = [], []
    over = _runs(result)
    for stream in streams_of(result):
        named = {"loss": stream.loss_table(), "cost": stream.cost_table(), "spent": stream.spent_table()}
        tables += [latex_table(table, f"tab:{kind}-{stream.name}") for kind, table in named.items()]
        charts = [
            chart for chart in (stream.curves(), *stream.forests()) if not isinstance(chart, Chart) or chart
        ]
        for chart in charts:
            file = f"{figures}/{chart.id}.png"
            pictures.append(latex_figure(chart, file, f"fig:{chart.id}", over))
    files = {"verdict.tex": tables, "figures.tex": pictures}
    for name, parts in files.items():
        write_atomically(folder / name, _file(parts).encode())
    return [f"latex    {folder / name}" for name in files]


def _runs(result: Json) -> str:
    """`Runs of 9,600 windows, 6 seeds, each with a held-out split of its own.`"""
    arms = [arm for stream in result["streams"].values() for arm in stream.values()]
    windows = {run["windows_proposed"] for arm in arms for run in arm["runs"] if run["finished"]}
    count = len(result["seeds"])
    seeds = f"{count} {'seed' if count == 1 else 'seeds'}"
    split = "each with a held-out split of its own" if result["vary_split"] else "on one held-out split"
    return f"Runs of {' or '.join(f'{number:,}' for number in sorted(windows))} windows, {seeds}, {split}."


def _file(parts: Iterable[str]) -> str:
    return "% \\usepackage{booktabs, graphicx}\n" + "\n".join(parts)


def _caption(title: str, note: str) -> str:
    """Title and note as sentences, without those that point to our documentation."""
    note = " ".join(sentence for sentence in re.split(r"(?<=\.) ", note) if "docs/" not in sentence)
    return escape(" ".join(part if part.endswith(".") else f"{part}." for part in (title, note) if part))


def _row(cells: list[str]) -> str:
    return " & ".join(map(escape, cells)) + r" \\"
