"""Static scores against brute force, and on text of which it is known what is like the target."""

import io

import numpy as np
import pytest
import torch
from tests.unit.test_dsir import grammar, own_words, windows_of
from torch import Tensor

from curriq.select.references import (
    NEAREST,
    SCORES,
    ClassifierScore,
    EmbeddingScore,
    ReferenceLoss,
    SourceLabel,
)
from curriq.select.static import StaticScore
from curriq.types import Cost, Windows

V = 50


def auc(good: Tensor, bad: Tensor) -> float:
    """Probability that a good window scores above a bad one."""
    return (good[:, None] > bad).double().mean().item()


class TestClassifier:
    def test_separates_shuffled_tokens_from_the_targets(self):
        """Windows that it was fitted on and fresh ones."""
        clean = grammar(600, 3, vocabulary=V)
        shuffled = clean.gather(
            1, torch.rand(clean.shape, generator=torch.Generator().manual_seed(4)).argsort(1)
        )
        mixed = torch.stack([clean, shuffled], 1).flatten(0, 1)
        score = ClassifierScore(windows_of(grammar(300, 0, vocabulary=V)))
        for found in (score(windows_of(mixed[:800])), score(windows_of(mixed[800:]))):
            assert auc(found[::2], found[1::2]) > 0.95

    def test_is_not_fooled_by_the_windows_that_it_was_fitted_on(self):
        """A stream of the target's kind, with words that only one document has: by heart the model would tell
        all windows of one side from all of the other."""
        ours, theirs = own_words(60, seed=1), own_words(120, seed=2)
        score = ClassifierScore(windows_of(*ours))
        fitted = score(windows_of(theirs[0][:360], theirs[1][:360]))
        fresh = score(windows_of(theirs[0][360:], theirs[1][360:]))
        target = score.of_target()
        assert auc(target, fitted) == pytest.approx(0.5, abs=0.12)
        assert auc(fresh, fitted) == pytest.approx(0.5, abs=0.08)

    def test_documents_that_are_not_known_would_fool_it(self):
        """The same windows, their folds drawn by window: the test above can fail."""
        ours, theirs = own_words(60, seed=1), own_words(60, seed=2)
        score = ClassifierScore(windows_of(ours[0]))
        fitted = score(windows_of(theirs[0]))
        assert auc(score.of_target(), fitted) > 0.8

    def test_stays_as_it_was_fitted_and_continues_from_its_state(self):
        target, first, later = (windows_of(grammar(80, seed, vocabulary=V)) for seed in range(3))
        one, other = ClassifierScore(target), ClassifierScore(target)
        one(first)
        expected = one(later), one.of_target()
        buffer = io.BytesIO()
        torch.save(one.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(other(later), expected[0])
        assert torch.equal(other.of_target(), expected[1])
        assert torch.equal(one(later), expected[0])


class Angles:
    """Embeds the text "a" as the unit vector at the angle a, in thousandths."""

    def encode(self, texts) -> np.ndarray:
        angle = np.array([float(text) for text in texts]) / 1000
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def angles(n: int, seed: int, documents: int) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 3000, (n, 1), generator=generator)
    return windows_of(tokens, torch.randint(0, documents, (n,), generator=generator))


class TestEmbedding:
    def test_is_the_mean_similarity_to_the_nearest_windows_of_other_documents(self):
        """By sorting differences of angles. Windows of the stream are of no document of the target."""
        target, stream = angles(60, 0, 7), angles(40, 1, 100)
        score = EmbeddingScore(target, Angles(), lambda rows: [str(row[0]) for row in rows])

        def expected(window: Windows, i: int, others: Tensor) -> float:
            difference = (target.tokens[others, 0] - window.tokens[i, 0]).double() / 1000
            return difference.cos().sort(descending=True).values[:NEAREST].mean().item()

        everything = torch.ones(60, dtype=torch.bool)
        found = score(stream)
        assert found.tolist() == pytest.approx([expected(stream, i, everything) for i in range(40)], abs=1e-5)
        own = [expected(target, i, target.document != target.document[i]) for i in range(60)]
        assert score.of_target().tolist() == pytest.approx(own, abs=1e-5)

    def test_of_fewer_windows_than_are_compared(self):
        target = windows_of(torch.tensor([[0], [1000], [2000]]))
        score = EmbeddingScore(target, Angles(), lambda rows: [str(row[0]) for row in rows])
        found = score(windows_of(torch.tensor([[0]])))
        assert found.item() == pytest.approx((1 + np.cos(1) + np.cos(2)) / 3, abs=1e-5)

    @pytest.mark.parametrize(
        ("documents", "expected"),
        [
            ([1, 2, 3], [(np.cos(1) + np.cos(2)) / 2, np.cos(1), (np.cos(1) + np.cos(2)) / 2]),
            ([1, 1, 2], [np.cos(2), np.cos(1), (np.cos(1) + np.cos(2)) / 2]),
            ([1, 1, 1], [(np.cos(1) + np.cos(2)) / 2, np.cos(1), (np.cos(1) + np.cos(2)) / 2]),
        ],
    )
    def test_of_a_target_with_few_windows_of_other_documents(
        self, documents: list[int], expected: list[float]
    ):
        """Those that there are count, and nothing in place of the others."""
        target = windows_of(torch.tensor([[0], [1000], [2000]]), torch.tensor(documents))
        score = EmbeddingScore(target, Angles(), lambda rows: [str(row[0]) for row in rows])
        assert score.of_target().tolist() == pytest.approx(expected, abs=1e-5)

    def test_of_a_target_of_one_window(self):
        score = EmbeddingScore(windows_of(torch.tensor([[7]])), Angles(), lambda rows: ["7"] * len(rows))
        assert score.of_target().item() == pytest.approx(1, abs=1e-5)

    def test_of_a_target_with_enough_no_bit_depends_on_the_mask(self):
        target = angles(60, 0, 7)
        score = EmbeddingScore(target, Angles(), lambda rows: [str(row[0]) for row in rows])
        embedded = torch.from_numpy(Angles().encode([str(row[0]) for row in target.tokens.tolist()]))
        assert target.document is not None
        own = target.document[:, None] == target.document
        nearest = (embedded @ embedded.T).masked_fill(own, -1.0).topk(NEAREST, dim=1).values
        assert torch.equal(score.of_target(), nearest.mean(1))


def easy(windows: Windows) -> Tensor:
    """A loss that is the first token, in tenths."""
    return windows.tokens[:, 0] / 10


class TestReferenceLoss:
    def test_perplexity_is_minus_the_loss_of_the_reference(self):
        target, stream = (windows_of(grammar(9, seed)) for seed in range(2))
        score = ReferenceLoss(target, easy, cost=Cost(extra_flops=5))
        assert score.cost == Cost(extra_flops=5)
        assert torch.equal(score(stream), -stream.tokens[:, 0] / 10)
        assert torch.equal(score.of_target(), -target.tokens[:, 0] / 10)

    def test_rho_is_the_excess_over_the_reference_under_the_model_as_it_is_now(self):
        """What is hard for both models, and what is easy for both, scores 0."""
        loss = {"level": 5.0}

        def training(windows: Windows) -> Tensor:
            return torch.full((len(windows),), loss["level"])

        target = windows_of(grammar(9, 0))
        score = ReferenceLoss(target, easy, cost=Cost(forwards=1), base=training)
        hard, learnt, worth_learning = 50, 50, 10
        found = score(windows_of(torch.tensor([[hard], [worth_learning]])))
        assert found.tolist() == [0.0, 4.0]
        loss["level"] = 1.0
        assert score(windows_of(torch.tensor([[learnt], [worth_learning]]))).tolist() == [-4.0, 0.0]
        assert torch.equal(score.of_target(), 1.0 - target.tokens[:, 0] / 10)


def test_labels_say_what_is_of_the_targets_source():
    stream = windows_of(grammar(5, 0))
    stream.source.copy_(torch.tensor([0, 2, 1, 2, 0]))
    score = SourceLabel(windows_of(grammar(3, 1)), 2)
    assert score(stream).tolist() == [0, 1, 0, 1, 0]
    assert score.of_target().tolist() == [1, 1, 1]


def test_every_score_conforms_to_the_protocol():
    target = windows_of(grammar(9, 0))
    made = {
        "dsir": None,  # tests/unit/test_dsir.py
        "classifier": ClassifierScore(target),
        "embedding": EmbeddingScore(target, Angles(), lambda rows: [str(row[0]) for row in rows]),
        "perplexity": ReferenceLoss(target, easy, cost=Cost()),
        "rho": ReferenceLoss(target, easy, cost=Cost(), base=easy),
        "labels": SourceLabel(target, 0),
    }
    assert set(made) == set(SCORES)
    assert all(isinstance(score, StaticScore) for score in made.values() if score is not None)
