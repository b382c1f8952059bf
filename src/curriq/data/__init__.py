"""Text: sources, corruptions, tokenizers, conversations, held-out sets and the stream of windows.

The names below are loaded on first use, because sources are checked before torch is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curriq.data.cache import changed_files as changed_files
    from curriq.data.cache import damaged_entries as damaged_entries
    from curriq.data.cache import file_hash as file_hash
    from curriq.data.corpus import Corpus as Corpus
    from curriq.data.corpus import open_corpus as open_corpus
    from curriq.data.hub import is_hub_name as is_hub_name
    from curriq.data.hub import locate as locate
    from curriq.data.hub import why_unreachable as why_unreachable
    from curriq.data.sources import pin_revision as pin_revision
    from curriq.data.stream import check_fingerprint as check_fingerprint

_EXPORTS = {
    "Corpus": "curriq.data.corpus",
    "changed_files": "curriq.data.cache",
    "check_fingerprint": "curriq.data.stream",
    "damaged_entries": "curriq.data.cache",
    "file_hash": "curriq.data.cache",
    "is_hub_name": "curriq.data.hub",
    "locate": "curriq.data.hub",
    "open_corpus": "curriq.data.corpus",
    "pin_revision": "curriq.data.sources",
    "why_unreachable": "curriq.data.hub",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'curriq.data' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
