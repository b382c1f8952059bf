"""`curriq eval`: downstream tasks, and perplexity by source, of a run's checkpoint or of any model folder."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curriq.config import require_at_least
from curriq.errors import CurriqError

if TYPE_CHECKING:
    from curriq.types import Score

TASKS = ("hellaswag", "mmlu", "lambada_openai", "wikitext")


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="curriq eval",
        description="Score a model on downstream tasks with EleutherAI's lm-evaluation-harness.",
        epilog="docs/tasks.md shows task files for local data. Numbers equal those of the command lm_eval.",
    )
    parser.add_argument(
        "MODEL", type=Path, help="folder of a run, of one of its checkpoints, or of any Hugging Face model"
    )
    parser.add_argument(
        "--tasks", nargs="*", default=list(TASKS), help=f"tasks or groups (default: {' '.join(TASKS)})"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="first examples of each task; 0 for all (default)"
    )
    parser.add_argument(
        "--fewshot", type=int, default=-1, help="worked examples; -1 takes the task's own number"
    )
    parser.add_argument("--path", default="", help="folder of your own task files (YAML), for local data")
    parser.add_argument(
        "--source-windows",
        type=int,
        default=0,
        metavar="N",
        help="also the perplexity of each source, on the next N windows of the run's stream (default: 0)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass (default: 8)")
    parser.add_argument("--device", default="auto", help="torch device (default: a GPU when there is one)")
    parser.add_argument("--out", type=Path, help="JSON of the scores (default: in the run's folder eval/)")
    options = parser.parse_args(list(arguments))
    require_at_least(0, limit=options.limit, source_windows=options.source_windows)
    require_at_least(-1, fewshot=options.fewshot)
    require_at_least(1, batch_size=options.batch_size)
    return evaluate(options)


def evaluate(options: argparse.Namespace) -> int:
    """Score, print and keep.

    Raises:
        CurriqError: no model is there, a task cannot be scored, or sources are asked for without a run.
    """
    folder, run = model_folder(options.MODEL)
    if options.source_windows and run is None:
        raise CurriqError(
            f"--source-windows {options.source_windows}: {options.MODEL} is no run's, so it has no stream. "
            "Give the folder of a run, or leave it out."
        )
    result: dict[str, Any] = {"model": str(folder), "limit": options.limit or None, "tasks": []}
    if options.tasks:
        from curriq.lm.harness import score_folder

        scores = score_folder(
            folder,
            options.tasks,
            limit=options.limit or None,
            fewshot=None if options.fewshot < 0 else options.fewshot,
            path=options.path,
            batch_size=options.batch_size,
            device=options.device,
        )
        result["tasks"] = [_finite(asdict(score)) for score in scores]
        _print_scores(scores)
    if options.source_windows and run is not None:
        result["sources"] = source_losses(run, options.source_windows)
        _print_sources(result["sources"])
    out = options.out or (None if run is None else run / "eval" / f"{folder.parent.name}.json")
    if out is not None:
        _keep(out, result)
        print(f"scores   {out}")
    return 0


def model_folder(path: Path) -> tuple[Path, Path | None]:
    """The Hugging Face folder that a path means, and the run that it belongs to, if any.

    Raises:
        CurriqError: there is no model at the path.
    """
    from curriq.train.checkpoint import latest_checkpoint

    if _is_model(path):
        inside = path.name == "lm" and path.parent.parent.name == "checkpoints"
        return path, path.parents[2] if inside else None
    if _is_model(path / "lm"):
        return path / "lm", path.parents[1] if path.parent.name == "checkpoints" else None
    if (path / "config.toml").exists():
        return latest_checkpoint(path).lm, path
    raise CurriqError(
        f"{path} holds no model: give the folder of a run, of a checkpoint, or of a Hugging Face model (with "
        "config.json) or of its adapters (with adapter_config.json)."
    )


def _is_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))


def source_losses(run: Path, windows: int) -> dict[str, Any]:
    """Mean loss of each source on the windows that the run's stream would have offered next.

    In the first epoch no one of them was trained on; `epoch` says whether that still holds.
    """
    from curriq.lm.held_out import held_out_loss
    from curriq.train.run import load_run

    opened = load_run(run)
    sizes = {
        "micro_batch": opened.config.optim.micro_batch,
        "chunk_tokens": opened.config.optim.head_chunk_tokens,
    }
    batch = opened.corpus.stream.next_batch(windows)
    losses = {}
    for number, name in enumerate(opened.corpus.source_names):
        own = batch.tokens[batch.source == number]
        if len(own):
            losses[name] = {"windows": len(own), "loss": held_out_loss(opened.lm, own, **sizes)}
    return {"epoch": batch.metrics["data/epoch"], "losses": losses}


def _finite(score: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in score.items()}


def _keep(path: Path, result: dict[str, Any]) -> None:
    from curriq.runlog.storage import write_atomically

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise CurriqError(f"--out {path} cannot be written: {error.strerror}.") from None


def _print_scores(scores: "list[Score]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("task", "measure", "score", "± standard error", "chance", "examples"):
        table.add_column(heading, justify="left" if heading in ("task", "measure") else "right")
    for score in scores:
        stderr, chance = (
            "–" if value is None else f"{value:.4f}" for value in (score.stderr, score.chance_level)
        )
        table.add_row(score.task, score.measure, f"{score.value:.4f}", stderr, chance, f"{score.examples:,}")
    Console(highlight=False, soft_wrap=True).print(table)


def _print_sources(result: dict[str, Any]) -> None:
    print(f"by source, on the stream's next windows (epoch {result['epoch']:.0f}):")
    for name, found in result["losses"].items():
        loss = found["loss"]
        perplexity = math.exp(min(loss, 700.0))
        print(f"  {name}: {loss:.4f} nats per token, perplexity {perplexity:.2f}, {found['windows']} windows")
