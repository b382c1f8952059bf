"""A run as the report sees it: everything that its folder says, read once."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curriq.errors import CurriqError
from curriq.report.columns import Columns, bucket_edges, read_columns
from curriq.report.selection import Selection, select
from curriq.report.topics import Embed, Topics, find_topics
from curriq.runlog.kept_windows import KeptWindows, read_windows


@dataclass(frozen=True, kw_only=True)
class Detail:
    """How much of a run a report shows; less per run when there are many.

    Attributes:
        points: most points of a line.
        steps: steps that the explorer shows.
        rows: windows of each of them, half from either end.
        characters: of a window's text; the rest is cut.
        topics: clusters of the windows; 0 for none.
    """

    points: int = 300
    steps: int = 48
    rows: int = 20
    characters: int = 600
    topics: int = 8

    @staticmethod
    def of(runs: int, topics: int) -> "Detail":
        """The detail that keeps a page of so many runs within a few megabytes."""
        if runs <= 1:
            return Detail(topics=topics)
        share = 1 / runs
        return Detail(
            points=int(np.clip(1800 * share, 80, 300)),
            steps=int(np.clip(192 * share, 4, 32)),
            rows=20 if runs <= 8 else 12,
            characters=600 if runs <= 8 else 300,
            topics=topics,
        )


@dataclass(frozen=True)
class RunLog:
    """One run's folder.

    Attributes:
        label: how the page names it.
        config: `config.toml` as a dictionary, so that the log of another version opens too.
        environment, summary: their content; empty when the run has not written them yet.
        windows: the measured sample of what it kept.
        topics: clusters of that sample; None when it has too few texts.
    """

    folder: Path
    label: str
    columns: Columns
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    windows: KeptWindows
    kept: int
    topics: Topics | None
    selection: Selection
    detail: Detail

    def setting(self, section: str, name: str, default: Any = None) -> Any:
        return self.config.get(section, {}).get(name, default)

    @property
    def sources(self) -> list[str]:
        """Names of the sources that the stream offers."""
        prefix = "select/offered_share/"
        return [name.removeprefix(prefix) for name in self.columns.names() if name.startswith(prefix)]

    @property
    def taken(self) -> float | None:
        """Share of the windows read that a steered stream has taken; None where none was passed over."""
        read, seen = self.columns.last("x/windows_read"), self.columns.last("x/windows_proposed")
        steered = "data/windows_read" in self.columns and read and seen and read > seen
        return seen / read if steered and self.setting("langevin", "proposer", "stream") == "stream" else None

    @property
    def selector(self) -> str:
        return str(self.setting("select", "selector", "?"))

    def step_axes(self, steps: np.ndarray) -> dict[str, np.ndarray]:
        """The x-axes at some steps."""
        where, logged = self.columns.raw("step")
        if not len(logged):
            return {"step": steps}
        return self.columns.at(where[np.searchsorted(logged, steps).clip(max=len(logged) - 1)])

    def thin_steps(
        self, values: np.ndarray, steps: np.ndarray, most: int | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Bucket means of a value per step that may be NaN, and their x-axes."""
        edges = bucket_edges(len(values), most or self.detail.points)
        if not len(values):
            return self.step_axes(steps), values
        known = ~np.isnan(values)
        sums = np.add.reduceat(np.where(known, values, 0.0), edges[:-1])
        counts = np.add.reduceat(known.astype(float), edges[:-1])
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.step_axes(steps[edges[1:] - 1]), sums / counts


def load_run_log(folder: Path, label: str, detail: Detail, embed: Embed | None = None) -> RunLog:
    """Read a run's folder, also while the run goes on.

    Raises:
        CurriqError: it is no run's folder, or a file of it is damaged.
    """
    columns = read_columns(folder)
    kept = read_windows(folder)
    sample = kept.sample
    windows = KeptWindows(kept.ids[sample], kept.tokens[sample], kept.tokenizer)
    measures = windows.measures() if len(windows) else {}
    topics = None
    if detail.topics and len(windows) and windows.tokenizer is not None:
        topics = find_topics(windows.texts(np.arange(len(windows)), special=False), detail.topics, embed)
        if topics is not None:
            measures["topic"] = topics.of
    _, steps = columns.raw("step")
    chosen = steps[np.linspace(0, len(steps) - 1, min(len(steps), detail.steps)).round().astype(int)]
    selection = select(folder, measures, windows if len(windows) else None, {int(step) for step in chosen})
    return RunLog(
        folder=folder,
        label=label,
        columns=columns,
        config=_toml(folder / "config.toml"),
        environment=read_json(folder / "environment.json"),
        summary=read_json(folder / "summary.json"),
        windows=windows,
        kept=len(kept),
        topics=topics,
        selection=selection,
        detail=detail,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file; empty when there is none.

    Raises:
        CurriqError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CurriqError(f"{path} is damaged ({error}): remove it to report on the rest.") from None


def _toml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CurriqError(f"{path} is damaged ({error}): remove it to report on the rest.") from None
