"""Modules and functions of curriq that one training step passes, counted by tracing.

    python scripts/step_modules.py              # plain training, the paper's method, `recommended`
    python scripts/step_modules.py --list       # with the modules' names

A step is one call of `train.loop.train_step`; nine steps are traced, so that rare ones (a probe, the end of
an epoch) are among them. The run is tiny; its size changes no path.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import curriq
from curriq.train import loop, session
from curriq.train.run import prepare

PACKAGE = Path(curriq.__file__).parent
STEPS = 9
TINY: dict[str, Any] = {
    "steps": 12,
    "num_candidates": 8,
    "window": 32,
    "shuffle_buffer": 64,
    "vocab_size": 512,
    "tokenizer_sample_bytes": 200_000,
    "model": "random:gpt2:hidden_size=32,num_hidden_layers=1,num_attention_heads=2",
    "reward_set_size": 16,
    "validation_set_size": 8,
    "test_set_size": 8,
    "reward_windows": 4,
    "threads": 1,
    "tensorboard": False,
    "progress": "none",
    "eval_every": 100,
    "checkpoint_every": 100,
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("default", {"selector": "uniform"}),
    "soft-q": ("default", {}),
    "recommended": ("recommended", {"probe_windows": 8, "reward_every": 2}),
}


def passed(preset: str, overrides: dict[str, Any]) -> dict[str, set[str]]:
    """Functions that the traced steps passed, by module path below the package."""
    found: dict[str, set[str]] = {}
    seen = set[CodeType]()

    def trace(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or code in seen:
            return
        seen.add(code)
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE):
            found.setdefault(str(path.relative_to(PACKAGE)), set()).add(code.co_qualname)

    def traced(*arguments: Any) -> Any:
        sys.setprofile(trace)
        try:
            return loop.train_step(*arguments)
        finally:
            sys.setprofile(None)

    original, session.train_step = session.train_step, traced
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = curriq.preset(preset).override(**(TINY | overrides), run_dir=folder)
            prepare(config).session.rehearse(STEPS)
    finally:
        session.train_step = original
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="name the modules")
    options = parser.parse_args()
    for name, (preset, overrides) in RUNS.items():
        found = passed(preset, overrides)
        print(f"{name}: {len(found)} modules, {sum(map(len, found.values()))} functions")
        if options.list:
            print("   ", *sorted(found))


if __name__ == "__main__":
    main()
