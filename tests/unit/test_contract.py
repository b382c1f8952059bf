"""The pretrained model's contract: the marks of its tokenizer, its own loss, what no text reaches, and tokens
that it does not know."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers import TINY, VOCAB, open_lm, random_offer, tiny_lm
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from curriq.config import OptimConfig
from curriq.data.chat import encode_chat
from curriq.data.contamination import ContaminationFilter, SplitRule
from curriq.data.documents import Document, MemorySource
from curriq.data.stream import DecontaminatedSource, Packer, SourceReader
from curriq.data.tokenizer import document_marks, log_marks
from curriq.errors import CurriqError
from curriq.lm.contract import freeze_unreached, log_own_loss
from curriq.lm.held_out import held_out_loss
from curriq.lm.learner import Learner

WORDS = {"<s>": 0, "</s>": 1, "[SEP]": 2, "<unk>": 3, "a": 4, "b": 5, "c": 6, "d": 7}


def tokenizer_of(template: str = "$A", eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer of words whose post-processor follows a template, such as `<s> $A`."""
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(token, WORDS[token]) for token in ("<s>", "</s>", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, unk_token="<unk>"
    )


class TestMarks:
    @pytest.mark.parametrize(
        ("template", "eos", "marks"),
        [
            ("$A", "</s>", ([], [1])),
            ("<s> $A", "</s>", ([0], [1])),
            ("<s> $A </s>", "</s>", ([0], [1])),
            ("$A </s>", "</s>", ([], [1])),
            ("<s> $A [SEP]", "</s>", ([0], [2, 1])),
            ("<s> $A", "<s>", ([0], [])),
            ("<s> [SEP] $A", "</s>", ([0, 2], [1])),
        ],
    )
    def test_what_the_tokenizer_adds_and_eos(self, template: str, eos: str, marks: Any) -> None:
        assert document_marks(tokenizer_of(template, eos)) == marks

    def test_add_bos_token(self, tmp_path: Path) -> None:
        tokenizer_of("<s> $A").save_pretrained(tmp_path)
        assert document_marks(AutoTokenizer.from_pretrained(tmp_path)) == ([0], [1])

    @pytest.mark.parametrize(
        ("template", "eos", "expected"),
        [
            ("<s> $A", "</s>", [0, 4, 5, 1, 0, 6, 1, 0, 7, 7, 1]),
            ("<s> $A", "<s>", [0, 4, 5, 0, 6, 0, 7, 7]),
            ("$A", "</s>", [4, 5, 1, 6, 1, 7, 7, 1]),
        ],
    )
    @pytest.mark.parametrize("length", [2, 3])
    def test_windows_hold_documents_with_their_marks(
        self, template: str, eos: str, expected: list[int], length: int
    ) -> None:
        tokenizer = tokenizer_of(template, eos)
        packer = Packer("web", length, document_marks(tokenizer))
        windows = [window for ids in ([4, 5], [6], [7, 7]) for window in packer.add(ids)]
        whole = np.concatenate([window.tokens for window in windows]).tolist()
        assert whole == expected[: len(expected) // length * length]

    def test_the_stream_reads_them(self) -> None:
        tokenizer = tokenizer_of("<s> $A")
        rule = SplitRule(1e-9, {"reward": 1, "validation": 1, "test": 1})
        clean = DecontaminatedSource(
            MemorySource("web", [Document("a b")], seed=0), ContaminationFilter(rule, 1), of_target=False
        )
        reader = SourceReader(clean, "none", tokenizer, 4, seed=0)
        assert [reader.next_window().tokens.tolist() for _ in range(2)] == [[0, 4, 5, 1]] * 2

    def test_conversations_keep_those_of_their_template(self) -> None:
        tokenizer = tokenizer_of("<s> $A")
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% endfor %}"
        )
        ids, learnt = encode_chat(tokenizer, [{"role": "assistant", "content": "a b"}])
        (window,) = Packer("chat", 4, document_marks(tokenizer)).add(ids, learnt=learnt)
        assert window.tokens.tolist() == [0, 4, 5, 1]
        one = tokenizer_of("<s> $A", "<s>")
        (window,) = Packer("chat", 4, document_marks(one)).add(ids, learnt=learnt)
        assert window.tokens.tolist() == [0, 4, 5, 0]

    def test_other_tokens_than_the_tokenizers_own_are_said(self, caplog: pytest.LogCaptureFixture) -> None:
        tokenizer = tokenizer_of("<s> $A")
        with caplog.at_level(logging.INFO, "curriq"):
            log_marks(tokenizer, ["a b", "a </s> b"])
        (message,) = [record.getMessage() for record in caplog.records]
        assert message == "documents begin with ['<s>'] and end with ['</s>']."

        class Odd(PreTrainedTokenizerFast):
            def __call__(self, text: str, **options: Any) -> Any:
                return {"input_ids": [0, 6, 6]}

        log_marks(Odd(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>"), ["a b"])
        message = caplog.records[-1].getMessage()
        assert "itself cuts 'a b' into [0, 6, 6]; the run trains on [4, 5, 1]" in message


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    """A checkpoint with a vision tower."""
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 32,
        "sliding_window": 8, "eos_token_id": 0,
    }  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "gemma")
    return tmp_path / "gemma"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.tower = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.scale = nn.Parameter(torch.ones(2))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[1](x) * self.scale


class TestUnreached:
    def test_vision_towers_are_not_trained(self, gemma: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "curriq"):
            lm = open_lm(str(gemma))
        said = [record.getMessage() for record in caplog.records]
        assert any("no text reaches model.vision_tower" in message for message in said)
        trained = {id(parameter) for parameter in lm.parameters}
        names = {name for name, p in lm.network.named_parameters() if id(p) not in trained}
        assert names == {n for n, _ in lm.network.named_parameters() if "vision" in n or "multi_modal" in n}
        before = {name: value.clone() for name, value in lm.network.state_dict().items()}
        learner = Learner(lm, OptimConfig(weight_decay=0.5), steps=3)
        offer = random_offer(4)
        for step in range(2):
            learner.accumulate(offer, lambda part, features: torch.zeros(len(part)), False)
            learner.update(step)
            learner.optimizer.zero_grad()
        weights = torch.full((4,), 0.25, dtype=torch.float64)
        _, gradient = learner.held_out_gradient(offer.windows, weights)
        assert len(learner.precondition(gradient)) == len(lm.parameters)
        for name, value in lm.network.state_dict().items():
            assert torch.equal(value, before[name]) == ("vision" in name or "multi_modal" in name), name

    def test_experts_that_these_tokens_miss_are(self) -> None:
        network = Experts()
        freeze_unreached(network, network(torch.ones(2)))
        frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
        assert frozen == {"tower.0.weight", "tower.0.bias", "tower.1.weight", "tower.1.bias", "unused"}

    @pytest.mark.parametrize("architecture", TINY)
    def test_nothing_of_a_text_model_is_frozen(self, architecture: str) -> None:
        lm = tiny_lm(architecture, gradient_checkpointing=False)
        assert len(lm.parameters) == len(list(lm.network.parameters()))


class TestOwnLoss:
    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_is_that_of_curriq(self, architecture: str, caplog: pytest.LogCaptureFixture) -> None:
        lm, windows = tiny_lm(architecture), random_offer(2).windows
        with caplog.at_level(logging.INFO, "curriq"):
            log_own_loss(lm, windows)
        (record,) = caplog.records
        assert record.levelname == "INFO"
        assert f"is that of curriq, {held_out_loss(lm, windows):.4f} nats" in record.getMessage()
        assert lm.network.training

    def test_says_what_is_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        config = MixtralConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=VOCAB, num_key_value_heads=1, num_local_experts=4, output_router_logits=True,
            router_aux_loss_coef=0.5,
        )  # fmt: skip
        MixtralForCausalLM(config).save_pretrained(tmp_path)
        log_own_loss(open_lm(str(tmp_path)), random_offer(2).windows)
        (message,) = [r.getMessage() for r in caplog.records if "own loss" in r.getMessage()]
        assert "leaves out what the model adds (aux_loss = " in message


class TestMoreTokensThanEmbeddings:
    def test_is_refused_with_the_setting_that_helps(self, tmp_path: Path) -> None:
        tiny_lm().save(tmp_path)
        with pytest.raises(CurriqError, match=r"has 70 entries, .* has 61 embeddings\..*--resize-embeddings"):
            open_lm(str(tmp_path), vocabulary=70)

    def test_resizing_keeps_the_old_ones(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        old = tiny_lm()
        old.save(tmp_path)
        lm, again = (open_lm(str(tmp_path), vocabulary=70, resize_embeddings=True) for _ in range(2))
        assert "9 new embeddings, for the tokens 61 to 69" in caplog.records[0].getMessage()
        weight = lm.network.get_input_embeddings().weight
        assert lm.vocab_size == len(weight) == 70
        assert torch.equal(weight[:VOCAB], old.network.get_input_embeddings().weight)
        assert torch.equal(weight, again.network.get_input_embeddings().weight)
        lm.save(tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["vocab_size"] == 70
        assert (
            len(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").get_input_embeddings().weight) == 70
        )

    def test_not_with_adapters(self, tmp_path: Path) -> None:
        tiny_lm().save(tmp_path)
        with pytest.raises(CurriqError, match="not with --lora-rank"):
            open_lm(str(tmp_path), vocabulary=70, resize_embeddings=True, lora_rank=2)
