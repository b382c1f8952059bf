"""The end of a run, as a person reads it on a terminal."""

import math
from pathlib import Path
from typing import Any


def print_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Test loss and perplexity, what each source's share of the weight was, and where everything lies."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print()
    if summary["finished"]:
        loss, perplexity = summary["test_loss"], summary["test_perplexity"]
        console.print(
            f"[bold]test loss {loss:.4f} nats per token, perplexity {perplexity:.2f}[/bold] "
            f"after {summary['steps']} steps"
        )
    else:
        console.print(f"[bold]stopped after {summary['steps']} steps[/bold]")
    console.print(
        f"{summary['windows_read']} windows read, {summary['windows_proposed']} seen, "
        f"{summary['windows_trained']} trained on ({summary['effective_windows']:.0f} effective), "
        f"{summary['tokens']:,} tokens, {summary['flops']:.3g} FLOPs, {summary['seconds']:.0f} s"
    )
    table = Table(title="what the model learned from", title_justify="left")
    for heading in ("source", "share offered", "share of weight", "ratio"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    offered = summary["offered_share"]
    for name, weight in summary["weight_share"].items():
        ratio = f"{weight / offered[name]:.3f}" if offered[name] else "–"
        table.add_row(name, f"{offered[name]:.1%}", f"{weight:.1%}", ratio)
    console.print(table)
    console.print(verdict(summary))
    console.print(f"log         {run_dir / 'metrics.jsonl'}")
    if summary["checkpoint"] is not None:
        console.print(f"checkpoint  {run_dir / summary['checkpoint']}")
        console.print(
            f"model       {run_dir / summary['checkpoint'] / 'lm'}  (AutoModelForCausalLM opens it)"
        )
    if not summary["finished"]:
        console.print(f"go on with  curriq resume {run_dir}")


def verdict(summary: dict[str, Any]) -> str:
    """One sentence on whether the run selected at all.

    The measure is the Kullback-Leibler divergence of the weight over sources from what was offered.
    """
    moved = divergence(summary["weight_share"], summary["offered_share"])
    if summary["selector"] == "uniform":
        return "The uniform baseline weighs every window alike."
    if summary["selector"] == "replay":
        return "A replay: the run that was exported has chosen."
    if moved < 1e-3:
        return (
            f"The weights stayed uniform over sources (divergence {moved:.1e} nats): among the windows it "
            f"was offered, {summary['selector']} chose nothing."
        )
    return f"The weight moved {moved:.3f} nats away from what was offered."


def divergence(weight: dict[str, float], offered: dict[str, float]) -> float:
    """Kullback-Leibler divergence of the weight over sources from what was offered, in nats."""
    pairs = [(weight[name], offered[name]) for name in offered if weight[name] > 0 and offered[name] > 0]
    return sum(w * math.log(w / o) for w, o in pairs)
