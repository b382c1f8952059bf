"""One GPU and a quarter of an hour: is it right, and how far does `recommended` get beside static filters?

    CURRIQ_DEV_DATA=FOLDER python experiments/h100.py --minutes 14
    CURRIQ_DEV_DATA=FOLDER python experiments/h100.py --tiny          # the same at the size of a CPU, minutes

First the correctness sections of `benchmarks/gpu.py`; where one fails, nothing else is begun. Then the runs
of `h100.toml`, seed by seed, for as long as the time allows. What is begun is saved, the next call goes on
from there, and when all are finished `curriq compare` prints its tables.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
CORRECT = ("fused-loss", "single-pass", "same-run")
TINY = {
    "hidden_size=512,intermediate_size=1536,num_hidden_layers=8": (
        "hidden_size=64,intermediate_size=192,num_hidden_layers=2"
    ),
    "steps = 1600": "steps = 40",
    "num_candidates = 128": "num_candidates = 16",
    "window = 512": "window = 64",
    "vocab_size = 8192": "vocab_size = 1024",
    "seeds = [1, 2, 3]": "seeds = [1]",
    "stream_shards = 8": "stream_shards = 2",
    "eval_every = 100": "eval_every = 10",
    'precision = "bf16"': 'precision = "fp32"',
}


def call(*command: str, seconds: float) -> int:
    """Exit status of a program that is asked to stop and save after so many seconds."""
    process = subprocess.Popen([sys.executable, *command])
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--out", type=Path, default=Path("runs/h100"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    stop = time.monotonic() + 60 * options.minutes
    size = ("--size", "tiny") if options.tiny else ()
    gpu = str(HERE.parent / "benchmarks" / "gpu.py")
    if status := call(gpu, *size, "--budget", "90", "--only", *CORRECT, seconds=120):
        return status
    plan = HERE / "h100.toml"
    if options.tiny:
        text = plan.read_text(encoding="utf-8")
        for ours, theirs in TINY.items():
            assert ours in text, ours
            text = text.replace(ours, theirs)
        plan = HERE / "h100-tiny.toml"  # beside the streams that it names
        plan.write_text(text, encoding="utf-8")
    try:
        compare = ("-m", "curriq", "compare", str(plan), "--out", str(options.out))
        return call(*compare, seconds=max(30.0, stop - time.monotonic()))
    finally:
        if options.tiny:
            plan.unlink()


if __name__ == "__main__":
    sys.exit(main())
