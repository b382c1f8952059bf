"""A curriculum in the `Trainer` of transformers, and in trainers that inherit from it, such as TRL's.

    trainer = Trainer(model, args, train_dataset=SelectedDataset(curriculum, open_stream), …)
    trainer.add_callback(CurriculumCallback(curriculum, trainer))

A resume is exact. The Trainer is kept from skipping batches itself (`ignore_data_skip`): the curriculum goes
on in the stream where it was, and hands out first what was taken and not trained on.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from curriq.config import require
from curriq.curriculum import Curriculum, Example
from curriq.runlog.storage import write_atomically

FILE = "curriculum.pt"  # in every checkpoint of the Trainer


class SelectedDataset(IterableDataset):
    """The examples of a stream that the curriculum selects; endless, so give the Trainer `max_steps`.

    Args:
        curriculum: selects.
        stream: opens the stream from its beginning; called again at its end.
    """

    def __init__(self, curriculum: Curriculum, stream: Callable[[], Iterable[Example]]) -> None:
        self.curriculum, self.stream = curriculum, stream

    def __iter__(self) -> Iterator[Example]:
        return self.curriculum.select(self.stream)

    def for_trl(self) -> datasets.IterableDataset:
        """The same as a data set of `datasets`, which TRL asks for; columns `input_ids` and `labels`."""
        return datasets.IterableDataset.from_generator(self._rows)

    def _rows(self) -> Iterator[Example]:
        for example in self:
            tokens = example["input_ids"]
            yield {"input_ids": tokens, "labels": example.get("labels", tokens)}

    def __reduce__(self) -> tuple[Any, ...]:
        # `datasets` pickles what generates its rows, to name a cache that a stream does not have.
        return IterableDataset, ()


class CurriculumCallback(TrainerCallback):
    """Lets a curriculum observe each optimizer step, logs what it measures, and saves and resumes it.

    Args:
        curriculum: that of the `SelectedDataset`.
        trainer: its log takes the measurements, and its arguments are checked.

    Raises:
        CurriqError: an argument of the Trainer with which it would not train on the selected batches.
    """

    def __init__(self, curriculum: Curriculum, trainer: Trainer) -> None:
        self.curriculum, self.trainer = curriculum, trainer
        args: Any = trainer.args
        _check(args, curriculum.batch_size)
        curriculum.reduced_precision |= args.bf16 or args.fp16
        args.ignore_data_skip = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            return
        named = args.resume_from_checkpoint
        folder = Path(named) if named and os.path.isdir(named) else _checkpoint(args, state)
        where = (
            "where it is not in output_dir, name it in TrainingArguments(resume_from_checkpoint=…) as well."
        )
        file = folder / FILE
        require(
            file.exists(),
            f"there is no {file}: resume from a checkpoint that CurriculumCallback saved; {where}",
        )
        saved = torch.load(file, weights_only=True)
        # An earlier version saved the curriculum alone, and could save one that had trained before as well.
        saved = saved if "trainer_step" in saved else {"trainer_step": saved["step"], "curriculum": saved}
        step = saved["trainer_step"]
        require(step == state.global_step, f"{file} is of step {step}, the Trainer of {state.global_step}.")
        theirs = folder / TRAINER_STATE_NAME
        require(
            not theirs.exists() or TrainerState.load_from_json(str(theirs)).log_history == state.log_history,
            f"{folder} is of the same step, but not the checkpoint that the Trainer resumes from: {where}",
        )
        self.curriculum.load_state_dict(saved["curriculum"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = control.should_log
        if metrics := self.curriculum.observe(kwargs["model"], kwargs["optimizer"]):
            self.trainer.log(metrics)
            control.should_log = due  # `log` takes it back

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        content = io.BytesIO()
        saved = {"trainer_step": state.global_step, "curriculum": self.curriculum.state_dict()}
        torch.save(saved, content)
        write_atomically(_checkpoint(args, state) / FILE, content.getvalue())


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _check(args: Any, batch_size: int) -> None:
    taken, workers = args.train_batch_size * args.gradient_accumulation_steps, args.dataloader_num_workers
    require(
        taken == batch_size,
        f"the Trainer takes {taken} examples per step (batch size × gradient_accumulation_steps), the "
        f"curriculum has batch_size={batch_size}: make them equal.",
    )
    require(workers == 0, f"dataloader_num_workers={workers}: the curriculum learns in this process; use 0.")
    require(not args.auto_find_batch_size, "auto_find_batch_size would change the batch size: leave it out.")
    require(
        not hasattr(args, "dataset_kwargs") or (args.dataset_kwargs or {}).get("skip_prepare_dataset", False),
        "TRL would drop or pack examples after they are selected: give it tokens, and "
        "SFTConfig(dataset_kwargs={'skip_prepare_dataset': True}).",
    )
