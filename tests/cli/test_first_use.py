"""A new user's way, command by command: a dirty crawl, clean news and a small model of one's own.

`check` finds all mistakes at once, `select` gives the filtered corpus, `train` and `report` work on the same
files without a stumble. What was found is printed, also where the test passes.
"""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from scipy.stats import mannwhitneyu

from curriq.data.corruption import corrupt_text
from curriq.data.embedded import embedded_documents

SMALL = (
    *("--window", "64", "--steps", "48", "--num-candidates", "16", "--shuffle-buffer", "512"),
    *("--eval-every", "16", "--checkpoint-every", "24", "--lm-lr", "1e-3", "--threads", "1"),
)


def run(folder: Path, *arguments: str, status: int = 0) -> str:
    """Standard output of a command; its standard error where the command is refused."""
    command = [sys.executable, "-m", "curriq", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`crawl.jsonl`, of which a third is prose and nothing says so, `news.csv`, and `my-model`."""
    folder = tmp_path_factory.mktemp("first-use")
    draw = np.random.default_rng(0)
    prose = [document.text[:4000] for document in embedded_documents("prose")]
    code = [document.text[:4000] for document in embedded_documents("code")]
    prose, code = ([texts[i] for i in draw.permutation(len(texts))] for texts in (prose, code))
    wanted, target, spoiled = prose[:300], prose[300:650], prose[650:850]
    rows = [(text, "prose") for text in wanted] + [(text, "code") for text in code[:400]]
    rows += [(corrupt_text("ocr", text, draw), "ocr") for text in spoiled]
    with (folder / "crawl.jsonl").open("w") as file:
        for number in draw.permutation(len(rows)).tolist():
            text, kind = rows[number]
            file.write(json.dumps({"url": f"page/{number}", "content": text, "kind": kind}) + "\n")
    with (folder / "news.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("title", "body"), *(("", text) for text in target)])
    tiny = ("--preset", "smoke", "--selector", "uniform", "--steps", "6", "--threads", "1")
    run(folder, "train", *tiny, "--vocab-size", "1024", "--window", "64", "--run-dir", "base")
    (folder / "base/checkpoints/step-00000006/lm").rename(folder / "my-model")
    return folder


def auc(scores: np.ndarray, wanted: np.ndarray) -> float:
    """Probability that a wanted document scores above another."""
    above = mannwhitneyu(scores[wanted], scores[~wanted]).statistic
    return float(above) / (int(wanted.sum()) * int((~wanted).sum()))


@pytest.mark.long
def test_a_new_users_way(folder: Path, capsys: pytest.CaptureFixture) -> None:
    began = time.monotonic()

    def data(crawl: str = "", news: str = "") -> list[str]:
        sources = [
            f"name=crawl,path=crawl.jsonl,weight=0.9{crawl}",
            f"name=news,path=news.csv,weight=0.1{news}",
        ]
        return ["--model", "./my-model", "--sources", *sources, "--target", "news", *SMALL]

    # Both columns are wrong, and one call says so, with the fix.
    found = json.loads(run(folder, "check", "--json", *data(), status=1))
    fixes = {fault["where"]: fault["fix"] for fault in found["faults"]}
    assert fixes == {"source 'crawl'": "text_field=content", "source 'news'": "text_field=body"}
    right = data(crawl=",text_field=content", news=",text_field=body")
    checked: dict[str, Any] = json.loads(run(folder, "check", "--json", "--preset", "recommended", *right))
    assert checked["usable"]
    assert checked["held_out"]["fitted"]
    assert checked["estimate"]["seconds"] > 0

    columns = ("--text-field", "content", "--target-text-field", "body", "--model", "./my-model")
    selecting = ("select", "--target", "news.csv", "crawl.jsonl", *columns)
    run(folder, *selecting, "--keep", "0.2", "--out", "clean.jsonl")
    kept = [json.loads(line) for line in (folder / "clean.jsonl").read_text().splitlines()]
    assert {*kept[0]} == {"url", "content", "kind", "curriq_score", "curriq_rank"}
    share = float(np.mean([row["kind"] == "prose" for row in kept]))
    run(folder, *selecting, "--keep", "1.0", "--out", "all.parquet")
    everything = parquet.read_table(folder / "all.parquet")
    wanted = np.array([kind == "prose" for kind in everything["kind"].to_pylist()])
    document_auc = auc(everything["curriq_score"].to_numpy(), wanted)

    printed = run(folder, "train", "--preset", "recommended", *right, "--run-dir", "mine")
    assert "validation" in printed
    by_run = json.loads(run(folder, "select", "mine", "--json", "--keep", "0.3", "--out", "learnt.parquet"))
    run(folder, "report", "mine")
    assert (folder / "mine/report.html").stat().st_size > 50_000

    seconds = time.monotonic() - began
    with capsys.disabled():
        print(
            f"\nfirst use: document AUC {document_auc:.3f}, {len(kept)} of {len(everything)} documents kept, "
            f"{share:.0%} of them prose (of all {wanted.mean():.0%}); {seconds:.0f} s"
        )
    assert document_auc > 0.95
    assert share > 0.8
    assert by_run
