"""Text: sources, corruptions, tokenizers, conversations, held-out sets and the stream of windows."""

# ruff: noqa: F401 (the names that other rooms use)

from curriq.data.cache import changed_files, damaged_entries, file_hash
from curriq.data.corpus import Corpus, open_corpus
from curriq.data.hub import is_hub_name, locate, why_unreachable
from curriq.data.sources import pin_revision
from curriq.data.stream import check_fingerprint
