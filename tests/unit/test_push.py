"""`curriq push` without a network: what is sent, what the card says, and how failures are told."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard, errors
from tests.runs import tiny

from curriq.cli import main
from curriq.config import RunConfig, SourceConfig
from curriq.errors import CurriqError
from curriq.runlog.checkpoints import latest_model
from curriq.train import hub
from curriq.train.hub import push
from curriq.train.model_card import base_model, model_card
from curriq.train.result import RunResult
from curriq.train.run import train

REPO = "someone/tiny"


@dataclass
class FakeApi:
    """The part of `HfApi` that a push uses; `error` is raised by the commit."""

    license: str | None = None
    error: Exception | None = None
    repos: list[tuple[str, bool]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def model_info(self, name: str) -> Any:
        self.asked.append(name)
        return SimpleNamespace(card_data=SimpleNamespace(license=self.license))

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.repos.append((repo, private))

    def create_commit(self, repo: str, operations: list, *, commit_message: str) -> Any:
        if self.error is not None:
            raise self.error
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1?{commit_message}")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(tiny(run_dir=str(tmp_path_factory.mktemp("push") / "run")))


@pytest.fixture
def run(result: RunResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(result.run_dir, tmp_path / "run"))


def answer(status: int) -> Any:
    """What the hub's server answers."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


def card_of(api: FakeApi) -> ModelCard:
    return ModelCard(api.files["README.md"].decode())


class TestWhatIsSent:
    def test_the_model_and_a_card_under_its_new_name(self, result: RunResult):
        api = FakeApi()
        url = result.push_to_hub(REPO, private=True, api=api)
        assert url == f"https://hub/{REPO}/commit/1?6 steps of curriq"
        assert api.repos == [(REPO, True)]
        lm = latest_model(result.run_dir)
        sent = {name: content for name, content in api.files.items() if name != "README.md"}
        assert sent == {path.name: path.read_bytes() for path in lm.iterdir() if path.name != "README.md"}
        text = api.files["README.md"].decode()
        assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in text
        assert "FOLDER" not in text

    def test_losses_on_the_test_set_are_in_the_card(self, result: RunResult):
        api = FakeApi()
        push(result.run_dir, REPO, api=api)
        found = {entry.metric_type: entry.metric_value for entry in card_of(api).data.eval_results}
        assert found == {
            name: pytest.approx(result.summary[f"test_{name}"]) for name in ("loss", "perplexity")
        }
        assert card_of(api).data.eval_results[0].dataset_name == "prose (held-out documents)"

    def test_a_model_from_scratch_has_no_base_and_takes_a_license_when_told(self, run: Path):
        api = FakeApi(license="mit")
        push(run, REPO, api=api)
        assert api.asked == []
        assert card_of(api).data.base_model is None
        assert card_of(api).data.license is None
        push(run, REPO, license="cc-by-4.0", api=api)
        assert card_of(api).data.license == "cc-by-4.0"

    def test_the_license_is_that_of_the_base_model(self, run: Path):
        settings = run / "config.toml"
        lines = settings.read_text().splitlines()
        changed = [
            'model = "openai-community/gpt2"' if line.startswith("model = ") else line for line in lines
        ]
        settings.write_text("\n".join(changed))
        api = FakeApi(license="mit")
        push(run, REPO, api=api)
        assert api.asked == ["openai-community/gpt2"]
        assert card_of(api).data.license == "mit"
        push(run, REPO, license="apache-2.0", api=api)
        assert card_of(api).data.license == "apache-2.0"

    def test_the_checkpoint_on_the_disk_stays_as_it_was(self, run: Path):
        card = latest_model(run) / "README.md"
        before = card.read_bytes()
        push(run, REPO, license="mit", api=FakeApi())
        assert card.read_bytes() == before
        assert main(["verify", str(run)]) == 0


class TestBaseModel:
    def links(self, config: RunConfig) -> Any:
        shares: dict[str, dict[str, float]] = {"read": {}, "weight": {}}
        return ModelCard(model_card(config, {}, shares)).data

    def test_names_of_the_hub_and_models_from_scratch(self):
        assert base_model("gpt2") == "gpt2"
        assert base_model("random:llama:hidden_size=8") == ""
        assert self.links(RunConfig().override(model="gpt2")).to_dict()["base_model_relation"] == "finetune"
        lora = RunConfig().override(model="gpt2", lora_rank=4)
        assert self.links(lora).to_dict()["base_model_relation"] == "adapter"
        assert self.links(lora).base_model == "gpt2"
        assert self.links(RunConfig()).base_model is None

    def test_a_folder_says_where_it_comes_from(self, tmp_path: Path):
        folder = tmp_path / "lm"
        folder.mkdir()
        assert base_model(str(folder)) == ""
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
        assert base_model(str(folder)) == "owner/base"
        shares: dict[str, dict[str, float]] = {"read": {}, "weight": {}}
        (folder / "README.md").write_text(model_card(RunConfig().override(model="gpt2"), {}, shares))
        assert base_model(str(folder)) == "gpt2"  # a run that went on from a run
        (folder / "README.md").write_text("---\nbase_model: /home/me/model\n---\n")
        (folder / "adapter_config.json").write_text("{")
        assert base_model(str(folder)) == ""
        (folder / "README.md").write_text("no metadata")
        assert base_model(str(folder)) == ""

    def test_data_sets_of_the_hub_are_linked_and_local_files_are_not(self):
        sources = (
            SourceConfig(name="a", path="hub:owner/set:config"),
            SourceConfig(name="b", path="/home/me/secret/b.jsonl"),
        )
        config = RunConfig().override(sources=sources, target="a")
        assert self.links(config).datasets == ["owner/set"]
        card = model_card(config, {}, {"read": {}, "weight": {}})
        assert "secret" not in card


class TestRefusals:
    @pytest.mark.parametrize("name", ["tiny", "a/b/c", "someone/ti ny", "someone/", "someone/-x"])
    def test_names(self, name: str, run: Path, capsys: pytest.CaptureFixture):
        assert main(["push", str(run), name]) == 2
        assert f"curriq: OWNER/NAME = {name!r}: it must be OWNER/NAME" in capsys.readouterr().err

    def test_nobody_is_logged_in(self, run: Path, capsys, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        assert main(["push", str(run), REPO]) == 2
        assert "nobody is logged in" in capsys.readouterr().err

    def test_no_network(self, run: Path, capsys, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
        monkeypatch.setattr("curriq.data.hub._why_unreachable", lambda endpoint: "no route")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert main(["push", str(run), REPO]) == 2
        assert "cannot be reached: no route. The run stays as it is" in capsys.readouterr().err
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert main(["push", str(run), REPO]) == 2
        assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("status", "fix"),
        [(403, "use a token with write access"), (404, "name of the owner"), (500, "try again")],
    )
    def test_the_hub_refuses(self, status: int, fix: str, run: Path):
        error = errors.HfHubHTTPError("no", response=answer(status))
        with pytest.raises(CurriqError, match=f"the hub refused {REPO}: no: .*{fix}"):
            push(run, REPO, api=FakeApi(error=error))

    def test_the_network_goes_while_it_sends(self, run: Path):
        kinds = (errors.HTTPError, ConnectionError, errors.OfflineModeIsEnabled, TimeoutError)
        for error in (kind("gone") for kind in kinds):
            with pytest.raises(CurriqError, match="cannot be reached for someone/tiny: gone"):
                push(run, REPO, api=FakeApi(error=error))

    def test_a_run_without_a_model(self, tmp_path: Path, run: Path):
        with pytest.raises(CurriqError, match="it has saved no checkpoint yet"):
            push(tmp_path, REPO, api=FakeApi())
        (latest_model(run) / "config.json").write_text("{}")
        with pytest.raises(CurriqError, match="its newest checkpoint is damaged, and an older"):
            push(run, REPO, api=FakeApi())

    def test_a_base_model_that_is_gone_is_no_failure(self):
        def gone(name: str) -> None:
            raise errors.RepositoryNotFoundError("gone", response=answer(404))

        assert hub._inherited_license(SimpleNamespace(model_info=gone), "owner/base") == ""
