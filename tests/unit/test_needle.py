"""The needle experiment: one real window, constant straw, and a target that is the needle."""

import math

import pytest
import torch

from curriq.config import RunConfig, SourceConfig
from curriq.select.needle import NeedleProposer, needle_corpus
from curriq.types import Proposer

N = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    paragraphs = [
        f"paragraph {i} says that {i * i} is the square of {i}, as everybody knows" for i in range(150)
    ]
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    config = RunConfig().override(
        sources=(SourceConfig(name="text", path=str(file)),), target="text", window=16, held_out_share=0.5,
        near_duplicate_threshold=1.0, reward_set_size=5, validation_set_size=3, test_set_size=4,
        reward_windows=2, tokenizer="train", vocab_size=300, needle=True,
    )  # fmt: skip
    return needle_corpus(config)


def make(corpus, seed=0):
    return NeedleProposer(corpus, N, torch.Generator().manual_seed(seed))


def test_the_held_out_sets_are_copies_of_one_window_of_text(corpus):
    assert corpus.source_names == ("needle", "haystack")
    sets = corpus.held_out
    assert [len(s) for s in (sets.reward, sets.validation, sets.test)] == [5, 3, 4]
    windows = torch.cat([sets.reward, sets.validation, sets.test])
    assert torch.equal(windows, windows[:1].expand(12, 16))
    assert any(word in corpus.tokenizer.decode(windows[0]) for word in ("square", "paragraph", "everybody"))


def test_one_candidate_is_the_needle_and_the_others_repeat_one_ordinary_token(corpus):
    proposer = make(corpus)
    assert isinstance(proposer, Proposer)
    needle_ids = set()
    for step in range(30):
        batch = proposer.propose(step)
        assert batch.rows.tolist() == list(range(N))
        is_needle = batch.source == 0
        assert is_needle.sum() == 1
        assert torch.equal(batch.tokens[is_needle][0], corpus.held_out.reward[0])
        straw = batch.tokens[~is_needle]
        assert (straw == straw[:, :1]).all()
        assert not set(straw.flatten().tolist()) & set(corpus.tokenizer.all_special_ids)
        needle_ids |= set(batch.window_ids[is_needle].tolist())
    assert len(needle_ids) == 1


def test_position_and_tokens_are_uniform(corpus):
    proposer, steps = make(corpus), 1500
    positions, straw = torch.zeros(N), torch.zeros(len(corpus.tokenizer))
    for step in range(steps):
        batch = proposer.propose(step)
        positions += batch.source == 0
        straw += torch.bincount(batch.tokens[batch.source == 1][:, 0], minlength=len(straw))
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
        expected, got = whole.propose(step), resumed.propose(step)
        assert torch.equal(expected.tokens, got.tokens)
        assert torch.equal(expected.window_ids, got.window_ids)
