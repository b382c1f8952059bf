"""How much of the scatter over seeds is rounding alone? One seed again with another order of sums, and seeds.

    python experiments/rounding.py                      # embedded dirty stream, some 15 minutes on 2 cores
    python experiments/rounding.py --stream web --preset recommended --seed 1 --perturbed 6

A run is repeated with one thread and with two, and with initial weights that are multiplied by
1 + 1e-7 · N(0, 1), about their last bit in float32. Its text, order and draws stay the same, so what differs
is rounding and what training makes of it. All runs share split 0, so that the seeds, beside it, differ in
training alone. Products of small matrices may not depend on the number of threads at all.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from curriq.config import RunConfig, load_toml
from curriq.presets import PRESETS, own_settings, preset
from curriq.train.run import prepare

STREAMS = Path(__file__).parent / "streams"
LAST_BIT = 1e-7
"""Relative size of the perturbation; the spacing of float32 is 0.6e-7 to 1.2e-7."""


def final_loss(config: RunConfig, perturbation: int | None = None) -> float:
    """Test loss of a run, nats per token; with a perturbation its initial weights differ in the last bit."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(config.override(run_dir=str(Path(folder) / "run")))
        if perturbation is not None:
            generator = torch.Generator().manual_seed(perturbation)
            with torch.no_grad():
                for parameter in run.lm.parameters:
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                    parameter.mul_(1 + LAST_BIT * noise)
        return run.session.train().summary["test_loss"]


def report(name: str, losses: list[float]) -> None:
    """Print mean, standard deviation and range of some test losses."""
    spread = f"{np.std(losses, ddof=1):8.1e}" if len(losses) > 1 else "       –"
    each = " ".join(f"{loss:.5f}" for loss in losses)
    print(f"{name:20} {np.mean(losses):8.5f} {spread} {np.ptp(losses):8.1e}  {each}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    streams = sorted(file.stem for file in STREAMS.glob("*.toml") if "sources" in file.read_text())
    parser.add_argument("--stream", choices=streams, default="dirty")
    parser.add_argument("--preset", choices=PRESETS, help="of the method (default: plain training)")
    parser.add_argument("--seed", type=int, default=0, help="of the repeated run")
    parser.add_argument("--seeds", type=int, default=6, help="number of seeds beside it")
    parser.add_argument("--perturbed", type=int, default=5, help="perturbed runs")
    parser.add_argument("--steps", type=int, help="of every run (default: those of preset small)")
    options = parser.parse_args()
    method = own_settings(options.preset) if options.preset else {"selector": "uniform"}
    config = load_toml(STREAMS / f"{options.stream}.toml", preset("small")).override(
        **method, seed=options.seed, threads=1, progress="none", tensorboard=False, log_candidates=False
    )
    if options.steps:
        config = config.override(steps=options.steps)
    print(f"{'':20} {'mean':>8} {'sd':>8} {'range':>8}  test losses, nats per token")
    plain = final_loss(config)
    report("threads 1 and 2", [plain, final_loss(config.override(threads=2))])
    report("last bit", [plain, *(final_loss(config, number) for number in range(options.perturbed))])
    report("seeds", [final_loss(config.override(seed=seed)) for seed in range(options.seeds)])


if __name__ == "__main__":
    main()
