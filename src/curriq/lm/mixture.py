"""The policy-weighted mixture gradient (Eqs. 6–8) in a single pass over the candidates.

Scoring and training need the same forward pass at the same θ_k, so there is one. The weights
π_i = exp(s_i)/Z are not known before the last candidate has been scored. Σ exp(s_i − c) ℓ_i is an ordinary
loss for any c, and its gradient divided by Σ exp(s_i − c) is the exact one; only numbers that overflow or
vanish would spoil it. So c is the maximum of the step before, as long as maxima move little; otherwise it is
the running maximum, and when that grows, the gradient collected so far is scaled by exp(c_old − c_new), as in
an online softmax.

Within a micro-batch the graph is cut at the last hidden state: the head runs forward and backward on a few
windows at a time, so that no more than their logits exist at once, and the trunk runs backward once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq import parallel
from curriq.lm.model import LanguageModel, window_losses
from curriq.softq.equations import sample_action
from curriq.state import Saved
from curriq.types import Features, Mixture, Offer, Windows, sent

SomeWindows = TypeVar("SomeWindows", Offer, Windows)

ScoreFunction = Callable[[Offer, Features], Float[Tensor, "n"]]
"""Log-weights of some windows; must not depend on which windows are scored together."""


IN_RANGE = 60.0
"""Greatest distance of the maximum from c, in nats: exp(±60) leaves float32 room on both sides."""
STEADY = 20.0
"""Greatest change of the maximum from step to step, in nats, at which it is the next step's c."""


class Reference(Saved):
    """c of exp(s − c): the maximum of the step before, or None for the running maximum.

    Attributes:
        peak: maximum of the step under way; `advance` takes it in when the step has been taken.
    """

    SAVED = ("c", "_last")

    def __init__(self) -> None:
        self.c: float | None = None
        self._last: float | None = None
        self.peak: float | None = None

    def advance(self) -> None:
        """Go on to the next step."""
        if self.peak is None:
            return
        steady = self._last is not None and abs(self.peak - self._last) < STEADY
        self.c, self._last, self.peak = self.peak if steady else None, self.peak, None


def single_pass(
    lm: LanguageModel,
    offer: Offer,
    score: ScoreFunction,
    with_entropy: bool = False,
    reference: Reference | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Mixture:
    """Leave the gradient of Σ π_i ℓ_i on θ (cleared before) and return the mixture; `meanwhile` is called
    while the device computes it.

    Cost: one forward and one backward pass, as in plain training; twice that in a step whose maximum left the
    range around the reference.

    Raises:
        FloatingPointError: a score is NaN or +∞, or all are −∞.
    """
    reference = Reference() if reference is None else reference
    c, seen = _weighted_pass(lm, offer, score, with_entropy, reference.c)
    meanwhile()
    mixture, log_normaliser, peak = _mixture(lm, offer, seen, with_entropy)
    if reference.c is not None and not abs(peak - c) <= IN_RANGE and math.isfinite(peak):
        c, seen = _weighted_pass(lm, offer, score, with_entropy, None)
        mixture, log_normaliser, peak = _mixture(lm, offer, seen, with_entropy)
    if not math.isfinite(log_normaliser):
        raise FloatingPointError(f"the scores of the candidates are not finite (their maximum is {peak})")
    _scale(lm.engine.gradients(), c - log_normaliser)
    reference.peak = peak
    return mixture


Seen = list[tuple[Features, Tensor]]
"""Features and scores of this rank's windows, piece by piece."""


def _weighted_pass(
    lm: LanguageModel, offer: Offer, score: ScoreFunction, with_entropy: bool, fixed: float | None
) -> tuple[float, Seen]:
    """Leave the gradient of Σ exp(s_i − c) ℓ_i on θ; return c, and what was seen of this rank's windows."""
    lm.zero_grad()
    engine, mine = lm.engine, offer.take(parallel.shard())
    c = -math.inf if fixed is None else fixed
    seen: Seen = []
    for round_ in engine.rounds(len(mine), lm.pieces.micro_batch, gradient=True):
        part = None if round_.idle else mine.take(round_.rows)
        work = _Work(lm, score, with_entropy, c, fixed is None, seen)
        hidden, gradient, grown = engine.inside(partial(work, part, offer.windows), round_)
        if fixed is None and round_.reduced:  # what is summed over ranks must be relative to one c
            c = parallel.reduce_max(grown)
            _scale([*engine.gradients(), gradient], grown - c)
        else:
            c = grown
        engine.backward(hidden, gradient, round_)
    return c, seen


@dataclass
class _Work:
    """The forward pass of a micro-batch, and the head's backward pass on the loss Σ exp(s_i − c) ℓ_i.

    Attributes:
        c: the reference, which grows with the scores where it is the `running` maximum.
        seen: gets the features and scores.
    """

    lm: LanguageModel
    score: ScoreFunction
    with_entropy: bool
    c: float
    running: bool
    seen: Seen

    def __call__(self, batch: Offer | None, windows: Windows) -> tuple[Tensor, Tensor, float]:
        """Hidden states, the gradient at them, and c; of one window with the gradient 0 where there is no
        batch, for the sake of other ranks."""
        lm = self.lm
        if batch is None:
            hidden = lm.trunk(windows.take(slice(1)).tokens)
            return hidden, torch.zeros_like(hidden), self.c
        chunk = lm.pieces.windows(batch.windows)
        hidden = lm.trunk(batch.windows.tokens)
        leaves = [piece.detach().requires_grad_() for piece in hidden.split(chunk)]
        for leaf, part in zip(leaves, _batches(batch, chunk), strict=True):
            losses, entropy = window_losses(lm, leaf, part.windows, self.with_entropy)
            features = window_features(leaf, part, losses, entropy)
            scores = self.score(part, features)
            self.seen.append((features, scores))
            if self.running and (peak := scores.max().item()) > self.c:
                collected = [leaf.grad for leaf in leaves if leaf.grad is not None]
                _scale([*lm.engine.gradients(), *collected], self.c - peak)
                self.c = peak
            if self.c > -math.inf:
                relative = torch.exp(scores - self.c)
                (relative.to(losses.dtype) * losses).sum().backward()
        gradient = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
        return hidden, torch.cat(gradient), self.c


def two_pass(lm: LanguageModel, offer: Offer, score: ScoreFunction, with_entropy: bool = False) -> Mixture:
    """The same gradient by scoring everything first; the reference for `single_pass`.

    Used when the model has dropout: scores are measured without it, gradients are taken with it.
    """
    lm.zero_grad()
    mixture = score_pass(lm, offer, score, with_entropy)
    weighted_gradient(lm, offer.windows, mixture.weights)
    return mixture


Draw = Callable[[Float[Tensor, "n"]], Int[Tensor, "b"]]
"""Indices of the windows to train on, from the log-weights of all."""


def narrowed(scored: Mixture, draw: Draw) -> Mixture:
    """The scored mixture with weight 1/B on the B windows drawn: a forward over N buys a backward over B."""
    # A draw may hang on the last bit of a score, so rank 0's counts.
    chosen = parallel.from_rank_zero(draw(scored.scores).cpu()).to(scored.scores.device)
    weights = torch.zeros_like(scored.weights)
    weights[chosen] = 1 / len(chosen)
    loss = (weights.double() * scored.features.loss.double()).sum().item()
    return replace(scored, weights=weights, loss=loss)


def one_action(generator: torch.Generator) -> Draw:
    """Draws a_k ~ π = softmax(s) alone: the single-action formulation."""
    return lambda scores: torch.tensor(
        [sample_action(torch.softmax(scores.double(), 0), generator)], device=scores.device
    )


def gumbel_top(b: int, generator: torch.Generator) -> Draw:
    """Draws b windows without replacement from π = softmax(s): the b greatest of s_i plus Gumbel noise.

    Successive draws from π, each renormalised over what is left, have the same distribution (Yellott 1977;
    Kool et al. 2019, "Stochastic Beams and Where to Find Them").
    """

    def draw(scores: Tensor) -> Tensor:
        uniform = torch.rand(len(scores), dtype=torch.float64, generator=generator)
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        keys = scores.double().cpu() + gumbel
        return keys.topk(min(b, len(keys))).indices.sort().values.to(scores.device)

    return draw


def score_pass(
    lm: LanguageModel,
    offer: Offer,
    score: ScoreFunction,
    with_entropy: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> Mixture:
    """Features, scores and weights of all windows, without a gradient and without dropout; `meanwhile` is
    called while the device computes them."""
    mine = offer.take(parallel.shard())
    seen: Seen = []

    def work(batch: Offer) -> None:
        chunk = lm.pieces.windows(batch.windows)
        hidden = lm.trunk(batch.windows.tokens)
        for piece, part in zip(hidden.split(chunk), _batches(batch, chunk), strict=True):
            losses = window_losses(lm, piece, part.windows, with_entropy)
            features = window_features(piece, part, *losses)
            seen.append((features, score(part, features)))

    with lm.measuring():
        for round_ in lm.engine.rounds(len(mine), lm.pieces.micro_batch):
            idle = partial(lm.trunk, offer.windows.take(slice(1)).tokens)
            lm.engine.inside(idle if round_.idle else partial(work, mine.take(round_.rows)))
    meanwhile()
    return _mixture(lm, offer, seen, with_entropy)[0]


def weighted_gradient(lm: LanguageModel, windows: Windows, weights: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """Add the gradient of Σ w_i ℓ_i to θ, over the windows of all ranks, and return the sum, which nobody has
    waited for.

    Windows of weight 0 are not forwarded.
    """
    engine, everyone = lm.engine, windows
    used = weights.nonzero().squeeze(1)[parallel.shard()]
    # Ids and sources lie on the CPU, wherever the tokens are: an index there serves both.
    windows, weights = windows.take(used.cpu()), sent(weights[used], lm.device)
    total = torch.zeros((), dtype=torch.float64, device=lm.device)

    def work(batch: Windows, weight: Float[Tensor, "b"]) -> tuple[Tensor, Tensor]:
        """Hidden states and the gradient at them; adds the loss to the total."""
        chunk = lm.pieces.windows(batch)
        hidden = lm.trunk(batch.tokens)
        leaves = [piece.detach().requires_grad_() for piece in hidden.split(chunk)]
        for leaf, part, w in zip(leaves, _batches(batch, chunk), weight.split(chunk), strict=True):
            losses, _ = window_losses(lm, leaf, part)
            loss = (w.to(losses) * losses).sum()
            loss.backward()
            total.add_(loss.detach())
        return hidden, torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None])

    def idle() -> tuple[Tensor, Tensor]:
        hidden = lm.trunk(everyone.take(slice(1)).tokens.to(lm.device))
        return hidden, torch.zeros_like(hidden)

    for round_ in engine.rounds(len(windows), lm.pieces.micro_batch, gradient=True):
        batch = windows.take(round_.rows).to(lm.device)
        run = idle if round_.idle else partial(work, batch, weights[round_.rows])
        hidden, gradient = engine.inside(run, round_)
        engine.backward(hidden, gradient, round_)
    return parallel.reduce_sum_(total)


def _batches(batch: SomeWindows, size: int) -> Iterator[SomeWindows]:
    for start in range(0, len(batch), size):
        yield batch.take(slice(start, start + size))  # ty: ignore[invalid-yield]


def window_features(
    hidden: Float[Tensor, "n T d"],
    offer: Offer,
    losses: Float[Tensor, "n"],
    entropy: Float[Tensor, "n"] | None = None,
) -> Features:
    """What a critic may see of some windows, from their last hidden states; detached."""
    last, pooled = last_and_pooled(hidden.detach())
    return Features(
        hidden=last,
        loss=losses.detach(),
        entropy=entropy,
        pooled=pooled,
        source=sent(offer.windows.source, hidden.device),
        known={name: sent(column, hidden.device) for name, column in offer.known.items()},
    )


def last_and_pooled(hidden: Float[Tensor, "n T d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """h_x of Eq. 2 (the last token's hidden state), and the mean over tokens; float32 or finer."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden[:, -1].to(dtype), hidden.mean(1, dtype=dtype)


def _scale(gradients: list[Tensor], log_factor: float) -> None:
    if gradients and log_factor != 0 and not math.isnan(log_factor):  # −∞ from −∞: there is nothing to scale
        torch._foreach_mul_(gradients, math.exp(log_factor))


def _mixture(lm: LanguageModel, offer: Offer, seen: Seen, with_entropy: bool) -> tuple[Mixture, float, float]:
    """The mixture of all ranks' windows, with the logarithm of its normaliser and the maximum of its scores.

    One message has all that a rank must know of the others' windows, and one read of the device all that the
    host must know.
    """
    # A rank without windows must send the type that the others send.
    dtype = torch.promote_types(lm.parameters[0].dtype, torch.float32)
    widths = {"hidden": lm.width, "pooled": lm.width, "loss": 1, "scores": 1, "source": 1}
    widths |= {"entropy": 1} if with_entropy else {}
    widths |= {f"known/{name}": 1 for name in offer.known}
    rows = [
        torch.cat([_column(name, features, scores).reshape(len(scores), -1).to(dtype) for name in widths], 1)
        for features, scores in seen
    ]
    packed = torch.cat([torch.zeros((0, sum(widths.values())), device=lm.device, dtype=dtype), *rows])
    columns = parallel.gather_rows(packed, len(offer)).split(list(widths.values()), dim=1)
    found = {
        name: column.contiguous() if name in ("hidden", "pooled") else column[:, 0].contiguous()
        for name, column in zip(widths, columns, strict=True)
    }
    scores = found["scores"].double()
    weights, highest = torch.softmax(scores, dim=0), scores.max()
    measured = [(weights * found["loss"].double()).sum(), torch.exp(scores - highest).sum(), highest]
    loss, total, peak = torch.stack(measured).tolist()
    features = Features(
        hidden=found["hidden"],
        loss=found["loss"],
        entropy=found.get("entropy"),
        pooled=found["pooled"],
        source=found["source"].long(),
        known={name: found[f"known/{name}"] for name in offer.known},
    )
    mixture = Mixture(features=features, scores=found["scores"], weights=weights.to(dtype), loss=loss)
    return mixture, peak + math.log(total) if total > 0 else math.nan, peak


def _column(name: str, features: Features, scores: Float[Tensor, "n"]) -> Tensor:
    """What of some windows is gathered under this name."""
    if name == "scores":
        return scores
    kind, _, key = name.partition("/")
    return features.known[key] if key else getattr(features, kind)
