"""Selectors that read the model's own uncertainty: loss, predictive entropy, excess loss."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from curriq.config import RunConfig, TokenizerConfig, require
from curriq.data.tokenizer import load_tokenizer
from curriq.errors import CurriqError
from curriq.lm.load import load_language_model
from curriq.lm.model import LanguageModel, forward_flops
from curriq.select.base import POLICY_SPREAD, Context, Method, PlainSelector, plain
from curriq.types import Cost, Features, Offer, Windows


@dataclass(eq=False)
class ByLoss(PlainSelector):
    """Score ±ℓ/temperature: high loss first (sign +1), or low loss first (sign −1).

    Towards a temperature of 0 nats per token the extreme window gets all the weight.
    """

    readings = (POLICY_SPREAD,)

    temperature: float
    sign: Literal[1, -1]

    def score(self, step: int, offer: Offer, features: Features) -> Float[Tensor, "n"]:
        return features.loss * (self.sign / self.temperature)


@dataclass(eq=False)
class Uncertainty(PlainSelector):
    """Score H/temperature, where H is the mean predictive entropy of the window's tokens; nats per token."""

    needs_entropy = True
    readings = (POLICY_SPREAD,)

    temperature: float

    def score(self, step: int, offer: Offer, features: Features) -> Float[Tensor, "n"]:
        assert features.entropy is not None, "needs_entropy is set, but the features have no entropy"
        return features.entropy / self.temperature


@dataclass(eq=False)
class ExcessLoss(PlainSelector):
    """Score (ℓ_θ − ℓ_ref)/temperature: windows that are learnable but not yet learnt.

    The reducible held-out loss of Mindermann et al. 2022, "Prioritized Training on Points that are
    Learnable, Worth Learning, and Not Yet Learnt" (RHO-LOSS). Noise has a high loss under both models
    and cancels.

    Args:
        reference: mean next-token losses under a frozen model of the target text, nats per token.
        temperature: nats per token.
    """

    readings = (POLICY_SPREAD,)

    reference: Callable[[Windows], Float[Tensor, "n"]]
    temperature: float

    def score(self, step: int, offer: Offer, features: Features) -> Float[Tensor, "n"]:
        irreducible = self.reference(offer.windows).to(features.loss.device)
        return (features.loss - irreducible) / self.temperature


def load_reference(config: RunConfig, context: Context) -> LanguageModel:
    """The frozen model of the target text that `--reference-model` names.

    Raises:
        CurriqError: it cannot be loaded, or was trained with another tokenizer.
    """
    name, window, tokenizer = config.select.reference_model, config.data.window, context.corpus.tokenizer
    lm_config = replace(config.lm, model=name, dropout=0.0, lora_rank=0, resize_embeddings=False)
    try:
        reference = load_language_model(lm_config, tokenizer, window, config.train.seed, context.lm.device)
        theirs = load_tokenizer(TokenizerConfig(tokenizer=name), config.lm, list)
    except CurriqError as error:
        # The loaders speak of --model and of training from scratch, which do not help here.
        reason = (str(error.__cause__ or error).strip().splitlines() or [""])[0].rstrip(" .")
        raise CurriqError(
            f"--reference-model {name!r} cannot be used "
            f"({reason.replace('--model', '--reference-model')}). Give the folder or hub name of a trained "
            "causal language model with its tokenizer; `curriq train --preset reference` trains one."
        ) from error
    require(
        tokenizer.get_vocab() == theirs.get_vocab(),
        f"--reference-model {name!r} was trained with another tokenizer than this "
        "run uses, so its losses cannot be compared: train the reference with this run's --tokenizer, "
        "sources and --split-seed.",
    )
    return reference


def build_rho(config: RunConfig, context: Context) -> Method:
    """RHO-LOSS with the model that `--reference-model` names."""
    reference = load_reference(config, context)
    selector = ExcessLoss(reference.window_losses, config.select.selector_temperature)
    cost = Cost(extra_flops=forward_flops(reference, config.data.window))
    return plain(selector, config, context, cost=cost)
