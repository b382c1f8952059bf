"""How much is there to win by choosing, block by block, what K steps of training show to be the best policy?

    export CURRIQ_DEV_DATA=FOLDER CURRIQ_MADE_DATA=build/streams
    python experiments/headroom.py --streams web domain copies      # minutes per stream and seed on one core

A run at the size of preset `small` is cut into blocks of K steps. At the beginning of each, the next windows
of the stream are read, as many as every policy may read, and each policy draws its own K batches of 32 from
them. θ and its optimizer are forked, and each policy trains its K batches. The best on the reward set's text
is the one that the block is really trained by: an oracle with a horizon of K steps, whose trials cost
nothing. Beside it each policy alone, from first to last. A learner of such a choice can be no better than its
oracle, up to what greed over K steps loses.

Printed for each: test loss less that of uniform, and windows to uniform's final loss over uniform's own.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from tempfile import TemporaryDirectory

import torch
from branches import (
    BATCH,
    STREAMS,
    Counts,
    Fork,
    balanced,
    embedding,
    interval,
    log_ratio,
    losses,
    read_ahead,
    train_on,
)
from repetitions import Repetitions
from torch import Tensor

from curriq.config import load_toml
from curriq.data.stream import Unreadable
from curriq.lm.held_out import held_out_loss
from curriq.lm.learner import Learner
from curriq.presets import own_settings, preset
from curriq.select.static import documents_of
from curriq.train.build import Run
from curriq.train.run import prepare
from curriq.types import Offer

READ = 8
"""Windows read for each that is trained on."""

Draw = Callable[["Block", int], Tensor]


class Block:
    """What the policies know of the windows of one block."""

    def __init__(self, run: Run, pool: Offer, trained: Counts, seen: Repetitions, seed: int) -> None:
        self.run, self.pool, self.trained, self.seen = run, pool, trained, seen
        self.generator = torch.Generator().manual_seed(seed)
        self.score = pool.known["static_score"].double()
        self.prior = pool.known["prior"].double()

    def best(self, share: float) -> Tensor:
        """Rows of the best share by the static score, in random order."""
        rows = self.score.topk(math.ceil(share * len(self.pool))).indices
        return rows[torch.randperm(len(rows), generator=self.generator)]

    def accepted(self) -> Tensor:
        """Rows in the order in which the prior accepts them."""
        drawn = torch.rand(len(self.prior), dtype=torch.float64, generator=self.generator)
        keys = self.prior.log() - drawn.log()
        rows = keys.argsort(descending=True)
        first = rows[keys[rows] >= 0]
        return torch.cat([first[torch.randperm(len(first), generator=self.generator)], rows[len(first) :]])


def top_share(share: float) -> Draw:
    return lambda block, n: block.best(share)[:n]


def half_by(key: Callable[[Block, Tensor], Tensor]) -> Draw:
    """Of the best quarter the half with the greatest key."""

    def draw(block: Block, n: int) -> Tensor:
        rows = block.best(0.25)
        kept = rows[key(block, rows).topk(max(n, len(rows) // 2)).indices]
        return kept[torch.randperm(len(kept), generator=block.generator)][:n]

    return draw


def breadth(block: Block, n: int) -> Tensor:
    rows = block.best(0.25)
    return rows[balanced(documents_of(block.pool.windows)[rows], block.generator)][:n]


def unrepeated(block: Block, n: int) -> Tensor:
    rows = block.best(0.25)
    return rows[block.seen.count(block.pool.windows.take(rows)).argsort(stable=True)][:n]


def _loss(block: Block, rows: Tensor) -> Tensor:
    return losses(block.run, block.pool.windows.take(rows))


def _target_ngrams(block: Block, rows: Tensor) -> Tensor:
    wanted = Counts.empty()
    wanted.add(block.run.corpus.held_out.reference)
    return log_ratio(block.pool.windows.take(rows), wanted, block.trained)


def _near(block: Block, rows: Tensor) -> Tensor:
    centre = embedding(block.run, block.run.corpus.held_out.reward).mean(0)
    return embedding(block.run, block.pool.windows.take(rows)) @ centre


POLICIES: dict[str, Draw] = {
    "uniform": lambda block, n: torch.randperm(len(block.pool), generator=block.generator)[:n],
    "best half": top_share(1 / 2),
    "best quarter": top_share(1 / 4),
    "best eighth": top_share(1 / 8),
    "prior of recommended": lambda block, n: block.accepted()[:n],
    "quarter, each document once": breadth,
    "quarter, unrepeated first": unrepeated,
    "quarter, low loss": half_by(lambda block, rows: -_loss(block, rows)),
    "quarter, high loss": half_by(_loss),
    "quarter, target's n-grams not yet trained on": half_by(_target_ngrams),
    "quarter, embedding near the target": half_by(_near),
}


def train(
    run: Run, policies: Sequence[str], steps: int, horizon: int, seed: int
) -> tuple[list[tuple[int, float]], float, Counter[str]]:
    """Validation losses by windows trained, the test loss, and how often each policy was the best."""
    learner, stream = run.session.components.learner, run.session.components.proposer.stream  # ty: ignore
    assert isinstance(learner, Learner)
    assert isinstance(stream, Unreadable)
    held_out = run.corpus.held_out
    trained, seen = Counts.empty(), Repetitions(run.config.data.window)
    curve = [(0, held_out_loss(run.lm, held_out.validation))]
    chosen: Counter[str] = Counter()
    for k in range(0, steps, horizon):
        pool = read_ahead(stream, READ * BATCH * horizon)
        stream.read(len(pool))
        block = Block(run, pool, trained, seen, seed + k)
        drawn = {name: pool.windows.take(POLICIES[name](block, BATCH * horizon)) for name in policies}
        best = policies[0]
        if len(policies) > 1:
            fork, found = Fork(learner), {}
            for name, windows in drawn.items():
                train_on(learner, windows, k)
                found[name] = held_out_loss(run.lm, held_out.reference.take(slice(768)))
                fork.restore()
            best = min(found, key=found.__getitem__)
        train_on(learner, drawn[best], k)
        trained.add(drawn[best])
        seen.add(drawn[best])
        chosen[best] += 1
        curve.append((BATCH * (k + horizon), held_out_loss(run.lm, held_out.validation)))
    return curve, held_out_loss(run.lm, held_out.test), chosen


def reached(curve: Sequence[tuple[int, float]], target: float) -> float:
    """Windows at which the curve crosses the target, interpolated; infinite where it does not."""
    for (w0, loss0), (w1, loss1) in pairwise(curve):
        if loss1 <= target:
            return w0 + (w1 - w0) * (loss0 - target) / max(loss0 - loss1, 1e-12)
    return math.inf


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", nargs="+", default=["dirty", "web", "domain", "wiki", "copies"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--horizon", type=int, default=20, help="K, steps of a block")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    arms = {name: [name] for name in POLICIES} | {"oracle of all": list(POLICIES)}
    for stream in options.streams:
        change: dict[str, list[float]] = {name: [] for name in arms}
        windows: dict[str, list[float]] = {name: [] for name in arms}
        taken: Counter[str] = Counter()
        for seed in options.seeds:
            own = {"seed": seed, "split_seed": seed, "threads": 1, "steps": options.steps}
            base, target = (0.0, 0.0, 1.0), math.nan
            for name, policies in arms.items():
                with TemporaryDirectory() as folder:
                    config = load_toml(STREAMS / f"{stream}.toml", preset("small"))
                    config = config.override(**own_settings("recommended"), **own, run_dir=folder)
                    run = prepare(config)
                    curve, test, chosen = train(run, policies, options.steps, options.horizon, seed)
                if name == "uniform":
                    target = curve[-1][1]
                    base = (test, target, reached(curve, target))
                taken.update(chosen if len(policies) > 1 else ())
                change[name].append(test - base[0])
                windows[name].append(reached(curve, target) / base[2])
                print(f"{stream} {seed} {name}: {change[name][-1]:+.4f} {windows[name][-1]:.3f}", flush=True)
        print(f"\n{stream}: seeds {options.seeds}, K = {options.horizon}, {options.steps} steps")
        print(f"{'policy':45} {'change of test loss':28} windows  chosen by the oracle")
        for name in arms:
            mean = math.exp(sum(map(math.log, windows[name])) / len(windows[name]))
            print(f"{name:45} {interval(change[name]):28} {mean:.3f}    {taken.get(name, '')}", flush=True)


if __name__ == "__main__":
    main()
