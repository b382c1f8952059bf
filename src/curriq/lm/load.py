"""Opens a pretrained causal language model, or makes a random one; says what is wrong where it cannot."""

import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from curriq.config import LMConfig, did_you_mean, unknown_key
from curriq.errors import CurriqError
from curriq.lm.activations import fuse_activations
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
) -> LanguageModel:
    """Open a pretrained model or make a random one, fit for `window` tokens and the tokenizer.

    Raises:
        CurriqError: the model cannot be found or made, is no causal language model, has a context shorter
            than the window or a vocabulary smaller than the tokenizer's; or an override is unknown.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    entries = 1 + max(tokenizer.get_vocab().values())
    if config.model.startswith("random:"):
        network = _random(config, entries, tokenizer.eos_token_id, window, seed)
    else:
        network = _pretrained(config, window)
        _stop_at(network, tokenizer.eos_token_id)
    embeddings = network.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding), type(embeddings)
    if entries > embeddings.num_embeddings:
        raise CurriqError(
            f"vocabulary mismatch: the tokenizer has {entries} entries, the model {config.model!r} has "
            f"{embeddings.num_embeddings} embeddings. Use the model's own tokenizer (--tokenizer auto) or "
            "train from scratch."
        )
    fuse_activations(network)
    if config.gradient_checkpointing:
        with _refusal(config.model, "has no gradient checkpointing; leave --gradient-checkpointing out"):
            network.activation_checkpointing_enable()
    with _refusal(config.model, "cannot be run"):
        return LanguageModel(network, device, config.precision)


def _random(config: LMConfig, entries: int, eos: int, window: int, seed: int) -> "PreTrainedModel":
    """A new model; its weights depend on the seed alone."""
    from transformers import AutoModelForCausalLM

    _, what, text = (config.model + "::").split(":", 2)
    overrides = _parse_overrides(text.strip(":"))
    hf_config = _architecture(what, overrides)
    _require_causal(hf_config, what)
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


def _pretrained(config: LMConfig, window: int) -> "PreTrainedModel":
    hf_config = _open(config.model, "config")
    _require_causal(hf_config, config.model)
    _prepare(hf_config, config, window)
    network, report = _open(
        config.model, "model", config=hf_config, dtype=torch.float32, output_loading_info=True
    )
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
    for settings in (network.config.get_text_config(), network.generation_config):
        theirs = getattr(settings, "eos_token_id", None)
        if eos in (theirs if isinstance(theirs, list) else [theirs]):
            continue
        if theirs is not None and settings is not network.generation_config:
            logger.warning(
                f"the model's EOS token is {theirs}, its tokenizer's is {eos}: documents end with {eos}."
            )
        if settings is not None:
            settings.eos_token_id = eos


def _architecture(what: str, overrides: dict[str, Any]) -> "PretrainedConfig":
    """The configuration of an architecture, a folder or a hub model, with overrides.

    The overrides go through the constructor, so that what derives from them (head sizes, key-value
    heads) follows.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if what in CONFIG_MAPPING:
        plain = AutoConfig.for_model(what)
    else:
        try:
            plain = _open(what, "config")
        except CurriqError as error:
            raise CurriqError(f"{error}{did_you_mean(what, CONFIG_MAPPING, 'random:{}')}") from error
    known = sorted({*plain.to_dict(), *plain.attribute_map})
    for key in overrides:
        if key not in known:
            raise CurriqError(f"--model {what}: override " + unknown_key(key, known))
    if what not in CONFIG_MAPPING:
        return _open(what, "config", **overrides)
    with _refusal(f"random:{what}", "cannot be made"):
        return AutoConfig.for_model(what, **overrides)


def _parse_overrides(text: str) -> dict[str, Any]:
    """`n_layer=4,activation_function=relu` → {"n_layer": 4, "activation_function": "relu"}."""
    overrides: dict[str, Any] = {}
    for override in filter(None, text.split(",")):
        key, separator, value = override.partition("=")
        if not (key and separator and value):
            raise CurriqError(f"--model override {override!r}: write key=value, for instance n_layer=4.")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return overrides


def _open(name: str, part: str, **options: Any) -> Any:
    """A model's configuration or the model itself, from a folder or the hub, with one clear error."""
    from transformers import AutoConfig, AutoModelForCausalLM

    opener = {"config": AutoConfig, "model": AutoModelForCausalLM}[part]
    folder = Path(name).expanduser()
    try:
        # Without trust_remote_code=False the library would ask on the terminal whether to run such code.
        return opener.from_pretrained(
            str(folder) if folder.is_dir() else name, trust_remote_code=False, **options
        )
    except Exception as error:  # the library raises whatever its readers of files and networks raise
        raise CurriqError(f"--model {name!r} " + _why_not(folder, error)) from error


def _why_not(folder: Path, error: Exception) -> str:
    """What is wrong with a model that could not be opened, and the way out."""
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
    """Type and first line of an error; the whole of it stays attached as the cause."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:2])}"[:300].rstrip(" .:")


def _require_causal(hf_config: "PretrainedConfig", name: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CurriqError(
            f"--model {name!r} is of type {hf_config.model_type!r}, which transformers has no causal "
            "language model for: take a decoder such as gpt2, llama, gpt_neox, qwen2 or opt."
        )


def _prepare(hf_config: "PretrainedConfig", config: LMConfig, window: int) -> None:
    context = context_length(hf_config)
    if context is not None and window > context:
        raise CurriqError(
            f"--window = {window} is longer than the context of {config.model!r}, {context} tokens: "
            f"lower --window to at most {context}, or take a model with a longer context."
        )
    with _refusal(config.model, f"refuses --dropout {config.dropout}"):
        for part, name in dropout_settings(hf_config):
            # LayerDrop leaves out whole layers, which is no dropout of activations.
            wanted = 0.0 if name == "layerdrop" else config.dropout
            if getattr(part, name) != wanted:
                setattr(part, name, wanted)


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU when there is one, otherwise the CPU.

    Raises:
        CurriqError: the named device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CurriqError(f"--device {name!r} cannot be used here ({reason}): try auto or cpu.") from None
    return device
