"""How noisy are the two rewards? The absolute one of the paper and the paired one, on the same steps.

    python experiments/reward_variance.py            # a minute on 2 cores

Both arms have one seed and a uniform mixture, so θ goes the same way to the bit, and the held-out windows of
a step are the same. The noise of a reward is its distance from the mean of its two neighbours in time, which
takes out what changes slowly; the variance of that is divided by 3/2, as independent noise would leave it.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import curriq
from curriq.presets import preset
from curriq.runlog.read import read_metrics


def noise(rewards: np.ndarray) -> float:
    """Standard deviation of what is not smooth in time, nats per token."""
    around = rewards[1:-1] - (rewards[:-2] + rewards[2:]) / 2
    return float(np.sqrt(around.var() / 1.5))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 32], help="M, windows of a reward")
    options = parser.parse_args()
    print("   M  absolute    paired  ratio of variances   (standard deviations in nats per token)")
    for windows in options.windows:
        measured: dict[str, list[float]] = {"absolute": [], "paired": []}
        for seed in options.seeds:
            for kind, found in measured.items():
                with TemporaryDirectory() as folder:
                    config = preset("small").override(
                        selector="soft-q",
                        q_weighting=False,
                        reward=kind,
                        reward_windows=windows,
                        steps=options.steps,
                        seed=seed,
                        run_dir=str(Path(folder) / "run"),
                        progress="none",
                    )
                    rows = read_metrics(curriq.run(config).run_dir)
                rewards = np.array([row["reward"] for row in rows])
                found.append(noise(rewards[len(rewards) // 4 :]))
        absolute, paired = (np.sqrt(np.mean(np.square(found))) for found in measured.values())
        print(f"{windows:4d}  {absolute:.2e}  {paired:.2e}  {(absolute / paired) ** 2:18.0f}")


if __name__ == "__main__":
    main()
