"""Soft tokens through any model, and the gradient of Q with respect to them."""

import pytest
import torch
from tests.helpers import TINY, VOCAB, open_lm, tiny_lm

from curriq.errors import CurriqError
from curriq.langevin.dynamics import bridge_gradient, soft_embed
from curriq.langevin.energy import Energy, features_of
from curriq.lm.embeddings import InputEmbeddings, frozen
from curriq.lm.model import LanguageModel
from curriq.rng import Generators
from curriq.softq.critic import QNetwork

MODELS = {
    **{name: f"random:{name}:{overrides}" for name, overrides in TINY.items()},
    # Multiplies its input embeddings by the square root of their width.
    "gemma2": "random:gemma2:hidden_size=16,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=1,head_dim=8",
    "gemma3": "random:gemma3_text:hidden_size=16,intermediate_size=32,num_hidden_layers=2,"
    "num_attention_heads=2,num_key_value_heads=1,head_dim=8",
}


def tokens(n: int = 3, length: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def make_energy(lm: LanguageModel, batch: int = 2) -> tuple[Energy, QNetwork]:
    q = QNetwork(lm.width, 8, generator=Generators(0)("q")).to(lm.parameters[0].dtype)
    inputs = InputEmbeddings(lm)
    return Energy(lm, inputs, lambda f: q(f.hidden), list(q.parameters()), batch), q


@pytest.mark.parametrize("name", MODELS)
def test_trunk_from_embeddings_is_the_trunk_from_tokens(name: str) -> None:
    lm = open_lm(MODELS[name])
    inputs = InputEmbeddings(lm)
    with torch.no_grad():
        expected = lm.trunk(tokens())
        ours = inputs.trunk(inputs.weight[tokens()])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    if name.startswith("gemma"):
        assert inputs.scale == pytest.approx(4.0, rel=1e-2)  # √16, in gemma's own rounding
    else:
        assert inputs.scale == 1.0
        assert inputs.weight.data_ptr() == lm.network.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_soft_tokens_do_not_see_the_ones_after_them(name: str, attention: str) -> None:
    lm = open_lm(MODELS[name])
    lm.network.set_attn_implementation(attention)
    inputs = InputEmbeddings(lm)
    embeddings = torch.randn(2, 8, inputs.width, generator=torch.Generator().manual_seed(0))
    other = embeddings.clone()
    other[:, 5:] = other[:, 5:].flip(-1)
    with torch.no_grad():
        a, b = inputs.trunk(embeddings), inputs.trunk(other)
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=0, atol=1e-6)
    assert (a[:, 5:] - b[:, 5:]).abs().amax(2).amin() > 1e-3


def test_a_model_that_reads_the_tokens_elsewhere_is_refused() -> None:
    lm = tiny_lm("gpt2")
    trunk = lm.trunk
    lm.trunk = lambda ids: trunk(ids) + ids.float().unsqueeze(-1)  # what no embedding can carry
    with pytest.raises(CurriqError, match=r"'gpt2'.*token ids elsewhere.*--proposer stream"):
        InputEmbeddings(lm)


def test_embeddings_that_are_no_multiple_of_a_matrix_are_refused() -> None:
    lm = tiny_lm("gpt2")
    lm.network.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.exp())
    with pytest.raises(CurriqError, match=r"no multiple of one matrix"):
        InputEmbeddings(lm)


@pytest.mark.parametrize("batch", [1, 2, 10])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gemma2"])
def test_bridge_and_model_together_equal_plain_autograd_in_float64(name: str, batch: int) -> None:
    """λ → softmax → p W → transformer → Q, differentiated by one naive graph."""
    lm = open_lm(MODELS[name])
    lm.network.double()
    energy, q = make_energy(lm, batch)
    inputs = InputEmbeddings(lm)
    logits = torch.randn(3, 6, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    leaf = logits.clone().requires_grad_()
    hidden = inputs.trunk(torch.softmax(leaf / 0.7, -1) @ inputs.weight)
    value = q(hidden[:, -1])
    (expected,) = torch.autograd.grad(value.sum(), leaf)

    soft = soft_embed(logits, 0.7, inputs.weight)
    point = energy.point(soft.embeddings)
    ours = bridge_gradient(logits, 0.7, inputs.weight, soft, point.gradient)
    torch.testing.assert_close(point.q, value.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-13)
    torch.testing.assert_close(point.hidden, hidden.detach(), rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_changes_no_number() -> None:
    points = []
    for checkpointing in (False, True):
        lm = tiny_lm("gpt2", gradient_checkpointing=checkpointing)
        points.append(make_energy(lm)[0].point(InputEmbeddings(lm).weight[tokens()]))
    for plain, recomputed in zip(*points, strict=True):
        assert torch.equal(plain, recomputed)


def test_no_gradient_is_left_on_the_model_or_the_critic() -> None:
    lm = tiny_lm("gpt2")
    energy, q = make_energy(lm)
    for parameter in (*lm.parameters, *q.parameters()):
        parameter.grad = torch.ones_like(parameter)
    energy.point(InputEmbeddings(lm).weight[tokens()])
    energy.hard(tokens())
    for parameter in (*lm.parameters, *q.parameters()):
        assert parameter.requires_grad
        assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_frozen_gives_back_what_it_took() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)

    def fail() -> None:
        with frozen(module.parameters()):
            assert not any(p.requires_grad for p in module.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.requires_grad for p in module.parameters()] == [True, False]


def test_hard_tokens_and_their_own_embeddings_have_one_value() -> None:
    """And it is the value that training sees: last hidden state of the window, without dropout."""
    lm = tiny_lm("gpt2", dropout=0.3)
    energy, q = make_energy(lm)
    hard = energy.hard(tokens())
    torch.testing.assert_close(hard, energy.soft(InputEmbeddings(lm).weight[tokens()]), rtol=1e-5, atol=1e-6)
    with lm.measuring():
        torch.testing.assert_close(hard, q(lm.trunk(tokens())[:, -1]), rtol=1e-5, atol=1e-6)


def test_soft_tokens_have_no_loss_to_read() -> None:
    """A Q-network that reads the loss must not take a made-up one for real."""
    assert features_of(torch.zeros(2, 3, 4)).loss.isnan().all()
