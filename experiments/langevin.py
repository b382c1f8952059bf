"""Does the search find strings of high Q, and do they retrieve windows that are worth more?

    python experiments/langevin.py --folder runs/langevin     # some minutes on 2 cores
    python experiments/langevin.py --set credit=sampled reward_every=1 q_replay_size=0 temperature=fixed
    python experiments/langevin.py --only "langevin, recommended" --set q_hidden=32

For each seed θ and φ are trained on the stream (preset `langevin-rag` with `--proposer stream` and without
its prior) and then held fixed. Every arm proposes for some steps, each from the same stream, the same first
strings and the same buffer, which holds whatever the stream brings, as in the paper.

First printed: how well Q ranks windows, Spearman's ρ of Q and the measured effects of 256 windows that Q has
not learnt from, on validation text, which it has not learnt from either. Then per arm, means over seeds and
steps, with the 95 % t interval *over the seeds' means*:

  changed     share of the query tokens that the search changed
  above       hard Q above that of random strings, in standard deviations over random strings
  over start  hard Q above that of the first strings, in standard deviations of Q over windows
  wins        share of all steps in which the mean hard Q is above that of 64 random strings
  distinct    distinct tokens of a query over L
  Q gain      Q of the retrieved windows minus that of random windows of the same buffer, paired by step,
              in standard deviations of Q over windows
  effect      validation loss after one optimizer step on random windows of the buffer (mean of two draws)
              minus that after one step on the retrieved ones, from the same θ, paired by step; nats per
              token, positive where retrieval helps
  prose       share of the target among the retrieved windows (Q never sees the source)
  s/step      seconds of the search
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import curriq
from curriq import langevin
from curriq.config import RunConfig
from curriq.langevin.energy import features_of
from curriq.langevin.retrieval import uniform_slots
from curriq.lm.held_out import displaced, displacement, held_out_loss
from curriq.lm.mixture import weighted_gradient
from curriq.rng import Generators
from curriq.select.base import Context, Method
from curriq.train.build import Run
from curriq.train.run import load_run
from curriq.types import Offer

PUBLISHED: dict[str, Any] = {
    "langevin_steps": 40,
    "langevin_step_size": 0.01,
    "langevin_noise_scale": 1.0,
    "langevin_margin": 10.0,
    "langevin_gradient": "clip",
    "bridge_temperature_start": 2.0,
    "query_start": "random",
}
CONTROLS = Path(__file__).with_name("control_samplers.py")
HASHING = {"encoder": "hashing", "centre_queries": False, "refresh": 0}
ARMS: dict[str, dict[str, Any]] = {
    "langevin, recommended": {"proposer": "langevin"},
    "langevin, published": {"proposer": "langevin", **PUBLISHED},
    "langevin, from random strings": {"proposer": "langevin", "query_start": "random"},
    "langevin, bridge from τ = 2": {"proposer": "langevin", "bridge_temperature_start": 2.0},
    "langevin, not centred": {"proposer": "langevin", "centre_queries": False},
    "langevin, hashed words": {"proposer": "langevin", **HASHING},
    "embedding-langevin, published": {"proposer": f"{CONTROLS}:embedding_langevin", **PUBLISHED},
    "swaps": {"proposer": f"{CONTROLS}:swaps_of_8"},
    "best of 40 random": {"proposer": "best-of-random", "query_start": "random"},
    "random queries": {"proposer": "random-queries", "query_start": "random"},
    "the buffer's own beginnings": {"proposer": "random-queries"},
    "direct Q of 256 windows": {"proposer": "direct-q"},
    "uniform from the buffer": {"proposer": "uniform-buffer"},
}
WITHOUT_PRIOR: dict[str, Any] = {"prior": False, "max_read_ratio": 1, "buffer_size": 1024, "ingest": 64}
RANDOM_BATCHES = 2
"""Batches of random windows per step whose mean effect the retrieved windows are compared with."""


def trained(folder: Path, seed: int, steps: int, settings: dict[str, Any]) -> Run:
    """θ and φ after a run on the stream, opened at its last checkpoint."""
    if not (folder / "summary.json").exists():
        config = curriq.preset("langevin-rag").override(
            **WITHOUT_PRIOR,
            proposer="stream",
            refresh=0,
            steps=steps,
            checkpoint_every=steps,
            seed=seed,
            run_dir=str(folder),
            tensorboard=False,
            progress="none",
            **settings,
        )
        curriq.run(config)
    return load_run(folder)


Rows = dict[str, list[float]]
"""What one arm's steps on one seed measured, one number per step."""


def measure(run: Run, config: RunConfig, steps: int, start: dict, spread: float) -> Rows:
    """One arm on one seed."""
    run.corpus.stream.load_state_dict(start)
    generators = Generators(config.train.seed)
    draws = generators("experiment/others")
    parts = run.session.components
    method = Method(proposer=parts.proposer, selector=parts.selector, critic=parts.critic)
    context = Context(corpus=run.corpus, lm=run.lm, generators=generators)
    proposer = langevin.build(method, config, context).proposer
    target = run.corpus.source_names.index(config.data.target)
    rows: Rows = {}
    for step in range(steps):
        offer = proposer.propose(step)
        others = [
            proposer.buffer.take(uniform_slots(proposer.buffer, len(offer), draws))
            for _ in range(RANDOM_BATCHES)
        ]
        after_others = np.mean([loss_after(run, Offer.of(windows)) for windows in others])
        found = offer.metrics
        above = found.get("langevin/above_random_sd", np.nan)
        measured = {
            "changed": found.get("langevin/tokens_changed", np.nan),
            "above": above,
            "climbed": found.get("langevin/hard_q_gain", np.nan) / spread,
            "wins": np.nan if np.isnan(above) else float(above > 0),
            "distinct": found.get("langevin/distinct_tokens", np.nan),
            "q": found["retrieval/q_advantage"] / spread,
            "effect": 1e4 * (after_others - loss_after(run, offer)),
            "target": (offer.windows.source == target).double().mean().item(),
            "seconds": found.get("time/search", 0.0),
        }
        for name, value in measured.items():
            rows.setdefault(name, []).append(value)
    return rows


def loss_after(run: Run, offer: Offer) -> float:
    """Validation loss after one uniform step on the windows at half of the schedule; θ is put back."""
    learner = run.session.components.learner
    learner.snapshot()
    learner.accumulate(offer, lambda part, features: torch.zeros_like(features.loss), False)
    learner.update(run.config.train.steps // 2)
    loss = held_out_loss(run.lm, run.corpus.held_out.validation)
    learner.restore()
    learner.release()
    return loss


def calibration(run: Run, count: int = 256) -> tuple[float, float]:
    """Spearman's ρ of Q and the effects of fresh windows on validation text; the sd of Q over them."""
    q = run.session.components.critic.differentiable
    windows = run.corpus.stream.read(count).windows
    learner, lm, validation = run.session.components.learner, run.lm, run.corpus.held_out.validation
    weighted_gradient(lm, validation, torch.full((len(validation),), 1 / len(validation)).double())
    gradient = [p.grad for p in lm.parameters if p.grad is not None]
    direction = learner.precondition(gradient)
    assert direction is not None
    size = displacement(lm.parameters, direction)
    before = lm.window_losses(windows)
    with displaced(lm.parameters, direction, -size):
        effects = before - lm.window_losses(windows)
    with lm.measuring():
        values = torch.cat([q(features_of(lm.trunk(part))) for part in windows.tokens.split(64)])
    rho = stats.spearmanr(values.numpy(), effects.numpy()).statistic
    return float(rho), values.std().item()


def interval(means: np.ndarray, form: str) -> str:
    """Mean over the seeds and its 95 % t interval."""
    if np.isnan(means).any():
        return "–"
    centre = means.mean()
    if len(means) < 2:
        return f"{centre:{form}}"
    half = stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5
    return f"{centre:{form}} [{centre - half:{form}}, {centre + half:{form}}]"


def parse(text: str) -> Any:
    """A setting's value: a number where it is one; a list where there are commas."""
    if "," in text:
        return tuple(parse(part) for part in text.split(",") if part)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def settings_of(items: list[str]) -> dict[str, Any]:
    return {name: parse(value) for name, value in (item.split("=", 1) for item in items)}


def report(results: dict[str, list[Rows]], seeds: int, steps: int) -> None:
    """The table; `results` has one entry per seed and arm."""
    print(f"{seeds} seeds, {steps} steps per arm and seed; intervals over the seeds' means")
    columns = {
        "changed": (lambda name: plain(name, ".0%"), 7, "changed"),
        "above": (lambda name: interval(means[name], "+.1f"), 20, "above (sd)"),
        "climbed": (lambda name: interval(means[name], "+.2f"), 21, "over start (sd)"),
        "wins": (lambda name: plain(name, ".0%"), 5, "wins"),
        "distinct": (lambda name: plain(name, ".2f"), 8, "distinct"),
        "q": (lambda name: interval(means[name], "+.2f"), 21, "Q gain (sd)"),
        "effect": (lambda name: interval(means[name], "+.1f"), 22, "effect (1e-4 nats)"),
        "target": (lambda name: plain(name, ".0%"), 5, "prose"),
        "seconds": (lambda name: plain(name, ".2f"), 6, "s/step"),
    }

    def plain(name: str, form: str) -> str:
        return "–" if np.isnan(means[name]).any() else f"{means[name].mean():{form}}"

    print(f"{'arm':30}" + "".join(f" {title:>{width}}" for _, width, title in columns.values()))
    for arm, by_seed in results.items():
        means = {name: np.array([np.mean(rows[name]) for rows in by_seed]) for name in by_seed[0]}
        cells = (f" {text(name):>{width}}" for name, (text, width, _) in columns.items())
        print(f"{arm:30}" + "".join(cells), flush=True)


def measured(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one seed; what its folder holds already is not measured again."""
    run = trained(folder, seed, options.train_steps, settings_of(options.set))
    file = folder / "arms.json"
    start = run.corpus.stream.state_dict()
    if file.exists():
        found = json.loads(file.read_text())
    else:
        rho, spread = calibration(run)
        found = {"rho": rho, "spread": spread, "arms": {}}
    for arm in options.only:
        if arm not in found["arms"]:
            settings = curriq.preset("langevin-rag").retrieval
            config = run.config.override(
                encode_ahead=False, retrieval_probe=64, refresh=settings.refresh, **settings_of(options.arm)
            ).override(**ARMS[arm])
            found["arms"][arm] = measure(run, config, options.steps, start, found["spread"])
            file.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15, 16])
    parser.add_argument("--train-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=10, help="steps that each arm proposes for")
    parser.add_argument(
        "--folder", type=Path, help="keep the trained runs here, and use those that are there"
    )
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the training")
    parser.add_argument(
        "--arm", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the proposals"
    )
    options = parser.parse_args()
    results: dict[str, list[Rows]] = {arm: [] for arm in options.only}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            folder = (options.folder or Path(temporary)) / f"seed-{seed}"
            found = measured(folder, seed, options)
            print(
                f"seed {seed}: ρ(Q, effect) {found['rho']:+.2f}, sd of Q {found['spread']:.3g} nats per token"
            )
            for arm in options.only:
                results[arm].append(found["arms"][arm])
    report(results, len(options.seeds), options.steps)


if __name__ == "__main__":
    main()
