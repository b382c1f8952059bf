"""The configuration: what it refuses and how it says so, and its way to a TOML file and back."""

import dataclasses
import inspect
import math
import string
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriq.config import (
    SELECTORS,
    CriticConfig,
    DataConfig,
    EvalConfig,
    LangevinConfig,
    LMConfig,
    LogConfig,
    OptimConfig,
    RetrievalConfig,
    RunConfig,
    SelectConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
    did_you_mean,
    field_owners,
    flag,
    from_dict,
    load_toml,
    to_dict,
    to_toml,
)
from curriq.errors import CurriqError
from curriq.evaluate.plan import load_plan
from curriq.presets import PRESETS, own_settings, preset

SECTIONS = {field.name: type(getattr(RunConfig(), field.name)) for field in dataclasses.fields(RunConfig)}
EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
PROSE = SourceConfig(name="prose", path="embedded:prose")


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


# Bounds -------------------------------------------------------------------------------------------

# Section, field, refused values, accepted values at the edge of the rule.
BOUNDS: list[tuple[type, str, list[Any], list[Any]]] = [
    (SourceConfig, "weight", [-0.1, math.nan, math.inf], [0.0]),
    (DataConfig, "window", [1, 0, -5], [2]),
    (DataConfig, "shuffle_buffer", [0], [1]),
    (DataConfig, "stream_shards", [0, -2], [1]),
    (SelectConfig, "sharp_start", [-1], [0]),
    (CriticConfig, "min_accept_fraction", [0.0, 1.01, math.nan], [0.01, 1.0]),
    (SelectConfig, "target_passes", [3.9, 0, math.nan, math.inf], [4, 1e9]),
    (LogConfig, "peak_tflops", [-1.0, math.nan, math.inf], [0.0]),
    (DataConfig, "reward_set_size", [0], [1]),
    (DataConfig, "validation_set_size", [0], [1]),
    (DataConfig, "test_set_size", [0], [1]),
    (DataConfig, "topic_pool_size", [0], [1]),
    (DataConfig, "split_seed", [-1], [0]),
    (DataConfig, "held_out_share", [0.0, 1.0, math.nan], [0.01, 0.99]),
    (DataConfig, "near_duplicate_threshold", [0.0, 1.01, math.nan], [0.01, 1.0]),
    (DataConfig, "topic_temperature", [0.0, -1.0, math.nan, math.inf], [1e-9]),
    (TokenizerConfig, "vocab_size", [256, 0], [257]),
    (TokenizerConfig, "tokenizer_sample_bytes", [0], [1]),
    (LMConfig, "dropout", [-0.1, 1.0, math.nan], [0.0, 0.99]),
    (OptimConfig, "lm_lr", [0.0, -1e-3, math.nan, math.inf], [1e-9]),
    (OptimConfig, "grad_clip", [0.0, math.nan], [1e-9]),
    (OptimConfig, "lr_warmup_steps", [-1], [0]),
    (OptimConfig, "weight_decay", [-0.1, math.nan], [0.0]),
    (OptimConfig, "adam_beta2", [0.0, 1.0, math.nan], [0.5]),
    (OptimConfig, "micro_batch", [-1], [0, 1]),
    (OptimConfig, "head_chunk_tokens", [-1], [0, 1]),
    (CriticConfig, "beta", [0.0, -1.0, math.nan, math.inf], [1e-9]),
    (CriticConfig, "gamma", [-0.1, 1.0, 1.5, math.nan], [0.0, 0.999]),
    (CriticConfig, "polyak_tau", [0.0, 1.1, math.nan], [1e-9, 1.0]),
    (CriticConfig, "q_lr", [0.0, math.inf], [1e-9]),
    (CriticConfig, "q_grad_clip", [0.0], [1e-9]),
    (CriticConfig, "q_weight_decay", [-0.1, math.nan, math.inf], [0.0]),
    (CriticConfig, "beta_lr", [0.0, math.nan, math.inf], [1e-9]),
    (CriticConfig, "effective_batch_fraction", [0.0, 1.1, math.nan], [1e-9, 1.0]),
    (CriticConfig, "accept_fraction", [0.0, 1.1, math.nan], [1e-9, 1.0]),
    (CriticConfig, "corr_for_full_sharpness", [0.0, math.nan, math.inf], [1e-9]),
    (CriticConfig, "uniform_share", [-0.1, 1.0, math.nan], [0.0, 0.99]),
    (CriticConfig, "dirichlet_concentration", [-0.1, math.nan, math.inf], [0.0]),
    (CriticConfig, "probe_windows", [0], [1]),
    (CriticConfig, "min_target_accept_rate", [-0.1, 1.0, math.nan], [0.0, 0.99]),
    (CriticConfig, "probe_decay", [-0.1, 1.0, math.nan], [0.0, 0.99]),
    (TrainConfig, "train_subset_size", [-1], [0]),
    (LogConfig, "topic_similarity_every", [-1], [0]),
    (LMConfig, "lora_rank", [-1], [0]),
    (LMConfig, "lora_alpha", [0], [1]),
    (LMConfig, "lora_dropout", [-0.1, 1.0, math.nan], [0.0, 0.99]),
    (TrainConfig, "max_read_ratio", [0, -1], [1]),
    (SelectConfig, "static_share", [0.0, 1.1, math.nan], [1e-9, 1.0]),
    (SelectConfig, "static_quantile", [-0.1, 1.0, math.nan], [0.0, 0.99]),
    (SelectConfig, "static_sharpness", [0.0, math.nan, math.inf], [1e-9]),
    (EvalConfig, "eval_tasks_every", [-1], [0]),
    (EvalConfig, "eval_tasks_limit", [-1], [0]),
    (EvalConfig, "eval_tasks_fewshot", [-2], [-1]),
    (TrainConfig, "reward_every", [0], [1]),
    (CriticConfig, "q_hidden", [-1], [0, 1]),
    (CriticConfig, "td_lambda", [-0.1, math.nan], [0.0]),
    (CriticConfig, "q_replay_size", [-1], [0]),
    (CriticConfig, "q_replay_batch", [0], [1]),
    (CriticConfig, "q_replay_updates", [0], [1]),
    (SelectConfig, "selector_temperature", [0.0, math.nan, math.inf], [1e-9]),
    (SelectConfig, "random_k", [0], [1]),
    (SelectConfig, "competence_initial", [0.0, 1.1, math.nan], [1e-9, 1.0]),
    (SelectConfig, "competence_steps", [-1], [0]),
    (SelectConfig, "bandit_exploration", [-0.1, 1.1, math.nan], [0.0, 1.0]),
    (SelectConfig, "bandit_lr", [0.0], [1e-9]),
    (LangevinConfig, "chains", [-1], [0]),
    (LangevinConfig, "query_tokens", [0], [1]),
    (LangevinConfig, "langevin_steps", [0], [1]),
    (LangevinConfig, "langevin_step_size", [0.0, -1.0, math.nan, math.inf], [1e-9]),
    (LangevinConfig, "langevin_noise_scale", [-0.1, math.nan], [0.0]),
    (LangevinConfig, "langevin_margin", [0.0, math.inf], [1e-9]),
    (LangevinConfig, "langevin_limit", [0.0, math.nan], [1e-9]),
    (LangevinConfig, "energy_temperature", [0.0, math.inf], [1e-9]),
    (LangevinConfig, "bridge_temperature_start", [0.0], [1e-9]),
    (LangevinConfig, "bridge_temperature_end", [0.0], [1e-9]),
    (LangevinConfig, "fluency", [-0.1, math.nan], [0.0]),
    (LangevinConfig, "target_pull", [-0.1, math.nan], [0.0]),
    (LangevinConfig, "search_every", [0], [1]),
    (LangevinConfig, "random_strings", [0], [1]),
    (RetrievalConfig, "buffer_size", [0], [32]),
    (RetrievalConfig, "buffer_initial", [-1], [0, 2048]),
    (RetrievalConfig, "ingest", [0], [1, 2048]),
    (RetrievalConfig, "retrieval_top_k", [0], [1]),
    (RetrievalConfig, "retrieval_temperature", [0.0, math.inf], [1e-9]),
    (RetrievalConfig, "direct_pool", [-1], [0]),
    (RetrievalConfig, "retrieval_probe", [-1], [0]),
    (RetrievalConfig, "refresh", [-1], [0]),
    (RetrievalConfig, "refresh_below", [0.0, 1.1, math.nan], [1e-9, 1.0]),
    (TrainConfig, "steps", [0], [1]),
    (TrainConfig, "num_candidates", [0, -1], [1]),
    (TrainConfig, "reward_windows", [0], [1]),
    (TrainConfig, "seed", [-1], [0]),
    (TrainConfig, "threads", [-1], [0]),
    (TrainConfig, "q_warmup_steps", [-1], [0]),
    (TrainConfig, "alternating_period", [-1], [0]),
    (LogConfig, "eval_every", [0], [1]),
    (LogConfig, "checkpoint_every", [0], [1]),
    (LogConfig, "checkpoint_keep", [0], [1]),
    (LogConfig, "log_windows_mb", [-1.0, math.inf], [0.0]),
]
REQUIRED: dict[type, dict[str, Any]] = {
    SourceConfig: {"name": "a", "path": "embedded:prose"},
    CriticConfig: {"td_into_theta": True},  # without it no --td-lambda but 1 is accepted
}


def make(section: type, **values: Any) -> Any:
    return section(**(REQUIRED.get(section, {}) | values))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [(section, name, value) for section, name, refused, _ in BOUNDS for value in refused],
)
def test_a_value_outside_its_bounds_is_refused_by_name(section: type, name: str, value: Any) -> None:
    with pytest.raises(CurriqError) as error:
        make(section, **{name: value})
    message = str(error.value)
    spelling = f"source 'a': {name}" if section is SourceConfig else flag(name)
    assert message.startswith(f"{spelling} = {value}: ")
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [(section, name, value) for section, name, _, accepted in BOUNDS for value in accepted],
)
def test_a_value_at_the_edge_is_accepted(section: type, name: str, value: Any) -> None:
    assert getattr(make(section, **{name: value}), name) == value


def test_every_number_has_a_tested_bound() -> None:
    """A new numeric setting must say what it refuses."""
    tested = {(section, name) for section, name, _, _ in BOUNDS}
    numeric = {
        (section, field.name)
        for section in [SourceConfig, *SECTIONS.values()]
        for field in dataclasses.fields(section)
        if get_type_hints(section)[field.name] in (int, float)
    }
    assert sorted(f"{s.__name__}.{n}" for s, n in numeric - tested) == []


# Messages: the value, the rule, the way out ----------------------------------------------------------

REFUSED: list[tuple[Callable[[], Any], list[str]]] = [
    (lambda: CriticConfig(beta=0.0), ["--beta = 0.0", "greater than 0", "1e-3"]),
    (lambda: CriticConfig(gamma=1.0), ["--gamma = 1.0", "[0, 1)", "0.99"]),
    (
        lambda: CriticConfig(credit="mixture", td_into_theta=True),
        ["--credit mixture", "--td-into-theta", "--credit sampled"],
    ),
    (
        lambda: CriticConfig(credit="mixture", q_replay_size=8),
        ["--credit mixture", "--q-replay-size 8", "--q-replay-size 0"],
    ),
    (lambda: CriticConfig(td_lambda=0.5), ["--td-lambda 0.5", "--td-into-theta", "--td-lambda 1"]),
    (
        lambda: RetrievalConfig(retrieval_draw="set", retrieval_duplicates="drop"),
        ["--retrieval-duplicates drop", "--retrieval-draw set", "--retrieval-duplicates redraw"],
    ),
    (lambda: TrainConfig(num_candidates=0), ["--num-candidates = 0", "at least 1"]),
    (lambda: TokenizerConfig(vocab_size=100), ["--vocab-size = 100", "at least 257"]),
    (lambda: LMConfig(model=""), ["--model", "empty", "folder"]),
    (lambda: SourceConfig(name="", path="x"), ["needs a name", "name=NAME"]),
    (lambda: SourceConfig(name="web", path=""), ["'web'", "needs a path", "path=PATH"]),
    (lambda: DataConfig(sources=()), ["--sources is empty", "name=…,path=…"]),
    (lambda: DataConfig(sources=(PROSE, PROSE)), ["'prose'", "twice", "its own name"]),
    (lambda: DataConfig(target="poems"), ["--target 'poems'", "'prose'", "weight=0"]),
    (lambda: DataConfig(target="ocr"), ["--target 'ocr'", "corruption=ocr", "clean"]),
    (
        lambda: DataConfig(sources=(dataclasses.replace(PROSE, weight=0.0),)),
        ["weight 0", "empty", "positive weight"],
    ),
    (lambda: SelectConfig(selector="rho"), ["--selector rho", "--reference-model", "reference"]),
    (
        lambda: RunConfig(train=TrainConfig(reward_windows=129)),
        ["--reward-windows 129", "--reward-set-size 128", "lower the one or raise the other"],
    ),
    (
        lambda: RunConfig(select=SelectConfig(selector="random-k", random_k=99)),
        ["--random-k 99", "--num-candidates 32"],
    ),
    (
        lambda: RunConfig().override(proposer="langevin", selector="uniform"),
        ["--proposer langevin", "--selector uniform", "soft-q", "--no-q-weighting"],
    ),
    (
        lambda: RunConfig().override(proposer="langevin", q_features=("mean", "loss")),
        ["--q-features mean loss", "--proposer langevin", "last, mean"],
    ),
    (
        lambda: RunConfig().override(
            proposer="random-queries", encoder="hidden-state", q_features=("source",)
        ),
        ["--encoder hidden-state", "--q-features source", "last, mean"],
    ),
    (
        lambda: RetrievalConfig(ingest=2049),
        ["--ingest 2049", "--buffer-size 2048", "lower the one or raise the other"],
    ),
    (
        lambda: RetrievalConfig(buffer_initial=2049),
        ["--buffer-initial 2049", "--buffer-size 2048", "lower the one or raise the other"],
    ),
    (
        lambda: RunConfig().override(encoder="hashing", refresh=8),
        ["--refresh 8", "--encoder hashing", "--refresh 0"],
    ),
    (
        lambda: RunConfig().override(proposer="langevin", chains=65, buffer_initial=64),
        ["--chains 65", "--buffer-initial 64", "lower the one or raise the other"],
    ),
    (
        lambda: RunConfig().override(proposer="langevin", query_start="buffer", query_tokens=129),
        ["--query-start buffer", "--query-tokens 129", "--window 128", "lower"],
    ),
    (
        lambda: RunConfig().override(proposer="langevin", prior=True),
        ["--prior", "--max-read-ratio 1", "--max-read-ratio 8"],
    ),
    (
        lambda: RunConfig().override(proposer="langevin", max_read_ratio=4),
        ["--max-read-ratio 4", "--proposer langevin", "add --prior"],
    ),
    (
        lambda: RunConfig().override(
            proposer="uniform-buffer", selector="filter", max_read_ratio=4, stream_shards=2
        ),
        ["--stream-shards 2", "--proposer uniform-buffer", "--stream-shards 1"],
    ),
    (
        lambda: RunConfig().override(proposer="langevin", q_features=("mean", "static_score")),
        ["--q-features mean static_score", "--proposer langevin"],
    ),
    (
        lambda: RunConfig().override(proposer="random-queries", query_start="best"),
        ["--query-start best", "--proposer random-queries", "greatest Q"],
    ),
    (
        lambda: RunConfig().override(proposer="vector-langevin", query_start="buffer"),
        ["--proposer vector-langevin", "--encoder", "hidden-state"],
    ),
    (
        lambda: RunConfig().override(
            proposer="vector-langevin", encoder="hidden-state", query_start="buffer"
        ),
        ["--proposer vector-langevin", "--no-q-layer-norm", "use --q-layer-norm"],
    ),
    (
        lambda: RunConfig().override(
            proposer="vector-langevin", encoder="hidden-state", q_layer_norm=True, q_features=("mean",)
        ),
        ["--query-start random", "--proposer vector-langevin", "buffer or reward"],
    ),
    (
        lambda: RunConfig().override(engine="fsdp", proposer="langevin"),
        ["--engine fsdp", "--proposer langevin", "--engine ddp"],
    ),
    (
        lambda: RunConfig().override(engine="hsdp", td_into_theta=True),
        ["--engine hsdp", "--td-into-theta", "--engine ddp"],
    ),
    (
        lambda: RunConfig().override(engine="fsdp", lora_rank=4),
        ["--engine fsdp", "--lora-rank 4", "--engine ddp"],
    ),
    (
        lambda: RunConfig().override(engine="fsdp", eval_tasks=("hellaswag",)),
        ["--engine fsdp", "--eval-tasks hellaswag", "curriq eval"],
    ),
    (lambda: RunConfig().override(bata=1.0), ["'bata'", "Did you mean 'beta'?", "Known:", "gamma"]),
    (lambda: from_dict({"critics": {}}), ["'critics'", "Did you mean 'critic'?", "Known:", "optim"]),
    (lambda: from_dict({"override": {}}), ["unknown setting 'override'"]),
    (lambda: from_dict({"critic": {"bta": 1}}), ["[critic]", "'bta'", "Did you mean 'beta'?"]),
    (lambda: from_dict({"critic": 3}), ["[critic]", "table", "3"]),
    (lambda: from_dict({"critic": {"beta": "warm"}}), ["--beta = 'warm'", "valid number"]),
    (lambda: from_dict({"train": {"steps": 1.5}}), ["--steps = 1.5", "integer"]),
    (
        lambda: from_dict({"select": {"selector": "best"}}),
        ["unknown --selector 'best'", "soft-q", "package.module:function"],
    ),
    (lambda: from_dict({"critic": {"gamma": 2}}), ["--gamma = 2", "[0, 1)"]),
    (
        lambda: from_dict({"data": {"sources": [{"name": "a", "path": "b", "wieght": 1}]}}),
        ["unknown source key 'wieght'", "Did you mean 'weight'?"],
    ),
    (lambda: from_dict({"data": {"sources": [{"path": "b"}]}}), ["--sources.0.name is missing"]),
    (
        lambda: from_dict({"data": {"sources": [{"name": "a", "path": "a.txt"}, {"path": "b.txt"}]}}),
        ["source 2 has no name: write name=NAME,path=b.txt."],
    ),
    (lambda: from_dict({"data": {"sources": ["name=a,path=b"]}}), ["data.sources", "[[data.sources]]"]),
    (lambda: from_dict({"data": {"sources": 5}}), ["data.sources = 5", "[[data.sources]]"]),
    (lambda: from_dict({"train": {"reward_windows": 500}}), ["--reward-windows 500"]),
]


@pytest.mark.parametrize(("build", "parts"), REFUSED)
def test_messages_name_the_value_the_rule_and_the_way_out(build: Callable[[], Any], parts: list[str]) -> None:
    with pytest.raises(CurriqError) as error:
        build()
    for part in parts:
        assert part in str(error.value)


def test_a_name_unlike_any_other_gets_no_guess() -> None:
    with pytest.raises(CurriqError) as error:
        RunConfig().override(zzzzzz=1)
    assert "Did you mean" not in str(error.value)


def test_hint_is_spelled_as_the_user_must_write_it() -> None:
    assert did_you_mean("proze", ["prose", "code"], "embedded:{}") == " Did you mean embedded:prose?"
    assert did_you_mean("proze", iter(["prose"])) == " Did you mean 'prose'?"
    assert did_you_mean("zzz", ["prose"]) == ""


@pytest.mark.parametrize(
    ("revision", "pinned"),
    [("", False), ("main", False), ("abc", False), ("0a" * 20, True), ("0a" * 21, False)],
)
def test_only_a_whole_commit_pins_a_source(revision: str, pinned: bool) -> None:
    assert SourceConfig(name="a", path="hub:b", hub_revision=revision).is_pinned == pinned


def test_random_k_may_exceed_the_candidates_where_it_is_not_used() -> None:
    assert RunConfig(select=SelectConfig(selector="uniform", random_k=99)).select.random_k == 99


def test_rho_with_a_reference_model_is_accepted() -> None:
    assert SelectConfig(selector="rho", reference_model="runs/reference").selector == "rho"


# The object ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [SourceConfig, RunConfig, *SECTIONS.values()])
def test_sections_are_frozen_keyword_only_and_hashable(section: type) -> None:
    config = make(section)
    name = dataclasses.fields(section)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    with pytest.raises(TypeError):
        section("prose")
    assert hash(config) == hash(make(section))


@pytest.mark.parametrize("section", [SourceConfig, *SECTIONS.values()])
def test_every_setting_has_a_help_text(section: type) -> None:
    """The docstring under a field is its help text on the command line."""
    source = inspect.getsource(section)
    for field in dataclasses.fields(section):
        after = source.split(f"\n    {field.name}: ", 1)[1].split("\n    ", 1)[1]
        assert after.lstrip(" )\n").startswith('"""'), f"{section.__name__}.{field.name} has no help text"


def test_override_reaches_every_section_and_leaves_the_original_alone() -> None:
    config = RunConfig()
    changed = config.override(
        window=64, vocab_size=512, dropout=0.1, lm_lr=1e-4, beta=0.5, seed=7, run_dir="x"
    )
    assert (changed.data.window, changed.tokenizer.vocab_size, changed.lm.dropout) == (64, 512, 0.1)
    assert (changed.optim.lm_lr, changed.critic.beta, changed.train.seed) == (1e-4, 0.5, 7)
    assert changed.log.run_dir == "x"
    assert changed.select is config.select
    assert config == RunConfig()


@pytest.mark.parametrize("name", ["steps", "lm_lr", "model", "held_out_share"])
def test_true_is_no_number(name: str) -> None:
    """In a TOML `steps = true` would be one step, and `lm_lr = true` a learning rate of 1."""
    with pytest.raises(CurriqError, match=f"{flag(name)} = true: a number or text belongs here"):
        RunConfig().override(**{name: True})


def test_true_is_no_weight() -> None:
    with pytest.raises(CurriqError, match="weight = true: a number belongs here"):
        RunConfig().override(sources=[{"name": "a", "path": "a.txt", "weight": True}], target="a")


def test_paths_may_be_objects() -> None:
    """A bare name is a folder all the same, and no model of the hub."""
    config = RunConfig().override(run_dir=Path("runs/mine"), model=Path("gpt2"))
    assert (config.log.run_dir, config.lm.model) == ("runs/mine", "./gpt2")
    assert SourceConfig(name="a", path=Path("data/a.txt")).path == "data/a.txt"  # ty: ignore


def test_override_validates_the_fields_and_their_combination() -> None:
    with pytest.raises(CurriqError, match="--steps = 0"):
        RunConfig().override(steps=0)
    with pytest.raises(CurriqError, match="--reward-windows 200"):
        RunConfig().override(reward_windows=200)
    assert RunConfig().override(reward_windows=200, reward_set_size=200).train.reward_windows == 200


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("selector", "best", r"unknown --selector 'best'.*soft-q"),
        ("steps", "many", r"--steps = 'many': .*integer"),
        ("steps", 1.5, r"--steps = 1\.5: .*integer"),
        ("beta", None, r"--beta = None: .*number"),
        ("sources", [{"name": "a", "pth": "x"}], "'pth'.*Did you mean 'path'"),
    ],
)
def test_override_refuses_values_of_the_wrong_type(name: str, value: Any, message: str) -> None:
    with pytest.raises(CurriqError, match=message):
        RunConfig().override(**{name: value})


def test_field_owners_finds_every_field() -> None:
    owners = field_owners()
    assert set(owners.values()) == set(SECTIONS)
    assert all(hasattr(getattr(RunConfig(), section), name) for name, section in owners.items())


def test_command_line_spelling() -> None:
    assert flag("q_lr") == "--q-lr"


# Files ----------------------------------------------------------------------------------------------


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    base = RunConfig().override(steps=7, beta=0.25)
    config = load_toml(write(tmp_path, "[critic]\ngamma = 0.5\n[train]\nseed = 3\n"), base)
    assert config == base.override(gamma=0.5, seed=3)


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert load_toml(write(tmp_path, "")) == RunConfig()


def test_whole_numbers_become_floats_where_a_float_is_meant(tmp_path: Path) -> None:
    beta = load_toml(write(tmp_path, "[critic]\nbeta = 2\n")).critic.beta
    assert isinstance(beta, float)
    assert beta == 2.0


def test_sources_of_a_file_replace_the_default_ones(tmp_path: Path) -> None:
    text = """
        [data]
        target = "books"
        [[data.sources]]
        name = "books"
        path = "books/*.txt.gz"
        documents = "file"
        [[data.sources]]
        name = "web"
        path = "web.jsonl"
        weight = 3
    """
    assert load_toml(write(tmp_path, text)).data.sources == (
        SourceConfig(name="books", path="books/*.txt.gz", documents="file"),
        SourceConfig(name="web", path="web.jsonl", weight=3.0),
    )


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert load_toml(write(tmp_path, "\ufeff[train]\nsteps = 9\n")).train.steps == 9


def test_errors_of_a_file_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(CurriqError, match=r"run\.toml: \[critic\] unknown setting 'bta'"):
        load_toml(write(tmp_path, "[critic]\nbta = 1\n"))
    with pytest.raises(CurriqError, match=r"run\.toml is not valid TOML: .*line 1"):
        load_toml(write(tmp_path, "[critic\n"))
    with pytest.raises(CurriqError, match=r"nowhere\.toml: there is no such file"):
        load_toml(tmp_path / "nowhere.toml")
    with pytest.raises(CurriqError, match="cannot be read"):
        load_toml(tmp_path)
    (tmp_path / "latin1.toml").write_bytes(b'[log]\nrun_dir = "\xe9"\n')
    with pytest.raises(CurriqError, match=r"latin1\.toml is not valid TOML"):
        load_toml(tmp_path / "latin1.toml")


def test_dictionary_holds_plain_values_only() -> None:
    def check(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(inner)

    check(to_dict(RunConfig()))


def test_environment_variables_in_the_path_of_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def path_of(written: str) -> str:
        table = {"name": "prose", "path": written}
        return from_dict({"data": {"sources": [table]}}).data.sources[0].path

    monkeypatch.setenv("CORPUS", "/big/disk")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert path_of("${CORPUS}/web-*.jsonl.gz") == "/big/disk/web-*.jsonl.gz"
    assert path_of("${NOWHERE:-data}/a/${CORPUS:-x}") == "data/a//big/disk"
    assert path_of("$CORPUS/{a}") == "$CORPUS/{a}"
    with pytest.raises(CurriqError, match=r"NOWHERE is not set; set it, or .* \$\{NOWHERE:-data\}"):
        path_of("${NOWHERE}/a")
    monkeypatch.setenv("NOWHERE", "")
    with pytest.raises(CurriqError, match=r"NOWHERE is empty; set it, or .* \$\{NOWHERE:-data\}"):
        path_of("${NOWHERE}/a")


@pytest.mark.parametrize("setting", ["model", "tokenizer", "encoder", "reference_model", "run_dir"])
def test_environment_variables_in_the_name_of_a_file_or_folder(
    monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv("MODELS", "/big/disk")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert RunConfig().override(**{setting: "${MODELS}/stories"}).value(setting) == "/big/disk/stories"
    with pytest.raises(CurriqError, match=r"model = '\$\{NOWHERE\}/a': .* \$\{NOWHERE:-data\}"):
        RunConfig().override(model="${NOWHERE}/a")


@pytest.mark.parametrize("file", sorted((EXPERIMENTS / "streams").glob("*.toml")), ids=lambda f: f.stem)
def test_development_streams_are_run_files(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURRIQ_DEV_DATA", "/dev-data")
    monkeypatch.setenv("CURRIQ_MADE_DATA", "/dev-data/made")
    config = load_toml(file, preset("recommended"))
    paths = [source.path for source in config.data.sources]
    assert all(path.startswith(("embedded:", "/dev-data/")) for path in paths)
    assert math.isclose(sum(source.weight for source in config.data.sources), 1)


def test_the_development_stream_of_corruption_is_the_default() -> None:
    assert load_toml(EXPERIMENTS / "streams" / "dirty.toml") == RunConfig()


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.toml")), ids=lambda f: f.stem)
def test_comparisons_of_the_experiments_are_plans(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read the folder of the development data: no text lies in the working folder, so no link to it is
    needed."""
    monkeypatch.setenv("CURRIQ_DEV_DATA", "/dev-data")
    monkeypatch.setenv("CURRIQ_MADE_DATA", "/dev-data/made")
    runs = load_plan(file).runs
    assert len(runs) >= 12
    for run in runs:
        paths = [source.path for source in run.config.data.sources]
        assert all(path.startswith(("embedded:", "/dev-data/")) for path in paths), run.name
        assert run.config.lm.model.startswith(("random:", "/dev-data/")), run.name


# Round trip ---------------------------------------------------------------------------------------

# Any text that TOML can hold: everything but lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=6)
POSITIVE = st.floats(min_value=1e-300, max_value=1e9)
SOURCES = st.lists(
    st.builds(
        SourceConfig,
        name=NAMES,
        path=TEXT.filter(bool),
        weight=st.floats(0, 1e9),
        text_field=TEXT,
        difficulty_field=TEXT,
        documents=st.sampled_from(["file", "paragraph", "line"]),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda source: source.name,
).filter(lambda sources: any(source.weight > 0 for source in sources))


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    sources = tuple(draw(SOURCES))
    selector = draw(st.sampled_from(sorted(set(SELECTORS) - {"rho"})))
    return RunConfig(
        data=DataConfig(
            sources=sources,
            target=draw(st.sampled_from([source.name for source in sources])),
            window=draw(st.integers(2, 10**6)),
            held_out_share=draw(st.floats(1e-9, 1 - 1e-9)),
        ),
        lm=LMConfig(model=draw(TEXT.filter(bool)), precision=draw(st.sampled_from(["fp32", "bf16"]))),
        optim=OptimConfig(lm_lr=draw(POSITIVE), weight_decay=draw(st.floats(0, 10))),
        critic=CriticConfig(beta=draw(POSITIVE), gamma=draw(st.floats(0, 1, exclude_max=True))),
        select=SelectConfig(selector=selector),
        train=TrainConfig(
            seed=draw(st.integers(0, 2**63 - 1)),
            num_candidates=draw(st.integers(8, 10**6)),
            max_read_ratio=8 if selector == "filter" else 1,
        ),
        log=LogConfig(run_dir=draw(TEXT), wandb=draw(TEXT), tensorboard=draw(st.booleans())),
    )


# beartype checks a random item of a container, which is no draw of the strategy.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@given(run_configs())
def test_toml_round_trip(config: RunConfig) -> None:
    assert from_dict(tomllib.loads(to_toml(config))) == config


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@given(run_configs(), run_configs())
def test_a_whole_file_leaves_nothing_of_its_base(config: RunConfig, base: RunConfig) -> None:
    assert from_dict(to_dict(config), base) == config


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    config = RunConfig().override(beta=1e-7, run_dir='a "quoted"\nname')
    assert load_toml(write(tmp_path, to_toml(config))) == config


def test_hints_of_all_sections_resolve() -> None:
    """The command line and the TOML reader build their parsers from the annotations."""
    for section in [SourceConfig, RunConfig, *SECTIONS.values()]:
        assert set(get_type_hints(section)) == {field.name for field in dataclasses.fields(section)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_defaults_and_its_own_settings(name):
    assert RunConfig().override(**own_settings(name)) == preset(name)
