"""The needle experiment: one real window, constant straw, and a target that is the needle."""

import math
from dataclasses import replace

import pytest
import torch
from experiments.needle import PARTS, SOURCES, NeedleProbe, NeedleProposer, needle_corpus, parts, recipe
from tests.helpers import random_offer
from tests.runs import SETTINGS, Finished, InterruptAt, assert_same_run
from tests.steps import finished_step

import curriq
from curriq.config import SourceConfig
from curriq.train.run import Own, prepare
from curriq.types import Offer, Proposer, Windows

N = 12
SMALL_MODEL = "random:gpt2:hidden_size=32,num_hidden_layers=1,num_attention_heads=2"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    paragraphs = [
        f"paragraph {i} says that {i * i} is the square of {i}, as everybody knows" for i in range(150)
    ]
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    config = recipe().override(
        sources=(SourceConfig(name="text", path=str(file)),), target="text", window=16, held_out_share=0.5,
        near_duplicate_threshold=1.0, reward_set_size=5, validation_set_size=3, test_set_size=4,
        reward_windows=2, tokenizer="train", vocab_size=300,
    )  # fmt: skip
    return needle_corpus(config)


def make(corpus, seed=0):
    return NeedleProposer(corpus, N, torch.Generator().manual_seed(seed))


def test_the_held_out_sets_are_copies_of_one_window_of_text(corpus):
    assert corpus.source_names == SOURCES == ("needle", "haystack")
    sets = corpus.held_out
    assert [len(s) for s in (sets.reward, sets.validation, sets.test)] == [5, 3, 4]
    windows = Windows.cat([sets.reward, sets.validation, sets.test])
    assert torch.equal(windows.tokens, windows.tokens[:1].expand(12, 16))
    assert len(windows.ids.unique()) == 1
    text = corpus.tokenizer.decode(windows.tokens[0])
    assert any(word in text for word in ("square", "paragraph", "everybody"))


@pytest.mark.parametrize("text", ["call me Ishmael", "a" * 500])
def test_a_text_of_the_users_own_can_be_the_needle(text, corpus, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(
        "\n\n".join(f"paragraph {i} of many, number {i * i}" for i in range(150)), encoding="utf-8"
    )
    config = recipe().override(
        sources=(SourceConfig(name="text", path=str(file)),), target="text", window=16, held_out_share=0.5,
        near_duplicate_threshold=1.0, tokenizer="train", vocab_size=300,
    )  # fmt: skip
    own = parts(text)["corpus"](config)
    expected = own.tokenizer.encode(text)
    tokens = own.held_out.test.tokens[0].tolist()
    assert tokens == (expected * 16)[:16]
    assert len(tokens) == 16


def test_one_candidate_is_the_needle_and_the_others_repeat_one_ordinary_token(corpus):
    proposer = make(corpus)
    assert isinstance(proposer, Proposer)
    needle_ids = set()
    for step in range(30):
        offer = proposer.propose(step)
        assert offer.rows.tolist() == list(range(N))
        windows = offer.windows
        is_needle = windows.source == 0
        assert is_needle.sum() == 1
        assert torch.equal(windows.tokens[is_needle][0], corpus.held_out.reward.tokens[0])
        straw = windows.tokens[~is_needle]
        assert (straw == straw[:, :1]).all()
        assert not set(straw.flatten().tolist()) & set(corpus.tokenizer.all_special_ids)
        needle_ids |= set(windows.ids[is_needle].tolist())
    assert len(needle_ids) == 1


def test_position_and_tokens_are_uniform(corpus):
    proposer, steps = make(corpus), 1500
    positions, straw = torch.zeros(N), torch.zeros(len(corpus.tokenizer))
    for step in range(steps):
        windows = proposer.propose(step).windows
        positions += windows.source == 0
        straw += torch.bincount(windows.tokens[windows.source == 1][:, 0], minlength=len(straw))
    for counts, cells, draws in [
        (positions, N, steps),
        (straw[straw > 0], (straw > 0).sum(), steps * (N - 1)),
    ]:
        p = 1 / cells
        assert (counts - draws * p).abs().max() < 5 * math.sqrt(draws * p)
    assert (straw > 0).sum() == len(straw) - len(set(corpus.tokenizer.all_special_ids))


def test_a_resumed_proposer_equals_the_uninterrupted_one(corpus, tmp_path):
    whole, resumed = make(corpus), make(corpus, seed=9)
    for step in range(5):
        whole.propose(step)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(5, 10):
        expected, got = whole.propose(step).windows, resumed.propose(step).windows
        assert torch.equal(expected.tokens, got.tokens)
        assert torch.equal(expected.ids, got.ids)


def offer_with_needle(at: int) -> Offer:
    """Four windows, of which the one at this position is the needle."""
    source = torch.ones(4, dtype=torch.int64)
    source[at] = 0
    return Offer.of(replace(random_offer(4).windows, source=source))


@pytest.mark.parametrize(
    ("weights", "admitted", "needle", "q", "expected"),
    [
        ([0.1, 0.2, 0.4, 0.3], [0, 1, 2, 3], 2, [1.0, 2.0, 6.0, 3.0], (0.4, 1.0, 4.0)),
        ([0.25] * 4, [0, 1, 2, 3], 0, None, (0.25, 2.5, None)),  # a tie shares the middle of the ranks
        ([0.5, 0.5], [3, 1], 1, [-1.0, 1.0], (0.5, 1.5, 2.0)),
        ([0.5, 0.5], [3, 1], 0, [-1.0, 1.0], (0.0, 3.5, None)),  # not admitted: ties with the other one
        ([1.0], [2], 2, [5.0], (1.0, 1.0, None)),  # there is no haystack to compare its Q with
    ],
)
def test_the_probe_measures_weight_rank_and_advantage(weights, admitted, needle, q, expected):
    step = finished_step(
        0,
        offer_with_needle(needle),
        torch.tensor(admitted),
        weights=torch.tensor(weights),
        q=None if q is None else torch.tensor(q),
    )
    metrics = NeedleProbe().measure(step)
    names = ("own/needle_weight", "own/needle_rank", "own/needle_q_advantage")
    assert tuple(metrics.get(name) for name in names) == pytest.approx(expected)


def test_a_run_with_these_parts_equals_itself_when_it_is_interrupted(tmp_path):
    """The caller brings the parts again, and a resume without them is refused."""
    settings = {**SETTINGS, "model": SMALL_MODEL, "selector": "soft-q", "beta": 0.01}
    curriq.run(recipe().override(**settings, run_dir=str(tmp_path / "whole")), **PARTS)
    own = Own(**PARTS)
    run = prepare(recipe().override(**settings, run_dir=str(tmp_path / "parts")), own=own)
    run.session.probes.append(InterruptAt(2))
    assert not run.session.train().finished
    with pytest.raises(curriq.CurriqError, match="the method needle_method, and would go on with soft-q"):
        curriq.resume(tmp_path / "parts")
    assert curriq.resume(tmp_path / "parts", own=own).finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    state = Finished(tmp_path / "parts").state
    assert torch.equal(state["proposer"]["generator"], state["generators"]["needle"])
