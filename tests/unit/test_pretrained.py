"""A really pretrained model with its own tokenizer, from the folder to the trained checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from curriq.config import LMConfig, RunConfig, SourceConfig, TokenizerConfig
from curriq.data.tokenizer import encode, eos_id, load_tokenizer
from curriq.errors import CurriqError
from curriq.lm.load import load_language_model
from curriq.lm.model import LanguageModel, window_losses_of
from curriq.train.run import train
from curriq.types import Windows

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big red ball. She wanted to play with it, but it was too high in the tree. "
    'Her mom said, "Lily, let\'s go home." Lily was sad, but she was happy to go home with her mom.'
)


class TestStories260k:
    """A really pretrained model: Llama shape, 260 thousand parameters, trained on TinyStories."""

    @pytest.fixture
    def folder(self, shared_data: Path) -> Path:
        return shared_data / "stories260k"

    def reopen(self, folder: Path) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
        lm_config = LMConfig(model=str(folder))
        tokenizer = load_tokenizer(TokenizerConfig(tokenizer="auto"), lm_config, pytest.fail)
        return load_language_model(lm_config, tokenizer, 64, 0, torch.device("cpu")), tokenizer

    def test_opens_with_its_own_tokenizer_and_knows_stories(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        lm, tokenizer = self.reopen(folder)
        assert lm.vocab_size == len(tokenizer) == 512
        assert eos_id(tokenizer) == lm.network.config.eos_token_id == 1  # <s> stands between its stories
        assert caplog.messages == []
        tokens = torch.tensor([[eos_id(tokenizer), *encode(tokenizer, [STORY])[0]]])
        shuffled = tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))]
        nowhere = {"ids": torch.zeros(1).long(), "source": torch.zeros(1).long()}
        story, noise = (
            window_losses_of(lm, Windows(tokens=row, **nowhere), micro_batch=1, chunk_tokens=1000).item()
            for row in (tokens, shuffled)
        )
        assert story < 2.0 < torch.tensor(512.0).log() < noise

    @pytest.fixture
    def run(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
        names = ["Lily", "Tom", "Sue", "Ben", "Max", "Mia", "Sam", "Amy"]
        things = ["ball", "doll", "cake", "kite", "book", "frog", "boat", "tree"]
        places = ["park", "house", "garden", "forest", "school", "kitchen", "pond", "shop"]
        stories = [
            f'{name} went to the {place} with a big {thing}. {name} said, "I like my {thing} number {i}." '
            f"Then it was time to go home from the {place}, and mom was happy. The {thing} was very nice."
            for i, (name, thing, place) in enumerate((n, t, p) for n in names for t in things for p in places)
        ]
        (tmp_path / "stories.txt").write_text("\n\n".join(stories))
        monkeypatch.chdir(tmp_path)
        return RunConfig().override(
            sources=(SourceConfig(name="stories", path=str(tmp_path / "stories.txt")),),
            target="stories",
            near_duplicate_threshold=1.0,
            model=str(folder),
            window=64,
            num_candidates=4,
            steps=6,
            lm_lr=1e-3,
            lr_warmup_steps=0,
            reward_set_size=8,
            reward_windows=4,
            validation_set_size=8,
            test_set_size=8,
            shuffle_buffer=32,
            threads=1,
            eval_every=1,
            checkpoint_every=6,
            progress="none",
            run_dir=str(tmp_path / "run"),
        )

    def test_is_trained_on_end_to_end(self, run: RunConfig) -> None:
        result = train(run)
        rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 6
        assert rows[0]["train/loss"] < 4  # the weights were those of the folder
        assert rows[-1]["validation/loss"] < rows[0]["validation/loss"]
        assert result.summary["test_loss"] < rows[0]["train/loss"]
        lm, tokenizer = self.reopen(result.model_dir)
        assert (
            tokenizer.get_vocab()
            == load_tokenizer(TokenizerConfig(tokenizer=run.lm.model), run.lm, pytest.fail).get_vocab()
        )
        assert lm.network.config.eos_token_id == 1

    def test_from_scratch_with_the_configuration_and_a_tokenizer_made_here(self, run: RunConfig) -> None:
        fresh = run.override(model=f"random:{run.lm.model}", vocab_size=300, steps=2, eval_every=2)
        result = train(fresh)
        config = AutoConfig.from_pretrained(result.model_dir)
        assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (300, 64, 5)
        assert config.eos_token_id == 0
        assert result.summary["validation_loss"] > 5  # log 300 = 5.7: nothing was pretrained

    def test_window_beyond_the_context_of_a_folder(self, run: RunConfig) -> None:
        with pytest.raises(CurriqError, match=r"--window = 513 is longer than the context of .*, 512 tokens"):
            train(run.override(window=513, reward_set_size=4, validation_set_size=4, test_set_size=4))

    def test_folder_with_a_tokenizer_and_no_weights(self, run: RunConfig, tmp_path: Path) -> None:
        partial = tmp_path / "partial"
        shutil.copytree(run.lm.model, partial, ignore=shutil.ignore_patterns("*.safetensors"))
        with pytest.raises(CurriqError, match="has a configuration but no weights"):
            train(run.override(model=str(partial)))
