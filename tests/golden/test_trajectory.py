"""A short run against its stored trajectory, so that a refactor cannot change a number unseen.

The stored numbers are those of one machine. Another CPU rounds differently: with other vector instructions
losses moved by 7e-8 of their value and Q, which is near zero, by 1e-7 nats; hence the tolerance. After a
change that is meant to change them, write them again, look at the difference, and say why in the commit:

    PYTHONPATH=src:. python tests/golden/test_trajectory.py
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tests.runs import Finished, tiny

from curriq.config import SourceConfig
from curriq.train.run import train

GOLDEN = Path(__file__).with_name("trajectory.json")
METRICS = (
    "train/loss",
    "train/mean_loss",
    "train/grad_norm",
    "train/lr",
    "reward",
    "validation/loss",
    "critic/q_mean",
    "critic/soft_value",
    "critic/td_target",
    "critic/q_pred",
    "policy/effective_batch_size",
    "x/flops",
)
RUNS: dict[str, dict[str, Any]] = {
    "soft-q": {},
    "td-into-theta": {"td_into_theta": True, "td_lambda": 0.5},
    "high-loss": {"selector": "high-loss"},
}
TOLERANCE = {"rel": 1e-6, "abs": 1e-6}


def sentences(words: str, count: int, seed: int) -> str:
    """Paragraphs of pseudo-random words; a linear congruential generator, the same on every Python."""
    vocabulary, state, paragraphs = words.split(), seed, []
    for _ in range(count):
        chosen = []
        for _ in range(30):
            state = (1103515245 * state + 12345) % 2**31
            chosen.append(vocabulary[(state >> 16) % len(vocabulary)])
        paragraphs.append(" ".join(chosen) + ".")
    return "\n\n".join(paragraphs)


def trajectory(folder: Path, **overrides: Any) -> dict[str, Any]:
    """The numbers of one run on two local text files."""
    plain, code = folder / "plain.txt", folder / "code.txt"
    plain.write_text(sentences("the cat sat on a mat and dog ran to it while bird sang", 300, 1))
    code.write_text(sentences("def class return if else for while in not None True import x y", 200, 2))
    sources = (
        SourceConfig(name="plain", path=str(plain), weight=0.5),
        SourceConfig(name="code", path=str(code), weight=0.5),
    )
    run_dir = folder / "run"
    train(tiny(sources=sources, target="plain", steps=5, beta=0.1, run_dir=str(run_dir), **overrides))
    run = Finished(run_dir)
    return {
        "rows": [{name: row[name] for name in METRICS if name in row} for row in run.rows],
        "window_id": run.candidates["window_id"],
        "weight": run.candidates["weight"],
        "q": [q for q in run.candidates["q"] if q is not None],
        "test_loss": run.summary["test_loss"],
    }


@pytest.mark.parametrize("name", RUNS)
def test_trajectory_is_the_stored_one(name, tmp_path):
    stored = json.loads(GOLDEN.read_text())[name]
    ours = trajectory(tmp_path, **RUNS[name])
    assert ours["window_id"] == stored["window_id"]
    assert len(ours["rows"]) == len(stored["rows"])
    for step, (row, expected) in enumerate(zip(ours["rows"], stored["rows"], strict=True)):
        assert row == pytest.approx(expected, **TOLERANCE), f"step {step}"
    assert ours["weight"] == pytest.approx(stored["weight"], **TOLERANCE)
    assert ours["q"] == pytest.approx(stored["q"], **TOLERANCE)
    assert ours["test_loss"] == pytest.approx(stored["test_loss"], **TOLERANCE)


def write() -> None:
    """Store the trajectories of this machine."""
    made = {}
    for name, overrides in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            made[name] = trajectory(Path(folder), **overrides)
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    write()
