"""Cost of measured effects, and what the finite difference loses against forward-mode differentiation.

    python benchmarks/effects.py            # three minutes on 2 cores
    python benchmarks/effects.py --preset small --rounds 10

Steps of plain training, of the usual static filter (preset `dsir`), of the prior of `recommended` alone,
which reads what `recommended` reads, and of `recommended` take turns in one process on windows of equal
length; seconds are averaged over whole intervals between probes, and a ratio is the median over rounds with
the quartiles. Then one direction is differentiated by finite differences of
several sizes, and in forward mode.
"""

import argparse
import statistics
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import synchronise
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from curriq.cli import parse_run_config
from curriq.config import RunConfig
from curriq.lm.held_out import displaced, displacement
from curriq.lm.model import LanguageModel, Pieces, window_losses
from curriq.presets import own_settings
from curriq.train.loop import train_step
from curriq.train.run import prepare

COMPARED_WITH = {"plain": (), "recommended": ("plain", "static filter", "prior alone")}
"""What the seconds of an arm are divided by; plain training where nothing is said."""


def build(config: RunConfig, folder: Path):
    """A prepared run that writes nothing."""
    return prepare(config.override(run_dir=str(folder)))


def step(run) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    train_step(run.session.components, run.session.state)
    synchronise(run.lm.device)
    return time.perf_counter() - began


def cost(base: RunConfig, rounds: int, folder: Path) -> None:
    recommended = base.override(**own_settings("recommended"))
    every = recommended.train.reward_every
    steps = (rounds + 2) * every  # so that the learning rate does not come to the end of its decay
    changed = {
        "plain": base.override(selector="uniform"),
        "static filter": base.override(**own_settings("dsir")),
        "prior alone": base.override(**own_settings("prior")),
        "recommended": recommended,
    }
    runs = {name: build(config.override(steps=steps), folder / name) for name, config in changed.items()}
    for run in [*runs.values()] * (2 * every):
        step(run)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        spent = dict.fromkeys(runs, 0.0)
        for k in range(every):  # a whole interval between probes, step beside step: a machine's pace drifts
            for name in list(runs) if k % 2 else list(runs)[::-1]:
                spent[name] += step(runs[name]) / every
        for name, mean in spent.items():
            seconds[name].append(mean)
    print(
        f"N = {base.train.num_candidates}, T = {base.data.window}, {runs['plain'].lm.device}, "
        f"{torch.get_num_threads()} threads, {rounds} rounds of {every} steps"
    )
    for name, spent in seconds.items():
        print(f"{name:<14} {statistics.median(spent):.4f} s per step", end="")
        for other in COMPARED_WITH.get(name, ("plain",)):
            pairs = zip(spent, seconds[other], strict=True)
            low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
            print(f", {middle:.3f} [{low:.3f}, {high:.3f}] of {other}", end="")
        print()
    with runs["recommended"].lm.full_precision():
        accuracy(runs["recommended"])


def accuracy(run) -> None:
    """Directional derivatives of the candidates' losses: finite differences against forward mode."""
    components = run.session.components
    lm, learner = run.lm, components.learner
    windows = components.proposer.propose(0).windows.to(lm.device)
    tokens = windows.tokens
    held_out = run.corpus.held_out.reward.take(slice(8)).to(lm.device)
    lm.pieces = Pieces(len(tokens), tokens.numel())
    parameters = dict(lm.network.named_parameters())

    def losses(values: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = functional_call(lm.network, values, kwargs={"input_ids": tokens, "use_cache": False}).logits
        flat = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        return flat.view(len(tokens), -1).mean(1)

    loss = window_losses(lm, lm.trunk(held_out.tokens), held_out)[0].mean()
    gradient = torch.autograd.grad(loss, lm.parameters)
    direction = learner.precondition(list(gradient))
    scale = displacement(lm.parameters, direction, 1.0).item()
    tangents = dict(zip(parameters, direction, strict=True))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        began = time.perf_counter()
        _, exact = jvp(losses, (parameters,), (tangents,))
        synchronise(lm.device)
        forward_mode = time.perf_counter() - began
    print(f"forward mode: {forward_mode:.3f} s for {len(tokens)} windows")
    for name in ("float32", "TF32", "bfloat16") if lm.device.type == "cuda" else ("float32", "bfloat16"):
        for relative in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5):
            with arithmetic(lm, name):
                before = lm.window_losses(windows)
                began = time.perf_counter()
                with displaced(lm.parameters, direction, -relative * scale):
                    found = (before - lm.window_losses(windows)) / (relative * scale)
                synchronise(lm.device)
                seconds = time.perf_counter() - began
            error = (found - exact).norm() / exact.norm()
            alike = torch.corrcoef(torch.stack([found, exact]))[0, 1]
            print(
                f"finite difference, {name}, relative step {relative:.0e}: {seconds:.3f} s, "
                f"relative error {error:.1e}, correlation {alike:.4f}"
            )


@contextmanager
def arithmetic(lm: LanguageModel, name: str) -> Generator[None]:
    """Forward passes in float32, in float32 with the products in TF32, or in bfloat16 autocast."""
    lm.reduced_precision, torch.backends.cuda.matmul.allow_tf32 = name == "bfloat16", name == "TF32"
    try:
        yield
    finally:
        lm.reduced_precision, torch.backends.cuda.matmul.allow_tf32 = False, False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of `curriq train`, and hold for both arms.",
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=30)
    options, rest = parser.parse_known_args()
    base = parse_run_config(rest).override(progress="none")
    with TemporaryDirectory() as folder:
        cost(base, options.rounds, Path(folder))


if __name__ == "__main__":
    main()
