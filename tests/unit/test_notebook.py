"""Results as notebooks show them, and the notebook of the examples, run cell by cell."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.runs import tiny

import curriq
from curriq.errors import CurriqError
from curriq.evaluate.result import Comparison
from curriq.runlog.notebook import Sparkline, run_html, table_html
from curriq.train.run import train

ROOT = Path(__file__).resolve().parents[2]
VOID = {"br", "img", "polyline"}


class Page(HTMLParser):
    """The cells of the tables of a fragment; it fails on tags that do not close, and on what acts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "style", "iframe", "link")
        assert not any(name.startswith("on") or name in ("href", "src") for name, _ in attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_run_shows_losses_course_and_shares(tmp_path: Path):
    result = train(tiny(run_dir=str(tmp_path / "run"), eval_every=1))
    page = Page(result._repr_html_())
    assert ["test loss", f"{result.summary['test_loss']:.4f}", ""] in page.rows
    for source, share in result.summary["weight_share"].items():
        assert [source, f"{result.summary['offered_share'][source]:.1%}", f"{share:.1%}"] in page.rows
    assert page.tags.count("svg") == 1
    (result.run_dir / "metrics.jsonl").unlink()
    assert "svg" not in Page(result._repr_html_()).tags


def test_an_interrupted_run_has_no_test_loss(tmp_path: Path):
    text = run_html(tmp_path, {"selector": "uniform", "finished": False, "steps": 3})
    assert "uniform, stopped after 3 steps" in text
    assert ["test loss", "–", ""] in Page(text).rows


def test_text_of_the_users_never_acts():
    evil = "<script>alert(1)</script>&\x1b[31m\u202e"
    text = table_html(evil, [evil], [[evil]], evil)
    assert "<script" not in text
    assert "\x1b" not in text
    assert Page(text).rows == [["<script>alert(1)</script>&\\x1b[31m\\u202e"]] * 2
    assert "<script" not in Sparkline([1.0, 2.0], evil).svg()


def test_a_sparkline_rises_where_values_do():
    points = Sparkline([1.0, 3.0, 2.0], "loss").svg(width=102, height=24).split('points="')[1].split('"')[0]
    assert points == "1.0,22.0 51.0,2.0 101.0,12.0"
    assert Sparkline([1.0], "loss").svg() == ""
    assert Sparkline([float("nan"), 1.0], "loss").svg() == ""
    assert "2.0 " in Sparkline([5.0, 5.0], "flat").svg()


def test_a_comparison_shows_its_verdicts(tmp_path: Path):
    runs = [{"finished": True, "curve": {"validation_loss": [6.0, end]}} for end in (5.0, 4.0)]
    judged = {"mean": -0.5, "low": -0.7, "high": -0.3, "p": 0.03, "seeds": 6, "test": "sign-flip"}
    judged |= {"verdict": "gain", "more_seeds": 0}
    arms = {
        "uniform": {"runs": runs, "test_loss": 5.0, "difference": None},
        "<b>": {"runs": [*runs, {"finished": False}], "test_loss": 4.5, "difference": judged},
    }
    result = {"streams": {"dirty": arms}, "baseline": "uniform"}
    (tmp_path / "comparison.json").write_text(json.dumps(result))
    comparison = curriq.read_comparison(tmp_path)
    assert comparison.result == result
    text = comparison._repr_html_()
    header, plain, ours = Page(text).rows
    assert header[0] == "arm"
    assert (plain[0], ours[0], ours[2]) == ("uniform", "<b>", "4.5000")
    assert any(cell.startswith("gain") for cell in ours)
    assert "from 6 to 4.5" in text  # the mean of the finished seeds


def test_a_folder_without_a_comparison_or_with_a_damaged_one(tmp_path: Path):
    with pytest.raises(CurriqError, match="does not exist"):
        curriq.read_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text("[")
    with pytest.raises(CurriqError, match="is damaged"):
        curriq.read_comparison(tmp_path)
    with pytest.raises(CurriqError, match="cannot be read"):
        Comparison(tmp_path, {"streams": {"s": 3}})._repr_html_()


@pytest.mark.long
def test_the_notebook_runs(tmp_path: Path):
    """Its code cells in their order, the last expression of each shown as Jupyter would show it."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    program = (
        "import ast, sys\nnames = {}\n"
        f"for cell in {cells!r}:\n"
        "    body = ast.parse(cell).body\n"
        "    last = body.pop() if isinstance(body[-1], ast.Expr) else None\n"
        "    exec(compile(ast.Module(body, []), 'cell', 'exec'), names)\n"
        "    if last is not None:\n"
        "        value = eval(compile(ast.Expression(last.value), 'cell', 'eval'), names)\n"
        "        print(getattr(value, '_repr_html_', lambda: repr(value))())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "MPLBACKEND": "Agg"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("What the model learned from") == 2
    assert done.stdout.count("<svg") == 2
    assert "parameters in runs/soft-q-0/checkpoints/step-00000060/lm" in done.stdout
