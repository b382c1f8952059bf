"""The script for a GPU, whose minutes are dear: it must not fail there for what a CPU could have shown."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = (
    "fused-loss",
    "single-pass",
    "compiled",
    "same-run",
    "recommended",
    "kernels",
    "trainer",
    "langevin",
)


@pytest.mark.slow
def test_every_section_runs_at_the_size_of_a_cpu():
    command = [sys.executable, "benchmarks/gpu.py", "--size", "tiny", "--budget", "600", "--rounds", "2"]
    command += ["--compile", "off", "--only", *SECTIONS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed = [line for line in done.stdout.splitlines() if line.startswith("# ")]
    assert [line.split()[1] for line in printed] == list(SECTIONS)
    for row in (
        "plain, with its reading",
        "recommended, in 4 shards",
        "Hugging Face Trainer",
        "langevin-rag",
    ):
        assert f"\n{row}" in done.stdout
