"""The log of windows: each once, bounded, and exactly resumed."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.runs import assert_same_run, tiny
from tests.steps import finished_step

from curriq.runlog.promise import Promise
from curriq.runlog.read import read_candidates, read_windows
from curriq.runlog.writers import BYTES_PER_TOKEN, Entry, Parts, WindowLog
from curriq.train.record import log_entry
from curriq.train.run import train
from curriq.types import Offer, Windows

LENGTH = 4


def offer_of(*ids: int) -> Offer:
    """Windows whose tokens are their id, over and over."""
    tokens = torch.tensor(ids).unsqueeze(1).repeat(1, LENGTH)
    source = torch.zeros(len(ids), dtype=torch.int64)
    return Offer.of(Windows(tokens=tokens, ids=torch.tensor(ids), source=source))


def entry(step: int, *ids: int, rejected: tuple[int, ...] = ()) -> Entry:
    """A step that offers these windows and has rejected others."""
    offer = replace(offer_of(*ids), rejected=offer_of(*rejected) if rejected else None)
    return log_entry(finished_step(step, offer), {})


def log_of(folder: Path, windows: float = 1000, promise: Promise | None = None) -> WindowLog:
    parts = Parts(folder, promise or {})
    return WindowLog(parts, windows * LENGTH * BYTES_PER_TOKEN / 1e6, "")


def test_every_window_is_kept_once(tmp_path: Path):
    log = log_of(tmp_path)
    log.append(entry(0, 5, 3))
    log.append(entry(1, 3, 9))
    log.flush()
    log.append(entry(2, 9, 1, 5))
    log.flush()
    kept = read_windows(tmp_path)
    assert kept.ids.tolist() == [1, 3, 5, 9]
    assert (kept.tokens == kept.ids[:, None]).all()
    assert kept.find(np.array([9, 2, 1])).tolist() == [3, -1, 0]


def test_no_more_than_the_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    log = log_of(tmp_path, windows=3)
    for step in range(5):
        log.append(entry(step, 2 * step, 2 * step + 1))
    log.flush()
    assert read_windows(tmp_path).ids.tolist() == [0, 1, 2, 3]  # the step that meets the bound is kept whole
    assert ["--log-windows-mb is used up at step 1" in r.message for r in caplog.records] == [True]


def test_what_was_rejected_gets_half_of_the_room(tmp_path: Path):
    log = log_of(tmp_path, windows=6)
    for step in range(4):
        log.append(entry(step, step, rejected=(100 + step, 200 + step)))
    log.flush()
    assert read_windows(tmp_path).ids.tolist() == [0, 1, 2, 3, 100, 200]


def test_nothing_is_kept_when_switched_off(tmp_path: Path):
    log = log_of(tmp_path, windows=0)
    log.append(entry(0, 1))
    log.flush()
    assert not (tmp_path / "windows").exists()
    assert len(read_windows(tmp_path)) == 0


def test_a_log_that_is_opened_in_the_middle_goes_on_as_if_never_closed(tmp_path: Path):
    steps = [entry(step, step % 7, 100 + step % 5, 200 + step) for step in range(12)]
    for folder, starts in (("whole", [0]), ("resumed", [0, 6])):
        promises = {0: {}}
        for start in starts:
            log = log_of(tmp_path / folder, windows=20, promise=promises[start])
            for step in range(start, 12):
                log.append(steps[step])
                if step % 3 == 2:
                    log.flush()
                    promises[step + 1] = {"parts.jsonl": asdict(log._parts.flush())}
    whole, resumed = read_windows(tmp_path / "whole"), read_windows(tmp_path / "resumed")
    assert whole.ids.tolist() == resumed.ids.tolist()
    assert len(whole) >= 20


def test_a_run_keeps_the_text_of_what_it_was_offered(tmp_path: Path):
    """It keeps exactly the windows of the candidates table, and keeping them changes nothing else."""
    train(tiny(run_dir=str(tmp_path / "run"), steps=4))
    train(tiny(run_dir=str(tmp_path / "off"), steps=4, log_windows_mb=0))
    assert_same_run(tmp_path / "run", tmp_path / "off")
    kept = read_windows(tmp_path / "run")
    offered = set(read_candidates(tmp_path / "run")["window_id"].to_pylist())
    assert set(kept.ids.tolist()) == offered
    texts = kept.texts(np.arange(len(kept)))
    assert all(len(text) > 20 for text in texts)
