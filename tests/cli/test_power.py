"""The power goes, or every process is killed, at any moment of any command; and hours without a leak."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from tests.faults.harness import RUNS, Bench, require_one_message

SAMPLE = 5
"""Moments in the default tier."""
KILLS = 100
SOAK_SECONDS = float(os.environ.get("CURRIQ_SOAK_SECONDS", "7200"))
MOST_CHANGES = 10_000
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    bench = Bench.make(tmp_path_factory.mktemp("power"), None)
    yield bench
    bench.server.close()


def lose_power(bench: Bench, arguments: list[str], at: int, names: bool) -> bool:
    """Whether the command ended before its at-th change; else the root is what the disk then has."""
    image = bench.scratch / "image"
    shutil.rmtree(image, ignore_errors=True)
    status, printed = bench.server.run(
        arguments, root=str(bench.root), power=at, image=str(image), names=names
    )
    if status == 0:
        return True
    assert status == 9, printed
    shutil.rmtree(bench.run, ignore_errors=True)
    shutil.rmtree(bench.root / "cache")
    for name in ("run", "cache"):
        if (image / name).exists():
            shutil.copytree(image / name, bench.root / name)
    return False


def check_power(bench: Bench, kind: str, moments: list[int]) -> int:
    """How many of the moments a run reached; it goes on, or is started again, to the same bits."""
    bench.untouched(kind)
    for reached, moment in enumerate(moments):
        bench.clear()
        if lose_power(bench, bench.train(kind), moment, names=moment % 2 == 0):
            return reached
        bench.recover(kind)
    return len(moments)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["discrete"])
def test_power_goes(bench, kind):
    """Spread over the run's changes, of which there are some 200."""
    draw = random.Random(0)
    borders = range(0, 200 + 1, 200 // SAMPLE)
    moments = [draw.randint(low + 1, high) for low, high in pairwise(borders)]
    assert check_power(bench, kind, moments) >= SAMPLE - 1


@pytest.mark.slow
@pytest.mark.timeout(20_000)
@pytest.mark.parametrize("kind", RUNS)
def test_power_goes_at_every_change(bench, kind):
    reached = check_power(bench, kind, list(range(1, MOST_CHANGES)))
    assert 100 < reached < MOST_CHANGES - 1


def until_done(bench: Bench, kind: str, draw: random.Random, most: int) -> int:
    """Kills of a run at random moments, through start, steps, checkpoints and resumes, to its end."""
    kills = 0
    while not (bench.run / "summary.json").exists():
        started = any((bench.run / "checkpoints").glob("step-*"))
        arguments = ["resume", str(bench.run)] if started else bench.train(kind)
        after = {"kill": draw.uniform(0.02, 1.5)} if kills < most else {}
        status, printed = bench.server.run(arguments, **after)
        if status != -signal.SIGKILL and status != 0:
            require_one_message(status, printed)
        kills += status == -signal.SIGKILL
    return kills


@pytest.mark.slow
@pytest.mark.timeout(20_000)
def test_a_hundred_kills(bench):
    """Of runs of all kinds and of every command on them; each ends in the bits of one never touched."""
    draw, kills = random.Random(1), 0
    while kills < KILLS:
        for kind in RUNS:
            finished = bench.untouched(kind)
            bench.clear()
            kills += until_done(bench, kind, draw, most=8)
            bench.same(kind)
            out = str(bench.root / "out")
            for command in (
                ["verify", str(bench.run)],
                ["eval", str(bench.run), "--tasks", "--source-windows", "8", "--out", out],
                ["export", str(bench.run), "--out", out],
                ["report", str(bench.run), "--no-figures", "--topics", "0", "--out", out],
            ):
                status, _ = bench.server.run(command, kill=draw.uniform(0.02, 0.6))
                kills += status == -signal.SIGKILL
                assert bench.server.run(command)[0] == 0
            bench.same(kind)
            assert finished.exists()
        kills += kill_comparison(bench, draw)


def kill_comparison(bench: Bench, draw: random.Random) -> int:
    """Kills of `curriq compare`, whose workers end their runs alone; the next call then compares them."""
    arguments = ["compare", str(bench.comparison()), "--out", str(bench.root / "compared")]
    status, _ = bench.server.run(arguments, kill=draw.uniform(0.1, 6))
    deadline = time.monotonic() + 300
    while "is at work there" in (printed := bench.server.run(arguments)[1]):
        assert time.monotonic() < deadline, printed
        time.sleep(1)
    assert (bench.root / "compared" / "comparison.json").exists(), printed
    shutil.rmtree(bench.root / "compared")
    return status == -signal.SIGKILL


def usage(process: int, run: Path) -> tuple[int, int, int]:
    """Resident bytes, open descriptors and bytes of the checkpoints."""
    status = Path(f"/proc/{process}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    stored = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    return resident * 1024, len(os.listdir(f"/proc/{process}/fd")), stored


@LINUX
@pytest.mark.slow
@pytest.mark.timeout(int(SOAK_SECONDS) + 600)
def test_soak(tmp_path):
    """Hours of steps and checkpoints: memory, handles and checkpoints do not grow after the first quarter.

    CURRIQ_SOAK_SECONDS sets the length.
    """
    run = tmp_path / "run"
    settings = (
        "--preset smoke --threads 1 --progress none --steps 1000000000 --checkpoint-every 20 --eval-every 100"
    )
    words = [sys.executable, "-m", "curriq", "train", *settings.split(), "--log-windows-mb", "5"]
    process = subprocess.Popen([*words, "--run-dir", str(run)], stdout=subprocess.DEVNULL)
    samples = []
    try:
        while not any((run / "checkpoints").glob("step-*[1-9]0")):
            assert process.poll() is None
            time.sleep(0.5)
        end = time.monotonic() + SOAK_SECONDS
        while time.monotonic() < end:
            time.sleep(min(5.0, SOAK_SECONDS / 40))
            assert process.poll() is None
            with suppress(FileNotFoundError):  # a checkpoint went while it was measured
                samples.append(usage(process.pid, run))
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=120)
    assert status == 130
    quarter = samples[len(samples) // 4 :]
    first, second = quarter[: len(quarter) // 2], quarter[len(quarter) // 2 :]
    for name, slack, early, late in zip(
        ("resident bytes", "descriptors", "bytes of checkpoints"),
        (30_000_000, 3, 100_000),
        map(max, zip(*first, strict=True)),
        map(max, zip(*second, strict=True)),
        strict=True,
    ):
        assert late <= early + slack, f"{name}: {early} in the first half, {late} in the second"
    again = [sys.executable, "-m", "curriq", "verify", str(run)]
    subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
