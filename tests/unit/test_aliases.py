"""Former names of settings, values and sources' keys are still read everywhere, with one notice each."""

import logging
import tomllib
from pathlib import Path

import pytest

from curriq.cli import parse_run_config
from curriq.config import FORMER, RunConfig, aliases, field_owners, flag, from_dict, load_toml, to_dict
from curriq.evaluate.plan import load_plan
from curriq.presets import preset

# Former settings, and the same by their names of today. A gate needs measured effects.
RENAMED = [
    ({"oversample": 4}, {"max_read_ratio": 4}),
    ({"target_kept": 0.5}, {"min_target_accept_rate": 0.5}),
    ({"full_calibration": 0.3}, {"corr_for_full_sharpness": 0.3}),
    ({"weight_jitter": 2.0}, {"dirichlet_concentration": 2.0}),
    ({"train_subset": 4}, {"train_subset_size": 4}),
    ({"replay_size": 8}, {"q_replay_size": 8}),
    ({"replay_batch": 4}, {"q_replay_batch": 4}),
    ({"replay_updates": 2}, {"q_replay_updates": 2}),
    ({"target_fraction": 0.4}, {"effective_batch_fraction": 0.4}),
    ({"target_fraction": 0.4, "oversample": 4}, {"accept_fraction": 0.4, "max_read_ratio": 4}),
    ({"target_fraction": 0.4, "max_read_ratio": 4}, {"accept_fraction": 0.4, "max_read_ratio": 4}),
    ({"temperature": "governed"}, {"temperature": "gated"}),
    ({"q_features": ["source", "likeness"]}, {"q_features": ["source", "static_score"]}),
    ({"q_features": ["dsir_score"]}, {"q_features": ["static_score"]}),
]
BASE = RunConfig().override(credit="counterfactual", q_features=("source",))


@pytest.fixture(autouse=True)
def notices(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, with every notice still to come."""
    aliases._warn.cache_clear()
    caplog.set_level(logging.WARNING, logger="curriq")
    return caplog


def words(settings: dict) -> list[str]:
    """Settings as flags."""
    return [
        word
        for name, value in settings.items()
        for word in (flag(name), *map(str, value if isinstance(value, list) else [value]))
    ]


@pytest.mark.parametrize(("former", "current"), RENAMED, ids=lambda value: " ".join(value))
class TestSettings:
    def test_override(self, former, current, notices):
        assert BASE.override(**former) == BASE.override(**current)
        assert all(" is now " in message for message in notices.messages)
        assert notices.messages

    def test_toml(self, former, current, tmp_path):
        owners = field_owners()
        for name, settings in (("former", former), ("current", current)):
            lines = [
                f"[{owners[new]}]\n{setting} = {value!r}"
                for (setting, value), new in zip(settings.items(), current, strict=True)
            ]
            (tmp_path / f"{name}.toml").write_text("\n".join(dict.fromkeys(lines)))
        assert load_toml(tmp_path / "former.toml", BASE) == load_toml(tmp_path / "current.toml", BASE)

    def test_command_line(self, former, current, tmp_path):
        base = ["--credit", "counterfactual", "--q-features", "source"]
        assert parse_run_config([*base, *words(former)]) == BASE.override(**current)

    def test_comparison(self, former, current, tmp_path):
        for name, settings in (("former", former), ("current", current)):
            lines = [f"{setting} = {value!r}" for setting, value in settings.items()]
            head = '[compare]\nseeds = [0]\nbaseline = "a"\n[streams.s]\ncredit = "counterfactual"\n'
            # With a difference that is read, whether or not the renamed setting is.
            text = "\n".join((head + 'q_features = ["source"]\n[arms.a]\n[arms.b]\nq_lr = 0.5', *lines))
            (tmp_path / f"{name}.toml").write_text(text)
        plans = [load_plan(tmp_path / f"{name}.toml", tmp_path / "out") for name in ("former", "current")]
        assert [run.config for run in plans[0].runs] == [run.config for run in plans[1].runs]


def test_all_former_names_are_tried_above():
    tried = {name for former, _ in RENAMED for name in former}
    assert tried >= set(FORMER) - set(aliases._REMOVED)
    assert not set(FORMER) & set(field_owners())


def test_target_fraction_follows_the_configuration_that_it_is_laid_over():
    recommended = preset("recommended")
    assert recommended.override(target_fraction=0.5) == recommended.override(accept_fraction=0.5)
    words = ["--preset", "recommended", "--target-fraction", "0.5"]
    assert parse_run_config(words) == recommended.override(accept_fraction=0.5)


def test_a_former_name_replaces_the_value_of_a_preset(tmp_path: Path):
    (tmp_path / "c.toml").write_text(
        '[compare]\nbase = "small"\nseeds = [0]\nbaseline = "a"\n[arms.a]\nselector = "uniform"\n'
        '[arms.b]\npreset = "recommended"\noversample = 5\ntarget_fraction = 0.5\n'
    )
    config = load_plan(tmp_path / "c.toml").runs[1].config
    assert config.train.max_read_ratio == 5
    assert config.critic.accept_fraction == 0.5


def test_each_notice_comes_once_and_names_both(notices):
    for _ in range(2):
        RunConfig().override(replay_size=8)
        RunConfig().override(credit="counterfactual", temperature="governed")
        aliases.rename_source_keys({"name": "a", "path": "b", "dirt": "ocr"})
    assert notices.messages == [
        "--replay-size is now --q-replay-size",
        "--temperature governed is now gated",
        "the source key dirt is now corruption",
    ]


def test_names_of_today_give_no_notice(notices):
    preset("recommended").override(accept_fraction=0.5, q_replay_size=4)
    assert notices.messages == []


def test_sources_of_an_old_run():
    old = [
        {"name": "prose", "path": "embedded:prose"},
        {"name": "ocr", "path": "embedded:prose", "dirt": "ocr"},
    ]
    assert from_dict({"data": {"sources": old}}).data.sources[1].corruption == "ocr"
    given = ["--sources", "name=prose,path=embedded:prose", "name=ocr,path=embedded:prose,dirt=ocr"]
    assert parse_run_config(given).data.sources[1].corruption == "ocr"


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({}, {"target_fraction": "accept_fraction"}),
        (
            {"oversample = 6": "oversample = 1", "weight_jitter = 0.0": "weight_jitter = 2.0"},
            {"target_fraction": "effective_batch_fraction"},
        ),
    ],
    ids=["stream filter", "weights"],
)
def test_the_whole_file_of_an_old_run(changes, moved, notices, tmp_path: Path):
    """Each setting of a file that the package wrote before the renaming lands under today's name."""
    text = (Path(__file__).parent / "former_config.toml").read_text(encoding="utf-8")
    for old, new in changes.items():
        text = text.replace(old, new)
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    config = load_toml(tmp_path / "config.toml")
    today = to_dict(RunConfig())
    moved = moved | {
        "oversample": "max_read_ratio",
        "target_kept": "min_target_accept_rate",
        "full_calibration": "corr_for_full_sharpness",
        "weight_jitter": "dirichlet_concentration",
        "train_subset": "train_subset_size",
        "replay_size": "q_replay_size",
        "replay_batch": "q_replay_batch",
        "replay_updates": "q_replay_updates",
    }
    values = {"governed": "gated", "likeness": "static_score"}
    for section, settings in tomllib.loads(text).items():
        for name in settings.keys() - {"sources", *aliases._REMOVED}:
            value = settings[name]
            value = [values.get(v, v) for v in value] if isinstance(value, list) else values.get(value, value)
            today[section][moved.get(name, name)] = value
    today["data"]["sources"] = tomllib.loads(text)["data"]["sources"]
    for source in today["data"]["sources"]:
        source |= {"corruption": source.pop("dirt"), "on_bad_row": "error"}
    today["data"]["held_out_sizes"] = "exact"  # as they were, because the file names them
    assert to_dict(config) == today
    gone = [message for message in notices.messages if "no effect any more" in message]
    assert [message.split()[0] for message in gone] == ["--swap-candidates", "--swap-top-k"]


def test_settings_that_left_the_package_are_named(notices, tmp_path: Path):
    """Read without effect, and with a notice unless they say what holds anyway."""
    for value in ("false", "true"):
        (tmp_path / "run.toml").write_text(f"[data]\nneedle = {value}\n[langevin]\nswap_top_k = 64\n")
        assert load_toml(tmp_path / "run.toml") == RunConfig()
    assert notices.messages == ["--needle has no effect any more: see experiments/needle.py"]
    aliases._warn.cache_clear()
    assert parse_run_config(["--needle", "--swap-candidates", "8"]) == RunConfig()
    assert [message.split()[0] for message in notices.messages[1:]] == ["--needle", "--swap-candidates"]
    aliases._warn.cache_clear()
    assert parse_run_config(["--preset", "recommended", "--repeat-discount", "0.5"]) == preset("recommended")
    assert notices.messages[-1].startswith("--repeat-discount has no effect any more")


@pytest.mark.parametrize("arguments", [["--oversample"], ["--oversample", "--steps", "3"]])
def test_a_former_name_without_its_value(arguments):
    with pytest.raises(ValueError, match=r"--max-read-ratio = '': .*valid integer"):
        parse_run_config(arguments)


def test_a_former_name_in_a_foreign_section_is_no_way_round_its_checks():
    with pytest.raises(ValueError, match=r"--q-replay-size = -1: it must be at least 0"):
        from_dict({"train": {"replay_size": -1}})
