"""The files that some compositions need."""

import json
from collections.abc import Callable

import pytest
from tests.conformance.compositions import COMPOSITIONS
from tests.runs import tiny

from curriq.config import RunConfig, SourceConfig
from curriq.train.run import train


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> str:
    """A model of the same tokenizer, for rho, perplexity and as a pretrained model."""
    return str(
        train(tiny(selector="uniform", steps=2, run_dir=str(tmp_path_factory.mktemp("ref")))).model_dir
    )


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> SourceConfig:
    """A source whose documents have a difficulty label."""
    path = tmp_path_factory.mktemp("labelled") / "documents.jsonl"
    documents = (
        {"text": f"Document {i} says {i * i} and again " + f"word{i % 7} " * 30, "level": i % 5}
        for i in range(200)
    )
    path.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    return SourceConfig(name="labelled", path=str(path), difficulty_field="level", weight=0.5)


@pytest.fixture(scope="session")
def configure(reference, labelled) -> Callable[[str], RunConfig]:
    """Name of a composition → its run."""

    def of(name: str) -> RunConfig:
        overrides = COMPOSITIONS[name]
        if overrides.get("model") == "REFERENCE":
            overrides = overrides | {"model": reference}
        if "rho" in (overrides.get("selector"), overrides.get("static_score")) or name == "perplexity":
            overrides = overrides | {"reference_model": reference}
        if overrides.get("difficulty") == "label":
            overrides = overrides | {"sources": (*tiny().data.sources, labelled)}
        return tiny(**overrides)

    return of
