"""LoRA by PEFT: the adapters alone are trained and saved, and everything else works as with a whole model."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers import TINY, VOCAB, open_lm, random_offer, tiny_lm
from tests.runs import Finished, InterruptAt, assert_same_state, tiny

from curriq.config import LMConfig
from curriq.errors import CurriqError
from curriq.langevin.energy import Energy
from curriq.lm.embeddings import InputEmbeddings
from curriq.lm.model import LanguageModel, forward_flops, window_losses
from curriq.rng import Generators
from curriq.softq.critic import QNetwork
from curriq.train.run import prepare, resume, train

LORA: dict[str, Any] = {"lora_rank": 3}


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="the extra [peft] is not installed")


def tokens(n: int = 3, length: int = 8) -> torch.Tensor:
    return torch.randint(VOCAB, (n, length), generator=torch.Generator().manual_seed(1))


def adapted(architecture: str = "llama", **options: Any) -> LanguageModel:
    """A model whose adapters do something: the factor that starts at zero is drawn at random."""
    lm = tiny_lm(architecture, **LORA, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lm.parameters:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return lm


@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize("architecture", TINY)
class TestEveryArchitecture:
    def test_new_adapters_change_nothing_and_trained_ones_do(self, architecture: str) -> None:
        plain, new = tiny_lm(architecture), tiny_lm(architecture, **LORA)
        with torch.no_grad():
            expected, hidden = plain.head(plain.trunk(tokens())), adapted(architecture).trunk(tokens())
            assert torch.equal(new.head(new.trunk(tokens())), expected)
            assert (hidden - plain.trunk(tokens())).abs().max() > 1e-3

    def test_trunk_and_head_are_pefts_own_logits(self, architecture: str) -> None:
        lm = adapted(architecture)
        with torch.no_grad():
            ours = lm.head(lm.trunk(tokens()))
            expected = lm.network(input_ids=tokens(), use_cache=False).logits
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("gradient_checkpointing", [False, True])
    def test_only_adapters_get_gradients(self, architecture: str, gradient_checkpointing: bool) -> None:
        lm = adapted(architecture, gradient_checkpointing=gradient_checkpointing)
        names = [name for name, p in lm.network.named_parameters() if p.requires_grad]
        assert all("lora_" in name for name in names)
        assert len(lm.parameters) == len(names) > 0
        windows = random_offer(3).windows
        losses, _ = window_losses(lm, lm.trunk(windows.tokens), windows)
        losses.sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lm.parameters)
        assert all(p.grad is None for p in lm.network.parameters() if not p.requires_grad)

    def test_soft_tokens_see_the_adapters(self, architecture: str) -> None:
        lm = adapted(architecture)
        inputs, q = InputEmbeddings(lm), QNetwork(lm.width, 8, generator=Generators(0)("q"))
        energy = Energy(lm, inputs, lambda f: q(f.hidden), list(q.parameters()), 4)
        torch.testing.assert_close(energy.soft(inputs.weight[tokens()]), energy.hard(tokens()))
        assert not torch.allclose(energy.hard(tokens()), q(tiny_lm(architecture).trunk(tokens())[:, -1]))
        energy.point(inputs.weight[tokens()])
        assert len(lm.parameters) > 0  # they are trainable again
        assert all(p.grad is None for p in lm.network.parameters())


@pytest.mark.usefixtures("peft")
class TestSettings:
    def test_adapters_follow_from_the_seed_alone(self) -> None:
        state = torch.get_rng_state()
        first = tiny_lm("gpt2", **LORA, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(99)
        same, other = (tiny_lm("gpt2", **LORA, seed=seed) for seed in (3, 4))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters, same.parameters, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first.parameters, other.parameters, strict=True))
        base = tiny_lm("gpt2", seed=3).network.state_dict()  # the same base model as without adapters
        assert torch.equal(first.network.get_input_embeddings().weight, base["transformer.wte.weight"])

    def test_rank_alpha_and_targets(self) -> None:
        lm = tiny_lm("llama", lora_rank=5, lora_alpha=20, lora_targets=("q_proj", "v_proj"))
        settings = lm.network.peft_config["default"]
        assert (settings.r, settings.lora_alpha) == (5, 20)
        assert set(settings.target_modules) == {"q_proj", "v_proj"}
        assert len(lm.parameters) == 2 * 2 * 2  # layers, targets, factors
        assert {min(p.shape) for p in lm.parameters} == {5}

    def test_dropout_of_the_adapters_is_noise_of_training_only(self) -> None:
        lm = adapted(lora_dropout=0.5)
        assert lm.has_dropout
        assert not torch.equal(lm.trunk(tokens()), lm.trunk(tokens()))
        with lm.measuring():
            torch.testing.assert_close(lm.trunk(tokens()), adapted().trunk(tokens()))
        assert not adapted().has_dropout

    def test_gpt2s_transposed_layers_raise_no_warning(self, recwarn: pytest.WarningsRecorder) -> None:
        tiny_lm("gpt2", **LORA)
        assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]

    def test_unknown_targets(self) -> None:
        with pytest.raises(
            CurriqError, match=r"random:llama.* cannot take --lora-targets q_prj \(.* not found"
        ):
            tiny_lm("llama", **LORA, lora_targets=("q_prj",))

    def test_operations_of_the_adapters_are_counted(self) -> None:
        plain, lm = tiny_lm("llama"), tiny_lm("llama", **LORA)
        factors = sum(p.numel() for p in lm.parameters)
        assert forward_flops(lm, 8) - forward_flops(plain, 8) == 2 * 8 * factors


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CurriqError, match=r"--lora-rank needs peft .*curriq\[peft\].*--lora-rank 0"):
        tiny_lm("gpt2", **LORA)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"--lora-targets is empty: name layers, or use all-linear"):
        LMConfig(lora_targets=())


class TestFolder:
    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        tiny_lm("llama").save(tmp_path / "base")
        return tmp_path / "base"

    def test_peft_and_transformers_open_it(self, peft: Any, base: Path, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        lm = open_lm(str(base), **LORA)
        with torch.no_grad():
            for parameter in lm.parameters:
                parameter += 0.1
            expected = lm.network.eval()(input_ids=tokens()).logits
        lm.save(tmp_path / "lm")
        names = {path.name for path in (tmp_path / "lm").iterdir()}
        assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert json.loads((tmp_path / "lm" / "adapter_config.json").read_text())["r"] == 3
        assert sum(
            t.numel() for t in load_file(tmp_path / "lm" / "adapter_model.safetensors").values()
        ) == sum(p.numel() for p in lm.parameters)
        for opener in (peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):
            with torch.no_grad():
                theirs = opener.from_pretrained(tmp_path / "lm").eval()(input_ids=tokens()).logits
            torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-6)

    def test_the_base_model_is_named_in_full(
        self, peft: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(base.parent)
        open_lm("base", **LORA).save(tmp_path / "lm")
        monkeypatch.chdir("/")
        assert peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lm")

    @pytest.mark.usefixtures("peft")
    def test_as_a_model_it_is_the_base_with_merged_adapters(self, base: Path, tmp_path: Path) -> None:
        lm = open_lm(str(base), **LORA)
        with torch.no_grad():
            for parameter in lm.parameters:
                parameter += 0.1
        lm.save(tmp_path / "lm")
        with pytest.raises(CurriqError, match=r"--lora-rank 3 with --model .*, a folder of adapters"):
            open_lm(str(tmp_path / "lm"), **LORA)
        merged = open_lm(str(tmp_path / "lm"))
        assert len(merged.parameters) == len(tiny_lm("llama").parameters)
        with torch.no_grad():
            torch.testing.assert_close(merged.trunk(tokens()), lm.trunk(tokens()), rtol=1e-4, atol=1e-5)
        merged.save(tmp_path / "whole")
        assert (tmp_path / "whole" / "model.safetensors").exists()
        names = open_lm(str(tmp_path / "whole")).network.state_dict().keys()
        assert names == tiny_lm("llama").network.state_dict().keys()

    def test_adapters_of_random_weights_are_refused_as_a_model(self, peft: Any, tmp_path: Path) -> None:
        tiny_lm("llama", **LORA).save(tmp_path)
        with pytest.raises(CurriqError, match=r"adapters of a model with random weights.*curriq resume"):
            open_lm(str(tmp_path))

    def test_saving_asks_no_hub(self, peft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = tiny_lm("gpt2", **LORA)
        lm.network.peft_config["default"].base_model_name_or_path = "owner/name"
        monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", pytest.fail)
        lm.save(tmp_path)


def adapters(run: Path) -> bytes:
    from curriq.train.checkpoint import latest_checkpoint

    return (latest_checkpoint(run).lm / "adapter_model.safetensors").read_bytes()


@pytest.mark.usefixtures("peft")
class TestRun:
    @pytest.mark.parametrize("base", ["random", "pretrained"])
    def test_an_interrupted_run_equals_an_uninterrupted_one(
        self, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = tiny(lora_rank=2, lora_dropout=0.1, lm_lr=0.05, td_into_theta=True)
        if base == "pretrained":
            trained = train(tiny(selector="uniform", steps=2, run_dir=str(tmp_path / "base")))
            config = config.override(model=str(trained.model_dir))
        whole = train(config.override(run_dir=str(tmp_path / "whole")))
        run = prepare(config.override(run_dir=str(tmp_path / "parts")))
        run.session.probes.append(InterruptAt(2))
        assert not run.session.train().finished
        assert adapters(tmp_path / "parts") != adapters(tmp_path / "whole")
        torch.manual_seed(5)
        with caplog.at_level(logging.WARNING):
            assert resume(tmp_path / "parts").finished
        ours, theirs = Finished(tmp_path / "parts"), Finished(tmp_path / "whole")
        assert ours.rows == theirs.rows
        assert ours.candidates == theirs.candidates
        assert adapters(ours.folder) == adapters(theirs.folder)
        assert_same_state(ours.state, theirs.state)
        assert not (whole.model_dir / "model.safetensors").exists()
        assert (whole.model_dir / "tokenizer.json").exists()
        assert "library_name: peft" in (whole.model_dir / "README.md").read_text()
        warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        assert [message for message in warned if "no effect" not in message] == []  # of tiny runs' settings

    def test_the_base_model_stays_as_it_was(self, tmp_path: Path) -> None:
        run = prepare(tiny(lora_rank=2, lm_lr=0.1, reset_theta=True, run_dir=str(tmp_path)))
        before = {name: value.clone() for name, value in run.lm.network.state_dict().items()}
        run.session.train()
        after = run.lm.network.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())  # θ is reset each step

    def test_what_the_base_and_the_adapters_follow_from_cannot_change(self, tmp_path: Path) -> None:
        train(tiny(lora_rank=2, steps=1, run_dir=str(tmp_path)))
        for name, value in (("lora_rank", 4), ("lora_alpha", 4), ("lora_targets", ["c_attn"]), ("seed", 5)):
            message = rf"--{name.replace('_', '-')} = .*a resume cannot change it"
            with pytest.raises(CurriqError, match=message):
                resume(tmp_path, steps=2, **{name: value})
