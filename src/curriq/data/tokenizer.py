"""Tokenizers: trained here and cached, from a folder, or from the Hugging Face hub."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from curriq.config import LMConfig, TokenizerConfig
from curriq.data.cache import read_cached, write_cached
from curriq.data.documents import short_hash, shorten
from curriq.data.hub import hub, locate
from curriq.data.waiting import still_at_work
from curriq.errors import CurriqError

if TYPE_CHECKING:
    import tokenizers
    import transformers

_log = logging.getLogger("curriq")

EOS = "<|endoftext|>"
"""The one special token of a tokenizer trained here; its id is 0."""
FORMAT = 1
"""Goes up when training changes, so that tokenizers of an older version are not taken from the cache."""
MOST_CHARACTERS = 256
"""Greatest length of a word in the sample that a tokenizer is trained on."""
_WORD = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")
_LONG_SPACE = re.compile(rf"\s{{{MOST_CHARACTERS + 1}}}")


def load_tokenizer(
    config: TokenizerConfig, lm: LMConfig, sample: Callable[[], Iterable[str]]
) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer that the configuration asks for; it always has an EOS token.

    Args:
        lm: the model, whose own tokenizer `auto` takes unless it is trained from scratch.
        sample: returns the texts to train on; called only when a tokenizer is trained.

    Raises:
        CurriqError: the tokenizer cannot be read, has no EOS token, or there is no text to train on.
    """
    name = config.tokenizer
    if name == "auto":
        name = lm.model if lm.pretrained else "train"
    if name == "train":
        tokenizer = train_tokenizer(sample(), config.vocab_size, config.tokenizer_sample_bytes)
    else:
        tokenizer = _from_pretrained(name, "--model" if config.tokenizer == "auto" else "--tokenizer")
    eos_id(tokenizer)
    if lm.pretrained and name != lm.model:
        _compare_with_own(tokenizer, name, lm.model)
    return tokenizer


def eos_id(tokenizer: "transformers.PreTrainedTokenizerBase") -> int:
    """Id of the token that ends a document; CurriqError when the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise CurriqError(
            f"tokenizer {tokenizer.name_or_path!r} has no EOS token, which has to stand between documents. "
            'Name one in its tokenizer_config.json, such as "eos_token": "</s>", or use --tokenizer train.'
        )
    return tokenizer.eos_token_id


def document_marks(tokenizer: "transformers.PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Ids before and after a document: what the tokenizer itself adds to a text, such as BOS, and EOS at the
    end even where the tokenizer adds none. Where BOS is EOS, the next document's one ends this one."""
    whole, bare = (tokenizer("a", add_special_tokens=own)["input_ids"] for own in (True, False))
    starts = [i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare]
    before, after = (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts else ([], [])
    eos = eos_id(tokenizer)
    after = after if after[-1:] == [eos] else [*after, eos]
    return before, [] if before == after else after


def encode(tokenizer: "transformers.PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids of each text, whole and without special tokens. A special token's name inside a text is
    ordinary text, so no document can contain EOS."""
    if not tokenizer.is_fast:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return [tokenizer(text, **options)["input_ids"] for text in texts]
    # `tokenizers` itself skips offsets and masks, and does not warn about texts over the model's context.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def serialised(tokenizer: "transformers.PreTrainedTokenizerBase") -> str:
    """Content of a `tokenizer.json` that the library tokenizers opens; empty for a slow tokenizer."""
    return tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""


def log_marks(tokenizer: "transformers.PreTrainedTokenizerBase", texts: Iterable[str]) -> None:
    """Log what documents begin and end with, and warn where the tokenizer itself cuts one of the texts into
    other tokens than `encode` does. Texts with the name of a special token, which is text here, do not count.
    """
    before, after = document_marks(tokenizer)
    names = [tokenizer.convert_ids_to_tokens(ids) for ids in (before, after)]
    _log.info(f"documents begin with {names[0] or 'their text'} and end with {names[1] or 'the next one'}.")
    special = tokenizer.all_special_tokens
    plain = [text for text in texts if not any(name in text for name in special)]
    for text, ids in zip(plain, encode(tokenizer, plain), strict=True):
        own = tokenizer(text, verbose=False, truncation=False)["input_ids"]
        if [*before, *ids, *after][: len(own)] != own:
            _log.warning(
                f"the tokenizer {tokenizer.name_or_path!r} itself cuts {shorten(text)} into "
                f"{shorten(own)}; the run trains on {shorten([*before, *ids, *after])}."
            )
            return


def ordinary_ids(tokenizer: "transformers.PreTrainedTokenizerBase") -> Int[np.ndarray, "V"]:
    """Ids of the vocabulary without special tokens, ascending."""
    special = set(tokenizer.all_special_ids)
    return np.array(sorted(set(tokenizer.get_vocab().values()) - special), dtype=np.int64)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, sample_bytes: int
) -> "transformers.PreTrainedTokenizerBase":
    """A byte-level BPE trained on the first `sample_bytes` bytes of the texts, or the cached one.

    All 256 bytes are in the vocabulary, so any text can be encoded and decoded unchanged. The vocabulary is
    smaller than `vocab_size` when the sample has too few pairs to merge. EOS is also the token for begin,
    padding and unknown. Words of more than `MOST_CHARACTERS` are cut. CurriqError when there is no text.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    texts = list(cut_words(first_bytes(texts, sample_bytes)))
    if not texts:
        raise CurriqError(
            "--tokenizer train: there is no text to train on: the clean sources (corruption=none) are empty, "
            "or each of their documents is held out. Give them more text, cut a .txt file into more "
            "documents (documents=paragraph), or give a folder or hub name with --tokenizer."
        )
    name = f"tokenizers/{short_hash(str(FORMAT), str(vocab_size), *texts)}"
    try:
        trained = Tokenizer.from_str((read_cached(name) or b"").decode())
    except Exception:  # not cached, or by another version of the library (which raises bare Exception)
        with still_at_work("training the tokenizer"):
            trained = _train_bpe(texts, vocab_size)
        write_cached(name, trained.to_str().encode())
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), EOS)
    return PreTrainedTokenizerFast(tokenizer_object=trained, **special)


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The texts up to `limit` bytes of UTF-8 in total; the last one is cut, never inside a character."""
    for text in texts:
        content = text.encode()
        if len(content) >= limit:
            if cut := content[:limit].decode(errors="ignore"):
                yield cut
            return
        limit -= len(content)
        if content:
            yield text


def cut_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut into several where a word has more than `MOST_CHARACTERS`; a warning names the first.

    A word is what the pre-tokenizer takes for one, a run of letters, digits, white space or other characters.
    Training takes time with the square of its length: 16 s for 50,000 letters.
    """
    cut = 0
    for text in texts:
        # Nearly all texts pass this, ten times as fast as looking for words.
        if max(map(len, text.split()), default=0) <= MOST_CHARACTERS and not _LONG_SPACE.search(text):
            yield text
            continue
        start = 0
        for word in _WORD.finditer(text):
            for place in range(word.start() + MOST_CHARACTERS, word.end(), MOST_CHARACTERS):
                yield text[start:place]
                start = place
        if start and not cut:
            _log.warning(
                f"the document that begins with {shorten(text[:60])} has a word of over {MOST_CHARACTERS} "
                "characters: the tokenizer's sample cuts such words. Training text keeps them whole."
            )
        cut += start > 0
        yield text[start:]
    if cut > 1:
        _log.warning(f"the tokenizer's sample cuts words of {cut} documents in all.")


def _train_bpe(texts: list[str], vocab_size: int) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _compare_with_own(tokenizer: "transformers.PreTrainedTokenizerBase", name: str, model: str) -> None:
    """Warn when a pretrained model gets other tokens than its embeddings represent."""
    try:
        own = _from_pretrained(model, "--model")
    except CurriqError:
        return  # a model without a tokenizer: there is nothing to compare with
    if own.get_vocab() != tokenizer.get_vocab():
        _log.warning(
            f"--tokenizer {name}: its tokens are not those of the pretrained --model {model}, so the model's "
            "embeddings represent other text. Use its own with --tokenizer auto, or start from scratch: "
            f"--model random:{model}."
        )


def _from_pretrained(name: str, setting: str = "--tokenizer") -> "transformers.PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    name, is_local = locate(setting, name)
    if is_local:
        kind = "folder"
        fix = "It must be a folder with tokenizer.json, or with vocab.json and merges.txt."
    else:
        kind = "hub name"
        fix = (
            "Check the name and the connection; with HF_HUB_OFFLINE set, only the hub's cache can be read. A "
            "local folder with tokenizer.json works too."
        )
    try:
        with nullcontext() if is_local else hub():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever the library says about damaged files, unknown names, no network
        reason = str(error) if isinstance(error, ConnectionError) else type(error).__name__
        raise CurriqError(
            f"no tokenizer can be read from the {kind} {name!r} ({reason}). {fix} "
            "Or train one: --tokenizer train."
        ) from error
    if tokenizer is None or not ordinary_ids(tokenizer).size:
        raise CurriqError(f"the tokenizer of the {kind} {name!r} has an empty vocabulary. {fix}")
    return tokenizer
