"""One GPU in one command: first whether the fast paths are right, then how fast a step is.

    python benchmarks/gpu.py --budget 220               # GPT-2 124M, T = 1,024, bfloat16, on a GPU
    python benchmarks/gpu.py --size tiny --budget 100   # the same program on a CPU

Correctness: the fused loss against float64, the gradient of the single pass against that of two passes,
compiled against plain blocks, and a short run against the same run on the CPU. Then seconds, tokens/s and
the share of the device's peak (MFU: 6 operations per parameter and token, and attention's, without
halving it for causality) of plain training, the single pass with soft Q, the preset `recommended` with its
reading, by one process and in four shards, and a step of Langevin-RAG. Beside them: plain training with
cudnn's attention, a Hugging Face loop, the Hugging Face Trainer, and a tuned plain loop (compiled blocks,
compiled loss, padded vocabulary, fused AdamW).

Arms that are compared take turns in one process; a ratio is the median over rounds of the ratio within a
round. Each section has its own try: what fails is named at the end, and the exit status is 1. No section
starts, and no round is taken, when the budget is spent.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import step_time
import torch
import torch.nn.functional as F
from common import SOURCES, Vocabulary, synchronise, write_corpus
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from curriq.config import LMConfig, RunConfig
from curriq.lm.compute import attention_kernel, blocks_of, row_kernels
from curriq.lm.hardware import cpu_threads, peak_flops
from curriq.lm.linear_loss import linear_cross_entropy, padded_copy
from curriq.lm.load import load_language_model, pick_device
from curriq.lm.mixture import single_pass, two_pass, weighted_gradient
from curriq.lm.model import LanguageModel, Pieces, forward_flops
from curriq.presets import own_settings, preset
from curriq.train.run import Run, prepare
from curriq.types import Offer, Windows

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model": "random:gpt2", "vocabulary": 50257, "windows": 64, "tokens": 1024, "micro_batch": 64,
        "chunk_tokens": 0, "precision": "bf16", "hugging_face_batch": 16,
        "corpus_mb": 24, "trained_vocabulary": 8192,
    },
    "tiny": {
        "model": "random:gpt2:hidden_size=64,num_hidden_layers=2,num_attention_heads=2", "vocabulary": 1001,
        "windows": 8, "tokens": 64, "micro_batch": 4, "chunk_tokens": 0, "precision": "bf16", "corpus_mb": 1,
        "trained_vocabulary": 512,
    },
}  # fmt: skip
TUNED, TRAINER = "tuned plain loop", "Hugging Face Trainer"
VARIANTS: dict[str, tuple[dict[str, str], dict[str, int]]] = {
    "curriq, plain, --attention cudnn": ({"attention": "cudnn"}, {}),
    "curriq, plain, --attention flash": ({"attention": "flash"}, {}),
    "curriq, plain, --micro-batch 32": ({}, {"micro_batch": 32}),
}
"""Other settings of plain training that are timed beside those of the command line."""


@dataclass
class Bench:
    """What all sections read.

    Attributes:
        ends: moment at which the budget is spent.
        failed: sections that raised.
    """

    size: dict[str, Any]
    device: torch.device
    compute: dict[str, str]
    folder: Path
    ends: float
    peak: float | None
    rounds: int
    failed: list[str] = field(default_factory=list)
    flops_per_token: float = 0.0

    def section(self, name: str, work: Callable[["Bench"], None], *, needs: float = 0.0) -> None:
        """Run a section, unless less time than it needs at the least is left."""
        if self.left < needs:
            say(f"\n# {name}: left out, {self.left:.0f} s are left")
            return
        say(f"\n# {name} ({self.left:.0f} s are left)")
        began = time.perf_counter()
        try:
            work(self)
        except Exception:
            self.failed.append(name)
            say(traceback.format_exc())
        say(f"({time.perf_counter() - began:.1f} s)")
        torch.compiler.reset()  # torch compiles a function for a few shapes only, and sections have their own
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def language_model(self, **settings: Any) -> LanguageModel:
        """A model of this size; settings are those of `LMConfig`."""
        config = LMConfig(**{"model": self.size["model"], "precision": self.size["precision"]} | settings)
        return load_language_model(
            config, Vocabulary(self.size["vocabulary"]), self.size["tokens"], 0, self.device
        )

    def offer(self, windows: int, tokens: int) -> Offer:
        generator = torch.Generator().manual_seed(1)
        shape = (windows, tokens)
        made = Windows(
            tokens=torch.randint(self.size["vocabulary"], shape, generator=generator),
            ids=torch.arange(windows),
            source=torch.zeros(windows, dtype=torch.long),
        )
        return Offer.of(made).to(self.device)

    def rate(self, name: str, seconds: float, tokens: int, ratio: str = "") -> str:
        """A row of a table of rates."""
        mfu = "–"
        if self.peak and self.flops_per_token:
            mfu = f"{100 * self.flops_per_token * tokens / seconds / self.peak:.1f} %"
        return f"{name:40} {seconds:9.4f} s {tokens / seconds:12,.0f} tokens/s  MFU {mfu:>7}  {ratio}"


def say(text: str) -> None:
    print(text, flush=True)


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


# Correctness ------------------------------------------------------------------------------------------


def fused_loss(bench: Bench) -> None:
    """Losses and gradients in the compute dtype against float64, beside those of torch's own functions."""
    rows, entries, width = (512, 50257, 768) if bench.device.type == "cuda" else (64, 1001, 64)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(bench.device)
    weight = (torch.randn(entries, width, generator=generator) / width**0.5).to(bench.device)
    targets = torch.randint(entries, (rows,), generator=generator).to(bench.device)
    targets[::5] = -100
    shares = torch.rand(rows, generator=generator).to(bench.device)
    kernels = row_kernels("fused", bench.device)
    assert kernels is not None

    def plain(dtype: torch.dtype) -> list[Tensor]:
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        logits = (h @ w.T).to(torch.promote_types(dtype, torch.float32))
        losses = F.cross_entropy(logits, targets, reduction="none")
        return [losses, *torch.autograd.grad((shares.to(losses) * losses).sum(), (h, w))]

    def ours(dtype: torch.dtype) -> list[Tensor]:
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        losses = linear_cross_entropy(h, w, padded_copy(w, dtype), targets, kernels)
        return [losses, *torch.autograd.grad((shares * losses).sum(), (h, w))]

    exact = plain(torch.float64)
    for dtype, most in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
        for name, found in {"torch": plain(dtype), "fused": ours(dtype)}.items():
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
            shown = ", ".join(f"{e:.1e}" for e in errors)
            say(f"{name:6} {dtype!s:15} relative error of losses, ∂hidden, ∂weight: {shown}")
            require(max(errors) < most, f"{name} in {dtype}: {errors}")


def single_against_two(bench: Bench) -> None:
    """The gradient of the single pass, in float32, with both ways to the loss."""
    offer = bench.offer(7, min(128, bench.size["tokens"]))
    for way in ("torch", "fused"):
        lm = bench.language_model(precision="fp32", compile="off", cross_entropy=way)
        lm.pieces = Pieces(3, 256)
        gradients = []
        for run in (single_pass, two_pass):
            run(lm, offer, lambda part, features: 3 * features.loss + part.rows.to(features.loss))
            gradients.append([p.grad.clone() for p in lm.parameters if p.grad is not None])
        gap = distance(*gradients)
        say(f"{way:6} single pass against two passes, relative distance of the gradients: {gap:.1e}")
        require(gap < 1e-3, f"{way}: {gap}")


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    apart = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
    return (apart / torch.stack([b.norm() for b in expected]).norm()).item()


def compiled_against_plain(bench: Bench) -> None:
    """Losses and gradients of a micro-batch: plain blocks and torch's loss in float32, against the settings
    that are timed; and plain blocks in the same precision, whose error is the one to expect."""
    plain = {"compile": "off", "cross_entropy": "torch", "attention": "auto"}
    n, length = bench.size["micro_batch"], bench.size["tokens"]
    ways = {
        "float32, plain": (4, {"precision": "fp32", **plain}),
        f"{bench.size['precision']}, plain": (4, plain),
        f"{bench.size['precision']}, as timed": (n, bench.compute),
    }
    windows = bench.offer(n, length).windows
    exact: tuple[Tensor, list[Tensor]] | None = None
    for name, (batch, settings) in ways.items():
        lm = bench.language_model(**settings)
        lm.pieces = Pieces(batch, 8 * length)
        weights = torch.full((n,), 1 / n, device=bench.device)
        mean = weighted_gradient(lm, windows, weights)
        found = lm.window_losses(windows), [p.grad for p in lm.parameters if p.grad is not None]
        exact = exact or found
        gap = (found[0] - exact[0]).abs().max().item()
        error = distance(found[1], exact[1])
        say(f"{name:20} mean loss {mean:.5f}, furthest {gap:.1e}; gradient off by {error:.1e}")
        require(gap < 2e-2 and error < 0.1, f"{name}: {gap}, {error}")


def learns_the_same(bench: Bench) -> None:
    """Twelve steps of the default method, in float32 on the CPU and as timed on the device."""
    rows = {}
    for name, settings in {
        "cpu, fp32": {"device": "cpu", "compile": "off", "cross_entropy": "torch"},
        "device, fp32": {"device": str(bench.device), "compile": "off"},
        "device, as timed": {
            "device": str(bench.device), "precision": bench.size["precision"], **bench.compute,
            "compile": "on" if bench.compute["compile"] == "on" else "off",  # `compiled` has looked at that
        },
    }.items():  # fmt: skip
        model = "random:gpt2:hidden_size=64,num_hidden_layers=2,num_attention_heads=2"
        config = corpus_config(bench).override(
            **settings, model=model, window=64, num_candidates=8, micro_batch=8, steps=13,
            lr_warmup_steps=2, reward_windows=8,
        )  # fmt: skip
        run = prepare(config)
        rows[name] = [row["train/mean_loss"] for row in run.session.rehearse(12)]
        say(f"{name:18} losses {' '.join(f'{loss:.4f}' for loss in rows[name])}")
    base = rows["cpu, fp32"]
    require(base[-1] < base[0] - 0.1, "nothing is learnt")
    for name, most in (("device, fp32", 2e-3), ("device, as timed", 3e-2)):
        gap = max(abs(a - b) / b for a, b in zip(rows[name], base, strict=True))
        require(gap < most, f"{name}: losses differ by {gap:.1e} of their value")


# Plain training and the single pass, on windows that lie on the device -----------------------------------


def head_loss(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    logits = hidden[:, :-1] @ weight.T
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def tuned(bench: Bench, base: LanguageModel, tokens: Tensor) -> Callable[[], None]:
    """A plain loop as one writes it for speed."""
    config = base.network.config.__class__.from_dict(base.network.config.to_dict())
    config.vocab_size = -(-config.vocab_size // 128) * 128
    network = AutoModelForCausalLM.from_config(config).to(bench.device)
    compiled = bench.compute["compile"] != "off"
    loss_of = torch.compile(head_loss, dynamic=False) if compiled else head_loss
    for block in blocks_of(network) if compiled else ():
        block.compile(dynamic=False)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    trunk, weight = network.get_decoder(), network.get_output_embeddings().weight

    def step() -> None:
        optimizer.zero_grad()
        for batch in tokens.split(bench.size["micro_batch"]):
            with base.autocast():
                loss = loss_of(trunk(input_ids=batch, use_cache=False).last_hidden_state, weight, batch)
            (loss * (len(batch) / len(tokens))).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def steps_on_device(bench: Bench) -> None:
    """Seconds per step of the arms of `step_time.py`, beside the tuned loop."""
    shape = bench.size | {"compute": bench.compute}
    built = step_time.build(shape, bench.device)
    bench.flops_per_token = 3 * forward_flops(built.lm, shape["tokens"]) / shape["tokens"]
    wanted = (step_time.PLAIN, step_time.SINGLE, step_time.HF)
    arms = {name: built.arms[name] for name in wanted}
    arms[TUNED] = tuned(bench, built.lm, built.windows.tokens)
    for name, (settings, sizes) in VARIANTS.items():
        changed = shape | sizes | {"compute": bench.compute | settings}
        if changed != shape:
            arms[name] = step_time.build(changed, bench.device).arms[step_time.PLAIN]
    for name in list(arms):
        began = time.perf_counter()
        try:
            for _ in range(3):  # the reference of the single pass is there from the third step on
                arms[name]()
            synchronise(bench.device)
        except Exception:  # an arm that fails must not take the others with it
            say(traceback.format_exc(limit=3))
            bench.failed.append(name)
            del arms[name]
            continue
        say(f"{name}: {time.perf_counter() - began:.1f} s for its first three steps")
    seconds = in_turn(bench, arms, bench.rounds, share=0.5)
    table(bench, seconds, shape["windows"] * shape["tokens"], base=step_time.PLAIN)
    memory(bench)
    loss = built.lm.window_losses(built.windows).mean().item()
    uniform = math.log(shape["vocabulary"])
    say(f"loss of these windows after training on them: {loss:.3f}; of guessing: {uniform:.3f}")
    require(loss < uniform, "steps do not learn the windows that they train on")
    profile(bench, {name: arms[name] for name in (step_time.PLAIN, step_time.SINGLE) if name in arms})


def in_turn(
    bench: Bench, arms: dict[str, Callable[[], None]], rounds: int, share: float
) -> dict[str, list[float]]:
    """Seconds of each arm, round by round, until the rounds or the share of the time left are used up."""
    stop = time.monotonic() + share * bench.left
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            arms[name]()
            synchronise(bench.device)
            seconds[name].append(time.perf_counter() - began)
        if time.monotonic() > stop and number:
            break
    return seconds


def table(bench: Bench, seconds: dict[str, list[float]], tokens: int, base: str) -> None:
    rounds = max(map(len, seconds.values()))
    say(f"medians over {rounds} rounds; the ratio is to {base!r}, with quartiles")
    for name, spent in seconds.items():
        ratio = step_time.ratios(seconds, name, base) if base in seconds and len(spent) > 1 else ""
        say(bench.rate(name, statistics.median(spent), tokens, ratio))


def memory(bench: Bench) -> None:
    if bench.device.type == "cuda":
        say(f"peak memory so far: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def profile(bench: Bench, arms: dict[str, Callable[[], None]]) -> None:
    """The kernels that a step spends its time in, and how long the device waits."""
    if bench.device.type != "cuda":
        return
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for name, step in arms.items():
        with torch.profiler.profile(activities=kinds) as profiler:
            began = time.perf_counter()
            step()
            synchronise(bench.device)
            spent = time.perf_counter() - began
        on_gpu = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        events = [e for e in on_gpu if not e.name.startswith(("Optimizer.", "ProfilerStep", "## Call"))]
        totals: dict[str, list[float]] = {}
        for event in events:
            entry = totals.setdefault(event.name, [0, 0.0])
            entry[0] += 1
            entry[1] += event.time_range.elapsed_us() / 1e3
        busy = sum(took for _, took in totals.values()) / 1e3
        waits = sum(e.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for e in profiler.events())
        say(f"{name}: {len(events)} kernels, busy {busy:.4f} of {spent:.4f} s (profiled), {waits} waits")
        for kernel, (count, took) in sorted(totals.items(), key=lambda item: -item[1][1])[:16]:
            say(f"  {took:8.2f} ms {int(count):6} × {kernel[:100]}")


def kernels(bench: Bench) -> None:
    """What single operations take, forward and backward: attention by kernel; the head with its loss, as it
    is and padded; an update of all weights."""
    size, device = bench.size, bench.device
    dtype = torch.bfloat16 if size["precision"] == "bf16" else torch.float32
    lm = bench.language_model(compile="off")
    config = lm.network.config
    heads, width = config.num_attention_heads, config.hidden_size
    rows = size["micro_batch"] * size["tokens"]
    q, k, v = (
        torch.randn(size["micro_batch"], heads, size["tokens"], width // heads, device=device, dtype=dtype)
        .requires_grad_()
        for _ in range(3)
    )  # fmt: skip
    for name in ("flash", "cudnn"):
        try:
            with attention_kernel(name):
                attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
                took = timed(bench, lambda attend=attend: attend().sum().backward())
            say(f"attention, {name}: {1e3 * took:.2f} ms")
        except RuntimeError as error:
            say(f"attention, {name}: {str(error).splitlines()[0]}")
    hidden = torch.randn(rows, width, device=device, dtype=dtype)
    targets = torch.randint(size["vocabulary"], (rows,), device=device)
    for name, entries in (("as it is", size["vocabulary"]), ("padded", -(-size["vocabulary"] // 128) * 128)):
        weight = torch.randn(entries, width, device=device, dtype=dtype) / width**0.5
        logits = hidden @ weight.T
        for what, product in {
            "logits": lambda h=hidden, w=weight: h @ w.T,
            "∂hidden": lambda g=logits, w=weight: g @ w,
            "∂weight": lambda g=logits, h=hidden: g.T @ h,
        }.items():
            took = timed(bench, product)
            rate = 2 * rows * width * entries / took / 1e12
            say(f"vocabulary {name} ({entries}), {what}: {1e3 * took:.2f} ms, {rate:.0f} TFLOP/s")
        del logits
    fused = row_kernels("fused", device)
    weight = torch.randn(size["vocabulary"], width, device=device).requires_grad_()
    copy = padded_copy(weight, dtype)
    assert fused is not None
    ours = timed(bench, lambda: linear_cross_entropy(hidden, weight, copy, targets, fused).sum().backward())
    say(f"head and loss, fused, forward and backward: {1e3 * ours:.2f} ms")
    native = getattr(F, "linear_cross_entropy", None)
    if native is not None:
        plain = copy[: size["vocabulary"]].clone().requires_grad_()
        took = timed(bench, lambda: native(hidden, plain, targets, reduction="none").sum().backward())
        say(f"head and loss, torch's linear_cross_entropy: {1e3 * took:.2f} ms")
    for parameter in lm.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(lm.parameters, fused=True)
    say(f"fused AdamW: {1e3 * timed(bench, optimizer.step):.2f} ms")
    clip = timed(bench, lambda: nn.utils.clip_grad_norm_(lm.parameters, 1.0))
    say(f"clipping: {1e3 * clip:.2f} ms")


def timed(bench: Bench, work: Callable[[], Any], times: int = 5) -> float:
    """Seconds of some work, the mean of a few after two."""
    for _ in range(2):
        work()
    synchronise(bench.device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronise(bench.device)
    return (time.perf_counter() - began) / times


def hugging_face_trainer(bench: Bench) -> None:
    """transformers.Trainer with the same batch, precision and optimizer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    lm = bench.language_model(compile="off", cross_entropy="torch")
    network = AutoModelForCausalLM.from_config(lm.network.config)
    tokens = bench.offer(bench.size["windows"], bench.size["tokens"]).windows.tokens.cpu()
    steps, moments = 8, []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            synchronise(bench.device)
            moments.append(time.perf_counter())

    settings = TrainingArguments(
        output_dir=str(bench.folder / "trainer"),
        per_device_train_batch_size=min(bench.size["micro_batch"], 16),
        gradient_accumulation_steps=bench.size["windows"] // min(bench.size["micro_batch"], 16),
        max_steps=steps, bf16=bench.size["precision"] == "bf16", optim="adamw_torch_fused",
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=bench.device.type == "cpu",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens] * steps
    Trainer(model=network, args=settings, train_dataset=rows, callbacks=[Clock()]).train()
    spent = [b - a for a, b in pairwise(moments[2:])]
    say(bench.rate(TRAINER, statistics.median(spent), tokens.numel()))


# Whole steps, with their data ---------------------------------------------------------------------------


def corpus_config(bench: Bench) -> RunConfig:
    """A run on the corpus; no logs, no evaluations between."""
    folder = bench.folder / "corpus"
    if not folder.exists():
        folder.mkdir()
        write_corpus(folder, bench.size["corpus_mb"])
    sources = [{"name": name, "path": str(folder / f"{name}.txt"), "weight": 0.25} for name in SOURCES]
    return RunConfig().override(
        sources=sources, target="target", window=bench.size["tokens"], steps=100_000,
        vocab_size=bench.size["trained_vocabulary"], near_duplicate_threshold=1.0,
        reward_set_size=64, validation_set_size=8, test_set_size=8, held_out_sizes="fit",
        shuffle_buffer=1024, eval_every=10**6, tensorboard=False, progress="none",
        tokenizer_sample_bytes=1_000_000,
        run_dir=str(bench.folder / "run"), device=str(bench.device),
        threads=torch.get_num_threads(),
    )  # fmt: skip


def whole_config(bench: Bench) -> RunConfig:
    """A run of the size that is timed, data included."""
    size = bench.size
    separator = "," if size["model"].count(":") > 1 else ":"
    return corpus_config(bench).override(
        model=f"{size['model']}{separator}vocab_size={size['vocabulary']}",
        precision=size["precision"], num_candidates=size["windows"], micro_batch=size["micro_batch"],
        lr_schedule="constant", lm_lr=1e-4, **bench.compute,
    )  # fmt: skip


def recommended(bench: Bench) -> None:
    """Whole intervals between probes: plain, a static filter with the same prior, `recommended` read by one
    process and by as many as there are shards and cores."""
    base = whole_config(bench)
    prior = {"selector": "filter", "accept_target_source": True, "max_read_ratio": 8}
    changed = {
        "plain, with its reading": base.override(selector="uniform"),
        "static filter": base.override(**prior),
        "recommended": base.override(**own_settings("recommended")),
        "recommended, in 4 shards": base.override(**own_settings("recommended"), stream_shards=4),
    }
    runs: dict[str, Run] = {}
    for name, config in changed.items():
        began = time.perf_counter()
        runs[name] = prepare(config)
        built = time.perf_counter()
        runs[name].session.rehearse(1)
        say(f"{name}: built in {built - began:.1f} s, first step in {time.perf_counter() - built:.1f} s")
    interval = max(run.config.train.reward_every for run in runs.values())
    for run in runs.values():
        run.session.rehearse(interval)  # the first whole measurement among them
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    parts: dict[str, dict[str, float]] = {name: {} for name in runs}
    tokens = bench.size["windows"] * bench.size["tokens"]
    done = 0
    stop = time.monotonic() + 0.5 * bench.left
    while done < bench.rounds:
        began = time.monotonic()
        for name in list(runs) if done % 2 else list(runs)[::-1]:
            synchronise(bench.device)
            start = time.perf_counter()
            rows = runs[name].session.rehearse(interval)
            synchronise(bench.device)
            seconds[name].append((time.perf_counter() - start) / interval)
            for part in PARTS:
                parts[name][part] = sum(row.get(part, 0.0) for row in rows) / interval
        done += 1
        if time.monotonic() + (time.monotonic() - began) > stop:
            break
    table(bench, seconds, tokens, base="plain, with its reading")
    for name, spent in parts.items():
        say(f"  {name}: " + ", ".join(f"{part} {value:.4f} s" for part, value in spent.items()))
    memory(bench)
    by_position(bench, runs["recommended"], interval)


def by_position(bench: Bench, run: Run, interval: int) -> None:
    """Where the time of `recommended` goes: steps with a measurement, those after one, and the others."""
    kinds: dict[str, list[dict[str, float]]] = {"a measurement": [], "Q learning": [], "neither": []}
    while run.session.state.step % interval:
        run.session.rehearse(1)
    for _ in range(3):
        rows = run.session.rehearse(interval)
        kinds["a measurement"].append(rows[0])
        kinds["Q learning"].append(rows[1])
        kinds["neither"] += rows[2:]
    for kind, rows in kinds.items():
        parts = {name: [row.get(name, 0.0) for row in rows] for name in ("time/step", *PARTS)}
        shown = ", ".join(f"{name} {statistics.median(values):.4f} s" for name, values in parts.items())
        say(f"  a step with {kind}: {shown}")
    profile(bench, {"a step with a measurement": lambda: run.session.rehearse(1)})


def langevin(bench: Bench) -> None:
    """Steps of the preset `langevin-rag` at this size, and of plain training on as many windows."""
    chosen = {k: v for k, v in own_settings("langevin-rag").items() if k in LANGEVIN}
    base = whole_config(bench)
    n = preset("langevin-rag").train.num_candidates if bench.size["windows"] > 16 else 4
    base = base.override(num_candidates=n, micro_batch=min(n, bench.size["micro_batch"]))
    few = {"buffer_size": 256, "refresh": 64, "ingest": 16, "reward_windows": n}
    arms = {"plain": base.override(selector="uniform"), "langevin-rag": base.override(**chosen | few)}
    runs = {name: prepare(config) for name, config in arms.items()}
    steps: dict[str, Callable[[], None]] = {}
    for name, run in runs.items():
        rehearse = run.session.rehearse
        rehearse(3)
        steps[name] = lambda rehearse=rehearse: rehearse(2)
    seconds = in_turn(bench, steps, max(2, bench.rounds // 2), share=0.8)
    halved = {name: [value / 2 for value in values] for name, values in seconds.items()}
    table(bench, halved, n * bench.size["tokens"], base="plain")


PARTS = ("time/propose", "time/train", "time/probe", "time/reward")
LANGEVIN = {
    field.name
    for section in ("langevin", "retrieval", "critic", "select")
    for field in dataclasses.fields(getattr(RunConfig(), section))
} | {"reward", "reward_every", "max_read_ratio"}
"""Settings that a preset says about the method, not about the size of a run."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", type=float, default=220, help="seconds for everything")
    parser.add_argument("--rounds", type=int, default=12, help="rounds at most")
    parser.add_argument("--micro-batch", type=int, help="windows per pass")
    parser.add_argument("--windows", type=int, help="windows per step")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--cross-entropy", choices=("auto", "fused", "torch"), default="auto")
    parser.add_argument("--attention", choices=("auto", "flash", "cudnn", "math"), default="auto")
    parser.add_argument("--peak", type=float, help="the device's peak in TFLOP/s, where it is not known")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for as many as a run takes")
    options = parser.parse_args()
    began = time.monotonic()
    device = pick_device(options.device)
    torch.set_num_threads(options.threads or cpu_threads(device))
    size = dict(SIZES[options.size])
    size |= {k: v for k in ("micro_batch", "windows") if (v := getattr(options, k))}
    compute = {name: getattr(options, name) for name in ("compile", "cross_entropy", "attention")}
    peak = 1e12 * options.peak if options.peak else peak_flops(device, size["precision"])
    with TemporaryDirectory() as folder:
        bench = Bench(size, device, compute, Path(folder), began + options.budget, peak, options.rounds)
        say(
            f"{step_time.hardware(device)}, torch {torch.__version__}, peak "
            f"{'unknown' if peak is None else f'{peak / 1e12:.0f} TFLOP/s'}; {size}; {compute}"
        )
        for name, (work, needs) in SECTIONS.items():
            if options.only is None or name in options.only:
                bench.section(name, work, needs=needs if device.type == "cuda" else 0.0)
    if bench.failed:
        say(f"\nfailed: {', '.join(bench.failed)}")
    return 1 if bench.failed else 0


SECTIONS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "fused-loss": (fused_loss, 0),
    "single-pass": (single_against_two, 0),
    "compiled": (compiled_against_plain, 0),
    "steps": (steps_on_device, 20),
    "same-run": (learns_the_same, 10),
    "recommended": (recommended, 40),
    "kernels": (kernels, 8),
    "trainer": (hugging_face_trainer, 15),
    "langevin": (langevin, 20),
}
"""Section → its function, and the seconds without which it is not begun on a GPU."""

if __name__ == "__main__":
    sys.exit(main())
