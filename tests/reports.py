"""Runs that a report can read, written by the writers of the log but without training."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tests.helpers import effects_of
from tests.steps import finished_step

from curriq.config import to_toml
from curriq.data.stream import window_id
from curriq.data.tokenizer import encode, serialised, train_tokenizer
from curriq.presets import preset
from curriq.runlog.writers import RunLogs, write_summary
from curriq.train.record import log_entry
from curriq.types import Offer, Queries, Sampled, Windows

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
    queries: Sequence[str] = (),
    steered: bool = False,
    windows_mb: float = 1.0,
    seed: int = 0,
) -> Path:
    """A run whose windows are pieces of `texts`, one text per source.

    Args:
        shift: step from which nearly all weight lies on the first source; before it, and always when None,
            the weight is noise around uniform.
        effect: add the measured effect, which Q ranks perfectly, to the candidates table.
        tasks: log a downstream task.
        steered: each step reads `n` windows more, all of the last source, and rejects them.
        queries: texts of what a step asks for, in turn; query i of n draws window i, the last one none.
    """
    rng = np.random.default_rng(seed)
    tokenizer = train_tokenizer(texts, 300, 100_000)
    streams = [np.array(ids * math.ceil(4 * window / len(ids) + 1)) for ids in encode(tokenizer, list(texts))]
    logs = RunLogs(
        folder,
        source_names=sources,
        tokenizer=serialised(tokenizer),
        windows_mb=windows_mb,
        candidates=True,
    )
    for step in range(steps):
        source = rng.integers(len(sources), size=n)
        tokens = np.stack(
            [streams[s][(start := rng.integers(window)) : start + window] for s in source]
        ).astype(np.int32)
        ids = [window_id(sources[s], row) for s, row in zip(source, tokens, strict=True)]
        windows = Windows(
            tokens=torch.from_numpy(tokens.astype(np.int64)),
            ids=torch.tensor(ids),
            source=torch.from_numpy(source),
        )
        asked = _queries(step, queries, tokenizer.batch_decode(tokens), windows.ids) if queries else None
        offer = Offer.of(windows, queries=asked)
        if steered:
            offer = _filtered(offer, len(sources) - 1, sources[-1])
        q = torch.from_numpy(rng.normal(size=n).astype(np.float32))
        if shift is not None and step >= shift:
            q += 6 * torch.from_numpy((source == 0).astype(np.float32))
        weights = torch.softmax(0.3 * q if shift is None or step < shift else q, 0)
        loss = torch.full((n,), 6.0 - 3.0 * step / steps)
        ranked = (q - q.mean()) * 1e-3
        effects = effects_of(torch.arange(n), ranked) if effect else None
        row = _row(step, steps, n, window, source, weights.double().numpy(), sources, q, loss, tasks)
        row |= _steering(row, step, n, sources) if steered else {}
        row |= _search_metrics(step) if queries else {}
        made = finished_step(step, offer, loss=loss, scores=q, weights=weights, q=q, effects=effects)
        logs.write(log_entry(made, row))
    logs.flush()
    logs.close()
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


def _filtered(offer: Offer, source: int, name: str) -> Offer:
    """The same windows, accepted for sure, and as many rejected ones with their tokens in reverse."""
    n = len(offer)
    tokens = offer.windows.tokens.flip(1)
    rejected = Windows(
        tokens=tokens,
        ids=torch.tensor([window_id(name, row.astype(np.int32)) for row in tokens.numpy()]),
        source=torch.full((n,), source),
    )
    return replace(offer, sampled=_sampled(n, 1.0), rejected=Offer.of(rejected, sampled=_sampled(n, 0.25)))


def _sampled(n: int, accept_prob: float) -> Sampled:
    return Sampled(
        accept_prob=torch.full((n,), accept_prob, dtype=torch.float64),
    )


def _steering(row: dict, step: int, n: int, sources: Sequence[str]) -> dict[str, float]:
    names = [f"select/offered_share/{name}" for name in sources]
    offered = {name: row[name] / 2 + (name == names[-1]) / 2 for name in names}
    return {"x/windows_read": 2 * n * (step + 1), "data/windows_read": 2.0 * n, **offered}


def _row(step, steps, n, window, source, weights, sources, q, loss, tasks):
    effective = float(1 / (weights**2).sum())
    row = {
        "step": step,
        "x/windows_proposed": n * (step + 1),
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
                "task/hellaswag/acc_norm/chance_level": 0.25,
            }
    return row


def _queries(step: int, texts: Sequence[str], windows: list[str], ids: torch.Tensor) -> Queries:
    """Q falls from the first query to the last, the similarity rises; exact in float32."""
    n = len(windows)
    number = torch.arange(n, dtype=torch.float32)
    drew = torch.arange(n) < n - 1
    return Queries(
        text=tuple(texts[(step * n + i) % len(texts)] for i in range(n)),
        q=1 - number / 16,
        soft_q=2 - number / 16,
        start_q=torch.zeros(n),
        changed=torch.full((n,), 0.75),
        row=torch.where(drew, torch.arange(n), -1),
        score=torch.where(drew, number / 32, torch.nan),
        window_text=tuple(text if d else "" for text, d in zip(windows, drew.tolist(), strict=True)),
        # Query i's nearest is window i; then come the one before it and, but for the first, the one after.
        shortlist=torch.stack([ids, ids.roll(1), torch.where(torch.arange(n) > 0, ids.roll(-1), -1)], 1),
        shortlist_scores=torch.stack(
            [
                number / 32,
                number / 32 - 0.125,
                torch.where(torch.arange(n) > 0, number / 32 - 0.25, -torch.inf),
            ],
            1,
        ),
    )


def _search_metrics(step: int) -> dict[str, float]:
    return {
        "langevin/hard_q": 0.5,
        "langevin/hard_q_gain": 0.5,
        "langevin/random_q": 0.25,
        "langevin/above_random": 0.25,
        "langevin/above_random_sd": 3.0,
        "langevin/soft_q_gain": 1.5,
        "langevin/tokens_changed": 0.75,
        "langevin/cosine": 0.1 + step / 1000,
        "retrieval/score": 0.1,
        "retrieval/q_advantage": -0.125,
        "buffer/windows": 100.0,
        "time/ingest": 0.002,
        "time/search": 0.004,
        "time/retrieve": 0.001,
    }
