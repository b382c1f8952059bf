"""Which selectors find the needle? One window of real text among 15 that repeat one token.

    python experiments/needle.py                # all selectors, three seeds, about ten minutes on 2 cores
    python experiments/needle.py --seeds 1 --steps 50 --only soft-q bandit
    python experiments/needle.py --needle-text "It was the best of times, it was the worst of times."

The held-out sets are copies of the needle, so whoever finds it has found the only thing that earns
reward. Prints the needle's mean mixture weight over the last fifth of the steps (uniform: 1/16 = 0.063),
its mean rank among the 16, the advantage of its Q, and the final loss on the needle.

The windows, the held-out sets and the measurements are this file's own; `curriq.run` takes them as
`method=…`, `corpus=…` and `probes=…`.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import curriq
from curriq.config import RunConfig, require
from curriq.data import Corpus, open_corpus
from curriq.data.split import HeldOutSets
from curriq.data.stream import window_id
from curriq.data.tokenizer import ordinary_ids
from curriq.runlog.read import read_metrics
from curriq.select.base import Context, Method
from curriq.state import Saved
from curriq.train.build import build_method
from curriq.types import Cost, Metrics, Offer, Step, Windows

SOURCES = ("needle", "haystack")
METRICS = ("own/needle_weight", "own/needle_rank", "own/needle_q_advantage")


class NeedleProposer(Saved):
    """Puts the needle at a random position among constant windows of random ordinary tokens.

    Args:
        corpus: what `needle_corpus` returns; the needle is its first reward window.
        n: N, windows per step.
        generator: draws the position and the tokens.
    """

    SAVED = ("_generator",)

    def __init__(self, corpus: Corpus, n: int, generator: torch.Generator) -> None:
        self.needle = corpus.held_out.reward.tokens[0]
        self.n = n
        self._straw = torch.from_numpy(ordinary_ids(corpus.tokenizer))
        self._generator = generator

    def propose(self, step: int) -> Offer:
        drawn = torch.randint(len(self._straw), (self.n,), generator=self._generator)
        position = int(torch.randint(self.n, (), generator=self._generator))
        tokens = self._straw[drawn].unsqueeze(1).repeat(1, len(self.needle))
        tokens[position] = self.needle
        source = torch.ones(self.n, dtype=torch.int64)
        source[position] = 0
        ids = [window_id(SOURCES[s], row.numpy()) for s, row in zip(source.tolist(), tokens, strict=True)]
        windows = Windows(tokens=tokens, ids=torch.tensor(ids), source=source)
        return Offer.of(windows, cost=Cost(windows_read=self.n))


class NeedleProbe:
    """What the method makes of the needle among the haystack."""

    def measure(self, step: Step) -> Metrics:
        """Weight, rank by weight (1 is best, ties share the middle), and Q advantage over the haystack.

        A window that the selector did not admit has weight 0.
        """
        weights = torch.zeros(len(step.offer))
        weights[step.trained.rows] = step.weights.float().cpu()
        is_needle = step.offer.windows.source == 0
        needle, others = weights[is_needle].max(), weights[~is_needle]
        ties = (others == needle).sum().item()
        metrics = {
            "own/needle_weight": needle.item(),
            "own/needle_rank": 1 + (others > needle).sum().item() + ties / 2,
        }
        trained = step.trained.windows.source == 0
        if step.q is not None and trained.any() and not trained.all():
            q = step.q.cpu()
            metrics["own/needle_q_advantage"] = (q[trained].max() - q[~trained].mean()).item()
        return metrics


def needle_corpus(config: RunConfig, text: str = "", **options: Any) -> Corpus:
    """The corpus of `config` with copies of the needle as held-out sets.

    Args:
        config: the run.
        text: the needle, cut to a window or repeated until it fills one; the first reward window when empty.
        options: those of `open_corpus`.

    Raises:
        CurriqError: what `open_corpus` refuses; or the text has no token.
    """
    corpus = open_corpus(config, **options)
    needle = corpus.held_out.reward.take(slice(1))
    if text:
        tokens = torch.tensor(corpus.tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)
        require(len(tokens) > 0, f"--needle-text {text!r} has no token: give some words.")
        window = tokens.repeat(-(-config.data.window // len(tokens)))[: config.data.window]
        needle = replace(needle, tokens=window[None])
    sets = {name: Windows.cat([needle] * len(windows)) for name, windows in vars(corpus.held_out).items()}
    return replace(corpus, held_out=HeldOutSets(**sets), source_names=SOURCES)


def needle_method(config: RunConfig, context: Context) -> Method:
    """The method that `config` names, on the needle and the haystack in place of the stream."""
    proposer = NeedleProposer(context.corpus, config.train.num_candidates, context.generators("needle"))
    return replace(build_method(config, context), proposer=proposer)


PARTS: dict[str, Any] = {"method": needle_method, "corpus": needle_corpus, "probes": (NeedleProbe(),)}
"""For `curriq.run(config, **PARTS)`, and `curriq.resume(folder, own=Own(**PARTS))`."""


def parts(text: str) -> dict[str, Any]:
    """`PARTS` with a needle of this text."""
    return PARTS | {"corpus": partial(needle_corpus, text=text)}


def recipe() -> RunConfig:
    """A small model, one needle among 15 windows of straw, 200 steps."""
    return RunConfig().override(
        window=64,
        num_candidates=16,
        reward_windows=1,
        reward_set_size=1,
        validation_set_size=1,
        test_set_size=1,
        steps=200,
        lm_lr=1e-3,
        lr_schedule="constant",
        lr_warmup_steps=0,
        eval_every=20,
    )


ARMS = {
    "uniform": {"selector": "uniform"},
    "random-single": {"selector": "random-single"},
    "high-loss": {"selector": "high-loss"},
    "low-loss": {"selector": "low-loss"},
    "uncertainty": {"selector": "uncertainty"},
    "competence (rarity)": {"selector": "competence", "difficulty": "rarity"},
    "bandit": {"selector": "bandit", "bandit_lr": 0.2},
    "rho (reference trained on the needle)": {"selector": "rho"},
    "soft-q, as published": {"selector": "soft-q"},
    "soft-q, beta 0.01": {"selector": "soft-q", "beta": 0.01},
    "soft-q, beta 0.01, Q replay": {
        "selector": "soft-q",
        "beta": 0.01,
        "q_replay_size": 256,
        "q_replay_updates": 4,
    },
    "soft-q, single action": {"selector": "soft-q", "train_on": "action"},
    "soft-q, single action, beta 0.01": {"selector": "soft-q", "train_on": "action", "beta": 0.01},
    "soft-q, single action, paired reward, beta 0.01": {
        **{"selector": "soft-q", "train_on": "action", "reward": "paired", "beta": 0.01}
    },
    "soft-q, mixture credit, beta 1": {"selector": "soft-q", "credit": "mixture"},
    "soft-q, mixture credit, beta 0.01": {"selector": "soft-q", "credit": "mixture", "beta": 0.01},
}


def measure(
    arm: dict, seed: int, steps: int, folder: Path, reference: Path, own: dict[str, Any]
) -> dict[str, float]:
    """One run with these own parts; its needle metrics averaged over the last fifth of the steps."""
    settings = {**arm, "seed": seed, "steps": steps, "run_dir": str(folder), "progress": "none", "threads": 1}
    if arm["selector"] == "rho":
        settings["reference_model"] = str(reference)
    config = recipe().override(**settings, tensorboard=False, checkpoint_every=steps)
    result = curriq.run(config, **own)
    rows = read_metrics(folder)[-max(1, steps // 5) :]
    averages = {
        name: statistics.mean(row[name] for row in rows if name in row)
        for name in METRICS
        if any(name in row for row in rows)
    }
    return {**averages, "loss": result.summary["test_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--needle-text", default="", help="text of the needle; held-out prose when empty")
    options = parser.parse_args()
    own = parts(options.needle_text)
    print(f"{'arm':48} {'weight':>7} {'rank':>6} {'Q advantage':>12} {'loss on the needle':>19}")
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder, "reference")
        base = recipe().override(
            selector="uniform", num_candidates=1, steps=100, run_dir=str(reference), progress="none"
        )
        model = curriq.run(base, **own).model_dir
        for name in options.only:
            runs = [
                measure(ARMS[name], seed, options.steps, Path(folder, f"{name}-{seed}"), model, own)
                for seed in range(options.seeds)
            ]
            cells = []
            for key, form in zip((*METRICS, "loss"), ("7.3f", "6.1f", "+12.4f", "19.3f"), strict=True):
                values = [run[key] for run in runs if key in run]
                width = int(form.strip("+f").split(".")[0])
                cells.append(f"{statistics.mean(values):{form}}" if values else "–".rjust(width))
            print(f"{name:48} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
