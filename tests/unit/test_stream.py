"""The stream: how text is cut, what is in it, in which proportions, and that it resumes exactly."""

import hashlib
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curriq.config import DataConfig, SourceConfig
from curriq.curate.documents import Cutter
from curriq.data.corruption import Duplicates
from curriq.data.documents import Document, MemorySource
from curriq.data.split import ContaminationFilter, SplitRule, build_held_out
from curriq.data.stream import (
    DecontaminatedSource,
    Packer,
    Rows,
    SourceReader,
    Unreadable,
    Window,
    WindowStream,
    batch,
    check_fingerprint,
    window_id,
)
from curriq.errors import CurriqError
from curriq.select.base import StreamProposer
from curriq.types import IGNORED, Cost, Offer, Proposer, WindowSource

EOS = 0
some_documents = st.lists(
    st.tuples(
        st.lists(st.integers(1, 50_000), max_size=40),
        st.one_of(st.just(math.nan), st.floats(-5, 5)),
    ),
    max_size=25,
)

some_masks = st.lists(st.booleans(), max_size=12).filter(lambda mask: any(mask) or not mask)


def brute_force(texts, length):
    """Every token with its label in one list, an EOS behind each non-empty document, cut by hand."""
    stream = []
    for tokens, label in texts:
        if tokens:
            stream += [(token, label) for token in [*tokens, EOS]]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


@settings(deadline=None)
@given(some_documents, st.integers(2, 17))
def test_packing_is_concatenation_with_eos_cut_every_t_tokens(texts, length):
    packer = Packer("web", length, ((), (EOS,)))
    windows = [window for tokens, label in texts for window in packer.add(tokens, label)]
    expected = brute_force(texts, length)
    assert [w.tokens.tolist() for w in windows] == [[token for token, _ in e] for e in expected]
    for window, pairs in zip(windows, expected, strict=True):
        labels = [label for _, label in pairs if not math.isnan(label)]
        mean = math.fsum(labels) / len(labels) if labels else math.nan
        assert window.difficulty == pytest.approx(mean, nan_ok=True, abs=1e-12)


@settings(deadline=None)
@given(some_documents, st.integers(2, 17))
def test_a_window_has_the_identity_of_the_document_that_it_begins_in(texts, length):
    """Also where it begins with that document's EOS token."""
    packer = Packer("web", length, ((), (EOS,)))
    numbers = [2**63 - 1 - i for i in range(len(texts))]
    windows = [
        w
        for number, (tokens, label) in zip(numbers, texts, strict=True)
        for w in packer.add(tokens, label, document=number)
    ]
    owner = [
        n for n, (tokens, _) in zip(numbers, texts, strict=True) if tokens for _ in range(len(tokens) + 1)
    ]
    assert [w.document for w in windows] == owner[: len(windows) * length : length]


@settings(deadline=None)
@given(some_documents, st.integers(2, 17), st.data())
def test_a_packer_resumes_anywhere(texts, length, data):
    cut = data.draw(st.integers(0, len(texts)))
    whole, first, second = (Packer("web", length, ((), (EOS,))) for _ in range(3))
    numbered = [(tokens, label, None, number) for number, (tokens, label) in enumerate(texts)]
    uninterrupted = [w for document in numbered for w in whole.add(*document)]
    before = [w for document in numbered[:cut] for w in first.add(*document)]
    second.load_state_dict(first.state_dict())
    after = [w for document in numbered[cut:] for w in second.add(*document)]
    assert [(w.id, w.document) for w in before + after] == [(w.id, w.document) for w in uninterrupted]
    np.testing.assert_array_equal(
        [w.difficulty for w in before + after], [w.difficulty for w in uninterrupted]
    )


def test_window_id_is_the_documented_hash():
    tokens = np.array([1, 258, 3], np.int32)
    content = b"web\0" + bytes([1, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0, 0])
    expected = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
    assert window_id("web", tokens) == expected
    assert window_id("web", tokens.astype(np.int64)) == expected
    assert window_id("code", tokens) != expected
    assert 0 <= expected < 2**63


def test_ids_of_many_windows_are_distinct_and_fit_int64():
    ids = [window_id("web", np.array([i, i + 1])) for i in range(5000)]
    assert len(set(ids)) == 5000
    assert torch.tensor(ids).min() >= 0


@settings(deadline=None)
@given(st.lists(some_masks, max_size=12), st.integers(2, 9))
def test_what_is_not_learnt_has_no_label(masks, length):
    """Windows without a loss go. The EOS token of a document with a mask is not learnt; where all is learnt
    there are no labels."""
    packer, learnt = Packer("chat", length, ((), (EOS,))), []
    windows = []
    for number, mask in enumerate(masks):
        windows += packer.add([number + 1] * len(mask), learnt=None if number % 3 == 0 else mask)
        if mask:
            learnt += [*([True] * (len(mask) + 1) if number % 3 == 0 else [*mask, False])]
    rows = [learnt[i : i + length] for i in range(0, len(learnt) // length * length, length)]
    for window, expected in zip(windows, [row for row in rows if any(row[1:])], strict=True):
        if all(expected):
            assert window.labels is None
        else:
            tokens = window.tokens.tolist()
            wanted = [token if known else IGNORED for token, known in zip(tokens, expected, strict=True)]
            assert window.labels.tolist() == wanted


def test_rows_survive_a_checkpoint(tmp_path):
    packer = Packer("web", 4, ((), (EOS,)), position=2)
    rows = packer.add(range(1, 20), 2.5, document=2**62 + 3) + packer.add(range(1, 20))
    rows += packer.add(range(1, 10), learnt=[True, False, True] * 3)
    assert len({row.labels is None for row in rows}) == 2
    torch.save(Rows(rows).state_dict(), tmp_path / "state.pt")
    restored = Rows(rows[:1])
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for old, new in zip(rows, restored, strict=True):
        np.testing.assert_array_equal(old.tokens, new.tokens)
        assert (new.id, new.source) == (old.id, old.source) == (old.id, 2)
        assert new.document == old.document
        np.testing.assert_equal(new.difficulty, old.difficulty)
        np.testing.assert_array_equal(new.labels, old.labels)


def test_no_rows_survive_a_checkpoint():
    restored = Rows(Packer("web", 4, ((), (EOS,))).add(range(4)))
    restored.load_state_dict(Rows().state_dict())
    assert not restored


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
            readers[i] = SourceReader(guarded, corruption, tokenizer, T, seed, i)
    generator = torch.Generator().manual_seed(seed)
    return WindowStream(
        readers, weights, buffer, generator, {"seed": str(seed), "T": str(T)}, labelled=labelled
    )


def assert_equal_windows(left, right):
    for name in ("tokens", "ids", "source"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    torch.testing.assert_close(left.difficulty, right.difficulty, rtol=0, atol=0, equal_nan=True)


def assert_equal_offers(left, right):
    assert_equal_windows(left.windows, right.windows)
    assert torch.equal(left.rows, right.rows)
    assert (left.epoch, left.cost) == (right.epoch, right.cost)


def test_a_stream_that_ends_says_so(tokenizer):
    stream = make_stream(tokenizer)
    stream.read = lambda n: Offer.of(batch([Window(np.zeros(T, np.int32), 0)]).take(slice(0)))
    with pytest.raises(CurriqError, match=r"no window left: lower --steps"):
        StreamProposer(stream, 5).propose(0)


def test_an_offer_has_the_documented_form(tokenizer):
    proposer = StreamProposer(make_stream(tokenizer), 5)
    assert isinstance(proposer, Proposer)
    offer = proposer.propose(0)
    windows = offer.windows
    assert windows.tokens.shape == (5, T)
    assert windows.tokens.dtype == windows.ids.dtype == torch.int64
    assert windows.labels is None
    assert offer.rows.tolist() == list(range(5))
    assert offer.cost == Cost(windows_read=5)
    assert offer.epoch == 1  # 16 windows in the buffer, and one source has three documents
    windows = make_stream(tokenizer).read(300).windows
    assert torch.isnan(windows.difficulty[windows.source != 0]).all()
    assert not torch.isnan(windows.difficulty[windows.source == 0]).any()
    assert make_stream(tokenizer, labelled=False).read(5).windows.difficulty is None


def test_without_shuffling_one_source_is_its_documents_in_order(tokenizer):
    texts = documents(30, 5)
    source = MemorySource("web", texts, 3)
    expected = [tokenizer.convert_tokens_to_ids(w) for _ in range(2) for d in iter(source.next_document, None)
                for w in [*d.text.split(), "<eos>"]]  # fmt: skip
    reader = SourceReader(MemorySource("web", texts, 3), "none", tokenizer, T, 0)
    stream = WindowStream({0: reader}, [2.0], 1, torch.Generator(), {})
    got = stream.read(len(expected) // T).windows.tokens.flatten().tolist()
    assert got == expected[: len(got)], "two epochs laid end to end"


@pytest.mark.parametrize("corruption", ["none", "random-tokens", "shuffled-tokens"])
def test_windows_know_their_document_whatever_became_of_its_text(tokenizer, corruption):
    """By their position in an uncorrupted epoch, which is as long: one token per word."""
    texts = documents(30, 5)
    source = MemorySource("web", texts, 3)
    owner = [d.number for d in iter(source.next_document, None) for _ in [*d.text.split(), "<eos>"]]
    reader = SourceReader(MemorySource("web", texts, 3), corruption, tokenizer, T, 0)
    stream = WindowStream({0: reader}, [1.0], 1, torch.Generator(), {})
    found = stream.read(len(owner) // T).windows.document.tolist()
    assert found == owner[: len(found) * T : T]
    assert all(0 <= number < 2**63 for number in found)


def test_the_buffer_emits_every_window_once(tokenizer):
    ordered = make_stream(tokenizer, weights=(1,), dirts=("none",), counts=(400,), buffer=1)
    in_order = ordered.read(500).windows.ids.tolist()
    shuffled = make_stream(tokenizer, weights=(1,), dirts=("none",), counts=(400,), buffer=64)
    ids = shuffled.read(500 - 63).windows.ids.tolist()
    assert set(ids) <= set(in_order)
    assert len(set(ids)) == len(ids)
    position = {window: i for i, window in enumerate(in_order)}
    # An element waits for a geometric time of mean 64 in the buffer, so the places move by about as much.
    moves = [position[window] - i for i, window in enumerate(ids)]
    assert max(moves) == 63 or max(moves) > 55, "nothing comes before it has been read"
    assert 40 < np.std(moves) < 90


def test_sources_are_mixed_by_weight(tokenizer):
    weights, n = (3.0, 0.0, 5.0, 2.0), 3000
    stream = make_stream(tokenizer, weights=weights, dirts=("none",) * 4, counts=(50, 5, 50, 50))
    counts = torch.bincount(stream.read(n).windows.source, minlength=4).tolist()
    for count, weight in zip(counts, weights, strict=True):
        p = weight / sum(weights)
        assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def test_a_resumed_stream_equals_the_uninterrupted_one_from_any_point(tokenizer, tmp_path):
    whole, uninterrupted = make_stream(tokenizer), []
    for step in range(48):
        if step in (0, 1, 2, 7, 19, 30):
            torch.save(whole.state_dict(), tmp_path / f"{step}.pt")
        uninterrupted.append(whole.read(13))
    assert uninterrupted[29].epoch >= 2
    for saved in tmp_path.iterdir():
        resumed = make_stream(tokenizer)
        resumed.read(3)  # a position of its own, to be forgotten
        resumed.load_state_dict(torch.load(saved, weights_only=True))
        for expected in uninterrupted[int(saved.stem) :]:
            assert_equal_offers(resumed.read(13), expected)


def test_two_arms_with_one_seed_see_the_same_windows_however_they_are_cut(tokenizer):
    one = make_stream(tokenizer).read(120)
    parts = make_stream(tokenizer)
    other = Offer.cat([parts.read(n) for n in (1, 50, 9, 60)])
    assert_equal_offers(one, other)
    assert not torch.equal(one.windows.ids, make_stream(tokenizer, seed=1).read(120).windows.ids)


def test_equal_windows_have_equal_ids_for_every_seed(tokenizer):
    long = [Document(" ".join(WORDS[i : i + T - 1])) for i in range(0, 60, 3)]  # one window each, with EOS
    ids = []
    for seed in (0, 1):
        reader = SourceReader(MemorySource("web", long, seed), "none", tokenizer, T, seed)
        stream = WindowStream({0: reader}, [1], 4, torch.Generator().manual_seed(seed), {})
        ids.append(stream.read(200).windows.ids.tolist())
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
            i,
        )
        for i, corruption in enumerate(["none", "shuffled-tokens"])
    }
    generator = torch.Generator().manual_seed(seed)
    stream = WindowStream(readers, [1, 1], 8, generator, {})
    seen = set(stream.read(700).windows.tokens.flatten().tolist()) - {0}
    assert stream.epoch >= 2
    held_out = [set(s.tokens.flatten().tolist()) - {0} for s in (sets.reward, sets.validation, sets.test)]
    for left, right in [(0, 1), (0, 2), (1, 2)]:
        assert not held_out[left] & held_out[right]
    assert not seen & set.union(*held_out)


def test_a_new_epoch_is_said_once_per_source(tokenizer, caplog):
    stream = make_stream(tokenizer, weights=(1, 1), dirts=("none", "none"), counts=(20, 30))
    with caplog.at_level(logging.WARNING, logger="curriq"):
        offer = stream.read(300)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) >= 4
    last = max(reader.source.epoch for reader in stream._readers.values())
    assert offer.epoch == last
    assert any(f"'s0' is used up: epoch {last} begins" in text for text in said)


def test_duplicates_repeat_without_announcement(tokenizer, caplog):
    source = Duplicates(MemorySource("twins", documents(50, 1), 0), seed=0, distinct=3)
    reader = SourceReader(source, "duplicates", tokenizer, T, 0)
    stream = WindowStream({0: reader}, [1], 4, torch.Generator(), {})
    with caplog.at_level(logging.WARNING, logger="curriq"):
        offer = stream.read(200)
    assert not caplog.records
    assert (offer.epoch, offer.cost) == (0, Cost(windows_read=200))


def test_a_source_without_training_documents_is_an_error(tokenizer):
    all_held_out = ContaminationFilter(SplitRule(1 - 1e-12, {"reward": 1, "validation": 1, "test": 1}), 1.0)
    with pytest.raises(CurriqError, match=r"'s0' has no text to train on.*--held-out-share"):
        make_stream(tokenizer, guard=all_held_out).read(1)


def test_a_source_shorter_than_a_window_is_repeated_until_it_fills_one(tokenizer):
    reader = SourceReader(MemorySource("tiny", [Document("w1 w2")], 0), "none", tokenizer, T, 0)
    stream = WindowStream({0: reader}, [1], 2, torch.Generator(), {})
    one, two = (tokenizer.convert_tokens_to_ids(w) for w in ("w1", "w2"))
    assert stream.read(1).windows.tokens[0].tolist() == ([one, two, 0] * 3)[:T]


def unread_stream(tokenizer, first):
    """A stream that has read 20 windows, and taken the last 15 back in two parts, with their numbers."""
    stream = Unreadable(make_stream(tokenizer))
    assert isinstance(stream, WindowSource)
    offer = stream.read(20)
    assert_equal_offers(offer, first)
    numbered = replace(offer, known={"number": torch.arange(20.0)})
    for part in (slice(12, None), slice(5, 12), slice(5, 5)):
        stream.unread(numbered.take(part))
    return stream


def test_what_is_unread_is_read_first_and_as_it_was(tokenizer):
    plain = make_stream(tokenizer)
    first, after = plain.read(20), plain.read(30)
    stream = unread_stream(tokenizer, first)
    for part in (slice(5, 15), slice(15, 20)):
        offer = stream.read(10)  # at most: a reading does not go on into the stream
        assert_equal_windows(offer.windows, first.windows.take(part))
        assert offer.known["number"].tolist() == list(range(20))[part]
        assert offer.rows.tolist() == list(range(len(offer)))
        assert (offer.cost, offer.epoch) == (Cost(windows_read=len(offer)), first.epoch)
    assert_equal_offers(stream.read(30), after)


def test_a_resumed_stream_has_what_was_unread(tokenizer, tmp_path):
    stream = unread_stream(tokenizer, make_stream(tokenizer).read(20))
    stream.read(3)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    resumed = Unreadable(make_stream(tokenizer))
    resumed.unread(resumed.read(7))  # to be forgotten
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for n in (10, 10, 8, 50):
        expected, got = stream.read(n), resumed.read(n)
        assert_equal_offers(got, expected)
        assert {name: column.tolist() for name, column in got.known.items()} == {
            name: column.tolist() for name, column in expected.known.items()
        }


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


def corrupted(tokenizer, document, corruption="ocr"):
    reader = SourceReader(MemorySource("s", [document], 0), corruption, tokenizer, T, 0)
    return reader._corrupted(document, np.random.default_rng(0))


def test_the_text_of_a_document_is_corrupted(tokenizer):
    document = Document("the quick brown fox " * 60)
    assert corrupted(tokenizer, document).text != document.text
    assert corrupted(tokenizer, document, "none") == document


def test_what_is_said_in_a_conversation_is_corrupted_and_nothing_else_of_it(tokenizer):
    said = "the quick brown fox " * 60
    turns = ({"role": "user", "content": said}, {"role": "assistant", "content": said, "name": "x"})
    document = Document(said, messages=(*turns, {"role": "assistant", "tool_calls": []}))
    noisy = corrupted(tokenizer, document).messages
    assert [m["role"] for m in noisy] == ["user", "assistant", "assistant"]
    assert noisy[1]["name"] == "x"
    assert all(m["content"] != said for m in noisy[:2])
    # A template may ask whether a message has content; the held-out sets encode it as it is.
    assert noisy[2] == {"role": "assistant", "tool_calls": []}
    assert corrupted(tokenizer, document, "none").messages == document.messages


def test_conversations_without_an_assistant_are_an_error_and_no_endless_epoch(tokenizer):
    asked = ({"role": "user", "content": "what is the square of seven and of eight"},)
    documents = [Document(f"user: {i}", messages=asked) for i in range(5)]
    reader = SourceReader(MemorySource("chat", documents, 0), "none", tokenizer, 8, 0)
    with pytest.raises(CurriqError, match="have no assistant's turn"):
        reader.next_window()


def chats(turns: list[tuple[str, str]]) -> list[Document]:
    """Conversations of a question and its answer."""
    return [
        Document(
            asked + said,
            messages=({"role": "user", "content": asked}, {"role": "assistant", "content": said}),
        )
        for asked, said in turns
    ]


def test_windows_of_which_nothing_is_learnt_are_left_out_and_told_of_once(tokenizer, caplog):
    """They would have loss 0, and no static score says anything of them."""
    documents = chats([(f"what is the square of {i} " * 9, "forty-nine and sixty-four") for i in range(5)])
    reader = SourceReader(MemorySource("chat", documents, 0), "none", tokenizer, 8, 0)
    windows = [reader.next_window() for _ in range(40)]
    for window in windows:
        assert window.labels is not None
        assert (window.labels[1:] != IGNORED).any()
    (told,) = [message for message in caplog.messages if "no token is learnt" in message]
    assert told.startswith(
        "source 'chat': windows of which no token is learnt, as where a question is longer"
    )


def test_a_source_without_a_window_to_learn_from_is_an_error_and_no_endless_epoch(tokenizer, monkeypatch):
    """Each answer's only token stands first in its window, where nothing predicts it."""

    def one_token(tokenizer, messages):
        return [7] * 15, [*[False] * 8, True, *[False] * 6]

    monkeypatch.setattr("curriq.data.stream.encode_chat", one_token)
    documents = chats([(f"question {i}", "yes") for i in range(5)])
    reader = SourceReader(MemorySource("chat", documents, 0), "none", tokenizer, 8, 0)
    with pytest.raises(
        CurriqError, match="'chat' has no window of which a token is learnt: give a longer --win"
    ):
        reader.next_window()


def test_conversations_without_an_assistant_beside_others_are_told_of_once(tokenizer, caplog):
    asked = {"role": "user", "content": "what is the square of seven and of eight"}
    turns = [(asked,), (asked, {"role": "assistant", "content": "forty-nine and sixty-four"})]
    documents = [Document(f"user: {i}", messages=turns[i % 3 == 0]) for i in range(6)]
    reader = SourceReader(MemorySource("chat", documents, 0), "none", tokenizer, 8, 0)
    for _ in range(40):
        reader.next_window()
    (told,) = [message for message in caplog.messages if "assistant" in message]
    assert told.startswith("source 'chat': 4 of 6 documents have no assistant's turn")


def test_learnt_tokens_of_each_window_are_counted(tokenizer):
    messages = {"role": "user", "content": "what is that " * 9}, {"role": "assistant", "content": "a cat sat"}
    documents = [Document("a plain text of some words"), Document("a chat", messages=messages)]
    _, cut = Cutter(tokenizer, 8)(documents)
    starts = cut.windows.cumsum() - cut.windows
    assert cut.learnt is not None
    counted = [int(cut.learnt[s : s + n].sum()) for s, n in zip(starts, cut.windows, strict=True)]
    assert cut.taught.tolist() == counted
    assert 0 in counted
    _, plain = Cutter(tokenizer, 8)(documents[:1])
    assert plain.taught.tolist() == plain.windows.tolist()
