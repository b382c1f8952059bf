"""Any Hugging Face causal language model behind a few names.

The model is cut into its trunk (tokens → last hidden states) and its head (hidden states → logits), so
that scoring reads the hidden state alone and the head can be run on a few windows at a time. The cut is
checked against the model's own logits when it is made.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from curriq import parallel
from curriq.errors import CurriqError
from curriq.lm.compute import CompiledBlocks, attention_kernel, blocks_of, compiles, row_kernels
from curriq.lm.engine import Engine, OneProcess, make_engine
from curriq.lm.linear_loss import TORCH, linear_cross_entropy, padded_copy
from curriq.lm.stored import Stored, read_stored
from curriq.types import IGNORED, Windows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Pieces(NamedTuple):
    """The pieces in which windows are run, so that they fit memory; results do not depend on them.

    Attributes:
        micro_batch: windows per forward pass of the trunk.
        chunk_tokens: tokens per pass of the head, whose logits exist at once; at least one window's.
    """

    micro_batch: int = 8
    chunk_tokens: int = 1024

    def windows(self, windows: Windows) -> int:
        """Windows per pass of the head."""
        return max(1, self.chunk_tokens // windows.tokens.shape[1])


HEAD_CHUNK_TOKENS = 512
"""Tokens per pass of the head on a CPU, where more gain no time."""
HEAD_MEMORY_SHARE = 1 / 16
"""Share of a GPU's memory that the logits of a pass may take: large products run at a better rate."""


class LanguageModel:
    """θ: trunk, head, features and losses of one causal language model.

    Attributes:
        network: the Hugging Face model, or a `PeftModel` around it, in training mode, float32 parameters.
        width: d, the width of the hidden state that the head reads (not always `config.hidden_size`).
        vocab_size: V, entries of the head; at least as many as the tokenizer has.
        has_dropout: whether a forward pass in training mode is random.
        reduced_precision: whether the forward pass runs in bfloat16 autocast.
        pieces: in which windows are run.
        engine: how passes run on the processes of the run, see `distribute`.
        kernels: of the fused loss; None where the loss goes through logits.
        recurring: numbers of windows, on this rank, that are run again and again beside full micro-batches.

    Raises:
        CurriqError: the model has no vocabulary head, or does more between its last hidden state and its
            logits than curriq knows, or its training mode adds noise, or a token sees the ones after it.
    """

    def __init__(
        self,
        network: "PreTrainedModel",
        device: torch.device,
        precision: str = "fp32",
        *,
        compile: str = "off",
        attention: str = "auto",
        cross_entropy: str = "torch",
    ) -> None:
        self.pieces = Pieces()
        self.recurring: frozenset[int] = frozenset()
        self._copy: Tensor | None = None
        self.network = network.to(device).train()
        self.engine: Engine = OneProcess(self.network)
        self.device = device
        self.reduced_precision = precision == "bf16"
        self._trunk = network.get_decoder()
        self._output = network.get_output_embeddings()
        if self._trunk is network or not isinstance(self._output, nn.Linear):
            raise CurriqError(
                f"model {network.config.model_type!r} is not made of a trunk and a linear vocabulary head "
                f"({type(network).__name__}): curriq needs a causal language model that is."
            )
        config = network.config.get_text_config()
        self._multiplier = getattr(config, "logit_scale", None) or 1.0
        self._divisor = getattr(config, "logits_scaling", None) or 1.0
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.width: int = self._output.weight.shape[1]
        self.vocab_size: int = self._output.weight.shape[0]
        self.has_dropout = any(getattr(part, name) > 0 for part, name in dropout_settings(network.config))
        self._has_adapters = hasattr(network, "peft_type")
        if self._has_adapters:  # their dropout is not in the model's configuration
            self.has_dropout |= any(isinstance(m, nn.Dropout) and m.p > 0 for m in network.modules())
        self._attention = nullcontext if attention == "auto" else partial(attention_kernel, attention)
        self._compiled: CompiledBlocks | None = None
        self._check_cut()
        if compiles(compile, device):
            self._compiled = CompiledBlocks(blocks_of(self.network), must=compile == "on")
        plain_head = self._output.bias is None and self._multiplier == self._divisor == 1
        self.kernels = row_kernels(cross_entropy, device) if plain_head and self._softcap is None else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones; of a `PeftModel` the adapters."""
        return self.engine.parameters

    def distribute(self, engine: str) -> None:
        """Hand θ to the engine of this name, once it is known what is trained; see `lm.engine`."""
        dtype = torch.bfloat16 if self.reduced_precision else None
        self.engine = make_engine(engine, self.network, self._output, dtype, self.device)

    def memory_bytes(self) -> float:
        """Memory of the device that the model is on."""
        if self.device.type != "cuda":
            return parallel.memory_bytes()
        return float(torch.cuda.get_device_properties(self.device).total_memory)

    def head_chunk(self) -> int:
        """Tokens per pass of the head where nobody has set them."""
        if self.device.type != "cuda":
            return HEAD_CHUNK_TOKENS
        size = 2 if self.reduced_precision else 4
        # The fused loss has one buffer; torch's own keeps float32 logits, log-probabilities and a gradient.
        per_token = self.vocab_size * (size if self.kernels is not None else size + 12)
        return max(HEAD_CHUNK_TOKENS, int(HEAD_MEMORY_SHARE * self.memory_bytes() / per_token))

    def zero_grad(self) -> None:
        """Clear the gradient of θ."""
        for parameter in self.parameters:
            parameter.grad = None

    def trunk(self, tokens: Int[Tensor, "n T"]) -> Float[Tensor, "n T d"]:
        """Last hidden states, after the final normalisation."""
        self._copy = (
            None  # θ may have changed, and a fused optimizer does not count its changes as `_version`
        )
        # A block that is checkpointed is forwarded again inside the backward pass, out of this context.
        with self.autocast(), self._attention(), _no_packing():
            work = partial(self._trunk, input_ids=tokens, use_cache=False)
            if self._compiled is None or len(tokens) not in self._compiled_sizes:
                return work().last_hidden_state
            return self._compiled.run(work, len(tokens)).last_hidden_state

    @property
    def _compiled_sizes(self) -> set[int]:
        """Windows per pass for which blocks are compiled: a full micro-batch, and what is left of a pass that
        recurs."""
        full = self.pieces.micro_batch
        return {full, *(windows % full for windows in self.recurring)}

    def position_losses(
        self, hidden: Float[Tensor, "n t d"], targets: Int[Tensor, "n t"]
    ) -> Float[Tensor, "n t"]:
        """−log probability of each target, nats, without logits in float32; 0 where it is `IGNORED`.

        Needs `kernels`.
        """
        assert self.kernels is not None
        copy = self._compute_weight()
        kernels = self.kernels if copy.dtype != torch.float64 else TORCH  # GPU kernels add up in float32
        losses = linear_cross_entropy(
            hidden.flatten(0, 1), self._output.weight, copy, targets.flatten(), kernels
        )
        return losses.view(targets.shape)

    def _compute_weight(self) -> Float[Tensor, "V2 d"]:
        """The head's weights as passes read them, made once per pass of the trunk."""
        dtype = torch.bfloat16 if self.reduced_precision else self._output.weight.dtype
        if self._copy is None or self._copy.dtype != dtype:
            self._copy = padded_copy(self._output.weight, dtype)
        return self._copy

    def head(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch V"]:
        """Next-token logits in float32 (float64 for a float64 model)."""
        with self.autocast():
            logits = self._output(hidden)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self._multiplier != 1.0 or self._divisor != 1.0:
            logits = logits * (self._multiplier / self._divisor)
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    @contextmanager
    def without_dropout(self) -> Generator[None]:
        """Evaluation mode; restores the mode it found."""
        # Evaluation mode only where it changes something: switching visits every module of the network.
        toggle = self.has_dropout and self.network.training
        if toggle:
            self.network.eval()
        try:
            yield
        finally:
            if toggle:
                self.network.train()

    @contextmanager
    def measuring(self) -> Generator[None]:
        """No gradient and no dropout: a score must not be noise."""
        with self.without_dropout(), torch.no_grad():
            yield

    def window_losses(self, windows: Windows) -> Float[Tensor, "M"]:
        """Mean next-token loss of each window, nats per token, without gradient and dropout."""
        dtype = torch.promote_types(self.parameters[0].dtype, torch.float32)
        losses = [torch.zeros(0, device=self.device, dtype=dtype)]

        def work(batch: Windows | None) -> None:
            if batch is None:  # there are more ranks than windows, and the others need this one
                self.trunk(torch.zeros((1, windows.tokens.shape[1]), dtype=torch.long, device=self.device))
                return
            chunk = self.pieces.windows(batch)
            for i, hidden in enumerate(self.trunk(batch.tokens).split(chunk)):
                losses.append(window_losses(self, hidden, batch.take(slice(i * chunk, (i + 1) * chunk)))[0])

        with self.measuring():
            for round_ in self.engine.rounds(len(windows), self.pieces.micro_batch):
                batch = None if round_.idle else windows.take(round_.rows).to(self.device)
                self.engine.inside(partial(work, batch))
        return torch.cat(losses)

    @contextmanager
    def plain_attention(self) -> Generator[None]:
        """Attention as plain matrix products, which a counter of operations knows on every device."""
        chosen, self._attention = self._attention, nullcontext
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            self._attention = chosen

    def full_precision(self) -> AbstractContextManager[None]:
        """No autocast: for differences of losses that bfloat16 would round away."""
        return self.in_precision("fp32")

    @contextmanager
    def in_precision(self, precision: str) -> Generator[None]:
        """Forward passes in this precision, `fp32` or `bf16`; restores the one that it found."""
        before, self.reduced_precision = self.reduced_precision, precision == "bf16"
        try:
            yield
        finally:
            self.reduced_precision = before

    def save(self, folder: Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` opens; of a `PeftModel` the adapters.

        Where ranks hold parts of θ the weights are left out: `parts` has them.
        """
        if self.engine.sharded:
            config = self.network.config
            config.architectures = [type(self.network).__name__]
            for settings in filter(None, (config, getattr(self.network, "generation_config", None))):
                settings.save_pretrained(folder)
        else:
            # PEFT would otherwise ask the hub whether the base model's embeddings have been resized.
            options = {"save_embedding_layers": False} if self._has_adapters else {}
            self.network.save_pretrained(folder, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def parts(self) -> dict[str, Tensor]:
        """θ and what else a folder of the model holds, by name: the parts of this rank where ranks hold parts
        of it. Tied weights have one name."""
        named = self.network.state_dict(keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(named.items())}
        return {name: tensor for name, tensor in named.items() if first[id(tensor)] == name}

    def load_parts(self, stored: Mapping[str, Stored]) -> None:
        """Read what `parts` has given, whole or in parts, into the parts that this rank holds."""
        parts = self.parts()
        read_stored([(tensor, parts[name]) for name, tensor in stored.items()])

    def autocast(self) -> Any:
        """The precision of the forward pass, as a context."""
        if not self.reduced_precision:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _check_cut(self) -> None:
        """Refuse a model that trunk and head do not reproduce in the mode that training runs in.

        Eight tokens are enough: what may be missed lies between the last hidden state and the logits of
        one position, while attention, however far it reaches, runs inside the trunk on either side.
        """
        kind = self.network.config.model_type
        length = min(8, context_length(self.network.config) or 8)
        generator = torch.Generator().manual_seed(0)
        one = torch.randint(self.vocab_size, (1, length), generator=generator)
        other = one.clone()
        other[:, -1] = (one[:, -1] + 1) % self.vocab_size
        tokens = torch.cat([one, other]).to(self.device)
        with torch.no_grad(), self.full_precision():
            self.network.eval()
            expected = self.network(input_ids=tokens, use_cache=False).logits
            self.network.train(not self.has_dropout)
            ours = self.head(self.trunk(tokens))
        self.network.train()
        tolerance = 1e-3 * expected.abs().max().item()
        if not (gap := (ours - expected).abs().max().item()) <= tolerance:
            raise CurriqError(
                f"model {kind!r}: logits rebuilt from its last hidden state differ from its own by "
                f"{gap:.3g}, so its head does something that curriq does not know, or its training mode adds "
                "noise other than dropout. Use another architecture, or report this one."
            )
        if not (gap := (expected[0, :-1] - expected[1, :-1]).abs().amax().item()) <= tolerance:
            raise CurriqError(
                f"model {kind!r} is not causal: changing the last token changes the logits before it by "
                f"{gap:.3g}, so its loss would be that of text it has seen. Use a decoder such as gpt2."
            )


@contextmanager
def _no_packing() -> Generator[None]:
    """Transformers would read from the device, in every pass, whether several texts share a row; here none
    do."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    found = getattr(masking_utils, name, None)
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, found)


def dropout_settings(config: "PretrainedConfig") -> list[tuple["PretrainedConfig", str]]:
    """Every dropout probability of a model: the configuration (or part of one) that has it, and its name."""
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    return [
        (part, name)
        for part in parts
        for name, value in vars(part).items()
        if "drop" in name and type(value) in (int, float)
    ]


def context_length(config: "PretrainedConfig") -> int | None:
    """Most tokens that the model's position encoding takes; None when it states no limit."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)


def window_losses(
    lm: LanguageModel, hidden: Float[Tensor, "n T d"], windows: Windows, with_entropy: bool = False
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"] | None]:
    """Mean next-token loss of each window over its learnt tokens, and its mean predictive entropy; nats per
    token, 0 for a window without a learnt token.

    Give it as many windows as their logits may be held at once. A single window of more tokens than
    `Pieces.chunk_tokens` is cut into pieces whose logits are recomputed in the backward pass.
    The entropy carries no gradient.
    """
    labels = windows.tokens if windows.labels is None else windows.labels
    n, length = labels.shape
    inputs, targets = hidden[:, :-1], labels[:, 1:]
    chunk_tokens = lm.pieces.chunk_tokens
    pieces = range(0, length - 1, max(1, chunk_tokens)) if length - 1 > chunk_tokens else (0,)
    size = chunk_tokens if len(pieces) > 1 else length - 1
    losses = inputs.new_zeros(n, dtype=torch.promote_types(hidden.dtype, torch.float32))
    entropies = torch.zeros_like(losses) if with_entropy else None
    for start in pieces:
        piece = inputs[:, start : start + size], targets[:, start : start + size]
        if len(pieces) > 1 and torch.is_grad_enabled():
            loss, entropy = checkpoint(_piece, lm, *piece, with_entropy, use_reentrant=False)
        else:
            loss, entropy = _piece(lm, *piece, with_entropy)
        losses = losses + loss
        if entropies is not None and entropy is not None:
            entropies = entropies + entropy
    count = length - 1 if windows.labels is None else token_counts(labels).clamp(min=1)
    return losses / count, None if entropies is None else entropies / count


def token_counts(labels: Int[Tensor, "n T"]) -> Int[Tensor, "n"]:
    """Predicted tokens of each window: those that are learnt and have a token before them."""
    return (labels[:, 1:] != IGNORED).sum(1)


def _piece(
    lm: LanguageModel, hidden: Tensor, targets: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss and entropy [n] of some positions."""
    if lm.kernels is not None and not with_entropy:
        return lm.position_losses(hidden, targets).sum(1), None
    logits = lm.head(hidden)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    loss = loss.view(targets.shape).sum(1)
    if not with_entropy:
        return loss, None
    with torch.no_grad():
        log_probs = F.log_softmax(logits.detach(), dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        entropy = entropy.masked_fill(targets == IGNORED, 0.0).sum(1)
    return loss, entropy


def forward_flops(lm: LanguageModel, window: int) -> int:
    """Operations of one window's forward pass, half of a backward pass's, counted by torch; a multiply-add
    counts as two."""
    return _count_flops(lm, window, lambda tokens: lm.head(lm.trunk(tokens)))


def trunk_flops(lm: LanguageModel, window: int) -> int:
    """The part of `forward_flops` up to the last hidden states, without the head."""
    return _count_flops(lm, window, lm.trunk)


def _count_flops(lm: LanguageModel, window: int, part: Callable[[Tensor], Tensor]) -> int:
    counter = FlopCounterMode(display=False)
    with lm.measuring(), lm.plain_attention(), counter:
        part(torch.zeros((1, window), dtype=torch.long, device=lm.device))
    return counter.get_total_flops()
