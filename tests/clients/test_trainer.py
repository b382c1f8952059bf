"""`curriq.integrations.transformers`: what is refused before training starts, what is logged, and resumes."""

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments

import curriq
from curriq.errors import CurriqError
from curriq.integrations.transformers import FILE, CurriculumCallback, SelectedDataset


@pytest.fixture
def toy(client):
    return client("toy")


def trainer(toy: Any, folder: Any, steps: int = 6, **options: Any) -> Trainer:
    """With its curriculum; eight examples twice per step."""
    target = [toy.encode(chat) for chat in toy.clean(16, seed=0)]
    curriculum = curriq.Curriculum(target, sources=toy.SOURCES, batch_size=16, reward_every=2)
    defaults = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "save_steps": 2}
    made = Trainer(
        model=toy.model(),
        args=TrainingArguments(**(toy.trainer_arguments(steps, 0, folder) | defaults | options)),
        train_dataset=SelectedDataset(curriculum, partial(toy.stream, 0)),
        data_collator=curriq.pad_examples,
    )
    made.add_callback(CurriculumCallback(curriculum, made))
    return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 1}, r"takes 8 examples per step .*batch_size=16: make them equal"),
        ({"per_device_train_batch_size": 16}, "takes 32 examples per step"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers=2.*use 0"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
    ids=["accumulation", "batch", "workers", "found"],
)
def test_what_would_train_on_other_batches_is_refused(options, message, toy, tmp_path):
    with pytest.raises(CurriqError, match=message):
        trainer(toy, tmp_path, **options)


def test_trl_must_not_prepare_what_is_selected(toy, tmp_path):
    made = trainer(toy, tmp_path)
    made.args.dataset_kwargs = None  # as in an SFTConfig
    with pytest.raises(CurriqError, match="skip_prepare_dataset"):
        CurriculumCallback(made.train_dataset.curriculum, made)


def test_measurements_are_in_the_trainers_log(toy, tmp_path):
    made = trainer(toy, tmp_path, logging_steps=2)
    made.train()
    assert made.args.ignore_data_skip
    measured = [row for row in made.state.log_history if "reward" in row]
    assert [row["step"] for row in measured] == [3, 5]  # steps 2 and 4, counted from 0, are over
    assert {"critic/td_loss", "gate/confidence", "held_out/forwards", "epoch"} <= measured[-1].keys()
    assert [row["step"] for row in made.state.log_history if "loss" in row] == [2, 4, 6]


def test_its_own_log_is_written_in_steps_that_measure(toy, tmp_path):
    made = trainer(toy, tmp_path, logging_steps=1)
    made.train()
    assert [row["step"] for row in made.state.log_history if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_every_checkpoint_resumes_exactly(toy, tmp_path):
    whole = trainer(toy, tmp_path / "whole")
    whole.train()
    for step in (2, 4):
        resumed = trainer(toy, tmp_path / f"from {step}")
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        resumed.args.resume_from_checkpoint = str(folder)
        resumed.train(resume_from_checkpoint=str(folder))
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_checkpoint_without_a_curriculum_or_of_another_step_is_refused(toy, tmp_path):
    trainer(toy, tmp_path, steps=4).train()
    first, second = tmp_path / "checkpoint-2" / FILE, tmp_path / "checkpoint-4" / FILE
    second.write_bytes(first.read_bytes())
    with pytest.raises(CurriqError, match="is of step 2, the Trainer of 4"):
        trainer(toy, tmp_path).train(resume_from_checkpoint=True)
    second.unlink()
    with pytest.raises(CurriqError, match=r"there is no .*checkpoint-4.*curriculum\.pt"):
        trainer(toy, tmp_path).train(resume_from_checkpoint=True)


def test_rows_for_trl_have_the_two_columns(toy):
    curriculum = curriq.Curriculum([{"input_ids": [1, 2]}], batch_size=2)
    data = SelectedDataset(curriculum, lambda: [{"input_ids": [1, 2], "text": "a"}]).for_trl()
    assert next(iter(data)) == {"input_ids": [1, 2], "labels": [1, 2]}


def test_reduced_precision_is_noticed(toy, tmp_path):
    made = trainer(toy, tmp_path, bf16=True)
    assert made.train_dataset.curriculum.reduced_precision
    half = trainer(toy, tmp_path)
    half.args.fp16 = True  # the Trainer itself refuses it without a GPU
    CurriculumCallback(half.train_dataset.curriculum, half)
    assert half.train_dataset.curriculum.reduced_precision
    assert not trainer(toy, tmp_path).train_dataset.curriculum.reduced_precision


def test_a_curriculum_goes_on_into_a_second_stage_and_that_resumes_exactly(toy, tmp_path):
    """Its steps are then not those of the Trainer."""

    def second(first: Trainer, folder: Any) -> Trainer:
        made = trainer(toy, folder, steps=4)
        made.callback_handler.callbacks.pop()
        made.model.load_state_dict(first.model.state_dict())
        made.train_dataset.curriculum = first.train_dataset.curriculum
        made.add_callback(CurriculumCallback(first.train_dataset.curriculum, made))
        return made

    first = trainer(toy, tmp_path / "first", steps=3)
    first.train()
    whole = second(first, tmp_path / "whole")
    whole.train()
    assert whole.train_dataset.curriculum.step == 7
    resumed, folder = trainer(toy, tmp_path / "resumed", steps=4), tmp_path / "whole" / "checkpoint-2"
    resumed.args.resume_from_checkpoint = str(folder)
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.train_dataset.curriculum.step == 7
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_the_same_step_from_another_run_is_refused(toy, tmp_path):
    for name, options in (("one", {}), ("two", {"learning_rate": 1e-3})):
        trainer(toy, tmp_path / name, steps=4, logging_steps=1, **options).train()
    with pytest.raises(CurriqError, match=r"not the checkpoint that the Trainer resumes from: .*name it in"):
        trainer(toy, tmp_path / "two").train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))


def test_a_checkpoint_of_an_earlier_version_is_read(toy, tmp_path):
    """It held the curriculum alone."""
    trainer(toy, tmp_path, steps=4).train()
    file = tmp_path / "checkpoint-4" / FILE
    torch.save(torch.load(file, weights_only=True)["curriculum"], file)
    resumed = trainer(toy, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.train_dataset.curriculum.step == 6
