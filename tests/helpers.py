"""Small models and candidates that several test files share."""

from typing import Any

import torch

from curriq.config import LMConfig
from curriq.lm.load import load_language_model
from curriq.lm.model import LanguageModel, Pieces
from curriq.types import Effects, Features, Offer, Step, Windows

VOCAB = 61

TINY = {
    "gpt2": "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,max_position_embeddings=64",
    "llama": "hidden_size=16,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2",
    "gpt_neox": "hidden_size=16,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2",
    "qwen2": "hidden_size=16,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=1",
    "opt": "hidden_size=16,ffn_dim=32,num_hidden_layers=2,num_attention_heads=2,word_embed_proj_dim=8",
}
"""One tiny random model of each architecture, as `--model random:` overrides."""


class StubTokenizer:
    """What `load_language_model` reads of a tokenizer."""

    eos_token_id = 0

    def __init__(self, size: int = VOCAB) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self._size)}


def tiny_lm(architecture: str = "gpt2", **options: Any) -> LanguageModel:
    """A random model of a few thousand parameters, float32; takes what `open_lm` takes."""
    return open_lm(f"random:{architecture}:{TINY[architecture]}", **options)


def open_lm(
    model: str,
    *,
    seed: int = 0,
    window: int = 8,
    vocabulary: int = VOCAB,
    device: str = "cpu",
    **options: Any,
) -> LanguageModel:
    """What `--model` names; the options are those of `LMConfig`."""
    config = LMConfig(model=model, **options)
    return load_language_model(config, StubTokenizer(vocabulary), window, seed, torch.device(device))


def random_offer(n: int, window: int = 8, seed: int = 0, sources: int = 3) -> Offer:
    """Windows of uniform random tokens, from several sources, with difficulty labels."""
    generator = torch.Generator().manual_seed(seed)
    return Offer.of(
        Windows(
            tokens=torch.randint(VOCAB, (n, window), generator=generator),
            ids=torch.arange(n) + 1000 * seed,
            source=torch.randint(sources, (n,), generator=generator),
            difficulty=torch.rand(n, generator=generator),
        )
    )


def effects_of(
    rows: torch.Tensor, effect: torch.Tensor, mixture: float = 0.0, features: Features | None = None
) -> Effects:
    """Measured effects of some windows of a step; where nothing is said of them, nothing is known."""
    if features is None:
        features = Features(hidden=torch.zeros(len(rows), 0), loss=torch.full((len(rows),), torch.nan))
    return Effects(rows=rows, effect=effect, mixture=mixture, features=features)


def finished_step(
    features: Features,
    *,
    offer: Offer | None = None,
    index: int = 0,
    weights: torch.Tensor | None = None,
    action: int = 0,
    reward: float | None = None,
    q: torch.Tensor | None = None,
    effects: Effects | None = None,
) -> Step:
    """A step whose windows had these features and, where nothing else is said, even weights."""
    n = len(features)
    even = torch.full((n,), 1 / n)
    offer = random_offer(n) if offer is None else offer
    return Step(
        index=index,
        offer=offer,
        trained=offer,
        features=features,
        scores=torch.zeros(n),
        weights=even if weights is None else weights,
        loss=features.loss.mean().item(),
        q=q,
        action=action,
        reward=reward,
        effects=effects,
    )


def in_pieces(lm: LanguageModel, micro_batch: int, chunk_tokens: int) -> LanguageModel:
    """The same model, run in pieces of this size."""
    lm.pieces = Pieces(micro_batch, chunk_tokens)
    return lm
