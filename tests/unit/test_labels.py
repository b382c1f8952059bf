"""Tokens that are not learnt (label −100) in losses, gradients and scores, and on their way to a batch."""

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import VOCAB, finished_step, in_pieces, random_offer, tiny_lm
from tests.runs import assert_same_state

from curriq.config import OptimConfig
from curriq.data.documents import Document, MemorySource
from curriq.data.stream import Packer, SourceReader, WindowStream
from curriq.lm.held_out import EffectProbe, HeldOutReward, held_out_loss, held_out_losses
from curriq.lm.learner import Learner
from curriq.lm.mixture import single_pass, two_pass, weighted_gradient
from curriq.lm.model import LanguageModel, window_losses
from curriq.select.static import DsirScore
from curriq.types import IGNORED, Features, Offer, Step, Windows

N, T = 8, 9
SIZES = {"micro_batch": 3, "chunk_tokens": 16}


def masks() -> torch.Tensor:
    """All learnt; only the last token; none; only the first, which no token predicts; and by chance."""
    learnt = torch.rand(N, T, generator=torch.Generator().manual_seed(2)) < 0.5
    learnt[0], learnt[1:4] = True, False
    learnt[1, -1] = learnt[3, 0] = True
    return learnt


def labelled(windows: Windows, learnt: torch.Tensor) -> Windows:
    return replace(windows, labels=windows.tokens.masked_fill(~learnt, IGNORED))


def some_windows() -> Windows:
    return labelled(random_offer(N, T, seed=4).windows, masks())


def double_lm(architecture: str = "gpt2") -> LanguageModel:
    lm = tiny_lm(architecture)
    lm.network.double()
    return lm


# Losses and gradients, against float64 sums with masks that have nothing of curriq in them


def reference(lm: LanguageModel, windows: Windows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed loss and entropy of each window's learnt predictions, with a gradient; and their number."""
    logits = lm.network(input_ids=windows.tokens, use_cache=False).logits[:, :-1]
    log_probs = F.log_softmax(logits, dim=-1)
    picked = -log_probs.gather(-1, windows.tokens[:, 1:, None]).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    mask = (windows.labels != IGNORED)[:, 1:].double()
    return (picked * mask).sum(1), (entropy * mask).sum(1), mask.sum(1)


def gradient_of(lm: LanguageModel, loss: torch.Tensor) -> torch.Tensor:
    lm.network.zero_grad(set_to_none=True)
    loss.backward()
    return gradients(lm)


def gradients(lm: LanguageModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in lm.parameters])


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1000, 3, 1])
def test_losses_and_entropies_are_means_over_the_learnt_tokens(chunk):
    lm, windows = double_lm(), some_windows()
    sums, entropies, counts = reference(lm, windows)
    assert counts[:4].tolist() == [T - 1, 1, 0, 0]
    expected = gradient_of(lm, (sums / counts.clamp(min=1)).sum())
    losses, entropy = window_losses(
        in_pieces(lm, 8, chunk), lm.trunk(windows.tokens), windows, with_entropy=True
    )
    close(gradient_of(lm, losses.sum()), expected)
    close(losses.detach(), (sums / counts.clamp(min=1)).detach())
    close(entropy, (entropies / counts.clamp(min=1)).detach())
    assert losses[2:4].tolist() == entropy[2:4].tolist() == [0, 0]
    close(in_pieces(lm, **SIZES).window_losses(windows), losses.detach())


def test_where_all_is_learnt_labels_change_no_digit():
    lm, windows = tiny_lm(), random_offer(N, T).windows
    hidden = lm.trunk(windows.tokens)
    plain = window_losses(in_pieces(lm, 8, 1000), hidden, windows, with_entropy=True)
    ours = window_losses(
        in_pieces(lm, 8, 1000), hidden, replace(windows, labels=windows.tokens), with_entropy=True
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("mixture_pass", [single_pass, two_pass])
def test_the_mixture_gradient(mixture_pass):
    lm, offer = double_lm(), Offer.of(some_windows())
    mixture = mixture_pass(in_pieces(lm, **SIZES), offer, lambda part, f: part.rows.double() / 3)
    ours = gradients(lm)
    sums, _, counts = reference(lm, offer.windows)
    losses = sums / counts.clamp(min=1)
    close(ours, gradient_of(lm, mixture.weights @ losses))
    close(mixture.features.loss, losses.detach())
    assert mixture.loss == pytest.approx((mixture.weights @ losses).item(), abs=1e-12)


def test_the_weighted_gradient():
    lm, windows = double_lm(), some_windows()
    weights = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[5] = 0
    lm.network.zero_grad(set_to_none=True)
    total = weighted_gradient(in_pieces(lm, **SIZES), windows, weights)
    ours = gradients(lm)
    sums, _, counts = reference(lm, windows)
    loss = weights @ (sums / counts.clamp(min=1))
    close(ours, gradient_of(lm, loss))
    assert total.item() == pytest.approx(loss.item(), abs=1e-12)


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
@pytest.mark.parametrize("rows", [slice(None), slice(2, None), slice(0, 3)])
def test_the_held_out_loss_is_the_mean_over_tokens_not_over_windows(micro_batch, rows):
    """Windows without a learnt token have no share in it."""
    lm, windows = double_lm(), some_windows().take(rows)
    sums, _, counts = reference(lm, windows)
    ours = held_out_loss(in_pieces(lm, micro_batch, 16), windows)
    assert ours == pytest.approx((sums.sum() / counts.sum()).item(), abs=1e-12)
    by_window = held_out_losses(in_pieces(lm, micro_batch, 16), windows)
    close(by_window.losses, sums / counts.clamp(min=1))
    assert by_window.tokens.tolist() == counts.tolist()
    assert by_window.ids.tolist() == windows.ids.tolist()


def test_the_held_out_loss_of_nothing_is_zero():
    assert held_out_loss(in_pieces(double_lm(), **SIZES), some_windows().take(slice(2, 4))) == 0


def test_reward_and_held_out_gradient_are_of_the_learnt_tokens():
    lm, windows = double_lm(), some_windows()
    reward = HeldOutReward(lm, windows, N, torch.Generator().manual_seed(0))
    probe = EffectProbe(
        Learner(lm, OptimConfig(), 1), reward, windows=N, decay=0.0, generator=torch.Generator()
    )
    reward.draw(0)
    assert probe.effects(0, Offer.of(windows), torch.ones(N)) is None  # before the optimizer's first step
    ours = torch.cat([piece.flatten() for piece in probe._average._average])
    sums, _, counts = reference(lm, windows)
    loss = sums.sum() / counts.sum()
    close(ours, gradient_of(lm, loss))
    assert reward.loss_before == pytest.approx(loss.item(), abs=1e-12)
    assert reward.after(0)[0] == pytest.approx(-loss.item(), abs=1e-12)


# Batches


def test_windows_with_and_without_labels_are_one_batch():
    plain, masked = random_offer(3, T, seed=1).windows, some_windows()
    for parts in ([plain, masked], [masked, plain], [masked, plain, masked]):
        joined = Windows.cat(parts)
        assert torch.equal(joined.tokens, torch.cat([part.tokens for part in parts]))
        labels = [part.tokens if part.labels is None else part.labels for part in parts]
        assert torch.equal(joined.labels, torch.cat(labels))
        assert torch.equal(joined.ids, torch.cat([part.ids for part in parts]))
    assert Windows.cat([plain, plain]).labels is None
    offers = [Offer.of(plain), Offer.of(masked)]
    assert torch.equal(Offer.cat(offers).windows.labels, Windows.cat([plain, masked]).labels)


def test_a_column_that_some_windows_lack_is_refused():
    """A difficulty of the last part alone would be that of other windows."""
    known = random_offer(3, T).windows
    with pytest.raises(AssertionError, match="some parts lack a column"):
        Windows.cat([replace(known, difficulty=None), known])


def test_labels_follow_their_windows():
    windows = some_windows()
    index = torch.tensor([5, 0, 3])
    taken = windows.take(index)
    assert torch.equal(taken.labels, windows.labels[index])
    assert torch.equal(taken.learnt, masks()[index])
    assert random_offer(2, T).windows.learnt is None
    assert windows.to("meta").labels.device.type == "meta"
    assert windows.to("meta").ids.device.type == "cpu"


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("windows", [some_windows(), random_offer(N, T).windows], ids=["labels", "none"])
def test_a_step_survives_a_checkpoint(windows):
    """What the next TD update reads: windows, what is known of them, features, weights and effects."""
    known = {"static_score": torch.linspace(-1, 1, N)}
    features = Features(hidden=torch.randn(N, 3), loss=torch.rand(N), source=windows.source, known=known)
    offer = Offer.of(replace(windows, difficulty=torch.full((N,), math.nan)), known=known, epoch=2)
    step = finished_step(features, offer=offer, index=7, action=3, reward=-1.5, q=torch.rand(N))
    again = Step.from_state_dict(through_a_file(step.state_dict()), "cpu")
    assert (again.index, again.action, again.reward, again.loss) == (7, 3, -1.5, step.loss)
    for name in ("scores", "weights", "q"):
        assert torch.equal(getattr(again, name), getattr(step, name)), name
    assert_same_state(again.features.state_dict(), features.state_dict())
    assert_same_state(again.trained.state_dict(), offer.state_dict())
    assert again.trained.windows.tokens.dtype == torch.int64
    assert again.trained.epoch == 2
    if windows.labels is not None:
        assert torch.equal(again.trained.windows.labels, windows.labels)
        assert again.trained.windows.labels.dtype == torch.int64


# The DSIR score


def cut(windows: Windows, where: slice) -> Windows:
    return replace(windows, tokens=windows.tokens[:, where], labels=None)


def spanned(windows: Windows, where: slice) -> Windows:
    learnt = torch.zeros_like(windows.tokens, dtype=torch.bool)
    learnt[:, where] = True
    return labelled(windows, learnt)


@pytest.mark.parametrize("where", [slice(0, 5), slice(3, 7), slice(6, None), slice(2, 3)])
def test_the_score_of_a_window_is_that_of_its_learnt_tokens(where):
    target, offered = random_offer(30, T, seed=1).windows, random_offer(40, T, seed=2).windows
    ours, theirs = DsirScore(spanned(target, where)), DsirScore(cut(target, where))
    for rows in (slice(0, 16), slice(16, None)):
        part = offered.take(rows)
        torch.testing.assert_close(ours(spanned(part, where)), theirs(cut(part, where)), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.of_target(), theirs.of_target(), rtol=0, atol=1e-5)


def test_each_window_may_learn_another_part():
    target, offered = random_offer(30, T, seed=1).windows, random_offer(20, T, seed=2).windows
    ours, theirs = DsirScore(target), DsirScore(target)
    for number in range(20):
        window, where = offered.take(slice(number, number + 1)), slice(number % 4, 5 + number % 5)
        scores = ours(spanned(window, where)), theirs(cut(window, where))
        if number:  # the first has no spread to be measured in
            torch.testing.assert_close(*scores, rtol=0, atol=1e-5)


def test_a_window_without_learnt_tokens_tells_nothing():
    """Its own importance weight is 0, and no other window's changes."""
    target, offered = random_offer(30, T, seed=1).windows, random_offer(16, T, seed=2).windows
    score = DsirScore(target)
    score(offered)
    seen = score._seen.clone()
    found = score(spanned(offered, slice(0, 0)))
    assert torch.equal(score._seen, seen)
    assert found.isfinite().all()
    assert len(found.unique()) == 1
    nothing = DsirScore(spanned(target, slice(0, 0)))
    assert nothing(offered).isfinite().all()
    assert nothing.of_target().isfinite().all()


# From documents to batches

EOS = 0


@settings(deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=20).filter(any), max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.integers(2, 9),
    st.data(),
)
def test_a_packer_gives_each_token_the_label_of_its_document(learnt, whole, length, data):
    """Against a list of labels cut by hand, of which the windows without a loss go; and the same when it is
    resumed between two documents."""
    cut_at = data.draw(st.integers(0, len(learnt)))
    packer, expected, windows = Packer("chat", length, ((), (EOS,))), [], []
    for number, (mask, everything) in enumerate(zip(learnt, whole, strict=False)):
        if number == cut_at:
            state, packer = through_a_file(packer.state_dict()), Packer("chat", length, ((), (EOS,)))
            packer.load_state_dict(state)
        tokens = [number * 100 + i + 1 for i in range(len(mask))]
        windows += packer.add(tokens, learnt=None if everything else mask)
        if everything:
            expected += [*tokens, EOS]
        else:  # the end of the document is not for the model to learn, unless the mask's author says so
            expected += [token if known else IGNORED for token, known in zip(tokens, mask, strict=True)]
            expected.append(IGNORED)
    rows = [expected[i : i + length] for i in range(0, len(expected) // length * length, length)]
    taught = [row for row in rows if {*row[1:]} != {IGNORED}]
    for window, labels in zip(windows, taught, strict=True):
        ours = window.tokens if window.labels is None else window.labels
        assert ours.tolist() == labels
        assert (window.labels is None) == (IGNORED not in labels)


WORDS = [f"w{i}" for i in range(VOCAB)]


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", *WORDS])}, unk_token="<eos>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")


class EvenTokens(Packer):
    """Learns the tokens of even number."""

    def add(self, tokens, difficulty=math.nan, learnt=None, document=0):
        return super().add(tokens, difficulty, [int(token) % 2 == 0 for token in tokens], document)


def half_labelled_stream(tokenizer) -> WindowStream:
    """Two sources; of the first only some tokens are learnt."""
    generator = torch.Generator().manual_seed(3)
    readers = {}
    for position in range(2):
        texts = [
            Document(" ".join(WORDS[i] for i in torch.randint(VOCAB, (11,), generator=generator).tolist()))
            for _ in range(40)
        ]
        reader = SourceReader(MemorySource(f"s{position}", texts, 0), "none", tokenizer, T, 0, position)
        if position == 0:
            reader._packer = EvenTokens(f"s{position}", T, ((), (EOS,)), position)
        readers[position] = reader
    return WindowStream(readers, [1, 1], 8, torch.Generator().manual_seed(0), {})


@pytest.mark.parametrize("done", [0, 5, 60])
def test_a_stream_with_labels_resumes(tokenizer, done):
    original, restored = half_labelled_stream(tokenizer), half_labelled_stream(tokenizer)
    for _ in range(done):
        original.read(1)
    restored.load_state_dict(through_a_file(original.state_dict()))
    for n in (1, 1, 1, 1, 1, 1, 7, 30):
        ours, theirs = restored.read(n).windows, original.read(n).windows
        assert torch.equal(ours.ids, theirs.ids)
        assert (ours.labels is None) == (theirs.labels is None) == (not (theirs.source == 0).any())
        if theirs.labels is not None:
            assert torch.equal(ours.labels, theirs.labels)
            even = (theirs.tokens % 2 == 0) & (theirs.tokens != EOS)
            assert torch.equal(theirs.learnt, even | (theirs.source == 1)[:, None])
        assert_same_state(restored.state_dict(), original.state_dict())
