"""Does the search find strings of high Q, and do they retrieve windows that are worth more?

    python experiments/langevin.py                           # a few minutes on 2 cores
    python experiments/langevin.py --set credit=mixture      # another critic; any setting of a run may follow
    python experiments/langevin.py --encoder sentence-transformers/all-MiniLM-L6-v2

First θ and φ are trained on the stream (preset `langevin-rag` with `--proposer stream`). Then every arm
proposes for some steps with both held fixed, each from the same stream, the same first strings and the same
buffer. Printed per arm, with 95 % bootstrap intervals over the steps:

  changed     share of the query tokens that the search changed
  above       hard Q above that of random strings, in standard deviations over random strings
  wins        share of steps in which the mean hard Q is above that of 64 random strings
  distinct    distinct tokens of a query over L
  Q gain      Q of the retrieved windows minus that of random windows of the same buffer, paired by step,
              in standard deviations of Q over windows
  effect      held-out loss after one optimiser step on random windows of the buffer minus that after one
              step on the retrieved ones, from the same θ; nats per token, positive where retrieval helps
  s/step      seconds of the search
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import curriq
from curriq.config import RunConfig
from curriq.lm.reward import held_out_loss
from curriq.propose.assemble import buffer_proposer
from curriq.propose.finders import uniform_slots
from curriq.rng import Generators
from curriq.train.build import Run, differentiable_q
from curriq.train.run import load_run
from curriq.types import Candidates

PUBLISHED: dict[str, Any] = {
    "langevin_steps": 40,
    "langevin_step_size": 0.01,
    "langevin_noise_scale": 1.0,
    "langevin_margin": 10.0,
    "langevin_gradient": "clip",
}
ARMS: dict[str, dict[str, Any]] = {
    "langevin, recommended": {"proposer": "langevin"},
    "langevin, published": {"proposer": "langevin", **PUBLISHED},
    "langevin, published, ε 10": {"proposer": "langevin", **PUBLISHED, "langevin_step_size": 10.0},
    "langevin, scaled per position": {"proposer": "langevin", "langevin_gradient": "position"},
    "langevin, fluency": {"proposer": "langevin", "fluency": 0.01},
    "langevin, from the buffer": {"proposer": "langevin", "query_start": "buffer"},
    "embedding-langevin, published": {"proposer": "embedding-langevin", **PUBLISHED},
    "swaps": {"proposer": "swaps"},
    "best of 40 random": {"proposer": "best-of-random"},
    "random queries": {"proposer": "random-queries"},
    "langevin, hidden state": {"proposer": "langevin", "encoder": "hidden-state"},
    "swaps, hidden state": {"proposer": "swaps", "encoder": "hidden-state"},
    "random queries, hidden state": {"proposer": "random-queries", "encoder": "hidden-state"},
    "direct Q of 256 windows": {"proposer": "direct-q"},
    "uniform from the buffer": {"proposer": "uniform-buffer"},
}


def trained(folder: Path, steps: int, settings: dict[str, Any]) -> Run:
    """θ and φ after a run on the stream, opened at its last checkpoint."""
    config = curriq.preset("langevin-rag").override(
        proposer="stream",
        model="random:gpt2:hidden_size=64,num_hidden_layers=2,num_attention_heads=2",
        window=64,
        steps=steps,
        checkpoint_every=steps,
        run_dir=str(folder),
        tensorboard=False,
        **settings,
    )
    curriq.run(config)
    return load_run(folder)


def measure(run: Run, config: RunConfig, steps: int, start: dict) -> dict[str, np.ndarray]:
    """One arm: what its steps measured, one number per step."""
    run.corpus.stream.load_state_dict(start)
    generators = Generators(config.train.seed)
    q, parameters = differentiable_q(run.session.components.critic)
    assert q is not None
    proposer = buffer_proposer(config, run.corpus, run.lm, generators, q, parameters)
    before = held_out_loss(run.lm, run.corpus.held_out.reward, micro_batch=8, chunk_tokens=512)
    rows: dict[str, list[float]] = {"before": [before]}
    for step in range(steps):
        candidates = proposer.propose(step)
        others = proposer.buffer.take(
            uniform_slots(proposer.buffer, len(candidates), generators("experiment/others"))
        )
        found = candidates.metrics
        for name in ("langevin/tokens_changed", "langevin/above_random_sd", "langevin/distinct_tokens"):
            rows.setdefault(name, []).append(found.get(name, np.nan))
        rows.setdefault("seconds", []).append(found.get("time/search", 0.0))
        rows.setdefault("q", []).append(found["retrieval/q_advantage"])
        effect = loss_after(run, others) - loss_after(run, candidates)
        rows.setdefault("effect", []).append(effect)
    return {name: np.array(values) for name, values in rows.items()}


def loss_after(run: Run, windows: Candidates) -> float:
    """Held-out loss after one uniform step on the windows at half of the schedule; θ is put back."""
    learner = run.session.components.learner
    learner.snapshot()
    learner.accumulate(windows, lambda part, features: torch.zeros_like(features.loss), False)
    learner.update(run.config.train.steps // 2)
    loss = held_out_loss(run.lm, run.corpus.held_out.reward, micro_batch=8, chunk_tokens=512)
    learner.restore()
    learner.release()
    return loss


def mean(values: np.ndarray, form: str) -> str:
    return "–" if np.isnan(values).any() else f"{values.mean():{form}}"


def interval(values: np.ndarray, form: str) -> str:
    """Mean and its 95 % bootstrap interval."""
    if np.isnan(values).any():
        return "–"
    if np.ptp(values) == 0:
        return f"{values[0]:{form}}"
    found = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return f"{values.mean():{form}} [{low:{form}}, {high:{form}}]"


def parse(text: str) -> Any:
    """A setting's value: a number where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=40, help="steps that each arm proposes for")
    parser.add_argument("--encoder", default="hashing")
    parser.add_argument("--folder", type=Path, help="keep the trained run here, and use it when it is there")
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the run")
    options = parser.parse_args()
    settings = {name: parse(value) for name, value in (item.split("=", 1) for item in options.set)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary, "run")
        if (folder / "summary.json").exists():
            run = load_run(folder)
        else:
            run = trained(folder, options.train_steps, settings)
        report(run, options, lambda arm: run.config.override(**arms_settings(arm, options.encoder)))


def arms_settings(arm: str, encoder: str) -> dict[str, Any]:
    return {
        "chains": 16,
        "encoder": encoder,
        "retrieval_probe": 32,
        "encode_ahead": False,
        **ARMS[arm],
    }


def report(run: Run, options: argparse.Namespace, configure: Callable[[str], RunConfig]) -> None:
    start = run.corpus.stream.state_dict()
    spread = q_spread(run)
    run.corpus.stream.load_state_dict(start)
    print(f"sd of Q over windows {spread:.4g} nats per token; {options.steps} steps per arm")
    print(
        f"{'arm':32} {'changed':>7} {'above (sd)':>21} {'wins':>5} {'distinct':>8} {'Q gain (sd)':>21} "
        f"{'effect (1e-4 nats)':>23} {'s/step':>7}"
    )
    for arm in options.only:
        rows = measure(run, configure(arm), options.steps, start)
        above = rows["langevin/above_random_sd"]
        print(
            f"{arm:32} "
            f"{mean(rows['langevin/tokens_changed'], '.0%'):>7} "
            f"{interval(above, '+.2f'):>21} "
            f"{mean(np.where(np.isnan(above), np.nan, above > 0), '.0%'):>5} "
            f"{mean(rows['langevin/distinct_tokens'], '.2f'):>8} "
            f"{interval(rows['q'] / spread, '+.2f'):>21} "
            f"{interval(1e4 * rows['effect'], '+.1f'):>23} "
            f"{rows['seconds'].mean():7.2f}",
            flush=True,
        )


def q_spread(run: Run) -> float:
    """Standard deviation of Q over 256 windows of the stream."""
    q, _ = differentiable_q(run.session.components.critic)
    assert q is not None
    windows = run.corpus.stream.next_batch(256)
    with run.lm.measuring():
        hidden = torch.cat([run.lm.trunk(part) for part in windows.tokens.split(16)])
    from curriq.propose.energy import features_of

    return q(features_of(hidden)).std().item()


if __name__ == "__main__":
    main()
