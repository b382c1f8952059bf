"""Costs are values that add up: over the readings of a step, over its parts, and over the steps of a run."""

from dataclasses import replace

import pytest
import torch
from tests.helpers import finished_step, random_offer, tiny_lm

from curriq.config import CriticConfig
from curriq.lm.learner import ReforwardedAction
from curriq.rng import Generators
from curriq.softq.critic import QInputs, TDCritic
from curriq.softq.signal import CreditSignal
from curriq.softq.temperature import FixedBeta
from curriq.train.meter import Meter
from curriq.types import NO_COST, Cost, Features, Offer, Step

READ, COMPUTED = Cost(windows_read=3, forwards=5), Cost(forwards=7, extra_flops=11)


def offer_that_cost(cost: Cost, n: int = 2, seed: int = 0) -> Offer:
    return Offer.of(random_offer(n, seed=seed).windows, cost=cost)


def test_costs_add_up_field_by_field():
    assert READ + COMPUTED == COMPUTED + READ == Cost(windows_read=3, forwards=12, extra_flops=11)
    assert READ + NO_COST == READ
    assert COMPUTED * 3 == COMPUTED + COMPUTED + COMPUTED
    assert COMPUTED * 0 == NO_COST
    assert sum([READ, COMPUTED, READ], NO_COST) == Cost(windows_read=6, forwards=17, extra_flops=11)


def test_several_readings_cost_what_each_of_them_did():
    parts = [offer_that_cost(cost, seed=seed) for seed, cost in enumerate((READ, COMPUTED, READ))]
    joined = Offer.cat(parts)
    assert joined.cost == READ + COMPUTED + READ
    assert joined.windows.ids.tolist() == [0, 1, 1000, 1001, 2000, 2001]
    assert joined.rows.tolist() == list(range(6))
    assert Offer.cat([joined, parts[0]]).cost == joined.cost + READ


def test_a_part_of_an_offer_has_still_been_read_with_the_rest():
    assert offer_that_cost(READ).take(slice(1)).cost == READ


FORWARD = 1000


def meter(**options) -> Meter:
    return Meter(("a", "b", "c"), window=8, forward_flops=FORWARD, signal=CreditSignal(), **options)


def step(cost: Cost, n: int = 4, trained: int | None = None, rejected: int = 0) -> Step:
    """A step that was offered n windows, of which the selector admitted some."""
    offer = random_offer(n)
    if rejected:
        offer = Offer.of(offer.windows, rejected=random_offer(rejected, seed=1))
    admitted = offer.take(slice(trained))
    features = Features(hidden=torch.zeros(len(admitted), 2), loss=torch.ones(len(admitted)))
    values = vars(finished_step(features, offer=admitted))
    return Step(**(values | {"offer": offer, "cost": cost}))


def test_the_meter_adds_up_what_was_read_and_computed():
    """By hand: a window that is trained on takes a forward and a backward pass, which counts as two."""
    counting = meter()
    first = counting.measure(step(Cost(windows_read=600)), 1.0)
    second = counting.measure(step(READ + COMPUTED), 1.0)
    assert [row["x/windows_read"] for row in (first, second)] == [600, 603]
    assert [row["x/flops"] for row in (first, second)] == [
        3 * 4 * FORWARD,
        2 * 3 * 4 * FORWARD + (5 + 7) * FORWARD + 11,
    ]
    assert second["x/windows_proposed"] == 8


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 3 * 2),  # forward and backward of what is admitted
        ({"passes": 2}, 2 + 3 * 2),  # scored first, then forwarded again
        ({"passes": 2, "trains": 1}, 2 + 3 * 1),
        ({"trains": 1}, 2 + 2 * 1),
    ],
)
def test_only_admitted_windows_are_forwarded(options, passes):
    counting = meter(cost_per_window=Cost(forwards=1, extra_flops=10), **options)
    row = counting.measure(step(Cost(windows_read=9), trained=2, rejected=5), 1.0)
    assert row["x/flops"] == (passes + 2 * 1) * FORWARD + 2 * 10
    assert row["x/windows_read"] == 9
    assert row["x/windows_trained"] == min(2, options.get("trains", 2))


def test_rejected_windows_were_offered_too():
    shares = [v for k, v in meter().measure(step(NO_COST, n=1, rejected=7), 1.0).items() if "offered" in k]
    sources = torch.cat([random_offer(1).windows.source, random_offer(7, seed=1).windows.source])
    assert shares == pytest.approx((torch.bincount(sources, minlength=3) / 8).tolist())


def test_what_a_buffer_read_was_offered_whenever_it_is_retrieved():
    """Five windows of b and one of c fill the buffer, one of a follows; others are retrieved."""
    counting = meter()
    shares = []
    for ingested in ([1, 1, 1, 1, 1, 2], [0], []):
        plain = step(Cost(windows_read=len(ingested)))
        offer = replace(plain.offer, ingested=torch.tensor(ingested, dtype=torch.long))
        row = counting.measure(replace(plain, offer=offer), 1.0)
        shares.append([row.get(f"select/offered_share/{name}") for name in "abc"])
    assert shares == [[0, 5 / 6, 1 / 6], [1, 0, 0], [None] * 3]
    assert counting.shares()["read"] == pytest.approx({"a": 1 / 7, "b": 5 / 7, "c": 1 / 7})


def test_shares_of_a_run_are_of_windows_and_not_means_over_steps():
    """A filter that reads 8 windows in one step and 2 in another has read 10."""
    counting, sources = meter(), []
    for rejected in (6, 0):
        sources.append(random_offer(2).windows.source)
        if rejected:
            sources.append(random_offer(rejected, seed=1).windows.source)
        counting.measure(step(NO_COST, n=2, rejected=rejected), 1.0)
    expected = torch.bincount(torch.cat(sources), minlength=3) / 10
    assert list(counting.shares()["read"].values()) == pytest.approx(expected.tolist())


def test_a_resumed_meter_counts_on():
    one, other = meter(), meter()
    one.measure(step(READ), 1.0)
    other.load_state_dict(one.state_dict())
    assert other.measure(step(COMPUTED), 1.0) == one.measure(step(COMPUTED), 1.0)
    assert other.windows_read == 3


def test_a_td_update_costs_what_it_was_built_with_and_nothing_where_there_is_none():
    cost = Cost(extra_flops=42)
    lm = tiny_lm()
    inputs, forwarded = QInputs(("last",), lm.width), ReforwardedAction(lm, cost)
    critic = TDCritic(CriticConfig(), inputs, FixedBeta(1.0), "cpu", Generators(0), forwarded)
    features = Features(hidden=torch.ones(3, lm.width), loss=torch.ones(3))
    assert critic.learn(None, features)[1] == NO_COST
    assert critic.learn(finished_step(features, reward=None), features)[1] == NO_COST
    assert critic.learn(finished_step(features, reward=-1.0), features)[1] == cost
