"""`curriq.Curriculum` in loops of one's own: any model, optimizer and example, and what it must not touch."""

import copy
import math
import random
from functools import partial
from itertools import islice, repeat
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.loops import (
    BATCH,
    Bigram,
    Everything,
    Loop,
    adamw,
    curriculum,
    example,
    plain,
    stream,
    target,
)
from tests.runs import assert_same_state
from torch import nn

import curriq
from curriq.curriculum import MOST_OUTSTANDING, Curriculum
from curriq.errors import CurriqError
from curriq.lm.examples import example_losses, pad_examples
from curriq.rng import Generators
from curriq.select.static import LOOK_AHEAD
from curriq.softq.critic import QNetwork
from curriq.types import Windows


class TestExamples:
    def test_labels_padding_and_length_do_not_matter(self):
        model, examples = Bigram(), [example(random.Random(i), "good") for i in range(6)]
        together = example_losses(model, pad_examples(examples))
        for one, loss in zip(examples, together, strict=True):
            logits = model(torch.tensor([one["input_ids"]])).logits[0, :-1]
            expected = F.cross_entropy(logits, torch.tensor(one["labels"][1:]), ignore_index=-100)
            torch.testing.assert_close(loss, expected)

    def test_without_labels_all_tokens_are_learnt(self):
        batch = pad_examples(
            [{"input_ids": [3, 4]}, {"input_ids": torch.tensor([5, 6, 7]), "labels": None}], 9
        )
        assert batch["input_ids"].tolist() == [[3, 4, 9], [5, 6, 7]]
        assert batch["labels"].tolist() == [[3, 4, -100], [5, 6, 7]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]

    def test_an_example_without_a_learnt_token_has_loss_0(self):
        batch = pad_examples([{"input_ids": [3, 4], "labels": [-100, -100]}, {"input_ids": [3]}])
        assert example_losses(Bigram(), batch).tolist() == [0, 0]

    def test_a_data_loader_takes_what_is_selected(self):
        ours = curriculum(policy=Everything())
        data = list(islice(stream(), 20))
        loader = torch.utils.data.DataLoader(ours.select(data), batch_size=BATCH, collate_fn=pad_examples)
        assert [len(batch["input_ids"]) for batch in loader] == [8, 8, 4]

    def test_they_may_carry_anything_and_keep_it(self):
        ours = curriculum(sources=("all",), policy=Everything())
        selected = list(ours.select([{"input_ids": [2, 3], "text": "two three", "n": i} for i in range(5)]))
        assert [e["n"] for e in selected] == list(range(5))
        assert selected[0]["text"] == "two three"


@pytest.mark.parametrize("preset", ["recommended", "weighted", "paper"])
def test_observe_leaves_everything_as_it_was(preset):
    """Weights, gradients, what needs them, modes of every part, random numbers."""
    model = Bigram(dropout=0.5)
    model.train()
    model.frozen.eval()
    optimizer = adamw(model)

    def noisy_losses(model, batch):
        losses = example_losses(model, batch)
        return losses + 0 * torch.rand(len(losses))

    ours = curriculum(preset=preset, reward_every=1, per_example_loss=noisy_losses)
    examples = list(islice(stream(), BATCH))
    if preset == "recommended":
        taken = ours.select(stream())
    for step in range(4):
        if preset == "recommended":
            examples = list(islice(taken, BATCH))
        batch = pad_examples(examples)
        losses = example_losses(model, batch)
        if preset != "recommended":
            hidden = model(batch["input_ids"]).hidden[:, -1]
            losses = BATCH * losses * ours.weigh(losses, hidden, examples=examples)
        losses.mean().backward()
        optimizer.step()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        kept = {name: None if g is None else g.clone() for name, g in gradients.items()}
        weights = copy.deepcopy(model.state_dict())
        modes = {name: module.training for name, module in model.named_modules()}
        random_state = torch.get_rng_state()
        measured = ours.observe(model, optimizer)
        assert ("reward" in measured) == (step > 0 or preset == "paper")
        assert torch.equal(torch.get_rng_state(), random_state)
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        for name, p in model.named_parameters():
            assert p.grad is gradients[name]
            assert p.grad is None or torch.equal(p.grad, kept[name])
            assert p.requires_grad == (not name.startswith("frozen"))
        optimizer.zero_grad()


def rates(model: Bigram) -> list[dict[str, Any]]:
    """Two groups; what is in none of them is not trained."""
    return [{"params": [model.head.weight], "lr": 1e-3}, {"params": [model.embed.weight], "lr": 1e-2}]


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD([model.embed.weight, model.head.weight], lr=0.1),
    "momentum": lambda model: torch.optim.SGD([model.embed.weight], lr=0.1, momentum=0.9),
    "sgd, two rates": lambda model: torch.optim.SGD(rates(model)),
    "adam": lambda model: torch.optim.Adam([model.embed.weight, model.head.weight], lr=1e-3),
    "adamw, two rates": lambda model: torch.optim.AdamW(rates(model), betas=(0.9, 0.95)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_effects_are_inner_products_of_preconditioned_gradients(name):
    """Σ over what the optimizer trains of rate · ∇ℓ_i · P ∇ℓ_D, against autograd."""
    loop = Loop(curriculum(probe_decay=0, reward_every=3))
    loop.model.double()
    loop.optimizer = OPTIMIZERS[name](loop.model)
    ours = loop.curriculum
    loop.run(stream, 3)
    step, drawn = ours._part._step, ours._part._reward.drawn
    rows = step.effects.rows
    assert 0 < (rows >= len(step.offer)).sum() < len(rows)  # rejected examples are among them
    probed = Windows.cat([part.windows for part in step.offer.judged]).take(rows)

    groups = [(p, g) for g in loop.optimizer.param_groups for p in g["params"]]

    def gradients(examples):
        loss = example_losses(loop.model, pad_examples(examples)).mean()
        return torch.autograd.grad(loss, [p for p, _ in groups])

    direction = []
    for (p, group), g in zip(groups, gradients(ours._model.of(drawn)), strict=True):
        state = loop.optimizer.state[p]
        if "exp_avg_sq" in state:
            beta2 = group["betas"][1]
            second = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
            g = g / ((second / (1 - beta2 ** (state["step"].item() + 1))).sqrt() + group["eps"])
        direction.append(group["lr"] * g)
    for one, effect in zip(ours._model.of(probed), step.effects.effect, strict=True):
        expected = sum((a * b).sum() for a, b in zip(gradients([one]), direction, strict=True)).item()
        assert effect.item() == pytest.approx(expected, abs=0.02 * step.effects.effect.abs().max().item())


class Wrapper(nn.Module):
    """A module around the model, such as `nn.DataParallel`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class TestModels:
    def test_compiled_and_wrapped_models_are_measured_as_they_are(self):
        expected = Loop(curriculum()).run(stream, 12)
        for wrap in (Wrapper, lambda model: torch.compile(model, backend="eager")):
            assert Loop(curriculum(), wrap=wrap).run(stream, 12).equals(expected)

    def test_distributed_data_parallel_on_one_process(self, tmp_path):
        expected = Loop(curriculum()).run(stream, 8)
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            loop = Loop(curriculum(), wrap=nn.parallel.DistributedDataParallel).run(stream, 8)
        finally:
            dist.destroy_process_group()
        assert loop.equals(expected)

    def test_of_the_users_own_shape(self):
        """Another loss and another collator; the batch is whatever the collator gives."""

        def collate(examples):
            return {"rows": pad_examples(examples)["input_ids"], "names": [e["source"] for e in examples]}

        def loss(model, batch):
            assert len(batch["names"]) == len(batch["rows"])
            logits = model(batch["rows"]).logits[:, :-1]
            return F.cross_entropy(logits.transpose(1, 2), batch["rows"][:, 1:], reduction="none").mean(1)

        loop = Loop(curriculum(collate=collate, per_example_loss=loss)).run(stream, 6)
        assert loop.curriculum._part._step is not None

    def test_parameters_that_are_not_trained_are_not_measured(self):
        ours, model = curriculum(), Bigram()
        ours._model.show(model, [torch.optim.AdamW(model.parameters())])
        assert len(ours._model.parameters) == 3
        assert all(p.requires_grad for p in ours._model.parameters)

    def test_a_bfloat16_model(self):
        loop = Loop(curriculum())
        loop.model.to(torch.bfloat16)
        loop.run(stream, 8)
        assert loop.curriculum._model.reduced_precision
        assert not curriculum()._model.reduced_precision


class TestNothingToLearn:
    """Examples of which no token has a loss: nobody asks for them."""

    def test_they_are_left_out_and_told_of_once(self):
        good = list(islice(stream(), 60))
        dead = [{**e, "labels": [-100] * len(e["input_ids"])} for e in good[:30]]
        dead += [{"input_ids": [3]}, {"input_ids": []}]
        mixed = [e for pair in zip(good, dead, strict=False) for e in pair]
        with pytest.warns(UserWarning, match="example 1 of the stream has no token to learn") as told:
            selected = list(curriculum(policy=Everything()).select(mixed))
        assert len(told) == 1
        assert selected == good[:32]

    def test_a_resumed_stream_is_read_on_from_where_it_was(self):
        good = list(islice(stream(), 40))
        mixed = [e for one in good for e in ({"input_ids": [3], "source": one["source"]}, one)]
        with pytest.warns(UserWarning, match="example 0"):
            straight = list(curriculum(policy=Everything()).select(mixed))
        assert straight == good

    def test_the_place_in_the_stream_counts_them(self):
        """A stream that resumes by itself goes on behind what `num_read` says, as without an interruption."""
        good = list(islice(stream(), 6 * LOOK_AHEAD))
        mixed = [e for i, one in enumerate(good) for e in [one, {"input_ids": [3]}][: 1 + (i % 3 == 0)]]
        places = {id(e["input_ids"]): i for i, e in enumerate(mixed)}
        taken = iter(mixed)
        ours = curriculum(policy=Everything())
        with pytest.warns(UserWarning, match="no token to learn"):
            selected = list(islice(ours.select(taken), BATCH))
        assert len(selected) == BATCH
        assert ours.num_read == places[id(next(taken)["input_ids"])]
        other = curriculum(policy=Everything())
        other.load_state_dict(plain(ours.state_dict()))
        assert other.num_read == ours.num_read

    @pytest.mark.parametrize("as_function", [False, True])
    def test_a_stream_of_nothing_else_is_refused(self, as_function):
        dead = [{"input_ids": [3], "source": "bad"}] * 5
        with (
            pytest.warns(UserWarning, match="no token to learn"),
            pytest.raises(CurriqError, match="all examples of the stream have no token to learn"),
        ):
            list(curriculum(policy=Everything()).select((lambda: dead) if as_function else dead))

    def test_an_endless_one_is_given_up(self, monkeypatch):
        monkeypatch.setattr("curriq.curriculum.stream.MOST_UNTAUGHT", 50)
        with (
            pytest.warns(UserWarning, match="no token to learn"),
            pytest.raises(CurriqError, match="50 examples one after another of the stream have no token"),
        ):
            list(curriculum(policy=Everything()).select(repeat({"input_ids": [3], "source": "bad"})))

    def test_another_mask_of_the_target_is_another_target(self):
        state = curriculum().state_dict()
        curriculum().load_state_dict(state)
        masked = [{**e, "labels": [-100, -100, *e["input_ids"][2:]]} for e in target()]
        with pytest.raises(CurriqError, match="make it with the same arguments"):
            Curriculum(masked, sources=("good", "bad"), batch_size=BATCH, reward_every=2).load_state_dict(
                state
            )


class TestSelect:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_selects_what_helps_the_target(self, seed):
        """From the first step on where the prior knows it, and otherwise once Q has learnt it."""
        for prior in (True, False):
            ours = curriculum(seed=seed, batch_size=BATCH, prior=prior)
            loop = Loop(ours).run(lambda: stream(seed), 60)
            counting = [
                ids[1] + 1 == ids[2] and ids[-2] + 1 == ids[-1] for batch in loop.trained for ids in batch
            ]
            first, last = sum(counting[:80]) / 80, sum(counting[-160:]) / 160
            assert first > 0.9 if prior else first < 0.45  # 0.3 of the stream
            assert last > (0.9 if prior else 0.48)
            assert ours.num_read > 60 * BATCH

    def test_without_prior_and_evidence_everything_is_accepted(self):
        data = list(islice(stream(), 2 * BATCH))
        assert list(islice(curriculum(prior=False).select(data), BATCH)) == data[:BATCH]

    def test_rejected_examples_are_kept_for_a_probe_and_then_forgotten(self):
        """What is kept: examples that are yet to be judged, trained on or probed. None that was rejected is
        trained on."""
        loop = Loop(curriculum(reward_every=3))
        ours, part = loop.curriculum, loop.curriculum._part
        selected = ours.select({**e, "number": i} for i, e in enumerate(stream()))
        trained, rejected = set(), set()
        for step in range(1, 20):
            batch = list(islice(selected, BATCH))
            trained |= {e["number"] for e in batch}
            loop.step(batch)
            offers = [judged for offer in part._batches for judged in offer.judged]
            if (unread := part._proposer.stream._unread) is not None:
                offers.append(unread)
            kept = [number for offer in offers for number in offer.windows.ids.tolist()]
            assert sorted(kept) == sorted(ours._model.examples)
            probed = {
                n for offer in part._batches if offer.rejected for n in offer.rejected.windows.ids.tolist()
            }
            assert bool(probed) == (step % 3 == 0)  # the next step is measured, and its batch drawn
            rejected |= probed
        assert len(rejected) > 20
        assert not trained & rejected

    def test_a_resumed_curriculum_has_the_state_of_an_uninterrupted_one(self):
        """To the bit, also where a measured step is under way. The prior is so soft that some of the examples
        that it rather accepts are rejected: these belong to the sample that the policy remembers."""

        def made() -> Loop:
            return Loop(curriculum(static_sharpness=0.1))

        for cut in (1, 2, 4, 5):
            whole, parts = made().run(stream, 8), made().run(stream, cut)
            again = parts.resumed(made().curriculum).run(stream, 8)
            assert_same_state(plain(again.curriculum.state_dict()), plain(whole.curriculum.state_dict()))

    @pytest.mark.parametrize("ahead", [0, 1, 2])
    @pytest.mark.parametrize("cut", [1, 2, 5, 8])
    def test_resume_is_exact(self, cut, ahead):
        whole = Loop(curriculum(), ahead=ahead).run(stream, 12)
        parts = Loop(curriculum(), ahead=ahead).run(stream, cut).resumed(curriculum()).run(stream, 12)
        assert parts.equals(whole)
        assert parts.curriculum.num_read == whole.curriculum.num_read

    @pytest.mark.parametrize("ahead", [0, 1])
    def test_a_stream_that_ends_is_read_again_and_resumes_everywhere(self, ahead):
        """Two passes; the last batch of each is smaller. Cut after every step."""
        data = list(islice(stream(), 160))
        whole = Loop(curriculum(), ahead=ahead).run(lambda: data, -1, passes=2)
        sizes = [len(batch) for batch in whole.trained]
        assert min(sizes) < BATCH
        assert all(size == BATCH for size in sizes[:2])
        for cut in range(1, len(sizes)):
            part = Loop(curriculum(), ahead=ahead).run(lambda: data, cut, passes=2)
            assert part.resumed(curriculum()).run(lambda: data, -1, passes=2).equals(whole), cut

    def test_without_a_policy_a_pass_has_every_example_once(self):
        data = list(islice(stream(), 61))
        loop = Loop(curriculum(policy=Everything())).run(lambda: data, -1, passes=2)
        assert [len(batch) for batch in loop.trained] == 2 * [*[BATCH] * 7, 5]
        assert [ids for batch in loop.trained[:8] for ids in batch] == [e["input_ids"] for e in data]

    def test_a_function_opens_the_stream_again_at_its_end(self):
        data = list(islice(stream(), 19))
        ours = curriculum(policy=Everything())

        def open_stream():
            return data

        first = list(islice(ours.select(open_stream), 3))  # somebody looks at the first examples
        batches = [list(islice(ours.select(open_stream), BATCH))]
        assert batches[0][:3] == first
        ours.observe()
        again = ours.select(open_stream)
        for _ in range(5):
            batches.append(list(islice(again, BATCH)))
            ours.observe()
        assert [e for batch in batches for e in batch] == (3 * data)[: 6 * BATCH]
        resumed = curriculum(policy=Everything())
        resumed.load_state_dict(plain(ours.state_dict()))
        assert list(islice(resumed.select(open_stream), BATCH)) == list(islice(again, BATCH))

    def test_a_stream_that_resumes_by_itself(self):
        """It goes on behind all that was read, of which the state has what was not yet handed out."""
        data = list(islice(stream(), LOOK_AHEAD + 500))
        ours, resumed = (curriculum(policy=Everything()) for _ in range(2))
        list(islice(ours.select(data), BATCH))
        ours.observe()
        assert ours.num_read == LOOK_AHEAD
        resumed.load_state_dict(plain(ours.state_dict()))
        selected = resumed.select(data[ours.num_read :], skip=0)
        rest = []
        for _ in range(50):
            rest += islice(selected, BATCH)
            resumed.observe()
        assert rest == data[BATCH : 51 * BATCH]

    def test_a_state_is_not_changed_by_who_loads_it(self):
        ours = Loop(curriculum(), ahead=2).run(stream, 3).curriculum
        state = ours.state_dict()
        waiting = dict(state["model"]["examples"])
        assert waiting
        for _ in range(2):
            other = curriculum()
            other.load_state_dict(state)
            Loop(other).run(stream, 8)
            assert state["model"]["examples"] == waiting


class Good(Everything):
    """A policy of one's own with a memory, which sees what is measured."""

    def __init__(self) -> None:
        self.seen = 0

    def accept_prob(self, offer):
        return (offer.windows.source == 0).double()

    def observe(self, step):
        assert step.effects is not None
        self.seen += 1
        return {"own/seen": float(self.seen)}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class TestOwnPolicy:
    def test_is_obeyed_and_needs_no_model(self):
        class Sure(Everything):
            def accept_prob(self, offer):
                return (offer.windows.source == 0).double()

        ours = curriculum(policy=Sure(), max_read_ratio=64)
        selected = ours.select(stream())
        for _ in range(5):
            assert all(e["source"] == "good" for e in islice(selected, BATCH))
            assert ours.observe() == {}

    def test_examples_that_were_trained_on_are_forgotten(self):
        ours = curriculum(policy=Everything())
        taken = ours.select(stream())
        for _ in range(LOOK_AHEAD // BATCH + 30):
            list(islice(taken, BATCH))
            ours.observe()
        assert len(ours.state_dict()["model"]["examples"]) <= BATCH

    def test_that_learns_gets_effects_and_is_saved(self):
        loop = Loop(curriculum(policy=Good())).run(stream, 9)
        assert loop.curriculum._part._policy.seen == 4  # steps 2, 4, 6 and 8
        whole = Loop(curriculum(policy=Good())).run(stream, 14)
        assert loop.resumed(curriculum(policy=Good())).run(stream, 14).equals(whole)

    def test_that_learns_may_return_no_metrics(self):
        class Silent(Good):
            def observe(self, step):
                super().observe(step)

        loop = Loop(curriculum(policy=Silent())).run(stream, 6)
        assert loop.curriculum.step == 6

    def test_that_learns_needs_the_model(self):
        ours = curriculum(policy=Good())
        selected = ours.select(stream())
        list(islice(selected, 2 * BATCH))
        with pytest.raises(CurriqError, match=r"observe\(model, optimizer\)"):
            ours.observe()


class Weighing:
    """A loop that weighs the examples of every batch."""

    def __init__(self, ours: Curriculum) -> None:
        self.curriculum = ours
        self.model = Bigram()
        self.optimizer = adamw(self.model)
        self.log: list[dict[str, Any]] = []

    def run(self, steps: int) -> "Weighing":
        draw = random.Random(7)
        data = stream(7)
        for step in range(steps):
            examples = list(islice(data, draw.randint(5, 9)))
            if step >= self.curriculum.step:
                self.step(examples)
        return self

    def step(self, examples: list[dict[str, Any]]) -> None:
        batch, sources = pad_examples(examples), [("good", "bad").index(e["source"]) for e in examples]
        losses, hidden = example_losses(self.model, batch), self.model(batch["input_ids"]).hidden[:, -1]
        weights = self.curriculum.weigh(losses, hidden, source=torch.tensor(sources), examples=examples)
        (weights * losses).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seen = {"hidden": hidden.detach(), "weights": weights, "sources": sources}
        self.log.append(seen | self.curriculum.observe(self.model, self.optimizer))


class TestWeigh:
    @pytest.mark.parametrize("preset", ["paper", "weighted"])
    def test_weights_sum_to_one_and_q_learns(self, preset):
        loop = Weighing(curriculum(preset=preset)).run(30)
        for seen in loop.log:
            assert seen["weights"].sum().item() == pytest.approx(1, abs=1e-6)
            assert not seen["weights"].requires_grad
        assert all(seen["weights"].min() > 0 for seen in loop.log)
        learnt = [seen["critic/td_loss"] for seen in loop.log if "critic/td_loss" in seen]
        assert len(learnt) == {"paper": 15, "weighted": 14}[preset]
        assert loop.log[-1]["weights"].std() > 0

    def test_the_weighted_preset_prefers_what_helps_the_target(self):
        log = Weighing(curriculum(preset="weighted")).run(120).log[-40:]
        good = [
            sum(w for w, s in zip(x["weights"].tolist(), x["sources"], strict=True) if s == 0) for x in log
        ]
        even = [x["sources"].count(0) / len(x["sources"]) for x in log]
        assert sum(good) > 1.3 * sum(even)

    @pytest.mark.parametrize("preset", ["paper", "weighted"])
    @pytest.mark.parametrize("cut", [1, 4, 7])
    def test_resume_is_exact(self, preset, cut):
        whole = Weighing(curriculum(preset=preset)).run(12)
        part = Weighing(curriculum(preset=preset)).run(cut)
        other = Weighing(curriculum(preset=preset))
        other.model.load_state_dict(part.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(part.optimizer.state_dict()))
        other.curriculum.load_state_dict(plain(part.curriculum.state_dict()))
        other.run(12)
        for ours, theirs in zip(other.log, whole.log[cut:], strict=True):
            assert torch.equal(ours["weights"], theirs["weights"])
            for name in ("reward", "held_out/forwards", "critic/td_loss"):
                assert ours.get(name) == theirs.get(name), name
        assert all(
            torch.equal(a, b) for a, b in zip(other.model.parameters(), whole.model.parameters(), strict=True)
        )

    def test_the_reward_of_the_paper_is_the_level_and_the_other_a_gain(self):
        """Measured by hand on the examples that were drawn."""
        for preset, paired in (("paper", False), ("weighted", True)):
            loop = Weighing(curriculum(preset=preset, reward_every=1, reward_windows=16))
            loop.run(1)
            before = example_losses(loop.model, pad_examples(target())).mean().item()
            loop.run(2)
            after = example_losses(loop.model, pad_examples(target())).mean().item()
            assert loop.log[1]["reward"] == pytest.approx(before - after if paired else -after, abs=1e-6)

    def test_the_papers_rule_is_algorithm_1(self):
        """Q, its target and the weights against a hand-written TD update in float64 on the same numbers."""
        beta, gamma, tau, rate, clip = 0.05, 0.9, 0.1, 0.05, 0.5
        settings = {"beta": beta, "gamma": gamma, "polyak_tau": tau, "q_lr": rate, "q_grad_clip": clip}
        loop = Weighing(curriculum(preset="paper", reward_every=1, seed=3, **settings)).run(8)
        generators = Generators(3)
        q_net = QNetwork(16, 32, generator=generators("critic/init")).double()
        slow = copy.deepcopy(q_net)
        adam = torch.optim.Adam(q_net.parameters(), lr=rate)
        previous = None
        for seen in loop.log:
            hidden = seen["hidden"].double()
            q = q_net(hidden).detach()  # line 4
            policy = torch.softmax(q / beta, 0)
            torch.testing.assert_close(seen["weights"].double(), policy, rtol=1e-3, atol=1e-5)
            if previous is not None:  # lines 5 to 7
                action, reward = previous
                value = beta * (torch.logsumexp(slow(hidden) / beta, 0) - math.log(len(hidden)))
                goal = (1 - gamma) * reward + gamma * value.detach()
                adam.zero_grad()
                loss = 0.5 * (q_net(action)[0] - goal) ** 2
                loss.backward()
                nn.utils.clip_grad_norm_(q_net.parameters(), clip)
                adam.step()
                for average, fast in zip(slow.parameters(), q_net.parameters(), strict=True):
                    average.data = tau * fast.data + (1 - tau) * average.data
                assert seen["critic/td_target"] == pytest.approx(goal.item(), rel=1e-4)
                assert seen["critic/td_loss"] == pytest.approx(loss.item(), rel=1e-3)
            policy = torch.softmax(q / beta, 0)  # line 8
            draw = torch.rand((), generator=generators("action"), dtype=torch.float64)
            chosen = int((policy.cumsum(0) <= draw).sum())
            previous = (hidden[chosen : chosen + 1], seen["reward"])
        online = loop.curriculum._part._critic.online.parameters()
        for ours, theirs in zip(online, q_net.parameters(), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4)


class TestErrors:
    @pytest.mark.parametrize("preset", ["recommended", "paper"])
    def test_a_model_that_has_diverged(self, preset):
        ours = curriculum(preset=preset)
        run = partial(Loop(ours).run, stream) if preset == "recommended" else Weighing(ours).run
        run(3).model.head.weight.data.fill_(math.nan)
        with pytest.raises(CurriqError, match=r"step \d+: .*smaller learning rate"):
            run(9)

    def test_a_token_that_the_model_does_not_know(self):
        examples = [*target()[:-1], {"input_ids": [1, 987, 2]}]
        ours = Curriculum(examples, sources=("good", "bad"), batch_size=BATCH)
        with pytest.raises(
            CurriqError, match=r"IndexError.*largest token id is 987, .*resize_token_embeddings"
        ):
            Loop(ours).run(stream, 40)

    def test_an_unknown_source(self):
        with pytest.raises(
            CurriqError, match=r"source 'blog': give Curriculum\(sources=\('good', 'bad', 'blog'\)\)"
        ):
            next(curriculum().select([{"input_ids": [1, 2], "source": "blog"}]))

    def test_select_in_a_worker(self, monkeypatch):
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "worker 1 of 2")
        with pytest.raises(CurriqError, match="num_workers=0"):
            next(curriculum().select(stream()))

    def test_observe_without_select_or_weigh(self):
        model = Bigram()
        for options, message in (({}, "only 0 batches were taken"), ({"preset": "paper"}, "without weigh")):
            with pytest.raises(CurriqError, match=message):
                curriculum(**options).observe(model, adamw(model))

    def test_batches_smaller_than_batch_size(self):
        ours = curriculum(policy=Everything())
        selected = ours.select(stream())
        list(islice(selected, BATCH // 2))
        ours.observe()
        list(islice(selected, BATCH // 2))
        with pytest.raises(CurriqError, match="batch_size must be the examples per optimizer step"):
            ours.observe()

    def test_batches_that_nobody_observes(self):
        with pytest.raises(CurriqError, match=f"{MOST_OUTSTANDING + 1} batches were taken and not observed"):
            for _ in curriculum().select(stream()):
                pass

    def test_weigh_on_a_filter_and_the_reverse(self):
        with pytest.raises(CurriqError, match="filters a stream: call select"):
            curriculum().weigh(torch.zeros(2), torch.zeros(2, 4))
        with pytest.raises(CurriqError, match="weighs examples: call weigh"):
            curriculum(preset="paper").select(stream())

    def test_weigh_twice_in_a_step(self):
        ours = curriculum(preset="paper")
        ours.weigh(torch.zeros(2), torch.zeros(2, 4))
        with pytest.raises(CurriqError, match="weigh is called twice in step 0"):
            ours.weigh(torch.zeros(2), torch.zeros(2, 4))

    def test_measured_credit_needs_the_batch(self):
        with pytest.raises(CurriqError, match="examples=batch"):
            curriculum(preset="weighted").weigh(torch.zeros(2), torch.zeros(2, 4))

    def test_an_empty_target(self):
        with pytest.raises(CurriqError, match="target is empty"):
            Curriculum([])

    def test_an_empty_stream_that_is_opened_again(self):
        with pytest.raises(CurriqError, match="stream is empty"):
            next(curriculum().select(lambda: []))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lm_lr": 1e-3}, "unknown setting of a Curriculum 'lm_lr'"),
            ({"rewards_every": 4}, "Did you mean 'reward_every'"),
            (
                {"reward_windows": 17},
                "reward_windows=17, but the target has 16 examples",
            ),
            ({"reward_windows": 0}, "^reward_windows = 0"),
            ({"batch_size": 0}, "batch_size=0: it must be a whole number of examples"),
            ({"sources": "web"}, r"sources='web': give a tuple of names"),
            ({"sources": ()}, "give a tuple of names"),
            ({"sources": ("a", "a")}, "each must be a name, and only once"),
            ({"preset": "paper", "policy": Everything()}, "max_read_ratio > 1"),
            ({"preset": "langevin-rag"}, "needs the loop of `curriq train`"),
            ({"preset": "reference"}, "needs the loop of `curriq train`"),
            ({"preset": "paper", "q_features": ("static_score",)}, "needs the loop of `curriq train`"),
            ({"preset": "weighted", "prior": True}, "needs the loop of `curriq train`"),
            ({"preset": "dsir"}, "needs the loop of `curriq train`"),
        ],
        ids=[
            *("unknown", "misspelt", "too few", "no reward", "no batch", "letters", "no source"),
            *("same source", "weighs", "retrieves", "no Q", "score", "prior", "static"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(CurriqError, match=message):
            curriculum(**options)

    def test_a_state_of_another_curriculum(self):
        with pytest.raises(CurriqError, match=r"'batch_size': 8.*'batch_size': 4"):
            curriculum(batch_size=4).load_state_dict(curriculum().state_dict())

    def test_it_is_public(self):
        assert curriq.Curriculum is Curriculum
        assert curriq.example_losses is example_losses
        assert curriq.pad_examples is pad_examples
