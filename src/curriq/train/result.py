"""How a run ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curriq.runlog.notebook import run_html
from curriq.runlog.read import has_finished, read_summary
from curriq.train.hub import push


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended: its folder, the content of `summary.json` (docs/metrics.md defines the fields), and
    whether the last step was reached (False after Ctrl-C)."""

    run_dir: Path
    summary: dict[str, Any]
    finished: bool

    @property
    def model_dir(self) -> Path | None:
        """Folder that `AutoModelForCausalLM.from_pretrained` opens: the language model as it is now. Of a run
        that was stopped under `--engine fsdp`, `curriq export RUN --model` writes the weights there first."""
        checkpoint = self.summary["checkpoint"]
        return None if checkpoint is None else self.run_dir / checkpoint / "lm"

    def push_to_hub(self, repo: str, *, private: bool = False, license: str = "", api: Any = None) -> str:
        """Upload the model to the Hugging Face hub; returns the address of the commit.

        Args:
            repo: `OWNER/NAME`, made where it is missing.
            private: make it visible to its owner alone.
            license: identifier for the model card; that of the base model when empty.
            api: a `huggingface_hub.HfApi` of one's own.

        Raises:
            CurriqError: the run holds no whole model, nobody is logged in, or the hub cannot be reached or
                refuses.
        """
        return push(self.run_dir, repo, private=private, license=license, api=api)

    def _repr_html_(self) -> str:
        return run_html(self.run_dir, self.summary)


def finished_run(folder: Path) -> RunResult | None:
    """How the run in a folder ended, where it reached its last step; else None."""
    ended = has_finished(folder)
    return RunResult(run_dir=folder, summary=read_summary(folder), finished=True) if ended else None
