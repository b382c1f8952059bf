"""The DSIR score against a count by dictionary, and on text of which only the order is corrupted."""

import io
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from curriq.select.stream_filter import BUCKETS, MEMORY, PRIOR, DsirScore, ScoredStream
from curriq.types import Offer, Windows

V, T = 50, 12


class Fixed:
    """Gives the windows that it was made with, in their order."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self.position = 0

    def read(self, n: int) -> Offer:
        tokens = self.tokens[self.position : self.position + n]
        self.position += n
        return Offer.of(windows_of(tokens))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state) -> None:
        self.position = state["position"]


def windows_of(tokens: torch.Tensor) -> Windows:
    zero = torch.zeros(len(tokens), dtype=torch.int64)
    return Windows(tokens=tokens, ids=zero, source=zero)


def scored(offered: torch.Tensor, target: torch.Tensor) -> tuple[ScoredStream, DsirScore]:
    """A stream of these windows with their scores, and what scores them."""
    score = DsirScore(windows_of(target))
    return ScoredStream(Fixed(offered), score), score


def read(stream: ScoredStream, n: int) -> torch.Tensor:
    """The scores of the next n windows."""
    return stream.read(n).known["dsir_score"]


def grammar(n: int, seed: int, step: int = 1) -> torch.Tensor:
    """Windows in which `step` follows from each token to the next, nine times in ten."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (n, T), generator=generator)
    follows = torch.rand(n, T, generator=generator) < 0.9
    for t in range(1, T):
        tokens[:, t] = torch.where(follows[:, t], (tokens[:, t - 1] + step) % V, tokens[:, t])
    return tokens


def ngrams(window: list[int]) -> list[tuple[int, ...]]:
    return [(a,) for a in window] + list(pairwise(window))


def test_equals_a_count_by_dictionary():
    """Fifty tokens and 2,500 bigrams: 32,768 buckets hold them with few collisions. A window is compared with
    the others: its own n-grams are taken out of the counts of its side."""
    target, offered = grammar(40, 0), torch.cat([grammar(16, 1), grammar(16, 2, step=7)])
    stream, dsir_score = scored(offered, target)
    found = read(stream, 32)
    ours, theirs = (Counter(g for w in x.tolist() for g in ngrams(w)) for x in (target, offered))

    def score(window: list[int], ours: Counter, theirs: Counter) -> float:
        """The totals are those of all windows on both sides."""
        logs = []
        for g in ngrams(window):
            prior = PRIOR * (ours[g] / n + theirs[g] / m) / 2
            if prior > 0:
                logs.append(math.log((ours[g] + prior) / (n + PRIOR)))
                logs[-1] -= math.log((theirs[g] + prior) / (m + PRIOR))
            else:
                logs.append(0.0)
        return sum(logs) / len(logs)

    n, m = ours.total(), theirs.total()
    expected = torch.tensor([score(w, ours, theirs - Counter(ngrams(w))) for w in offered.tolist()]).double()
    mean, spread = expected.mean(), expected.std(correction=0)
    assert BUCKETS > 10 * V
    assert torch.corrcoef(torch.stack([found.double(), expected]))[0, 1] > 0.999
    assert torch.allclose(found.double(), ((expected - mean) / spread).clamp(-3, 3), atol=0.05)
    own = torch.tensor([score(w, ours - Counter(ngrams(w)), theirs) for w in target.tolist()]).double()
    assert torch.allclose(dsir_score.of_target().double(), ((own - mean) / spread).clamp(-3, 3), atol=0.05)


def test_on_a_stream_of_the_targets_kind_neither_side_scores_higher():
    """Counted with their own n-grams the target's windows would be far above, and the stream's below."""
    stream, dsir_score = scored(grammar(3000, 3), grammar(300, 0))
    found = torch.cat([read(stream, 100) for _ in range(30)])[-1000:]
    assert dsir_score.of_target().mean().item() == pytest.approx(found.mean().item(), abs=0.25)


def test_separates_shuffled_tokens_from_the_targets():
    """The same tokens in another order have other bigrams."""
    clean = grammar(200, 3)
    order = torch.rand(clean.shape, generator=torch.Generator().manual_seed(4)).argsort(1)
    offered = torch.stack([clean, clean.gather(1, order)], 1).flatten(0, 1)
    stream, _ = scored(offered, grammar(300, 0))
    found = torch.cat([read(stream, 40) for _ in range(10)])
    assert found[::2].mean() > found[1::2].mean() + 1.5


def test_is_standardised_and_bounded():
    stream, _ = scored(grammar(2000, 3), grammar(100, 0))
    found = torch.cat([read(stream, 50) for _ in range(40)])
    assert found[-1000:].mean().item() == pytest.approx(0, abs=0.2)
    assert found[-1000:].std().item() == pytest.approx(1, abs=0.2)
    assert found.abs().max() <= 3
    assert 0 < MEMORY < 1


def test_equal_windows_give_no_order():
    stream, _ = scored(torch.ones(8, T, dtype=torch.int64), grammar(20, 0))
    assert read(stream, 8).tolist() == [0.0] * 8


def test_continues_bitwise_from_its_state():
    one, other = (scored(grammar(100, 3), grammar(50, 0)) for _ in range(2))
    read(one[0], 40)
    buffer = io.BytesIO()
    torch.save(one[0].state_dict(), buffer)
    buffer.seek(0)
    other[0].load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(read(one[0], 20), read(other[0], 20))
    assert torch.equal(one[1].of_target(), other[1].of_target())
