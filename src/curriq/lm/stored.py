"""Tensors in a folder that several processes have written together, each its part (torch's distributed
checkpoint format), and that any number of processes reads, each the part that it holds."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

PIECE = 1 << 30
"""Bytes of a file of weights at most, and so in memory while they are exported; one tensor at least."""


@dataclass(frozen=True)
class Stored:
    """A tensor in such a folder, which has not been read."""

    folder: Path
    key: str


def find_stored(folder: Path, key: str) -> Stored:
    """The tensor of this name in a folder; nothing is read."""
    return Stored(folder, key)


def read_stored(wanted: Sequence[tuple[Stored, Tensor]]) -> None:
    """Read tensors into others of their shapes, whole ones or those of which this process holds a part."""
    by_folder: dict[Path, dict[str, Tensor]] = {}
    for stored, into in wanted:
        by_folder.setdefault(stored.folder, {})[stored.key] = into.detach()
    for folder, tensors in by_folder.items():
        with warnings.catch_warnings():
            # Every process reads what it needs, and need not agree with the others on that.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(folder), no_dist=True)


def export_weights(folder: Path, prefix: str, out: Path) -> None:
    """Write the tensors of a folder whose keys begin with `prefix` as the weights of a Hugging Face folder.

    They are read piece by piece, so that the memory of a model is not needed.
    """
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    shapes = {
        key: (entry.size, entry.properties.dtype)
        for key, entry in entries.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    pieces = _pieces({key: shape.numel() * dtype.itemsize for key, (shape, dtype) in shapes.items()})
    names: dict[str, str] = {}
    for number, keys in enumerate(pieces, 1):
        name = "model.safetensors"
        if len(pieces) > 1:
            name = f"model-{number:05}-of-{len(pieces):05}.safetensors"
        tensors = {key: torch.empty(shapes[key][0], dtype=shapes[key][1]) for key in keys}
        read_stored([(Stored(folder, key), tensor) for key, tensor in tensors.items()])
        weights = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        save_file(weights, out / name, metadata={"format": "pt"})
        names |= dict.fromkeys(weights, name)
    if len(pieces) > 1:
        total = sum(shape.numel() * dtype.itemsize for shape, dtype in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _pieces(sizes: Mapping[str, int]) -> list[list[str]]:
    """The keys in their order, cut where the sizes would add up to more than `PIECE`."""
    pieces: list[list[str]] = [[]]
    left = PIECE
    for key, size in sizes.items():
        if pieces[-1] and size > left:
            pieces.append([])
            left = PIECE
        pieces[-1].append(key)
        left -= size
    return pieces
