"""Any Hugging Face causal language model behind a few names.

The model is cut into its trunk (tokens → last hidden states) and its head (hidden states → logits), so
that scoring reads the hidden state alone and the head can be run on a few windows at a time. The cut is
checked against the model's own logits when it is made.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curriq.config import LMConfig, unknown_key
from curriq.errors import CurriqError
from curriq.rng import derive_seed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("curriq")


class LanguageModel:
    """θ: trunk, head, features and losses of one causal language model.

    Attributes:
        network: the Hugging Face model, in training mode, float32 parameters.
        width: d, the width of the hidden state that the head reads (not always `config.hidden_size`).
    """

    def __init__(self, network: "PreTrainedModel", device: torch.device, precision: str = "fp32") -> None:
        self.network = network.to(device).train()
        self.device = device
        self._bf16 = precision == "bf16"
        self._output = network.get_output_embeddings()
        if self._output is None:
            raise CurriqError(
                f"model {network.config.model_type!r} has no output embeddings: "
                "curriq needs a causal language model with a vocabulary head."
            )
        config = network.config
        self._multiplier = getattr(config, "logit_scale", None) or 1.0
        self._divisor = getattr(config, "logits_scaling", None) or 1.0
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.width: int = self._output.weight.shape[1]
        self.vocab_size: int = self._output.weight.shape[0]
        self.has_dropout = any(
            isinstance(value, float) and value > 0 for _, value in dropout_settings(config)
        )
        self._check_cut()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def trunk(self, tokens: Int[Tensor, "n T"]) -> Float[Tensor, "n T d"]:
        """Last hidden states, after the final normalisation."""
        with self._autocast():
            return self.network.base_model(input_ids=tokens, use_cache=False).last_hidden_state

    def head(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch V"]:
        """Next-token logits in float32 (float64 for a float64 model)."""
        with self._autocast():
            logits = self._output(hidden)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self._multiplier != 1.0 or self._divisor != 1.0:
            logits = logits * (self._multiplier / self._divisor)
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """No gradient and no dropout: a score must not be noise."""
        toggle = self.has_dropout
        if toggle:
            self.network.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            if toggle:
                self.network.train()

    def save(self, folder: Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` opens."""
        self.network.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Read back the weights that `save` wrote, exactly."""
        from transformers import AutoModelForCausalLM

        stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.network.load_state_dict(stored.state_dict())

    def _autocast(self) -> Any:
        if not self._bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _check_cut(self) -> None:
        """Refuse a model whose logits the generic trunk and head do not reproduce."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocab_size, (1, 8), generator=generator).to(self.device)
        precision, self._bf16 = self._bf16, False
        self.network.eval()
        with torch.no_grad():
            expected = self.network(input_ids=tokens, use_cache=False).logits
            ours = self.head(self.trunk(tokens))
        self.network.train()
        self._bf16 = precision
        gap = (ours - expected).abs().max().item()
        if not gap <= 1e-3 * (1 + expected.abs().max().item()):
            raise CurriqError(
                f"model {self.network.config.model_type!r}: logits rebuilt from its last hidden state differ "
                f"from its own by {gap:.3g}, so its head does something that curriq does not know. "
                "Use another architecture, or report this one."
            )


def dropout_settings(config: "PretrainedConfig") -> list[tuple[str, Any]]:
    """Every dropout probability of a model configuration, by name."""
    return [
        (name, value)
        for name, value in config.to_dict().items()
        if "drop" in name and isinstance(value, float)
    ]


def load_language_model(
    config: LMConfig,
    tokenizer: "PreTrainedTokenizerBase",
    window: int,
    seed: int,
    device: torch.device,
) -> LanguageModel:
    """Open a pretrained model or make a random one, fit for `window` tokens and the tokenizer.

    Raises:
        CurriqError: the model cannot be found, its context is shorter than the window, an override is
            unknown, or its vocabulary is smaller than the tokenizer's.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if config.model.startswith("random:"):
        _, what, overrides = (config.model + "::").split(":", 2)
        hf_config = _architecture(what, _parse_overrides(overrides.strip(":")))
        hf_config.vocab_size = len(tokenizer)
        hf_config.bos_token_id = hf_config.eos_token_id = tokenizer.eos_token_id
        hf_config.pad_token_id = None
        hf_config.dtype = torch.float32
        _prepare(hf_config, config, window)
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "init"))
            network = AutoModelForCausalLM.from_config(hf_config)
    else:
        hf_config = _open(config.model, "config")
        _prepare(hf_config, config, window)
        network = _open(config.model, "model", config=hf_config, dtype=torch.float32)
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise CurriqError(
            f"vocabulary mismatch: the tokenizer has {len(tokenizer)} entries, the model {config.model!r} has "
            f"{rows} embeddings. Use the model's own tokenizer (--tokenizer auto) or train from scratch."
        )
    if config.gradient_checkpointing:
        network.gradient_checkpointing_enable()
    return LanguageModel(network, device, config.precision)


def _architecture(what: str, overrides: dict[str, Any]) -> "PretrainedConfig":
    """The configuration of an architecture, a folder or a hub model, with overrides.

    The overrides go through the constructor, so that what derives from them (head sizes, key-value
    heads) follows.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    plain = AutoConfig.for_model(what) if what in CONFIG_MAPPING else _open(what, "config")
    known = sorted({*plain.to_dict(), *getattr(plain, "attribute_map", {})})
    for key in overrides:
        if key not in known:
            raise CurriqError(f"--model {what}: override " + unknown_key(key, known))
    if what in CONFIG_MAPPING:
        return AutoConfig.for_model(what, **overrides)
    return _open(what, "config", **overrides)


def _parse_overrides(text: str) -> dict[str, Any]:
    """`n_layer=4,activation_function=relu` → {"n_layer": 4, "activation_function": "relu"}."""
    overrides: dict[str, Any] = {}
    for override in filter(None, text.split(",")):
        key, separator, value = override.partition("=")
        if not separator:
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
    try:
        return opener.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CurriqError(
            f"--model {name!r}: neither a folder with a readable model nor a hub model that can be reached "
            f"from here ({reason}). Give a local folder, check the network (HF_HUB_OFFLINE=1 skips it when "
            "the model is cached), or train from scratch with random:gpt2."
        ) from None


def _prepare(hf_config: "PretrainedConfig", config: LMConfig, window: int) -> None:
    context = getattr(hf_config, "max_position_embeddings", None)
    if context is not None and window > context:
        raise CurriqError(
            f"--window = {window} is longer than the context of {config.model!r}, {context} tokens: "
            f"lower --window to at most {context}, or take a model with a longer context."
        )
    for name, _ in dropout_settings(hf_config):
        setattr(hf_config, name, config.dropout)
    hf_config.use_cache = False


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
