"""Downstream tasks by EleutherAI's lm-evaluation-harness, on a model in memory.

Prompts, choices, normalisation and standard errors are the harness's own. It also seeds every global
generator, leaves the model in evaluation mode and gives the tokenizer a padding token; this module restores
the generators and the mode, and passes a copy of the tokenizer.
"""

import copy
import logging
import math
import random
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from curriq.config import LMConfig, TokenizerConfig, missing_extra, require
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
    """Some tasks, groups or tags, loaded once, and the model that they judge as it is at each call.

    `limit` takes the first examples of each task; `fewshot` replaces the task's own number of worked examples
    before each question; `path` is a folder of task files besides the harness's own.

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
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            user, package = f"the tasks {' '.join(tasks)}", f"lm-eval ({error})"
            raise missing_extra(user, package, "eval", "leave the tasks out") from None
        self._lm = lm
        self._tasks = list(tasks)
        own: Any = copy.deepcopy(tokenizer)  # the harness names narrower types than it takes
        with _untouched(lm):
            # A task file may take the place of the harness's own, so the folder's names come first.
            manager = TaskManager(include_path=path or None, include_defaults=True)
            for task in tasks:
                where = f", and {path} has no file of it" if path else ""
                require(
                    task in manager.all_tasks,
                    f"the harness knows no task {task!r}{where}: `lm_eval ls tasks` lists them; a task file "
                    "of your own goes into --eval-tasks-path (for `curriq eval`: --path).",
                )
            model = HFLM(pretrained=lm.network, tokenizer=own, backend="causal", batch_size=batch_size)
        options = {"limit": limit, "num_fewshot": fewshot, "bootstrap_iters": BOOTSTRAP}
        self._evaluate = partial(
            simple_evaluate, model=model, tasks=self._tasks, task_manager=manager, **options
        )

    def scores(self) -> list[Score]:
        """Scores of the model as it is now.

        Raises:
            CurriqError: the data of a task cannot be had, or a task asks for what the model cannot do.
        """
        with _untouched(self._lm):
            try:
                results = self._evaluate()
            except (OSError, ValueError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise CurriqError(
                    f"the tasks {' '.join(self._tasks)} cannot be scored ({first}). Their data come from the "
                    "hub unless a task file names local ones; docs/tasks.md shows such a file."
                ) from error
        assert results is not None  # None is for ranks other than 0, and the harness knows of one process
        return list(_scores(results, self._tasks))


def score_folder(folder: Path, tasks: Sequence[str], *, device: str = "auto", **options: Any) -> list[Score]:
    """Scores of the model in a Hugging Face folder; options and errors are those of `Harness`."""
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
    leaves = _leaves(results, name)
    if any(results["configs"].get(leaf, {}).get("output_type") != "multiple_choice" for leaf in leaves):
        return None
    samples = [sample for leaf in leaves for sample in results["samples"].get(leaf, ())]
    return float(np.mean([1 / max(1, len(sample["arguments"])) for sample in samples])) if samples else None


@contextmanager
def _untouched(lm: LanguageModel) -> Generator[None]:
    """Evaluation mode inside, without the harness's messages and bars, which would tear the display of a run.

    Restores the mode, the global generators, the log levels and the bars.
    """
    import datasets

    with ExitStack() as after:
        after.callback(lm.network.train, lm.network.training)
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        for quiet in map(logging.getLogger, ("lm_eval", "lm-eval")):
            after.callback(quiet.setLevel, quiet.level)
            quiet.setLevel(logging.ERROR)
        if datasets.is_progress_bar_enabled():
            after.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        after.enter_context(torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []))
        after.enter_context(torch.no_grad())
        lm.network.eval()
        yield
