"""Which selectors find the needle? One window of real text among 15 that repeat one token.

    python experiments/needle.py                # all selectors, three seeds, about ten minutes on 2 cores
    python experiments/needle.py --seeds 1 --steps 50 --only soft-q bandit

The held-out sets are copies of the needle, so whoever finds it has found the only thing that earns
reward. Prints the needle's mean mixture weight over the last fifth of the steps (uniform: 1/16 = 0.063),
its mean rank among the 16, the advantage of its Q, and the final loss on the needle.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import curriq
from curriq.runlog.read import read_metrics

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
    "soft-q, mixture credit, beta 1": {"selector": "soft-q", "credit": "mixture"},
    "soft-q, mixture credit, beta 0.01": {"selector": "soft-q", "credit": "mixture", "beta": 0.01},
}


def measure(arm: dict, seed: int, steps: int, folder: Path, reference: Path) -> dict[str, float]:
    """One run; its needle metrics averaged over the last fifth of the steps."""
    settings = {**arm, "seed": seed, "steps": steps, "run_dir": str(folder), "progress": "none", "threads": 1}
    if arm["selector"] == "rho":
        settings["reference_model"] = str(reference)
    config = curriq.preset("needle").override(**settings, tensorboard=False, checkpoint_every=steps)
    result = curriq.run(config)
    rows = read_metrics(folder)[-max(1, steps // 5) :]
    averages = {
        name: statistics.mean(row[name] for row in rows if name in row)
        for name in ("needle/weight", "needle/rank", "needle/q_advantage")
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
    options = parser.parse_args()
    print(f"{'arm':40} {'weight':>7} {'rank':>6} {'Q advantage':>12} {'loss on the needle':>19}")
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder, "reference")
        base = curriq.preset("needle").override(
            selector="uniform", num_candidates=1, steps=100, run_dir=str(reference), progress="none"
        )
        model = curriq.run(base).model_dir
        for name in options.only:
            runs = [
                measure(ARMS[name], seed, options.steps, Path(folder, f"{name}-{seed}"), model)
                for seed in range(options.seeds)
            ]
            cells = []
            for key, form in (
                ("needle/weight", "7.3f"),
                ("needle/rank", "6.1f"),
                ("needle/q_advantage", "+12.4f"),
                ("loss", "19.3f"),
            ):
                values = [run[key] for run in runs if key in run]
                width = int(form.strip("+f").split(".")[0])
                cells.append(f"{statistics.mean(values):{form}}" if values else "–".rjust(width))
            print(f"{name:40} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
