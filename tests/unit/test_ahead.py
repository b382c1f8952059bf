"""Reading in another process: the same windows, the same state, and an end that says why."""

import gc
import json
import logging
import os
import signal

import pytest
import torch
from tests.runs import Finished, InterruptAt, tiny

import curriq.train.run as run_module
from curriq.config import SourceConfig
from curriq.data import open_corpus
from curriq.data.prefetch import LEAST_BLOCKS
from curriq.errors import CurriqError
from curriq.train.run import prepare, resume, train

CUTS = (1, 8, 30, 3, 17, 64, 2, 40)


def batches(stream, cuts):
    return [stream.next_batch(n) for n in cuts]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for name in ("tokens", "window_ids", "source", "rows"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.metrics["data/windows_read"] == b.metrics["data/windows_read"]


@pytest.fixture
def opened():
    """Opens the stream of a configuration that is read ahead; ends its process afterwards."""
    streams = []

    def open_one(config):
        streams.append(open_corpus(config, read_ahead=True).stream)
        return streams[-1]

    yield open_one
    for stream in streams:
        stream.close()


def test_the_windows_are_those_that_one_process_reads_and_either_goes_on_from_the_others_state(opened):
    config = tiny(shuffle_buffer=16)
    plain, ahead = open_corpus(config).stream, opened(config)
    assert ahead.fingerprint() == plain.fingerprint()
    assert_equal(batches(ahead, CUTS), batches(plain, CUTS))
    saved_ahead, saved_plain = ahead.state_dict(), plain.state_dict()
    assert len(saved_ahead["ready"]["ids"]) > 0  # or nothing was read ahead, and this test shows nothing
    expected = batches(plain, CUTS)
    assert_equal(batches(ahead, CUTS), expected)
    again = open_corpus(config).stream
    again.load_state_dict(saved_ahead)
    assert_equal(batches(again, CUTS[:3]), expected[:3])
    middle = again.state_dict()  # with windows that are still ready
    assert_equal(batches(again, CUTS[3:]), expected[3:])
    for state, rest in ((saved_plain, slice(None)), (saved_ahead, slice(None)), (middle, slice(3, None))):
        ahead.load_state_dict(state)
        assert_equal(batches(ahead, CUTS[rest]), expected[rest])


def test_a_run_is_the_same_to_the_bit_also_when_it_is_interrupted(tmp_path, monkeypatch):
    """Forced on the CPU, where equal bits are promised; on a GPU it is how streams are read."""
    config = tiny(
        max_read_ratio=3,
        credit="counterfactual",
        q_features=("source", "dsir_score"),
        reward_every=2,
        temperature="fraction",
        accept_fraction=0.4,
    )
    train(config.override(run_dir=str(tmp_path / "plain")))
    monkeypatch.setattr(run_module, "open_corpus", lambda config, **_: open_corpus(config, read_ahead=True))
    run = prepare(config.override(run_dir=str(tmp_path / "ahead")))
    run.session.probes.append(InterruptAt(2))
    assert not run.session.train().finished
    assert resume(tmp_path / "ahead").finished
    ours, theirs = Finished(tmp_path / "ahead"), Finished(tmp_path / "plain")
    assert ours.candidates == theirs.candidates
    assert ours.weights == theirs.weights
    assert ours.summary["test_loss"] == theirs.summary["test_loss"]


def test_an_error_ahead_comes_when_its_windows_do(opened, tmp_path):
    """Until then training goes on. What would resume behind it cannot be saved."""
    rows = [json.dumps({"text": f"Row {i} says " + f"word{i % 9} " * 40}) for i in range(400)]
    rows[300] = "{broken"
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    web = SourceConfig(name="web", path=str(tmp_path / "rows.jsonl"), weight=1)
    config = tiny(sources=(*tiny().data.sources[:1], web), shuffle_buffer=1, target="prose")

    stream, plain = opened(config), open_corpus(config).stream
    read = []

    def read_on(stream):
        while True:
            read.append(stream.next_batch(8))

    with pytest.raises(CurriqError, match=r"line 301 of .*rows\.jsonl"):
        read_on(stream)
    assert len(read) > LEAST_BLOCKS
    assert_equal(read, batches(plain, len(read) * [8]))
    with pytest.raises(CurriqError, match="line 301"):
        plain.next_batch(8)
    for again in (lambda: stream.next_batch(1), stream.state_dict):
        with pytest.raises(CurriqError, match="line 301"):
            again()


def test_what_the_other_process_logs_is_said_here(opened, caplog):
    prose = tiny().data.sources[0]
    few = SourceConfig(name="few", path="embedded:prose", corruption="none", weight=1)
    stream = opened(tiny(sources=(prose, few), target="prose", shuffle_buffer=1))
    with caplog.at_level(logging.WARNING, "curriq"):
        while "is used up" not in caplog.text:
            assert len(stream.next_batch(2000)) == 2000


def test_a_process_that_ends_is_named_and_ctrl_c_does_not_reach_it(opened):
    stream = opened(tiny())
    stream.next_batch(4)
    child = stream._process
    assert os.getsid(child.pid) != os.getsid(os.getpid())
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(CurriqError, match="ended with exit code -9"):
        batches(stream, 100 * [50])
    with pytest.raises(CurriqError, match="ended with exit code -9"):
        stream.state_dict()


def test_a_stream_that_nobody_uses_leaves_no_process():
    stream = open_corpus(tiny(), read_ahead=True).stream
    stream.next_batch(4)
    child = stream._process
    assert child.poll() is None
    del stream
    gc.collect()
    assert child.poll() is not None
