"""What predicts, for windows that a static filter accepts, what training on them brings K steps later?

    export CURRIQ_DEV_DATA=FOLDER
    python experiments/branches.py                       # hours on one core
    python experiments/branches.py --streams web --seeds 7

A run of `recommended` at the size of preset `small` is stopped at several steps. There the next windows of
the stream are read ahead, and the best quarter by the static score is kept, which is what `dsir` at a share
of a quarter would accept. Each predictor sorts it, and it is cut into four groups. From a copy of θ and its
optimizer a *branch* trains K steps of 32 windows on one group alone; its gain is how much it lowers the loss
of the validation and test sets, on which no predictor is measured. Random groups give the scale. Other draws
look at the whole set. Printed in 1e-3 nats per token, means over seeds and points with an interval (Student's
t over the points):

  top − random     gain of the best group by the predictor, less the mean gain of the random groups
  top − bottom     gain of the best group, less that of the worst
  rho              Spearman's ρ of the four groups' ranks with their gains

A predictor whose `top − random` is below zero makes the filter worse when it chooses among what the filter
accepts, at this horizon.
"""

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from curriq.config import load_toml
from curriq.data.stream import Unreadable
from curriq.lm.held_out import displaced, displacement, held_out_loss
from curriq.lm.learner import Learner
from curriq.presets import own_settings, preset
from curriq.select.static import NO_NGRAM, _log_ratio, hashed_ngrams
from curriq.train.build import Run
from curriq.train.loop import train_step
from curriq.train.run import prepare
from curriq.types import Offer, Windows

WITH_TARGET = {"bellman": True}
"""`recommended` as it was when the numbers of LOG.md were made."""
STREAMS = Path(__file__).parent / "streams"
GROUPS = 4
BATCH = 32
LATER = 32
"""Steps until the second time of the two-time effect."""


@dataclass
class Counts:
    """Hashed n-gram counts of some windows."""

    counts: Tensor

    @staticmethod
    def empty() -> "Counts":
        return Counts(torch.zeros(NO_NGRAM + 1, dtype=torch.float64))

    def add(self, windows: Windows) -> None:
        self.counts += torch.bincount(hashed_ngrams(windows, "cpu").flatten(), minlength=NO_NGRAM + 1)
        self.counts[NO_NGRAM] = 0


def log_ratio(windows: Windows, above: Counts, below: Counts) -> Tensor:
    """Mean of log p_above − log p_below over the n-grams of each window, smoothed as DSIR is."""
    ngrams = hashed_ngrams(windows, "cpu")
    totals = above.counts.sum(), below.counts.sum()
    return _log_ratio(ngrams, above.counts[ngrams], totals[0], below.counts[ngrams], totals[1])


def losses(run: Run, windows: Windows) -> Tensor:
    with torch.no_grad():
        return run.lm.window_losses(windows).double()


class Fork:
    """θ and its optimizer as they are now, to come back to."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._lm = {name: value.clone() for name, value in learner.lm.network.state_dict().items()}
        self._optimizer = copy.deepcopy(learner.optimizer.state_dict())

    def restore(self) -> None:
        self._learner.lm.network.load_state_dict(self._lm)
        self._learner.optimizer.load_state_dict(copy.deepcopy(self._optimizer))


def train_on(learner: Learner, windows: Windows, step: int) -> None:
    """Steps of plain training on the windows, at the learning rate of this step of the run."""
    for start in range(0, len(windows), BATCH):
        batch = Offer.of(windows.take(slice(start, start + BATCH)))
        learner.accumulate(batch, lambda part, features: torch.zeros_like(features.loss), False)
        learner.update(step)


def direction(learner: Learner, windows: Windows) -> list[Tensor]:
    shares = torch.full((len(windows),), 1 / len(windows), dtype=torch.float64)
    _, gradient = learner.held_out_gradient(windows, shares)
    found = learner.precondition(gradient)
    assert found is not None
    return found


def effects(run: Run, windows: Windows, along: list[Tensor]) -> Tensor:
    """First-order effects along a held-out direction, up to a positive factor."""
    parameters = run.lm.parameters
    size = displacement(parameters, along)
    before = losses(run, windows)
    with displaced(parameters, along, -size):
        return (before - losses(run, windows)) / size


def embedding(run: Run, windows: Windows) -> Tensor:
    """Mean token embedding of each window, normalised."""
    table = run.lm.network.get_input_embeddings().weight.detach()
    return torch.nn.functional.normalize(table[windows.tokens].mean(1), dim=1)


def hidden(run: Run, windows: Windows) -> Tensor:
    with torch.no_grad():
        return torch.nn.functional.normalize(run.lm.trunk(windows.tokens).mean(1), dim=1)


def predictors(run: Run, learner: Learner, pool: Offer, trained: Counts, step: int) -> dict[str, Tensor]:
    """What each predictor says of the windows of the pool, higher is better, at θ_k."""
    windows, held_out = pool.windows, run.corpus.held_out
    target, stream, mixed = Counts.empty(), Counts.empty(), Counts.empty()
    target.add(held_out.reference)
    stream.add(windows)
    for part in (trained, stream):
        mixed.counts += part.counts
    centre = {f: f(run, held_out.reward).mean(0) for f in (embedding, hidden)}
    few = direction(learner, held_out.reward.take(slice(8)))
    many = direction(learner, held_out.reference.take(slice(512)))
    own_loss = losses(run, windows)
    found = {
        "static score": pool.known["static_score"].double(),
        "one-step effect, 8 windows": effects(run, windows, few),
        "one-step effect, all of D's text": effects(run, windows, many),
        "high loss": own_loss,
        "low loss": -own_loss,
        "target against trained (n-grams)": log_ratio(windows, target, trained),
        "novel against trained (n-grams)": log_ratio(windows, stream, trained),
        "embedding near the target": embedding(run, windows) @ centre[embedding],
        "hidden state near the target": hidden(run, windows) @ centre[hidden],
    }
    fork = Fork(learner)
    text = held_out.reference
    generator = torch.Generator().manual_seed(step)
    for steps in (4, 16):
        order = torch.randperm(len(text), generator=generator)
        train_on(learner, text.take(order[: BATCH * steps]), step)
        found[f"loss falls after {steps} steps on D's text"] = own_loss - losses(run, windows)
        fork.restore()
    return found


def read_ahead(stream: Unreadable, n: int) -> Offer:
    """The next n windows, which stay the next ones."""
    parts = [stream.read(n)]
    while (missing := n - sum(map(len, parts))) > 0:
        parts.append(stream.read(missing))
    ahead = Offer.cat(parts)
    stream.unread(ahead)
    return ahead


def balanced(group: Tensor, generator: torch.Generator) -> Tensor:
    """Rows in an order in which every group comes once before any comes twice."""
    order = torch.randperm(len(group), generator=generator)
    seen: dict[int, int] = {}
    turn = []
    for name in group[order].tolist():
        seen[name] = seen.get(name, 0) + 1
        turn.append(seen[name])
    return order[torch.tensor(turn).argsort(stable=True)]


def matching(windows: Windows, wanted: Counts, have: Counts, rounds: int) -> Tensor:
    """Rows in batches, each of those whose n-grams are the most wanted beyond what has been trained on and
    drawn so far."""
    have = Counts(have.counts.clone())
    left = torch.arange(len(windows))
    drawn = []
    for _ in range(rounds):
        best = log_ratio(windows.take(left), wanted, have).topk(BATCH).indices
        rows = left[best]
        have.add(windows.take(rows))
        keep = torch.ones(len(left), dtype=torch.bool)
        keep[best] = False
        left = left[keep]
        drawn.append(rows)
    return torch.cat(drawn)


def clusters(run: Run, windows: Windows, target: Windows, k: int = 32) -> tuple[Tensor, Tensor]:
    """Cluster of each window and of each of the target's, by the hidden states of θ_k."""
    from scipy.cluster.vq import kmeans2

    both = torch.cat([hidden(run, windows), hidden(run, target)]).numpy()
    _, labels = kmeans2(both, k, minit="++", seed=0)
    found = torch.from_numpy(labels).long()
    return found[: len(windows)], found[len(windows) :]


def as_target(cluster: Tensor, target: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n rows without replacement, each cluster with the weight that it has among the target's windows."""
    k = int(max(cluster.max(), target.max())) + 1
    ours, theirs = torch.bincount(cluster, minlength=k), torch.bincount(target, minlength=k)
    weight = (theirs / theirs.sum()) / (ours / ours.sum()).clamp(min=1e-9)
    return torch.multinomial(weight[cluster].double() + 1e-9, n, generator=generator)


def set_draws(
    run: Run, pool: Offer, trained: Counts, steps: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draws of K batches that look at the set and not at each window alone."""
    windows, reference = pool.windows, run.corpus.held_out.reference
    target, stream = Counts.empty(), Counts.empty()
    target.add(reference)
    stream.add(windows)
    document = windows.ids if windows.document is None else windows.document
    kind, of_target = clusters(run, windows, reference.take(slice(1024)))
    return {
        "set: every document once first": balanced(document, generator),
        "set: every cluster once first": balanced(kind, generator),
        "set: clusters as in the target": as_target(kind, of_target, steps * BATCH, generator),
        "set: n-grams of the target": matching(windows, target, trained, steps),
        "set: n-grams of the accepted": matching(windows, stream, trained, steps),
    }


def points(
    run: Run, at: Sequence[int], pool_size: int, steps: int, seed: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Predictor → at each point top − random, top − bottom and ρ."""
    session = run.session
    learner, proposer = session.components.learner, session.components.proposer
    assert isinstance(learner, Learner)
    held_out = run.corpus.held_out
    judge = Windows.cat([held_out.validation, held_out.test])
    trained = Counts.empty()
    found: dict[str, list[tuple[float, float, float]]] = {}

    def advance(until: int) -> None:
        while session.state.step < until:
            trained.add(train_step(session.components, session.state).trained.windows)

    for k in at:
        advance(k)
        pool = read_ahead(proposer.stream, pool_size)  # ty: ignore[unresolved-attribute]
        best = pool.known["static_score"].topk(len(pool) // 4).indices
        pool = pool.take(best[torch.randperm(len(best), generator=torch.Generator().manual_seed(seed + k))])
        fork = Fork(learner)
        scores = predictors(run, learner, pool, trained, k)
        here = held_out_loss(run.lm, judge)
        branch_size = min(len(pool) // GROUPS, steps * BATCH)

        def gain(rows: Tensor) -> float:
            train_on(learner, pool.windows.take(rows[:branch_size]), k)  # noqa: B023
            after = held_out_loss(run.lm, judge)
            fork.restore()  # noqa: B023
            return (here - after) * 1e3  # noqa: B023

        generator = torch.Generator().manual_seed(seed)
        random = [gain(torch.randperm(len(pool), generator=generator)) for _ in range(8)]
        for name, rows in set_draws(run, pool, trained, steps, generator).items():
            found.setdefault(name, []).append((gain(rows) - float(np.mean(random)), math.nan, math.nan))
        # The second time: the same windows at θ_k, along the held-out direction of θ_{k + LATER}.
        advance(k + LATER)
        later = direction(learner, held_out.reference.take(slice(512)))
        ahead = Fork(learner)
        fork.restore()
        scores["two-time effect, 32 steps later"] = effects(run, pool.windows, later)
        for name, score in scores.items():
            groups = score.argsort(descending=True).tensor_split(GROUPS)
            mixed = [rows[torch.randperm(len(rows), generator=generator)] for rows in groups]
            gains = [gain(rows) for rows in mixed]
            rho = float(stats.spearmanr([3, 2, 1, 0], gains).statistic)
            found.setdefault(name, []).append((gains[0] - float(np.mean(random)), gains[0] - gains[-1], rho))
        found.setdefault("(random groups: mean gain, sd)", []).append(
            (float(np.mean(random)), float(np.std(random, ddof=1)), math.nan)
        )
        ahead.restore()
    return found


def interval(values: Sequence[float]) -> str:
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+7.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{mean:+7.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", nargs="+", default=["dirty", "web", "domain", "wiki"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--at", type=int, nargs="+", default=[40, 140, 280])
    parser.add_argument("--steps", type=int, default=16, help="K, steps of a branch")
    parser.add_argument("--pool", type=int, default=8192, help="windows read ahead at each point")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the run, NAME=VALUE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for stream in options.streams:
        rows: dict[str, list[tuple[float, float, float]]] = {}
        for seed in options.seeds:
            with TemporaryDirectory() as folder:
                config = load_toml(STREAMS / f"{stream}.toml", preset("small")).override(
                    **own_settings("recommended") | WITH_TARGET
                )
                own = dict(pair.split("=", 1) for pair in options.set)
                config = config.override(seed=seed, split_seed=seed, threads=1, run_dir=folder, **own)
                run = prepare(config)
                for name, values in points(run, options.at, options.pool, options.steps, seed).items():
                    rows.setdefault(name, []).extend(values)
        print(f"\n{stream}: seeds {options.seeds}, points {options.at}, K = {options.steps}", flush=True)
        print(f"{'predictor':36} {'top − random':26} {'top − bottom':26} rho")
        for name, values in rows.items():
            top, spread, rho = zip(*values, strict=True)
            print(f"{name:36} {interval(top):26} {interval(spread):26} {np.mean(rho):+.2f}", flush=True)


if __name__ == "__main__":
    main()
