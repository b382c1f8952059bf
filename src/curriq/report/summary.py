"""The end of a run, as a person reads it on a terminal."""

import math
from pathlib import Path
from typing import Any

from curriq.report.chart import Table
from curriq.report.figures import print_table

LEAST_MOVED = 1e-3
"""Divergence in nats below which a run has selected nothing."""


def print_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Test loss and perplexity, what each source's share of the weight was, and where everything lies."""
    from rich.console import Console

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
        f"{summary['windows_read']} windows read, {summary['windows_proposed']} proposed, "
        f"{summary['windows_trained']} trained on ({summary['effective_windows']:.0f} effective), "
        f"{summary['tokens']:,} tokens, {summary['flops']:.3g} FLOPs, {summary['seconds']:.0f} s\n"
    )
    offered, weight = summary["offered_share"], summary["weight_share"]
    shares = [offered[name] for name in weight], list(weight.values())
    print_table(console, share_table("What the model learned from", "source", list(weight), *shares, {}))
    console.print(verdict(summary["selector"], weight, offered))
    console.print(f"log         {run_dir / 'metrics.jsonl'}")
    if summary["checkpoint"] is not None:
        console.print(f"checkpoint  {run_dir / summary['checkpoint']}")
        console.print(
            f"model       {run_dir / summary['checkpoint'] / 'lm'}  (AutoModelForCausalLM opens it)"
        )
    if not summary["finished"]:
        console.print(f"go on with  curriq resume {run_dir}")


def share_table(
    title: str,
    group: str,
    names: list[str],
    offered: list[float],
    weight: list[float],
    more: dict[str, list[str]],
) -> Table:
    """Shares of each group and their ratio, with more columns by heading."""
    rows = [
        [name, f"{share:.1%}", f"{chosen:.1%}", f"{chosen / share:.3f}" if share else "–", *cells]
        for name, share, chosen, *cells in zip(names, offered, weight, *more.values(), strict=True)
    ]
    return Table(title, [group, "offered", "weight", "ratio", *more], rows)


def verdict(selector: str, weight: dict[str, float], offered: dict[str, float]) -> str:
    """One sentence on whether a run selected at all, from the shares of its sources."""
    moved = divergence(weight, offered)
    if selector == "uniform":
        return "The uniform baseline weighs every window alike."
    if selector == "replay":
        return f"A replay: the exported run made the choice, {moved:.3f} nats away from what was offered."
    if moved < LEAST_MOVED:
        return (
            f"The weights stayed uniform over sources (divergence {moved:.1e} nats): {selector} selected "
            "nothing among the windows it was offered."
        )
    return f"The weight moved {moved:.3f} nats away from what was offered."


def divergence(weight: dict[str, float], offered: dict[str, float]) -> float:
    """Kullback-Leibler divergence of the weight over sources from what was offered, in nats."""
    pairs = [(weight[name], offered[name]) for name in offered if weight[name] > 0 and offered[name] > 0]
    return sum(w * math.log(w / o) for w, o in pairs)
