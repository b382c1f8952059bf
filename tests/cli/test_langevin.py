"""Algorithm 2 in one command, as a user starts it."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from curriq.runlog.read import read_candidates, read_metrics, read_queries

SMALL = shlex.split(
    """--model random:gpt2:hidden_size=32,num_hidden_layers=1,num_attention_heads=2 --steps 3 --window 32
    --num-candidates 8 --vocab-size 512 --tokenizer-sample-bytes 200000 --shuffle-buffer 64
    --reward-set-size 16 --reward-windows 4 --validation-set-size 8 --test-set-size 8 --buffer-size 128
    --query-tokens 6 --langevin-steps 4 --no-tensorboard --threads 1"""
)


def curriq(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "curriq", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.long
def test_preset_runs_shows_progress_and_keeps_its_queries(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = curriq(tmp_path, "train", "--preset", "langevin-rag", *SMALL, "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stderr
    rows, queries = read_metrics(run), read_queries(run).to_pylist()
    assert [row["retrieval/windows"] for row in rows] == [8, 8, 8]
    assert len(queries) == 3 * 8
    offered = {(row["step"], row["row"]): row["window_id"] for row in read_candidates(run).to_pylist()}
    for query in queries:
        assert query["text"]
        assert query["window_text"]
        assert offered[query["step"], query["row"]] == query["window_id"]


@pytest.mark.long
def test_published_settings_warn_and_name_the_setting(tmp_path: Path) -> None:
    published = (  # six steps: Q is flat, and says nothing, until it has learnt from an effect
        "--steps 6 --langevin-margin 10 --langevin-gradient clip --langevin-step-size 0.01 "
        "--langevin-noise-scale 1"
    )
    run = tmp_path / "run"
    arguments = ["train", "--preset", "langevin-rag", *SMALL, *published.split(), "--run-dir", str(run)]
    done = curriq(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stderr.split())
    assert told.count("changed 0.0% of the query tokens") == 1
    assert "--langevin-margin" in told
    assert {row["langevin/tokens_changed"] for row in read_metrics(run)} == {0.0}


def test_a_selector_without_q_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = curriq(tmp_path, "train", "--proposer", "langevin", "--selector", "uniform")
    assert done.returncode == 2
    assert "--no-q-weighting" in done.stderr
    assert not (tmp_path / "runs").exists()
