"""Settings of downstream tasks during training."""

from dataclasses import dataclass

from curriq.config.checks import require, require_at_least


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Tasks of lm-evaluation-harness as a function of training (extra [eval])."""

    eval_tasks: tuple[str, ...] = ()
    """Tasks or groups by the harness's names, such as hellaswag mmlu lambada_openai wikitext; none by
    default. The harness loads their data from the hub, or from where a local task file says."""
    eval_tasks_every: int = 0
    """Steps between evaluations of the tasks; 0 evaluates them after the last step only."""
    eval_tasks_limit: int = 100
    """First examples of each task that are scored; 0 scores all."""
    eval_tasks_fewshot: int = -1
    """Worked examples before each question; -1 takes the task's own number."""
    eval_tasks_path: str = ""
    """Folder of your own task files (YAML), for local data; empty for none."""

    def __post_init__(self) -> None:
        require(
            all(self.eval_tasks) and len(set(self.eval_tasks)) == len(self.eval_tasks),
            f"--eval-tasks {' '.join(self.eval_tasks)}: give every task once, by its name.",
        )
        require_at_least(0, eval_tasks_every=self.eval_tasks_every, eval_tasks_limit=self.eval_tasks_limit)
        require_at_least(-1, eval_tasks_fewshot=self.eval_tasks_fewshot)
