"""A stream in shards: the same windows on any number of processes, each of which reads its own part."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import open_lm
from tests.ranks import in_processes
from tests.runs import Finished, InterruptAt, assert_same_run, tiny

from curriq import parallel
from curriq.config import RunConfig, SourceConfig
from curriq.data import open_corpus
from curriq.data.documents import Shard, read_epoch
from curriq.data.prefetch import Prefetched
from curriq.data.shards import ShardedStream, own_shards
from curriq.data.sources import open_source
from curriq.errors import CurriqError
from curriq.presets import own_settings
from curriq.rng import Generators
from curriq.select import references, soft_q
from curriq.select.base import Context
from curriq.select.sharded import ShardedProposer
from curriq.select.static import DsirScore
from curriq.train.run import Own, load_run, prepare, resume, train
from curriq.types import Windows

SLOW = pytest.mark.slow
SHARDS: dict[str, Any] = {"stream_shards": 4, "shuffle_buffer": 32, "log_windows_mb": 200.0}
PROBED: dict[str, Any] = {"probe_windows": 5, "reward_every": 2, "q_replay_size": 64}
MODEL = "random:gpt2:n_embd=8,n_layer=1,n_head=1,vocab_size=300"
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"selector": "uniform"},
    "soft-q": {"reforward_action": True},
    "weighted": own_settings("weighted") | PROBED,
    "prior": {"prior": True, "q_features": ("last", "static_score")},
    "filter": {"selector": "filter", "max_read_ratio": 4},
    "classifier": {"selector": "filter", "max_read_ratio": 4, "static_score": "classifier"},
    "recommended": own_settings("recommended")
    | PROBED
    | {"sources": tiny().data.sources, "sharp_start": 2060},  # it ends within the run, after the look-ahead
}


# What a shard reads -------------------------------------------------------------------------------------


def keys(config: SourceConfig, shard: Shard) -> Counter[str]:
    return Counter(document.key for document in read_epoch(open_source(config, 0, shard=shard)))


def written(folder: Path, files: dict[str, int]) -> SourceConfig:
    """JSON Lines of so many documents each, all different."""
    folder.mkdir(exist_ok=True)
    for name, count in files.items():
        rows = [{"text": f"document {i} of {name} " + "word " * 9} for i in range(count)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(name="files", path=str(folder))


@pytest.mark.parametrize(
    "files",
    [
        {"one.jsonl": 23},
        {"a.jsonl": 40, "b.jsonl": 3, "c.jsonl": 3},  # uneven: by rows
        {f"{i}.jsonl": 10 for i in range(8)},  # even: whole files
        {f"{i}.jsonl": 1 for i in range(7)},  # more shards than rows in any file
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_document_goes_to_one_shard(files, count, tmp_path):
    config = written(tmp_path, files)
    parts = [keys(config, Shard(number, count)) for number in range(count)]
    assert sum(parts, Counter()) == keys(config, Shard())
    sizes = [sum(part.values()) for part in parts]
    assert max(sizes) - min(sizes) <= max(1, len(files))


def test_whole_files_where_they_are_even_and_the_place_is_resumed(tmp_path):
    config = written(tmp_path / "even", {f"{i}.jsonl": 10 for i in range(8)})
    assert len(keys(config, Shard(1, 4))) == 20
    for where in (config, written(tmp_path / "one", {"rows.jsonl": 31})):
        source = open_source(where, 0, shard=Shard(1, 4))
        for _ in range(3):
            source.next_document()
        state = source.state_dict()
        rest = [document.key for document in read_epoch(source)]
        again = open_source(where, 0, shard=Shard(1, 4))
        again.load_state_dict(state)
        assert [document.key for document in read_epoch(again)] == rest


def test_the_embedded_corpus_in_shards_and_in_a_new_order_each_epoch():
    config = SourceConfig(name="prose", path="embedded:prose")
    parts = [keys(config, Shard(number, 3)) for number in range(3)]
    assert sum(parts, Counter()) == keys(config, Shard())
    source = open_source(config, 0, shard=Shard(2, 3))
    first, second = ([d.key for d in read_epoch(source)] for _ in range(2))
    assert first != second
    assert Counter(first) == Counter(second)
    assert source.fingerprint() == open_source(config, 0).fingerprint()


@pytest.mark.parametrize("count", [2, 3])  # of three files: by rows, and whole ones
def test_a_hub_data_set_in_shards(count, tmp_path, monkeypatch):
    import datasets

    written(tmp_path, {f"{i}.jsonl": 11 for i in range(3)})
    opened, files = datasets.load_dataset, [*map(str, sorted(tmp_path.glob("*.jsonl")))]
    local = {"data_files": files, "split": "train", "streaming": True}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: opened("json", **local))
    config = SourceConfig(name="hub", path="hub:owner/name", hub_revision="0" * 40)
    parts = [keys(config, Shard(number, count)) for number in range(count)]
    assert sum(parts, Counter()) == keys(config, Shard())
    assert max(sum(part.values()) for part in parts) == -(-33 // count)
    source, again = (open_source(config, 0, shard=Shard(1, count)) for _ in range(2))
    for _ in range(4):
        source.next_document()
    again.load_state_dict(source.state_dict())
    for _ in range(2):  # epochs
        assert [d.key for d in read_epoch(again)] == [d.key for d in read_epoch(source)]


def test_a_source_with_fewer_documents_than_shards_is_refused(tmp_path):
    config = written(tmp_path, {"few.jsonl": 2})
    with pytest.raises(CurriqError, match=r"'files' has no document with text for shard 2 of 4: low"):
        list(read_epoch(open_source(config, 0, shard=Shard(2, 4))))


def test_shards_that_cannot_be_dealt_out_are_refused(monkeypatch):
    with pytest.raises(CurriqError, match=r"--stream-shards 3 with --num-candidates 8: .*-candidates 6"):
        tiny(stream_shards=3)
    with pytest.raises(CurriqError, match="--engine fsdp with --static-score rho"):
        tiny(**METHODS["filter"], static_score="rho", reference_model="x", engine="fsdp", stream_shards=2)
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    with pytest.raises(CurriqError, match=r"4 cannot be dealt out evenly to 3 .*\(1, 2, 4\), or .* of 3 sh"):
        own_shards(4)


# The stream ---------------------------------------------------------------------------------------------


def test_windows_of_all_shards_in_turn_however_they_are_read():
    config = tiny(**SHARDS)
    whole, pieces = open_corpus(config).stream, open_corpus(config).stream
    assert isinstance(whole, ShardedStream)
    at_once, n = whole.read(32), 0
    by_shard = at_once.windows.ids.view(4, 8)  # the shards' order
    for step in (8, 4, 1, 6, 5, 8):
        offer = pieces.read(step)
        for number in range(4):
            rows = [j for j in range(n, n + step) if j % 4 == number]
            ours = [int(i) for i in by_shard[number][[j // 4 for j in rows]]]
            start = sum(j % 4 < number for j in range(n, n + step))
            assert offer.windows.ids[start : start + len(rows)].tolist() == ours
        n += step
    assert at_once.cost.windows_read == 32


def test_read_ahead_by_other_processes_and_saved():
    config = tiny(**SHARDS)
    plain, ahead = open_corpus(config).stream, open_corpus(config, read_ahead=True).stream
    assert isinstance(ahead, ShardedStream)
    assert all(isinstance(shard, Prefetched) for shard in ahead.shards.values())
    for n in (8, 16, 3):
        assert torch.equal(ahead.read(n).windows.tokens, plain.read(n).windows.tokens)
    state = ahead.state_dict()
    expected = plain.read(24).windows.ids
    again = open_corpus(config).stream
    again.load_state_dict(state)
    assert torch.equal(again.read(24).windows.ids, expected)
    assert torch.equal(ahead.read(24).windows.ids, expected)


# The policy of all shards -------------------------------------------------------------------------------


def proposer_of(config: RunConfig) -> tuple[ShardedProposer, Context]:
    corpus, lm = open_corpus(config), open_lm(MODEL)
    context = Context(corpus=corpus, lm=lm, generators=Generators(config.train.seed))
    build = references.build if config.select.selector == "filter" else soft_q.build
    proposer = build(config, context).proposer
    assert isinstance(proposer, ShardedProposer)
    return proposer, context


def test_ngrams_are_counted_once_over_all_shards():
    config = tiny(**SHARDS | METHODS["filter"])
    proposer, context = proposer_of(config)
    offers = [proposer.propose(step) for step in range(40)]
    assert {len(offer) for offer in offers} == {8}
    judged = Windows.cat([part.windows for offer in offers for part in offer.judged])
    assert proposer.scorer is not None
    ours = proposer.scorer.score
    expected = DsirScore(context.corpus.held_out.reference)
    # The first windows are counted before the first step, whether or not a step has judged them.
    ahead = open_corpus(config).stream
    assert isinstance(ahead, ShardedStream)
    first = Windows.cat([shard.read(proposer.ahead).windows for shard in ahead.shards.values()])
    expected.learn(first)
    new = [i for i, count in enumerate(taken_after(first, judged)) if count]
    expected.learn(judged.take(torch.tensor(new, dtype=torch.int64)))
    assert isinstance(ours, DsirScore)
    assert (ours.counts().seen == expected.counts().seen).all()
    assert all(set(part.known) == {"static_score", "prior"} for offer in offers for part in offer.judged)


def taken_after(first: Windows, judged: Windows) -> list[bool]:
    """Whether each of the judged windows was read after the first ones."""
    left = Counter(first.ids.tolist())
    after = []
    for window in judged.ids.tolist():
        after.append(left[window] == 0)
        left[window] -= left[window] > 0
    return after


@SLOW
def test_the_filter_in_shards_accepts_as_the_one_that_is_not_divided():
    """The same policy: of each source about the same share is accepted."""
    shares = {}
    for shards in (1, 4):
        config = tiny(**METHODS["filter"], stream_shards=shards, num_candidates=64, shuffle_buffer=512)
        if shards == 1:
            corpus, lm = (
                open_corpus(config),
                open_lm("random:gpt2:n_embd=8,n_layer=1,n_head=1,vocab_size=300"),
            )
            context = Context(corpus=corpus, lm=lm, generators=Generators(0))
            proposer: Any = references.build(config, context).proposer
        else:
            proposer, _ = proposer_of(config)
        sources = torch.cat([proposer.propose(step).windows.source for step in range(20)])
        shares[shards] = torch.bincount(sources, minlength=3) / len(sources)
    assert (shares[1] - shares[4]).abs().max() < 0.08
    assert shares[1][0] > 0.6  # the target's own source, a third of the stream


# Whole runs ---------------------------------------------------------------------------------------------


def train_all(folder: Path, names: list[str], engine: str) -> None:
    for name in names:
        config = tiny(**SHARDS | METHODS[name], engine=engine, run_dir=str(folder / name))
        assert train(config).finished


def assert_close_runs(ours: Path, theirs: Path) -> None:
    """The same windows, rejected ones too, and losses equal to 1e-6."""
    a, b = Finished(ours), Finished(theirs)
    for column in ("window_id", "source", "static_score", "accept_prob"):
        assert a.candidates[column] == pytest.approx(b.candidates[column], nan_ok=True), column
    assert logged_windows(ours) == logged_windows(theirs)
    for row, expected in zip(a.rows, b.rows, strict=True):
        for name in ("train/loss", "train/mean_loss", "reward", "validation/loss", "x/windows_read"):
            assert row.get(name, 0.0) == pytest.approx(expected.get(name, 0.0), rel=1e-6, abs=1e-6)
    assert a.summary["test_loss"] == pytest.approx(b.summary["test_loss"], rel=1e-6)


def logged_windows(run: Path) -> int:
    """Rows of the log of windows, of which every candidate must have one."""
    from pyarrow import dataset

    logged = dataset.dataset([*map(str, (run / "windows").glob("*.parquet"))]).to_table()
    known = set(logged["window_id"].to_pylist())
    assert set(Finished(run).candidates["window_id"]) <= known
    return logged.num_rows


@pytest.mark.long
@pytest.mark.parametrize(
    ("world", "engine", "names"),
    [
        (2, "ddp", ["recommended"]),
        pytest.param(2, "fsdp", ["weighted", "recommended"], marks=SLOW),
        pytest.param(2, "ddp", [*METHODS], marks=SLOW),
        pytest.param(4, "ddp", ["uniform", "prior", "recommended"], marks=SLOW),
    ],
)
def test_runs_of_one_process(world, engine, names, tmp_path):
    in_processes(world, train_all, tmp_path / "several", names, engine)
    train_all(tmp_path / "one", names, "auto")
    for name in names:
        assert_close_runs(tmp_path / "several" / name, tmp_path / "one" / name)
    rejected = [p for p in Finished(tmp_path / "one" / names[-1]).candidates["accept_prob"] if p < 1]
    assert rejected or "recommended" not in names


@SLOW
def test_one_process_interrupted_and_reading_ahead_equals_an_uninterrupted_one(tmp_path):
    config = tiny(**SHARDS | METHODS["recommended"])
    train(config.override(run_dir=str(tmp_path / "straight")))
    run = prepare(config.override(run_dir=str(tmp_path / "stopped")))
    run.session.probes.append(InterruptAt(2))
    assert not run.session.train().finished
    own = Own(corpus=lambda config, **_: open_corpus(config, read_ahead=True))
    assert resume(tmp_path / "stopped", own=own).finished
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


def two_steps(config: RunConfig, at: int) -> None:
    run = prepare(config)
    run.session.probes.append(InterruptAt(at))
    assert not run.session.train().finished


def go_on(run_dir: Path) -> None:
    assert resume(run_dir).finished


def test_from_two_processes_to_one_to_two(tmp_path):
    config = tiny(**SHARDS | METHODS["recommended"], steps=8)
    run_dir = tmp_path / "moved"
    in_processes(2, two_steps, config.override(run_dir=str(run_dir)), 2)
    run = load_run(run_dir)
    run.session.probes.append(InterruptAt(4))
    assert not run.session.train().finished
    in_processes(2, go_on, run_dir)
    train(config.override(run_dir=str(tmp_path / "one")))
    assert_close_runs(run_dir, tmp_path / "one")


# What each process reads, and what stops all ---------------------------------------------------------------


def reads_its_own(folder: Path) -> None:
    config = tiny(**SHARDS | METHODS["recommended"], run_dir=str(folder / "run"))
    run = prepare(config)
    proposer = run.session.components.proposer
    assert isinstance(proposer, ShardedProposer)
    assert [*proposer.parts] == [2 * parallel.rank(), 2 * parallel.rank() + 1]
    for step in range(2):
        proposer.propose(step)
    stream = run.corpus.stream
    assert isinstance(stream, ShardedStream)
    assert [*stream.shards] == [*proposer.parts]
    # A rank that has missed an update of the policy.
    proposer.version += parallel.rank()
    with pytest.raises(CurriqError, match=r"step 0 stopped: .*different versions of the policy \(shard"):
        run.session.train()


def a_source_breaks(folder: Path) -> None:
    path = folder / "broken.jsonl"
    if parallel.rank() == 0:
        rows = [json.dumps({"text": "a fine sentence of some words " * 20 + str(i)}) for i in range(400)]
        rows[300:] = ['{"text": 3}' if i % 4 == 3 else row for i, row in enumerate(rows[300:], 300)]
        path.write_text("\n".join(rows) + "\n")
    parallel.barrier()
    sources = (SourceConfig(name="prose", path="embedded:prose"), SourceConfig(name="bad", path=str(path)))
    config = tiny(**SHARDS, sources=sources, selector="uniform", steps=400, run_dir=str(folder / "run"))
    with pytest.raises(CurriqError, match=r"broken\.jsonl"):  # on the rank without the row too
        train(config)
    os._exit(0)


def test_processes_read_their_own_and_stop_together(tmp_path):
    in_processes(2, reads_its_own, tmp_path)


def test_a_source_that_breaks_on_one_process_stops_all_with_its_message(tmp_path):
    in_processes(2, a_source_breaks, tmp_path)
