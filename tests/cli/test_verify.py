"""`curriq verify`, and what a resume does, when bytes of a finished or killed run are lost."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.faults.harness import write_text
from tests.runs import InterruptAt, assert_same_run, tiny

from curriq.cli import main
from curriq.errors import CurriqError
from curriq.train.run import prepare, resume, train

SETTINGS = {"checkpoint_every": 2, "eval_every": 3, "checkpoint_keep": 2}
GUARDED = (
    *("metrics.jsonl", "parts.jsonl", "candidates/part-00000000.parquet", "windows/part-00000002.parquet"),
    *("checkpoints/step-00000004/state.pt", "checkpoints/step-00000004/lm/model.safetensors"),
    *("checkpoints/step-00000004/manifest.json", "checkpoints/step-00000004/lm/tokenizer.json"),
)
"""Files of which every byte is promised by the checkpoint of step 4."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(tiny(**SETTINGS, run_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> Path:
    """A run that was stopped after step 4, at a checkpoint."""
    folder = tmp_path_factory.mktemp("halfway")
    run = prepare(tiny(**SETTINGS, run_dir=str(folder)))
    run.session.probes.append(InterruptAt(3))
    run.session.train()
    return folder


@pytest.fixture
def run(halfway, tmp_path) -> Path:
    shutil.copytree(halfway, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x01
    path.write_bytes(content)


def verified(run: Path, capsys: pytest.CaptureFixture) -> tuple[int, list[str]]:
    """Exit status, and what was found to be bad."""
    status = main(["verify", str(run)])
    return status, [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]


def test_all_holds(finished, capsys):
    assert verified(finished, capsys) == (0, [])


def test_a_run_of_a_comparison_without_its_checkpoints_is_not_passed_over(finished, tmp_path, capsys):
    for name in ("a-0", "b-0"):
        shutil.copytree(finished, tmp_path / "all" / "default" / name)
    (tmp_path / "all" / "default" / "c-0").mkdir()  # waits for its turn
    (tmp_path / "all" / "default" / "c-0" / "config.toml").touch()
    assert verified(tmp_path / "all", capsys) == (0, [])
    shutil.rmtree(tmp_path / "all" / "default" / "b-0" / "checkpoints")
    (tmp_path / "all" / "default" / "b-0" / "metrics.jsonl").unlink()
    status, bad = verified(tmp_path / "all", capsys)
    assert status == 1
    assert "b-0" in bad[0]
    assert not any("a-0" in line or "c-0" in line for line in bad)


def test_parts_are_kept_below_a_folder_whose_name_is_not_utf8(run, tmp_path):
    """They are whole; what cannot be opened by name is not half-written."""
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/l\xe9"))
    shutil.copytree(run, place)
    shutil.rmtree(place / "checkpoints" / "step-00000004")  # nothing promises the later parts now
    parts = sorted(place.glob("*/*part-*"))
    # A process of its own: pytest's workers cannot send what is logged of such a name.
    call = [sys.executable, "-m", "curriq", "verify", place]
    done = subprocess.run(call, capture_output=True, text=True, errors="replace", check=False)
    assert sorted(place.glob("*/*part-*")) == parts
    assert "half-written" not in done.stdout + done.stderr
    assert "BAD" not in done.stdout


@pytest.mark.parametrize("name", GUARDED)
def test_a_flipped_bit_is_found_and_never_passed_over(name, run, finished, capsys):
    """Wherever it lies: `verify` names the file, and a resume ends in the same bits or refuses."""
    draw = random.Random(name)
    whole = (run / name).read_bytes()
    for position in draw.sample(range(len(whole)), 3):
        (run / name).write_bytes(whole)
        flip(run / name, position)
        status, bad = verified(run, capsys)
        assert status == 1
        assert any(Path(name).name in line or "manifest" in line for line in bad)
    if name.startswith("checkpoints"):  # the checkpoint before, whose log is whole, takes its place
        assert resume(run).finished
        assert_same_run(run, finished)
        return
    refusal = rf"the log that it covers is not whole: .*{Path(name).name}"
    if name.endswith("00000002.parquet"):  # the checkpoint of step 2 covers what lies before it
        assert resume(run).finished
        assert_same_run(run, finished)
    else:
        with pytest.raises(CurriqError, match=refusal):
            resume(run)


def test_rows_after_the_checkpoint_are_repeated_and_none_before_is_cut(run, finished, capsys):
    """A kill leaves whole rows, a torn one, and parts that no checkpoint covers."""
    path = run / "metrics.jsonl"
    promised = path.read_bytes()
    row = json.loads(promised.splitlines()[-1]) | {"step": 4}
    whole = promised + json.dumps(row).encode() + b"\n"
    path.write_bytes(whole + b'{"step": 5, "tr')
    (run / "candidates" / ".tmp-part-00000004.parquet").write_bytes(b"half")
    (run / "candidates" / "part-00000004.parquet").write_bytes(b"PAR1")
    assert verified(run, capsys) == (0, [])
    assert path.read_bytes() == whole
    assert [p.name for p in sorted((run / "candidates").iterdir())] == [
        "part-00000000.parquet",
        "part-00000002.parquet",
    ]
    assert resume(run).finished
    assert_same_run(run, finished)


def test_a_bad_byte_in_the_promised_log_is_named_by_line(run, capsys):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0] + b"\xff" + lines[1][1:] + b"".join(lines[2:]))
    before = (run / "metrics.jsonl").read_bytes()
    _, bad = verified(run, capsys)
    assert "metrics.jsonl is damaged in line 2" in bad[0]
    with pytest.raises(CurriqError, match=r"metrics\.jsonl is damaged in line 2"):
        resume(run)
    assert (run / "metrics.jsonl").read_bytes() == before
    for command in (["report", str(run), "--no-figures"],):
        assert main(command) == 2
        assert "metrics.jsonl, line 2, is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("table", ["candidates", "windows"])
@pytest.mark.parametrize("damage", ["cut", "gone", "another"])
def test_a_damaged_older_part_is_named_with_its_steps(table, damage, run, capsys):
    path = run / table / "part-00000000.parquet"
    if damage == "cut":
        os.truncate(path, 50)
    elif damage == "gone":
        path.unlink()
    else:
        shutil.copy(run / table / "part-00000002.parquet", path)
    status, bad = verified(run, capsys)
    assert status == 1
    assert f"{table}/part-00000000.parquet (steps 0 to 1)" in bad[0]
    with pytest.raises(CurriqError, match=rf"{table}/part-00000000\.parquet \(steps 0 to 1\)"):
        resume(run)


def test_an_export_and_a_report_do_not_pass_over_a_part_that_is_gone(run, capsys, caplog, tmp_path):
    """A curriculum with a gap would be replayed as if the steps after it had come at once."""
    out = tmp_path / "curriculum.parquet"
    assert main(["export", str(run), "--out", str(out)]) == 0
    out.unlink()
    gone = run / "candidates" / "part-00000000.parquet"
    content = gone.read_bytes()
    gone.unlink()
    assert main(["export", str(run), "--out", str(out)]) == 2
    assert "candidates/part-00000000.parquet (steps 0 to 1) cannot be read" in capsys.readouterr().err
    assert main(["report", str(run), "--no-figures", "--topics", "0"]) == 0
    assert caplog.text.count("candidates lacks the steps 0 to 1: what follows is without them") == 1
    gone.write_bytes(content[:-8] + content[-8:-4][::-1] + content[-4:])
    assert main(["export", str(run), "--out", str(out)]) == 2
    assert "its SHA-256 is another" in capsys.readouterr().err
    assert not out.exists()


def test_a_lost_configuration_is_written_again(run, finished, capsys):
    before = (run / "config.toml").read_bytes()
    (run / "config.toml").write_bytes(before[: len(before) // 2] + b"[")
    assert verified(run, capsys) == (0, [])
    assert (run / "config.toml").read_bytes() == before
    assert resume(run).finished
    assert_same_run(run, finished)


def test_a_setting_that_changed_since_the_checkpoint_is_said(run, caplog):
    path = run / "config.toml"
    path.write_text(path.read_text().replace("lm_lr = 0.002", "lm_lr = 0.003"))
    resume(run)
    assert "--lm-lr = 0.003" in caplog.text
    assert "it was 0.002 when the checkpoint of step 4 was written" in caplog.text


def test_a_running_run_is_left_alone(run, capsys):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"half')
    before = (run / "metrics.jsonl").read_bytes()
    from curriq.runlog.storage import exclusive

    with exclusive(run, ""):
        assert verified(run, capsys) == (0, [])
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_cannot_be_written_is_verified_and_left_alone(run, capsys, caplog, monkeypatch):
    def refused(folder, refusal):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / ".lock"))

    monkeypatch.setattr("curriq.train.verify.exclusive", refused)
    before = (run / "metrics.jsonl").read_bytes()
    assert verified(run, capsys) == (0, [])
    assert (run / "metrics.jsonl").read_bytes() == before
    assert "it cannot be written (Permission denied), so nothing is repaired" in caplog.text


def test_neither_a_run_nor_a_comparison(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "is neither the folder of a run nor of a comparison" in capsys.readouterr().err


class TestDataThatChange:
    """Between a stop and a resume; the file's ends, its size and even its times may stay."""

    @pytest.fixture
    def run(self, tmp_path) -> Path:
        for seed, name in enumerate(("target", "other")):
            write_text(tmp_path / f"{name}.jsonl", 600, seed)
        sources = [
            {"name": name, "path": str(tmp_path / f"{name}.jsonl"), "weight": 0.5}
            for name in ("target", "other")
        ]
        config = tiny(**SETTINGS | {"sources": sources, "target": "target"}, run_dir=str(tmp_path / "run"))
        run = prepare(config)
        run.session.probes.append(InterruptAt(3))
        run.session.train()
        return tmp_path / "run"

    def test_one_byte_in_the_middle(self, run, tmp_path, capsys):
        path = tmp_path / "other.jsonl"
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        whole = path.read_bytes()
        middle = whole.index(b"fox", len(whole) // 2)
        path.write_bytes(whole[:middle] + b"f0x" + whole[middle + 3 :])
        os.utime(path, ns=times)
        with pytest.raises(CurriqError, match=r"other data: .*other\.jsonl has changed; source other was"):
            resume(run)
        status, bad = verified(run, capsys)
        assert status == 1
        assert "other.jsonl has changed" in bad[0]
        path.write_bytes(whole)
        assert resume(run).finished

    def test_appended_text(self, run, tmp_path):
        with (tmp_path / "other.jsonl").open("a") as file:
            file.write('{"text": "one more"}\n')
        with pytest.raises(
            CurriqError, match=r"other\.jsonl has grown by 21 bytes \(what was there is unchanged\)"
        ):
            resume(run)
