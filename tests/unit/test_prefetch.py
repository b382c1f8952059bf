"""Reading in a worker process: the same windows, the same state, and an end that says why."""

import gc
import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.runs import Finished, InterruptAt, assert_same_state, tiny

import curriq.train.run as run_module
from curriq.config import SourceConfig
from curriq.data import open_corpus
from curriq.data.corpus import LEAST_STEPS_AHEAD
from curriq.data.prefetch import SNAPSHOT_BLOCKS, Prefetched
from curriq.data.stream import WindowStream
from curriq.errors import CurriqError
from curriq.runlog.storage import exclusive
from curriq.train.run import Own, prepare, resume, train

CUTS = (1, 8, 30, 3, 17, 64, 2, 40)


def batches(stream, cuts):
    return [stream.read(n) for n in cuts]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for name in ("tokens", "ids", "source"):
            assert torch.equal(getattr(a.windows, name), getattr(b.windows, name)), name
        assert torch.equal(a.rows, b.rows)
        assert a.cost == b.cost


def opened(config):
    """A stream that is read ahead; its process ends with it."""
    stream = open_corpus(config, read_ahead=True).stream
    assert isinstance(stream, Prefetched)
    return stream


def worker_of(stream):
    """The process that reads."""
    return stream._worker._blocks._workers[0]


def test_the_windows_are_those_that_one_process_reads_and_either_goes_on_from_the_others_state():
    config = tiny(shuffle_buffer=16)
    plain, ahead = open_corpus(config).stream, opened(config)
    assert ahead.fingerprint == plain.fingerprint
    assert_equal(batches(ahead, CUTS), batches(plain, CUTS))
    assert len(ahead._rest) > 0  # or a block ends here, and this test shows less
    saved_ahead, saved_plain = ahead.state_dict(), plain.state_dict()
    assert_same_state(saved_ahead, saved_plain)
    expected = batches(plain, CUTS)
    assert_equal(batches(ahead, CUTS), expected)
    again = open_corpus(config).stream
    again.load_state_dict(saved_ahead)
    assert_equal(batches(again, CUTS[:3]), expected[:3])
    middle = again.state_dict()
    assert_equal(batches(again, CUTS[3:]), expected[3:])
    for state, rest in ((saved_plain, slice(None)), (saved_ahead, slice(None)), (middle, slice(3, None))):
        ahead.load_state_dict(state)
        assert_equal(batches(ahead, CUTS[rest]), expected[rest])


def test_the_state_is_right_after_every_read():
    """Whether the worker has sent a state with the last block, or several blocks ago."""
    config = tiny(shuffle_buffer=16)
    block = config.train.num_candidates
    plain, ahead = open_corpus(config).stream, opened(config)
    for n in (block, block - 1, 2, SNAPSHOT_BLOCKS * block, 1, 3 * block, block):
        assert_equal([ahead.read(n)], [plain.read(n)])
        assert_same_state(ahead.state_dict(), plain.state_dict())
    fresh = opened(config)
    assert_same_state(fresh.state_dict(), open_corpus(config).stream.state_dict())


def test_a_run_is_the_same_to_the_bit_also_when_it_is_interrupted(tmp_path):
    """Forced on the CPU, where equal bits are promised; on a GPU it is how streams are read."""
    config = tiny(
        max_read_ratio=4,
        credit="counterfactual",
        q_features=("source", "static_score"),
        reward_every=2,
        temperature="fraction",
    )
    train(config.override(run_dir=str(tmp_path / "plain")))
    own = Own(corpus=lambda config, **_: open_corpus(config, read_ahead=True))
    run = prepare(config.override(run_dir=str(tmp_path / "ahead")), own=own)
    assert isinstance(run.corpus.stream, Prefetched)
    run.session.probes.append(InterruptAt(2))
    assert not run.session.train().finished
    assert resume(tmp_path / "ahead", own=own).finished
    ours, theirs = Finished(tmp_path / "ahead"), Finished(tmp_path / "plain")
    assert min(theirs.candidates["accept_prob"]) < 1  # or nothing is rejected, and this test shows less
    assert ours.candidates == theirs.candidates
    assert ours.weights == theirs.weights
    assert ours.summary["test_loss"] == theirs.summary["test_loss"]


def test_a_tokenizer_with_threads_is_no_obstacle():
    """A forked worker has none of the threads with which this process has tokenised already."""
    script = """
from tests.runs import tiny
from curriq.data import open_corpus
corpus = open_corpus(tiny(), read_ahead=True)
corpus.tokenizer(["many words to cut into tokens"] * 500)
print(len(corpus.stream.read(64)))
"""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "64\n", done.stderr


class Owned:
    """Something that only the process which has made it can free, in a cycle."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.cycle = self

    def __del__(self) -> None:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_the_worker_frees_nothing_of_its_parent(tmp_path, monkeypatch):
    """An event of a GPU, for instance: that would end a process which has never used one."""
    inner = WindowStream.read

    def read(self, n: int):
        gc.collect()  # as happens now and then
        return inner(self, n)

    monkeypatch.setattr(WindowStream, "read", read)
    stream = opened(tiny())
    gc.disable()
    try:
        Owned(tmp_path / "freed")  # nobody has it, and nothing has collected it
        stream.read(32)
        assert not (tmp_path / "freed").exists()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "freed").read_text() == f"{os.getpid()}\n"


def test_a_chat_template_that_conversations_set_is_set_here_too(tmp_path):
    """Or the model would be saved without the template that it was trained in."""
    turns = [
        {"role": "user", "content": "count " * 9},
        {"role": "assistant", "content": "one two three " * 9},
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(50)))
    chat = SourceConfig(name="chat", path=str(tmp_path / "chats.jsonl"), text_field="messages", weight=1)
    config = tiny(sources=(*tiny().data.sources[:1], chat), target="prose")
    corpora = [open_corpus(config, read_ahead=ahead) for ahead in (False, True)]
    for corpus in corpora:
        corpus.stream.read(64)
    plain, ahead = (corpus.tokenizer.chat_template for corpus in corpora)
    assert plain is not None
    assert ahead == plain


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_gpu_has_its_stream_read_ahead(monkeypatch, device):
    asked = []

    def open_one(config, **options):
        asked.append(options)
        raise CurriqError("enough")

    monkeypatch.setattr(run_module, "pick_device", lambda name: torch.device(device))
    with pytest.raises(CurriqError, match="enough"):
        prepare(tiny(), own=Own(corpus=open_one))
    assert asked == [{"read_ahead": device == "cuda"}]


def test_an_error_ahead_comes_when_its_windows_do(tmp_path):
    """Until then training goes on. What would resume behind it cannot be saved."""
    rows = [json.dumps({"text": f"Row {i} says " + f"word{i % 9} " * 40}) for i in range(400)]
    rows[300] = "{broken"
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    web = SourceConfig(name="web", path=str(tmp_path / "rows.jsonl"), weight=1)
    config = tiny(sources=(*tiny().data.sources[:1], web), shuffle_buffer=1, target="prose")

    stream, plain = opened(config), open_corpus(config).stream
    state = stream.state_dict()
    read = []

    def read_on(stream):
        while True:
            read.append(stream.read(8))

    with pytest.raises(CurriqError, match=r"line 301 of .*rows\.jsonl"):
        read_on(stream)
    assert len(read) > LEAST_STEPS_AHEAD
    assert_equal(read, batches(plain, len(read) * [8]))
    with pytest.raises(CurriqError, match="line 301"):
        plain.read(8)
    for again in (lambda: stream.read(1), lambda: stream.read(8), stream.state_dict):
        with pytest.raises(CurriqError, match="line 301"):
            again()
    stream.load_state_dict(state)
    assert_equal(batches(stream, 3 * [8]), read[:3])


def test_what_the_worker_logs_is_logged_here_once(caplog, tmp_path):
    (tmp_path / "few.txt").write_text("\n\n".join(f"row {i} says something of its own" for i in range(30)))
    few = SourceConfig(name="few", path=str(tmp_path / "few.txt"), weight=3)
    stream = opened(tiny(sources=(*tiny().data.sources[:1], few), target="prose", shuffle_buffer=1))
    with caplog.at_level(logging.WARNING, "curriq"):
        while "epoch 2 begins" not in caplog.text:
            assert len(stream.read(5)) == 5
        messages = [record.getMessage() for record in caplog.records]
        stream.state_dict()  # reads some windows again
    assert [record.getMessage() for record in caplog.records] == messages
    assert sum("'few' is used up: epoch 1 begins" in message for message in messages) == 1


def test_a_worker_that_is_killed_fails_the_next_read_and_nothing_else():
    handler = signal.getsignal(signal.SIGCHLD)
    stream = opened(tiny())
    stream.read(4)
    assert signal.getsignal(signal.SIGCHLD) == handler
    worker = worker_of(stream)
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # not reaped, so torch would see it
    began = time.monotonic()
    while time.monotonic() - began < 0.2:
        torch.ones(100, 100) @ torch.ones(100, 100)  # a training step goes on
    for again in (lambda: batches(stream, 100 * [50]), lambda: stream.read(1), stream.state_dict):
        with pytest.raises(CurriqError, match=r"has ended .*exited unexpectedly.*too little memory"):
            again()
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_ctrl_c_does_not_reach_the_worker():
    stream = opened(tiny())
    stream.read(4)
    worker = worker_of(stream)
    os.kill(worker.pid, signal.SIGINT)
    time.sleep(0.1)
    assert len(stream.read(500)) == 500
    assert worker.is_alive()


def test_the_worker_does_not_hold_the_folder_of_the_run(tmp_path):
    """Or a run that was killed could not be resumed until the worker has noticed."""
    stream = opened(tiny())
    with exclusive(tmp_path, "somebody holds it"):
        stream.read(4)
        with pytest.raises(CurriqError, match="somebody holds it"), exclusive(tmp_path, "somebody holds it"):
            pass
    assert worker_of(stream).is_alive()
    with exclusive(tmp_path, "somebody holds it"):
        pass


def test_a_stream_that_nobody_uses_leaves_no_process():
    stream = opened(tiny())
    stream.read(4)
    first = worker_of(stream)
    assert first.is_alive()
    stream.load_state_dict(stream.state_dict())
    gc.collect()
    assert not first.is_alive()
    stream.read(4)
    second = worker_of(stream)
    assert second.is_alive()
    del stream
    gc.collect()
    assert not second.is_alive()


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("extension", [".json", ".csv.gz"])
def test_skipped_rows_are_counted_through_a_resume(tmp_path, read_ahead, extension):
    """In the summary, and bit by bit as without the interruption."""
    texts = [f"Row {i} says " + f"word{i % 9} " * 30 for i in range(300)]
    if extension == ".json":
        rows = [{"text": None if i % 50 == 7 else text} for i, text in enumerate(texts)]
        content = json.dumps(rows).encode()
    else:
        lines = [f"{i},{text}" + ",more" * (i % 50 == 7) for i, text in enumerate(texts)]
        content = gzip.compress("\n".join(["id,text", *lines]).encode())
    (tmp_path / f"rows{extension}").write_bytes(content)
    web = SourceConfig(name="web", path=str(tmp_path / f"rows{extension}"), weight=4.0, on_bad_row="skip")
    config = tiny(sources=(*tiny().data.sources[:1], web), target="prose")
    own = Own(corpus=lambda config, **_: open_corpus(config, read_ahead=read_ahead))
    train(config.override(run_dir=str(tmp_path / "whole")))
    run = prepare(config.override(run_dir=str(tmp_path / "cut")), own=own)
    run.session.probes.append(InterruptAt(2))
    assert not run.session.train().finished
    assert resume(tmp_path / "cut", own=own).finished
    ours, theirs = Finished(tmp_path / "cut"), Finished(tmp_path / "whole")
    assert ours.weights == theirs.weights
    assert ours.summary["test_loss"] == theirs.summary["test_loss"]
    counts = [finished.summary["skipped_rows"]["web"] for finished in (ours, theirs)]
    assert counts[0] >= counts[1] >= 1, "what has been read ahead counts, too"


def test_a_stopped_worker_is_named_within_seconds_and_may_go_on(caplog, monkeypatch):
    monkeypatch.setattr("curriq.data.prefetch.PATIENCE", 0.5)
    stream, plain = opened(tiny()), open_corpus(tiny()).stream
    stream.read(4)
    worker = worker_of(stream)

    class LetItGoOn(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "it is stopped" in record.getMessage():
                os.kill(worker.pid, signal.SIGCONT)

    monkeypatch.setattr(logging.getLogger("curriq"), "handlers", [LetItGoOn(), caplog.handler])
    os.kill(worker.pid, signal.SIGSTOP)
    ours = stream.read(4000)
    assert f"waiting for the process {worker.pid} that reads the data, " in caplog.text
    assert f"it is stopped; `kill -CONT {worker.pid}` lets it go on" in caplog.text
    plain.read(4)
    assert_equal([ours], [plain.read(4000)])


def test_processes_that_read_end_with_the_one_that_trains_however_that_ends():
    script = """
import curriq.parallel, time
curriq.parallel.cores = lambda: 9
from tests.runs import tiny
from curriq.data import open_corpus
stream = open_corpus(tiny(stream_shards=2), read_ahead=True).stream
stream.read(8)
print(*(shard._worker._blocks._workers[0].pid for shard in stream.shards.values()), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trains:
        assert trains.stdout is not None
        workers = [int(pid) for pid in trains.stdout.readline().split()]
        assert len(set(workers)) == 2
        trains.kill()
    ends = time.monotonic() + 30
    while any(map(runs, workers)):
        assert time.monotonic() < ends
        time.sleep(0.1)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
