"""Opens a pretrained causal language model or makes a random one, with one clear error where it cannot."""

import dataclasses
import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from curriq.config import LMConfig, did_you_mean, require, unknown_key
from curriq.errors import CurriqError
from curriq.lm.lora import apply_lora, base_model, merge_adapters
from curriq.lm.model import LanguageModel, context_length, dropout_settings
from curriq.rng import derive_seed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("curriq")


def load_language_model(
    config: LMConfig,
    tokenizer: "PreTrainedTokenizerBase",
    window: int,
    seed: int,
    device: torch.device,
    saved: Path | None = None,
) -> LanguageModel:
    """The language model of a run, fit for `window` tokens and the tokenizer.

    `saved` is a folder that `LanguageModel.save` wrote for this configuration; its weights replace the
    initial ones. With LoRA it holds the adapters alone, and the base model is opened or made again.

    Raises:
        CurriqError: the model cannot be found or made, is no causal language model, has a context shorter
            than the window or a vocabulary smaller than the tokenizer's; or an override is unknown.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if saved is not None and not config.lora_rank:
        # The folder has the architecture too, so a resume needs no hub.
        config = dataclasses.replace(config, model=str(saved))
    entries = 1 + max(tokenizer.get_vocab().values())
    if config.model.startswith("random:"):
        network = _random(config, entries, tokenizer.eos_token_id, window, seed)
    else:
        base = None if saved is None else base_model(saved)
        network = _pretrained(config, window, base and base.revision)
        _stop_at(network, tokenizer.eos_token_id)
    embeddings = network.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding), type(embeddings)
    require(
        entries <= embeddings.num_embeddings,
        f"vocabulary mismatch: the tokenizer has {entries} entries, the model {config.model!r} has "
        f"{embeddings.num_embeddings} embeddings. Use the model's own tokenizer (--tokenizer auto) or "
        "train from scratch.",
    )
    _fuse_activations(network)
    if config.gradient_checkpointing:
        with _refusal(config.model, "has no gradient checkpointing; leave --gradient-checkpointing out"):
            network.activation_checkpointing_enable()
    if config.lora_rank:
        with _refusal(config.model, f"cannot take --lora-targets {' '.join(config.lora_targets)}"):
            network = apply_lora(network, config, seed, saved)
    with _refusal(config.model, "cannot be run"):
        return LanguageModel(network, device, config.precision)


def _random(config: LMConfig, entries: int, eos: int, window: int, seed: int) -> "PreTrainedModel":
    """A new model; its weights depend on the seed alone."""
    from transformers import AutoModelForCausalLM

    _, what, text = (config.model + "::").split(":", 2)
    overrides = _parse_overrides(text.strip(":"))
    hf_config = _architecture(what, overrides)
    with _refusal(config.model, "cannot be made"):
        decoder = hf_config.get_text_config()
        if "vocab_size" not in overrides:
            decoder.vocab_size = entries
        decoder.bos_token_id = decoder.eos_token_id = eos
        decoder.pad_token_id = None  # an embedding of padding would never be trained
        hf_config.dtype = torch.float32
        _prepare(hf_config, config, window)
        # On the CPU alone: the GPUs' generators stay as they are, and every device gets the same weights.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, "init"))
            return AutoModelForCausalLM.from_config(hf_config)


def _pretrained(config: LMConfig, window: int, revision: str | None = None) -> "PreTrainedModel":
    """A model with its weights; of a folder of adapters, the base model with these added to its weights."""
    folder = Path(config.model).expanduser()
    if (base := base_model(folder)) is not None:
        require(
            not config.lora_rank,
            f"--lora-rank {config.lora_rank} with --model {config.model!r}, a folder of adapters: new ones "
            f"would not fit {base.name!r} without these. `curriq resume` trains the old ones further.",
        )
        network = _pretrained(dataclasses.replace(config, model=base.name), window, base.revision)
        with _refusal(config.model, f"holds adapters that do not fit their base model {base.name!r}"):
            return merge_adapters(network, folder)
    hf_config = _open("AutoConfig", config.model, revision=revision)
    _prepare(hf_config, config, window)
    options = {"config": hf_config, "dtype": torch.float32, "output_loading_info": True}
    network, report = _open("AutoModelForCausalLM", config.model, revision=revision, **options)
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise CurriqError(
            f"--model {config.model!r}: {len(missing)} weights of {type(network).__name__} are not in the "
            f"checkpoint ({shown}); they would be random. Give the checkpoint of a whole causal language "
            f"model, or train from scratch with random:{config.model}."
        )
    return network


def _stop_at(network: "PreTrainedModel", eos: int) -> None:
    """Let the model end its texts where its training documents end: at the tokenizer's EOS."""
    for settings in filter(None, (network.config.get_text_config(), network.generation_config)):
        theirs = getattr(settings, "eos_token_id", None)
        if eos in (theirs if isinstance(theirs, list) else [theirs]):
            continue
        if theirs is not None and settings is not network.generation_config:
            logger.warning(
                f"the model's EOS token is {theirs}, its tokenizer's is {eos}: documents end with {eos}."
            )
        settings.eos_token_id = eos


def _architecture(what: str, overrides: dict[str, Any]) -> "PretrainedConfig":
    """The configuration of an architecture, a folder or a hub model, with overrides."""
    from transformers import CONFIG_MAPPING, AutoConfig

    known_type = what in CONFIG_MAPPING
    make = partial(AutoConfig.for_model, what) if known_type else partial(_open, "AutoConfig", what)
    try:
        plain = make()
    except CurriqError as error:
        raise CurriqError(f"{error}{did_you_mean(what, CONFIG_MAPPING, 'random:{}')}") from error
    known = sorted({*plain.to_dict(), *plain.attribute_map})
    for key in overrides:
        require(key in known, f"--model {what}: override " + unknown_key(key, known))
    # Through the constructor, so that what derives from the overrides (head sizes, key-value heads) follows.
    with _refusal(f"random:{what}", "cannot be made"):
        return make(**overrides)


def _parse_overrides(text: str) -> dict[str, Any]:
    """`n_layer=4,activation_function=relu` → {"n_layer": 4, "activation_function": "relu"}."""
    overrides: dict[str, Any] = {}
    for override in filter(None, text.split(",")):
        key, _, value = override.partition("=")
        require(bool(key and value), f"--model override {override!r}: write key=value, such as n_layer=4.")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return overrides


def _open(opener: str, name: str, **options: Any) -> Any:
    """What one of transformers' Auto classes reads from a folder or the hub, with one clear error."""
    import transformers

    folder = Path(name).expanduser()
    where = str(folder) if folder.is_dir() else name
    try:
        # Without trust_remote_code=False the library would ask on the terminal whether to run such code.
        return getattr(transformers, opener).from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # the library raises whatever its readers of files and networks raise
        raise CurriqError(f"--model {name!r} " + _why_not(folder, error)) from error


def _why_not(folder: Path, error: Exception) -> str:
    """What is wrong with a model that could not be opened, and how to fix it."""
    if "custom code" in str(error):
        return (
            "needs program code from its own repository (trust_remote_code), which curriq does not run: "
            "take a model of an architecture that transformers has."
        )
    if not folder.is_dir():
        return (
            "is neither a folder here nor a hub model that can be reached "
            f"({_first_line(error)}). Check the name and the network (with HF_HUB_OFFLINE=1 only cached "
            "models are found, at once), give a local folder, or train from scratch with random:gpt2."
        )
    if not (folder / "config.json").exists():
        return (
            "has no config.json, so it is no model: give a folder that save_pretrained wrote, or train from "
            f"scratch with --model random:gpt2; a tokenizer is given by --tokenizer {folder}."
        )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return f"has a configuration but no weights: train it from scratch with --model random:{folder}."
    return f"cannot be read ({_first_line(error)}): give a folder that save_pretrained wrote, whole."


@contextmanager
def _refusal(name: str, what: str) -> Generator[None]:
    """Turn what transformers raises over a model that it will not make or run into one clear error."""
    try:
        yield
    except CurriqError:
        raise
    except Exception as error:  # ValueError, KeyError, RuntimeError, …: it depends on the architecture
        raise CurriqError(f"--model {name!r} {what} ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    """Type and first lines of an error; the whole of it stays attached as the cause."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300].rstrip(" .:")


def _prepare(hf_config: "PretrainedConfig", config: LMConfig, window: int) -> None:
    """Check kind and context length, and set every dropout."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    require(
        type(hf_config) in MODEL_FOR_CAUSAL_LM_MAPPING,
        f"--model {config.model!r} is of type {hf_config.model_type!r}, which transformers has no causal "
        "language model for: take a decoder such as gpt2, llama, gpt_neox, qwen2 or opt.",
    )
    context = context_length(hf_config)
    require(
        context is None or window <= context,
        f"--window = {window} is longer than the context of {config.model!r}, {context} tokens: "
        f"lower --window to at most {context}, or take a model with a longer context.",
    )
    with _refusal(config.model, f"refuses --dropout {config.dropout}"):
        for part, name in dropout_settings(hf_config):
            # LayerDrop leaves out whole layers, which is no dropout of activations.
            wanted = 0.0 if name == "layerdrop" else config.dropout
            if getattr(part, name) != wanted:
                setattr(part, name, wanted)


def _fuse_activations(network: nn.Module) -> None:
    """Run GPT-2's GELU, eight elementwise operations that keep much of a pass's memory, as one kernel.

    The formula is the same, and the modules have no weights: checkpoints and configuration do not change.
    """
    from transformers.activations import NewGELUActivation

    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))


def pick_device(name: str) -> torch.device:
    """The named device; `auto` is the first GPU when there is one, otherwise the CPU.

    Raises:
        CurriqError: the named device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first, *_ = str(error).splitlines()
        raise CurriqError(f"--device {name!r} cannot be used here ({first}): try auto or cpu.") from None
    return device
