"""Where words and pairs of words say nothing, what is measured does: Q finds the source that teaches."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import curriq
from curriq.config import SourceConfig
from curriq.presets import preset
from curriq.runlog.read import read_metrics

TABLE = np.random.default_rng(0).permutation(6)
SMALL: dict[str, Any] = {
    "target": "target",
    "lm_lr": 1e-2,
    "window": 16,
    "num_candidates": 16,
    "reward_set_size": 32,
    "validation_set_size": 16,
    "test_set_size": 32,
    "shuffle_buffer": 64,
    "device": "cpu",
    "threads": 1,
    "tensorboard": False,
    "progress": "none",
}


def text(documents: int, seed: int, *, right: bool) -> str:
    """Paragraphs of pairs of letters: each small one has a great one, two tokens on; or those of others."""
    draw, made = np.random.default_rng(seed), []
    for _ in range(documents):
        small = draw.integers(0, len(TABLE), 40)
        great = TABLE[small] if right else draw.permutation(TABLE[small])
        pairs = zip(small, great, strict=True)
        made.append(" ".join(f"{chr(ord('a') + s)} is {chr(ord('A') + g)} ." for s, g in pairs))
    return "\n\n".join(made)


def sources(folder: Path, **weights: float) -> tuple[SourceConfig, ...]:
    return tuple(SourceConfig(name=n, path=str(folder / f"{n}.txt"), weight=w) for n, w in weights.items())


@pytest.mark.long
def test_what_is_measured_tells_right_from_wrong_where_the_prior_cannot(tmp_path: Path):
    """The model knows the right pairs already, as a pretrained one would; wrong ones take that from it."""
    for name, documents, seed in (("target", 240, 1), ("right", 300, 2), ("wrong", 300, 3)):
        (tmp_path / f"{name}.txt").write_text(text(documents, seed, right=name != "wrong"))
    before = curriq.run(
        preset("small").override(
            **SMALL,
            sources=sources(tmp_path, target=0, right=1),
            selector="uniform",
            model="random:gpt2:hidden_size=64,num_hidden_layers=1,num_attention_heads=2",
            vocab_size=320,
            steps=300,
            eval_every=300,
            checkpoint_every=300,
            run_dir=str(tmp_path / "before"),
        )
    )
    after = curriq.run(
        preset("recommended").override(
            **SMALL,
            sources=sources(tmp_path, target=0, right=1, wrong=1),
            model=str(before.model_dir),
            tokenizer="auto",
            probe_windows=16,
            reward_every=2,
            steps=200,
            eval_every=200,
            checkpoint_every=200,
            run_dir=str(tmp_path / "after"),
        )
    )
    right = [row["select/weight_share/right"] for row in read_metrics(after.run_dir)]
    assert abs(statistics.mean(right[:10]) - 0.5) < 0.15  # all that the prior knows
    assert statistics.mean(right[-50:]) > 0.7
