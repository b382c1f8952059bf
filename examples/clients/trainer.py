"""A curriculum in the `Trainer` of transformers: one data set and one callback.

python examples/clients/trainer.py
python examples/clients/trainer.py --steps 60 --folder runs/trainer
python examples/clients/trainer.py --steps 120 --folder runs/trainer --resume
"""

from functools import partial
from pathlib import Path

import torch
import toy
from transformers import Trainer, TrainingArguments

import curriq
from curriq.integrations.transformers import CurriculumCallback, SelectedDataset


def train(
    steps: int, *, seed: int = 0, uniform: bool = False, folder: Path | None = None, resume: bool = False
) -> torch.nn.Module:
    target = [toy.encode(chat) for chat in toy.clean(64, seed=0)]
    curriculum = curriq.Curriculum(
        target,
        sources=toy.SOURCES,
        batch_size=toy.BATCH,
        reward_every=4,
        seed=seed,
        policy=toy.Everything() if uniform else None,
    )
    trainer = Trainer(
        model=toy.model(seed),
        args=TrainingArguments(
            per_device_train_batch_size=toy.BATCH // 2,
            gradient_accumulation_steps=2,
            **toy.trainer_arguments(steps, seed, folder),
        ),
        train_dataset=SelectedDataset(curriculum, partial(toy.stream, seed)),
        data_collator=curriq.pad_examples,
    )
    trainer.add_callback(CurriculumCallback(curriculum, trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


if __name__ == "__main__":
    toy.main(train)
