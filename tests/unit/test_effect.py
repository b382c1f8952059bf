"""Settings without effect. That they have none is shown by tests/conformance/test_runs.py, run by run."""

import logging

import pytest
from tests.runs import tiny

from curriq.config import CriticConfig, LangevinConfig, RunConfig, SelectConfig
from curriq.config.effect import set_by_user, settings_read, unread, without_effect
from curriq.presets import PRESETS, preset
from curriq.train.run import Own, prepare

MEASURED = {"credit": "counterfactual", "bellman": False}
EXAMPLES = {
    "discount without a value": (MEASURED | {"gamma": 0.5}, "gamma", "--no-bellman"),
    "critic of plain training": ({"selector": "uniform", "q_lr": 0.1}, "q_lr", "--selector uniform has no Q"),
    "another selector's": ({"random_k": 3}, "random_k", "only --selector random-k"),
    "search of a stream": ({"langevin_steps": 3}, "langevin_steps", "--proposer stream"),
    "gradient of a control": (
        {"proposer": "random-queries", "langevin_step_size": 1.0},
        "langevin_step_size",
        "--proposer random-queries follows no gradient",
    ),
    "share of another rule": (
        {"selector": "filter", "max_read_ratio": 8, "static_share": 0.3},
        "static_share",
        "--static-rule posterior does not read it",
    ),
    "passes without trust": (
        {"prior": True, "target_passes": 5.0},
        "target_passes",
        "--accept-target-source",
    ),
    "a solved temperature": (
        {"temperature": "fraction", "beta": 0.3},
        "beta",
        "--temperature fraction solves",
    ),
    "adapters": ({"lora_alpha": 3}, "lora_alpha", "--lora-rank is 0"),
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_what_leaves_it_out_is_named(case: str):
    settings, name, why = EXAMPLES[case]
    config = RunConfig().override(**settings)
    (sentence,) = without_effect(config, [name, "steps"])
    assert sentence.startswith(f"--{name.replace('_', '-')} has no effect: ")
    assert why in sentence
    assert settings_read(config) == settings_read(RunConfig().override(**(settings | {name: _default(name)})))


def _default(name: str) -> object:
    return RunConfig().value(name)


def test_what_one_reason_leaves_out_is_one_sentence():
    config = RunConfig().override(langevin_steps=3, query_tokens=4, random_k=3)
    assert without_effect(config, set_by_user(config)) == [
        "--random-k has no effect: only --selector random-k reads it",
        "--query-tokens, --langevin-steps have no effect: --proposer stream searches nothing",
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_nothing_that_it_does_not_read(name: str):
    assert without_effect(preset(name), set_by_user(preset(name))) == []


@pytest.mark.parametrize("setting", ["selector", "proposer"])
def test_a_component_of_the_users_own_may_read_everything(setting: str):
    own = RunConfig().override(**{setting: "package.module:function"})
    of_method = {*vars(CriticConfig()), *vars(SelectConfig()), *vars(LangevinConfig())}
    assert not of_method & unread(own).keys()
    assert of_method & unread(RunConfig()).keys()


def test_a_run_says_what_it_does_not_read(tmp_path, caplog):
    def said(**own: object) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "curriq"):
            prepare(tiny(run_dir=str(tmp_path), competence_steps=0, gamma=0.5, **MEASURED), own=Own(**own))
        return [message for message in caplog.messages if "no effect" in message]

    k = "--random-k has no effect: only --selector random-k reads it."
    assert said() == ["--gamma has no effect: with --no-bellman Q learns no discounted value.", k]
    from curriq.train.build import build_method

    assert said(method=lambda config, context: build_method(config, context)) == []
