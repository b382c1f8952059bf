"""The code of docs/library.md works as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import curriq
from curriq.errors import CurriqError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "library.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, client, tmp_path):
    """With a tiny model, and the labelled toy stream in its place."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    toy = client("toy")
    examples = [toy.encode(chat) for _, chat in zip(range(400), toy.conversations(), strict=False)]
    target, model = [toy.encode(chat) for chat in toy.clean(16, seed=0)], toy.model()
    names = {
        "curriculum": curriq.Curriculum(target, sources=toy.SOURCES, batch_size=16),
        "curriq": curriq,
        "torch": torch,
        "DataLoader": DataLoader,
        "Trainer": Trainer,
        "clean_examples": target,
        "stream": [{**e, "source": ("web", "forum")[i % 2]} for i, e in enumerate(examples)],
        "open_stream": toy.stream,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "arguments": TrainingArguments(
            per_device_train_batch_size=16, **toy.trainer_arguments(3, 0, tmp_path)
        ),
    }
    if "Curriculum(" not in BLOCKS[number]:
        names["stream"] = examples
    exec(compile(BLOCKS[number], "library.md", "exec"), names)
    assert names["curriculum"].step >= 3


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("curriq.parallel.world_size", lambda: 2)
    with pytest.raises(CurriqError, match="learns in one process"):
        curriq.Curriculum([{"input_ids": [1, 2]}]).observe()
