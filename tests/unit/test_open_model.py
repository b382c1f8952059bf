"""Every way to open a model, and one clear error for every way to fail."""

import json
import time
from pathlib import Path

import pytest
import torch
from tests.helpers import TINY, VOCAB, StubTokenizer, open_lm, tiny_lm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, T5Config, T5ForConditionalGeneration

from curriq.config import LMConfig
from curriq.errors import CurriqError
from curriq.lm.load import load_language_model, pick_device

WIDE = "hidden_size=16,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2"


class TestRandom:
    def test_weights_follow_from_the_seed_alone(self) -> None:
        state = torch.get_rng_state()
        first = open_lm("random:gpt2:" + TINY["gpt2"], seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(99)
        same, other = (open_lm("random:gpt2:" + TINY["gpt2"], seed=seed) for seed in (3, 4))
        for name, value in first.network.state_dict().items():
            assert torch.equal(same.network.state_dict()[name], value), name
        weight = first.network.transformer.wte.weight
        assert not torch.equal(other.network.transformer.wte.weight, weight)

    def test_takes_vocabulary_and_eos_from_the_tokenizer(self) -> None:
        lm = open_lm("random:opt:" + TINY["opt"])
        config = lm.network.config
        assert (lm.vocab_size, config.eos_token_id, config.pad_token_id) == (VOCAB, 0, None)
        assert lm.network.get_input_embeddings().padding_idx is None

    def test_vocabulary_may_be_padded_but_not_cut(self) -> None:
        assert open_lm(f"random:gpt2:{TINY['gpt2']},vocab_size=64").vocab_size == 64
        with pytest.raises(CurriqError, match=r"61 entries.*60 embeddings"):
            open_lm(f"random:gpt2:{TINY['gpt2']},vocab_size=60")

    def test_overrides_go_through_the_constructor(self) -> None:
        llama = open_lm(f"random:llama:{WIDE},hidden_size=24,num_attention_heads=3")
        assert llama.network.config.head_dim == 8
        assert llama.network.config.num_key_value_heads == 3
        relu = open_lm(f"random:gpt2:{TINY['gpt2']},activation_function=relu,scale_attn_weights=false")
        assert relu.network.config.activation_function == "relu"
        assert relu.network.config.scale_attn_weights is False

    def test_gpt2_computes_what_hugging_faces_computes(self) -> None:
        """Its activation runs in one kernel here; configuration and names are theirs."""
        ours = open_lm("random:gpt2:" + TINY["gpt2"]).network.double()
        assert ours.config.activation_function == "gelu_new"
        theirs = AutoModelForCausalLM.from_config(ours.config).double()
        theirs.load_state_dict(ours.state_dict())
        assert type(ours.transformer.h[0].mlp.act) is not type(theirs.transformer.h[0].mlp.act)
        tokens = torch.arange(24).view(2, 12) % VOCAB
        for network in (ours, theirs):
            network.eval()(input_ids=tokens, labels=tokens).loss.backward()
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(mine.grad, other.grad, rtol=1e-9, atol=1e-12), name

    def test_folder_gives_its_configuration_only(self, tmp_path: Path) -> None:
        trained = tiny_lm("llama")
        trained.save(tmp_path)
        fresh = open_lm(f"random:{tmp_path}", vocabulary=70)
        wider = open_lm(f"random:{tmp_path}:num_hidden_layers=3")
        assert fresh.network.config.hidden_size == 16
        assert fresh.vocab_size == 70
        assert len(wider.network.model.layers) == 3
        weight = trained.network.model.layers[0].mlp.up_proj.weight
        assert not torch.allclose(fresh.network.model.layers[0].mlp.up_proj.weight, weight, atol=0.01)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("random:gpt2:n_layers=2", r"unknown setting 'n_layers'\. Did you mean 'n_layer'\?"),
            ("random:gpt2:n_layer", "override 'n_layer': write key=value"),
            ("random:gpt2:n_layer=", "override 'n_layer=': write key=value"),
            ("random:gpt2:n_layer=two", r"cannot be made .*n_layer.*expected int"),
            ("random:gpt2:n_embd=10,n_head=3", r"cannot be made .*divisible by num_heads"),
            ("random:gpt2:activation_function=bogus", r"cannot be made .*bogus"),
            ("random:gtp2", r"no architecture 'gtp2'\. Did you mean random:gpt2\?"),
            ("random:t5", "'random:t5' is of type 't5', which transformers has no causal"),
            ("random:", "''"),
            (f"random:bert:{WIDE}", "does something that curriq does not know"),
        ],
    )
    def test_mistakes(self, model: str, message: str) -> None:
        with pytest.raises(CurriqError, match=message):
            open_lm(model)

    def test_model_that_sees_the_future_is_refused(self) -> None:
        """A prefix language model lets every token of its prefix see all of it."""
        with pytest.raises(CurriqError, match="'cpmant' is not causal"):
            open_lm(
                "random:cpmant:hidden_size=16,num_attention_heads=2,dim_head=8,dim_ff=16,num_hidden_layers=1"
            )


class TestFit:
    def test_window_longer_than_the_context(self) -> None:
        message = r"--window = 65 is longer than the context of .*, 64 tokens: lower --window to at most 64"
        with pytest.raises(CurriqError, match=message):
            open_lm("random:gpt2:" + TINY["gpt2"], window=65)
        open_lm("random:gpt2:" + TINY["gpt2"], window=64).trunk(torch.zeros((1, 64), dtype=torch.long))

    def test_context_shorter_than_the_check_of_the_cut(self) -> None:
        lm = open_lm("random:gpt2:n_embd=16,n_head=2,n_layer=1,n_positions=4", window=4)
        assert lm.trunk(torch.zeros((1, 4), dtype=torch.long)).shape == (1, 4, 16)

    def test_tokenizer_larger_than_the_embeddings(self, tmp_path: Path) -> None:
        tiny_lm().save(tmp_path)
        with pytest.raises(CurriqError, match=r"has 62 entries, the model .* has 61 embeddings.*--tokenizer"):
            open_lm(str(tmp_path), vocabulary=62)
        assert open_lm(str(tmp_path), vocabulary=50).vocab_size == VOCAB

    def test_ids_count_not_entries(self) -> None:
        """A vocabulary with holes needs rows up to its greatest id."""

        class Holes(StubTokenizer):
            def get_vocab(self) -> dict[str, int]:
                return {"a": 0, "b": 99}

        config = LMConfig(model="random:gpt2:" + TINY["gpt2"])
        assert load_language_model(config, Holes(), 8, 0, torch.device("cpu")).vocab_size == 100

    def test_model_stops_where_its_training_documents_end(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        lm = tiny_lm()
        lm.network.config.eos_token_id = lm.network.generation_config.eos_token_id = 5
        lm.save(tmp_path / "five")
        changed = open_lm(str(tmp_path / "five"))
        assert caplog.messages == ["the model's EOS token is 5, its tokenizer's is 0: documents end with 0."]
        assert changed.network.config.eos_token_id == changed.network.generation_config.eos_token_id == 0
        changed.save(tmp_path / "zero")
        open_lm(str(tmp_path / "zero"))
        assert len(caplog.messages) == 1
        lm.network.config.eos_token_id = lm.network.generation_config.eos_token_id = [7, 0]
        lm.save(tmp_path / "several")
        assert open_lm(str(tmp_path / "several")).network.generation_config.eos_token_id == [7, 0]
        assert len(caplog.messages) == 1


class TestPretrained:
    def test_sharded_checkpoint(self, tmp_path: Path) -> None:
        lm = tiny_lm("llama")
        lm.network.save_pretrained(tmp_path, max_shard_size="5KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        again = open_lm(str(tmp_path)).network.state_dict()
        assert all(torch.equal(again[name], value) for name, value in lm.network.state_dict().items())

    def test_half_precision_checkpoint_is_trained_in_float32(self, tmp_path: Path) -> None:
        lm = tiny_lm("llama")
        lm.network.bfloat16().save_pretrained(tmp_path)
        again = open_lm(str(tmp_path))
        assert {p.dtype for p in again.parameters} == {torch.float32}
        again.save(tmp_path / "saved")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.float32

    def test_saved_model_generates_with_its_cache(self, tmp_path: Path) -> None:
        tiny_lm().save(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.use_cache is not False

    def test_hub_that_is_not_reachable(self) -> None:
        began = time.perf_counter()
        with pytest.raises(CurriqError, match=r"'owner/name' is neither a folder here nor.*HF_HUB_OFFLINE"):
            open_lm("owner/name")
        assert time.perf_counter() - began < 5

    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(CurriqError, match=r"has no config\.json, so it is no model.*--tokenizer /"):
            open_lm(str(tmp_path))

    def test_folder_without_weights(self, tmp_path: Path) -> None:
        tiny_lm().network.config.save_pretrained(tmp_path)
        with pytest.raises(CurriqError, match=rf"has a configuration but no weights.*random:{tmp_path}"):
            open_lm(str(tmp_path))
        assert open_lm(f"random:{tmp_path}").width == 16

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("config.json", b"{"),
            ("config.json", b'{"model_type": "gpt9"}'),
            ("model.safetensors", b"damaged"),
            ("model.safetensors", None),
        ],
    )
    def test_damaged_folder(self, file: str, content: bytes | None, tmp_path: Path) -> None:
        tiny_lm().save(tmp_path)
        path = tmp_path / file
        path.write_bytes(path.read_bytes()[:3000] if content is None else content)
        with pytest.raises(CurriqError, match=r"cannot be read \(.+\): give a folder that") as e:
            open_lm(str(tmp_path))
        assert e.value.__cause__ is not None  # what really happened stays attached

    def test_weights_of_another_shape(self, tmp_path: Path) -> None:
        tiny_lm().save(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 32}))
        with pytest.raises(CurriqError, match="cannot be read"):
            open_lm(str(tmp_path))

    def test_checkpoint_without_its_head_is_not_filled_with_noise(self, tmp_path: Path) -> None:
        config = LlamaConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        config.vocab_size = VOCAB
        LlamaModel(config).save_pretrained(tmp_path)
        with pytest.raises(CurriqError, match=r"1 weights of LlamaForCausalLM are not in.*lm_head\.weight"):
            open_lm(str(tmp_path))

    def test_no_causal_language_model(self, tmp_path: Path) -> None:
        config = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=VOCAB)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path)
        with pytest.raises(CurriqError, match="is of type 't5', which transformers has no causal language"):
            open_lm(str(tmp_path))

    def test_model_with_program_code_of_its_own(self, tmp_path: Path) -> None:
        """It is neither run nor asked about on the terminal, which would hang a job."""
        tiny_lm().save(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        code = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.LM"}
        config |= {"model_type": "own", "auto_map": code}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "code.py").write_text("raise SystemExit('this was run')")
        with pytest.raises(CurriqError, match=r"needs program code.*which curriq does not run"):
            open_lm(str(tmp_path))

    def test_tokenizer_folder_is_no_model(self, shared_data: Path) -> None:
        with pytest.raises(CurriqError, match=r"gpt2_tokenizer' has no config\.json"):
            open_lm(str(shared_data / "gpt2_tokenizer"))

    def test_device_that_is_not_there(self) -> None:
        assert pick_device("cpu") == torch.device("cpu")
        for name in ("cuda:99", "nonsense"):
            with pytest.raises(CurriqError, match=rf"--device '{name}' cannot be used here .*: try auto"):
                pick_device(name)
