"""A run on a hub data set stays on the commit that it began with. The hub is replaced at its entry points."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from tests.runs import tiny

from curriq.config import SourceConfig, load_toml
from curriq.data.embedded import embedded_documents
from curriq.errors import CurriqError
from curriq.evaluate.compare import is_finished
from curriq.evaluate.plan import PlannedRun
from curriq.presets import preset
from curriq.train.run import resume, train

OLD, NEW = "a" * 40, "b" * 40


class Hub:
    """One data set whose newest commit can change; notes what it is asked for."""

    def __init__(self) -> None:
        self.newest = OLD
        self.asked: list[tuple[str, str | None]] = []
        self.opened: list[str] = []

    def dataset_info(self, name: str, *, revision: str | None = None) -> SimpleNamespace:
        self.asked.append((name, revision))
        return SimpleNamespace(sha=self.newest)

    def load_dataset(self, path: str, *, revision: str, **options: Any) -> datasets.IterableDataset:
        self.opened.append(revision)
        documents = embedded_documents("prose")[:: 1 if revision == OLD else -1]
        return datasets.Dataset.from_dict({"text": [d.text for d in documents]}).to_iterable_dataset()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info",
        lambda self, name, *, revision=None: hub.dataset_info(name, revision=revision),
    )
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def settings(folder: Path, revision: str = "", steps: int = 2) -> Any:
    source = SourceConfig(name="prose", path="hub:owner/name", hub_revision=revision)
    return tiny(sources=(source,), run_dir=str(folder), steps=steps)


def test_a_resume_reads_the_commit_of_the_start(hub: Hub, tmp_path: Path) -> None:
    train(settings(tmp_path, "main"))
    assert hub.asked == [("owner/name", "main")]
    assert load_toml(tmp_path / "config.toml").data.sources[0].hub_revision == OLD
    hub.newest = NEW
    assert resume(tmp_path, steps=3).finished
    assert len(hub.asked) == 1
    assert set(hub.opened) == {OLD}


def test_another_commit_is_other_data(hub: Hub, tmp_path: Path) -> None:
    train(settings(tmp_path))
    with pytest.raises(CurriqError, match=r"other data: .*source prose"):
        resume(tmp_path, sources=settings(tmp_path, NEW).data.sources, steps=3)


def test_a_comparison_knows_its_pinned_runs(hub: Hub, tmp_path: Path) -> None:
    config = settings(tmp_path)
    train(config)
    run = PlannedRun(arm="arm", seed=0, stream="stream", config=config)
    assert is_finished(run)
    pinned_elsewhere = settings(tmp_path, NEW)
    with pytest.raises(CurriqError, match="other settings"):
        is_finished(PlannedRun(arm="arm", seed=0, stream="stream", config=pinned_elsewhere))


def test_paper_reads_files_that_need_no_loading_script() -> None:
    (source,) = preset("paper").data.sources
    assert (source.path, source.hub_revision) == ("hub:Skylion007/openwebtext", "refs/convert/parquet")
