"""The windows of a step proposed while the one before is computed: the same run, to the bit."""

from dataclasses import replace
from typing import Any

import pytest
from tests.runs import Finished, InterruptAt, tiny

from curriq.data.corpus import open_corpus
from curriq.data.prefetch import Prefetched
from curriq.data.shards import ShardedStream
from curriq.errors import CurriqError
from curriq.presets import own_settings
from curriq.select.base import StreamProposer
from curriq.train.run import Own, load_run, prepare
from curriq.types import Offer

FILTER = {
    "max_read_ratio": 4,
    "credit": "counterfactual",
    "q_features": ("source", "static_score"),
    "temperature": "fraction",
    "reward_every": 3,
}
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"selector": "uniform"},
    "two passes": {"train_on": "action"},
    "weighted": own_settings("weighted") | {"reward_every": 4, "probe_windows": 4},
    "static filter": {"selector": "filter", "max_read_ratio": 4},
    "stream filter": FILTER,
    "shut filter": FILTER | {"temperature": "gated"},
    "in shards": FILTER | {"stream_shards": 2},
}
EARLY = {"uniform": 7, "stream filter": 2, "shut filter": 4}
"""Steps of eight whose windows are proposed early: all but the first; of a filter not those after a
measurement, and where Q has a say not those after the step that learns from it."""


def make_early(session) -> None:
    """As on a GPU."""
    session.components = replace(session.components, proposes_early=True)


def finished(run, *, foresees: bool) -> tuple[Finished, int]:
    """The run at its end, and how many of its steps were proposed early."""
    session, early = run.session, 0
    if foresees:
        make_early(session)

    class Counting:
        def measure(self, step):
            nonlocal early
            early += session.state.early is not None
            return {}

    session.probes.append(Counting())
    assert session.train().finished
    return Finished(session.run_dir), early


def assert_same_run(ours: Finished, theirs: Finished) -> None:
    assert ours.candidates == theirs.candidates
    assert ours.weights == theirs.weights
    assert ours.summary["test_loss"] == theirs.summary["test_loss"]
    assert ours.rows == theirs.rows


@pytest.mark.parametrize("name", METHODS)
def test_the_run_is_the_same_to_the_bit(name, tmp_path):
    config = tiny(**METHODS[name], steps=8, checkpoint_every=100)
    runs = [
        finished(prepare(config.override(run_dir=str(tmp_path / str(way)))), foresees=way)
        for way in (True, False)
    ]
    assert_same_run(runs[0][0], runs[1][0])
    assert runs[1][1] == 0
    assert runs[0][1] == EARLY.get(name, runs[0][1]) > 0


def test_a_step_is_recorded_while_the_next_one_is_computed(tmp_path, monkeypatch):
    """Before that one's update, so that what it reads of the session is what the step has left; at once where
    θ is to be read as it is, or nothing follows."""
    runs = {}
    for way in (True, False):
        run = prepare(tiny(**FILTER, steps=8, eval_every=4, run_dir=str(tmp_path / str(way))))
        if way:
            make_early(run.session)
        happened: list[str] = []
        note(monkeypatch, run.session.components.learner, "accumulate", "passes", happened)
        note(monkeypatch, run.session.components.learner, "update", "update", happened)
        note(monkeypatch, run.session.meter, "measure", "record", happened)
        assert run.session.train().finished
        runs[way] = Finished(run.session.run_dir), happened
    assert_same_run(runs[True][0], runs[False][0])
    assert runs[False][1] == ["passes", "update", "record"] * 8
    late = ["passes", "record", "update"]  # the record of the step before
    assert runs[True][1] == 2 * ["passes", "update", *late, *late, *late, "record"]


def note(monkeypatch, part, method: str, name: str, happened: list[str]) -> None:
    """Write down when a method of some object is called."""
    work = getattr(part, method)

    def noted(*arguments):
        happened.append(name)
        return work(*arguments)

    monkeypatch.setattr(part, method, noted)


def test_checkpoints_and_a_stop_are_between_steps(tmp_path):
    """A step whose windows are there already is taken before the run stops; none are before a checkpoint."""
    config = tiny(**FILTER, steps=12, checkpoint_every=5)
    plain, _ = finished(prepare(config.override(run_dir=str(tmp_path / "plain"))), foresees=False)
    own = Own(corpus=lambda config, **_: open_corpus(config, read_ahead=True))
    run = prepare(config.override(run_dir=str(tmp_path / "cut")), own=own)
    assert isinstance(run.corpus.stream, Prefetched)
    make_early(run.session)
    run.session.probes.append(InterruptAt(5))
    assert not run.session.train().finished
    assert run.session.state.early is None
    assert run.session.state.step == 7, "step 6 had been proposed in step 5"
    ours, early = finished(load_run(tmp_path / "cut"), foresees=True)
    assert early > 0
    assert_same_run(ours, plain)


def test_an_error_belongs_to_the_step_that_it_prevents(tmp_path, monkeypatch):
    """The step during which it is found is taken and logged."""
    inner = StreamProposer.propose

    def propose(self, step: int) -> Offer:
        if step == 3:
            raise CurriqError("line 51 is broken")
        return inner(self, step)

    monkeypatch.setattr(StreamProposer, "propose", propose)
    run = prepare(tiny(selector="uniform", steps=8, run_dir=str(tmp_path / "run")))
    make_early(run.session)
    with pytest.raises(CurriqError, match="line 51 is broken"):
        run.session.train()
    assert run.session.state.step == 3
    assert [row["step"] for row in Finished(tmp_path / "run").rows] == [0, 1, 2]


def test_a_proposer_of_ones_own_is_asked_in_its_turn(tmp_path):
    """It may read what the step changes."""
    run = prepare(tiny(selector="uniform", steps=3, run_dir=str(tmp_path / "run")))
    session, asked = run.session, []
    inner = session.components.proposer

    class Mine:
        def propose(self, step: int) -> Offer:
            asked.append((step, session.state.step))
            return inner.propose(step)

        state_dict, load_state_dict = inner.state_dict, inner.load_state_dict

    object.__setattr__(session.components, "proposer", Mine())
    finished(run, foresees=True)
    assert asked == [(k, k) for k in range(3)]


@pytest.mark.parametrize(("shards", "cores", "processes"), [(4, 9, 4), (4, 3, 2), (1, 8, 1)])
def test_shards_share_processes_where_there_are_fewer_cores(shards, cores, processes, monkeypatch):
    """The windows are the same, and so is what a checkpoint holds."""
    monkeypatch.setattr("curriq.parallel.cores", lambda: cores)
    config = tiny(stream_shards=shards, shuffle_buffer=32)
    plain, ahead = (open_corpus(config, read_ahead=way).stream for way in (False, True))
    for n in (8, 24, 40):
        ours, theirs = ahead.read(n), plain.read(n)
        assert ours.windows.ids.tolist() == theirs.windows.ids.tolist()
    parts = list(ahead.shards.values()) if isinstance(ahead, ShardedStream) else [ahead]
    workers = {part._worker._blocks._workers[0].pid for part in parts}
    assert len(workers) == processes
    state = ahead.state_dict()
    expected = [plain.read(8) for _ in range(4)]
    plain.load_state_dict(state)
    for offer in expected:
        assert plain.read(8).windows.ids.tolist() == offer.windows.ids.tolist()
    ahead.load_state_dict(state)
    for offer in expected:
        assert ahead.read(8).windows.ids.tolist() == offer.windows.ids.tolist()
