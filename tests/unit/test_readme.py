"""What the README shows must work as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from experiments import hindsight
from tests.helpers import VOCAB, tiny_lm
from torch.utils.data import DataLoader

import curriq
from curriq.cli import parse_run_config
from curriq.config import load_toml
from curriq.evaluate.plan import load_plan
from curriq.presets import PRESETS, preset, smoke

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_first_block_is_two_commands_of_the_makefile():
    commands = blocks("sh")[0].splitlines()
    assert len(commands) == 2
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        program, target = command.split()
        assert program == "make"
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_train_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("[train]\nsteps = 5\n")
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if "curriq train" in line]
    assert len(commands) >= 3
    for _, _, *arguments in commands:
        if "--help" not in arguments:
            parse_run_config(arguments)


def test_compare_command_is_understood():
    """The file that it names is there, and six seeds can give a verdict."""
    (command,) = [line for line in "\n".join(blocks("sh")).splitlines() if "curriq compare" in line]
    _, _, file = shlex.split(command, comments=True)
    plan = load_plan(ROOT / file)
    assert len(plan.compare.seeds) >= 6


def test_the_table_of_filters_is_what_the_published_numbers_print(capsys, monkeypatch):
    """Each row, but for the words that name the stream, in the order of the streams."""

    def figures(row: str) -> str:
        return " ".join(row[re.search(r" [-+]\d\.\d{3} ", row).start() :].split())

    monkeypatch.setattr("sys.argv", ["hindsight.py", "--without", "oracle"])
    hindsight.main()
    printed = capsys.readouterr().out.partition(" lowest ")[0]
    theirs = [figures(line) for line in printed.splitlines() if re.search(r" \d/\d ", line)]
    ours = [figures(line) for line in README.splitlines() if re.match(r" {4}.*  \d/\d  ", line)]
    assert len(theirs) == 9
    assert len(ours) >= 7
    assert ours == [row for row in theirs if row in ours]


def test_example_run_files_are_valid():
    """Every example but the comparisons, which are no run files, is one."""
    examples = sorted((ROOT / "examples").glob("*.toml"))
    comparisons = [example for example in examples if example.name.startswith("compare")]
    assert len(comparisons) < len(examples)
    for example in examples:
        if example in comparisons:
            load_plan(example)
        else:
            load_toml(example)


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The ten lines, on a smaller job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "default", smoke)
    assert preset("default") == smoke()
    code = next(block for block in blocks("python") if "curriq.run(" in block)
    exec(compile(code.replace("100", "4").replace("150", "6"), "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[0].split()[0]) > 0
    assert float(printed[1]) > 0
    assert Path(printed[2], "model.safetensors").exists()


def test_example_of_ones_own_loop():
    """The `Curriculum` block, with a tiny model and a stream of two sources."""
    generator = torch.Generator().manual_seed(0)

    def examples(n: int, source: str) -> list[dict]:
        lengths = torch.randint(4, 12, (n,), generator=generator).tolist()
        return [
            {"input_ids": torch.randint(VOCAB, (length,), generator=generator), "source": source}
            for length in lengths
        ]

    for code in (block for block in blocks("python") if "curriq.Curriculum(" in block):
        model = tiny_lm().network
        names = {
            "curriq": curriq,
            "DataLoader": DataLoader,
            "clean_examples": examples(8, "web"),
            "stream": examples(64, "web") + examples(64, "forum"),
            "model": model,
            "optimizer": torch.optim.AdamW(model.parameters()),
        }
        exec(compile(code, "README.md", "exec"), names)
        assert 0 < names["curriculum"].step <= 128 / 16


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", README):
        assert "://" in target or (ROOT / target).exists(), target
