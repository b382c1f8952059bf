"""What ran? Settings, versions, seed, data, machine, cost, and the command that runs it again."""

import shlex

from curriq.report.chart import Block, Code, Section, Table, fixed
from curriq.report.runlog import RunLog


def what_ran(run: RunLog) -> Section:
    """Section 6 of the report."""
    environment = run.environment
    facts = _facts(run)
    again = f"curriq train --config {shlex.quote(str(run.folder / 'config.toml'))} --run-dir NEW"
    blocks: list[Block] = [Code("To run it again", again), _table("Facts", "what", facts)]
    if command := environment.get("command"):
        blocks.append(Code("Started as", shlex.join(map(str, command))))
    settings = run.folder / "config.toml"
    if settings.exists():
        text = settings.read_text(encoding="utf-8")
        blocks.append(Code("All settings (config.toml)", text, folded=True))
    if fingerprint := environment.get("fingerprint"):
        blocks.append(_table("Fingerprint of the data", "part", fingerprint))
    return Section(
        "ran",
        "What ran?",
        f"{run.selector}, seed {facts['seed']}, {facts['state']}. Two runs with one seed, one thread "
        "count and one machine are equal to the bit.",
        blocks,
    )


def _facts(run: RunLog) -> dict[str, object]:
    summary, environment = run.summary, run.environment
    done = "finished" if summary.get("finished") else "stopped" if summary else "still running"
    last = run.columns.last
    return {
        "folder": run.folder,
        "state": f"{done}, {run.columns.rows} of {run.setting('train', 'steps', '?')} steps",
        "method": run.selector,
        "model": run.setting("lm", "model", "?"),
        "seed": run.setting("train", "seed", "?"),
        "data fingerprint": summary.get("data_fingerprint", "in environment.json"),
        "windows read": fixed(last("x/windows_read"), ",.0f"),
        "windows proposed": fixed(last("x/windows_proposed"), ",.0f"),
        "windows trained": fixed(last("x/windows_trained"), ",.0f"),
        "tokens": fixed(last("x/tokens"), ",.0f"),
        "FLOPs": fixed(last("x/flops"), ".4g"),
        "seconds": fixed(last("x/seconds"), ",.0f"),
        "curriq": summary.get("curriq", environment.get("curriq", "?")),
        "machine": environment.get("machine", "?"),
        "hardware": environment.get("hardware", "?"),
        "device": f"{environment.get('device', '?')}, {environment.get('threads', '?')} threads",
        "python": environment.get("python", "?"),
        **environment.get("versions", {}),
    }


def _table(title: str, first: str, values: dict[str, object]) -> Table:
    rows = [[name, str(value)] for name, value in values.items()]
    return Table(title, [first, "value"], rows)
