"""`curriq eval`: downstream tasks and perplexity by source, of a run's checkpoint or any model folder."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curriq import terminal
from curriq.config import IN_MEMORY, Within
from curriq.errors import CurriqError
from curriq.parser import Parser
from curriq.report.chart import Table, fixed
from curriq.report.figures import print_table
from curriq.runlog.read import read_document
from curriq.runlog.schema import perplexity
from curriq.runlog.storage import write_atomically
from curriq.train.export import model_folder as model_of_run
from curriq.train.export import with_weights

if TYPE_CHECKING:
    from curriq.types import Score

TASKS = ("hellaswag", "mmlu", "lambada_openai", "wikitext")


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = Parser(
        prog="curriq eval",
        description="Score a model on downstream tasks with EleutherAI's lm-evaluation-harness.",
        epilog="docs/tasks.md shows task files for local data. Numbers equal those of the command lm_eval.",
    )
    add = parser.add_argument
    add("MODEL", type=Path, help="folder of a run, of one of its checkpoints, or of any Hugging Face model")
    add("--tasks", nargs="*", default=list(TASKS), help=f"tasks or groups (default: {' '.join(TASKS)})")
    add("--limit", type=int, default=0, help="first examples of each task; 0 for all (default)")
    add("--fewshot", type=int, default=-1, help="worked examples; -1 takes the task's own number")
    add("--path", default="", help="folder of your own task files (YAML), for local data")
    windows = "also the perplexity of each source, on the next N windows of the run's stream (default: 0)"
    add("--source-windows", type=int, default=0, metavar="N", help=windows)
    add("--batch-size", type=int, default=8, help="sequences per forward pass (default: 8)")
    add("--device", default="auto", help="torch device (default: a GPU when there is one)")
    add("--out", type=Path, help="JSON of the scores (default: in the run's folder eval/)")
    options = parser.parse_args(list(arguments))
    least = {"limit": 0, "source_windows": 0, "fewshot": -1, "batch_size": 1}
    for name, minimum in least.items():
        Within(f"[{minimum}, 1e6]", above=IN_MEMORY).check(name, getattr(options, name))
    return evaluate(options)


def evaluate(options: argparse.Namespace) -> int:
    """The exit status after scoring, printing and saving; CurriqError when there is no model, a task cannot
    be scored, or sources are requested without a run."""
    folder, run = model_folder(options.MODEL)
    if options.source_windows and run is None:
        raise CurriqError(
            f"--source-windows {options.source_windows}: {options.MODEL} belongs to no run, so it has no "
            "stream. Give the folder of a run, or leave the option out."
        )
    limit = options.limit or None
    result: dict[str, Any] = {"model": str(folder), "limit": limit, "tasks": []}
    if options.tasks:
        from curriq.lm.harness import score_folder

        scores = score_folder(
            folder,
            options.tasks,
            limit=limit,
            fewshot=None if options.fewshot < 0 else options.fewshot,
            path=options.path,
            batch_size=options.batch_size,
            device=options.device,
        )
        for score in scores:
            value = score.value if math.isfinite(score.value) else None  # JSON has no infinity
            result["tasks"].append(asdict(score) | {"value": value, "limit": limit})
        _print_scores(scores)
    kept = None if run is None else run / "eval" / f"{folder.parent.name}.json"
    out = options.out or kept
    if out == kept and out is not None and out.exists():
        result = _added(read_document(out, "remove it, and score again"), result)
    if options.tasks:
        _save(result, out)  # before anything else can fail
    if options.source_windows and run is not None:
        result["sources"] = source_losses(run, folder.parent.name, options.source_windows)
        _print_sources(result["sources"])
    _save(result, out)
    if out is not None:
        print(f"scores   {out}")
    return 0


def _added(before: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What earlier calls have kept of a checkpoint, with the scores of this one added, or in their places."""
    earlier = ({"limit": before.get("limit")} | score for score in before.get("tasks", ()))
    latest = {(score["task"], score["measure"]): score for score in (*earlier, *result["tasks"])}
    return before | result | {"tasks": list(latest.values())}


def _save(result: dict[str, Any], out: Path | None) -> None:
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise CurriqError(f"--out {out} cannot be written: {error.strerror}.") from None


def model_folder(path: Path) -> tuple[Path, Path | None]:
    """The Hugging Face folder at a path, and the run that it belongs to, if any; CurriqError without one."""
    lm = (path if _is_model(path) else path / "lm").absolute()
    if _is_model(lm):
        of_run = lm.name == "lm" and lm.parent.parent.name == "checkpoints"
        return (with_weights(lm), lm.parents[2]) if of_run else (lm, None)
    if (path / "config.toml").exists():
        return model_of_run(path), path
    raise CurriqError(
        f"{path} holds no model: give the folder of a run, of a checkpoint, or of a Hugging Face model (with "
        "config.json) or of its adapters (with adapter_config.json)."
    )


def _is_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))


def source_losses(run: Path, checkpoint: str, windows: int) -> dict[str, Any]:
    """Mean loss of each source on the next windows of the run's stream, under the model of a checkpoint. In
    the first epoch the model was trained on none of them; `epoch` says whether that still holds."""
    from curriq.lm.held_out import held_out_loss
    from curriq.train.run import load_run

    opened = load_run(run, at=checkpoint)
    offer = opened.corpus.stream.read(windows)
    losses = {}
    for number, name in enumerate(opened.corpus.source_names):
        own = offer.windows.take((offer.windows.source == number).nonzero().squeeze(1))
        if len(own):
            losses[name] = {"windows": len(own), "loss": held_out_loss(opened.lm, own)}
    return {"epoch": float(offer.epoch or 0), "losses": losses}


def _print_scores(scores: "list[Score]") -> None:
    rows = []
    for score in scores:
        numbers = (fixed(number, ".4f") for number in (score.value, score.stderr, score.chance_level))
        rows.append([score.task, score.measure, *numbers, f"{score.examples:,}"])
    header = ["task", "measure", "score", "± standard error", "chance", "examples"]
    print_table(terminal.console(soft_wrap=True), Table("Scores", header, rows))


def _print_sources(result: dict[str, Any]) -> None:
    print(f"by source, on the stream's next windows (epoch {result['epoch']:.0f}):")
    for name, found in result["losses"].items():
        cost = f"{found['loss']:.4f} nats per token, perplexity {perplexity(found['loss']):.2f}"
        print(f"  {name}: {cost}, {found['windows']} windows")
