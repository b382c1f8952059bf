"""Cost of one step: plain Hugging Face training, ours, the single pass, and two passes, on equal windows.

    python benchmarks/step_time.py                 # tiny model and GPT-2 124M shape, a few minutes on 2 cores
    python benchmarks/step_time.py --shapes tiny   # seconds
    python benchmarks/step_time.py --shapes gpt2-124M-gpu   # bfloat16, for a GPU

All arms run in one process on one model and one optimizer, interleaved in rotating order, so that drift
of the machine hits all alike; a ratio is the median over rounds of the ratio within a round, with the
quartiles. Peak memory comes from one step of each arm in a process of its own.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from common import Vocabulary, as_it_comes, synchronise

from curriq.config import CriticConfig, LMConfig, OptimConfig
from curriq.lm.beside import Beside
from curriq.lm.held_out import HeldOutReward
from curriq.lm.learner import Learner
from curriq.lm.load import load_language_model, pick_device
from curriq.lm.model import LanguageModel
from curriq.rng import Generators
from curriq.select.base import NoCritic, Uniform
from curriq.select.soft_q import SoftQ
from curriq.softq.critic import QInputs, TDCritic
from curriq.softq.temperature import FixedBeta
from curriq.train.loop import Components, LoopState, NoHeldOut, SampledAction, train_step
from curriq.types import Offer, Windows

SHAPES = {
    "tiny": {
        "model": "random:gpt2:hidden_size=128,num_hidden_layers=3,num_attention_heads=4",
        "vocabulary": 2048, "windows": 32, "tokens": 128, "micro_batch": 8, "chunk_tokens": 512,
        "precision": "fp32", "rounds": 40,
    },
    "gpt2-124M": {
        "model": "random:gpt2",
        "vocabulary": 50257, "windows": 8, "tokens": 128, "micro_batch": 4, "chunk_tokens": 512,
        "precision": "fp32", "rounds": 6,
    },
    "gpt2-124M-gpu": {
        "model": "random:gpt2",
        "vocabulary": 50257, "windows": 64, "tokens": 512, "micro_batch": 16, "chunk_tokens": 8192,
        "precision": "bf16", "rounds": 20,
    },
}  # fmt: skip
CPU_SHAPES = ("tiny", "gpt2-124M")
HF, PLAIN, SINGLE, TWO, REWARD = (
    "Hugging Face loop",
    "curriq, plain (uniform)",
    "curriq, single pass (soft Q)",
    "curriq, two passes (soft Q)",
    "curriq, single pass + reward (M = N/2)",
)
ARMS = (HF, PLAIN, SINGLE, TWO, REWARD)


class FixedProposer:
    """Offers the same windows at every step."""

    def __init__(self, offer: Offer) -> None:
        self.propose = lambda step: offer


class Bench(NamedTuple):
    """One function per arm that takes one optimizer step, and what they share."""

    arms: dict[str, Callable[[], None]]
    lm: LanguageModel
    windows: Windows


def build(shape: dict, device: torch.device) -> Bench:
    """All arms on one model, one optimizer and one set of windows; `shape["compute"]` has settings of the
    model beside its precision."""
    n, length = shape["windows"], shape["tokens"]
    lm = load_language_model(
        LMConfig(model=shape["model"], precision=shape["precision"], **shape.get("compute", {})),
        Vocabulary(shape["vocabulary"]),
        length,
        0,
        device,
    )
    sizes = {"micro_batch": shape["micro_batch"], "head_chunk_tokens": shape["chunk_tokens"]}
    optim = OptimConfig(lr_schedule="constant", **sizes)
    once, twice = (Learner(lm, optim, 1, two_passes=two) for two in (False, True))
    optimizer = twice.optimizer = once.optimizer
    generators = Generators(0)
    tokens = torch.randint(shape["vocabulary"], (n, length), generator=generators("tokens"))
    windows = Windows(tokens=tokens, ids=torch.arange(n), source=torch.zeros(n, dtype=torch.long))
    offer = Offer.of(windows).to(device)

    theirs = as_it_comes(lm)

    def hugging_face() -> None:
        """The usual loop: micro-batches with labels, accumulated, clipped, fused AdamW."""
        optimizer.zero_grad()
        for batch in offer.windows.tokens.split(shape.get("hugging_face_batch", shape["micro_batch"])):
            with lm.autocast():
                loss = theirs(input_ids=batch, labels=batch).loss
            (loss * (len(batch) / n)).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters, 1.0)
        optimizer.step()

    def loop(selector, critic, learner, held_out) -> Callable[[], None]:
        components = Components(
            proposer=FixedProposer(offer),
            selector=selector,
            critic=critic,
            learner=learner,
            held_out=held_out,
            theta_resets=lambda step: False,
            act=SampledAction(critic, generators("action")),
            beside=partial(Beside, device=device),
        )
        return partial(train_step, components, LoopState())

    reward = HeldOutReward(
        lm,
        windows,
        n // 2,
        generators("reward"),
    )
    temperature = FixedBeta(1.0)
    critic = TDCritic(CriticConfig(), QInputs(("last",), lm.width), temperature, device, generators)
    soft_q = partial(loop, SoftQ(critic, temperature), critic)
    arms = {
        HF: hugging_face,
        PLAIN: loop(Uniform(), NoCritic(), once, NoHeldOut()),
        SINGLE: soft_q(once, NoHeldOut()),
        TWO: soft_q(twice, NoHeldOut()),
        REWARD: soft_q(once, reward),
    }
    return Bench(arms, lm, offer.windows)


def measure(arms: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step of each arm, one entry per round."""
    for step in arms.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    gc.disable()
    for round_number in range(rounds):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            arms[name]()
            synchronise(device)
            seconds[name].append(time.perf_counter() - began)
        gc.collect()
    gc.enable()
    return seconds


def peak_memory(shape_name: str, arm: str, device: torch.device) -> float:
    """MB of resident (or GPU) memory that two steps add at the peak, in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", shape_name, arm, "--device", str(device)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(shape_name: str, arm: str, device: torch.device) -> None:
    arms = build(SHAPES[shape_name], device).arms
    before = memory(device, start=True)
    for _ in range(2):
        arms[arm]()
    print(json.dumps((memory(device) - before) / 1e6))


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


def memory(device: torch.device, start: bool = False) -> int:
    """Bytes in use now when `start`, which also forgets earlier peaks; otherwise the peak since then."""
    if device.type == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    if start:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak resident size
    name = "VmRSS" if start else "VmHWM"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def ratios(seconds: dict[str, list[float]], name: str, base: str) -> str:
    """Median and quartiles of the within-round ratio."""
    values = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=CPU_SHAPES)
    parser.add_argument("--rounds", type=int, help="rounds of interleaved steps (default: per shape)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for torch's default")
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
        seconds = measure(build(shape, device).arms, options.rounds or shape["rounds"], device)
        print(
            f"\n{name}: N = {shape['windows']}, T = {shape['tokens']}, V = {shape['vocabulary']}, "
            f"micro-batch {shape['micro_batch']}, {shape['precision']}, {hardware(device)}, "
            f"{len(seconds[HF])} rounds; ratios are median [quartiles]"
        )
        print(f"{'arm':40} {'s/step':>8}  {'to our plain':>22}  {'to Hugging Face':>22}  {'peak MB':>8}")
        for arm in ARMS:
            print(
                f"{arm:40} {statistics.median(seconds[arm]):8.3f}  {ratios(seconds, arm, PLAIN):>22}  "
                f"{ratios(seconds, arm, HF):>22}  {peak_memory(name, arm, device):8.0f}"
            )


if __name__ == "__main__":
    main()
