"""Reference models for `--selector rho` and static scores, at the size of preset `small`.

    python experiments/references.py     # runs/references/STREAM/checkpoints/step-00000400/lm, seconds each

Each is trained on the target source of its stream alone, with the tokenizer of the stream. What that costs is
not counted in the arm's windows or operations, so the arm `rho` of a comparison has that much in hand.
"""

import argparse
import dataclasses
from pathlib import Path

import curriq
from curriq.config import load_toml
from curriq.presets import preset
from curriq.runlog.read import read_document

FOLDER = Path(__file__).parent / "streams"
STREAMS = ("dirty", "half", "web", "domain", "clean", "levels")
MADE = ("answers", "facts", "order")  # by streams/make.py
SEED = 100
"""None of the seeds that a comparison uses."""


def train_reference(stream: str, out: Path, threads: int) -> float:
    """Train on the stream's target alone; the test loss, nats per token."""
    data = load_toml(FOLDER / f"{stream}.toml").data
    sources = tuple(
        dataclasses.replace(source, weight=float(source.name == data.target)) for source in data.sources
    )
    config = preset("small").override(
        sources=sources,
        target=data.target,
        selector="uniform",
        seed=SEED,
        run_dir=str(out / stream),
        threads=threads,
    )
    started = (out / stream / "checkpoints").exists()
    result = curriq.resume(out / stream) if started else curriq.run(config)
    assert result.model_dir is not None
    return result.summary["test_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/references"))
    parser.add_argument("--only", nargs="*", default=STREAMS, choices=STREAMS + MADE)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    for stream in options.only:
        if read_document(options.out / stream / "summary.json").get("finished"):
            print(f"{stream}: is there already")
            continue
        print(
            f"{stream}: test loss {train_reference(stream, options.out, options.threads):.4f} nats per token"
        )


if __name__ == "__main__":
    main()
