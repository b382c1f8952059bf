"""`curriq check`: whether a run can start, all that keeps it from starting, and what it will cost.

The sources are looked at before torch is loaded (`data/survey.py`); `curriq train` refuses what has a fault
there.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import curriq
from curriq import terminal
from curriq.config import RunConfig
from curriq.data.survey import survey
from curriq.errors import CurriqError
from curriq.report.chart import Table
from curriq.report.figures import print_table
from curriq.runlog.checkpoints import require_new_run

if TYPE_CHECKING:
    from curriq.train.build import Run

FORMAT = 1
"""Version of the JSON; fields may be added without a new one."""
MOST_ENCODED = 300_000
"""Characters of a source that are tokenised for its tokens per megabyte."""

Json = dict[str, Any]


def check(config: RunConfig | None, settings: Sequence[str] = (), *, data_only: bool = False) -> Json:
    """What `curriq check --json` prints, docs/check.md lists its fields.

    Args:
        config: the run; where its settings are refused one with its sources, and None where these are too.
        settings: what is wrong with the settings.
        data_only: look at the sources alone, without torch.
    """
    result: Json = {
        "format": FORMAT,
        "curriq": curriq.__version__,
        "usable": False,
        "faults": [_fault("settings", message) for message in settings],
        "sources": [],
        "held_out": None,
        "model": None,
        "estimate": None,
    }
    if config is not None:
        found = survey(config)
        result["faults"] += [*map(vars, found.faults), *_of_folder(config)]
        result["sources"] = [_source(source) for source in found.sources]
        if not result["faults"] and not data_only:
            _open(config, [source.texts for source in found.sources], result)
    result["usable"] = not result["faults"]
    return result


def _fault(where: str, problem: str) -> Json:
    return {"where": where, "problem": problem, "fix": ""}


def _of_folder(config: RunConfig) -> Iterator[Json]:
    """What keeps a run from starting in its folder."""
    try:
        if config.log.run_dir:
            require_new_run(Path(config.log.run_dir))
    except CurriqError as error:
        yield _fault("run", str(error))


def _source(source: Any) -> Json:
    """What was read of a source (`data.survey.SourceSurvey`)."""
    names = ("name", "path", "files", "bytes", "sampled_files", "skipped", "whole")
    content = sum(len(text.encode()) for text in source.texts)
    read = {"documents": len(source.texts), "text_bytes": content, "tokens_per_mb": None}
    return {name: getattr(source, name) for name in names} | read


def _open(config: RunConfig, texts: list[tuple[str, ...]], result: Json) -> None:
    """Build the run as `curriq train` does and take a few steps; fills in the result."""
    from curriq.train.estimate import estimate, past_the_start
    from curriq.train.run import prepare

    try:
        run = prepare(past_the_start(config))
        for source, sample in zip(result["sources"], texts, strict=True):
            source["tokens_per_mb"] = _tokens_per_mb(run, sample)
        result["held_out"] = _held_out(run)
        cost = asdict(estimate(run))
    except CurriqError as error:
        result["faults"] += [_fault("run", message) for message in error.faults]
        return
    except ArithmeticError as error:
        message = f"{error} in a step of the untrained model: check --model, --precision and --beta."
        result["faults"].append(_fault("run", message))
        return
    network = run.lm.network
    result["model"] = {
        "name": config.lm.model,
        "pretrained": config.lm.pretrained,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "device": str(run.lm.device),
        "validation_loss": cost.pop("initial_validation_loss"),
    }
    result["estimate"] = {"steps": config.train.steps} | cost
    free = _free_bytes(config)
    result["estimate"]["free_disk_bytes"] = free
    if free is not None and cost["disk_bytes"] > free:
        needed = (
            f"the run needs about {size_text(cost['disk_bytes'])} of disk, and {size_text(free)} are free"
        )
        fix = "lower --checkpoint-keep or --log-windows-mb, or give --run-dir on another disk"
        result["faults"].append(_fault("--run-dir", f"{needed}.") | {"fix": fix})


def _tokens_per_mb(run: "Run", texts: tuple[str, ...]) -> float | None:
    """Tokens per million bytes of UTF-8 text; None without a sample."""
    from curriq.data.tokenizer import encode

    sample, characters = [], 0
    for text in texts:
        sample.append(text[: MOST_ENCODED - characters])
        characters += len(text)
        if characters >= MOST_ENCODED:
            break
    size = sum(len(text.encode()) for text in sample)
    return round(1e6 * sum(map(len, encode(run.corpus.tokenizer, sample))) / size) if size else None


def _held_out(run: "Run") -> Json:
    """The sizes of the held-out sets, as they are and as they were asked for."""
    data, sets = run.config.data, run.corpus.held_out
    sizes = {name: len(getattr(sets, name)) for name in ("reward", "validation", "test")}
    asked = {name: getattr(data, f"{name}_set_size") for name in sizes}
    return {"target": data.target, "window": data.window, **sizes, "asked": asked, "fitted": sizes != asked}


def _free_bytes(config: RunConfig) -> int | None:
    folder = Path(config.log.run_dir or "runs").absolute()
    existing = next((path for path in (folder, *folder.parents) if path.is_dir()), None)
    return None if existing is None else shutil.disk_usage(existing).free


def report(result: Json, *, as_json: bool = False) -> int:
    """Print what `check` found; returns the exit status, 0 for a run that can start and 1 for faults. Of
    several processes rank 0 prints, and the others say on standard error what is wrong there."""
    if rank := int(os.environ.get("RANK", "0")):
        for fault in result["faults"]:
            text = f"rank {rank}: {fault['where']}: {fault['problem']}"
            terminal.console(stderr=True).print(text, soft_wrap=True)
    elif as_json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        print_check(result)
    return 0 if result["usable"] else 1


def print_check(result: Json) -> None:
    """Print the sources, the held-out sets, the model, the costs and the faults."""
    console = terminal.console(soft_wrap=True)
    if result["sources"]:
        header = ["source", "files", "MB", "documents read", "skipped", "tokens per MB"]
        print_table(console, Table("What was read", header, list(map(_row, result["sources"]))))
    for line in (*_of_held_out(result["held_out"]), *_of_model(result)):
        console.print(line)
    if not result["faults"]:
        whole = "no fault was found: `curriq train` with these arguments starts the run."
        part = "no fault was found in the settings and the sources; the model was not looked at."
        console.print(f"usable      {part if result['model'] is None else whole}")
        return
    count = len(result["faults"])
    console.print(f"{count} {'fault' if count == 1 else 'faults'}:", style="bold red")
    for fault in result["faults"]:
        console.print(f"  {fault['where']}: {fault['problem']}")
        if fault["fix"]:
            console.print(f"    → {fault['fix']}", style="green")


def _row(source: Json) -> list[str]:
    read = f"{source['documents']:,}" + (" (all)" if source["whole"] else "")
    size = f"{source['bytes'] / 1e6:,.1f}" if source["files"] else "–"
    rate = source["tokens_per_mb"]
    tokens = "–" if rate is None else f"{rate:,.0f}"
    return [source["name"], str(source["files"] or "–"), size, read, str(source["skipped"]), tokens]


def _of_held_out(held_out: Json | None) -> list[str]:
    if held_out is None:
        return []
    sizes = ", ".join(f"{held_out[name]} {name}" for name in held_out["asked"])
    asked = ", ".join(f"{size} {name}" for name, size in held_out["asked"].items())
    fitted = f" (fitted to what it can spare, of {asked})" if held_out["fitted"] else ""
    return [f"held out    {sizes} windows of {held_out['window']} tokens of {held_out['target']!r}{fitted}"]


def _of_model(result: Json) -> list[str]:
    model, cost = result["model"], result["estimate"]
    if model is None or cost is None:
        return []
    kind = "the base model" if model["pretrained"] else "random weights"
    memory = cost["peak_memory_bytes"]
    of_disk = f"{size_text(cost['checkpoint_bytes'])} per checkpoint, {size_text(cost['log_bytes'])} of log"
    return [
        f"model       {model['name']}: {model['parameters']:,} parameters on {model['device']}",
        f"loss        {model['validation_loss']:.4f} nats per token on the validation set, {kind}",
        f"time        about {duration(cost['seconds'])} for {cost['steps']} steps "
        f"({cost['seconds_per_step']:.3g} s each, by {cost['timed_steps']} timed ones)",
        *([] if memory is None else [f"memory      {size_text(memory)} at the peak so far"]),
        f"disk        about {size_text(cost['disk_bytes'])} ({of_disk})",
    ]


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3.2 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def size_text(bytes: float) -> str:
    return f"{bytes / 1e9:.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.1f} MB"
