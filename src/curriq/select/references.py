"""Static filters: the heuristics that a learned curriculum has to beat, as scores under one rule.

Each works before the first step and needs no probe. What varies is the score; reading, the acceptance rule
and training are those of the learned policy, so that a comparison compares the score alone.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import RunConfig
from curriq.data.encoder import Encoder, load_encoder
from curriq.data.shards import ShardedStream
from curriq.lm.model import forward_flops
from curriq.select.base import Context, Method, NoCritic, Uniform, always
from curriq.select.loss import load_reference
from curriq.select.rules import RULES
from curriq.select.sharded import stream_proposer
from curriq.select.static import (
    NO_NGRAM,
    Budget,
    DsirScore,
    LearningScore,
    ScoredStream,
    StaticScore,
    WindowScorer,
    documents_of,
    hashed_ngrams,
)
from curriq.types import NO_COST, Cost, Offer, Windows

CLASSIFIER_FOLDS = 4
CLASSIFIER_STEPS = 100
CLASSIFIER_DECAY = 1e-3


@dataclass(eq=False)
class ClassifierScore(LearningScore):
    """Log-odds that a window is the target's and not the stream's, from a linear model of its n-grams.

    Logistic regression on hashed unigrams and bigrams, as the fastText filter of DCLM (Li et al. 2024,
    "DataComp-LM"), with the target's windows against the first ones that are scored; fixed from then on. A
    window is scored by the model that was fitted without its fold of documents, so that none is scored by a
    model that has seen it.

    Args:
        target: windows of the target's held-out text.
    """

    SAVED = ("_weights",)
    steady = True

    target: Windows
    cost: Cost = field(default=NO_COST, init=False)
    _weights: Tensor = field(default_factory=lambda: torch.zeros(0), init=False)

    def learn(self, windows: Windows) -> None:
        if not len(self._weights):
            self._weights = self._fitted(windows)

    def score(self, windows: Windows) -> Float[Tensor, "n"]:
        return self._log_odds(windows)

    def of_target(self) -> Float[Tensor, "D"]:
        return self._log_odds(self.target)

    def _log_odds(self, windows: Windows) -> Float[Tensor, "n"]:
        ngrams = hashed_ngrams(windows, "cpu") + (NO_NGRAM + 1) * _fold(windows)[:, None]
        return self._weights[ngrams].mean(1)

    def _fitted(self, stream: Windows) -> Float[Tensor, "w"]:
        """Weights of the n-grams under each fold's model, one after another."""
        ngrams = torch.cat([hashed_ngrams(part, "cpu") for part in (self.target, stream)])
        fold = torch.cat([_fold(part) for part in (self.target, stream)])
        is_target = torch.arange(len(ngrams)) < len(self.target)
        fitted = []
        for left_out in range(CLASSIFIER_FOLDS):
            rows = fold != left_out
            fitted.append(_logistic_regression(ngrams[rows], is_target[rows].float()))
        return torch.cat(fitted)


def _fold(windows: Windows) -> Int[Tensor, "n"]:
    return documents_of(windows).remainder(CLASSIFIER_FOLDS)


def _logistic_regression(ngrams: Int[Tensor, "n g"], label: Float[Tensor, "n"]) -> Float[Tensor, "w"]:
    """Weights whose mean over the n-grams of a window is its log-odds, both classes counting the same."""
    weights = torch.zeros(NO_NGRAM + 1, requires_grad=True)
    balance = torch.where(label > 0, 0.5 / label.sum().clamp(min=1), 0.5 / (1 - label).sum().clamp(min=1))
    optimizer = torch.optim.Adam([weights], lr=0.5)
    for _ in range(CLASSIFIER_STEPS):
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(weights[ngrams].mean(1), label, reduction="none")
        (balance @ losses + CLASSIFIER_DECAY * weights.square().mean()).backward()
        optimizer.step()
    return weights.detach()


NEAREST = 8
"""Windows of the target that a window is compared with, the nearest ones."""


@dataclass(eq=False)
class EmbeddingScore(LearningScore):
    """Mean cosine similarity of a window's embedding to the nearest windows of the target, after BETR
    (Mizrahi et al. 2025, "Language Models Improve When Pretraining Data Matches Target Tasks").

    Args:
        target: windows of the target's held-out text.
        encoder: embeds texts.
        decode: token ids of several windows → their texts.
    """

    target: Windows
    encoder: Encoder
    decode: Callable[[list[list[int]]], list[str]]
    cost: Cost = field(default=NO_COST, init=False)

    def __post_init__(self) -> None:
        self._target = self._embedded(self.target)

    def score(self, windows: Windows) -> Float[Tensor, "n"]:
        return self._nearness(self._embedded(windows) @ self._target.T)

    def of_target(self) -> Float[Tensor, "D"]:
        """Scores of the target's own windows, against those of its other documents: all, where there are
        fewer than `NEAREST`. A target of one document is compared with its other windows, and one of a single
        window with itself."""
        document = documents_of(self.target)
        own = document[:, None] == document
        if own.all():
            own = torch.eye(len(own), dtype=torch.bool) & (len(own) > 1)
        return self._nearness((self._target @ self._target.T).masked_fill(own, -torch.inf))

    def _nearness(self, similarity: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
        """Mean of the greatest similarities of each row, without those that are masked by −∞."""
        nearest = similarity.topk(min(NEAREST, similarity.shape[1]), dim=1).values
        counts = nearest.isfinite()
        few = nearest.where(counts, 0.0).sum(1) / counts.sum(1)
        return torch.where(counts.all(1), nearest.mean(1), few)

    def _embedded(self, windows: Windows) -> Float[Tensor, "n e"]:
        return torch.from_numpy(self.encoder.encode(self.decode(windows.tokens.tolist())))


@dataclass(eq=False)
class ReferenceLoss(LearningScore):
    """Minus the loss of a window under a model of the target's text, nats per token: low perplexity is good
    (Wenzek et al. 2020, "CCNet").

    With `base` the loss under another model is added, so that what is hard for every model does not count
    against a window: with the model in training, what is learnable and not yet learnt (Mindermann et al.
    2022, "Prioritized Training").
    """

    target: Windows
    reference: Callable[[Windows], Float[Tensor, "n"]]
    _: KW_ONLY
    cost: Cost
    base: Callable[[Windows], Float[Tensor, "n"]] | None = None

    def score(self, windows: Windows) -> Float[Tensor, "n"]:
        score = -self.reference(windows)
        return (score if self.base is None else score + self.base(windows)).cpu()

    def of_target(self) -> Float[Tensor, "D"]:
        return self(self.target)


@dataclass(eq=False)
class SourceLabel(LearningScore):
    """1 for a window of the target's own source, 0 for any other: what the labels of the sources say."""

    steady = True

    target: Windows
    target_source: int
    cost: Cost = field(default=NO_COST, init=False)

    def score(self, windows: Windows) -> Float[Tensor, "n"]:
        return (windows.source == self.target_source).double()

    def of_target(self) -> Float[Tensor, "D"]:
        return torch.ones(len(self.target), dtype=torch.float64)


def _perplexity(config: RunConfig, context: Context) -> ReferenceLoss:
    reference = load_reference(config, context)
    cost = Cost(extra_flops=forward_flops(reference, config.data.window))
    return ReferenceLoss(context.corpus.held_out.reference, reference.window_losses, cost=cost)


def _rho(config: RunConfig, context: Context) -> ReferenceLoss:
    reference = load_reference(config, context)
    cost = Cost(forwards=1, extra_flops=forward_flops(reference, config.data.window))
    target, base = context.corpus.held_out.reference, context.lm.window_losses
    return ReferenceLoss(target, reference.window_losses, cost=cost, base=base)


def _embedding(config: RunConfig, context: Context) -> EmbeddingScore:
    encoder = load_encoder(config.select.static_encoder)
    decode = context.corpus.tokenizer.batch_decode
    return EmbeddingScore(context.corpus.held_out.reference, encoder, decode)


SCORES: dict[str, Callable[[RunConfig, Context], StaticScore]] = {
    "dsir": lambda config, context: DsirScore(context.corpus.held_out.reference, context.lm.device),
    "classifier": lambda config, context: ClassifierScore(context.corpus.held_out.reference),
    "embedding": _embedding,
    "perplexity": _perplexity,
    "rho": _rho,
    "labels": lambda config, context: SourceLabel(
        context.corpus.held_out.reference, context.corpus.source_names.index(config.data.target)
    ),
}
"""The values of `--static-score`."""


def window_scorer(config: RunConfig, context: Context) -> WindowScorer:
    """The static score that the configuration names, with the probabilities of its acceptance rule where they
    are asked for: on the corpus's stream, or of all shards where it is read in several."""
    settings, names, stream = config.select, context.corpus.source_names, context.corpus.stream
    own = names.index(config.data.target)
    trusted = settings.accept_target_source and config.data.sources[own].weight > 0
    accepts = settings.prior or settings.selector == "filter"
    score = SCORES[settings.static_score](config, context)
    rule = RULES[settings.static_rule](settings, config.data.window) if accepts else None
    target, own = context.corpus.held_out.reference, own if trusted else -1
    start = 0 if config.lm.pretrained else settings.sharp_start
    windows = config.train.steps * config.train.num_candidates
    budget = Budget(windows, config.train.max_read_ratio, settings.target_passes)
    scorer = WindowScorer if isinstance(stream, ShardedStream) else partial(ScoredStream, stream)
    return scorer(score, rule, target, own_source=own, sharp_start=start, budget=budget)


def accepted_by_prior(offer: Offer) -> Float[Tensor, "n"]:
    """The probability with which the static filter accepts each window."""
    return offer.known["prior"]


def build(config: RunConfig, context: Context) -> Method:
    """`--selector filter`: a static filter, nothing learned."""
    scorer = window_scorer(config, context)
    proposer = stream_proposer(config, context, scorer, accepted_by_prior, foreseeable=always)
    return Method(proposer=proposer, selector=Uniform(), critic=NoCritic())
