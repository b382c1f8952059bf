"""The stream: what is in it, in which proportions, and that it resumes exactly."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curriq.config import DataConfig, SourceConfig
from curriq.data.corruption import Duplicates
from curriq.data.documents import Document, MemorySource
from curriq.data.split import ContaminationFilter, SplitRule, build_held_out
from curriq.data.stream import (
    DecontaminatedSource,
    SourceMix,
    SourceReader,
    StreamProposer,
    WindowStream,
    check_fingerprint,
)
from curriq.errors import CurriqError
from curriq.types import Proposer

WORDS = [f"w{i}" for i in range(1000)]
T = 8
NOTHING_HELD_OUT = ContaminationFilter(SplitRule(1e-12, {"reward": 1, "validation": 1, "test": 1}), 1.0)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", *WORDS])}, unk_token="<eos>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")


def documents(count, seed, labels=False):
    rng = np.random.default_rng(seed)
    return [
        Document(" ".join(rng.choice(WORDS, rng.integers(1, 30))), float(i) if labels else math.nan)
        for i in range(count)
    ]


def make_stream(tokenizer, *, seed=0, weights=(0.5, 0.2, 0.3), dirts=("none", "shuffled-tokens", "ocr"),
                counts=(50, 40, 3), buffer=16, guard=NOTHING_HELD_OUT, labelled=True):  # fmt: skip
    readers = {}
    for i, (weight, corruption, count) in enumerate(zip(weights, dirts, counts, strict=True)):
        if weight > 0:
            source = MemorySource(f"s{i}", documents(count, i, labels=i == 0), seed)
            guarded = DecontaminatedSource(source, guard, of_target=i == 0)
            readers[i] = SourceReader(guarded, corruption, tokenizer, T, seed)
    mix = SourceMix(readers=readers, weights=weights, labelled=labelled)
    generator = torch.Generator().manual_seed(seed)
    return WindowStream(mix, buffer, generator, {"seed": str(seed), "T": str(T)})


def assert_equal_batches(left, right):
    for name in ("tokens", "window_ids", "source", "rows"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    torch.testing.assert_close(left.difficulty, right.difficulty, rtol=0, atol=0, equal_nan=True)
    assert left.metrics == right.metrics


def test_a_batch_has_the_documented_form(tokenizer):
    proposer = StreamProposer(make_stream(tokenizer), 5)
    assert isinstance(proposer, Proposer)
    batch = proposer.propose(0)
    assert batch.tokens.shape == (5, T)
    assert batch.tokens.dtype == batch.window_ids.dtype == torch.int64
    assert batch.rows.tolist() == list(range(5))
    batch = make_stream(tokenizer).next_batch(300)
    assert torch.isnan(batch.difficulty[batch.source != 0]).all()
    assert not torch.isnan(batch.difficulty[batch.source == 0]).any()
    assert make_stream(tokenizer, labelled=False).next_batch(5).difficulty is None


def test_without_shuffling_one_source_is_its_documents_in_order(tokenizer):
    texts = documents(30, 5)
    source = MemorySource("web", texts, 3)
    expected = [tokenizer.convert_tokens_to_ids(w) for _ in range(2) for d in iter(source.next_document, None)
                for w in [*d.text.split(), "<eos>"]]  # fmt: skip
    reader = SourceReader(MemorySource("web", texts, 3), "none", tokenizer, T, 0)
    stream = WindowStream(SourceMix(readers={0: reader}, weights=[2.0]), 1, torch.Generator(), {})
    got = stream.next_batch(len(expected) // T).tokens.flatten().tolist()
    assert got == expected[: len(got)], "two epochs laid end to end"


def test_the_buffer_emits_every_window_once(tokenizer):
    ordered = make_stream(tokenizer, weights=(1,), dirts=("none",), counts=(400,), buffer=1).next_batch(500)
    shuffled = make_stream(tokenizer, weights=(1,), dirts=("none",), counts=(400,), buffer=64)
    ids = shuffled.next_batch(500 - 63).window_ids.tolist()
    assert set(ids) <= set(ordered.window_ids.tolist())
    assert len(set(ids)) == len(ids)
    position = {window: i for i, window in enumerate(ordered.window_ids.tolist())}
    # An element waits for a geometric time of mean 64 in the buffer, so the places move by about as much.
    moves = [position[window] - i for i, window in enumerate(ids)]
    assert max(moves) == 63 or max(moves) > 55, "nothing comes before it has been read"
    assert 40 < np.std(moves) < 90


def test_sources_are_mixed_by_weight(tokenizer):
    weights, n = (3.0, 0.0, 5.0, 2.0), 3000
    stream = make_stream(tokenizer, weights=weights, dirts=("none",) * 4, counts=(50, 5, 50, 50))
    counts = torch.bincount(stream.next_batch(n).source, minlength=4).tolist()
    for count, weight in zip(counts, weights, strict=True):
        p = weight / sum(weights)
        assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def test_a_resumed_stream_equals_the_uninterrupted_one_from_any_point(tokenizer, tmp_path):
    whole, uninterrupted = make_stream(tokenizer), []
    for step in range(48):
        if step in (0, 1, 2, 7, 19, 30):
            torch.save(whole.state_dict(), tmp_path / f"{step}.pt")
        uninterrupted.append(whole.next_batch(13))
    assert uninterrupted[29].metrics["data/epoch"] >= 2
    for saved in tmp_path.iterdir():
        resumed = make_stream(tokenizer)
        resumed.next_batch(3)  # a position of its own, to be forgotten
        resumed.load_state_dict(torch.load(saved, weights_only=True))
        for expected in uninterrupted[int(saved.stem) :]:
            assert_equal_batches(resumed.next_batch(13), expected)


def test_two_arms_with_one_seed_see_the_same_windows_however_they_are_cut(tokenizer):
    one = make_stream(tokenizer).next_batch(120)
    parts = make_stream(tokenizer)
    other = torch.cat([parts.next_batch(n).window_ids for n in (1, 50, 9, 60)])
    assert torch.equal(one.window_ids, other)
    assert not torch.equal(one.window_ids, make_stream(tokenizer, seed=1).next_batch(120).window_ids)


def test_equal_windows_have_equal_ids_for_every_seed(tokenizer):
    long = [Document(" ".join(WORDS[i : i + T - 1])) for i in range(0, 60, 3)]  # one window each, with EOS
    ids = []
    for seed in (0, 1):
        reader = SourceReader(MemorySource("web", long, seed), "none", tokenizer, T, seed)
        stream = WindowStream(
            SourceMix(readers={0: reader}, weights=[1]), 4, torch.Generator().manual_seed(seed), {}
        )
        ids.append(stream.next_batch(200).window_ids.tolist())
    assert ids[0] != ids[1]
    assert set(ids[0]) == set(ids[1])
    assert len(set(ids[0])) == len(long)


@settings(deadline=None, max_examples=8)
@given(st.floats(0.2, 0.7), st.sampled_from([0.3, 0.6, 1.0]), st.integers(0, 2))
def test_no_held_out_text_enters_many_epochs_of_the_stream(tokenizer, share, threshold, seed):
    """Every document holds words of its own, so a word of a held-out set in the stream is a leak."""
    texts = [Document(" ".join(WORDS[10 * i : 10 * i + 10])) for i in range(100)]
    config = DataConfig(
        sources=(SourceConfig(name="web", path="unused"),), target="web", window=T, held_out_share=share,
        reward_set_size=3, validation_set_size=2, test_set_size=3, near_duplicate_threshold=threshold,
    )  # fmt: skip
    sets, guard = build_held_out(MemorySource("web", texts, 0), tokenizer, config)
    readers = {
        i: SourceReader(
            DecontaminatedSource(MemorySource(f"s{i}", texts, seed), guard, of_target=i == 0),
            corruption,
            tokenizer,
            T,
            seed,
        )
        for i, corruption in enumerate(["none", "shuffled-tokens"])
    }
    generator = torch.Generator().manual_seed(seed)
    stream = WindowStream(SourceMix(readers=readers, weights=[1, 1]), 8, generator, {})
    seen = set(stream.next_batch(700).tokens.flatten().tolist()) - {0}
    assert stream.epoch >= 2
    held_out = [set(s.flatten().tolist()) - {0} for s in (sets.reward, sets.validation, sets.test)]
    for left, right in [(0, 1), (0, 2), (1, 2)]:
        assert not held_out[left] & held_out[right]
    assert not seen & set.union(*held_out)


def test_a_new_epoch_is_said_once_per_source(tokenizer, caplog):
    stream = make_stream(tokenizer, weights=(1, 1), dirts=("none", "none"), counts=(20, 30))
    with caplog.at_level(logging.WARNING, logger="curriq"):
        batch = stream.next_batch(300)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) >= 4
    last = max(reader.source.epoch for reader in stream._mix.readers.values())
    assert batch.metrics["data/epoch"] == last
    assert any(f"'s0' is used up: epoch {last} begins" in text for text in said)


def test_duplicates_repeat_without_announcement(tokenizer, caplog):
    source = Duplicates(MemorySource("twins", documents(50, 1), 0), seed=0, distinct=3)
    reader = SourceReader(source, "duplicates", tokenizer, T, 0)
    stream = WindowStream(SourceMix(readers={0: reader}, weights=[1]), 4, torch.Generator(), {})
    with caplog.at_level(logging.WARNING, logger="curriq"):
        batch = stream.next_batch(200)
    assert not caplog.records
    assert batch.metrics == {"data/epoch": 0.0, "data/windows_read": 200.0}


def test_a_source_without_training_documents_is_an_error(tokenizer):
    all_held_out = ContaminationFilter(SplitRule(1 - 1e-12, {"reward": 1, "validation": 1, "test": 1}), 1.0)
    with pytest.raises(CurriqError, match=r"'s0' has no text to train on.*--held-out-share"):
        make_stream(tokenizer, guard=all_held_out).next_batch(1)


def test_a_source_shorter_than_a_window_is_repeated_until_it_fills_one(tokenizer):
    reader = SourceReader(MemorySource("tiny", [Document("w1 w2")], 0), "none", tokenizer, T, 0)
    stream = WindowStream(SourceMix(readers={0: reader}, weights=[1]), 2, torch.Generator(), {})
    one, two = (tokenizer.convert_tokens_to_ids(w) for w in ("w1", "w2"))
    assert stream.next_batch(1).tokens[0].tolist() == ([one, two, 0] * 3)[:T]


def test_a_state_of_other_data_is_refused(tokenizer):
    saved = make_stream(tokenizer, seed=0).state_dict()
    with pytest.raises(CurriqError, match="seed was 0, is 1"):
        make_stream(tokenizer, seed=1).load_state_dict(saved)


def test_fingerprint_names_everything_that_differs():
    check_fingerprint({"a": "1"}, {"a": "1"})
    with pytest.raises(CurriqError) as caught:
        check_fingerprint(
            {"window": "8", "tokenizer": "x", "seed": "0"}, {"window": "16", "seed": "0", "new": "y"}
        )
    assert "new was absent, is y; tokenizer was x, is absent; window was 8, is 16" in str(caught.value)
    assert "seed" not in str(caught.value)
