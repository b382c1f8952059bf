"""Completion, as bash asks for it, and as the parsers of the other shells read the scripts."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curriq.cli import COMMANDS, FIRST, GROUPS
from curriq.config import SELECTORS, flag
from curriq.presets import PRESETS

ROOT = Path(__file__).parents[2]
SCRIPT = """
source {script}
complete -p curriq >/dev/null || exit 1
COMP_WORDS=("$@"); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
function=$(complete -p curriq | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$function
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def script(shell: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    command = [sys.executable, "-m", "curriq", "completion", shell]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory):
    """Words so far, the last one unfinished → what bash offers; in a folder with one run and one file."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "curriq.bash").write_text(script("bash"))
    (folder / "runs" / "soft-q-0").mkdir(parents=True)
    (folder / "run.toml").write_text("")
    program = SCRIPT.format(script=folder / "curriq.bash")

    def offered(*words: str) -> set[str]:
        command = ["bash", "--norc", "-c", program, "bash", "curriq", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    return offered


def test_neither_completion_nor_help_loads_torch():
    """A shell that begins with `eval "$(curriq completion bash)"` waits for it."""
    words = [["completion", "bash"], *([name, "--help"] for name in COMMANDS)]
    code = f"""
import contextlib, io, sys
from curriq.cli import main
for words in {words}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(words)
    assert "torch" not in sys.modules, words
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_commands(complete):
    assert complete("") >= set(COMMANDS)
    assert complete("re") == {"resume", "report"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train", "--preset", ""), set(PRESETS)),
        (("train", "--credit", ""), {"sampled", "mixture", "counterfactual"}),
        (("train", "--selector", ""), set(SELECTORS)),
        (("train", "--help", ""), set(GROUPS)),
        (("train", "--no-q-w"), {"--no-q-weighting"}),
        (("train", "--config", "ru"), {"runs", "run.toml"}),
        (("report", "--axis", "wi"), {"windows"}),
        (("presets", "sm"), {"smoke", "small"}),
        (("runs", ""), {"list", "prune"}),
        (("runs", "prune", "--k"), {"--keep-last", "--keep-model"}),
        (("runs", "prune", "runs/"), {"runs/soft-q-0"}),
        (("verify", "runs/s"), {"runs/soft-q-0"}),
        (("schema", ""), {"run", "comparison"}),
        (("completion", "b"), {"bash"}),
    ],
)
def test_options_and_values(complete, words: tuple[str, ...], expected: set[str]):
    assert complete(*words) == expected


def test_train_offers_every_setting_and_resume_too(complete):
    offered = complete("train", "--")
    assert offered >= {flag(name) for name in FIRST} | {"--preset", "--config", "--help-all"}
    assert "--oversample" not in offered  # a former name
    assert complete("resume", "--") == offered - {"--preset", "--config", "--dry-run"}
    assert complete("try", "--") >= {"--minutes", "--seeds", *map(flag, FIRST)}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_scripts_are_sound(shell: str, tmp_path: Path):
    text = script(shell)
    for command in COMMANDS:
        assert command in text
    if shutil.which(shell) and shell != "tcsh":
        (tmp_path / "script").write_text(text)
        done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_shell_that_starts_with_it_starts_no_python(tmp_path: Path):
    """The script alone knows everything; sourcing it takes milliseconds."""
    (tmp_path / "curriq.bash").write_text(script("bash"))
    began = time.perf_counter()
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path)}
    bash = shutil.which("bash") or "bash"
    subprocess.run([bash, "--norc", "-c", f"source {tmp_path / 'curriq.bash'}"], check=True, env=environment)
    assert time.perf_counter() - began < 2
