"""Tokens by a table of words equal those of the library, for every text."""

from unicodedata import category

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from curriq.data import words
from curriq.data.tokenizer import encode, serialised, train_tokenizer
from curriq.data.words import FastEncoder, _merges_within_words, _word_pattern

TEXTS = [
    "It's 3 o'clock; we'll see 42nd  street.\n\n  Indented\tcode_x = f(y)  ",
    "naïve café — 北京 \u00a0 \u2028 ½ x² İstanbul…  'S 're'll\x1c\x85",
    "   ",
    "a\n\n\nb   c \n d",
    "<|endoftext|> is text here",
]

ASSIGNED = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60)
"""Text of the characters that this Python knows: the library may know some that Unicode got later."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([text * 20 for text in TEXTS], 400, 100_000)


def test_tokens_equal_those_of_the_library(tokenizer):
    fast = FastEncoder(tokenizer)
    assert fast._by_word
    for _ in range(2):  # from the library first, then from the table
        assert [ids.tolist() for ids in fast(TEXTS)] == encode(tokenizer, TEXTS)


@given(st.lists(ASSIGNED, min_size=1, max_size=4))
@settings(max_examples=300)
def test_any_text(texts):
    tokenizer = train_tokenizer([text * 20 for text in TEXTS], 400, 100_000)
    assert [ids.tolist() for ids in FastEncoder(tokenizer)(texts)] == encode(tokenizer, texts)


def test_words_are_those_of_the_library():
    """The pattern against the pre-tokenizer that it stands for, around characters of all kinds."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for start in (*range(0, 0x3000, 512), 0x1F300, 0x10400):
        known = [chr(code) for code in range(start, start + 512) if category(chr(code)) != "Cn"]
        text = "".join(f"a{character}1 {character}{character} b" for character in known)
        theirs = [text[slice(*span)] for _, span in split.pre_tokenize_str(text)]
        assert _word_pattern().findall(text) == theirs


def test_a_full_table_begins_afresh(tokenizer, monkeypatch):
    monkeypatch.setattr("curriq.data.words.MOST_WORDS", 3)
    fast = FastEncoder(tokenizer)
    for text in TEXTS:
        assert fast([text])[0].tolist() == encode(tokenizer, [text])[0]


def test_other_tokenizers_are_left_to_the_library():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.decoder = decoders.Metaspace()
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="</s>")
    assert not _merges_within_words(serialised(tokenizer))
    found = FastEncoder(tokenizer)(["some text"])
    assert [ids.tolist() for ids in found] == encode(tokenizer, ["some text"])
    assert found[0].dtype == np.int32


def test_a_prefix_space_or_a_name_in_the_text_is_left_to_the_library(tokenizer):
    assert not _merges_within_words(
        serialised(tokenizer).replace('"add_prefix_space":false', '"add_prefix_space":true')
    )
    assert not _merges_within_words("")
    tokenizer = train_tokenizer(["other text " * 9], 300, 1000)
    tokenizer.add_tokens(["other"])  # matched inside texts before they are split into words
    assert not _merges_within_words(serialised(tokenizer))


def test_a_text_with_a_character_of_another_kind_for_the_library_is_left_to_it(tokenizer, monkeypatch):
    """As between versions of Unicode: here this side does not know that é is a letter."""
    kinds = words._categories()
    words._word_pattern.cache_clear()
    monkeypatch.setattr(words, "_categories", lambda: kinds[:0xE9] + "C" + kinds[0xEA:])
    try:
        fast = FastEncoder(tokenizer)
        for _ in range(2):
            assert [ids.tolist() for ids in fast(TEXTS)] == encode(tokenizer, TEXTS)
        assert fast._strange == ["é"]
    finally:
        monkeypatch.undo()
        words._word_pattern.cache_clear()
