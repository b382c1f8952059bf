"""The live page: on this machine only, read-only, and as new as the log."""

import http.client
import shutil
import socket
import threading
import time
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
        ([str(folder), "--every", "0"], "--every = 0"),
        ([str(folder), "--port", "70000"], "--port = 70000"),
        ([str(folder), "--port", str(port)], "cannot be opened"),
    ):
        assert main(["watch", *arguments]) == 2
        assert said in capsys.readouterr().err


DAMAGES = {
    "a byte that is not UTF-8 in the log": lambda run: append(run / "metrics.jsonl", b'{"step": 10, \xff}\n'),
    "a row that is no object": lambda run: append(run / "metrics.jsonl", b"[1]\n"),
    "a row without numbers": lambda run: append(run / "metrics.jsonl", b'{"step": "x"}\n'),
    "a number that no float holds": lambda run: append(
        run / "metrics.jsonl", b'{"step": 1' + b"0" * 400 + b"}\n"
    ),
    "brackets without end": lambda run: append(run / "metrics.jsonl", b"[" * 100_000 + b"\n"),
    "a list as summary": lambda run: (run / "summary.json").write_text("[]"),
    "a list as comparison": lambda run: (run / "comparison.json").write_text("[]"),
    "an empty comparison": lambda run: (run / "comparison.json").write_text("{}"),
    "another comparison": lambda run: (run / "comparison.json").write_text('{"streams": [], "baseline": 3}'),
    "another table": lambda run: write_table(run / "candidates" / "part-99999999.parquet", {"a": [1]}),
    "other types in a table": lambda run: write_table(
        run / "candidates" / "part-99999999.parquet", {name: ["x"] for name in CANDIDATES}
    ),
    "no table": lambda run: (run / "candidates" / "part-99999999.parquet").write_bytes(b"PAR1"),
    "other windows": lambda run: write_table(
        run / "windows" / "part-99999999.parquet", {"window_id": [1], "tokens": ["x"]}
    ),
    "settings that are no tables": lambda run: (run / "config.toml").write_text("a = 1\n"),
    "an environment of other types": lambda run: (run / "environment.json").write_text('{"versions": 3}'),
    "a folder as log": lambda run: [(run / "summary.json").unlink(), (run / "summary.json").mkdir()],
}
CANDIDATES = ("step", "row", "window_id", "source", "weight", "loss", "q")


def append(file: Path, content: bytes) -> None:
    with file.open("ab") as log:
        log.write(content)


def write_table(path: Path, columns: dict[str, list]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_odd_files_give_a_reason_and_the_page_comes_back_by_itself(damage, tmp_path, capfd):
    run, whole = tmp_path / "run", tmp_path / "whole"
    write_run(run, steps=10)
    shutil.copytree(run, whole)
    page = LivePage([run], 1.0, topics=0, share=1.0)
    assert page.get()[0] == 200
    DAMAGES[damage](run)
    status, text = page.get()
    assert status == 503
    assert str(run) in text
    assert main(["report", str(run), "--no-figures"]) in (2, 74)  # the command says the same
    out, err = capfd.readouterr()
    assert out == ""
    assert str(run) in err
    assert "Traceback" not in err
    shutil.rmtree(run)
    shutil.copytree(whole, run)
    assert page.get()[0] == 200


def test_a_client_that_says_nothing_keeps_nobody_waiting_and_is_dropped(served, monkeypatch):
    _, port = served
    with socket.create_connection((HOST, port)) as silent, socket.create_connection((HOST, port)) as half:
        half.sendall(b"GET / HTTP/1.1\r\nHost: loc")
        began = time.monotonic()
        assert ask(port)[0] == 503
        assert time.monotonic() - began < 5
        for client in (silent, half):
            client.settimeout(30)
            assert client.recv(1) == b""  # closed from the other side
        assert 5 < time.monotonic() - began < 20
