"""Low-rank adapters (LoRA, Hu et al. 2021) by PEFT: they alone are trained, and the base model is frozen."""

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from curriq.config import LMConfig, missing_extra
from curriq.errors import CurriqError
from curriq.rng import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BaseModel(NamedTuple):
    """The model that adapters belong to: a hub name or a folder, and the commit of a hub model."""

    name: str
    revision: str | None


def apply_lora(network: "PreTrainedModel", config: LMConfig, seed: int, saved: Path | None = None) -> Any:
    """A `PeftModel` around the network, with adapters on its linear layers as the only trainable weights.

    Args:
        network: the base model, on the CPU; changed in place.
        config: rank, alpha, targets and dropout.
        seed: of the adapters' initial weights, of which one factor is zero: no output changes.
        saved: folder of adapters to continue with instead of new ones.

    Raises:
        CurriqError: the extra is not installed.
        ValueError: the model has no such targets.
    """
    peft = _import_peft("--lora-rank")
    from transformers.pytorch_utils import Conv1D

    if os.path.isdir(name := network.name_or_path or ""):
        network.name_or_path = os.path.abspath(name)  # adapter_config.json names it, from wherever it is read
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if config.lora_targets == ("all-linear",) else [*config.lora_targets],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),
        revision=getattr(network.config, "_commit_hash", None),
    )
    # On the CPU alone: the GPUs' generators stay as they are, and every device gets the same weights.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "lora"))
        if saved is None:
            return peft.get_peft_model(network, settings)
        return peft.PeftModel.from_pretrained(network, str(saved), is_trainable=True)


def merge_adapters(network: "PreTrainedModel", folder: Path) -> "PreTrainedModel":
    """The base model with a folder's adapters added to its weights: a plain model, all of it trainable."""
    peft = _import_peft(f"--model {folder}")
    return peft.PeftModel.from_pretrained(network, str(folder)).merge_and_unload().requires_grad_(True)


def base_model(folder: Path) -> BaseModel | None:
    """The base model of a folder of adapters; None for any other folder.

    Raises:
        CurriqError: it has no name, because its weights were random.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not settings["base_model_name_or_path"]:
        raise CurriqError(
            f"{folder} holds adapters of a model with random weights, which only `curriq resume` can make "
            "again: give the folder of a whole model, or of adapters of a pretrained one."
        )
    return BaseModel(settings["base_model_name_or_path"], settings.get("revision"))


def _import_peft(user: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise missing_extra(user, f"peft ({error})", "peft", "train all weights (--lora-rank 0)") from None
    # PEFT asks for an attribute by the name that transformers deprecates.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    return peft
