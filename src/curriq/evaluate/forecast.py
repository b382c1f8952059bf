"""`curriq plan`: what a run will take here, and on paper on many GPUs.

Ten small steps are timed (`train/calibrate.py`); all else is arithmetic on them, whose assumptions
docs/plan.md lists.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import curriq
from curriq import parallel, terminal
from curriq.config import RunConfig
from curriq.errors import CurriqError
from curriq.evaluate.check import duration, size_text
from curriq.report.chart import Table
from curriq.report.figures import print_table

if TYPE_CHECKING:
    from curriq.train.build import Run
    from curriq.train.calibrate import Calibration
    from curriq.types import Metrics

log = logging.getLogger("curriq")

FORMAT = 1
"""Version of the JSON; fields may be added without a new one."""
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Numbers of GPUs that are planned for on paper."""
BACKWARD_SHARE = 2 / 3
"""Of a forward and backward pass; sums of gradients run beside the backward pass of the last micro-batch."""
GATHERS = 2
"""Times that `fsdp` gathers a block's weights per micro-batch: forward and backward."""
SPEED_SAMPLE = 32_000_000
"""Bytes that are written and hashed to see how fast this machine does so."""

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of memory that a rank needs.

    Attributes:
        per_parameter: of θ, its gradient and moments, and what a probe adds.
        parameters: of the model.
        activations: beside these, at the most.
        fixed: of the program itself.
        device: that the device has.
        buckets: per parameter, in which `ddp` sums gradients.
        gathered: whole weights that `fsdp` holds at a time: of a block, and of what is outside the blocks.
    """

    per_parameter: float
    parameters: int
    activations: float
    fixed: float
    device: float
    buckets: float = 0.0
    gathered: float = 0.0

    def needed(self, engine: str = "ddp", gpus: int = 1, parameters: float | None = None) -> float:
        """Of a model with so many parameters, this one's where None: activations and a block's weights grow
        as width times depth, and both of these as the cube root of the parameters."""
        parameters = self.parameters if parameters is None else parameters
        kept, passing = self.per_parameter, self.activations
        if gpus > 1:
            kept = kept / gpus if engine == "fsdp" else kept + self.buckets
            passing += self.gathered if engine == "fsdp" else 0.0
        return kept * parameters + passing * (parameters / self.parameters) ** (2 / 3) + self.fixed

    def largest(self, engine: str = "ddp", gpus: int = 1) -> float:
        """Parameters of the largest model that fits."""
        low, high = 0.0, 1e15
        while high - low > 1e-3 * max(1.0, low):
            middle = (low + high) / 2
            fits = self.needed(engine, gpus, middle) <= self.device
            low, high = (middle, high) if fits else (low, middle)
        return low


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a plan is computed from.

    Attributes:
        calibration: of the parts of a step.
        micro_batch: windows per pass.
        window: T, tokens per window.
        trained: parameters whose gradients are summed.
        weight_bytes: per parameter, as weights travel.
        memory: of one rank.
    """

    calibration: "Calibration"
    micro_batch: int
    window: int
    trained: int
    weight_bytes: int
    memory: Memory


def on_paper(costs: Costs, gpus: int, engine: str, bandwidth: float) -> Json:
    """A step on so many GPUs like this device, which split the windows of a step.

    Args:
        engine: `ddp` or `fsdp`.
        bandwidth: bytes per second that a GPU sends while it receives as many.
    """
    made = costs.calibration
    windows = math.ceil(made.windows / gpus)
    passes = made.passes.at(windows)
    if made.trained < made.windows and made.scoring == 1:  # what is trained on is in the fixed part
        passes -= made.passes.fixed * (1 - math.ceil(made.trained / gpus) / made.trained)
    micro_batches = math.ceil(windows / costs.micro_batch)
    parameters, share = costs.memory.parameters, (gpus - 1) / gpus
    reduced = 4 * costs.trained * share * (2 if engine == "ddp" else micro_batches)
    gathered = 0.0
    if engine == "fsdp":
        gathered = GATHERS * micro_batches * costs.weight_bytes * parameters * share
    sent = reduced + gathered
    hidden = BACKWARD_SHARE * passes / (micro_batches if engine == "ddp" else 1)
    exposed = max(0.0, sent / bandwidth - hidden)
    reading = made.reading(made.read_per_step) if made.searches else made.propose
    split = (reading + made.held_out_per_step) / gpus
    seconds = split + (made.propose - reading) + passes + made.rest_per_step + exposed
    return {
        "gpus": gpus,
        "engine": engine,
        "windows_per_gpu": windows,
        "seconds_per_step": seconds,
        "tokens_per_second": made.trained * costs.window / seconds,
        "efficiency": made.seconds_per_step / gpus / seconds,
        "sent_bytes_per_step": sent,
        "exposed_communication_seconds": exposed,
        "memory_bytes": costs.memory.needed(engine, gpus),
        "largest_model": costs.memory.largest(engine, gpus),
        "reading_cores": made.reading_cores(seconds),
    }


def forecast(
    config: RunConfig, gpus: Sequence[int] = GPUS, bandwidth: float = 50e9, *, alternatives: bool = True
) -> Json:
    """What `curriq plan --json` prints; docs/plan.md lists its fields.

    Args:
        bandwidth: of a GPU's links, bytes per second.
        alternatives: whether other threads and another precision are timed too, on a CPU.

    Raises:
        CurriqError: the run cannot be built, or a loss or a score is not finite.
    """
    from curriq.lm.load import pick_device
    from curriq.train.alternatives import timed_alternatives
    from curriq.train.calibrate import CALIBRATION_STEPS, calibrate, for_calibration
    from curriq.train.estimate import initial_loss, shorten_fill, whole_run
    from curriq.train.meter import peak_memory
    from curriq.train.run import prepare

    device = pick_device(config.lm.device)
    fixed = peak_memory(device).get("memory/peak", 0.0) if device.type == "cpu" else 0.0
    log.info(f"timing {CALIBRATION_STEPS} small steps of {config.method} …")
    run = prepare(for_calibration(config))
    fill = shorten_fill(run)
    initial, evaluation = initial_loss(run)
    try:
        made, rows = calibrate(run, config)
    except ArithmeticError as error:
        raise CurriqError(
            f"{error} in a step of the untrained model: check --model, --precision and --beta."
        ) from error
    startup = max(0.0, rows[0]["time/step"] - made.seconds_per_step)
    cost = whole_run(run, config, rows, made.seconds_per_step, startup, initial, evaluation, fill)
    written, hashed = disk_speed(Path(config.log.run_dir or "."))
    stall = cost.checkpoint_bytes * (1 / written + 1 / hashed)
    saves = math.ceil(config.train.steps / config.log.checkpoint_every)
    costs = costs_of(run, config, made, rows, fixed)
    steps, engines = config.train.steps, engines_of(config, run)
    timed = timed_alternatives(run, made) if alternatives else []
    return {
        "format": FORMAT,
        "curriq": curriq.__version__,
        "device": str(run.lm.device),
        "threads": run.config.train.threads,
        "alternatives": [asdict(other) | {"faster": other.faster} for other in timed],
        "parameters": costs.memory.parameters,
        "calibration": asdict(made),
        "step": step_of(made, config),
        "run": {
            "steps": steps,
            "seconds": cost.seconds + (1 + saves) * stall,
            "windows_trained": made.trained * steps,
            "windows_read": round(made.read_per_step * steps),
            "tokens": made.trained * steps * config.data.window,
            "break_even": 1 - 1 / made.overhead,
        },
        "memory": {
            "needed_bytes": costs.memory.needed(),
            "device_bytes": costs.memory.device,
            "bytes_per_parameter": costs.memory.per_parameter,
            "largest_model": costs.memory.largest(),
        },
        "reading": {
            "windows_per_second_per_core": made.reading_rate,
            "cores_needed": made.reading_cores(made.seconds_per_step),
            "cores": parallel.cores(),
            "processes": run.corpus.readers,
            "shards_needed": shards_needed(made, config),
        },
        "checkpoint": {
            "bytes": cost.checkpoint_bytes,
            "seconds": stall,
            "share_of_time": stall / (stall + config.log.checkpoint_every * made.seconds_per_step),
            "disk_bytes": cost.disk_bytes,
        },
        "bandwidth": bandwidth,
        "on_paper": [on_paper(costs, count, engine, bandwidth) for count in gpus for engine in engines],
    }


def engines_of(config: RunConfig, run: "Run") -> list[str]:
    """The engines with which this run can be trained on several GPUs."""
    from curriq.lm.engine import has_experts

    engines = ["ddp"]
    with suppress(CurriqError):
        config.override(engine="fsdp")
        engines += [] if has_experts(run.lm.network) else ["fsdp"]
    return engines


def shards_needed(made: "Calibration", config: RunConfig) -> int:
    """The least `--stream-shards` with which as many processes can read as steps need where reading does not
    hold them up; N where that is not enough."""
    n = config.train.num_candidates
    needed = made.reading_cores(max(1e-9, made.seconds_per_step - made.propose))
    return next(shards for shards in range(1, n + 1) if n % shards == 0 and (shards >= needed or shards == n))


def step_of(made: "Calibration", config: RunConfig) -> Json:
    """A step of a calibrated run: seconds of it and of its parts, tokens per second, and the overhead."""
    n = config.train.num_candidates
    return {
        "seconds": made.seconds_per_step,
        "reading": made.propose,
        "passes": made.passes.at(n),
        "held_out": made.held_out_per_step,
        "rest": made.rest_per_step,
        "plain_seconds": made.plain_seconds_per_step,
        "overhead": made.overhead,
        "tokens_per_second": made.trained * config.data.window / made.seconds_per_step,
    }


def costs_of(
    run: "Run", config: RunConfig, made: "Calibration", rows: "list[Metrics]", fixed: float
) -> Costs:
    """What the plan of a calibrated run is computed from; `fixed` are bytes of memory in use before it."""
    from curriq.lm.compute import blocks_of

    lm = run.lm
    trained = sum(p.numel() for p in lm.parameters)
    parameters = sum(p.numel() for p in lm.network.parameters())
    credit = config.critic
    probes = config.method == "soft-q" and (credit.credit == "counterfactual" or credit.measure_effects)
    # float32: θ of all; gradient and two moments of what is trained; a probe's average, gradient, direction
    # and copy of θ.
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(lm.network)]
    gathered = parameters - sum(blocks) + max(blocks, default=0)
    weight_bytes = 2 if lm.reduced_precision else 4
    per_parameter = (4 * parameters + (12 + (16 if probes else 0)) * trained) / parameters
    peak = rows[-1].get("memory/peak", 0.0)
    device = lm.memory_bytes()
    memory = Memory(
        per_parameter=per_parameter,
        parameters=parameters,
        activations=max(0.0, peak - fixed - per_parameter * parameters),
        fixed=fixed,
        device=float(device),
        buckets=4 * trained / parameters,
        gathered=float(weight_bytes * gathered),
    )
    return Costs(
        calibration=made,
        micro_batch=lm.pieces.micro_batch,
        window=config.data.window,
        trained=trained,
        weight_bytes=weight_bytes,
        memory=memory,
    )


def disk_speed(folder: Path) -> tuple[float, float]:
    """Bytes per second that are written to the disk of this folder, and that are hashed."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    content = os.urandom(1_000_000) * (SPEED_SAMPLE // 1_000_000)
    with TemporaryDirectory(dir=existing) as made:
        began = time.perf_counter()
        with (Path(made) / "sample").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter() - began
    began = time.perf_counter()
    hashlib.sha256(content).digest()
    return len(content) / written, len(content) / (time.perf_counter() - began)


def report(plan: Json, *, as_json: bool = False) -> int:
    """Print a plan; returns the exit status, 0."""
    if as_json:
        print(json.dumps(plan, indent=1, allow_nan=False))
        return 0
    console = terminal.console(soft_wrap=True)
    step, run, memory = plan["step"], plan["run"], plan["memory"]
    reading, checkpoint = plan["reading"], plan["checkpoint"]
    reads = "reading and search" if plan["calibration"]["searches"] else "reading"
    shown = {"reading": reads, "held_out": "held out"}
    parts = ", ".join(f"{shown.get(name, name)} {seconds_text(step[name])}" for name in PARTS)
    break_even = run["break_even"]
    pays = f": pays where it saves {100 * break_even:.1f} % of the steps" if break_even > 0 else ""
    lines = [
        f"step        {seconds_text(step['seconds'])}, {step['tokens_per_second']:,.0f} tokens/s on "
        f"{plan['device']} ({parts})",
        f"overhead    {step['overhead']:.3f} of plain training{pays}",
        f"run         about {duration(run['seconds'])}: {run['steps']:,} steps on {run['windows_trained']:,} "
        f"windows ({run['tokens']:,} tokens), of {run['windows_read']:,} that are read",
        f"memory      {size_text(memory['needed_bytes'])} of {size_text(memory['device_bytes'])}; the "
        f"largest such model that fits has about {memory['largest_model'] / 1e6:,.0f} M parameters, this one "
        f"{plan['parameters'] / 1e6:,.1f} M",
        f"reading     {reading['windows_per_second_per_core']:,.0f} windows/s per core: "
        f"{cores_text(reading)}",
        f"checkpoint  {size_text(checkpoint['bytes'])}, {seconds_text(checkpoint['seconds'])} each: "
        f"{100 * checkpoint['share_of_time']:.1f} % of the time",
    ]
    for line in [*lines, *faster_text(plan["alternatives"])]:
        console.print(line)
    if plan["on_paper"]:
        title = f"On paper, with links of {plan['bandwidth'] / 1e9:g} GB/s; nothing of this is measured"
        header = ["GPUs", "s/step", "tokens/s", "efficiency", "sent", "memory", "largest", "cores"]
        print_table(console, Table(title, header, list(map(_row, plan["on_paper"]))))
    return 0


PARTS = ("reading", "passes", "held_out", "rest")
"""Parts of a step, as the plan names them."""


def _row(made: Json) -> list[str]:
    return [
        f"{made['gpus']} {made['engine']}",
        f"{made['seconds_per_step']:.3g}",
        f"{made['tokens_per_second']:,.0f}",
        f"{100 * made['efficiency']:.0f} %",
        size_text(made["sent_bytes_per_step"]),
        size_text(made["memory_bytes"]),
        f"{made['largest_model'] / 1e9:,.2f} B",
        f"{made['reading_cores']:.1f}",
    ]


def seconds_text(seconds: float) -> str:
    """`3.2 s` or `45 ms`."""
    return f"{seconds:.3g} s" if seconds >= 0.1 or seconds == 0 else f"{1e3 * seconds:.3g} ms"


def faster_text(alternatives: Sequence[Json]) -> list[str]:
    """The line that names the fastest settings, of alternatives that were timed; none if none were."""
    if not alternatives:
        return []
    best = alternatives[0]
    if best["faster"]:
        return [f"faster here {best['flags']}: {best['step']:.2f} of the time (to other last bits)"]
    shares = [f"{other['step']:.2f}" if other["step"] < 2 else "over 2" for other in alternatives]
    listed = ", ".join(f"{other['flags']} {share}" for other, share in zip(alternatives, shares, strict=True))
    return [f"faster here nothing that was tried (of the time: {listed})"]


def cores_text(reading: Json) -> str:
    needed = f"the steps need {reading['cores_needed']:.2g} cores"
    processes, shards = reading["processes"], reading["shards_needed"]
    if 0 < processes < min(shards, reading["cores"] - 1):
        return f"{needed}, and {processes} {'reads' if processes == 1 else 'read'}: --stream-shards {shards}"
    short = "" if reading["cores_needed"] <= reading["cores"] else f"; here are {reading['cores']}"
    return needed + short
