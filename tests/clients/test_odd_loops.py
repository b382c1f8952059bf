"""Loops that do something unusual with `curriq.Curriculum`: it works, or it says at once why not."""

import datetime
import math
import random
import subprocess
import sys
import textwrap
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.loops import BATCH, VOCAB, Bigram, Everything, Loop, adamw, curriculum, plain, stream, target
from torch import nn
from torch.utils.data import DataLoader
from transformers import Adafactor

from curriq.curriculum import Curriculum
from curriq.curriculum import stream as of_stream
from curriq.errors import CurriqError
from curriq.lm.examples import (
    as_windows,
    example_losses,
    learnt_tokens,
    numbered,
    pad_examples,
    portable,
    restored,
)
from curriq.lm.held_out import AveragedGradient
from curriq.lm.user_model import UserModel
from curriq.select.static import DsirScore


class Noting(Everything):
    """A policy that keeps what is measured."""

    def __init__(self) -> None:
        self.effects: list[torch.Tensor] = []

    def observe(self, step):
        self.effects.append(step.effects.effect)
        return {}


def step(model: nn.Module, *optimizers: torch.optim.Optimizer, batch: list[dict[str, Any]]) -> None:
    example_losses(model, pad_examples(batch)).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


class TestOptimizers:
    def test_two_that_train_parts_are_observed_and_no_gradient_is_left(self):
        """Muon takes matrices alone, so it never comes alone. Whichever of the two is shown to `observe`."""

        def observed() -> list[nn.Parameter]:
            ours, model = curriculum(reward_every=1, policy=Noting()), Bigram()
            one = torch.optim.AdamW(model.embed.parameters(), lr=1e-2)
            two = torch.optim.Muon([model.head.weight], lr=1e-2)
            selected = ours.select(stream())
            for _ in range(4):
                step(model, one, two, batch=list(islice(selected, BATCH)))
                ours.observe(model, one if not ours.step % 2 else [one, two])
            assert all(effect.isfinite().all() for effect in ours._part._policy.effects)
            assert len(ours._part._policy.effects) == 3
            return [*model.parameters()]

        def plainly() -> list[nn.Parameter]:
            model, data = Bigram(), stream()
            one = torch.optim.AdamW(model.embed.parameters(), lr=1e-2)
            two = torch.optim.Muon([model.head.weight], lr=1e-2)
            for _ in range(4):
                step(model, one, two, batch=list(islice(data, BATCH)))
            return [*model.parameters()]

        for ours, theirs in zip(observed(), plainly(), strict=True):
            assert torch.equal(ours, theirs)

    def test_effects_add_up_over_two_optimizers(self):
        """Two of the same kind with half of the parameters each measure what one measures."""

        def effects(split: bool) -> list[torch.Tensor]:
            policy, model = Noting(), Bigram()
            trained = [p for p in model.parameters() if p.requires_grad]
            parts = [trained[:1], trained[1:]] if split else [trained]
            optimizers = [torch.optim.AdamW(part, lr=1e-2) for part in parts]
            ours = curriculum(reward_every=1, policy=policy)
            selected = ours.select(stream())
            for _ in range(4):
                step(model, *optimizers, batch=list(islice(selected, BATCH)))
                ours.observe(model, optimizers)
            return policy.effects

        for one, two in zip(effects(False), effects(True), strict=True):
            assert torch.equal(one, two)

    @pytest.mark.parametrize("kind", ["Adafactor", "group step", "SparseAdam", "SGD on sparse", "RMSprop"])
    def test_other_kinds_are_measured(self, kind):
        model = Bigram()
        if kind in ("SparseAdam", "SGD on sparse"):
            model.embed = nn.Embedding(VOCAB, 16, sparse=True)
            model.head.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        made = {
            "Adafactor": lambda: Adafactor(trained, lr=1e-2, relative_step=False, scale_parameter=False),
            "group step": lambda: GroupStep(trained, lr=1e-2),
            "SparseAdam": lambda: torch.optim.SparseAdam(trained, lr=1e-2),
            "SGD on sparse": lambda: torch.optim.SGD(trained, lr=1e-1),
            "RMSprop": lambda: torch.optim.RMSprop(trained, lr=1e-2),
        }
        optimizer, policy = made[kind](), Noting()
        ours = curriculum(reward_every=1, policy=policy)
        selected = ours.select(stream())
        for _ in range(4):
            step(model, optimizer, batch=list(islice(selected, BATCH)))
            ours.observe(model, optimizer)
        assert len(policy.effects) >= 3
        assert all(effect.isfinite().all() and effect.any() for effect in policy.effects)

    def test_steps_counted_by_the_group_are_those_of_adamw(self):
        def effects(kind: type[torch.optim.Optimizer]) -> list[torch.Tensor]:
            policy = Noting()
            loop = Loop(curriculum(reward_every=1, policy=policy))
            loop.optimizer = kind([p for p in loop.model.parameters() if p.requires_grad], lr=1e-2)
            loop.run(stream, 4)
            return policy.effects

        for ours, theirs in zip(effects(GroupStep), effects(torch.optim.AdamW), strict=True):
            assert torch.equal(ours, theirs)

    def test_one_without_a_learning_rate_is_refused(self):
        ours, model = curriculum(reward_every=1), Bigram()
        optimizer = Adafactor([p for p in model.parameters() if p.requires_grad])
        step(model, optimizer, batch=list(islice(ours.select(stream()), BATCH)))
        with pytest.raises(CurriqError, match="lr=None"):
            ours.observe(model, optimizer)

    def test_that_of_another_model_is_refused(self):
        ours = curriculum()
        list(islice(ours.select(stream()), BATCH))
        with pytest.raises(CurriqError, match="the AdamW trains no parameter of this Bigram"):
            ours.observe(Bigram(), adamw(Bigram()))

    def test_steps_in_the_backward_pass_are_refused(self):
        ours, model = curriculum(reward_every=1), Bigram()
        optimizer = adamw(model)
        step(model, optimizer, batch=list(islice(ours.select(stream()), BATCH)))
        before = model.head.weight.clone()
        model.head.weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
        with pytest.raises(CurriqError, match="register_post_accumulate_grad_hook"):
            ours.observe(model, optimizer)
        assert torch.equal(model.head.weight, before)

    def test_without_anything_to_train_it_says_so(self):
        ours, model = curriculum(reward_every=1), Bigram()
        optimizer = adamw(model)
        list(islice(ours.select(stream()), BATCH))
        model.requires_grad_(False)
        with pytest.raises(CurriqError, match="no parameter that the optimizer trains requires a gradient"):
            ours.observe(model, optimizer)

    def test_parameters_may_be_unfrozen(self):
        policy = Noting()
        loop = Loop(curriculum(reward_every=1, policy=policy))
        loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-2)
        loop.run(stream, 4)
        loop.model.frozen.requires_grad_(True)
        loop.run(stream, 8)
        assert len(policy.effects) >= 6
        assert all(effect.isfinite().all() for effect in policy.effects)

    def test_at_a_learning_rate_of_zero_nothing_is_measured(self):
        """A warm-up begins there: an effect would be 0 by definition, and say nothing of the example."""
        loop = Loop(curriculum(reward_every=1))
        schedule = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda k: float(k > 3))
        seen = []
        for batch in islice(loop.batches(stream()), 7):
            seen.append(loop.step(batch))
            schedule.step()
        assert ["critic/td_loss" in row for row in seen[:3]] == [False] * 3
        assert all(math.isfinite(value) for row in seen for value in row.values())
        assert any("critic/td_loss" in row for row in seen[4:])


class GroupStep(torch.optim.Optimizer):
    """AdamW that counts its steps once per group, as Apex's does."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        inner = torch.optim.AdamW(self.param_groups[0]["params"], lr=lr)
        self.inner, group = inner, self.param_groups[0]
        group.update({"betas": (0.9, 0.999), "eps": 1e-8, "step": 0})

    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.param_groups[0]["step"] += 1
        for parameter, state in self.inner.state.items():
            self.state[parameter] = {name: x for name, x in state.items() if name != "step"}


def test_an_average_begins_again_where_other_parameters_are_trained():
    parameters = [torch.zeros(2), torch.zeros(3)]
    average = AveragedGradient(0.5, lambda: parameters)
    average.update([torch.ones(2), torch.ones(3)])
    parameters = [parameters[1], torch.zeros(2)]
    (first, second) = average.update([torch.full((3,), 5.0), torch.full((2,), 7.0)])
    assert first.tolist() == [5.0] * 3
    assert second.tolist() == [7.0] * 2
    first, _ = average.update([torch.full((3,), 8.0), torch.full((2,), 7.0)])
    assert first.tolist() == [(0.25 * 5 + 0.5 * 8) / 0.75] * 3


class TestMeasuring:
    def test_autocast_around_it_sees_the_displaced_weights(self):
        """Autocast keeps weights in bfloat16 from the first pass to the last of its block."""

        def effects(cached: bool) -> list[torch.Tensor]:
            policy = Noting()
            loop = Loop(curriculum(reward_every=1, policy=policy, reduced_precision=True))
            loop.optimizer = torch.optim.SGD(loop.model.head.parameters(), lr=0.1)
            for batch in islice(loop.batches(stream()), 3):
                example_losses(loop.model, pad_examples(batch)).mean().backward()
                loop.optimizer.step()
                loop.optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
                    loop.curriculum.observe(loop.model, loop.optimizer)
                    assert torch.is_autocast_cache_enabled() == cached
            return policy.effects

        for ours, theirs in zip(effects(True), effects(False), strict=True):
            assert theirs.any()
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_around_it(self, mode):
        ours = Loop(curriculum(reward_every=1))
        for batch in islice(ours.batches(stream()), 4):
            example_losses(ours.model, pad_examples(batch)).mean().backward()
            ours.optimizer.step()
            ours.optimizer.zero_grad()
            with mode():
                ours.curriculum.observe(ours.model, ours.optimizer)
            ours.trained.append([e["input_ids"] for e in batch])
        assert ours.equals(Loop(curriculum(reward_every=1)).run(stream, 4))

    def test_a_collator_may_change_what_it_is_given(self):
        def collate(examples):
            for each in examples:
                each["input_ids"].append(2)
                each.pop("labels")
            return pad_examples(examples)

        loop = Loop(curriculum(reward_every=1, collate=collate))
        for batch in islice(loop.batches(stream()), 6):
            assert all(e["input_ids"][-1] == e["labels"][-1] for e in batch)
            loop.step(batch)

    def test_a_batch_may_be_a_tuple(self):
        def collate(examples):
            batch = pad_examples(examples)
            return batch["input_ids"], {"labels": batch["labels"]}

        def loss(model, batch):
            assert isinstance(batch, tuple)
            return example_losses(model, {"input_ids": batch[0], **batch[1]})

        loop = Loop(curriculum(reward_every=1, collate=collate, per_example_loss=loss)).run(stream, 4)
        assert loop.curriculum._part._step is not None

    def test_an_example_with_a_loss_of_nan_is_named(self):
        def loss(model, batch):
            losses = example_losses(model, batch)
            return losses / (batch["input_ids"] != 39).all(1)

        data = [{"input_ids": [1, 3, 4], "source": "good"}] * (BATCH + 1)
        data += [{"input_ids": [39, 8, 9], "source": "bad"}] * BATCH
        ours, model = curriculum(reward_every=1, policy=Noting(), per_example_loss=loss), Bigram()
        optimizer, selected = adamw(model), ours.select(data)
        step(model, optimizer, batch=list(islice(selected, BATCH)))
        with pytest.raises(CurriqError, match=r"inf, where others .* source 'bad', input_ids \[39, 8, 9\]"):
            ours.observe(model, optimizer)

    def test_a_loss_that_is_no_row_is_refused(self):
        ours, model = (
            curriculum(reward_every=1, per_example_loss=lambda m, b: example_losses(m, b).mean()),
            Bigram(),
        )
        list(islice(ours.select(stream()), BATCH))
        optimizer = adamw(model)
        with pytest.raises(CurriqError, match=r"gave shape \[\] for 8 examples"):
            ours.observe(model, optimizer)

    def test_observe_without_the_model_loses_no_batch(self):
        loop = Loop(curriculum())
        batches = loop.batches(stream())
        loop.step(next(batches))
        batch = next(batches)
        with pytest.raises(CurriqError, match=r"call observe\(model, optimizer\)"):
            loop.curriculum.observe()
        loop.step(batch)
        assert loop.curriculum.step == 2


class TestPasses:
    def test_batches_larger_than_batch_size_train_on_nothing_twice(self):
        data = [{"input_ids": [1, 2 + i % 9, 4], "row": i} for i in range(160)]
        ours, seen = Curriculum(target(), batch_size=BATCH, policy=Everything()), Counter()
        for batch in DataLoader(ours.select(data), batch_size=2 * BATCH, collate_fn=list):
            seen.update(example["row"] for example in batch)
            ours.observe()
        assert set(seen.values()) == {1}
        assert ours.num_passes == 0
        with pytest.raises(CurriqError, match="10 of the batches of a pass were not observed at its end"):
            next(ours.select(data))

    def test_batches_that_nobody_observes_are_noticed_at_the_end_of_a_pass(self):
        data = list(islice(stream(), 3 * BATCH))
        ours = curriculum(policy=Everything())
        assert list(ours.select(data)) == data
        with pytest.raises(CurriqError, match="3 of the batches of a pass were not observed"):
            list(ours.select(data))

    @pytest.mark.parametrize("ahead", [0, 1])
    def test_a_dropped_last_batch(self, ahead):
        data = list(islice(stream(), 20))
        ours = curriculum(policy=Everything())

        def train(selected: Any) -> int:
            waiting = 0
            for _ in DataLoader(selected, batch_size=BATCH, collate_fn=list, drop_last=True):
                waiting += 1
                if waiting > ahead:
                    ours.observe()
                    waiting -= 1
            for _ in range(waiting):
                ours.observe()
            return ours.num_passes

        assert [train(ours.select(data)) for _ in range(1 + ahead)][-1] == 0
        with pytest.raises(CurriqError, match=r"the last, smaller batch as well \(drop_last=False\)"):
            train(ours.select(data))

    def test_a_loader_of_a_selection_is_good_for_one_pass(self):
        ours = curriculum(policy=Everything())
        loader = DataLoader(ours.select(list(islice(stream(), 20))), batch_size=BATCH, collate_fn=list)
        for _ in loader:
            ours.observe()
        with pytest.raises(CurriqError, match="call select again for each pass"):
            next(iter(loader))

    def test_islice_finds_the_end(self):
        selected = curriculum(policy=Everything()).select(list(islice(stream(), 20)))
        sizes = [len(list(islice(selected, BATCH))) for _ in range(4)]
        assert sizes == [8, 8, 4, 0]

    def test_a_generator_is_used_up_after_one_pass(self):
        ours, generator = curriculum(policy=Everything()), islice(stream(), 20)
        for batch in DataLoader(ours.select(generator), batch_size=BATCH, collate_fn=list):
            assert batch
            ours.observe()
        assert ours.num_passes == 1
        with pytest.raises(CurriqError, match="a generator is used up after one pass"):
            list(ours.select(generator))
        assert ours.num_passes == 1

    def test_an_old_selection_is_over(self):
        ours = curriculum(policy=Everything())
        old = ours.select(stream())
        next(old)
        state = ours.state_dict()
        next(ours.select(stream()))
        with pytest.raises(CurriqError, match="this selection is over"):
            next(old)
        new = ours.select(stream())
        next(new)
        ours.load_state_dict(state)
        with pytest.raises(CurriqError, match="this selection is over"):
            next(new)

    def test_a_data_set_that_is_read_by_index(self):
        class Indexed:
            def __len__(self) -> int:
                return 20

            def __getitem__(self, i: int) -> dict[str, Any]:
                return {"input_ids": [1, 2 + i, 3]}

        class MapStyle(Indexed, torch.utils.data.Dataset):
            pass

        ours = Curriculum(target(), batch_size=BATCH, policy=Everything())
        assert [e["input_ids"][1] for e in ours.select(MapStyle())] == list(range(2, 22))
        opened = Curriculum(target(), batch_size=BATCH, policy=Everything()).select(MapStyle)
        assert [e["input_ids"][1] for e in islice(opened, 30)] == [*range(2, 22), *range(2, 12)]

    def test_a_shorter_stream_than_before_a_resume(self):
        ours = curriculum(policy=Everything())
        data = list(islice(stream(), 100))
        list(islice(ours.select(data), BATCH))
        ours.observe()
        resumed = curriculum(policy=Everything())
        resumed.load_state_dict(ours.state_dict())
        with pytest.raises(CurriqError, match="has only 30 examples, and 100 of it were read before"):
            next(resumed.select(data[:30]))


class TestExamples:
    @pytest.mark.parametrize(
        ("example", "message"),
        [
            ({"text": "a", "source": "bad"}, "example 1 of the stream has no input_ids, but text, source"),
            ({"input_ids": "abc"}, "input_ids is a str"),
            ({"input_ids": [[1, 2]]}, "is a list of list: an example has one row"),
            ({"input_ids": ["a"]}, "is a list of str"),
            ({"input_ids": [1.5]}, "is a list of float"),
            ({"input_ids": torch.ones(2, 3).long()}, r"shape \[2, 3\].*take the examples out of the batch"),
            ({"input_ids": np.ones(3)}, "type float64"),
            ({"input_ids": [1, 2], "labels": [1]}, "has 2 input_ids and 1 labels"),
            ({"input_ids": [1, 2], "labels": 3}, "labels is a int"),
            ({"input_ids": [1, 2]}, "names no source: give each its 'source', one of 'good', 'bad'"),
        ],
    )
    def test_what_is_wrong_with_one_is_said(self, example, message):
        data = [{"input_ids": [1, 2], "source": "good"}, example]
        with pytest.raises(CurriqError, match=message):
            next(curriculum().select(data))

    @pytest.mark.parametrize("row", [range(4), (0, 1, 2, 3), np.arange(4), torch.arange(4)])
    def test_every_kind_of_row_is_taken_and_saved(self, row):
        ours = Curriculum(target(), batch_size=2, policy=Everything())
        data = [{"input_ids": row}] * 5
        next(ours.select(data))
        other = Curriculum(target(), batch_size=2, policy=Everything())
        other.load_state_dict(plain(ours.state_dict()))
        again = next(other.select(data))["input_ids"]
        assert type(again) is type(row)
        assert list(again) == list(row)

    @pytest.mark.parametrize(
        "bad", [{"input_ids": [3]}, {"input_ids": []}, {"input_ids": [3, 4], "labels": [3, -100]}]
    )
    def test_a_target_example_has_something_to_learn(self, bad):
        with pytest.raises(CurriqError, match="example 1 of the target has no token to learn"):
            Curriculum([{"input_ids": [3, 4]}, bad])

    def test_what_stands_behind_padding_has_no_loss(self):
        """The first token of a text padded on the left is predicted from padding alone."""
        padded = {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]}
        assert pad_examples([padded])["labels"].tolist() == [[-100, -100, -100, 6]]
        assert learnt_tokens(padded) == 1 == learnt_tokens({"input_ids": [5, 6]})
        assert learnt_tokens({"input_ids": [0, 0, 5], "attention_mask": [0, 0, 1]}) == 0

    def test_an_attention_mask_of_its_own_is_kept_and_hides_labels(self):
        padded = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}
        batch = pad_examples([padded, {"input_ids": [5, 6, 7, 8]}])
        assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
        assert batch["labels"].tolist() == [[5, 6, -100, -100], [5, 6, 7, 8]]
        given = pad_examples([{"input_ids": [5, 6], "attention_mask": [0, 1], "labels": [5, 6]}])
        assert given["labels"].tolist() == [[5, 6]]
        with pytest.raises(CurriqError, match=r"3 input_ids and an attention_mask of shape \[2\]"):
            pad_examples([{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}])

    def test_one_long_example_pads_no_other(self, monkeypatch):
        """Scores are those of one batch, and no part is padded to more than its share."""
        draw = random.Random(0)
        rows = [[draw.randrange(VOCAB) for _ in range(n)] for n in (5, 3, 500, 4, 0, 9, 7)]
        model = UserModel(target=[], loss=example_losses, collate=pad_examples, micro_batch=2)
        model.examples = {i: {"input_ids": row} for i, row in enumerate(rows)}
        windows = numbered(torch.arange(len(rows)))

        def scores() -> torch.Tensor:
            score = of_stream.ExampleScore(model, DsirScore(as_windows(target())))
            return torch.stack([score(windows), score(windows)])

        at_once = scores()
        monkeypatch.setattr(of_stream, "TOKENS_AT_ONCE", 30)
        parts = of_stream.ExampleScore(model, DsirScore(as_windows(target())))._by_length(windows)
        assert sorted(len(part) for _, part in parts) == [1, 2, 4]
        assert [part.tokens.shape[1] for _, part in parts] == [5, 9, 500]
        torch.testing.assert_close(scores(), at_once, rtol=1e-12, atol=1e-12)


class TestPortable:
    @pytest.mark.parametrize(
        "value",
        [
            np.arange(4, dtype=np.int16),
            np.array(["a", "bc"]),
            np.array([[1, 2], [3, 4]], dtype=np.float32),
            (1, (2, [3])),
            range(1, 9, 2),
            {"a": {"": 3}},
            datetime.datetime(2026, 11, 28, 1, 2, 3),
            datetime.date(2026, 11, 28),
            b"bytes",
            None,
        ],
        ids=str,
    )
    def test_comes_back(self, value):
        back = restored(plain({"value": portable(value, "it")})["value"])
        assert type(back) is type(value)
        assert np.all(back == value)
        assert getattr(back, "dtype", None) == getattr(value, "dtype", None)

    def test_scalars_of_numpy_become_pythons(self):
        found = [portable(x, "it") for x in (np.int64(3), np.float32(0.5), np.str_("a"), np.bool_(True))]
        assert found == [3, 0.5, "a", True]
        assert [type(x) for x in found] == [int, float, str, bool]
        assert portable(Path("a/b"), "it") == "a/b"

    def test_objects_in_an_array(self):
        value = np.empty(2, dtype=object)
        value[:] = [[1, 2], [3, 4]]
        back = restored(plain({"value": portable(value, "it")})["value"])
        assert back.dtype == object
        assert back.tolist() == [[1, 2], [3, 4]]

    def test_what_cannot_be_saved_is_said_at_the_first_example_and_again(self):
        ours = Curriculum(target(), batch_size=2, policy=Everything())
        data = [{"input_ids": [1, 2], "image": SimpleNamespace()}] * 4
        message = "field 'image' of an example holds a types.SimpleNamespace, which a checkpoint cannot keep"
        with pytest.warns(UserWarning, match=message):
            next(ours.select(data))
        with pytest.raises(CurriqError, match=message):
            ours.state_dict()


class TestStates:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"policy": Everything()}, "'policy': 'Everything'"),
            ({"q_hidden": 8}, "'q_hidden': '8'"),
            ({"preset": "weighted"}, "'filters': False"),
        ],
        ids=["policy", "q_hidden", "preset"],
    )
    def test_of_a_curriculum_that_was_made_otherwise(self, options, message):
        with pytest.raises(CurriqError, match=f"this curriculum has .*{message}"):
            curriculum(**options).load_state_dict(curriculum().state_dict())

    def test_of_another_target(self):
        state = Curriculum(target(16)).state_dict()
        with pytest.raises(CurriqError, match=r"'target': .*make it with the same arguments"):
            Curriculum(target(12)).load_state_dict(state)

    def test_of_something_else(self):
        with pytest.raises(CurriqError, match="not the state of a Curriculum"):
            curriculum().load_state_dict({"model": {}})

    def test_of_an_earlier_version_that_said_less(self):
        loop = Loop(curriculum()).run(stream, 3)
        state = plain(loop.curriculum.state_dict())
        for name in ("policy", "target", "settings"):
            del state["made_for"][name]
        other = curriculum()
        other.load_state_dict(state)
        assert other.step == 3
        assert other.state_dict()["made_for"]["target"]

    def test_weights_are_rolled_back(self):
        """To a step with a batch weighed and not observed, and to the very beginning."""
        torch.manual_seed(0)
        ours, model = curriculum(preset="paper"), Bigram()
        optimizer, start = adamw(model), ours.state_dict()
        batch = pad_examples(target(BATCH))

        def weighed() -> torch.Tensor:
            losses = example_losses(model, batch)
            weights = ours.weigh(losses, model(batch["input_ids"]).hidden[:, -1])
            (weights * losses).sum().backward()
            optimizer.zero_grad()
            return weights

        first = weighed()
        ours.observe(model, optimizer)
        state = ours.state_dict()
        second = weighed()
        ours.load_state_dict(state)
        assert torch.equal(weighed(), second)
        ours.load_state_dict(start)
        assert torch.equal(weighed(), first)


class TestWeigh:
    def weights(self, **given: Any) -> torch.Tensor:
        """After thirty steps on a batch of both sources."""
        ours, model = curriculum(preset="weighted", reward_every=1), Bigram()
        optimizer, examples = adamw(model), list(islice(stream(), BATCH))
        batch = pad_examples(examples)
        for _ in range(30):
            losses = example_losses(model, batch)
            weights = ours.weigh(losses, model(batch["input_ids"]).hidden[:, -1], examples=examples, **given)
            (weights * losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ours.observe(model, optimizer)
        return weights

    def test_examples_name_their_sources(self):
        source = [int(e["source"] == "bad") for e in islice(stream(), BATCH)]
        assert torch.equal(self.weights(), self.weights(source=source))
        assert not torch.equal(self.weights(), self.weights(source=torch.zeros(BATCH).long()))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, "there are 2 sources"),
            ({"source": torch.tensor([0, 2])}, "source = .*it needs 2 numbers from 0 to 1"),
            ({"source": [0]}, "it needs 2 numbers"),
            ({"examples": [{"input_ids": [1], "source": "good"}]}, "and 1 examples: it needs a loss"),
            ({"losses": torch.tensor([1, math.nan]), "source": [0, 1]}, "step 0: a loss is not finite"),
            ({"hidden": torch.full((2, 4), math.inf), "source": [0, 1]}, "a hidden state is not finite"),
        ],
        ids=["none", "too high", "too few", "examples", "loss", "hidden"],
    )
    def test_what_does_not_fit_is_refused(self, given, message):
        ours = curriculum(preset="paper", q_features=("last", "source"))
        with pytest.raises(CurriqError, match=message):
            ours.weigh(**{"losses": torch.zeros(2), "hidden": torch.zeros(2, 4)} | given)


class TestOwnPolicy:
    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (lambda n: torch.full((n,), math.nan), r"gave \[nan\]: probabilities lie between 0 and 1"),
            (lambda n: torch.full((n,), 1.5), r"gave \[1.5\]"),
            (lambda n: torch.ones(n, 1), rf"gave shape \[{BATCH}, 1\] for {BATCH} examples"),
        ],
        ids=["nan", "above", "shape"],
    )
    def test_its_answer_is_checked(self, answer, message):
        class Own(Everything):
            def accept_prob(self, offer):
                return answer(len(offer))

        with pytest.raises(CurriqError, match=f"accept_prob of Own {message}"):
            next(curriculum(policy=Own()).select(stream()))

    def test_it_may_be_a_list_or_an_array(self):
        class Own(Everything):
            def accept_prob(self, offer):
                return [1.0] * len(offer) if offer.windows.ids[0] < BATCH else np.ones(len(offer))

        assert len(list(islice(curriculum(policy=Own()).select(stream()), 3 * BATCH))) == 3 * BATCH


def test_arguments_of_a_wrong_type():
    """Without the checks of types that are on in the tests."""
    script = """
        import warnings
        warnings.simplefilter("error")
        import curriq, torch
        target = [{"input_ids": [1, 2]}]
        cases = [
            dict(target=target, batch_size="8"), dict(target=target, policy=lambda offer: 1.0),
            dict(target=3), dict(target=[[1, 2]]), dict(target=["text"]), dict(target=target, sources=None),
        ]
        for case in cases:
            try:
                curriq.Curriculum(case.pop("target"), **case)
            except curriq.CurriqError as error:
                print(error)
        for stream in (3, None, ["text"]):
            try:
                next(curriq.Curriculum(target).select(stream))
            except curriq.CurriqError as error:
                print(error)
        weighing = curriq.Curriculum(target, preset="paper")
        calls = (
            lambda: weighing.weigh(torch.zeros(2), torch.zeros(3, 4)), lambda: curriq.run("smoke"),
            lambda: curriq.preset(3),
        )
        for call in calls:
            try:
                call()
            except curriq.CurriqError as error:
                print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    expected = (
        *(
            "batch_size='8'",
            "policy is a function",
            "the target is a int",
            "example 0 of the target is a list",
        ),
        *(
            "example 0 of the target is a str",
            "sources=None",
            "the stream is a int",
            "the stream is a NoneType",
        ),
        "example 0 of the stream is a str",
        "weigh has losses of shape [2], hidden of shape [3, 4]: it needs",
        *("run(config) needs a RunConfig, not 'smoke'", "unknown preset '3'"),
    )
    assert len(said) == len(expected)
    for line, beginning in zip(said, expected, strict=True):
        assert line.startswith(beginning), line


def test_random_numbers_of_python_and_numpy_are_as_they_were():
    """In a process of its own: the checks of types that are on in the tests draw some."""
    script = """
        import random
        from itertools import islice
        import numpy as np
        from tests.loops import Loop, curriculum, pad_examples, stream

        def collate(examples):
            random.random()
            np.random.rand()
            return pad_examples(examples)

        before = random.getstate(), np.random.get_state()
        loop = Loop(curriculum(reward_every=1, collate=collate))
        for batch in islice(loop.batches(stream()), 4):
            loop.step(batch)
        assert loop.curriculum._part._step is not None
        assert random.getstate() == before[0]
        assert np.random.get_state()[2] == before[1][2]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=Path(__file__).parents[2])
