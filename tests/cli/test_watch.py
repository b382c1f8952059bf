"""The live page: on this machine only, read-only, and as new as the log."""

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.reports import write_run

from curriq.cli import main
from curriq.report.watch import HOST, LivePage, make_server


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """An empty run folder and the port that it is served on."""
    page = LivePage([tmp_path], 1.0, topics=0, share=1.0)
    with make_server(page.get, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield tmp_path, server.server_port
        server.shutdown()
        thread.join()


def ask(port: int, method: str = "GET", path: str = "/", host: str = "localhost") -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    connection.request(method, path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_follows_the_log(served):
    folder, port = served
    status, text = ask(port)
    assert status == 503
    assert "Nothing to show yet" in text
    write_run(folder, steps=10)
    status, first = ask(port)
    assert status == 200
    assert "10 of 10 steps" in first
    assert ask(port) == (200, first)  # nothing new, the same bytes
    log = folder / "metrics.jsonl"
    last = log.read_text().splitlines()[-1].replace('"step": 9', '"step": 10')
    with log.open("a") as file:
        file.write(last + "\n")
    assert "11 of 10 steps" in ask(port)[1]
    assert "connect-src 'self'" in first


def test_it_answers_this_machine_and_reading_only(served):
    _, port = served
    assert ask(port, host="evil.example")[0] == 403
    assert ask(port, path="/../metrics.jsonl")[0] == 404
    assert ask(port, path="/metrics.jsonl")[0] == 404
    for method in ("POST", "PUT", "DELETE"):
        assert ask(port, method=method)[0] == 501
    assert ask(port, method="HEAD") == (503, "")


def test_bad_calls_are_refused(tmp_path, capsys, served):
    folder, port = served
    for arguments, said in (
        ([str(tmp_path / "none")], "is no folder"),
        ([str(folder), "--every", "0"], "--every 0"),
        ([str(folder), "--port", "70000"], "--port 70000"),
        ([str(folder), "--port", str(port)], "cannot be opened"),
    ):
        assert main(["watch", *arguments]) == 2
        assert said in capsys.readouterr().err
