"""How well `curriq plan` predicts a step: six configurations, calibrated on small steps of their models.

    python benchmarks/plan.py             # some minutes on 2 cores
    python benchmarks/plan.py --steps 32 --cpu-time     # beside other programs, one thread

A prediction comes from ten steps of few windows, with measurements in every third step
(`train/calibrate.py`). Then a run of the whole configuration takes its own steps, past its start and in whole
intervals between measurements, and their mean is what was predicted. The calibration never sees a step of
the size that is predicted.
"""

import argparse
import statistics
import time
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import synchronise

from curriq.config import RunConfig
from curriq.presets import own_settings, preset
from curriq.train.calibrate import calibrate, for_calibration
from curriq.train.estimate import past_the_start
from curriq.train.run import prepare

GPT2 = "random:gpt2:hidden_size=192,num_hidden_layers=4,num_attention_heads=4"
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain, default model": {"selector": "uniform", "num_candidates": 64},
    "the paper's rule": {"num_candidates": 64, "window": 64},
    "recommended": own_settings("recommended") | {"num_candidates": 64},
    "weighted, long windows": own_settings("weighted") | {"window": 256, "num_candidates": 48},
    "small, many windows": own_settings("small") | own_settings("recommended") | {"num_candidates": 192},
    "gpt2, static filter": own_settings("dsir") | {"model": GPT2, "num_candidates": 40, "vocab_size": 4096},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=32, help="steps of each run, in whole intervals")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of configurations, from 0")
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of the processor, where other programs run too"
    )
    options = parser.parse_args()
    if options.cpu_time:
        time.perf_counter = time.process_time  # in all that is timed, on both sides of the comparison
    print(f"{'configuration':26} {'predicted':>10} {'measured':>10} {'off by':>9}  overhead  parts")
    errors = []
    chosen = [*CONFIGURATIONS.items()]
    for number in options.only or range(len(chosen)):
        name, settings = chosen[number]
        with TemporaryDirectory() as folder:
            every = {
                "steps": 100_000, "eval_every": 10**6, "threads": options.threads, "tensorboard": False,
                "progress": "none", "run_dir": folder,
            }  # fmt: skip
            config = preset("default").override(**settings | every)
            predicted, _ = calibrate(prepare(for_calibration(config)), config)
            took = measured(config, options.steps)
        errors.append(predicted.seconds_per_step / took - 1)
        parts = (
            f"reading {predicted.propose:.4f}, passes {predicted.passes.at(predicted.windows):.4f}, "
            f"held out {predicted.held_out_per_step:.4f}, rest {predicted.rest.at(predicted.windows):.4f}"
        )
        print(
            f"{name:26} {predicted.seconds_per_step:8.4f} s {took:8.4f} s {100 * errors[-1]:+7.1f} %  "
            f"{predicted.overhead:8.3f}  {parts}",
            flush=True,
        )
    worst, middle = max(map(abs, errors)), statistics.median(map(abs, errors))
    threads = torch.get_num_threads()
    print(f"furthest off {100 * worst:.1f} %, in the median {100 * middle:.1f} %; {threads} threads")


def measured(config: RunConfig, steps: int) -> float:
    """Mean seconds per step of whole intervals between measurements, after a first interval."""
    run, every = prepare(past_the_start(config)), config.train.reward_every
    run.session.rehearse(max(2, every))
    synchronise(run.lm.device)
    rows = run.session.rehearse(-(-steps // every) * every)
    return statistics.mean(row["time/step"] for row in rows)


if __name__ == "__main__":
    main()
