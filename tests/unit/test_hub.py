"""Paths and names of the hub: what is refused before any network, and a hub that does not answer."""

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from curriq.config import LMConfig, SourceConfig, TokenizerConfig
from curriq.data import hub as hub_module
from curriq.data.encoder import SentenceEncoder
from curriq.data.hub import hub, is_hub_name, locate
from curriq.data.sources import open_source, pin_revision
from curriq.data.tokenizer import load_tokenizer
from curriq.errors import CurriqError
from curriq.lm.load import check_model_name

PATHS = [
    "./gpt2",
    "../gpt2",
    "/nowhere/gpt2",
    "~/gpt2-nowhere",
    ".\\gpt2",
    "models\\gpt2",
    "gpt2/",
    "a/b/c",
    ".",
]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine that believes it has a network; returns what it asks for."""
    asked: list[Any] = []

    def refuse(*address: Any, **_: Any) -> Any:
        asked.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    why_unreachable = hub_module._why_unreachable
    why_unreachable.cache_clear()
    yield asked
    why_unreachable.cache_clear()


def load(name: str, model: str = "random:gpt2") -> Any:
    return load_tokenizer(TokenizerConfig(tokenizer=name), LMConfig(model=model), list)


class TestPaths:
    @pytest.mark.parametrize("name", PATHS[:-1])
    def test_a_path_is_never_asked_of_the_hub(
        self, name: str, online: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert not is_hub_name(name)
        for setting, use in (
            ("--tokenizer", lambda: load(name)),
            ("--model", lambda: load("auto", model=name)),
            ("--model", lambda: check_model_name(LMConfig(model=name))),
            ("--model", lambda: check_model_name(LMConfig(model=f"random:{name}"))),
            ("the encoder", lambda: SentenceEncoder(name)),
        ):
            with pytest.raises(CurriqError, match=rf"^{setting} .* is a path, and there is no such folder"):
                use()
        with pytest.raises(CurriqError, match="is no name of a hub data set"):
            pin_revision(SourceConfig(name="mine", path=f"hub:{name}"))
        assert online == []

    def test_a_folder_is_read_by_either_way_of_writing_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "gpt2").mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert locate("--model", "./gpt2") == ("gpt2", True)
        assert locate("--model", "gpt2") == ("gpt2", True)
        assert locate("--model", "~/gpt2") == (str(tmp_path / "gpt2"), True)
        assert locate("--model", "owner/gpt2") == ("owner/gpt2", False)

    @pytest.mark.parametrize("name", ["gpt2", "owner/name", "01-ai/Yi-6B", "a_b/c.d-e"])
    def test_names_of_the_hub(self, name: str) -> None:
        assert is_hub_name(name)


class TestArchitectures:
    def test_unknown_ones_are_refused_before_any_network(self, online: list[Any]) -> None:
        with pytest.raises(
            CurriqError, match=r"no architecture 'lama'\. Did you mean random:llama\?.*OWNER/NAME"
        ):
            check_model_name(LMConfig(model="random:lama:hidden_size=8"))
        assert online == []

    @pytest.mark.parametrize(
        "name", ["random:gpt2", "random:llama:hidden_size=8", "random:owner/name", "gpt2"]
    )
    def test_others_pass(self, name: str, online: list[Any]) -> None:
        check_model_name(LMConfig(model=name))
        assert online == []


class TestUnreachable:
    def test_one_message_at_once(self, online: list[Any]) -> None:
        began = time.perf_counter()
        reason = r"ConnectionError: |https://huggingface\.co cannot be reached: .*no network here"
        with pytest.raises(
            CurriqError, match=r"hub name 'owner/name' \(https://.* cannot be reached: .*no net"
        ):
            load("owner/name")
        with pytest.raises(CurriqError, match=reason):
            open_source(SourceConfig(name="mine", path="hub:owner/name"), 0)
        with pytest.raises(CurriqError, match=reason):
            SentenceEncoder("owner/name")
        assert len(online) == 1, "asked once a process"
        assert time.perf_counter() - began < 20
        assert not constants.HF_HUB_OFFLINE

    def test_an_error_of_a_hub_that_answers_stays_as_it_is(
        self, online: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hub_module, "_why_unreachable", lambda _: "")
        with pytest.raises(KeyError), hub():
            raise KeyError("x")

    def test_a_silent_hub_is_given_up_in_seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=1) as server:
            monkeypatch.setattr(hub_module, "TIMEOUT", 0.5)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            began = time.perf_counter()
            reason = hub_module._why_unreachable(f"http://127.0.0.1:{server.getsockname()[1]}")
            assert "imeout" in reason or "timed out" in reason
            assert time.perf_counter() - began < 5


@pytest.mark.long
def test_the_command_line_refuses_before_anything_is_read(tmp_path: Path) -> None:
    for model in ("./gpt2", "random:gptt2"):
        command = [
            sys.executable,
            "-m",
            "curriq",
            "train",
            "--model",
            model,
            "--run-dir",
            str(tmp_path / "run"),
        ]
        done = subprocess.run([*command, "--preset", "smoke"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.startswith(f"curriq: --model {model!r}")
        assert len(done.stderr.splitlines()) < 6
    assert not (tmp_path / "run").exists()
