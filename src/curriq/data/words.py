"""Fast byte-level BPE: every word is cut into tokens once, and looked up from then on.

A byte-level BPE of GPT-2's kind splits a text into words by a regular expression and merges bytes inside each
word alone, so a table of words replaces nearly all of its work. On a corpus that is several times as fast as
the library, which keeps a small cache and tracks the place of each token.
"""

import functools
import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from curriq.data.tokenizer import encode, serialised

if TYPE_CHECKING:
    import transformers

MOST_WORDS = 1 << 20
"""Words that are remembered, some 150 MB; then the table begins afresh."""
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

    For any other tokenizer `encode` itself is called. Letters and digits are those of Python's Unicode: the
    library may split at a character that only a later version knows.
    """

    def __init__(self, tokenizer: "transformers.PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._by_word = _merges_within_words(serialised(tokenizer))
        self._forget()

    def __call__(self, texts: Sequence[str]) -> list[Int[np.ndarray, "t"]]:
        """Token ids of each text, without special tokens, int32."""
        if not self._by_word:
            return [np.asarray(ids, np.int32) for ids in encode(self._tokenizer, list(texts))]
        if len(self._table) > MOST_WORDS:
            self._forget()
        split = _word_pattern().findall
        numbers = [np.fromiter(map(self._table.__getitem__, split(text)), np.int64) for text in texts]
        if self._table.new:
            self._learn()
        starts, counts, ids = self._starts, self._counts, self._ids
        return [ids[_spans(starts[of_text], counts[of_text])] for of_text in numbers]

    def _forget(self) -> None:
        self._table = WordTable()
        self._counts = np.empty(0, np.int64)
        self._starts = np.empty(0, np.int64)
        self._ids = np.empty(0, np.int32)

    def _learn(self) -> None:
        """Cut the new words into tokens."""
        found = encode(self._tokenizer, self._table.new)
        self._table.new = []
        counts = np.fromiter(map(len, found), np.int64, len(found))
        ids = np.fromiter((token for word in found for token in word), np.int32, int(counts.sum()))
        self._counts = np.concatenate([self._counts, counts])
        self._ids = np.concatenate([self._ids, ids])
        self._starts = self._counts.cumsum() - self._counts


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

    def runs() -> Iterator[str]:
        first = None
        for code in range(sys.maxunicode + 2):
            inside = code <= sys.maxunicode and unicodedata.category(chr(code)).startswith(category)
            if inside and first is None:
                first = code
            elif not inside and first is not None:
                yield f"\\U{first:08x}-\\U{code - 1:08x}"
                first = None

    return "".join(runs())
