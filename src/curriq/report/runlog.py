"""A run as the report sees it: its log, and what is computed from it once for all sections."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curriq.report.topics import Embed, Topics, find_topics
from curriq.runlog.read import Columns, KeptWindows, read_columns, read_document, read_windows
from curriq.runlog.selection import Selection, select


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
        return Detail(
            points=int(np.clip(1800 / runs, 80, 300)),
            steps=int(np.clip(192 / runs, 4, 32)),
            rows=20 if runs <= 8 else 12,
            characters=600 if runs <= 8 else 300,
            topics=topics,
        )


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """One run's folder.

    Attributes:
        label: how the page names it.
        config: `config.toml` as a dictionary, so that the log of another version opens too.
        environment, summary: their content; empty when the run has not written them yet.
        kept: number of windows whose tokens the run kept.
        windows: the measured sample of them.
        topics: clusters of that sample; None when it has too few texts.
    """

    folder: Path
    label: str
    columns: Columns
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    kept: int
    windows: KeptWindows
    topics: Topics | None
    selection: Selection
    detail: Detail

    def setting(self, section: str, name: str, default: Any = None) -> Any:
        return self.config.get(section, {}).get(name, default)

    @property
    def selector(self) -> str:
        return str(self.summary.get("selector") or self.setting("select", "selector", "?"))

    @property
    def sources(self) -> list[str]:
        """Names of the sources that the stream offers."""
        prefix = "select/offered_share/"
        return [name.removeprefix(prefix) for name in self.columns.names() if name.startswith(prefix)]

    @property
    def accepted(self) -> float | None:
        """Share of the windows read that a stream filter has accepted; None where none was rejected."""
        read, proposed = self.columns.last("x/windows_read"), self.columns.last("x/windows_proposed")
        from_stream = self.setting("langevin", "proposer", "stream") == "stream"
        filtered = "data/windows_read" in self.columns and read and proposed and read > proposed
        return proposed / read if filtered and from_stream else None


def load_run_log(folder: Path, label: str, detail: Detail, embed: Embed | None = None) -> RunLog:
    """Read a run's folder, also while the run goes on.

    Raises:
        CurriqError: it is no run's folder, or a file of it is damaged.
    """
    columns = read_columns(folder)
    kept = read_windows(folder)
    windows = kept.sample()
    measures = windows.measures()
    topics = None
    if detail.topics and len(windows) and windows.tokenizer is not None:
        topics = find_topics(windows.texts(np.arange(len(windows)), special=False), detail.topics, embed)
    _, steps = columns.raw("step")
    shown = steps[np.linspace(0, len(steps) - 1, min(len(steps), detail.steps)).round().astype(int)]
    return RunLog(
        folder=folder,
        label=label,
        columns=columns,
        config=read_document(folder / "config.toml"),
        environment=read_document(folder / "environment.json"),
        summary=read_document(folder / "summary.json"),
        kept=len(kept),
        windows=windows,
        topics=topics,
        selection=select(folder, windows, measures, None if topics is None else topics.of, shown),
        detail=detail,
    )
