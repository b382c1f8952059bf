"""How the cost of a step grows with N, T, V, M, I and K: `python benchmarks/scale.py --costs`.

One setting at a time takes three values, the others stay. The runs of a setting take their steps by turns,
in one process and one thread, and what counts are seconds of the processor, so other programs disturb little.
The exponent is the logarithm of the ratio of the costs over that of the values: 1 is linear, 0 is flat. What
a step costs whatever the setting is makes an exponent smaller.
"""

import math
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from curriq.config import RunConfig
from curriq.presets import preset
from curriq.train.run import Run, prepare

WARM_UP, ROUNDS = 3, 12
TINY: dict[str, Any] = {
    "model": "random:gpt2:hidden_size=64,num_hidden_layers=2,num_attention_heads=2",
    "num_candidates": 16,
    "window": 64,
    "reward_every": 1,
    "reward_windows": 16,
    "reward_set_size": 256,
    "steps": 10_000,
    "eval_every": 10**6,
    "threads": 1,
    "tensorboard": False,
    "progress": "none",
}
SEARCH: dict[str, Any] = {
    "proposer": "langevin",
    "encoder": "hidden-state",
    "centre_queries": True,
    "retrieval_top_k": 8,
    "query_tokens": 16,
    "langevin_steps": 5,
    "buffer_size": 512,
    "chains": 16,
}


@dataclass(frozen=True)
class Growth:
    """A part of a step whose cost is measured at several values of one setting.

    Attributes:
        symbol: of the setting in the paper.
        setting: its name.
        values: that it takes.
        part: column of the log with the seconds, or `without reward`, a step less its reward.
        expected: how the cost should grow.
        base: further settings.
    """

    symbol: str
    setting: str
    values: tuple[int, ...]
    part: str
    expected: str
    base: dict[str, Any] = field(default_factory=dict)

    def config(self, value: int) -> RunConfig:
        settings = TINY | self.base
        if self.setting == "model":  # V of the head alone: the text and its tokens stay
            shape = "hidden_size=64,num_hidden_layers=1,num_attention_heads=2"
            own: dict[str, Any] = {"model": f"random:gpt2:{shape},vocab_size={value}"}
        else:
            own = {self.setting: value}
        return preset("smoke").override(**settings | own)

    def seconds(self, row: dict[str, float]) -> float:
        if self.part == "without reward":
            return row["time/step"] - row["time/reward"]
        return row[self.part]


REWARDS, BUFFER = ("reward_windows", (16, 64, 256)), ("buffer_size", (512, 1024, 2048))
MEASURED = (
    Growth("N", "num_candidates", (16, 32, 64), part="without reward", expected="linear"),
    Growth("T", "window", (64, 128, 256), part="without reward", expected="linear"),
    Growth("V", "model", (4096, 8192, 16384), part="time/train", expected="linear (head)"),
    Growth("M", *REWARDS, part="time/reward", expected="linear"),
    Growth("M", *REWARDS, part="without reward", expected="flat"),
    Growth("I", *BUFFER, part="time/search", expected="flat", base=SEARCH),
    Growth("I", *BUFFER, part="time/step", expected="flat", base=SEARCH),
    Growth("K", "chains", (32, 64, 128), part="time/search", expected="about linear", base=SEARCH),
)


def exponent(values: tuple[int, ...], costs: list[float]) -> float:
    """p of cost ∝ valueᵖ, between the smallest and the greatest value."""
    return math.log(costs[-1] / costs[0]) / math.log(values[-1] / values[0])


def measured(growths: list[Growth]) -> list[list[float]]:
    """Median seconds at each value, of parts of the same runs."""
    first = growths[0]
    with ExitStack() as stack:
        runs: list[Run] = []
        for value in first.values:
            folder = stack.enter_context(TemporaryDirectory())
            runs.append(prepare(first.config(value).override(run_dir=folder)))
        rows: list[list[dict[str, float]]] = [[] for _ in runs]
        for _ in range(WARM_UP + ROUNDS):
            for run, taken in zip(runs, rows, strict=True):
                taken.extend(run.session.rehearse(1))
    return [
        [statistics.median(growth.seconds(row) for row in taken[WARM_UP:]) for taken in rows]
        for growth in growths
    ]


def report_costs() -> None:
    time.perf_counter = time.process_time  # in all that is timed: other programs run too
    print(f"seconds of the processor, one thread, medians over {ROUNDS} steps by turns")
    print(f"{'':2} {'values':>18}  {'of what':16} {'milliseconds':>24}  exponent  should be")
    done: dict[tuple[Any, ...], list[Growth]] = {}
    for growth in MEASURED:
        done.setdefault((growth.setting, growth.values), []).append(growth)
    for growths in done.values():
        for growth, costs in zip(growths, measured(growths), strict=True):
            values = ", ".join(map(str, growth.values))
            took = ", ".join(f"{1000 * cost:.3g}" for cost in costs)
            part = growth.part.removeprefix("time/")
            power = f"{exponent(growth.values, costs):8.2f}"
            line = f"{growth.symbol:2} {values:>18}  {part:16} {took:>24}  {power}  {growth.expected}"
            print(line, flush=True)
