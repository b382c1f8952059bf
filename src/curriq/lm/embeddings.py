"""The forward pass from embeddings instead of tokens, for the soft tokens of Eq. 11."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curriq.config import require
from curriq.lm.model import LanguageModel


class InputEmbeddings:
    """W_e of a language model, and its trunk behind it, at the positions of training: 0 to L − 1.

    The trunk reads what the embedding module returns, and that is not always a row of its weight: Gemma
    multiplies by `embed_scale`. The factor is measured, and the trunk from embeddings is compared with the
    trunk from tokens.

    Raises:
        CurriqError: the embeddings are no multiple of one matrix, or the model reads the token ids elsewhere.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._trunk = lm.network.get_decoder()
        module = self._module = lm.network.get_input_embeddings()
        self._require(isinstance(module, nn.Embedding), f"its input embeddings are a {type(module).__name__}")
        size = module.num_embeddings
        tokens = torch.linspace(0, size - 1, min(8, size), device=lm.device).long().unsqueeze(0)
        with lm.measuring():
            given, expected = module(tokens), lm.trunk(tokens)
            rows, exact = module.weight[tokens].double(), given.double()
            scale = ((rows * exact).sum() / rows.square().sum().clamp_min(1e-30)).item()
            is_multiple = torch.allclose(exact, rows * scale, rtol=1e-4, atol=1e-6)
            self._require(is_multiple, "its input embeddings are no multiple of one matrix")
            gap = (self.trunk(given) - expected).abs().max().item()
        self.scale = 1.0 if abs(scale - 1) < 1e-6 else scale
        differs = f"from embeddings its last hidden state differs by {gap:.3g} from that of the tokens"
        close = gap <= 1e-3 * expected.abs().max().item()
        self._require(close, f"{differs}, so it reads the token ids elsewhere too")

    def _require(self, holds: bool, reason: str) -> None:
        kind = self._lm.network.config.model_type
        use = "Use --proposer stream, or another model."
        require(holds, f"model {kind!r} cannot read soft tokens: {reason}. {use}")

    @property
    def width(self) -> int:
        """e, which need not be the width of the hidden states."""
        return self._module.weight.shape[1]

    @property
    def weight(self) -> Float[Tensor, "V e"]:
        """Input of the trunk for each token, detached; the parameter's own memory where the scale is 1."""
        weight = self._module.weight.detach()
        return weight if self.scale == 1.0 else weight * self.scale

    @property
    def is_tied(self) -> bool:
        """Whether the vocabulary head shares this matrix."""
        return self._lm.network.get_output_embeddings().weight is self._module.weight

    def trunk(self, embeddings: Float[Tensor, "n L e"]) -> Float[Tensor, "n L d"]:
        """Last hidden states, as `LanguageModel.trunk` gives them for tokens."""
        with self._lm.autocast():
            return self._trunk(inputs_embeds=embeddings, use_cache=False).last_hidden_state


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Generator[None]:
    """No gradient is left on the parameters, and none of their inputs is kept for one."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
