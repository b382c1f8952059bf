"""Settings of downstream tasks during training."""

from dataclasses import dataclass
from typing import Annotated

from curriq.config.checks import CountOrZero, Section, Within, require


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Tasks of lm-evaluation-harness during training (extra [eval])."""

    eval_tasks: tuple[str, ...] = ()
    """Tasks or groups by the harness's names, such as hellaswag mmlu lambada_openai wikitext. It downloads
    their data, or reads what a local task file names."""
    eval_tasks_every: CountOrZero = 0
    """Steps between evaluations of the tasks; 0 evaluates them after the last step only."""
    eval_tasks_limit: CountOrZero = 100
    """Examples per task, the first ones; 0 for all."""
    eval_tasks_fewshot: Annotated[int, Within("[-1, inf)")] = -1
    """Few-shot examples in each prompt; -1 takes the task's own number."""
    eval_tasks_path: str = ""
    """Folder of your own task files (YAML); empty for none."""

    def check(self) -> None:
        require(
            all(self.eval_tasks) and len(set(self.eval_tasks)) == len(self.eval_tasks),
            f"--eval-tasks {' '.join(self.eval_tasks)}: give every task once, by its name.",
        )
