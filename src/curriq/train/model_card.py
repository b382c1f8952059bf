"""The model card of a checkpoint: what trained it, filled in from the run."""

from pathlib import Path
from typing import Any

import curriq
from curriq.config import RunConfig, differences
from curriq.types import Metrics

NAME = "README.md"


def write_model_card(
    folder: Path, config: RunConfig, facts: Metrics, shares: dict[str, dict[str, float]]
) -> None:
    """Write `README.md` into a model's folder.

    Args:
        folder: of the model.
        config: of the run.
        facts: steps, windows, tokens, FLOPs, and the validation loss once there is one. No times, so that
            two runs with one seed write one card.
        shares: of each source, by name, in what was offered and in the mixture weight.
    """
    (folder / NAME).write_text(card(config, facts, shares), encoding="utf-8")


def card(config: RunConfig, facts: Metrics, shares: dict[str, dict[str, float]]) -> str:
    """The text: metadata that the hub reads, then prose and tables."""
    header = _header(config)
    sources = "\n".join(
        f"| {_cell(s.name)} | {_cell(_base(s.path))} | {s.corruption} | {_share(shares, s.name)} |"
        for s in config.data.sources
    )
    changed = "\n".join(
        f"| `{name}` | {_cell(ours)} |"
        for name, ours, _ in differences(config, RunConfig())
        if name not in ("sources", "run_dir", "threads", "progress")
    )
    numbers = "\n".join(
        f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value:.6g} |"
        for name, value in facts.items()
    )
    return f"""---
{header}
---

# A language model trained by curriq

Trained by curriq {curriq.__version__} with the method `{config.method}` and seed {config.train.seed}, on
{config.train.num_candidates} windows of text per step. The method chooses which, or what each weighs.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

## Where it stands

| | |
|---|---|
{numbers}

Losses are in nats per token, on held-out documents of the source `{_cell(config.data.target)}` cut into
windows of {config.data.window} tokens.

## What it was trained on

| source | path | corruption | offered | taken |
|---|---|---|---|---|
{sources}

Offered is a source's share of the text that went by, taken its share of what the model was trained on. `corruption`
is damage that was done to the text on purpose, to see whether the method avoids it.

## Settings that differ from the defaults

| setting | value |
|---|---|
{changed}

## Limits

A research artefact. It was judged by its loss on held-out text alone, not for safety, truth or bias, and it
repeats what is in its training text.
"""


def _header(config: RunConfig) -> str:
    """YAML that the hub reads. Strings are quoted as JSON, which is YAML too."""
    import json

    lines = [
        f"library_name: {'peft' if config.lm.lora_rank else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [curriq, curriculum-learning]",
    ]
    if not config.lm.model.startswith("random:") and not Path(config.lm.model).exists():
        lines.append(f"base_model: {json.dumps(config.lm.model)}")
    names = [
        s.path.removeprefix("hub:").partition(":")[0]
        for s in config.data.sources
        if s.path.startswith("hub:")
    ]
    if names:
        lines.append(f"datasets: {json.dumps(list(dict.fromkeys(names)))}")
    return "\n".join(lines)


def _share(shares: dict[str, dict[str, float]], name: str) -> str:
    share = shares.get(name, {"offered": 0.0, "weight": 0.0})  # the stream leaves out what has no weight
    return f"{share['offered']:.1%} | {share['weight']:.1%}"


def _base(path: str) -> str:
    """A path without the folders of the machine that it lies on."""
    return path if path.startswith(("hub:", "embedded:")) else Path(path).name


def _cell(value: Any) -> str:
    """A value in one cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
