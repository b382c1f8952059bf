"""Algorithm 2's proposer: fresh windows, what is found, what is retired, what is said and what is kept."""

import logging
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from tests.conformance.compositions import RAG
from tests.runs import tiny
from tests.steps import finished_step

from curriq.data.stream import Unreadable
from curriq.errors import CurriqError
from curriq.langevin.proposer import FILL_BATCH, FreshWindows
from curriq.langevin.samplers import SearchAlarm, distinct_share, jaccard, mean_pairwise, search_metrics
from curriq.runlog.read import read_metrics, read_queries
from curriq.runlog.writers import Entry, Parts, QueryLog
from curriq.train.record import log_entry
from curriq.train.run import prepare, train
from curriq.types import Cost, Offer, Queries, Windows

LANGEVIN: dict[str, Any] = {"proposer": "langevin"} | RAG


def proposer(tmp_path, **overrides: Any):
    return prepare(tiny(**(LANGEVIN | {"run_dir": str(tmp_path)} | overrides))).session.components.proposer


class CountingStream:
    """Windows 0, 1, 2, …, except that every fifth is window 0 again."""

    def __init__(self) -> None:
        self.position = 0

    def read(self, n: int) -> Offer:
        ids = torch.arange(self.position, self.position + n)
        ids[ids % 5 == 0] = 0
        self.position += n
        windows = Windows(tokens=ids[:, None].repeat(1, 3), ids=ids, source=torch.zeros_like(ids))
        return Offer.of(windows, cost=Cost(windows_read=n), epoch=0)

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


class Recorder:
    """An encoder that remembers what it was asked, and whose result depends on the whole batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, tokens) -> np.ndarray:
        self.batches.append(tokens[:, 0].tolist())
        return np.array([[first, len(tokens)] for first in self.batches[-1]], np.float32)


def fresh(encode, ahead: bool, known=lambda ids: {}) -> FreshWindows:
    return FreshWindows(stream=Unreadable(CountingStream()), count=4, encode=encode, known=known, ahead=ahead)


def test_encoding_ahead_changes_no_number() -> None:
    results = []
    for ahead in (False, True):
        recorder, read = Recorder(), []
        windows = fresh(recorder, ahead)
        read += [piece.vectors for piece in windows.fill(6)]
        for _ in range(4):
            windows.begin_next()
            offer, vectors, _ = windows.next()
            read.append(vectors)
            assert vectors[:, 0].tolist() == offer.windows.ids.tolist()
            assert (offer.cost, offer.epoch) == (Cost(windows_read=4), 0)
        results.append((read, recorder.batches))
    assert all(np.array_equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert results[0][1] == results[1][1]


def test_known_and_repeated_windows_are_encoded_once() -> None:
    recorder = Recorder()
    kept = np.array([9.0, 9.0], np.float32)
    ((_, vectors, encoded),) = fresh(recorder, False, lambda ids: {3: kept}).fill(6)
    assert encoded == 4
    assert recorder.batches == [[0, 1, 2, 4]]  # 5 is window 0 again
    assert vectors[3].tolist() == kept.tolist()
    assert vectors[5].tolist() == vectors[0].tolist()


@pytest.mark.parametrize(("ahead", "then"), [(True, True), (True, False), (False, True), (False, False)])
def test_pending_windows_survive_a_resume(ahead: bool, then: bool) -> None:
    whole = fresh(Recorder(), ahead)
    list(whole.fill(3))
    whole.begin_next()
    state = whole.state_dict()
    resumed = fresh(Recorder(), then)
    resumed.load_state_dict(state)
    for _ in range(3):
        (ours, our_vectors, _), (theirs, their_vectors, _) = resumed.next(), whole.next()
        assert torch.equal(ours.windows.ids, theirs.windows.ids)
        assert ours.cost == theirs.cost
        assert np.array_equal(our_vectors, their_vectors)
        whole.begin_next()
        resumed.begin_next()


@pytest.mark.parametrize("kind", ["langevin", "random-queries", "direct-q", "uniform-buffer"])
def test_no_window_is_proposed_twice_and_every_one_is_real(kind: str, tmp_path) -> None:
    rag = proposer(tmp_path, proposer=kind, direct_pool=20)
    seen: set[int] = set()
    for step in range(5):
        offer = rag.propose(step)
        ids = offer.windows.ids.tolist()
        assert len(set(ids)) == len(ids) == 8
        assert offer.rows.tolist() == list(range(8))
        assert not seen & set(ids)
        seen |= set(ids)
        live = rag.buffer.window_ids(rag.buffer.live.nonzero().flatten())
        assert not torch.isin(live, offer.windows.ids).any()


def test_dropped_duplicates_propose_fewer_windows(tmp_path) -> None:
    rag = proposer(tmp_path, retrieval_duplicates="drop", retrieval_top_k=1, chains=20)
    offer = rag.propose(0)
    collisions = offer.metrics["retrieval/collisions"]
    assert len(offer) == round(20 * (1 - collisions))
    assert (offer.queries.row >= 0).sum() == len(offer)


def test_direct_q_takes_the_best_of_the_whole_buffer(tmp_path) -> None:
    run = prepare(tiny(**(LANGEVIN | {"proposer": "direct-q", "direct_pool": 0, "run_dir": str(tmp_path)})))
    rag, critic = run.session.components.proposer, run.session.components.critic
    offer = rag.propose(0)
    everything = rag.buffer.take(torch.arange(len(rag.buffer)))
    with run.lm.measuring():
        q = {
            int(i): critic.online(run.lm.trunk(t[None])[:, -1]).item()
            for i, t in zip(everything.ids, everything.tokens, strict=True)
        }
    best = sorted(q, key=lambda window: -q[window])[:8]
    assert set(offer.windows.ids.tolist()) == set(best)


def test_queries_name_the_candidate_that_they_drew(tmp_path) -> None:
    run = prepare(tiny(**(LANGEVIN | {"run_dir": str(tmp_path)})))
    offer = run.session.components.proposer.propose(0)
    queries = offer.queries
    assert sorted(queries.row.tolist()) == list(range(8))
    for row, text in zip(queries.row.tolist(), queries.window_text, strict=True):
        assert text == run.corpus.tokenizer.decode(offer.windows.tokens[row].tolist())
    # Nearest first, and what was drawn is in its own query's list with its own score.
    assert (queries.shortlist_scores.diff(dim=1) <= 0).all()
    place = (queries.shortlist == offer.windows.ids[queries.row][:, None]).nonzero()
    assert place[:, 0].tolist() == list(range(8))
    assert torch.equal(queries.shortlist_scores[place[:, 0], place[:, 1]], queries.score)


def test_a_shortlist_ends_where_the_buffer_does(tmp_path) -> None:
    rag = proposer(tmp_path, buffer_size=10, ingest=10, retrieval_top_k=16)
    queries = rag.propose(0).queries
    assert queries.shortlist.shape == (8, 16)
    assert (queries.shortlist[:, 10:] == -1).all()
    assert (queries.shortlist_scores[:, 10:] == -torch.inf).all()
    assert (queries.shortlist[:, :10] >= 0).all()


HIDDEN: dict[str, Any] = {"encoder": "hidden-state", "q_features": ("mean",), "q_layer_norm": True}


def test_hidden_state_encoder_is_what_the_critic_reads(tmp_path) -> None:
    """Each string by itself, whatever is encoded beside it, and the unit vector of Q's own input."""
    run = prepare(tiny(**(LANGEVIN | HIDDEN | {"run_dir": str(tmp_path)})))
    rag = run.session.components.proposer
    rag.propose(0)
    windows = rag.buffer.take(torch.arange(20))
    for tokens, vector in zip(windows.tokens, rag.buffer.vectors(torch.arange(20)), strict=True):
        with run.lm.measuring():
            pooled = run.lm.trunk(tokens[None]).mean(1)[0]
        centred = pooled - pooled.mean()
        torch.testing.assert_close(vector, centred / centred.norm(), rtol=1e-3, atol=1e-5)


def test_refreshed_rows_are_those_of_the_present_model(tmp_path) -> None:
    """θ moves; after one turn of the refresher every live row is what the encoder says now."""
    run = prepare(tiny(**(LANGEVIN | HIDDEN | {"refresh": 16, "run_dir": str(tmp_path)})))
    rag = run.session.components.proposer
    assert rag.propose(0).metrics["buffer/refresh_cosine"] == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        for parameter in run.lm.parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    steps = [rag.propose(step).metrics["buffer/refresh_cosine"] for step in (1, 2, 3)]
    assert min(steps) < 0.999
    slots = rag.buffer.live.nonzero().flatten()
    expected = rag.fresh.encode(rag.buffer.take(slots).tokens)
    torch.testing.assert_close(rag.buffer.vectors(slots), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    scores, _ = rag.buffer.search(expected, 1)
    torch.testing.assert_close(scores[:, 0], torch.ones(len(slots)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["direct-q", "uniform-buffer"])
def test_controls_without_a_query_embed_nothing(kind: str, tmp_path) -> None:
    """The encoder named is not even loaded."""
    rag = proposer(tmp_path, proposer=kind, encoder="sentence-transformers/all-MiniLM-L6-v2")
    rag.propose(0)
    assert rag.buffer.vectors(torch.arange(48)).shape == (48, 1)


def test_search_costs_are_counted(tmp_path) -> None:
    assert proposer(tmp_path, proposer="uniform-buffer").propose(0).cost.extra_flops == 0
    one, two = (proposer(tmp_path, langevin_steps=steps).propose(0).cost.extra_flops for steps in (3, 6))
    assert two == 2 * one > 0


@pytest.mark.parametrize("ahead", [False, True])
def test_every_window_that_goes_into_the_buffer_is_counted(ahead: bool, tmp_path) -> None:
    """Also those that fill it before the first step, in several pieces."""
    size = FILL_BATCH + 44
    train(
        tiny(
            run_dir=str(tmp_path), steps=3, proposer="random-queries", encoder="hashing", buffer_size=size,
            ingest=8, query_tokens=5, encode_ahead=ahead,
        )
    )  # fmt: skip
    rows = read_metrics(tmp_path)
    assert [row["data/windows_read"] for row in rows] == [size, 8, 8]
    assert [row["x/windows_read"] for row in rows] == [size, size + 8, size + 16]


@pytest.mark.parametrize("ahead", [False, True])
def test_offered_is_what_left_the_stream(ahead: bool, tmp_path) -> None:
    """Counted at the stream itself: every window that it gave out and did not take back, by source."""
    given: dict[int, int] = {}

    class Counted:
        def __init__(self, stream) -> None:
            self._stream = stream

        def read(self, n: int) -> Offer:
            offer = self._stream.read(n)
            for source in offer.windows.source.tolist():
                given[source] = given.get(source, 0) + 1
            return offer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

    settings = {"steps": 3, "proposer": "random-queries", "encoder": "hashing", "query_tokens": 5}
    buffer = {"buffer_size": FILL_BATCH + 44, "ingest": 8, "encode_ahead": ahead, "run_dir": str(tmp_path)}
    run = prepare(tiny(**settings, **buffer))
    fresh = run.session.components.proposer.fresh
    fresh.stream = Unreadable(Counted(fresh.stream._stream))
    summary = run.session.train().summary
    ahead_of_the_last = 8 if ahead else 0  # read, encoded and unread again
    assert (
        sum(given.values())
        == summary["windows_read"] + ahead_of_the_last
        == FILL_BATCH + 60 + ahead_of_the_last
    )
    if not ahead:
        shares = {run.corpus.source_names[source]: n / sum(given.values()) for source, n in given.items()}
        assert {name: share for name, share in summary["offered_share"].items() if share} == pytest.approx(
            shares
        )


def test_warm_up_draws_from_the_buffer_and_does_not_search(tmp_path) -> None:
    rag = proposer(tmp_path, proposer="langevin", q_warmup_steps=2)
    offers = [rag.propose(step) for step in range(3)]
    assert [offer.queries is None for offer in offers] == [True, True, False]
    assert ["time/search" in offer.metrics for offer in offers] == [False, False, True]
    assert [offer.cost.extra_flops > 0 for offer in offers] == [False, False, True]
    assert all(len(offer) == rag.phase(0).count for offer in offers[:2])
    orders = [offer.windows.ids.tolist() for offer in offers[:2]]
    assert not set(orders[0]) & set(orders[1])  # drawn at random, and marked used


FILTERED: dict[str, Any] = {"prior": True, "max_read_ratio": 4, "q_weighting": False}


def test_only_what_the_prior_accepts_comes_into_the_buffer(tmp_path) -> None:
    """The filter's own draws, in the stream's order; everything that it read is counted and offered."""
    static = {"selector": "filter", "max_read_ratio": 4, "static_share": 0.3, "static_rule": "share"}
    buffered = proposer(tmp_path / "a", **static, proposer="uniform-buffer")
    streamed = proposer(tmp_path / "b", **static, proposer="stream", num_candidates=48)
    ours, theirs = buffered.propose(0), streamed.propose(0)
    assert buffered.buffer.window_ids(torch.arange(48)).tolist()[:36] == theirs.windows.ids.tolist()[:36]
    assert ours.cost.windows_read == len(ours.ingested) > 2 * 60
    assert ours.cost.windows_read - 60 <= 3 * 60  # at most four are read for one that comes in


def test_the_prior_of_a_search_is_not_a_weight_too(tmp_path) -> None:
    run = prepare(tiny(**(LANGEVIN | FILTERED | {"q_weighting": True, "run_dir": str(tmp_path)})))
    assert not run.session.components.critic.weighs_by_prior
    run.session.train()
    rows = read_metrics(tmp_path)
    assert all(row["data/windows_read"] > 12 for row in rows)


def test_queries_are_reused_until_the_next_search(tmp_path) -> None:
    rag = proposer(tmp_path, search_every=3)
    offers = [rag.propose(step) for step in range(7)]
    assert ["time/search" in offer.metrics for offer in offers] == [k % 3 == 0 for k in range(7)]
    texts = [offer.queries.text for offer in offers]
    assert texts[0] == texts[1] == texts[2] != texts[3] == texts[5] != texts[6]
    assert [offer.cost.extra_flops > 0 for offer in offers] == [k % 3 == 0 for k in range(7)]
    ids = [i for offer in offers for i in offer.windows.ids.tolist()]
    assert len(set(ids)) == len(ids)


def test_rows_are_embedded_again_only_as_fast_as_they_move(tmp_path) -> None:
    settings = HIDDEN | {"refresh": 32, "refresh_below": 0.99, "ingest": 1, "mark_used": False}
    run = prepare(tiny(**(LANGEVIN | settings | {"run_dir": str(tmp_path)})))
    rag = run.session.components.proposer

    def refreshed(step: int) -> float:
        return rag.propose(step).metrics["buffer/refreshed"]

    still = [refreshed(step) for step in range(5)]
    assert still[1] > still[2] > still[3] > still[4]  # θ stands still
    with torch.no_grad():
        for parameter in run.lm.parameters:
            parameter.add_(0.5 * torch.randn_like(parameter))
    moving = [refreshed(step) for step in range(5, 8)]
    assert moving[0] < moving[1] < moving[2]


def test_held_out_windows_as_queries(tmp_path) -> None:
    run = prepare(tiny(**(LANGEVIN | HIDDEN | {"proposer": "reward-queries", "run_dir": str(tmp_path)})))
    queries = run.session.components.proposer.propose(0).queries
    held_out = {run.corpus.tokenizer.decode(t.tolist()) for t in run.corpus.held_out.reward.tokens}
    assert set(queries.text) <= held_out


def test_chains_begin_at_the_best_of_the_pool(tmp_path) -> None:
    settings = {"query_start": "best", "direct_pool": 0, "langevin_step_size": 1e-9, "langevin_steps": 1}
    run = prepare(tiny(**(LANGEVIN | settings | {"langevin_noise_scale": 0.0, "run_dir": str(tmp_path)})))
    rag = run.session.components.proposer
    queries = rag.propose(0).queries
    assert queries.changed.max() == 0
    everything = rag.buffer.take(torch.arange(len(rag.buffer))).tokens[:, :5]
    energy = rag.phase(1).search.energy
    assert sorted(queries.start_q.tolist())[0] >= energy.hard(everything).topk(8).values.min() - 1e-6


def test_windows_can_be_retrieved_again_where_the_paper_has_it_so(tmp_path) -> None:
    settings = {"proposer": "uniform-buffer", "buffer_size": 8, "ingest": 1}
    rag = proposer(tmp_path, **settings, mark_used=False)
    first, second = (rag.propose(step).windows.ids.tolist() for step in range(2))
    assert len(first) == len(second) == 8
    assert len(set(first) & set(second)) == 7  # one was overwritten
    assert rag.buffer.live.all()


def test_a_buffer_that_runs_dry_says_what_to_raise(tmp_path) -> None:
    """One fresh window per step, eight used: the second step has one to choose from; then nothing comes."""
    rag = proposer(tmp_path, proposer="uniform-buffer", buffer_size=8, ingest=1)
    assert len(rag.propose(0)) == 8
    assert len(rag.propose(1)) == 1
    rag._ingest = lambda step: ([], 0)
    with pytest.raises(CurriqError, match=r"step 2: every window.*--ingest.*--buffer-size"):
        rag.propose(2)


# Section 3.6 ----------------------------------------------------------------------------------------


def test_diversity_by_hand() -> None:
    tokens = torch.tensor([[1, 2, 3, 3], [3, 4, 5, 6]])
    assert distinct_share(tokens) == pytest.approx((3 / 4 + 1) / 2)
    assert jaccard(tokens)[0, 1].item() == pytest.approx(1 / 6)
    assert mean_pairwise(jaccard(tokens)) == pytest.approx(1 / 6)
    assert mean_pairwise(torch.ones(1, 1)) == 1.0


def test_search_metrics_by_hand() -> None:
    start, tokens = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 9], [8, 9]])
    metrics = search_metrics(
        start, tokens, torch.tensor([0.0, 1.0]), torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0])
    )
    assert metrics["langevin/tokens_changed"] == 0.75
    assert metrics["langevin/hard_q"] == 3.0
    assert metrics["langevin/hard_q_gain"] == 2.5
    assert metrics["langevin/hard_q_sd"] == 1.0
    assert metrics["langevin/hard_q_best"] == 4.0
    assert metrics["langevin/random_q"] == 2.0
    assert metrics["langevin/above_random"] == 1.0
    assert metrics["langevin/above_random_sd"] == pytest.approx(1 / math.sqrt(2))


def test_alarm_names_the_setting_once(caplog) -> None:
    alarm = SearchAlarm(patience=3)
    good = {"langevin/tokens_changed": 0.6, "langevin/above_random": 1.0}
    with caplog.at_level(logging.WARNING, logger="curriq"):
        for _ in range(5):
            alarm.look(good)
        alarm.look(good | {"langevin/tokens_changed": 0.0, "langevin/grad_norm": 0.0})  # Q is flat
        assert not caplog.records
        for _ in range(2):
            alarm.look(good | {"langevin/tokens_changed": 0.04})
        assert [r.getMessage().split(":")[0] for r in caplog.records] == [
            "the search changed 4.0% of the query tokens"
        ]
        assert "--langevin-margin" in caplog.text
        assert "--langevin-step-size" in caplog.text
        for _ in range(5):
            alarm.look(good | {"langevin/above_random": -0.5})
        assert len(caplog.records) == 2
        assert "below that of random strings" in caplog.text
        assert "--langevin-noise-scale" in caplog.text


def test_query_log_round_trip_and_resume(tmp_path) -> None:
    def entry(step: int) -> Entry:
        windows = Windows(
            tokens=torch.zeros(1, 2, dtype=torch.long),
            ids=torch.tensor([70 + step]),
            source=torch.zeros(1, dtype=torch.long),
        )
        queries = Queries(
            text=("a query", "another"),
            q=torch.tensor([0.5, torch.nan]),
            soft_q=torch.tensor([0.625, torch.nan]),
            start_q=torch.tensor([0.25, torch.nan]),
            changed=torch.tensor([1.0, 0.0]),
            row=torch.tensor([0, -1]),
            score=torch.tensor([0.75, torch.nan]),
            window_text=("x" * 999, ""),
            shortlist=torch.tensor([[9, 70 + step], [9, -1]]),
            shortlist_scores=torch.tensor([[1.5, 0.75], [0.5, -torch.inf]]),
        )
        return log_entry(finished_step(step, Offer.of(windows, queries=queries)), {})

    parts = Parts(tmp_path, {})
    log = QueryLog(parts)
    for step in range(2):
        log.append(entry(step))
    log.flush()
    promise = {"parts.jsonl": asdict(parts.flush())}
    log.append(entry(2))
    log.flush()
    log = QueryLog(Parts(tmp_path, promise))  # resumed from step 2: the third is written again
    log.append(entry(2))
    log.flush()
    table = read_queries(tmp_path).to_pylist()
    assert [(row["step"], row["query"]) for row in table] == [(k, i) for k in range(3) for i in range(2)]
    assert table[0] == {
        "step": 0,
        "query": 0,
        "text": "a query",
        "q": 0.5,
        "soft_q": 0.625,
        "start_q": 0.25,
        "changed": 1.0,
        "row": 0,
        "window_id": 70,
        "score": 0.75,
        "window_text": "x" * 300,
        "shortlist": [9, 70],
        "shortlist_scores": [1.5, 0.75],
    }
    assert (table[1]["shortlist"], table[1]["shortlist_scores"]) == ([9], [0.5])
    assert {
        table[1][name] for name in ("q", "soft_q", "start_q", "row", "window_id", "score", "window_text")
    } == {None}


def test_a_run_without_queries_has_no_folder_for_them(tmp_path) -> None:
    QueryLog(Parts(tmp_path, {})).flush()
    assert not (tmp_path / "queries").exists()
    with pytest.raises(CurriqError, match=r"holds no queries.*--proposer"):
        read_queries(tmp_path)
