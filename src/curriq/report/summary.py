"""What ran, and how it ended: for a terminal at the end of a run, and as the last section of the page."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from curriq import terminal
from curriq.errors import CurriqError
from curriq.report.chart import Block, Code, Section, Table, fixed
from curriq.report.figures import print_table
from curriq.runlog.checkpoints import again_command, lacks_weights, resume_command
from curriq.runlog.read import read_document

if TYPE_CHECKING:
    from rich.console import Console

    from curriq.report.runlog import RunLog  # which takes a moment to import, at the end of a run

Shares = list[tuple[str, float, float]]
"""Name, share offered (of what was read from the stream) and share of the weight of each source or topic."""
LEAST_MOVED = 1e-3
"""Divergence from uniform, in nats, below which a policy has selected nothing."""


def print_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Test loss and perplexity, what the policy chose and from when on, and where everything lies.

    Of a run that was interrupted no verdict: how to resume it.
    """
    from rich.text import Text

    console = terminal.console(soft_wrap=True)
    if not summary["finished"]:
        steps = _flat(read_document(run_dir / "config.toml")).get("steps", "?")
        end = f"interrupted at step {summary['steps']} of {steps}"
        console.print(Text.assemble("\n", (end, "bold"), f": resume with `{resume_command(run_dir)}`"))
        console.print("Too early for a verdict.")
        _print_places(console, run_dir, summary)
        return
    loss, perplexity = summary["test_loss"], summary["test_perplexity"]
    end = f"test loss {loss:.4f} nats per token, perplexity {perplexity:.2f}"
    console.print(Text.assemble("\n", (end, "bold"), f" after {summary['steps']} steps"))
    console.print(
        f"{summary['windows_read']} windows read, {summary['windows_proposed']} proposed, "
        f"{summary['windows_trained']} trained on ({summary['effective_windows']:.0f} effective), "
        f"{summary['tokens']:,} tokens, {summary['flops']:.3g} FLOPs, {summary['seconds']:.0f} s"
    )
    if {"initial_validation_loss", "validation_loss"} <= summary.keys():
        before, after = summary["initial_validation_loss"], summary["validation_loss"]
        console.print(f"validation loss {before:.4f} before training → {after:.4f} after\n")
    shares = [(name, summary["offered_share"][name], w) for name, w in summary["weight_share"].items()]
    print_table(console, share_table("What the model learned from", "source", shares))
    _print_choice(console, run_dir, summary, shares)
    _print_places(console, run_dir, summary)


def _print_choice(console: "Console", run_dir: Path, summary: dict[str, Any], shares: Shares) -> None:
    """What the policy did, from which step on, and what it kept. A damaged log is reported and ends nothing,
    because the run is saved."""
    from curriq.report.risen import of_run
    from curriq.report.runlog import Detail, load_run_log
    from curriq.report.steering import steering_of, what_was_kept

    try:
        run = load_run_log(run_dir, run_dir.name, Detail(steps=0))
    except CurriqError as error:
        for sentence in verdict(summary, shares):
            console.print(sentence)
        console.print(f"From when on it selected, and what it kept, is not known: {error}", markup=False)
        return
    for sentence in of_run(run.columns):
        console.print(sentence)
    steered = steering_of(run)
    # The gate's evidence and that of the summary are of nearly the same probes: one of them is enough.
    for sentence in [*verdict(summary, shares, prediction=not steered), *steered]:
        console.print(sentence)
    if kept := what_was_kept(run):
        console.print()
        print_table(console, kept)


def _print_places(console: "Console", run_dir: Path, summary: dict[str, Any]) -> None:
    console.print(f"log         {run_dir / 'metrics.jsonl'}")
    if summary["checkpoint"] is not None:
        folder = run_dir / summary["checkpoint"]
        console.print(f"checkpoint  {folder}")
        how = "AutoModelForCausalLM opens it"
        if lacks_weights(folder / "lm"):
            how = f"`curriq export {run_dir} --model` writes its weights there"
        console.print(f"model       {folder / 'lm'}  ({how})")


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run file by name, without its sections."""
    return {name: value for section in sections.values() for name, value in section.items()}


def share_table(
    title: str,
    group: str,
    shares: Shares,
    more: Mapping[str, list[str]] = MappingProxyType({}),
    *,
    against: str = "offered",
    note: str = "",
) -> Table:
    """Shares of each group and their ratio, with more columns by heading; `against` names the denominator."""
    rows = [
        [name, f"{offered:.1%}", f"{weight:.1%}", f"{weight / offered:.3f}" if offered else "–", *cells]
        for (name, offered, weight), *cells in zip(shares, *more.values(), strict=True)
    ]
    return Table(title, [group, against, "weight", "ratio", *more], rows, note)


def verdict(summary: dict[str, Any], shares: Shares, *, prediction: bool = True) -> list[str]:
    """Sentences on what the policy did to windows and to sources and, with `prediction`, on whether Q
    predicted effects.

    A policy that concentrates on windows of one source, or evenly over all sources, has selected too; so it
    is judged by its divergence from uniform over windows first.
    """
    selector, kl = summary["selector"], summary.get("kl_from_uniform", 0.0)
    predicted = _prediction(summary) if prediction else []
    if none := no_choice(selector, shares, kl, filtered=_filtered(summary)):
        return [none, *predicted]
    sentences = []
    if kl >= LEAST_MOVED:
        sentences.append(
            f"Over windows the policy is {kl:.3f} nats from uniform (KL, mean over the steps), as if it "
            f"spread evenly over {math.exp(-kl):.0%} of them."
        )
    if len(shares) > 1:
        sentences.append(
            f"Over sources the weight moved {divergence(shares):.3f} nats from what was read from the stream."
        )
    if _filtered(summary):
        accepted = summary["windows_proposed"] / summary["windows_read"]
        sentences.append(f"Of the windows read, {accepted:.0%} were trained on; the choice was made before.")
    return [*sentences, *predicted]


def _filtered(summary: dict[str, Any]) -> bool:
    return summary["windows_read"] > summary["windows_proposed"]


def _prediction(summary: dict[str, Any]) -> list[str]:
    """Whether Q ranked windows by their measured effects; nothing for a method without Q."""
    if "effect_correlation" not in summary and (probes := summary.get("probes")):
        of = "one probe" if probes == 1 else f"{probes} probes"
        return [f"In {of} of measured effects Q was the same for all windows: it has ranked none."]
    if "effect_correlation" not in summary:
        how = "Whether Q predicts the effect of a window was not measured (--measure-effects measures it)."
        return [how] if summary["selector"] == "soft-q" else []
    rank, error = summary["effect_correlation"], summary["effect_correlation_error"]
    scale, scale_error = summary["recovered_scale"], summary["recovered_scale_error"]
    judged = "ranked" if rank > 2 * error else "did not rank"
    return [
        f"Q {judged} windows by their measured effects: rank correlation {rank:+.2f} ± {error:.2f}, "
        f"{scale:.2f} ± {scale_error:.2f} of their scale (last probes)."
    ]


def no_choice(selector: str, shares: Shares, kl: float, *, filtered: bool) -> str:
    """A sentence on a run that selected nothing; empty for one that did.

    `kl` is the policy's mean divergence from uniform over windows, in nats; `filtered` says that more windows
    were read than proposed, so that there was a choice before the policy.
    """
    moved = divergence(shares)
    if selector == "uniform":
        return "The uniform baseline weighs every window alike."
    if selector == "replay":
        return f"A replay: the exported run made the choice, {moved:.3f} nats away from what it was offered."
    if moved < LEAST_MOVED and kl < LEAST_MOVED and not filtered:
        return (
            f"The policy stayed uniform over windows (KL {kl:.1e} nats, mean over the steps) and over "
            f"sources ({moved:.1e} nats): {selector} selected nothing among the windows it was offered."
        )
    return ""


def divergence(shares: Shares) -> float:
    """Kullback-Leibler divergence of the weight from what was offered, in nats."""
    return sum(w * math.log(w / o) for _, o, w in shares if w > 0 and o > 0)


def what_ran(run: "RunLog") -> Section:
    """Section 6 of the report: settings, versions, seed, data, machine, cost, and how to run it again."""
    environment, settings = run.environment, run.folder / "config.toml"
    facts = _facts(run)
    again = again_command(run.folder)
    blocks: list[Block] = [Code("To run it again", again), _table("Facts", "what", facts)]
    if command := environment.get("command"):
        blocks.append(Code("Started as", shlex.join(map(str, command))))
    if settings.exists():
        text = settings.read_text(encoding="utf-8")
        blocks.append(Code("All settings (config.toml)", text, folded=True))
    if fingerprint := environment.get("fingerprint"):
        blocks.append(_table("Fingerprint of the data", "part", fingerprint))
    answer = (
        f"{run.selector}, seed {facts['seed']}, {facts['state']}. Two runs with one seed, one thread count "
        "and one machine are equal to the bit."
    )
    return Section("ran", "What ran?", answer, blocks)


def _facts(run: "RunLog") -> dict[str, object]:
    summary, environment = run.summary, run.environment
    done = "finished" if summary.get("finished") else "stopped" if summary else "still running"
    counts = ("windows read", "windows proposed", "windows trained", "tokens", "FLOPs", "seconds")
    spent = {name: run.columns.last("x/" + name.lower().replace(" ", "_")) for name in counts}
    return {
        "folder": run.folder,
        "state": f"{done}, {run.columns.rows} of {run.setting('steps', '?')} steps",
        "method": run.selector,
        "model": run.setting("model", "?"),
        "seed": run.setting("seed", "?"),
        "data fingerprint": summary.get("data_fingerprint", "in environment.json"),
        **{name: fixed(value, ".4g" if name == "FLOPs" else ",.0f") for name, value in spent.items()},
        "curriq": summary.get("curriq", environment.get("curriq", "?")),
        **{name: environment.get(name, "?") for name in ("machine", "hardware")},
        "device": f"{environment.get('device', '?')}, {environment.get('threads', '?')} threads",
        "python": environment.get("python", "?"),
        **environment.get("versions", {}),
    }


def _table(title: str, first: str, values: dict[str, object]) -> Table:
    return Table(title, [first, "value"], [[name, str(value)] for name, value in values.items()])
