"""One step of softmax-relaxed Langevin dynamics: ours against straightforward autograd, and the floor.

    python benchmarks/langevin.py                  # GPT-2 124M shape, a few minutes on 2 cores
    python benchmarks/langevin.py --shapes small   # seconds

The straightforward version keeps λ as a leaf: softmax, matrix product, the Hugging Face model as it comes,
with checkpointed blocks whose parameters want gradients, `backward`, clipping per chain, and an update out of
place; a second one freezes the parameters. All run in one process in rotating order; times are medians over
rounds, ratios medians of the ratio within a round, with quartiles. Peak memory comes from one step in a
process of its own, and does not count the model and λ. The floor is the step's float32 matrix products alone:
two of the bridge, and two (forward, and backward into the input) of every matrix of the trunk.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Vocabulary, as_it_comes, synchronise
from torch import nn

from curriq.config import LMConfig
from curriq.langevin.dynamics import (
    SoftTokens,
    StepRule,
    bridge_gradient,
    langevin_step_,
    one_hot_logits,
    soft_embed,
)
from curriq.langevin.energy import Energy
from curriq.lm.embeddings import InputEmbeddings, frozen
from curriq.lm.load import load_language_model, pick_device
from curriq.rng import Generators
from curriq.softq.critic import QNetwork

SHAPES = {
    "gpt2-124M": {"model": "random:gpt2", "vocabulary": 50257, "chains": 8, "tokens": 32, "rounds": 5},
    "small": {
        "model": "random:gpt2:hidden_size=128,num_hidden_layers=3,num_attention_heads=4",
        "vocabulary": 8192, "chains": 8, "tokens": 32, "rounds": 10,
    },
}  # fmt: skip
NAIVE, FROZEN, OURS, FLOOR = "autograd", "autograd, θ frozen", "curriq", "products alone"
HALF_BRIDGE, HALF = "curriq, bf16 bridge", "curriq, bf16"
ARMS = (NAIVE, FROZEN, OURS, HALF_BRIDGE, HALF, FLOOR)
TEMPERATURE, RULE = 1.0, StepRule(step_size=20.0, limit=1.0, gradient="clip", noise_scale=0.1)


class Bench:
    """The model, λ, and one function per arm that takes one step."""

    def __init__(self, shape: dict, device: torch.device) -> None:
        self.shape = shape
        self.lm = load_language_model(
            LMConfig(model=shape["model"]), Vocabulary(shape["vocabulary"]), shape["tokens"], 0, device
        )
        self.inputs = InputEmbeddings(self.lm)
        self.q = QNetwork(self.lm.width, generator=Generators(0)("q")).to(device)
        self.energy = Energy(
            self.lm, self.inputs, lambda f: self.q(f.hidden), list(self.q.parameters()), shape["chains"]
        )
        self.plain = as_it_comes(self.lm)
        self.plain.activation_checkpointing_enable()
        start = torch.randint(
            shape["vocabulary"], (shape["chains"], shape["tokens"]), generator=Generators(0)("start")
        )
        self.logits = one_hot_logits(start.to(device), shape["vocabulary"], 6.0)
        self.generator = torch.Generator(device).manual_seed(0)
        self.half = self.inputs.weight.bfloat16()

    def arms(self) -> dict[str, Callable[[], None]]:
        return {
            NAIVE: self.autograd,
            FROZEN: self.autograd_frozen,
            OURS: lambda: self.ours(self.inputs.weight),
            HALF_BRIDGE: lambda: self.ours(self.half),
            HALF: lambda: self.ours(self.half, trunk=torch.bfloat16),
            FLOOR: self.products,
        }

    def autograd(self) -> None:
        leaf = self.logits.detach().requires_grad_()
        gradient = self.autograd_gradient(leaf)
        norms = gradient.flatten(1).norm(dim=1)
        clipped = gradient * (RULE.limit / norms.clamp_min(1e-30)).clamp(max=1.0)[:, None, None]
        noise = torch.randn(leaf.shape, generator=self.generator, device=leaf.device) * RULE.noise_scale
        self.logits = (leaf + RULE.step_size / 2 * clipped + RULE.step_size**0.5 * noise).detach()

    def autograd_gradient(self, leaf: torch.Tensor) -> torch.Tensor:
        embeddings = torch.softmax(leaf / TEMPERATURE, dim=-1) @ self.plain.get_input_embeddings().weight
        states = self.plain.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        self.q(states[:, -1]).sum().backward()
        self.plain.zero_grad()
        self.q.zero_grad()
        assert leaf.grad is not None
        return leaf.grad

    def autograd_frozen(self) -> None:
        with frozen(self.plain.parameters()), frozen(self.q.parameters()):
            self.autograd()

    def ours(self, weight: torch.Tensor, trunk: torch.dtype | None = None) -> None:
        soft = soft_embed(self.logits, TEMPERATURE, weight)
        gradient = self.gradient(soft, trunk)
        langevin_step_(self.logits, TEMPERATURE, weight, soft, gradient, RULE, self.generator)

    def gradient(self, soft: SoftTokens, trunk: torch.dtype | None) -> torch.Tensor:
        """∂E/∂ẽ, with the trunk's products in `trunk`, as --precision bf16 takes them."""
        with torch.autocast(self.logits.device.type, dtype=trunk, enabled=trunk is not None):
            return self.energy.point(soft.embeddings).gradient

    def errors(self) -> list[float]:
        """Relative error of the gradient with respect to λ: of ours, with the bf16 bridge, all in bf16."""
        exact = self.autograd_gradient(self.logits.detach().requires_grad_())
        found = []
        for weight, trunk in ((self.inputs.weight, None), (self.half, None), (self.half, torch.bfloat16)):
            soft = soft_embed(self.logits, TEMPERATURE, weight)
            ours = bridge_gradient(self.logits, TEMPERATURE, weight, soft, self.gradient(soft, trunk))
            found.append(((ours - exact).norm() / exact.norm()).item())
        return found

    def matrices(self) -> list[torch.Tensor]:
        """[in, out] of each product of a step: those of the trunk, the embeddings, and their transposes."""
        tables = {id(m.weight) for m in self.lm.network.modules() if isinstance(m, nn.Embedding)}
        trunk = [p.detach() for p in self.lm.network.parameters() if p.dim() == 2 and id(p) not in tables]
        return [m for matrix in (*trunk, self.inputs.weight) for m in (matrix, matrix.T)]

    def products(self) -> None:
        rows = self.shape["chains"] * self.shape["tokens"]
        for matrix in self.matrices():
            torch.zeros(rows, len(matrix), device=matrix.device) @ matrix


def measure(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm, one entry per round."""
    arms = bench.arms()
    for step in arms.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(rounds):
        turn = number % len(ARMS)
        for name in ARMS[turn:] + ARMS[:turn]:
            began = time.perf_counter()
            arms[name]()
            synchronise(bench.logits.device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_memory(shape_name: str, arm: str, device: torch.device) -> float:
    """MB of resident (or GPU) memory that a step adds at the peak, in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", shape_name, arm, "--device", str(device)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(shape_name: str, arm: str, device: torch.device) -> None:
    bench = Bench(SHAPES[shape_name], device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.arms()[arm]()
        print(json.dumps((torch.cuda.max_memory_allocated() - before) / 1e6))
        return
    Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak resident size
    before = resident("VmRSS")
    bench.arms()[arm]()
    print(json.dumps((resident("VmHWM") - before) / 1e6))


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def ratio(over: list[float], under: list[float]) -> str:
    """Median and quartiles of the within-round ratio."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["gpt2-124M"])
    parser.add_argument("--rounds", type=int, help="rounds (default: per shape)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for torch's default")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--memory-of", nargs=2, metavar=("SHAPE", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print_peak_memory(*options.memory_of, device)
        return
    for name in options.shapes:
        shape = SHAPES[name]
        bench = Bench(shape, device)
        flops = 2 * shape["chains"] * shape["tokens"] * sum(matrix.numel() for matrix in bench.matrices())
        exact, half_bridge, half = bench.errors()
        seconds = measure(bench, options.rounds or shape["rounds"])
        print(
            f"\n{name}: K = {shape['chains']}, L = {shape['tokens']}, V = {shape['vocabulary']}, "
            f"e = {bench.inputs.width}, {device}, {torch.get_num_threads()} threads, "
            f"{len(seconds[OURS])} rounds; ratios are median [quartiles]\n"
            f"floor: {flops / 1e9:.1f} GFLOP of matrix products; λ has {bench.logits.nbytes / 1e6:.0f} MB\n"
            f"relative error of the gradient against autograd: {exact:.1e}; with the bf16 bridge "
            f"{half_bridge:.1e}; with the trunk in bf16 too {half:.1e}"
        )
        nothing = dict.fromkeys(ARMS, float("nan"))
        memory = nothing if options.no_memory else {arm: peak_memory(name, arm, device) for arm in ARMS}
        print(
            f"{'arm':22} {'s/step':>7} {'times faster':>20} {'share of floor':>20} {'peak MB':>8} "
            f"{'memory':>7}"
        )
        for arm in ARMS:
            took = statistics.median(seconds[arm])
            print(
                f"{arm:22} {took:7.3f} {ratio(seconds[NAIVE], seconds[arm]):>20} "
                f"{ratio(seconds[FLOOR], seconds[arm]):>20} {memory[arm]:8.0f} "
                f"{memory[arm] / memory[NAIVE]:7.2f}"
            )


if __name__ == "__main__":
    main()
