"""The model card of a checkpoint: the data, the settings and the results of the run that trained it."""

import json
from collections.abc import Iterable
from pathlib import Path

import curriq
from curriq.config import RunConfig, differences
from curriq.data import is_hub_name
from curriq.data.files import user_path
from curriq.types import Metrics


def model_card(config: RunConfig, facts: Metrics, shares: dict[str, dict[str, float]]) -> str:
    """The text of `README.md`: metadata that the hub reads, then prose and tables.

    Args:
        config: of the run.
        facts: counts and the validation loss. No times, so that two runs with one seed write equal cards.
        shares: as of `Meter.shares`.
    """
    sources = []
    for source in config.data.sources:  # those without weight are not in the stream and have no shares
        percentages = (f"{shares[kind].get(source.name, 0.0):.1%}" for kind in ("read", "weight"))
        sources.append((source.name, _base(source.path), source.corruption, *percentages))
    changed = [
        (f"`{name}`", ours)
        for name, ours, _ in differences(config, RunConfig())
        if name not in ("sources", "run_dir", "threads", "progress")
    ]
    numbers = [
        (name, f"{value:,}" if isinstance(value, int) else f"{value:.6g}") for name, value in facts.items()
    ]
    return f"""---
library_name: {"peft" if config.lm.lora_rank else "transformers"}
pipeline_tag: text-generation
tags: [curriq, curriculum-learning]{_hub_links(config)}
---

# A language model trained by curriq

Trained by curriq {curriq.__version__} with the method `{config.method}` and seed {config.train.seed}, on
{config.train.num_candidates} windows of text per step. The method selects or weighs these windows.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

## Results

| | |
|---|---|
{_rows(numbers)}

Losses are in nats per token, on held-out documents of the source `{_cell(config.data.target)}` cut into
windows of {config.data.window} tokens.

## Training data

| source | path | corruption | read | trained |
|---|---|---|---|---|
{_rows(sources)}

`read` is the source's share of the windows that the method chose from, `trained` its share of the training
weight. `corruption` is noise added to the text on purpose, to test whether the method avoids it.

## Settings that differ from the defaults

| setting | value |
|---|---|
{_rows(changed)}

## Limits

A research artefact. It was evaluated by its loss on held-out text only, not for safety, truth or bias, and it
repeats what is in its training text.
"""


def base_model(model: str) -> str:
    """The hub's name of the model that training began with; empty for one from scratch or of unknown origin.

    A folder says it itself: in its model card, as a checkpoint does, or in the configuration of its adapters.
    """
    if model.startswith("random:"):
        return ""
    folder = user_path(model)
    if not folder.exists():
        return model
    found = None
    if (folder / "README.md").is_file():
        from huggingface_hub import ModelCard

        try:
            found = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.base_model
        except (ValueError, OSError):  # a text without metadata
            found = None
    if found is None and (folder / "adapter_config.json").is_file():
        try:
            found = json.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
        except (ValueError, AttributeError):
            found = None
    known = isinstance(found, str) and is_hub_name(found) and not Path(found).exists()
    return str(found) if known else ""


def _hub_links(config: RunConfig) -> str:
    """YAML lines that name the base model and the data sets of the hub; JSON strings are YAML too."""
    lines = ""
    if base := base_model(config.lm.model):
        relation = "adapter" if config.lm.lora_rank else "finetune"
        lines += f"\nbase_model: {json.dumps(base)}\nbase_model_relation: {relation}"
    paths = [source.path for source in config.data.sources if source.path.startswith("hub:")]
    names = dict.fromkeys(path.removeprefix("hub:").partition(":")[0] for path in paths)
    return f"{lines}\ndatasets: {json.dumps(list(names))}" if names else lines


def _rows(rows: Iterable[tuple[object, ...]]) -> str:
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _base(path: str) -> str:
    """A path without the folders of the machine that it lies on."""
    return path if path.startswith(("hub:", "embedded:")) else Path(path).name


def _cell(value: object) -> str:
    """A value in one cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
