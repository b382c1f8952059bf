"""How fast the windows of a filter are read, and what each stage of it takes.

    python benchmarks/reading.py                                     # `recommended`, random words, T = 1,024
    python benchmarks/reading.py --sources … --tokenizer gpt2        # any settings of `curriq train`
    python benchmarks/reading.py --only stages

First the stages in one process and one thread, in microseconds of the processor per token that is read:
files, near-duplicates of held-out text, tokenizer, packing, shuffling; then what follows in the process that
trains: scores by n-grams, the choice. Nothing is trained, so the prior alone chooses. Then the
windows that 1 and 2 processes read ahead, per second of the clock, and what it takes of the process that gets
them; and the cores that feed GPUs of several speeds. Rates need a machine that does nothing else.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from common import SOURCES, write_corpus

from curriq import parallel
from curriq.cli import parse_run_config
from curriq.config import RunConfig
from curriq.data import open_corpus
from curriq.data.corpus import most_steps_ahead
from curriq.data.shards import ShardedStream
from curriq.data.sources import StreamedSource
from curriq.data.stream import DecontaminatedSource, Encoded, Packer, SourceReader, WindowStream
from curriq.select.sharded import ShardedProposer
from curriq.select.static import ScoredStream, WindowScorer
from curriq.select.stream_filter import FilteredStream
from curriq.train.calibrate import reading_cores
from curriq.train.run import prepare

DEFAULTS = (
    "--preset recommended --model random:llama:hidden_size=64,intermediate_size=128,num_hidden_layers=1,"
    "num_attention_heads=2 --window 1024 --num-candidates 64 --max-read-ratio 8 --vocab-size 8192 "
    "--reward-set-size 64 --validation-set-size 8 --test-set-size 8 --held-out-sizes fit "
    "--shuffle-buffer 1024 --no-tensorboard --progress none --device cpu --threads 1"
)
MEGABYTES = 48
WARM_UP, STEPS = 4, 12
SECONDS = 5.0
"""For which processes read ahead, at least."""
GPU_RATES = (100_000, 250_000, 500_000, 1_000_000)
"""Tokens that a GPU trains on per second."""
STAGES: dict[str, list[tuple[type, str]]] = {
    "files": [(StreamedSource, "next_document")],
    "near-duplicates": [(DecontaminatedSource, "next_document")],
    "tokenizer": [(Encoded, "__call__")],
    "packing": [(SourceReader, "next_window"), (Packer, "add")],
    "shuffling": [(WindowStream, "read")],
    "n-gram scores": [(ScoredStream, "read"), (WindowScorer, "judge"), (WindowScorer, "take_in")],
    "choice": [(FilteredStream, "propose"), (ShardedProposer, "propose")],
}
READ_AHEAD = ("files", "near-duplicates", "tokenizer", "packing", "shuffling")
"""Stages that a reading process does."""


class Stopwatch:
    """Seconds of the processor by stage, each without the stages that it calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = 0.0

    def timed(self, stage: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time is the stage's."""

        def call(*arguments: Any, **settings: Any) -> Any:
            self._turn()
            self._running.append(stage)
            try:
                return inner(*arguments, **settings)
            finally:
                self._turn()
                self._running.pop()

        return call

    def _turn(self) -> None:
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since  # ty: ignore[unsupported-operator]
        self._since = now


@contextmanager
def stages_timed() -> Generator[Stopwatch]:
    watch = Stopwatch()
    with ExitStack() as patched:
        for stage, places in STAGES.items():
            for owner, name in places:
                inner = getattr(owner, name)
                patched.enter_context(patch.object(owner, name, watch.timed(stage, inner)))
        yield watch


def stages(config: RunConfig) -> tuple[float, float]:
    """Print what each stage takes; windows per second that a core reads ahead, and windows read for each that
    is trained on."""
    with stages_timed() as watch:
        proposer = prepare(config).session.components.proposer
        read = 0
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                watch.seconds.clear()
            offer = proposer.propose(step)
            read += offer.cost.windows_read * (step >= WARM_UP)
    tokens = read * config.data.window
    print(f"{read} windows of {config.data.window} tokens read in {STEPS} steps of {len(offer)}")
    print(f"{'stage':18} {'µs/token':>9} {'tokens/s':>13}")
    groups = {stage: (stage,) for stage in STAGES}
    groups |= {"all that is read ahead": READ_AHEAD, "all": tuple(STAGES)}
    for name, parts in groups.items():
        seconds = sum(watch.seconds[part] for part in parts)
        print(f"{name:22} {1e6 * seconds / tokens:5.2f} {tokens / max(1e-9, seconds):13,.0f}")
    rate = read / sum(watch.seconds[part] for part in READ_AHEAD)
    return rate, read / (STEPS * len(offer))


def processes(config: RunConfig) -> None:
    """Print what processes of their own read, and what it takes of the one that gets their windows."""
    print(f"{'processes':18} {'tokens/s':>13} {'of the process that trains, µs/token':>38}")
    for count in (1, 2):
        with patch.object(parallel, "cores", lambda count=count: count + 1):
            stream = open_corpus(config.override(stream_shards=count), read_ahead=True).stream
            n = config.train.num_candidates
            for _ in range(most_steps_ahead(config)):
                stream.read(n)
            read, began, own = 0, time.perf_counter(), time.process_time()
            while (seconds := time.perf_counter() - began) < SECONDS:
                stream.read(n)
                read += n * config.data.window
            own = time.process_time() - own
            print(f"{count:<18} {read / seconds:13,.0f} {1e6 * own / read:38.3f}")
            assert count == 1 or isinstance(stream, ShardedStream)
            del stream


def main() -> None:
    words = sys.argv[1:]
    only = words.pop(words.index("--only") + 1) if "--only" in words else ""
    words = [word for word in words if word != "--only"]
    with TemporaryDirectory() as folder:
        chosen = [*DEFAULTS.split(), "--run-dir", str(Path(folder, "run"))]
        if "--sources" not in words:
            write_corpus(Path(folder), MEGABYTES)
            paths = {name: Path(folder, f"{name}.txt") for name in SOURCES}
            chosen += ["--sources", *(f"name={name},path={path},weight=0.25" for name, path in paths.items())]
            chosen += ["--target", SOURCES[0]]
        config = parse_run_config([*chosen, *words])
        print(f"{os.cpu_count()} cores, {config.tokenizer.tokenizer} tokenizer")
        if only != "processes":
            rate, ratio = stages(config)
            print(f"\n{ratio:.1f} windows read for each that is trained on; cores that read for a GPU of")
            for tokens in GPU_RATES:
                windows = ratio * tokens / config.data.window
                print(f"{tokens:14,} tokens/s {reading_cores(windows, 1.0, rate):6.1f}")
            print()
        if only != "stages":
            processes(config)


if __name__ == "__main__":
    main()
