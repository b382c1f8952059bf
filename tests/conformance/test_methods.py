"""Builders return methods: parts that belong together, whatever else has been built, in whatever order."""

import dataclasses
from typing import Any

import pytest
import torch
from tests.conformance.compositions import RAG, RECOMMENDED
from tests.helpers import random_offer
from tests.runs import Finished, tiny

from curriq import langevin
from curriq.presets import own_settings
from curriq.rng import Generators
from curriq.runlog.read import read_metrics
from curriq.select.base import Context, Method
from curriq.select.stream_filter import FilteredStream, StreamFilter
from curriq.train.build import build_method
from curriq.train.run import Run, prepare, train
from curriq.types import Features, Offer

FILTERED: dict[str, Any] = RECOMMENDED | {"q_features": ("source",), "reward_every": 1, "prior": False}
"""What Q alone makes of the stream."""
METHODS: dict[str, dict[str, Any]] = {
    "recommended": RECOMMENDED,
    "recommended on sources": FILTERED,
    "filter": {"selector": "filter", "max_read_ratio": 4},
    "weights by the prior": {"selector": "soft-q", "prior": True},
    "soft-q": {"selector": "soft-q"},
    "jittered": {"selector": "soft-q", "dirichlet_concentration": 2.0},
    "uniform": {"selector": "uniform"},
    "random-k": {"selector": "random-k"},
    "competence": {"selector": "competence"},
    "bandit": {"selector": "bandit"},
    "langevin": RAG | {"proposer": "langevin"},
    "uniform-buffer": RAG | {"proposer": "uniform-buffer", "selector": "uniform"},
}
WITHOUT_Q = ("filter", "uniform", "random-k", "competence", "bandit", "uniform-buffer")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return prepare(tiny(run_dir=str(tmp_path_factory.mktemp("run"))))


@pytest.fixture
def context(run):
    """The run's text and model, with generators of its own; the stream is put back afterwards."""
    beginning = run.corpus.stream.state_dict()
    yield Context(corpus=run.corpus, lm=run.lm, generators=Generators(5))
    run.corpus.stream.load_state_dict(beginning)


def build(name: str, context: Context) -> Method:
    return build_method(tiny(**METHODS[name]), context)


def play(method: Method, context: Context) -> list[list]:
    """What a method does in its first steps, on a model that does not learn."""
    beginning = context.corpus.stream.state_dict()
    done = []
    for k in range(3):
        offer = method.proposer.propose(k)
        admitted = method.selector.admit(k, offer)
        scores = method.selector.score(k, admitted, measured(admitted, context.lm.width))
        done.append([offer.windows.ids.tolist(), admitted.rows.tolist(), scores.tolist(), offer.cost])
    context.corpus.stream.load_state_dict(beginning)
    return done


def measured(offer: Offer, width: int) -> Features:
    hidden = torch.randn(len(offer), width, generator=torch.Generator().manual_seed(0))
    loss = 3 + offer.windows.ids % 7 / 7
    return Features(
        hidden=hidden, loss=loss, pooled=hidden, source=offer.windows.source, known=dict(offer.known)
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_not_depend_on_what_was_built_before_it(name, run, context):
    alone = play(build(name, context), context)
    again = Context(corpus=run.corpus, lm=run.lm, generators=Generators(5))
    others = [build(other, again) for other in WITHOUT_Q if other != name]
    method = build(name, again)
    assert play(method, again) == alone
    mine = [method.proposer, method.selector, method.critic]
    assert not {id(part) for part in mine} & {id(part) for o in others for part in vars(o).values()}


@pytest.mark.parametrize("name", ["recommended", "recommended on sources"])
def test_the_filter_of_the_stream_is_the_selector(name, context):
    """It must be told what the probes found, or it would never reject anything."""
    method = build(name, context)
    assert isinstance(method.proposer, FilteredStream)
    assert isinstance(method.selector, StreamFilter)
    columns = dict.fromkeys(("static_score", "prior"), torch.full((4,), 0.5))
    offer = dataclasses.replace(random_offer(4, 8, seed=0), known=columns)
    assert torch.equal(method.proposer.accept_prob(offer), method.selector.accept_prob(offer))
    del method.selector.trust
    with pytest.raises(AttributeError, match="trust"):  # it is this very object that is asked
        method.proposer.accept_prob(offer)
    assert method.selector.critic is method.critic
    assert method.selector.temperature is method.critic.temperature


def test_preset_prior_is_what_recommended_chooses_while_its_gate_is_shut(tmp_path):
    for name in ("prior", "recommended"):
        train(tiny(**own_settings(name), run_dir=str(tmp_path / name)))
    ours, prior = Finished(tmp_path / "recommended"), Finished(tmp_path / "prior")
    assert not any(row.get("gate/confidence") for row in ours.rows)
    assert len(prior.candidates["row"]) > 6 * 8  # it rejected some
    assert ours.candidates | {"q": None} == prior.candidates | {"q": None}
    assert ours.weights == prior.weights


def test_the_recommended_preset_on_sources_alone_selects(tmp_path):
    """Statement order once decided this: the run reached its end and had accepted every window."""
    train(tiny(**FILTERED, steps=20, run_dir=str(tmp_path)))
    rows, table = read_metrics(tmp_path), Finished(tmp_path).candidates
    n = tiny().train.num_candidates
    opened = next(k for k, row in enumerate(rows) if row.get("gate/confidence", 0) > 0)
    for row in rows[: opened + 1]:
        assert row["data/windows_read"] == n  # accepts everything until the step after
    rejected = [step for step, row in zip(table["step"], table["row"], strict=True) if row >= n]
    assert rejected
    assert min(rejected) > opened
    assert rows[-1]["x/windows_read"] == 20 * n + len(rejected)
    assert min(table["accept_prob"]) < 1
    assert all(table["accept_prob"][i] == 1 for i, step in enumerate(table["step"]) if step <= opened)


def test_a_proposer_of_retrieved_windows_keeps_the_method_that_it_serves(context):
    method = build("soft-q", context)
    before = dict(vars(method))
    retrieving = langevin.build(method, tiny(**METHODS["langevin"]), context)
    assert vars(method) == before
    assert retrieving.selector is method.selector
    assert retrieving.critic is method.critic
    assert retrieving.proposer is not method.proposer


@pytest.mark.parametrize("kind", [Context, Method])
def test_what_builders_get_and_return_is_frozen(kind, context):
    made = context if kind is Context else build("uniform", context)
    assert isinstance(made, kind)
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)
