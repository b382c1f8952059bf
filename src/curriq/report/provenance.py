"""What ran? Settings, versions, seed, data, machine, cost, and the command that runs it again."""

import shlex

from curriq.report.chart import Block, Code, Section, Table
from curriq.report.runlog import RunLog


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
        "windows read": _count(run.columns.last("x/windows_read")),
        "windows seen": _count(run.columns.last("x/windows_proposed")),
        "tokens": _count(run.columns.last("x/tokens")),
        "FLOPs": _flops(run.columns.last("x/flops")),
        "seconds": _count(run.columns.last("x/seconds")),
        "curriq": str(summary.get("curriq", environment.get("curriq", "?"))),
        "machine": str(environment.get("machine", "?")),
        "hardware": str(environment.get("hardware", "?")),
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


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _flops(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
