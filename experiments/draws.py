"""How much can any search win? The best of many draws of windows from one buffer, over a horizon of 20 steps.

    export CURRIQ_DEV_DATA=FOLDER
    python experiments/draws.py --streams dirty web wiki       # half an hour on one core
    python experiments/draws.py --streams web --seeds 7 --draws 8

A run of `recommended` at the size of preset `small` is stopped at several steps, and a buffer is read: all
windows, and those of them that the prior accepts. From a copy of θ and its optimizer every *draw*, a random
set of K windows per step for 20 steps, is trained on; its gain is how much it lowers the loss. Gains are
measured twice, on the reward set's text, by which a search could choose, and on the validation and test
sets, by which it is judged. Printed in 1e-3 nats per token, means over seeds and points with an interval
(Student's t):

  all             gain of a draw from all windows of the buffer, mean
  accepted        gain of a draw from those that the prior accepts, less that
  spread          standard deviation of the gains of such draws
  best, chosen    the draw that the reward set says is best of all, less their mean, as judged
  best, hindsight the same with the draw that is judged best: nobody can choose it
  rho             Spearman's ρ of a draw's gain on the reward set with the judged one
  near            those nearest to the reward windows by the mean hidden state, less the mean draw

`best, chosen` bounds what a search can win that tries as many draws as this one, each for 20 steps and for
free.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from tempfile import TemporaryDirectory

import numpy as np
import torch
from branches import BATCH, STREAMS, WITH_TARGET, Fork, hidden, interval, read_ahead, train_on
from scipy import stats
from torch import Tensor

from curriq.config import load_toml
from curriq.data.stream import Unreadable
from curriq.lm.held_out import held_out_loss
from curriq.lm.learner import Learner
from curriq.presets import own_settings, preset
from curriq.train.build import Run
from curriq.train.loop import train_step
from curriq.train.run import prepare
from curriq.types import Offer, Windows

READ = 8192
"""Windows of the buffer."""
JUDGED = 512
"""Windows of the reward set's text on which gains are measured."""


def gains(run: Run, fork: Fork, learner: Learner, windows: Windows, step: int) -> tuple[float, float]:
    """By how much training on these windows lowers the loss: of the reward set's text, and of the validation
    and test sets, nats per token. θ is as before."""
    held_out = run.corpus.held_out
    judged = (held_out.reference.take(slice(JUDGED)), Windows.cat([held_out.validation, held_out.test]))
    before = [held_out_loss(run.lm, text) for text in judged]
    train_on(learner, windows, step)
    after = [held_out_loss(run.lm, text) for text in judged]
    fork.restore()
    return before[0] - after[0], before[1] - after[1]


def accepted(pool: Offer, generator: torch.Generator) -> Tensor:
    """Rows that the prior accepts, by one draw each."""
    drawn = torch.rand(len(pool), dtype=torch.float64, generator=generator)
    return (drawn < pool.known["prior"].double()).nonzero().flatten()


def measure(run: Run, step: int, draws: int, horizon: int, seed: int) -> Iterator[tuple[str, float]]:
    """What is printed, by name, of one point of a run."""
    learner, stream = run.session.components.learner, run.session.components.proposer.stream  # ty: ignore
    assert isinstance(learner, Learner)
    assert isinstance(stream, Unreadable)
    generator = torch.Generator().manual_seed(seed * 1000 + step)
    pool, fork = read_ahead(stream, READ), Fork(learner)
    count = BATCH * horizon
    own = accepted(pool, generator)

    def branch(rows: Tensor) -> tuple[float, float]:
        return gains(run, fork, learner, pool.windows.take(rows), step)

    def random(rows: Tensor) -> np.ndarray:
        sets = [rows[torch.randperm(len(rows), generator=generator)[:count]] for _ in range(draws)]
        return 1e3 * np.array([branch(chosen) for chosen in sets])

    everything, filtered = random(torch.arange(len(pool))), random(own)
    yield "all", everything[:, 1].mean()
    yield "accepted", filtered[:, 1].mean() - everything[:, 1].mean()
    for name, found in (("all", everything), ("accepted", filtered)):
        chosen, judged = found.T
        yield f"{name}: spread", judged.std(ddof=1)
        yield f"{name}: best, chosen", judged[chosen.argmax()] - judged.mean()
        yield f"{name}: best, hindsight", judged.max() - judged.mean()
        yield f"{name}: rho", float(stats.spearmanr(chosen, judged).statistic)
    target = hidden(run, run.corpus.held_out.reward)
    near = (hidden(run, pool.windows.take(own)) @ target.T).amax(1)
    best = own[near.topk(min(count, len(own))).indices]
    best = best[torch.randperm(len(best), generator=generator)]
    yield "accepted: near", 1e3 * branch(best)[1] - filtered[:, 1].mean()
    yield "accepted: windows", float(len(own))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", nargs="+", default=["dirty", "web", "wiki"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8])
    parser.add_argument("--points", type=int, nargs="+", default=[20, 100, 300], help="steps of the run")
    parser.add_argument("--draws", type=int, default=24, help="random draws from each buffer")
    parser.add_argument("--horizon", type=int, default=20, help="steps that a draw is trained on")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for stream in options.streams:
        found: dict[str, list[float]] = defaultdict(list)
        for seed in options.seeds:
            with TemporaryDirectory() as folder:
                config = load_toml(STREAMS / f"{stream}.toml", preset("small")).override(
                    **own_settings("recommended") | WITH_TARGET,
                    seed=seed,
                    split_seed=seed,
                    threads=1,
                    run_dir=folder,
                )
                run = prepare(config)
                for point in options.points:
                    while run.session.state.step < point:
                        train_step(run.session.components, run.session.state)
                    for name, value in measure(run, point, options.draws, options.horizon, seed):
                        found[name].append(value)
                    print(f"{stream} {seed} {point}: {found['accepted'][-1]:+.1f}", flush=True)
        print(f"\n{stream}: {options.draws} draws of {options.horizon} steps, seeds {options.seeds}")
        for name, values in found.items():
            print(f"{name:26} {interval(values)}", flush=True)
        assert all(math.isfinite(value) for values in found.values() for value in values)


if __name__ == "__main__":
    main()
