"""Fast byte-level BPE: every word is cut into tokens once, and looked up from then on.

A byte-level BPE of GPT-2's kind splits a text into words by a regular expression and merges bytes inside each
word alone, so a table of words replaces nearly all of its work. On a corpus that is several times as fast as
the library, which keeps a small cache and tracks the place of each token.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from curriq.data.tokenizer import encode, serialised

if TYPE_CHECKING:
    import transformers

MOST_WORDS = 1 << 19
"""Words that are remembered, some 75 MB; then the table begins afresh."""
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""White space as Unicode defines it: `\\s` of Python has four more control characters."""


_PUNCTUATION = r"\0-\x08\x0e-\x1f!-/:-@\[-`{-\x7f"
"""What ASCII has besides letters, digits and white space."""


class WordTable(dict[str, int]):
    """Words → their numbers; a word that is new gets the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self.new.append(word)
        return number


class FastEncoder:
    """The token ids that `encode` gives, faster where the tokenizer is a byte-level BPE of GPT-2's kind.

    For any other tokenizer `encode` itself is called, and for a text with a character that only one of Python
    and the library takes for a letter, say, because they know different versions of Unicode.
    """

    def __init__(self, tokenizer: "transformers.PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self._by_word = _merges_within_words(serialised(tokenizer))
        self._compared = {chr(code) for code in range(128)}  # characters whose kind has been compared
        self._strange: list[str] = []  # those of another kind for the library
        self._forget()

    def __call__(self, texts: Sequence[str]) -> list[Int[np.ndarray, "t"]]:
        """Token ids of each text, without special tokens, int32."""
        if not self._by_word:
            return self._by_library(texts)
        if len(self._table) > MOST_WORDS:
            self._forget()
        split = _word_pattern().findall
        numbers = [np.fromiter(map(self._table.__getitem__, split(text)), np.int64) for text in texts]
        if self._table.new:
            self._learn()
        starts, counts, ids = self._starts, self._counts, self._ids
        found = [ids[_spans(starts[of_text], counts[of_text])] for of_text in numbers]
        for place, text in enumerate(texts if self._strange else ()):
            if any(character in text for character in self._strange):
                (found[place],) = self._by_library([text])
        return found

    def _by_library(self, texts: Sequence[str]) -> list[Int[np.ndarray, "t"]]:
        return [np.asarray(ids, np.int32) for ids in encode(self.tokenizer, list(texts))]

    def _forget(self) -> None:
        self._table = WordTable()
        self._counts = np.empty(0, np.int64)
        self._starts = np.empty(0, np.int64)
        self._ids = np.empty(0, np.int32)

    def _learn(self) -> None:
        """Cut the new words into tokens."""
        new, self._table.new = self._table.new, []
        self._compare({*"".join(new)} - self._compared)
        found = encode(self.tokenizer, new)
        counts = np.fromiter(map(len, found), np.int64, len(found))
        ids = np.fromiter((token for word in found for token in word), np.int32, int(counts.sum()))
        self._counts = np.concatenate([self._counts, counts])
        self._ids = np.concatenate([self._ids, ids])
        self._starts = self._counts.cumsum() - self._counts

    def _compare(self, characters: set[str]) -> None:
        """Look up whether the library takes characters for letters, digits, white space or none of them as
        the pattern does."""
        self._compared |= characters
        for character in sorted(characters):
            text = f"a{character}1{character}!{character} b"
            pieces = self.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
            if [text[slice(*span)] for _, span in pieces] != _word_pattern().findall(text):
                self._strange.append(character)


def _spans(starts: Int[np.ndarray, "m"], counts: Int[np.ndarray, "m"]) -> Int[np.ndarray, "t"]:
    """starts[0], …, starts[0] + counts[0] − 1, starts[1], …, one after another."""
    ends = counts.cumsum()
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)


def _merges_within_words(tokenizer_json: str) -> bool:
    """Whether a tokenizer is a BPE on the words of `_word_pattern`, and on nothing else."""
    if not tokenizer_json:
        return False
    parts = json.loads(tokenizer_json)
    splitter, model = parts["pre_tokenizer"] or {}, parts["model"]
    return (
        parts["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and not splitter["add_prefix_space"]
        and splitter.get("use_regex", True)
        and model["type"] == "BPE"
        and not model.get("dropout")
        and all(token["special"] for token in parts["added_tokens"])  # their names are text for `encode`
    )


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    r"""GPT-2's `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`."""
    letters, numbers = _ranges("L"), _ranges("N")
    # First the same three alternatives for words of ASCII alone: large classes are slow.
    ascii_words = "".join(rf"| ?[{kind}]++(?![^\0-\x7f])" for kind in ("a-zA-Z", "0-9", _PUNCTUATION))
    return re.compile(
        rf"'(?:[stmd]|re|ve|ll){ascii_words}"
        rf"| ?[{letters}]+| ?[{numbers}]+| ?[^{_SPACE}{letters}{numbers}]+"
        rf"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
    )


def _ranges(category: str) -> str:
    """The characters of a Unicode category and those below it, as the inside of a character class."""
    runs = re.finditer(f"{category}+", _categories())
    return "".join(rf"\U{run.start():08x}-\U{run.end() - 1:08x}" for run in runs)


@functools.cache
def _categories() -> str:
    """First letter of each character's Unicode category. Beyond these planes nothing but marks and private
    characters is assigned."""
    return "".join(unicodedata.category(chr(code))[0] for code in range(0x40000))
