"""Causal language models of many architectures behind one class."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.helpers import TINY, VOCAB, in_pieces, open_lm, random_offer
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MptConfig

from curriq.errors import CurriqError
from curriq.lm.model import LanguageModel, dropout_settings, window_losses
from curriq.types import Windows

WIDE = "hidden_size=16,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2"
ARCHITECTURES = TINY | {
    "llama, tied": f"llama:{WIDE},tie_word_embeddings=true",
    "qwen3": f"qwen3:{WIDE},num_key_value_heads=1,head_dim=8",
    "gemma2": f"gemma2:{WIDE},num_key_value_heads=1,head_dim=8,final_logit_softcapping=0.05",
    "granite": f"granite:{WIDE},num_key_value_heads=2,logits_scaling=8.0",
    "cohere": f"cohere:{WIDE},num_key_value_heads=2,logit_scale=0.0625",
    "phi": f"phi:{WIDE},num_key_value_heads=2",
    "mistral": f"mistral:{WIDE},num_key_value_heads=2,sliding_window=4",
}
"""Beside the models that all tests share: what differs in the head, the norm, the attention's reach."""


def windows_of(n: int = 5, length: int = 12) -> Windows:
    return random_offer(n, length, seed=1).windows


def tiny(architecture: str = "gpt2", **options) -> LanguageModel:
    """A small model with parameters far from their initial values, so that no bias is zero."""
    what = ARCHITECTURES[architecture]
    lm = open_lm(f"random:{what}" if ":" in what else f"random:{architecture}:{what}", window=12, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lm.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return lm


def gradients(lm: LanguageModel, windows: Windows) -> torch.Tensor:
    lm.network.zero_grad(set_to_none=True)
    losses, _ = window_losses(in_pieces(lm, 8, 1000), lm.trunk(windows.tokens), windows)
    losses.sum().backward()
    return torch.cat([p.grad.flatten() for p in lm.parameters if p.grad is not None])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestEveryArchitecture:
    def test_trunk_and_head_are_the_whole_model(self, architecture: str) -> None:
        lm, tokens = tiny(architecture), windows_of().tokens
        with torch.no_grad():
            hidden = lm.trunk(tokens)
            assert hidden.shape == (5, 12, lm.width)
            expected = lm.network(input_ids=tokens, use_cache=False).logits
            torch.testing.assert_close(lm.head(hidden), expected, rtol=1e-5, atol=1e-6)
        assert expected.std() > 1e-3  # or nothing would be compared

    def test_losses_are_those_of_the_model_itself(self, architecture: str) -> None:
        """In float64; the models that normalise in float32 inside do so on both sides."""
        lm, windows = tiny(architecture), windows_of()
        tokens = windows.tokens
        lm.network.double()
        with torch.no_grad():
            losses, entropy = window_losses(
                in_pieces(lm, 8, 24), lm.trunk(tokens), windows, with_entropy=True
            )
            for window, loss, uncertainty in zip(tokens, losses, entropy, strict=True):
                alone = lm.network(input_ids=window[None], labels=window[None], use_cache=False)
                # transformers takes the loss in float32, whatever the model.
                assert loss.item() == pytest.approx(alone.loss.item(), rel=2e-6)
                exact = F.cross_entropy(alone.logits[0, :-1].double(), window[1:])
                assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
                direct = torch.distributions.Categorical(logits=alone.logits[0, :-1].double()).entropy()
                assert uncertainty.item() == pytest.approx(direct.mean().item(), rel=1e-6)

    def test_saved_folder_opens_everywhere(self, architecture: str, tmp_path: Path) -> None:
        lm, tokens = tiny(architecture), windows_of().tokens
        lm.save(tmp_path)
        by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path)
        again = open_lm(str(tmp_path))
        for other in (by_transformers, again.network):
            weights = other.state_dict()
            assert weights.keys() == lm.network.state_dict().keys()
            for name, value in lm.network.state_dict().items():
                assert torch.equal(weights[name], value), name
        with torch.no_grad():
            expected = lm.network.eval()(tokens).logits
            # Up to rounding: an activation in one kernel rounds otherwise than the same in eight.
            assert torch.allclose(by_transformers(tokens).logits, expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(again.head(again.trunk(tokens)), lm.head(lm.trunk(tokens)))


class TestForward:
    def test_entropy_of_a_uniform_and_of_a_certain_prediction(self) -> None:
        lm, windows = tiny(), windows_of()
        with torch.no_grad():
            lm.network.lm_head.weight.zero_()
            _, entropy = window_losses(
                in_pieces(lm, 8, 1000), lm.trunk(windows.tokens), windows, with_entropy=True
            )
            torch.testing.assert_close(entropy, torch.full((5,), VOCAB).log(), rtol=1e-6, atol=0)
        head = nn.Linear(lm.width, VOCAB)
        with torch.no_grad():
            head.weight.zero_()
            head.bias.zero_()[7] = 1000.0
        lm._output = head
        _, entropy = window_losses(
            in_pieces(lm, 8, 1000), lm.trunk(windows.tokens), windows, with_entropy=True
        )
        assert entropy.abs().max() == 0

    def test_projection_of_opt_sets_the_width(self) -> None:
        lm = tiny("opt")
        assert lm.network.config.hidden_size == 16
        assert lm.width == 8

    def test_a_window_longer_than_a_chunk_gives_equal_losses_and_gradients(self) -> None:
        lm, windows = tiny(), windows_of(3, 20)
        lm.network.double()
        results = []
        for chunk in (1000, 7, 1):
            lm.network.zero_grad(set_to_none=True)
            losses, entropy = window_losses(
                in_pieces(lm, 8, chunk), lm.trunk(windows.tokens), windows, with_entropy=True
            )
            losses.sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in lm.parameters])
            results.append((losses.detach(), entropy, gradient))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=1e-12)

    def test_bf16_is_close_and_keeps_float32_weights(self) -> None:
        exact, rough, windows = tiny(), tiny(precision="bf16"), windows_of()
        hidden = rough.trunk(windows.tokens)
        assert rough.head(hidden).dtype == torch.float32
        assert {p.dtype for p in rough.parameters} == {torch.float32}
        losses, _ = window_losses(in_pieces(rough, 8, 1000), hidden, windows)
        expected, _ = window_losses(in_pieces(exact, 8, 1000), exact.trunk(windows.tokens), windows)
        assert not torch.equal(losses, expected)
        torch.testing.assert_close(losses, expected, rtol=0.02, atol=0)
        cosine = F.cosine_similarity(gradients(rough, windows), gradients(exact, windows), dim=0)
        assert cosine > 0.99

    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
    def test_gradient_checkpointing_changes_no_gradient(self, architecture: str) -> None:
        plain, saving = tiny(architecture), tiny(architecture, gradient_checkpointing=True)
        windows = windows_of()
        calls = []
        layer = next(m for m in saving.network.modules() if isinstance(m, nn.ModuleList))[0]
        next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(gradients(saving, windows), gradients(plain, windows), rtol=0, atol=1e-7)
        assert len(calls) == 2  # forward, and once more in the backward pass


class TestDropout:
    def test_is_zero_unless_asked_for(self) -> None:
        lm, tokens = tiny(), windows_of().tokens
        assert GPT2Config().resid_pdrop == 0.1
        assert not lm.has_dropout
        assert lm.network.training
        assert torch.equal(lm.trunk(tokens), lm.trunk(tokens))

    @pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "opt", "llama"])
    def test_is_set_wherever_the_model_has_one(self, architecture: str) -> None:
        lm, tokens = tiny(architecture, dropout=0.25), windows_of().tokens
        assert lm.has_dropout
        values = {name: getattr(part, name) for part, name in dropout_settings(lm.network.config)}
        assert values.pop("layerdrop", 0.0) == 0
        assert set(values.values()) == {0.25}
        assert not torch.equal(lm.trunk(tokens), lm.trunk(tokens))

    def test_dropout_of_a_nested_configuration(self) -> None:
        config = MptConfig()
        found = {(type(part).__name__, name) for part, name in dropout_settings(config)}
        assert found >= {("MptConfig", "resid_pdrop"), ("MptAttentionConfig", "attn_pdrop")}
        assert not open_lm("random:mpt:d_model=16,n_heads=2,n_layers=1").has_dropout
        # transformers declares this one an integer.
        with pytest.raises(CurriqError, match=r"random:mpt.* refuses --dropout 0\.25 .*attn_pdrop"):
            open_lm("random:mpt:d_model=16,n_heads=2,n_layers=1", dropout=0.25)

    def test_measuring_is_free_of_noise_and_restores_the_mode(self) -> None:
        lm, tokens = tiny(dropout=0.5), windows_of().tokens
        expected = tiny().trunk(tokens)
        with lm.measuring():
            with lm.measuring():
                assert torch.equal(lm.trunk(tokens), expected)
            hidden = lm.trunk(tokens)
            assert torch.equal(hidden, expected)
            assert not hidden.requires_grad
        assert lm.network.training
        assert lm.trunk(tokens).requires_grad
        with pytest.raises(KeyboardInterrupt), lm.measuring():
            raise KeyboardInterrupt
        assert lm.network.training

    def test_measuring_leaves_evaluation_mode_alone(self) -> None:
        lm = tiny(dropout=0.5)
        lm.network.eval()
        with lm.measuring():
            pass
        assert not lm.network.training

    def test_noise_that_is_no_dropout_is_refused(self) -> None:
        class Noisy(GPT2LMHeadModel):
            def __init__(self, config: GPT2Config) -> None:
                super().__init__(config)
                noise = lambda module, inputs, out: out + torch.randn_like(out) if self.training else out  # noqa: E731
                self.transformer.ln_f.register_forward_hook(noise)

        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"):
            setattr(config, name, 0.0)
        with pytest.raises(CurriqError, match="noise other than dropout"):
            LanguageModel(Noisy(config), torch.device("cpu"))
