"""Every system call on the files of a command fails once: no traceback, nothing lost, nothing silent."""

import errno
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from tests.faults.harness import ERRORS, RUNS, Bench, compiled, require_one_message

SAMPLE = 6
"""Calls of each command that fail in the default tier; in the slow one each fails, with both errors. The
last of them is the command's last."""
READERS = {
    "export": ["export", "RUN", "--out", "OUT"],
    "report": ["report", "RUN", "--out", "OUT", "--no-figures", "--topics", "0"],
    "verify": ["verify", "RUN"],
    "eval": ["eval", "RUN", "--tasks", "--source-windows", "8", "--out", "OUT"],
}
"""Commands on a finished run, which must leave it as it is."""

EVERY = pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(20_000)])]
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("faults")
    try:
        library = compiled(scratch)
    except RuntimeError as error:
        pytest.skip(str(error))
    bench = Bench.make(scratch, library)
    yield bench
    bench.server.close()


def chosen(bench: Bench, arguments: list[str], every: bool, sample: int = SAMPLE) -> list[tuple[int, int]]:
    """Calls of a command and the errors that they fail with: all with both, or a sample, spread evenly."""
    count = len(bench.points(arguments))
    if every:
        return [(call, error) for call in range(1, count + 1) for error in ERRORS]
    draw = random.Random(0)
    borders = [round(i * count / sample) for i in range(sample + 1)]
    calls = [draw.randint(low + 1, high) for low, high in pairwise(borders) if high > low]
    calls[-1] = count  # forces the name of what the command wrote
    return [(call, ERRORS[number % 2]) for number, call in enumerate(calls)]


def fail(bench: Bench, arguments: list[str], call: int, error: int) -> tuple[int, str]:
    """A full disk stays full at every second point; a bad block fails once."""
    return bench.fail(arguments, call, error, stay=error == errno.ENOSPC and call % 2 == 0)


def check_training(bench: Bench, kind: str, arguments: list[str], half: Path | None, every: bool) -> None:
    """A run that a fault stops is gone on with, or started again, to the bits of one that nothing disturbed.

    `half` is what the run's folder holds before the command.
    """

    def prepare() -> None:
        bench.clear()
        if half is not None:
            shutil.copytree(half, bench.run)

    prepare()
    for call, error in chosen(bench, arguments, every):
        prepare()
        status, printed = fail(bench, arguments, call, error)
        try:
            if status == 0:
                bench.same(kind)
            else:
                require_one_message(status, printed)
                bench.recover(kind)
        except AssertionError as failure:
            failure.add_note(f"{arguments[0]} {kind}, call {call}, error {error}: {printed[-2000:]}")
            raise


@pytest.mark.long
@EVERY
@pytest.mark.parametrize("kind", RUNS)
def test_a_failing_call_of_a_run(bench, kind, every):
    bench.untouched(kind)
    check_training(bench, kind, bench.train(kind), None, every)


@pytest.mark.long
@EVERY
def test_a_failing_call_of_a_resume(bench, tmp_path, every):
    """Of a run that was killed between two checkpoints."""
    bench.untouched("discrete")
    bench.clear()
    halfway = {"root": str(bench.root), "power": 150, "image": str(tmp_path / "lost"), "names": True}
    bench.server.run(bench.train("discrete"), **halfway)
    bench.run.rename(tmp_path / "half")
    check_training(bench, "discrete", ["resume", str(bench.run)], tmp_path / "half", every)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@EVERY
@pytest.mark.parametrize("command", READERS)
def test_a_failing_call_of_a_reader(bench, command, every):
    """It fails with one message or not at all; the run stays as it is, and the next call succeeds.

    Where only forcing the result's name fails, at the very end, the whole result is there.
    """
    finished = bench.untouched("discrete")
    bench.clear()
    shutil.copytree(finished, bench.run)
    before, out = contents(bench.run), bench.root / "out"
    places = {"RUN": str(bench.run), "OUT": str(out)}
    arguments = [places.get(word, word) for word in READERS[command]]
    status, printed = bench.server.run(arguments)
    assert status == 0, printed
    size = out.stat().st_size if out.exists() else 0
    for call, error in chosen(bench, arguments, every):
        out.unlink(missing_ok=True)
        status, printed = fail(bench, arguments, call, error)
        if status != 0 and not (command == "verify" and "BAD" in printed):
            require_one_message(status, printed)
            # A report says how old the run is, and an evaluation how long it took.
            left = out.stat().st_size if out.exists() else size
            assert abs(left - size) < 100, "half a result was left behind"
        assert contents(bench.run) == before
    status, printed = bench.server.run(arguments)
    assert status == 0, printed


@pytest.mark.long
@EVERY
def test_a_failing_call_of_a_comparison(bench, every):
    """Of two finished runs: their runs stay, and the next call writes the same numbers."""
    folder = bench.root / "compared"
    arguments = ["compare", str(bench.comparison()), "--out", str(folder)]
    status, printed = bench.server.run(arguments)
    assert status == 0, printed
    result = (folder / "comparison.json").read_bytes()
    for call, error in chosen(bench, arguments, every, sample=2):
        status, printed = fail(bench, arguments, call, error)
        if status != 0:
            require_one_message(status, printed)
        assert bench.server.run(arguments)[0] == 0
        assert (folder / "comparison.json").read_bytes() == result
