"""What the benchmarks share."""

import random
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from curriq.lm.model import LanguageModel


class Vocabulary:
    """The part of a tokenizer that the model loader reads."""

    eos_token_id = 0

    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self._size)}


SOURCES = ("target", "near", "far", "noise")
"""Names of the sources of `write_corpus`; the first is the target."""


def write_corpus(folder: Path, megabytes: int) -> None:
    """Text of random words from four sources with vocabularies of their own; the same in every run."""
    chance = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    for number, name in enumerate(SOURCES):
        own = words[2_000 * number :] + words[: 2_000 * number]
        with (folder / f"{name}.txt").open("w", encoding="utf-8") as file:
            while file.tell() < megabytes * 1_000_000 // len(SOURCES):
                drawn = chance.choices(own, weights, k=120_000)
                for start in range(0, len(drawn), 600):
                    file.write(" ".join(drawn[start : start + 600]) + ".\n\n")


def as_it_comes(lm: LanguageModel) -> nn.Module:
    """The Hugging Face model without what our loader replaces by a faster equal, on the same parameters."""
    network = AutoModelForCausalLM.from_config(lm.network.config).to(lm.device)
    for name, parameter in lm.network.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, parameter)
    return network


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize()
