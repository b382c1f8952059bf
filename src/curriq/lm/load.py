"""Opens a pretrained causal language model or makes a random one, with one clear error where it cannot, and
adds low-rank adapters (LoRA, Hu et al. 2021) by PEFT."""

import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from curriq import parallel
from curriq.config import LMConfig, did_you_mean, missing_extra, refuse_unknown, require
from curriq.data.files import user_path
from curriq.data.hub import hub, locate
from curriq.errors import CurriqError
from curriq.lm.contract import train_what_text_reaches
from curriq.lm.model import LanguageModel, context_length, dropout_settings
from curriq.rng import derive_seed
from curriq.runlog.checkpoints import lacks_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("curriq")

MOST_LAYERS = 4096
MOST_OVERRIDE = 1e8
"""Greatest number in an override of `--model random:`, far above any size of a model in use."""


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

    check_model_name(config)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if saved is not None and not config.lora_rank:
        # The folder has the architecture too, so a resume needs no hub.
        config = dataclasses.replace(config, model=str(saved))
    entries = 1 + max(tokenizer.get_vocab().values())
    if not config.pretrained:
        network = _random(config, entries, tokenizer.eos_token_id, window, seed)
    elif saved is not None and lacks_weights(saved):
        network = _without_weights(config, window)
    else:
        network = _pretrained(config, window, None if saved is None else _base_model(saved)[1])
        _stop_at(network, tokenizer.eos_token_id)
    _fit_vocabulary(network, entries, config, seed)
    _fuse_activations(network)
    if config.gradient_checkpointing:
        with _refusal(config.model, "has no gradient checkpointing; leave --gradient-checkpointing out"):
            network.activation_checkpointing_enable()
    if config.lora_rank:
        with _refusal(config.model, f"cannot take --lora-targets {' '.join(config.lora_targets)}"):
            network = _add_adapters(network, config, seed, saved)
    with _refusal(config.model, "cannot be run"):
        lm = LanguageModel(
            network,
            device,
            config.precision,
            # Activations that a block computes again in the backward pass must come from the same code.
            compile="off" if config.gradient_checkpointing else config.compile,
            attention=config.attention,
            cross_entropy=config.cross_entropy,
        )
        train_what_text_reaches(lm)
        return lm


def check_model_name(config: LMConfig) -> None:
    """Refuse a model that cannot exist, before any text is read and without a network.

    Raises:
        CurriqError: a path at which nothing is, or an architecture that transformers does not have.
    """
    from transformers import CONFIG_MAPPING

    what = config.model.removeprefix("random:").partition(":")[0]
    if what in CONFIG_MAPPING and not config.pretrained:
        return
    _, is_local = locate("--model", config.model if config.pretrained else what)
    require(
        is_local or "/" in what or config.pretrained,
        f"--model {config.model!r}: transformers has no architecture {what!r}."
        f"{did_you_mean(what, CONFIG_MAPPING, 'random:{}')} A hub model is random:OWNER/NAME, a folder "
        "random:FOLDER.",
    )


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
        _require_memory(hf_config, config)
        with _seeded(seed, "init"):
            return AutoModelForCausalLM.from_config(hf_config)


def _pretrained(config: LMConfig, window: int, revision: str | None) -> "PreTrainedModel":
    """A model with its weights; of a folder of adapters, the base model with these added to its weights."""
    folder = user_path(config.model)
    base, base_revision = _base_model(folder)
    if base is not None:
        require(
            not config.lora_rank,
            f"--lora-rank {config.lora_rank} with --model {config.model!r}, a folder of adapters: new ones "
            f"would not fit {base!r} without these. `curriq resume` trains the old ones further.",
        )
        network = _pretrained(dataclasses.replace(config, model=base), window, base_revision)
        peft = _import_peft(f"--model {folder}")
        with _refusal(config.model, f"holds adapters that do not fit their base model {base!r}"):
            adapted = peft.PeftModel.from_pretrained(network, str(folder))
            return adapted.merge_and_unload().requires_grad_(True)
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


def _without_weights(config: LMConfig, window: int) -> "PreTrainedModel":
    """The model of a folder that describes one, with weights that are still to be read from elsewhere."""
    from transformers import AutoModelForCausalLM

    hf_config = _open("AutoConfig", config.model)
    hf_config.dtype = torch.float32
    _prepare(hf_config, config, window)
    with _seeded(0, "init"):
        return AutoModelForCausalLM.from_config(hf_config)


def _fit_vocabulary(network: "PreTrainedModel", entries: int, config: LMConfig, seed: int) -> None:
    """Check that the tokenizer has no more entries than the model; on request, give it new ones."""
    embeddings = network.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding), type(embeddings)
    if entries <= (known := embeddings.num_embeddings):
        return
    require(
        config.resize_embeddings and not config.lora_rank,
        f"vocabulary mismatch: the tokenizer has {entries} entries, the model {config.model!r} has {known} "
        "embeddings. Use the model's own tokenizer (--tokenizer auto); or add embeddings for the others, "
        "which begin near the mean of the old ones, with --resize-embeddings (not with --lora-rank, which "
        "would not train them); or train from scratch.",
    )
    with _refusal(config.model, "cannot take more embeddings"), _seeded(seed, "embeddings"):
        network.resize_token_embeddings(entries)
    logger.warning(
        f"--resize-embeddings: {entries - known} new embeddings, for the tokens {known} to {entries - 1} "
        "that the model has never seen."
    )


def _require_memory(hf_config: "PretrainedConfig", config: LMConfig) -> None:
    """Raise CurriqError for a model whose weights alone do not fit into the memory, before it is made."""
    from transformers import AutoModelForCausalLM

    layers = getattr(hf_config.get_text_config(), "num_hidden_layers", 0)
    require(
        layers <= MOST_LAYERS, f"--model {config.model!r} has {layers} layers: use at most {MOST_LAYERS}."
    )
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(hf_config)
    taken, memory = 4 * sum(weight.numel() for weight in model.parameters()), parallel.memory_bytes()
    require(
        taken <= memory,
        f"--model {config.model!r}: its weights alone take {taken / 1e9:,.0f} GB, and this machine has "
        f"{memory / 1e9:,.0f} GB of memory: make it smaller.",
    )


def _add_adapters(network: "PreTrainedModel", config: LMConfig, seed: int, saved: Path | None) -> Any:
    """A `PeftModel` around the network whose adapters alone are trainable: those of the folder `saved`, or
    new ones, which change no output because one factor is zero."""
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
    with _seeded(seed, "lora"):
        if saved is None:
            return peft.get_peft_model(network, settings)
        return peft.PeftModel.from_pretrained(network, str(saved), is_trainable=True)


def _base_model(folder: Path) -> tuple[str | None, str | None]:
    """Name and hub commit of the model that a folder of adapters belongs to; None for any other folder."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None, None
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not settings["base_model_name_or_path"]:
        raise CurriqError(
            f"{folder} holds adapters of a model with random weights, which only `curriq resume` can make "
            "again: give the folder of a whole model, or of adapters of a pretrained one."
        )
    return settings["base_model_name_or_path"], settings.get("revision")


def _import_peft(user: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise missing_extra(user, f"peft ({error})", "peft", "train all weights (--lora-rank 0)") from None
    # PEFT asks for an attribute by the name that transformers deprecates.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    return peft


@contextmanager
def _seeded(seed: int, purpose: str) -> Generator[None]:
    """Initial weights drawn inside depend on seed and purpose alone, and are equal on every device."""
    with torch.random.fork_rng(devices=[]):  # the GPUs' generators stay as they are
        torch.default_generator.manual_seed(derive_seed(seed, purpose))
        yield


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
    plain = make()
    known = sorted({*plain.to_dict(), *plain.attribute_map})
    refuse_unknown(overrides, known, f"--model {what}: override ")
    # Through the constructor, so that what derives from the overrides (head sizes, key-value heads) follows.
    with _refusal(f"random:{what}", "cannot be made"):
        return make(**overrides)


def _parse_overrides(text: str) -> dict[str, Any]:
    """`n_layer=4,activation_function=relu` → {"n_layer": 4, "activation_function": "relu"}."""
    overrides: dict[str, Any] = {}
    for override in filter(None, text.split(",")):
        key, _, value = override.partition("=")
        require(bool(key and value), f"--model override {override!r}: write key=value, such as n_layer=4.")
        overrides[key] = value
        with suppress(ValueError, RecursionError):  # a text that is no JSON stays a text
            overrides[key] = json.loads(value)
        if isinstance(number := overrides[key], int | float) and abs(number) > MOST_OVERRIDE:
            raise CurriqError(f"--model override {override!r}: a number must be at most {MOST_OVERRIDE:g}.")
    return overrides


def _open(opener: str, name: str, **options: Any) -> Any:
    """What one of transformers' Auto classes reads from a folder or the hub, with one clear error."""
    import transformers

    where, is_local = locate("--model", name)
    try:
        with nullcontext() if is_local else hub():
            # Without trust_remote_code=False the library would ask on the terminal whether to run such code.
            return getattr(transformers, opener).from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # the library raises whatever its readers of files and networks raise
        raise CurriqError(f"--model {name!r} " + _why_not(Path(where), error)) from error


def _why_not(folder: Path, error: Exception) -> str:
    """What is wrong with a model that could not be opened, and how to fix it."""
    if "custom code" in str(error):
        code = "needs program code from its own repository (trust_remote_code), which curriq does not run"
        return f"{code}: take a model of an architecture that transformers has."
    if not folder.is_dir():
        return (
            "is neither a folder here nor a hub model that can be reached "
            f"({_first_line(error)}). Check the name and the network (with HF_HUB_OFFLINE=1 only cached "
            "models are found, at once), give a local folder, or train from scratch with random:gpt2."
        )
    if not (folder / "config.json").exists():
        fix = "give a folder that save_pretrained wrote, or train from scratch with --model random:gpt2"
        return f"has no config.json, so it is no model: {fix}; a tokenizer is given by --tokenizer {folder}."
    if lacks_weights(folder):
        run = folder.parents[2]
        return (
            f"has its weights in the parts of its checkpoint: `curriq export {run} --model` writes them here."
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
    """Run GPT-2's GELU, eight elementwise operations that keep much of a pass's memory, as one kernel of the
    same formula. The modules have no weights: checkpoints and configuration do not change."""
    from transformers.activations import NewGELUActivation

    for name, module in list(network.named_modules(remove_duplicate=False)):
        if type(module) is NewGELUActivation:
            network.set_submodule(name, nn.GELU(approximate="tanh"))


def pick_device(name: str) -> torch.device:
    """The named device; `auto` is the first GPU when there is one, otherwise the CPU.

    Raises:
        CurriqError: the named device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first, *_ = str(error).splitlines()
        raise CurriqError(f"--device {name!r} cannot be used here ({first}): try auto or cpu.") from None
    return torch.device(name)
