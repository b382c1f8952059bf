"""The whole data side opened from one configuration, on files."""

import numpy as np
import pytest
import torch

from curriq.config import RunConfig, SourceConfig
from curriq.data.contamination import SplitRule
from curriq.data.corpus import Corpus, open_corpus, training_texts
from curriq.data.documents import Document, document_key
from curriq.data.stream import check_fingerprint
from curriq.errors import CurriqError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of paragraphs with letters of their own."""
    folder = tmp_path_factory.mktemp("text")
    for name, letters in {"target": "abcdefgh", "other": "klmnopqr"}.items():
        rng = np.random.default_rng(len(letters) + ord(name[0]))
        words = ["".join(rng.choice(list(letters), rng.integers(2, 7))) for _ in range(300)]
        paragraphs = [" ".join(rng.choice(words, rng.integers(10, 40))) for _ in range(200)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    return folder


def run_config(folder, **changes):
    target, other = str(folder / "target.txt"), str(folder / "other.txt")
    sources = (
        SourceConfig(name="target", path=target, weight=0),
        SourceConfig(name="same", path=target, weight=1, corruption="shuffled-tokens"),
        SourceConfig(name="other", path=other, weight=2),
        SourceConfig(name="twins", path=other, weight=1, corruption="duplicates"),
    )
    small = {"sources": sources, "target": "target", "window": 16, "shuffle_buffer": 32,
             "held_out_share": 0.4, "reward_set_size": 8, "validation_set_size": 4, "test_set_size": 8,
             "tokenizer": "train", "vocab_size": 300, "reward_windows": 4}  # fmt: skip
    return RunConfig().override(**(small | changes))


@pytest.fixture(scope="module")
def corpus(folder) -> Corpus:
    return open_corpus(run_config(folder))


def share_of_new_text(windows):
    """Distinct runs of six tokens among all."""
    runs = [tuple(row[i : i + 6]) for row in windows.tolist() for i in range(len(row) - 5)]
    return len(set(runs)) / len(runs)


def test_a_corpus_has_what_the_configuration_asks_for(corpus):
    assert corpus.source_names == ("target", "same", "other", "twins")
    assert corpus.held_out.reward.tokens.shape == (8, 16)
    assert corpus.held_out.validation.tokens.shape == (4, 16)
    assert corpus.held_out.test.tokens.shape == (8, 16)
    windows = corpus.stream.read(1200).windows
    assert set(windows.source.tolist()) == {1, 2, 3}
    for source, letters in {1: "abcdefgh", 2: "klmnopqr", 3: "klmnopqr"}.items():
        text = corpus.tokenizer.decode(
            windows.tokens[windows.source == source].flatten(), skip_special_tokens=True
        )
        assert set(text) <= set(letters) | {" "}
    new = [share_of_new_text(windows.tokens[windows.source == source]) for source in (2, 3)]
    assert new[0] > 0.9
    assert new[1] < 0.5, "sixteen documents, over and over"


def test_seeds_share_the_sets_and_the_ids_but_not_the_order(folder, corpus):
    other = open_corpus(run_config(folder, seed=1))
    for name in ("reward", "validation", "test"):
        ours, theirs = getattr(corpus.held_out, name), getattr(other.held_out, name)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.ids, theirs.ids)
    again = open_corpus(run_config(folder)).stream.read(50).windows
    assert torch.equal(again.ids, open_corpus(run_config(folder)).stream.read(50).windows.ids)
    assert not torch.equal(again.ids, other.stream.read(50).windows.ids)


def test_training_seeds_share_a_split_and_split_seeds_do_not(folder):
    """No stream holds text of its own held-out sets, but each holds some of the other split's."""
    sources = (SourceConfig(name="target", path=str(folder / "target.txt")),)

    def opened(**seeds):
        corpus = open_corpus(run_config(folder, sources=sources, window=48, **seeds))
        return corpus, [phrases(corpus, windows) for windows in vars(corpus.held_out).values()]

    (first, ours), (_, again), (other, theirs) = (
        opened(split_seed=3),
        opened(split_seed=3, seed=1),
        opened(split_seed=4),
    )
    assert ours == again
    for corpus, own, foreign in ((first, ours, theirs), (other, theirs, ours)):
        streamed = phrases(corpus, corpus.stream.read(300).windows)
        assert not streamed & set().union(*own)
        assert streamed & set().union(*foreign)
    data = run_config(folder, sources=sources, split_seed=3).data
    rule = SplitRule.from_config(data)
    assert all(rule.side(Document(text)) == "train" for text in training_texts(data))


def phrases(corpus, windows):
    """Runs of three words, without those that the windows' ends cut."""
    texts = corpus.tokenizer.batch_decode(windows.tokens)
    documents = [part.split() for text in texts for part in text.split(corpus.tokenizer.eos_token)]
    return {tuple(words[i : i + 3]) for words in documents for i in range(1, len(words) - 3)}


def test_the_tokenizer_is_trained_on_training_documents_of_clean_sources_in_turn(folder):
    config = run_config(folder)
    texts = list(training_texts(config.data))
    rule = SplitRule.from_config(config.data)
    paragraphs = [
        p for name in ("target", "other") for p in (folder / f"{name}.txt").read_text().split("\n\n")
    ]
    expected = {document_key(p) for p in paragraphs if rule.side(Document(p)) == "train"}
    assert {document_key(text) for text in texts} == expected
    first = ["a" <= text[0] <= "h" for text in texts[:10]]
    assert first == [True, False] * 5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"window": 8}, "window"),
        ({"held_out_share": 0.5}, "held_out_share"),
        ({"near_duplicate_threshold": 0.9}, "near_duplicate_threshold"),
        ({"vocab_size": 290}, "tokenizer"),
        ({"seed": 3}, "seed"),
        ({"split_seed": 3}, "split_seed"),
        ({"test_set_size": 7}, "held_out_sizes"),
        ({"shuffle_buffer": 16}, "shuffle_buffer"),
        ({"topic_coherent": True, "topic_encoder": "hashing"}, "topic"),
    ],
)
def test_every_setting_of_the_data_is_in_the_fingerprint(folder, corpus, change, named):
    changed = open_corpus(run_config(folder, **change)).fingerprint()
    with pytest.raises(CurriqError, match=f"{named} was"):
        check_fingerprint(corpus.fingerprint(), changed)
    check_fingerprint(corpus.fingerprint(), open_corpus(run_config(folder)).fingerprint())


def test_other_held_out_windows_are_refused_on_resume(folder):
    """Equal settings do not make equal embeddings: another version or device of an encoder is enough."""

    class ByLength:
        def encode(self, texts):
            return np.eye(7, dtype=np.float32)[[len(text) % 7 for text in texts]]

    config = run_config(folder, topic_coherent=True, topic_encoder="hashing", topic_temperature=1e-3)
    saved, current = (open_corpus(config, encoder).fingerprint() for encoder in (None, ByLength()))
    with pytest.raises(CurriqError, match="held_out was"):
        check_fingerprint(saved, current)
    assert {name for name in saved if saved[name] != current[name]} == {"held_out"}


def test_changed_text_is_refused_on_resume(tmp_path, folder, corpus):
    for file in folder.iterdir():
        text = file.read_text(encoding="utf-8")
        (tmp_path / file.name).write_text(
            text + ("\n\nklm opq" if file.stem == "other" else ""), encoding="utf-8"
        )
    changed = open_corpus(run_config(tmp_path))
    with pytest.raises(CurriqError, match="source other was"):
        changed.stream.load_state_dict(corpus.stream.state_dict())
