"""Scaled-down runs of `paper` and `paper-langevin`: their reports show all quantities of Sections 3.6 and
4.3, and each agrees with what the saved run gives by other means."""

import logging
import tomllib
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.numerics.test_algorithm2 import Reference
from tests.runs import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from curriq.config import load_run_config
from curriq.data import open_corpus
from curriq.data.encoder import load_encoder
from curriq.data.tokenizer import ordinary_ids
from curriq.presets import own_settings, paper_differences, preset
from curriq.report.chart import Chart
from curriq.report.command import build
from curriq.report.look import asset
from curriq.rng import Generators
from curriq.runlog.read import read_candidates, read_metrics, read_queries, read_windows
from curriq.train.run import train

STEPS, N, K, L = 8, 6, 6, 8
GPT2 = "random:gpt2:hidden_size=32,num_hidden_layers=2,num_attention_heads=2"

EXPLORATION = {"policy/entropy", "policy/beta", "policy/effective_batch_size", "policy/kl_from_uniform"}
Q_DYNAMICS = {"critic/q_mean", "critic/q_std", "critic/soft_value", "critic/td_loss", "critic/td_target"}
CREDIT = {"critic/recovered_scale", "critic/effect_correlation", "policy/action"}
TOPIC = {"topic/selected", "topic/forwarded", "topic/best_q", "topic/action"}
SECTION_43 = EXPLORATION | Q_DYNAMICS | CREDIT | TOPIC
Q_GAIN = {"langevin/annealed_q_gain", "langevin/soft_q_gain", "langevin/hard_q_gain", "langevin/hard_q_best"}
BASELINE = {"langevin/random_q", "langevin/random_soft_q"}
SHARPNESS = {"langevin/entropy", "langevin/max_prob"}
DIVERSITY = {"langevin/soft_cosine", "langevin/jaccard"}
GRADIENT = {"langevin/grad_norm", "langevin/clip_fraction"}
TIMING = {"time/search", "time/retrieve", "time/train", "time/reward"}
SECTION_36 = Q_GAIN | BASELINE | SHARPNESS | DIVERSITY | GRADIENT | TIMING


BY_CODE = {
    "q": {"critic/q_mean", "critic/q_std"},
    "credit-signal": {"critic/recovered_scale"},
    "calibration-rank": {"critic/effect_correlation"},
}
"""Charts whose lines the code makes, and what they show."""


def configure(name: str, folder: Path, **more: Any):
    """The preset's method at the size of a test."""
    shape = ("sources", "target", "window", "model", "held_out_share", "reward_set_size", "test_set_size")
    sizes = ("validation_set_size", "reward_windows", "steps", "num_candidates", "eval_every", "micro_batch")
    method = {key: value for key, value in own_settings(name).items() if key not in shape + sizes}
    method |= {"checkpoint_every": STEPS // 2, "lm_lr": 1e-3, "measure_effects": True, "probe_windows": 5}
    method |= {"topic_similarity_every": 2, "topic_encoder": "hashing", "beta": 0.05}
    if name == "paper-langevin":
        search = {"langevin_margin": 3.0, "langevin_step_size": 1.0, "energy_temperature": 1e-3}
        method |= search | {"chains": K, "query_tokens": L, "langevin_steps": 5, "encoder": "hashing"}
        method |= {"buffer_size": 64, "ingest": 16, "retrieval_top_k": 4}
    size = {"model": GPT2, "steps": STEPS, "num_candidates": N, "reward_windows": 4, "run_dir": str(folder)}
    return tiny(**method | size | more)


@pytest.fixture(scope="module", params=["random", "pretrained"])
def model(request) -> str:
    if request.param == "random":
        return GPT2
    return str(request.getfixturevalue("shared_data") / "stories260k")


@pytest.fixture(scope="module")
def discrete(model, tmp_path_factory) -> Path:
    return train(configure("paper", tmp_path_factory.mktemp("paper") / "run", model=model)).run_dir


@pytest.fixture(scope="module", params=["paper", "paper-langevin"])
def either(request, discrete, langevin) -> Path:
    return discrete if request.param == "paper" else langevin


@pytest.fixture(scope="module")
def langevin(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("langevin") / "run"
    return train(configure("paper-langevin", folder, model=model)).run_dir


def drawn_metrics(folder: Path) -> set[str]:
    """Metrics of the charts of the page that have a line."""
    metrics = {
        id: entry.get("metrics", [])
        for section in tomllib.loads(asset("charts.toml")).values()
        for id, entry in section.items()
    }
    report = build([folder])
    charts = [
        block
        for _, sections in report.runs
        for section in sections
        for block in section.blocks
        if isinstance(block, Chart)
    ]
    found = set()
    for chart in charts:
        lines = {line.label.lower() for line in chart.series if len(line.y)}
        names = metrics.get(chart.id, [])
        found |= {name for name in names if name.rpartition("/")[2].replace("_", " ").lower() in lines}
        if chart.id in ("time", "rag-time"):
            found |= {f"time/{label}" for label in lines}
        found |= BY_CODE.get(chart.id, set()) if lines else set()
    return found


def by_step(table: dict[str, list], column: str) -> list[np.ndarray]:
    steps, values = np.array(table["step"]), np.array(table[column], dtype=float)
    return [values[steps == step] for step in range(STEPS)]


def test_the_report_shows_the_policy_q_credit_and_topic(either):
    assert not SECTION_43 - drawn_metrics(either)


def test_the_report_shows_the_search(langevin):
    assert not SECTION_36 - drawn_metrics(langevin)


def test_policy_and_q_follow_from_the_candidates_table(either):
    rows, table = read_metrics(either), read_candidates(either).to_pydict()
    columns = {name: by_step(table, name) for name in ("q", "weight", "loss", "effect")}
    for k, row in enumerate(rows):
        q, weight = columns["q"][k], columns["weight"][k]
        policy = np.exp((q - q.max()) / row["policy/beta"])
        policy /= policy.sum()
        np.testing.assert_allclose(weight, policy, rtol=2e-4)
        entropy = -(policy * np.log(policy)).sum()
        assert row["policy/entropy"] == pytest.approx(entropy, rel=1e-4)
        assert row["policy/kl_from_uniform"] == pytest.approx(np.log(len(q)) - entropy, abs=1e-5)
        assert row["policy/effective_batch_size"] == pytest.approx(1 / (policy**2).sum(), rel=1e-3)
        assert row["critic/q_mean"] == pytest.approx(q.mean(), rel=1e-4, abs=1e-6)
        assert row["critic/q_std"] == pytest.approx(q.std(), rel=1e-3, abs=1e-6)
        assert row["train/loss"] == pytest.approx(weight @ columns["loss"][k], rel=1e-5)
        assert 0 <= row["policy/action"] < len(q)
        if k:
            target = 0.1 * rows[k - 1]["reward"] + 0.9 * row["critic/soft_value"]
            assert row["critic/td_target"] == pytest.approx(target, rel=1e-5)
            error = row["critic/q_pred"] - row["critic/td_target"]
            assert row["critic/td_loss"] == pytest.approx(error**2 / 2, rel=1e-3, abs=1e-9)


def test_the_credit_signal_follows_from_the_candidates_table(discrete):
    table = read_candidates(discrete).to_pydict()
    sums = np.zeros(2)
    for row, q, effect in zip(
        read_metrics(discrete), by_step(table, "q"), by_step(table, "effect"), strict=True
    ):
        known = ~np.isnan(effect)
        if not known.any():  # before the optimizer's first step
            continue
        x, y = effect[known] - effect[known].mean(), q[known] - q[known].mean()
        sums = sums * (1 - 1 / 20) + [x @ x, x @ y]
        assert row["critic/recovered_scale"] == pytest.approx(sums[1] / sums[0], rel=5e-3, abs=1e-3)


def test_topic_similarity_follows_from_the_windows_table(either):
    rows, table, windows = read_metrics(either), read_candidates(either).to_pydict(), read_windows(either)
    decoded = windows.texts(np.arange(len(windows)), special=True)
    texts = dict(zip(windows.ids.tolist(), decoded, strict=True))
    encoder, corpus = load_encoder("hashing"), open_corpus(load_run_config(either))
    centre = encoder.encode(corpus.tokenizer.batch_decode(corpus.held_out.reward.tokens.tolist())).mean(0)
    centre /= np.linalg.norm(centre)
    ids, steps = np.array(table["window_id"]), np.array(table["step"])
    weights = by_step(table, "weight")
    for k in range(0, STEPS, 2):
        similarity = encoder.encode([texts[w] for w in ids[steps == k].tolist()]) @ centre
        assert rows[k]["topic/forwarded"] == pytest.approx(similarity.mean(), abs=1e-4)
        assert rows[k]["topic/selected"] == pytest.approx(weights[k] @ similarity, abs=1e-4)
        assert rows[k]["topic/action"] == pytest.approx(similarity[int(rows[k]["policy/action"])], abs=1e-4)
        assert "topic/forwarded" not in rows[k + 1]


def test_the_search_follows_from_the_queries_table(langevin):
    rows, table = read_metrics(langevin), read_queries(langevin).to_pydict()
    q, start, changed = (by_step(table, name) for name in ("q", "start_q", "changed"))
    for k, row in enumerate(rows):
        assert row["langevin/hard_q"] == pytest.approx(q[k].mean(), rel=1e-4, abs=1e-6)
        assert row["langevin/hard_q_best"] == pytest.approx(q[k].max(), rel=1e-5)
        assert row["langevin/hard_q_sd"] == pytest.approx(q[k].std(), rel=1e-3, abs=1e-6)
        assert row["langevin/hard_q_gain"] == pytest.approx((q[k] - start[k]).mean(), abs=1e-5)
        assert row["langevin/tokens_changed"] == pytest.approx(changed[k].mean(), abs=1e-6)
        difference = row["langevin/hard_q"] - row["langevin/random_q"]
        assert row["langevin/above_random"] == pytest.approx(difference, abs=1e-6)
        parts = sum(row[name] for name in TIMING)
        assert parts <= row["time/step"]
    assert max(row["langevin/tokens_changed"] for row in rows) > 0


def test_soft_diagnostics_follow_from_the_saved_model(langevin):
    """The search of the step after a checkpoint, again from the saved θ, φ and generators in float64."""
    config, (checkpoint, _) = load_run_config(langevin), sorted((langevin / "checkpoints").iterdir())
    if config.lm.model != GPT2:
        pytest.skip("the reference reads GPT-2's layers")
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    k = state["loop"]["step"]
    search = Reference.__new__(Reference)
    search.precision = torch.float32
    search.config = config
    search.network = AutoModelForCausalLM.from_pretrained(checkpoint / "lm").double().eval()
    search.tokenizer = AutoTokenizer.from_pretrained(checkpoint / "lm")
    search.vocabulary = torch.from_numpy(ordinary_ids(search.tokenizer))
    saved = state["critic"]["online"]
    names = ("layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias")
    search.phi = [saved[name].double().requires_grad_() for name in names]
    search.draws = Generators(config.train.seed)
    search.draws.load_state_dict(state["generators"])
    _, expected = search.search()
    row = read_metrics(langevin)[k]
    assert SECTION_36 & expected.keys() >= (Q_GAIN | SHARPNESS | DIVERSITY | GRADIENT) & expected.keys()
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name


def test_windows_may_be_retrieved_again_in_the_papers_form(langevin):
    table = read_candidates(langevin).to_pydict()
    assert len(set(table["window_id"])) < len(table["window_id"])
    for a, b in combinations(range(len(table["step"])), 2):
        if table["step"][a] == table["step"][b]:
            assert table["window_id"][a] != table["window_id"][b]  # deduplicated within a step


def test_a_literal_run_names_what_it_does_otherwise(caplog, tmp_path):
    with caplog.at_level(logging.INFO, logger="curriq"):
        train(configure("paper", tmp_path / "run", steps=1))
    assert "follows the paper's lines, except: " in caplog.text
    assert "without dropout" in caplog.text


@pytest.mark.parametrize("change", [{}, {"dropout": 0.1}, {"td_into_theta": True}, {"q_replay_size": 8}])
def test_literal_settings_are_recognised(change):
    assert paper_differences(preset("paper").override(**change))
    assert any(
        "a_k is drawn" in text for text in paper_differences(preset("paper-langevin").override(**change))
    )


@pytest.mark.parametrize(
    "change",
    [
        {"reforward_action": False},
        {"reward": "paired"},
        {"temperature": "learned"},
        {"train_on": "action"},
        {"td_into_theta": True, "td_step": "joint"},
    ],
)
def test_other_rules_make_no_such_claim(change):
    assert not paper_differences(preset("paper").override(**change))
    assert not paper_differences(preset("recommended"))


def test_peak_memory_is_at_least_the_model(discrete):
    (last,) = read_metrics(discrete)[-1:]
    folder = max((discrete / "checkpoints").iterdir())
    weights = load_file(folder / "lm" / "model.safetensors")
    assert last["memory/peak"] > sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    assert torch.tensor(last["memory/peak"]).isfinite()
