"""Text: sources, corruptions, tokenizers, conversations, held-out sets and the stream of windows."""

from curriq.data.corpus import Corpus, open_corpus
from curriq.data.documents import cache_dir
from curriq.data.sources import pin_revision
from curriq.data.split import HeldOutSets
from curriq.data.stream import WindowStream, check_fingerprint

__all__ = [
    "Corpus",
    "HeldOutSets",
    "WindowStream",
    "cache_dir",
    "check_fingerprint",
    "open_corpus",
    "pin_revision",
]
