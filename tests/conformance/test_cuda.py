"""A CUDA device must not change what a run learns: the tiny runs on it, against the same runs on the CPU.

The draws that choose windows come from CPU generators, so both see the same ones, and differ by rounding.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from tests.conformance.compositions import COMPOSITIONS, RETRIEVING
from tests.helpers import in_pieces, random_offer, tiny_lm
from tests.numerics.test_effects import Setting, effects_of, uniform
from tests.numerics.test_mixture import gradients
from tests.runs import SETTINGS, Finished, InterruptAt, tiny

from curriq.config import RunConfig, load_toml
from curriq.lm.mixture import single_pass
from curriq.presets import own_settings
from curriq.train.run import prepare, resume, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEPS = SETTINGS["steps"]
OTHER_NOISE = {name for name in COMPOSITIONS if "dropout" in name}
"""Dropout is drawn on the device. So is the noise of a search, and ties between windows are settled there."""


def final(config: RunConfig, folder: str) -> Finished:
    return Finished(train(config.override(run_dir=folder)).run_dir)


@pytest.fixture(scope="module")
def on_cuda(tmp_path_factory, configure):
    """Name of a composition → its run on the GPU; each is made once."""
    made: dict[str, Finished] = {}

    def get(name: str) -> Finished:
        if name not in made:
            folder = tmp_path_factory.mktemp("cuda")
            made[name] = final(configure(name).override(device="cuda"), str(folder))
        return made[name]

    return get


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_run_on_the_gpu_is_the_run_on_the_cpu_but_for_rounding(name, on_cuda, configure, tmp_path):
    if "faiss" in name:
        pytest.importorskip("faiss")
    ours, theirs = on_cuda(name), final(configure(name), str(tmp_path))
    first, last = 1e-5, 1e-2
    if name == "bf16":
        first, last = 1e-2, 3e-2
    assert [row["step"] for row in ours.rows] == [row["step"] for row in theirs.rows]
    assert ours.rows[0].keys() == theirs.rows[0].keys()
    assert all(math.isfinite(value) for row in ours.rows for value in row.values())
    if name in RETRIEVING | OTHER_NOISE:
        first, last = 0.1, 0.1
    else:
        assert ours.candidates["window_id"] == theirs.candidates["window_id"]
    assert ours.rows[0]["train/loss"] == pytest.approx(theirs.rows[0]["train/loss"], rel=first)
    assert ours.rows[-1]["validation/loss"] == pytest.approx(theirs.rows[-1]["validation/loss"], rel=last)
    assert ours.summary["test_loss"] == pytest.approx(theirs.summary["test_loss"], rel=last)


@pytest.mark.parametrize(
    "name", ["soft-q", "recommended", "steered", "langevin", "dropout", "bf16", "replay"]
)
def test_a_run_resumed_on_the_gpu_goes_on_as_it_would_have(name, on_cuda, configure, tmp_path):
    """Not to the bit: attention's gradient is summed in any order there."""
    run = prepare(configure(name).override(device="cuda", run_dir=str(tmp_path)))
    run.session.probes.append(InterruptAt(STEPS // 2))
    assert not run.session.train().finished
    assert resume(tmp_path).finished
    ours, theirs = Finished(tmp_path).rows[-1], on_cuda(name).rows[-1]
    assert ours["validation/loss"] == pytest.approx(theirs["validation/loss"], rel=1e-3)
    assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("micro_batch", [2, 11])
def test_the_gradient_of_the_mixture(dtype, micro_batch):
    """Against the CPU's in float64, with scores of hundreds of nats whose maximum grows late."""
    offer = random_offer(11)
    table = torch.linspace(-300, 5, 11, dtype=torch.float64).square().neg().sort().values

    def gradient(device: str, dtype: torch.dtype) -> torch.Tensor:
        lm = tiny_lm("gpt2", device=device)  # Llama takes its norms in float32
        lm.network.to(dtype)
        score_table = table.to(device)
        single_pass(
            in_pieces(lm, micro_batch, 16), offer.to(device), lambda part, features: score_table[part.rows]
        )
        return gradients(lm).double().cpu()

    expected, ours = gradient("cpu", torch.float64), gradient("cuda", dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (ours - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_measured_effects(precision):
    exact = Setting()
    rounded = Setting(precision=precision, device="cuda")
    ours = effects_of(rounded.probe, 0, rounded.offer.to("cuda"), rounded.mixture()).effect.double().cpu()
    theirs = effects_of(exact.probe, 0, exact.offer, exact.mixture()).effect
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > {"float32": 0.999, "bf16": 0.8}[precision]


def test_the_logits_of_a_batch_are_never_held_at_once():
    """V = 61 is small; a large vocabulary would make them the largest thing of all."""
    n, length, vocabulary = 64, 256, 32_000
    lm = tiny_lm("llama", window=length, vocabulary=vocabulary, device="cuda")
    offer = random_offer(n, length).to("cuda")
    sizes = {"micro_batch": n, "chunk_tokens": 2 * length}
    single_pass(in_pieces(lm, **sizes), offer, uniform)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    single_pass(in_pieces(lm, **sizes), offer, uniform)
    logits = 4 * n * length * vocabulary
    assert torch.cuda.max_memory_allocated() - before < logits / 4


def test_the_device_is_found_and_named(tmp_path):
    run = final(tiny(selector="uniform", steps=1, device="auto", threads=0), str(tmp_path))
    about = json.loads((run.folder / "environment.json").read_text())
    assert about["device"].startswith("cuda")
    assert about["hardware"] == torch.cuda.get_device_name()
    assert load_toml(run.folder / "config.toml").train.threads == 1


def test_a_measurement_is_queued_without_waiting_for_the_device():
    """The host goes on to propose the next windows while the device measures."""
    setting = Setting(precision="bf16", device="cuda")
    mixture = setting.mixture()
    expected = effects_of(setting.probe, 0, setting.offer, mixture)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        setting.probe.begin(0, setting.offer)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    found = setting.probe.before(0, setting.offer, mixture)
    assert torch.isfinite(found.effect).all()
    assert found.effect.shape == expected.effect.shape


def test_windows_proposed_beside_the_passes_are_the_same(tmp_path):
    """On a stream of their own, with counts of n-grams that the step before has left on the device."""
    settings = own_settings("recommended") | {"reward_every": 4, "probe_windows": 4}
    runs = {}
    for beside in (True, False):
        run = prepare(tiny(**settings, steps=16, device="cuda", run_dir=str(tmp_path / str(beside))))
        assert run.session.components.proposes_early
        run.session.components = replace(run.session.components, proposes_early=beside)
        run.session.train()
        runs[beside] = Finished(run.session.run_dir)
    ours, theirs = (runs[way].candidates for way in (True, False))
    assert ours["window_id"] == theirs["window_id"]
    assert ours["accept_prob"] == theirs["accept_prob"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4, nan_ok=True)


def test_compiled_blocks_learn_the_same(tmp_path):
    runs = {}
    for way in ("off", "on"):
        config = tiny(device="cuda", compile=way, micro_batch=4, selector="uniform", steps=12)
        runs[way] = final(config, str(tmp_path / way))
    for row, expected in zip(runs["on"].rows, runs["off"].rows, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-3)
