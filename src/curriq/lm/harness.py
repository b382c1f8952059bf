"""Downstream tasks by EleutherAI's lm-evaluation-harness, on a model in memory.

The harness is the judge: prompts, choices, normalisation and standard errors are its own. It also seeds every
global generator, switches the model to evaluation mode for good and gives the tokenizer a padding token; this
module restores the generators and the mode, and hands it a copy of the tokenizer.
"""

import copy
import logging
import math
import random
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from curriq.config import LMConfig, TokenizerConfig, missing_extra
from curriq.data.tokenizer import load_tokenizer
from curriq.errors import CurriqError
from curriq.lm.load import load_language_model, pick_device
from curriq.lm.model import LanguageModel
from curriq.types import Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOOTSTRAP = 1000
"""Resamples for the standard errors that have no closed form (those of perplexities)."""


class Harness:
    """Some tasks, loaded once, and the model that they judge.

    Args:
        lm: the model; always measured as it is at the call.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags.
        limit: first examples of each task; None for all.
        fewshot: worked examples before each question; None for the task's own number.
        path: folder of task files besides the harness's own; empty for none.
        batch_size: sequences per forward pass.

    Raises:
        CurriqError: the extra is not installed, a task is unknown, or its data cannot be had.
    """

    def __init__(
        self,
        lm: LanguageModel,
        tokenizer: "PreTrainedTokenizerBase",
        tasks: Sequence[str],
        *,
        limit: int | None = None,
        fewshot: int | None = None,
        path: str = "",
        batch_size: int = 8,
    ) -> None:
        try:
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise missing_extra(
                f"the tasks {' '.join(tasks)}", f"lm-eval ({error})", "eval", "leave the tasks out"
            ) from None
        self._lm = lm
        self._tasks = list(tasks)
        self._options = {"limit": limit, "num_fewshot": fewshot, "bootstrap_iters": BOOTSTRAP}
        own: Any = copy.deepcopy(tokenizer)  # the harness names narrower types than it takes
        with _untouched(lm):
            # A task file may take the place of the harness's own, so the folder's names come first.
            self._manager = TaskManager(include_path=path or None, include_defaults=True)
            unknown = [task for task in tasks if task not in self._manager.all_tasks]
            if unknown:
                raise CurriqError(
                    f"the harness knows no task {unknown[0]!r}"
                    + (f", and {path} has no file of it" if path else "")
                    + ": `lm_eval ls tasks` lists them; a task file of your own goes into --eval-tasks-path "
                    "(for `curriq eval`: --path)."
                )
            self._model = HFLM(pretrained=lm.network, tokenizer=own, backend="causal", batch_size=batch_size)

    def scores(self) -> list[Score]:
        """Scores of the model as it is now.

        Raises:
            CurriqError: the data of a task cannot be had, or a task asks for what the model cannot do.
        """
        from lm_eval import simple_evaluate

        with _untouched(self._lm):
            try:
                results = simple_evaluate(
                    model=self._model, tasks=self._tasks, task_manager=self._manager, **self._options
                )
            except (OSError, ValueError, ConnectionError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise CurriqError(
                    f"the tasks {' '.join(self._tasks)} cannot be scored ({first}). Their data come from the "
                    "hub unless a task file names local ones; docs/tasks.md shows such a file."
                ) from error
        assert results is not None  # None is for ranks other than 0, and the harness knows of one process
        return list(_scores(results, self._tasks))


def score_folder(folder: Path, tasks: Sequence[str], *, device: str = "auto", **options: Any) -> list[Score]:
    """Scores of the model in a Hugging Face folder; the options are those of `Harness`.

    Raises:
        CurriqError: the model cannot be opened, or as `Harness`.
    """
    config = LMConfig(model=str(folder))
    tokenizer = load_tokenizer(TokenizerConfig(tokenizer=str(folder)), config, list)
    lm = load_language_model(config, tokenizer, 2, 0, pick_device(device))
    return Harness(lm, tokenizer, tasks, **options).scores()


def _scores(results: Any, wanted: Sequence[str]) -> Iterable[Score]:
    """The asked-for tasks and groups in their order; of a tag, its tasks."""
    table, samples = results["results"], results["samples"]
    names = [name for name in wanted if name in table]
    if len(names) < len(wanted):
        inside = {leaf for name in names for leaf in _leaves(results, name)}
        names += [name for name in table if name not in inside and name not in names]
    for name in names:
        leaves, chance = _leaves(results, name), _chance_level(results, name)
        for key, value in table[name].items():
            measure, _, filtered = key.partition(",")
            if not filtered or measure.endswith("_stderr") or not isinstance(value, float | int):
                continue
            stderr = table[name].get(f"{measure}_stderr,{filtered}")
            known = isinstance(stderr, float | int) and math.isfinite(stderr)
            yield Score(
                task=name,
                measure=measure if filtered == "none" else f"{measure}-{filtered}",
                value=float(value),
                stderr=float(stderr) if known else None,
                chance_level=chance if measure.startswith("acc") else None,
                examples=sum(len(samples.get(leaf, ())) for leaf in leaves),
            )


def _leaves(results: Any, name: str) -> list[str]:
    """The tasks that a group is made of; a task is made of itself."""
    members = results.get("group_subtasks", {}).get(name) or []
    return [leaf for member in members for leaf in _leaves(results, member)] or [name]


def _chance_level(results: Any, name: str) -> float | None:
    """Mean over the examples of 1 over the number of choices; None without choices."""
    guesses = []
    for leaf in _leaves(results, name):
        if results["configs"].get(leaf, {}).get("output_type") != "multiple_choice":
            return None
        guesses += [1 / max(1, len(sample["arguments"])) for sample in results["samples"].get(leaf, ())]
    return float(np.mean(guesses)) if guesses else None


@contextmanager
def _untouched(lm: LanguageModel) -> Generator[None]:
    """Evaluation mode inside, without the harness's messages and bars, which would tear the display of a run.

    Restores the mode, the global generators, the log levels and the bars.
    """
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels, bars = [logger.level for logger in loggers], datasets.is_progress_bar_enabled()
    python, numpy, training = random.getstate(), np.random.get_state(), lm.network.training
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []), torch.no_grad():
            lm.network.eval()
            yield
    finally:
        lm.network.train(training)
        random.setstate(python)
        np.random.set_state(numpy)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
