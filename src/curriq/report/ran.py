"""What ran? Settings, versions, seed, data, machine, cost, and the command that runs it again."""

import shlex

from curriq.report.chart import Block, Chart, Code, Section, Series, Table
from curriq.report.policy import unit_of
from curriq.report.runlog import RunLog

RETRIEVAL = ("langevin/", "retrieval/", "rag/", "query/")
"""Prefixes of the metrics of Langevin-RAG."""


def what_ran(run: RunLog) -> Section:
    """Section 6 of the report."""
    summary, environment = run.summary, run.environment
    done = "finished" if summary.get("finished") else "stopped" if summary else "still running"
    steps = run.setting("train", "steps", "?")
    facts = {
        "folder": str(run.folder),
        "state": f"{done}, {run.columns.rows} of {steps} steps",
        "method": run.selector,
        "model": str(run.setting("lm", "model", "?")),
        "seed": str(run.setting("train", "seed", "?")),
        "data fingerprint": str(summary.get("data_fingerprint", "in environment.json")),
        "windows seen": _count(run.columns.last("x/windows_seen")),
        "tokens": _count(run.columns.last("x/tokens")),
        "FLOPs": _flops(run.columns.last("x/flops")),
        "seconds": _count(run.columns.last("x/seconds")),
        "curriq": str(summary.get("curriq", environment.get("curriq", "?"))),
        "machine": str(environment.get("machine", "?")),
        "device": f"{environment.get('device', '?')}, {environment.get('threads', '?')} threads",
        "python": str(environment.get("python", "?")),
        **{name: str(version) for name, version in environment.get("versions", {}).items()},
    }
    again = f"curriq train --config {shlex.quote(str(run.folder / 'config.toml'))} --run-dir NEW"
    blocks: list[Block] = [
        Code(title="To run it again", text=again),
        Table(title="Facts", header=["what", "value"], rows=[[name, value] for name, value in facts.items()]),
    ]
    if command := environment.get("command"):
        blocks.append(Code(title="Started as", text=shlex.join(map(str, command))))
    settings = run.folder / "config.toml"
    if settings.exists():
        text = settings.read_text(encoding="utf-8")
        blocks.append(Code(title="All settings (config.toml)", text=text, folded=True))
    fingerprint = environment.get("fingerprint", {})
    if fingerprint:
        rows = [[name, str(value)] for name, value in fingerprint.items()]
        blocks.append(Table(title="Fingerprint of the data", header=["part", "value"], rows=rows))
    return Section(
        id="ran",
        title="What ran?",
        answer=f"{run.selector}, seed {facts['seed']}, {facts['state']}. Two runs with one seed, one thread "
        "count and one machine are equal to the bit.",
        blocks=blocks,
    )


def retrieval(run: RunLog) -> Section | None:
    """Section 5 of the report: the diagnostics of Langevin-RAG (Section 3.6); None for other runs."""
    charts: list[Block] = []
    for name in run.columns.names():
        if name.startswith(RETRIEVAL):
            thin = run.columns.thinned(name, run.detail.points)
            line = Series(label=name, x=thin.x, y=thin.mean, low=thin.low, high=thin.high)
            title = name.replace("_", " ").replace("/", ": ")
            charts.append(
                Chart(id="rag-" + name.replace("/", "-"), title=title, y=unit_of(name), series=[line])
            )
    if not charts:
        return None
    return Section(
        id="retrieval",
        title="What did Langevin-RAG ask for?",
        answer="The diagnostics of Section 3.6: how far the chains moved, what Q gained on hard tokens, and "
        "how near the retrieved windows lie to their queries.",
        blocks=charts,
    )


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _flops(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
