"""The fast paths of a step: compiled blocks, the fused loss in training, sizes that fit the memory."""

import logging

import pytest
import torch
from tests.helpers import TINY, in_pieces, random_offer, tiny_lm
from tests.runs import Finished, tiny
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention import SDPBackend

from curriq import parallel
from curriq.config import LMConfig, OptimConfig
from curriq.errors import CurriqError
from curriq.lm import sizing
from curriq.lm.compute import CompiledBlocks, attention_kernel, blocks_of
from curriq.lm.hardware import cpu_threads, named_peak
from curriq.lm.learner import Learner
from curriq.lm.mixture import single_pass
from curriq.lm.sizing import backing_off, even, fitting_micro_batch
from curriq.presets import own_settings
from curriq.train.run import prepare, train


def by_loss(part, features):
    return 3 * features.loss


def gradient(lm) -> torch.Tensor:
    single_pass(in_pieces(lm, 4, 16), random_offer(11), by_loss)
    return torch.cat([p.grad.flatten() for p in lm.parameters])


class TestFusedLoss:
    @pytest.mark.parametrize("architecture", TINY)
    def test_the_gradient_of_a_step_is_the_same(self, architecture):
        """Of tied heads and others; windows longer than a chunk of the head are cut within."""
        plain, fused = (tiny_lm(architecture, cross_entropy=way) for way in ("torch", "fused"))
        torch.testing.assert_close(gradient(fused), gradient(plain), rtol=1e-4, atol=1e-6)
        for lm in (plain, fused):
            single_pass(in_pieces(lm, 4, 3), random_offer(5), by_loss)
        for ours, theirs in zip(fused.parameters, plain.parameters, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)

    def test_a_run_learns_the_same(self, tmp_path):
        """Over steps of an optimizer that does not count its changes of the weights."""
        for way in ("torch", "fused"):
            train(tiny(cross_entropy=way, steps=12, beta=1.0, run_dir=str(tmp_path / way)))
        ours, theirs = (Finished(tmp_path / way) for way in ("fused", "torch"))
        for row, expected in zip(ours.rows, theirs.rows, strict=True):
            assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)
        assert theirs.rows[-1]["train/loss"] < theirs.rows[0]["train/loss"] - 0.1

    def test_a_head_that_does_more_goes_through_logits(self):
        wide = "hidden_size=16,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2"
        from tests.helpers import open_lm

        assert tiny_lm(cross_entropy="fused").kernels is not None
        granite = f"random:granite:{wide},num_key_value_heads=2,logits_scaling=8.0"
        assert open_lm(granite, cross_entropy="fused").kernels is None

    def test_on_a_cpu_it_is_asked_for(self):
        assert tiny_lm().kernels is None


class Block(nn.Module):
    """Counts how often it is run as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = 0

    def forward(self, x):
        self.plain += 1
        return x + 1


class TestCompiledBlocks:
    @pytest.fixture
    def block(self, monkeypatch):
        """A block whose compiled code adds 10."""
        monkeypatch.setattr(torch, "compile", lambda call, **options: lambda x: x + 10)
        return Block()

    def test_blocks_are_compiled_inside_alone(self, block):
        compiled = CompiledBlocks([block], must=True)
        x = torch.zeros(1)
        assert compiled.run(lambda: block(x)).item() == 10
        assert block(x).item() == 1
        assert compiled.run(lambda: block(x)).item() == 10
        assert block.plain == 1

    def test_a_full_micro_batch_runs_compiled_and_nothing_else(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda call, **options: lambda *x, **more: x[0] + 10)
        lm, plain = in_pieces(tiny_lm(compile="on"), 4, 64), in_pieces(tiny_lm(), 4, 64)
        tokens = random_offer(4).windows.tokens
        assert torch.equal(lm.trunk(tokens[:3]), plain.trunk(tokens[:3]))
        assert not torch.allclose(lm.trunk(tokens), plain.trunk(tokens))
        assert lm.network.state_dict().keys() == plain.network.state_dict().keys()

    def test_so_do_passes_that_recur(self, monkeypatch):
        """Those of every measurement on held-out text: what is left of them beside full micro-batches."""
        monkeypatch.setattr(torch, "compile", lambda call, **options: lambda *x, **more: x[0] + 10)
        lm, plain = in_pieces(tiny_lm(compile="on"), 4, 64), in_pieces(tiny_lm(), 4, 64)
        lm.recurring = frozenset({6, 8})
        tokens = random_offer(4).windows.tokens
        same = [torch.allclose(lm.trunk(tokens[:n]), plain.trunk(tokens[:n])) for n in (1, 2, 3)]
        assert same == [True, False, True]

    def test_a_run_that_measures_effects_names_its_passes(self):
        settings = own_settings("recommended") | {"probe_windows": 12, "reward_windows": 5}
        assert prepare(tiny(**settings)).lm.recurring == {12, 4, 5}
        assert prepare(tiny(selector="uniform")).lm.recurring == set()

    def test_what_cannot_be_compiled_runs_plainly_with_a_warning(self, monkeypatch, caplog):
        def refuse(*inputs):
            raise TorchDynamoException("no compiler here")

        monkeypatch.setattr(torch, "compile", lambda call, **options: refuse)
        block = Block()
        compiled = CompiledBlocks([block], must=False)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert compiled.run(lambda: block(torch.zeros(1))).item() == 1
        assert caplog.text.count("uncompiled") == 1
        assert "no compiler here" in caplog.text
        with pytest.raises(CurriqError, match="--compile off"):
            CompiledBlocks([block], must=True).run(lambda: block(torch.zeros(1)))

    def test_an_error_of_the_model_is_its_own(self, block, monkeypatch):
        compiled = CompiledBlocks([block], must=False)
        with pytest.raises(ZeroDivisionError):
            compiled.run(lambda: 1 / 0)

    def test_not_with_gradient_checkpointing(self):
        assert tiny_lm(compile="auto", gradient_checkpointing=True) is not None
        with pytest.raises(CurriqError, match="--gradient-checkpointing"):
            LMConfig(compile="on", gradient_checkpointing=True)

    @pytest.mark.slow
    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_the_gradient_of_a_step_is_the_same(self, architecture):
        assert len(blocks_of(tiny_lm(architecture).network)) == 2
        plain, compiled = (tiny_lm(architecture, compile=way) for way in ("off", "on"))
        torch.testing.assert_close(gradient(compiled), gradient(plain), rtol=1e-4, atol=1e-6)


def test_attention_kernels_fall_back_on_one_that_can():
    q = torch.randn(1, 1, 4, 8)
    expected = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    for name in ("flash", "cudnn", "math"):
        with attention_kernel(name):
            found = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        torch.testing.assert_close(found, expected)
    assert SDPBackend.MATH  # always the last of them


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("Some other device", None),
    ],
)
def test_peaks_of_known_devices(name, bf16):
    found = named_peak(name, "bf16")
    assert found == (None if bf16 is None else pytest.approx(bf16 * 1e12))


def test_threads_are_shared_out_on_a_cpu_and_few_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(parallel, "cores", lambda: 16)
    assert [cpu_threads(torch.device("cpu"), processes) for processes in (1, 3, 32)] == [16, 5, 1]
    assert [cpu_threads(torch.device("cuda"), processes) for processes in (1, 3)] == [1, 1]


class TestSizes:
    @pytest.mark.parametrize(
        ("windows", "most", "each"), [(64, 32, 32), (64, 30, 22), (7, 100, 7), (5, 1, 1)]
    )
    def test_passes_are_nearly_equally_full(self, windows, most, each):
        assert even(windows, most) == each

    def test_out_of_memory_halves_the_passes(self, caplog):
        lm = in_pieces(tiny_lm(), 12, 64)
        sizes = []

        def work():
            sizes.append(lm.pieces.micro_batch)
            if lm.pieces.micro_batch > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return "done"

        assert backing_off(lm, work) == "done"
        assert sizes == [12, 6, 3]
        assert "6" in caplog.text

    def test_one_window_that_does_not_fit_says_so(self):
        def work():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

        with pytest.raises(CurriqError, match="--gradient-checkpointing"):
            backing_off(in_pieces(tiny_lm(), 1, 64), work)

    def test_the_size_follows_from_what_one_and_two_windows_take(self, monkeypatch):
        """1 GB always and 100 MB per window, of 4 GB that are free, less what the optimizer will need."""
        lm = tiny_lm()
        weights = sum(p.numel() * p.element_size() for p in lm.parameters)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4_000_000_000, 0))
        taken = []
        monkeypatch.setattr(sizing, "_peak", lambda lm, work: (work(), 10**9 + 10**8 * taken[-1])[1])
        room = sizing.MARGIN * 4e9 - sizing.OPTIMIZER_COPIES * weights - 1e9
        windows = random_offer(64).windows
        found = fitting_micro_batch(lm, windows, lambda some: taken.append(len(some)))
        assert taken == [1, 2]
        assert found == even(64, int(room / 1e8))

    def test_nothing_is_compiled_for_the_trial(self, monkeypatch):
        """Not even where passes recur of which it would leave as many windows as are tried."""

        def refuse(*inputs, **options):
            raise AssertionError("compiled")

        monkeypatch.setattr(torch, "compile", lambda call, **options: refuse)
        lm = tiny_lm(compile="on")
        learner = Learner(lm, OptimConfig(), 10)
        learner._sized, lm.recurring = False, frozenset({8, 24})
        tried = []
        monkeypatch.setattr(
            "curriq.lm.learner.fitting_micro_batch",
            lambda lm, windows, passes: (
                [(tried.append(n), passes(windows.take(slice(n)))) for n in (1, 2)] and 4
            ),
        )
        learner._size(random_offer(8).windows)
        assert tried == [1, 2]
        assert lm.pieces.micro_batch == 4

    def test_auto_on_a_cpu_is_eight(self):
        assert OptimConfig(micro_batch=0).windows_at_once == 8
        lm = tiny_lm()
        Learner(lm, OptimConfig(), 10)
        assert lm.pieces == (8, 512)

    def test_auto_is_a_word(self):
        assert tiny(micro_batch="auto").optim.micro_batch == 0
        with pytest.raises(CurriqError, match="--micro-batch"):
            tiny(micro_batch="many")
