"""Runs that a report can read, written by the writers of the log but without training."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from curriq.config import to_toml
from curriq.data.tokenizer import encode, serialised, train_tokenizer
from curriq.data.windows import window_id
from curriq.presets import preset
from curriq.train.metrics import CandidateLog, MetricsLog, write_summary
from curriq.train.windows import WindowLog
from curriq.types import Candidates, Effects

SOURCES = ("prose", "code")
TEXTS = (
    "the quiet river ran beside the old village and the people spoke of harvest and rain",
    "def parse(self, value): return int(value) if value else None  # import os, import sys",
)


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    n: int = 8,
    window: int = 24,
    sources: Sequence[str] = SOURCES,
    texts: Sequence[str] = TEXTS,
    shift: int | None = None,
    effect: bool = False,
    tasks: bool = False,
    windows_mb: float = 1.0,
    seed: int = 0,
) -> Path:
    """A run whose windows are pieces of `texts`, one text per source.

    Args:
        shift: step from which nearly all weight lies on the first source; before it, and always when None,
            the weight is noise around uniform.
        effect: add the measured effect, which Q ranks perfectly, to the candidates table.
        tasks: log a downstream task.
    """
    rng = np.random.default_rng(seed)
    tokenizer = train_tokenizer(texts, 300, 100_000)
    streams = [np.array(ids * math.ceil(4 * window / len(ids) + 1)) for ids in encode(tokenizer, list(texts))]
    metrics, candidates = MetricsLog(folder, 0), CandidateLog(folder, sources, 0)
    windows = WindowLog(folder, 0, windows_mb, serialised(tokenizer))
    for step in range(steps):
        source = rng.integers(len(sources), size=n)
        tokens = np.stack(
            [streams[s][(start := rng.integers(window)) : start + window] for s in source]
        ).astype(np.int32)
        ids = [window_id(sources[s], row) for s, row in zip(source, tokens, strict=True)]
        proposed = Candidates(
            tokens=torch.from_numpy(tokens.astype(np.int64)),
            window_ids=torch.tensor(ids),
            source=torch.from_numpy(source),
            rows=torch.arange(n),
        )
        q = torch.from_numpy(rng.normal(size=n).astype(np.float32))
        if shift is not None and step >= shift:
            q += 6 * torch.from_numpy((source == 0).astype(np.float32))
        weights = torch.softmax(0.3 * q if shift is None or step < shift else q, 0)
        loss = torch.full((n,), 6.0 - 3.0 * step / steps)
        ranked = (q - q.mean()) * 1e-3
        effects = Effects(rows=torch.arange(n), effect=ranked, mixture=0.0) if effect else None
        windows.append(step, proposed)
        candidates.append(step, proposed, proposed, loss, q, weights, q, effects)
        metrics.append(
            _row(step, steps, n, window, source, weights.double().numpy(), sources, q, loss, tasks)
        )
    for log in (metrics, candidates, windows):
        log.flush()
    metrics.close()
    config = preset("smoke").override(
        steps=steps, num_candidates=n, window=window, run_dir=str(folder), seed=seed
    )
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    about = {
        "command": ["curriq", "train"],
        "python": "3",
        "versions": {"torch": "2"},
        "fingerprint": {"a": "b"},
    }
    (folder / "environment.json").write_text(json.dumps(about), encoding="utf-8")
    write_summary(folder, {"finished": True, "steps": steps, "test_loss": 3.1, "selector": "soft-q"})
    return folder


def _row(step, steps, n, window, source, weights, sources, q, loss, tasks):
    effective = float(1 / (weights**2).sum())
    row = {
        "step": step,
        "x/windows_seen": n * (step + 1),
        "x/windows_trained": n * (step + 1),
        "x/tokens": n * window * (step + 1),
        "x/flops": 10**9 * (step + 1),
        "x/seconds": 0.1 * (step + 1),
        "train/loss": float((torch.from_numpy(weights) * loss).sum()),
        "train/mean_loss": float(loss.mean()),
        "train/grad_norm": 0.5 + (step % 7) / 4,
        "policy/entropy": float(-(weights * np.log(weights)).sum()),
        "policy/effective_batch_size": effective,
        "policy/effective_batch_fraction": effective / n,
        "critic/q_mean": float(q.mean()),
        "critic/q_std": float(q.std()),
        "critic/q_min": float(q.min()),
        "critic/q_max": float(q.max()),
        "time/step": 0.1,
        "time/propose": 0.01,
    }
    for number, name in enumerate(sources):
        row[f"select/offered_share/{name}"] = float((source == number).mean())
        row[f"select/weight_share/{name}"] = float(weights[source == number].sum())
    if step % 10 == 9 or step == steps - 1:
        row["validation/loss"] = 6.0 - 3.0 * step / steps
        if tasks:
            row |= {
                "task/hellaswag/acc_norm": 0.25 + 0.001 * step,
                "task/hellaswag/acc_norm/stderr": 0.02,
                "task/hellaswag/acc_norm/chance": 0.25,
            }
    return row
