"""The report of a run whose stream filter rejects half of what it reads: `offered` is all that was read."""

import pytest
from tests.reports import write_run

from curriq.report.chart import Table
from curriq.report.data_mix import learned_from
from curriq.report.explore import explorer
from curriq.report.policy import policy_health
from curriq.report.runlog import Detail, load_run_log
from curriq.runlog.read import read_summary
from curriq.runlog.writers import write_summary


def test_rejected_windows_count_as_offered(tmp_path):
    run = load_run_log(write_run(tmp_path, steps=30, steered=True), "run", Detail())
    assert run.accepted == 0.5
    learned = learned_from(run)
    assert learned.answer.startswith(
        "50% of the windows read were accepted, the others rejected. Acceptance gave prose"
    )
    sources, topics, kept = (
        next(block for block in learned.blocks if isinstance(block, Table) and block.title.startswith(title))
        for title in ("Sources", "Topics", "What it kept")
    )
    assert kept.rows[0][0].startswith("loss")
    assert kept.rows[0][1] == "–"  # a rejected window has none
    assert sources.header[-2:] == ["read", "accepted"]
    read, accepted = (sum(int(row[i].replace(",", "")) for row in sources.rows) for i in (-2, -1))
    assert (read, accepted) == (30 * 16, 30 * 8)
    prose, code = ({row[0]: float(row[3]) for row in sources.rows}[name] for name in ("prose", "code"))
    assert prose == pytest.approx(2, abs=0.2)  # its weights are noise around uniform
    assert code < 1
    assert max(float(row[3]) for row in topics.rows) > 1.2  # topics follow: code is rejected


def test_charts_of_uniform_weights_give_way_to_the_share_accepted(tmp_path):
    policy = policy_health(load_run_log(write_run(tmp_path, steered=True), "run", Detail()))
    charts = {chart.id: chart for chart in policy.charts()}
    assert set(charts["accepted"].series[0].y) == {0.5}
    assert not {"entropy", "effective-batch"} & set(charts)
    assert "the stream filter accepted 50% of the windows read" in policy.answer


def test_the_explorer_shows_them_with_their_acceptance_probability(tmp_path):
    section = explorer(load_run_log(write_run(tmp_path, steered=True), "run", Detail(steps=3, rows=6)))
    (block,) = section.blocks
    content = block.content
    assert content["order"] == "accept_prob"
    assert content["columns"]["accept_prob"] == [1, 1, 1, 0.25, 0.25, 0.25] * 3
    assert content["columns"]["loss"][3] is None
    assert all(content["texts"])


def test_a_plain_stream_rejects_nothing(tmp_path):
    assert load_run_log(write_run(tmp_path), "run", Detail()).accepted is None


def test_a_replay_does_not_claim_the_choice(tmp_path):
    folder = write_run(tmp_path)
    write_summary(folder, read_summary(folder) | {"selector": "replay"})
    assert learned_from(load_run_log(folder, "run", Detail())).answer.startswith("A replay:")
