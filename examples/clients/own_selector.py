"""A selector and a stream filter of one's own: in `curriq train`'s loop, and the filter in any other loop.

python examples/clients/own_selector.py
python examples/clients/own_selector.py --steps 30 --folder runs/own
python examples/clients/own_selector.py --steps 60 --folder runs/own --resume
"""

import tempfile
from pathlib import Path
from typing import Any

import plain_loop
import torch
import toy

import curriq
from curriq.data.stream import Unreadable
from curriq.select.base import Method, NoCritic, PlainSelector
from curriq.select.static import DsirScore, ScoredStream
from curriq.select.stream_filter import filtered
from curriq.train.run import Own


class Easy(PlainSelector):
    """Weighs a window by how easy the model finds it."""

    def score(self, step, offer, features):
        return -features.loss / 2


class TargetLike:
    """Accepts a window with a probability that grows with its similarity to the target."""

    def accept_prob(self, offer):
        return torch.sigmoid(4 * offer.known["static_score"] - 2)


def build(config, context):
    """What `curriq train` is to learn from."""
    target = context.corpus.held_out.reference
    stream = ScoredStream(context.corpus.stream, DsirScore(target), None, target)
    accept = TargetLike().accept_prob
    windows = filtered(Unreadable(stream), config, accept, context.generators)
    return Method(proposer=windows, selector=Easy(), critic=NoCritic())


def run(
    steps: int, *, seed: int = 0, uniform: bool = False, folder: Path | None = None, resume: bool = False
) -> Any:
    """A run of `curriq train` on a stream that is mostly noise, with both of the above or with neither."""
    own = {} if uniform else {"method": build}
    if resume:
        return curriq.resume(folder, own=Own(**own), steps=steps)
    config = curriq.preset("smoke").override(
        sources=(
            curriq.SourceConfig(name="prose", path="embedded:prose", weight=0.2),
            curriq.SourceConfig(name="noise", path="embedded:prose", weight=0.8, corruption="random-tokens"),
        ),
        run_dir=str(folder or tempfile.mkdtemp()),
        steps=steps,
        num_candidates=toy.BATCH,
        max_read_ratio=8,
        selector="uniform",
        test_set_size=64,
        lr_schedule="constant",
        eval_every=1000,
        threads=1,
        progress="none",
        seed=seed,
    )
    return curriq.run(config, **own)


def main() -> None:
    args = toy.arguments(steps=60)
    for uniform in (True,) if args.uniform else (False, True):
        name = "without" if uniform else "with both"
        saved = {} if uniform else {"folder": args.folder, "resume": args.resume}
        result = run(args.steps, seed=args.seed, uniform=uniform, **saved)
        toy.report(f"{name}, curriq train", args.steps, result.summary["test_loss"])
        policy = None if uniform else TargetLike()
        model = plain_loop.train(args.steps, seed=args.seed, uniform=uniform, policy=policy)
        toy.report(f"{name}, plain loop", args.steps, toy.held_out_loss(model))


if __name__ == "__main__":
    main()
