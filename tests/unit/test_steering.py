"""When a policy began to select, by what evidence, and what it kept: from logs written by hand."""

import math

import numpy as np
import pytest
import torch
from tests.reports import write_run

from curriq.presets import preset
from curriq.report.chart import Table
from curriq.report.data_mix import source_preferences
from curriq.report.runlog import Detail, load_run_log
from curriq.report.side_by_side import comparison_learned
from curriq.report.steering import Steering, steering_of, what_was_kept
from curriq.report.summary import print_summary
from curriq.report.topics import find_topics
from curriq.runlog.read import Columns
from curriq.select.soft_q import few_probes
from curriq.softq.temperature import CalibrationGate, rank_correlation


def columns(rows: list[dict[str, float]]) -> Columns:
    names = {name for row in rows for name in row}
    found = {}
    for name in names:
        where = [i for i, row in enumerate(rows) if name in row]
        found[name] = (np.array(where), np.array([rows[i][name] for i in where], dtype=float))
    return Columns(found, len(rows))


def log(steps: int, *, opens: int | None, rejects_from: int = 10**9, every: int = 4) -> Columns:
    """N = 8 a step; a probe every so many steps; from `opens` on the gate is open and β is finite a step
    later; from `rejects_from` on as many are rejected as accepted."""
    rows, read = [], 0
    for step in range(steps):
        read += 16 if step >= rejects_from else 8
        row = {"step": step, "x/windows_proposed": 8 * (step + 1), "x/windows_read": read}
        if step % every == 0:
            open_now = opens is not None and step >= opens
            row |= {
                "gate/confidence": 0.5 * open_now,
                "gate/calibration": 0.01 * step,
                "gate/calibration_error": 0.125,
            }
        if opens is not None and step > opens:
            row["policy/beta"] = 0.1
        rows.append(row)
    return columns(rows)


class TestWhen:
    def test_the_gate_opens_at_a_probe_and_q_selects_from_the_next_step_on(self):
        found = Steering.of(log(40, opens=20, rejects_from=21))
        assert (found.q_from, found.rejected_from, found.accepted_before) == (21, 21, 1.0)
        first, second = found.sentences(filters=True, prior=False)
        assert first == (
            "Q selected from step 21 of 40 on: the gate opened after 6 probes, rank correlation with the "
            "measured effects +0.20 ± 0.12."
        )
        assert second.startswith("Until then")
        assert second.endswith("every window read was accepted, which is plain training.")

    def test_a_gate_that_never_opened_says_how_much_evidence_there_was(self):
        found = Steering.of(log(32, opens=None, rejects_from=0))
        (said,) = found.sentences(filters=True, prior=True)
        assert "Q selected in no step of 32" in said
        assert "8 probes, rank correlation with the measured effects +0.28 ± 0.12" in said
        assert "the static prior alone chose: it accepted 50% of what was read" in said

    def test_weights_instead_of_a_filter(self):
        (said,) = Steering.of(log(32, opens=None)).sentences(filters=False, prior=False)
        assert said.endswith("All along all weighed alike.")

    def test_a_beta_from_before_the_gate_opened_is_none(self):
        """Earlier versions logged β = 1 until the first probe of a Q that differs between windows."""
        rows = [
            {"step": k, "x/windows_proposed": 8 * (k + 1), "x/windows_read": 8 * (k + 1)} for k in range(9)
        ]
        for row in rows[:5]:
            row["policy/beta"] = 1.0
        rows[4] |= {"gate/confidence": 0.0, "gate/calibration": 0.0, "gate/calibration_error": 1.0}
        assert Steering.of(columns(rows)).q_from is None

    def test_without_a_gate_there_is_nothing_to_wait_for(self):
        rows = [
            {"step": k, "x/windows_proposed": 8 * (k + 1), "x/windows_read": 8 * (k + 1)} for k in range(9)
        ]
        assert Steering.of(columns(rows)).sentences(filters=False, prior=False) == []
        (said,) = Steering.of(columns([row | {"x/windows_read": 80} for row in rows])).sentences(
            filters=True, prior=False
        )
        assert said == "The filter rejected windows from step 0 on."


class TestFewProbes:
    @pytest.mark.parametrize("windows", [16, 32])
    def test_the_gate_has_opened_by_then_with_the_probability_that_is_promised(self, windows: int):
        """Simulated: a Q whose ranks correlate by as much as full confidence asks for."""
        gate = CalibrationGate(0.5)
        needed = gate.probes_to_open(windows)
        generator, opened, runs = torch.Generator().manual_seed(0), 0, 300
        for _ in range(runs):
            gate = CalibrationGate(0.5)
            for _ in range(int(needed)):
                q, noise = torch.randn(2, windows, generator=generator, dtype=torch.float64)
                r = 2 * math.sin(math.pi * 0.2 / 6)  # Pearson's for a Spearman's of 0.2
                gate._evidence.add(rank_correlation(q, r * q + math.sqrt(1 - r**2) * noise))
            opened += gate.confidence > 0
        assert 0.7 <= opened / runs <= 0.92

    def test_by_chance_it_opens_seldom_and_not_for_long(self):
        generator, runs, probes, windows = torch.Generator().manual_seed(0), 400, 24, 16
        opened = steps_open = 0
        for _ in range(runs):
            gate, open_now = CalibrationGate(0.5), []
            for _ in range(probes):
                q, effect = torch.randn(2, windows, generator=generator, dtype=torch.float64)
                gate._evidence.add(rank_correlation(q, effect))
                open_now.append(gate.confidence > 0)
            opened += any(open_now)
            steps_open += sum(open_now)
        assert opened / runs == pytest.approx(1 / 6, abs=0.05)
        assert steps_open / runs / probes == pytest.approx(0.03, abs=0.01)

    def test_never_with_windows_that_cannot_show_it(self):
        assert CalibrationGate(0.5).probes_to_open(1) == math.inf
        assert CalibrationGate(0.5).probes_to_open(4) == math.inf  # the memory forgets faster than it learns
        assert CalibrationGate(0.5).probes_to_open(100_000) == 4  # there are no bounds before

    def test_a_short_run_is_told_what_would_do(self):
        config = preset("recommended").override(steps=60)
        said = few_probes(config)
        assert "--steps 60 with --reward-every 16 gives Q 4 probes" in said
        assert "the static prior alone chooses" in said
        every = int(said.split("--reward-every ")[2].split(",")[0])
        assert few_probes(config.override(reward_every=every)) == ""
        steps = int(said.split("--steps ")[2].split()[0])
        assert few_probes(config.override(steps=steps + 16)) == ""

    @pytest.mark.parametrize("name", ["default", "langevin-rag", "paper", "dsir"])
    def test_runs_without_a_gate_that_matters_are_not_warned(self, name: str):
        assert few_probes(preset(name).override(steps=3)) == ""

    def test_the_presets_as_they_are_have_enough(self):
        assert few_probes(preset("recommended")) == few_probes(preset("weighted")) == ""


class TestKept:
    def test_words_tell_the_accepted_from_the_rejected(self):
        rng = np.random.default_rng(0)
        ours = [
            " ".join(rng.choice(["harvest", "village", "river", "common", "shared"], 8)) for _ in range(60)
        ]
        theirs = [
            " ".join(rng.choice(["import", "class", "return", "common", "shared"], 8)) for _ in range(60)
        ]
        topics = find_topics(ours + theirs, 2)
        assert topics is not None
        first = np.arange(120) < 60
        kept, passed = topics.distinctive(first, ~first)
        assert set(kept) == {"harvest", "village", "river"}
        assert set(passed) == {"import", "class", "return"}

    def test_groups_of_one_kind_have_no_words_of_their_own(self):
        rng = np.random.default_rng(1)
        texts = [" ".join(rng.choice([f"word{chr(97 + i)}" for i in range(20)], 8)) for _ in range(400)]
        topics = find_topics(texts, 4)
        assert topics is not None
        even = np.arange(400) % 2 == 0
        assert topics.distinctive(even, ~even) == ([], [])

    def test_means_are_those_of_the_windows_read_and_of_those_selected(self, tmp_path):
        run = load_run_log(write_run(tmp_path, steps=30, steered=True), "run", Detail())
        kept = what_was_kept(run)
        assert kept is not None
        loss = next(row for row in kept.rows if row[0].startswith("loss"))
        assert loss[1:] == ["–", f"{np.mean([6 - 3 * k / 30 for k in range(30)]):.3f}"]

    def test_of_a_buffer_only_what_was_retrieved_is_known(self, tmp_path):
        write_run(tmp_path, steps=30)
        text = (tmp_path / "config.toml").read_text().replace('proposer = "stream"', 'proposer = "langevin"')
        (tmp_path / "config.toml").write_text(text)
        assert what_was_kept(load_run_log(tmp_path, "run", Detail())) is None


EVEN = {"prose": 0.5, "code": 0.5}
COUNTS = {"windows_read": 48, "windows_proposed": 48, "windows_trained": 48, "effective_windows": 48.0}
FIELDS = {
    "selector": "soft-q", "steps": 6, **COUNTS, "tokens": 1, "flops": 1, "seconds": 1.0,
    "weight_share": EVEN, "offered_share": EVEN, "checkpoint": "checkpoints/step-00000006",
}  # fmt: skip


class TestSummary:
    def test_an_interrupted_run_gets_no_verdict(self, tmp_path, capsys):
        write_run(tmp_path, steps=40)
        print_summary(tmp_path, FIELDS | {"finished": False})
        said = " ".join(capsys.readouterr().out.split())
        assert f"interrupted at step 6 of 40: resume with `curriq resume {tmp_path}`" in said
        assert "Too early for a verdict." in said
        assert "selected nothing" not in said
        assert "ratio" not in said

    def test_a_damaged_log_does_not_end_a_finished_run(self, tmp_path, capsys):
        write_run(tmp_path, steps=40)
        (tmp_path / "metrics.jsonl").write_text("{\n")
        done = {"finished": True, "test_loss": 3.0, "test_perplexity": 20.0}
        print_summary(tmp_path, FIELDS | done)
        said = " ".join(capsys.readouterr().out.split())
        assert "selected nothing" in said
        assert "is not known" in said
        assert "model" in said


class TestSideBySide:
    def test_arms_stand_beside_each_other(self, tmp_path):
        folders = {
            "uniform": [write_run(tmp_path / f"u{seed}", steps=40, seed=seed) for seed in range(2)],
            "shifted": [write_run(tmp_path / f"s{seed}", steps=40, shift=0, seed=seed) for seed in range(2)],
        }
        runs = {arm: [load_run_log(f, f.name, Detail()) for f in of] for arm, of in folders.items()}
        result = {"baseline": "uniform", "streams": {"default": dict.fromkeys(runs)}}
        section = comparison_learned(result, {("default", arm): of for arm, of in runs.items()})
        assert section is not None
        assert section.answer.startswith("shifted gave prose ")
        table = next(b for b in section.blocks if isinstance(b, Table) and "by source" in b.title)
        assert table.header == ["source", "offered", "uniform", "shifted"]
        weight = np.mean([source_preferences(run).totals()[0][2] for run in runs["shifted"]])
        assert table.rows[0][3].startswith(f"{weight:.1%} (×")
        charts = {chart.id: chart for chart in section.charts()}
        lines = charts["weight-default-0"].series
        assert [line.label for line in lines] == ["uniform", "shifted"]
        assert lines[1].y.mean() > lines[0].y.mean() + 0.2

    def test_nothing_without_finished_runs(self):
        assert comparison_learned({"baseline": "a", "streams": {"default": {"a": None}}}, {}) is None


def test_offered_is_what_was_read_into_the_buffer(tmp_path):
    """600 windows of the first source fill the buffer; the weight lies on what is retrieved of both."""
    write_run(tmp_path, steps=10)
    config = tmp_path / "config.toml"
    config.write_text(config.read_text().replace('proposer = "stream"', 'proposer = "langevin"'))
    rows = [line.replace("}", "") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    read = [600, *[8] * 9]
    lines = []
    for row, n in zip(rows, read, strict=True):
        prose = 1.0 if n == 600 else 0.0
        kept = [part for part in row.strip("{").split(", ") if "offered_share" not in part]
        kept += [f'"select/offered_share/prose": {prose}', f'"select/offered_share/code": {1 - prose}']
        lines.append("{" + ", ".join([*kept, f'"data/windows_read": {n}']) + "}\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    run = load_run_log(tmp_path, "run", Detail())
    (_, prose, _), (_, code, _) = source_preferences(run).totals()
    assert (prose, code) == pytest.approx((600 / 672, 72 / 672))
    assert steering_of(run) == []
