"""Commands under faults, and what must hold after each: one message, and a run that ends in the same bits."""

import errno
import functools
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conformance.compositions import EXTRAS, RAG
from tests.runs import assert_same_run, tiny

from curriq.config import to_toml
from curriq.runlog.read import read_queries, read_windows
from curriq.train.checkpoint import checkpoint_folders

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
OPEN, WRITE, FSYNC, RENAME, READ = 1, 2, 4, 8, 16
ALL = OPEN | WRITE | FSYNC | RENAME | READ
ERRORS = (errno.ENOSPC, errno.EIO)
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "reading", "books")

COMMON = {"steps": 6, "checkpoint_every": 2, "eval_every": 3, "tensorboard": True, "vocab_size": 300}
RUNS: dict[str, dict[str, Any]] = {
    "discrete": {"selector": "soft-q", "q_replay_size": 4},
    "filtered": {"selector": "soft-q"} | EXTRAS["steered"],
    "langevin": {"selector": "soft-q", "proposer": "langevin"} | RAG,
}
"""Kinds of runs, over COMMON."""


def write_text(path: Path, documents: int, seed: int) -> None:
    draw = random.Random(seed)
    lines = (
        json.dumps({"text": " ".join(draw.choice(WORDS) + str(draw.randrange(50)) for _ in range(60))})
        for _ in range(documents)
    )
    path.write_text("\n".join(lines) + "\n")


@functools.cache
def compiled(folder: Path) -> Path:
    """The library of injected errors; RuntimeError without a C compiler."""
    library, compiler = folder / "faults.so", shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        raise RuntimeError("needs Linux and a C compiler")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "faults.c", "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


class Server:
    """The fork server as a process; `run` gives the exit status of a command and what it printed."""

    def __init__(self, scratch: Path, library: Path | None) -> None:
        self.out = scratch / "out.txt"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)]),
            "CURRIQ_CACHE": str(scratch / "root" / "cache"),
        }
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=scratch,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert json.loads(self._process.stdout.readline())["ready"]

    def run(self, arguments: list[str], **fault: Any) -> tuple[int, str]:
        request = {"arguments": arguments, "out": str(self.out), "fault": fault}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())["status"]
        return status, self.out.read_text(errors="replace")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Bench:
    """A folder in which commands run under faults.

    Attributes:
        root: below it, every file that a command reads or writes: data, cache and runs.
        finished: kind of run → its folder, finished and never disturbed.
    """

    scratch: Path
    server: Server
    finished: dict[str, Path] = field(default_factory=dict)

    @staticmethod
    def make(scratch: Path, library: Path | None) -> "Bench":
        root = scratch / "root"
        root.mkdir(parents=True)
        write_text(root / "target.jsonl", 150, 1)
        write_text(root / "other.jsonl", 150, 2)
        bench = Bench(scratch, Server(scratch, library))
        for kind in RUNS:
            bench._write_config(kind)
        return bench

    @property
    def root(self) -> Path:
        return self.scratch / "root"

    @property
    def run(self) -> Path:
        """The folder of the run that is disturbed."""
        return self.root / "run"

    def _write_config(self, kind: str) -> None:
        names = ("target", "other")
        sources = [{"name": n, "path": str(self.root / f"{n}.jsonl"), "weight": 0.5} for n in names]
        settings = COMMON | {"sources": sources, "target": "target"} | RUNS[kind]
        (self.scratch / f"{kind}.toml").write_text(to_toml(tiny(**settings)), encoding="utf-8")

    def train(self, kind: str) -> list[str]:
        return ["train", "--config", str(self.scratch / f"{kind}.toml"), "--run-dir", str(self.run)]

    def untouched(self, kind: str) -> Path:
        """The folder of the finished run of a kind, which is made once."""
        if kind not in self.finished:
            self.clear()
            status, printed = self.server.run(self.train(kind))
            assert status == 0, printed
            kept = self.scratch / f"untouched-{kind}"
            self.run.rename(kept)
            self.finished[kind] = kept
        return self.finished[kind]

    def comparison(self) -> Path:
        """A file of two arms with one seed each."""
        file = self.scratch / "compare.toml"
        file.write_text(
            f'[compare]\nconfig = "{self.scratch / "discrete.toml"}"\nseeds = [0]\nbaseline = "uniform"\n'
            '[arms.uniform]\nselector = "uniform"\n[arms.low]\nselector = "low-loss"\n[streams.text]\n'
        )
        return file

    def clear(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)

    def points(self, arguments: list[str], operations: int = ALL) -> list[str]:
        """What an undisturbed command does to the files below the root, in order: `operation path`."""
        listed = self.scratch / "points.txt"
        fault = {"root": str(self.root), "operations": operations, "at": 0, "error": 0, "list": str(listed)}
        status, printed = self.server.run(arguments, **fault)
        assert status == 0, printed
        return listed.read_text().splitlines()

    def fail(self, arguments: list[str], at: int, error: int, *, stay: bool = False) -> tuple[int, str]:
        """Run a command whose at-th system call fails; with `stay` all later ones fail too."""
        fault = {"root": str(self.root), "operations": ALL, "at": at, "error": error, "stay": stay}
        return self.server.run(arguments, **fault)

    def recover(self, kind: str) -> None:
        """What the messages tell a user to do, until the run is finished, which must be one that was never
        disturbed."""
        if checkpoint_folders(self.run / "checkpoints"):
            status, printed = self.server.run(["resume", str(self.run)])
        else:
            status, printed = self.server.run(self.train(kind))
        assert status == 0 or "is finished" in printed, printed
        self.same(kind)

    def same(self, kind: str) -> None:
        """Whether the run equals the one that was never disturbed, every table of the log included."""
        expected = self.finished[kind]
        assert_same_run(self.run, expected)
        ours, theirs = read_windows(self.run), read_windows(expected)
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.stored.tolist() == theirs.stored.tolist()
        if kind == "langevin":
            assert read_queries(self.run).to_pydict() == read_queries(expected).to_pydict()
        # An old checkpoint that could not be removed goes at the next start; the command warns of it.
        left = [path for path in self.run.rglob(".*") if path.name.startswith((".tmp-", ".reserve"))]
        assert all(path.name.startswith(".tmp-old-") for path in left), left


def require_one_message(status: int, printed: str) -> None:
    """A failed command prints its reason once, as a sentence for its user."""
    assert status in (1, 2, 74), (status, printed)
    assert "Traceback" not in printed, printed
    messages = [line for line in printed.splitlines() if line.startswith("curriq: ")]
    assert len(messages) == 1, printed
