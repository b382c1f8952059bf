"""What the benchmarks share."""

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
