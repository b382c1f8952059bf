"""Tiny runs, and how two of them are compared to the bit."""

import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from curriq.config import EMBEDDED_SOURCES, RunConfig
from curriq.presets import preset
from curriq.runlog.read import read_candidates, read_metrics, read_summary
from curriq.runlog.schema import find
from curriq.train.checkpoint import latest_checkpoint

SETTINGS: dict[str, Any] = {
    "sources": EMBEDDED_SOURCES[:3],
    "steps": 6,
    "num_candidates": 8,
    "window": 32,
    "vocab_size": 300,
    "tokenizer_sample_bytes": 50_000,
    "beta": 0.01,  # Q gaps are small so early; this makes the mixture uneven
    "random_k": 3,
    "competence_steps": 4,
    "eval_every": 4,
    "checkpoint_every": 100,
    "threads": 1,
    "device": "cpu",
    "compile": "off",  # half a minute on a GPU, for steps of milliseconds
    "tensorboard": False,
    "progress": "none",
}


def tiny(**overrides: Any) -> RunConfig:
    """Six steps of eight windows; every tiny run shares one cached tokenizer."""
    return preset("smoke").override(**(SETTINGS | overrides))


def without_times(row: dict[str, float]) -> dict[str, float]:
    """The part of a row on which two runs with one seed must agree bit by bit."""
    return {name: value for name, value in row.items() if find(name).deterministic}


@dataclass(frozen=True)
class Finished:
    """What a run left behind, without the times."""

    folder: Path

    @property
    def rows(self) -> list[dict[str, float]]:
        return [without_times(row) for row in read_metrics(self.folder)]

    @property
    def candidates(self) -> dict[str, list]:
        return read_candidates(self.folder).to_pydict()

    @property
    def state(self) -> dict[str, Any]:
        state = latest_checkpoint(self.folder).state
        del state["meter"]["seconds"]
        return state

    @property
    def weights(self) -> bytes:
        return (latest_checkpoint(self.folder).lm / "model.safetensors").read_bytes()

    @property
    def summary(self) -> dict[str, Any]:
        return {name: value for name, value in read_summary(self.folder).items() if name != "seconds"}


@dataclass
class InterruptAt:
    """A probe that presses Ctrl-C in a step."""

    step: int

    def measure(self, step) -> dict[str, float]:
        if step.index == self.step:
            os.kill(os.getpid(), signal.SIGINT)
        return {}


def assert_same_run(a: Path, b: Path) -> None:
    """Log, candidates, weights, every other state and the summary, bit by bit."""
    ours, theirs = Finished(a), Finished(b)
    assert ours.rows == theirs.rows
    assert ours.candidates == theirs.candidates
    assert ours.weights == theirs.weights
    assert_same_state(ours.state, theirs.state)
    assert ours.summary == theirs.summary


def assert_same_state(a: Any, b: Any, where: str = "state") -> None:
    """Bit by bit, with the place of the first difference."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where  # a NaN label equals itself
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{i}]")
    elif not (isinstance(a, float) and math.isnan(a) and math.isnan(b)):
        assert a == b, where
