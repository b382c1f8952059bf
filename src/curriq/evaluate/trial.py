"""`curriq try`: does it help on my data? One comparison, planned to take some minutes, judged and drawn.

It writes the TOML of a `curriq compare`, and runs that: plain training, static filters, the preset
`recommended` and, where the arguments have a rule of their own, that one.
"""

import itertools
import logging
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from curriq.config import RunConfig, Within, require
from curriq.data.survey import require_usable
from curriq.errors import CurriqError
from curriq.evaluate.check import duration
from curriq.evaluate.compare import compare
from curriq.evaluate.plan import load_plan
from curriq.evaluate.statistics import FEWEST_SEEDS
from curriq.evaluate.trial_plan import BASELINE, LEARNT, OWN_ARM, STATIC, arms_of, plan_toml, rule_of
from curriq.report.chart import fixed
from curriq.runlog.read import read_document
from curriq.runlog.storage import make_folder, write_atomically

log = logging.getLogger("curriq")

FILE = "try.toml"
"""The comparison, in the folder of a try; `curriq compare` runs it too."""
MINUTES, SEEDS = 10.0, 3
LEAST_STEPS = 48
"""Steps below which a try says nothing: `recommended` measures effects in every sixteenth."""
EVALUATIONS = 12
"""Points of a curve."""
IMPORT_SECONDS = 5.0
"""That a run's process takes for its libraries, on an idle machine."""

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measured seconds of an arm: of a step, of one evaluation, and once per run."""

    step: float
    evaluation: float
    once: float

    def run(self, steps: int) -> float:
        """Seconds of a run; the test set is about two validation sets."""
        return self.once + steps * self.step + (EVALUATIONS + 3) * self.evaluation


def start(
    config: RunConfig,
    out: Path,
    minutes: float | None,
    seeds: int | None,
    workers: int | None,
    *,
    steps: bool = False,
) -> int:
    """Plan, run and judge a try; returns the exit status of the comparison.

    Args:
        config: data, model and sizes, and perhaps a rule of the user's own.
        out: a folder without a try.
        minutes: for all runs together; `MINUTES` when None.
        seeds: number of seeds; `SEEDS` when None.
        workers: runs at a time; 1 when None.
        steps: take the steps of `config` instead of those that fit the minutes.

    Raises:
        CurriqError: an argument or the data are refused, the folder holds a try, or too few steps fit.
    """
    minutes, workers = (MINUTES if minutes is None else minutes), (1 if workers is None else workers)
    seeds = _checked_seeds(seeds)
    Within("(0, 1e6]", ", a number of minutes such as 10").check("minutes", minutes)
    Within("[1, 1024]").check("workers", workers)
    require(
        not (out / FILE).exists(),
        f"--out {out} holds a try already: go on with it, or add seeds, by `curriq try --resume --out "
        f"{quote(str(out))} --seeds N`; or give another folder.",
    )
    require_usable(config)
    arms = arms_of(config)
    config = config.override(seed=0, split_seed=0)
    make_folder(out)  # what refuses it is known before minutes of timing
    costs = _time_arms(config, workers)
    chosen = config.train.steps if steps else fitting_steps(costs, arms, 60 * minutes, seeds, workers)
    config = _with_steps(config, chosen, fixed=steps)
    expected = _seconds(costs, arms, chosen, seeds, workers)
    log.info(
        f"{len(arms)} arms, {_seeds(seeds)}, {chosen} steps of "
        f"{config.train.num_candidates} windows of {config.data.window} tokens: about "
        f"{duration(expected)}, as timed just now."
    )
    write_atomically(out / FILE, plan_toml(config, arms, range(seeds), workers).encode())
    return _run(out, config.log.progress)


def resume(out: Path, seeds: int | None, workers: int | None) -> int:
    """Go on with the try in a folder, with more seeds where a number is given; returns the exit status."""
    import tomlkit

    file = out / FILE
    require(
        file.exists(), f"--out {out}: there is no try in it ({file} is missing). `curriq try` starts one."
    )
    plan = load_plan(file, out, workers)  # says what is wrong with a file that was edited
    require(
        len(plan.streams) == 1 and plan.compare.baseline == BASELINE,
        f"{file} has {len(plan.streams)} streams and the baseline {plan.compare.baseline!r}, and a try one "
        f"stream and {BASELINE!r}: run it with `curriq compare {quote(str(file))}`.",
    )
    document = tomlkit.parse(file.read_text(encoding="utf-8-sig"))
    table: Any = document["compare"]
    if seeds is not None:
        before = len(table["seeds"])
        require(
            seeds >= before, f"--seeds {seeds}: the try has {before} seeds already; give as many or more."
        )
        others = (seed for seed in itertools.count() if seed not in table["seeds"])
        table["seeds"].extend(itertools.islice(others, _checked_seeds(seeds) - before))
    if workers is not None:
        table["workers"] = workers
    write_atomically(file, tomlkit.dumps(document).encode())
    return _run(out)


def _checked_seeds(seeds: int | None) -> int:
    seeds = SEEDS if seeds is None else seeds
    Within("[1, 1000]").check("seeds", seeds)
    return seeds


def _seeds(count: int) -> str:
    return f"{count} {'seed' if count == 1 else 'seeds'}"


def _run(out: Path, progress: str = "auto") -> int:
    """Run the comparison in a folder, and add what a try says beyond it."""
    plan = load_plan(out / FILE, out)
    status = compare(plan, again=f"curriq try --resume --out {quote(str(out))}", progress=progress)
    if status == 130:
        return status
    from curriq.report.command import main as report
    from curriq.report.latex import write_latex

    result = read_document(out / "comparison.json")
    print(*conclusions(result, out), "", sep="\n")
    print(*write_latex(result, out), sep="\n")
    return max(status, report([str(out)]))


def _time_arms(config: RunConfig, workers: int) -> dict[str, Costs]:
    """Seconds of plain training, of a filter and of `recommended`, from a few steps of each."""
    from curriq.lm.hardware import cpu_threads
    from curriq.lm.load import pick_device
    from curriq.train.estimate import estimate
    from curriq.train.run import prepare

    threads = cpu_threads(pick_device(config.lm.device), workers)
    plain = {"preset": "default", "selector": "uniform"}
    kinds = {BASELINE: plain, "static": {"preset": "dsir"}, LEARNT: {"preset": LEARNT}}
    costs = {}
    for kind, table in kinds.items():
        timed = config.override(**rule_of(table), threads=threads)
        began = time.perf_counter()
        try:
            with _quietly(wanted=kind != BASELINE):  # the first has said what is read
                run = prepare(timed)
                built = time.perf_counter() - began
                cost = estimate(run)
        except ArithmeticError as error:
            raise CurriqError(
                f"{error} in a step of the untrained model: check --model and --lm-lr."
            ) from error
        once = built + cost.startup_seconds + IMPORT_SECONDS
        costs[kind] = Costs(step=cost.seconds_per_step, evaluation=cost.evaluation_seconds, once=once)
        each = f"{cost.seconds_per_step:.3g} s per step, {cost.evaluation_seconds:.3g} s per evaluation"
        log.info(f"{kind}: {each}, {once:.0f} s to start.")
        if kind == BASELINE:
            what, loss = (
                "the base model" if config.lm.pretrained else "the untrained model",
                cost.initial_validation_loss,
            )
            log.info(f"{what}: {loss:.4f} nats per token on the validation set of the target.")
    return costs


@contextmanager
def _quietly(*, wanted: bool) -> Generator[None]:
    """Only warnings of the package are logged meanwhile, where this is wanted."""
    level = log.level
    if wanted:
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _seconds(costs: dict[str, Costs], arms: dict[str, Any], steps: int, seeds: int, workers: int) -> float:
    """Wall time of all runs."""
    per_seed = sum(_costs_of(costs, arm).run(steps) for arm in arms)
    return per_seed * seeds / workers


def _costs_of(costs: dict[str, Costs], arm: str) -> Costs:
    return costs["static"] if arm in STATIC else costs[BASELINE if arm == BASELINE else LEARNT]


def fitting_steps(
    costs: dict[str, Costs], arms: dict[str, Any], seconds: float, seeds: int, workers: int
) -> int:
    """The steps of each run with which all take so many seconds; CurriqError where that is fewer than
    `LEAST_STEPS`."""
    once = _seconds(costs, arms, 0, seeds, workers)
    per_step = _seconds(costs, arms, 1, seeds, workers) - once
    steps = math.floor((seconds - once) / per_step)
    needed = math.ceil((once + LEAST_STEPS * per_step) / 60)
    require(
        steps >= LEAST_STEPS,
        f"--minutes {seconds / 60:g}: {len(arms)} arms on {_seeds(seeds)} would have {max(0, steps)} "
        f"steps, and at least {LEAST_STEPS} say something. Give --minutes {needed}, fewer --seeds (--resume "
        "adds more later), a smaller --window or --num-candidates, or a smaller model.",
    )
    return steps


def _with_steps(config: RunConfig, steps: int, *, fixed: bool) -> RunConfig:
    """The configuration with these steps, and evaluations, warm-up and checkpoints that suit them."""
    every = (
        config.log.eval_every
        if fixed and steps >= 4 * config.log.eval_every
        else max(1, steps // EVALUATIONS)
    )
    warmup = min(config.optim.lr_warmup_steps, max(1, steps // 10))
    schedule = config.optim.lr_schedule
    if schedule == "constant":  # a comparison refuses it: the last losses would be noise
        log.info("--lr-schedule constant becomes cosine: at a constant learning rate losses do not compare.")
        schedule = "cosine"
    return config.override(
        steps=steps,
        eval_every=every,
        lr_warmup_steps=warmup,
        lr_schedule=schedule,
        checkpoint_every=max(1, (steps + 1) // 2),
        checkpoint_keep=1,
    )


def conclusions(result: Json, out: Path) -> list[str]:
    """Sentences on where the model stood before, on the best static filter, which is known in hindsight
    alone, and on what more seeds would say."""
    (arms,) = result["streams"].values()
    judged = {name: arm["difference"] for name, arm in arms.items() if arm["difference"] is not None}
    static = [name for name in STATIC if name in judged]
    sentences = [_before_and_after(arms)]
    if static:
        best = min(static, key=lambda name: judged[name]["mean"])
        sentences.append(
            f"Best static filter, chosen in hindsight among {', '.join(static)}: {best} "
            f"({fixed(judged[best]['mean'], '+.4f')} nats of test loss). Nobody knows that choice before, so "
            "it flatters static filters."
        )
        sentences += [_against(name, arms, best) for name in (LEARNT, OWN_ARM) if name in judged]
    if (seeds := len(result["seeds"])) < FEWEST_SEEDS:
        first = "One seed proves nothing. " if seeds == 1 else ""
        sentences.append(
            f"{first}A verdict needs {FEWEST_SEEDS} seeds: `curriq try --resume --out {quote(str(out))} "
            f"--seeds {FEWEST_SEEDS}` adds {FEWEST_SEEDS - seeds}."
        )
    return [sentence for sentence in sentences if sentence]


def _before_and_after(arms: Json) -> str:
    """The validation loss before training and after that of some arms, means over the seeds."""
    before = [run.get("initial_validation_loss") for run in arms[BASELINE]["runs"] if run["finished"]]
    after = {
        name: np.mean([run["validation_loss"] for run in arm["runs"] if run["finished"]])
        for name, arm in arms.items()
        if name in (BASELINE, LEARNT) and any(run["finished"] for run in arm["runs"])
    }
    if not before or None in before:
        return ""
    ends = ", ".join(f"{loss:.4f} after {name}" for name, loss in after.items())
    return f"Validation loss: {np.mean(before):.4f} before training, {ends}."


def _against(name: str, arms: Json, best: str) -> str:
    """How an arm stands to the best static filter, paired by seed."""
    losses = {
        arm: {run["seed"]: run["test_loss"] for run in arms[arm]["runs"] if run["finished"]}
        for arm in (name, best)
    }
    seeds = sorted(losses[name].keys() & losses[best].keys())
    if not seeds:
        return ""
    changes = np.array([losses[name][seed] - losses[best][seed] for seed in seeds])
    low, mean, high = (
        fixed(float(value), "+.4f") for value in (changes.min(), changes.mean(), changes.max())
    )
    if len(seeds) == 1:
        return f"{name} against {best}: {mean} nats of test loss, on one seed."
    worse = int((changes > 0).sum())
    of = f"worse on {worse} of {len(seeds)} seeds"
    return f"{name} against {best}: {mean} nats of test loss, from {low} to {high}, {of}."
