"""Every comparison that the README and the documentation quote, with where and when its numbers were made.

    make results                                        # hours on 2 cores; a stopped call is continued
    python experiments/results.py --only embedded rho --workers 1
    python experiments/results.py --only static --publish
    python experiments/results.py --only static --arms recommended --publish

With --publish the numbers of each comparison are kept in experiments/published, which is committed: what the
documents quote is printed from there in a second, by the same scripts (python experiments/hindsight.py). With
--arms only these are run, and take the place of theirs in the published file: for when one preset changes
and the arms beside it do not.

Streams whose text is not embedded are read from the folder that CURRIQ_DEV_DATA names, and left out without
it. The reference models of experiments/rho.toml are trained first.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from curriq import parallel
from curriq.errors import CurriqError
from curriq.evaluate.assess import assess_arm
from curriq.evaluate.compare import compare
from curriq.evaluate.plan import Plan, load_plan
from curriq.train.session import environment

Json = dict[str, Any]
FOLDER = Path(__file__).parent
PUBLISHED = FOLDER / "published"
"""Comparisons whose numbers the documents quote, NAME.json.gz each."""
COMPARISONS = (
    *("static", "embedded", "streams", "unseen", "harmless", "default_size", "ablations", "rho"),
    *("recommended_ablations", "paper_paired", "paper_few", "blind", "alike", "crossover", "long", "h100"),
    *("langevin_rag", "langevin_ablations", "langevin_variants"),
)
"""The files of this folder, without .toml, in the order in which they are run."""
SCRIPTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "static": (("hindsight.py", "{comparison}"), ("headline.py", "{comparison}")),
    "default_size": (
        ("hindsight.py", "{comparison}"),
        ("against.py", "{comparison}", "--arm", "recommended"),
    ),
    "long": (("hindsight.py", "{comparison}"),),
    "crossover": (
        ("hindsight.py", "{comparison}"),
        ("against.py", "{comparison}", "--arm", "recommended"),
    ),
    "alike": (
        ("hindsight.py", "{comparison}"),
        ("hindsight.py", "{comparison}", "--without", "perplexity"),
        ("against.py", "{comparison}", "--arm", "recommended"),
    ),
    "recommended_ablations": (("against.py", "{comparison}", "--arm", "recommended"),),
    "langevin_rag": (("against.py", "{comparison}", "--arm", "filter"),),
    "langevin_ablations": (("against.py", "{comparison}", "--arm", "langevin"),),
    "langevin_variants": (("against.py", "{comparison}", "--arm", "langevin"),),
    "selected": (("selected.py", "--out", "{out}/selected"),),
}
"""Scripts that print or draw what the documentation shows besides: after the comparison of that name, or of a
name of their own."""
OTHER_MACHINE = "Seconds of {} do not compare with those of the other arms: they are of another machine."
NAMES = (*COMPARISONS, *(name for name in SCRIPTS if name not in COMPARISONS))
DATA = "CURRIQ_DEV_DATA"
"""Environment variable with the folder of the development streams."""


def needs_data(file: Path, stream: str) -> bool:
    """Whether a stream's own table, or the run file that it names, reads the folder of the data."""
    table = tomllib.loads(file.read_text(encoding="utf-8")).get("streams", {}).get(stream, {})
    named = (file.parent / table["file"]).read_text(encoding="utf-8") if "file" in table else ""
    return DATA in str(table) or any(DATA in line for line in named.splitlines() if not line.startswith("#"))


def runnable(plan: Plan) -> Plan:
    """The plan with the streams whose text is there; one line says which are left out."""
    skipped = [] if os.environ.get(DATA) else [s for s in plan.streams if needs_data(plan.file, s)]
    if skipped:
        print(f"skipped  {', '.join(skipped)}: set {DATA} to the folder of the development streams.")
    streams = tuple(stream for stream in plan.streams if stream not in skipped)
    return replace(plan, streams=streams, runs=tuple(run for run in plan.runs if run.stream in streams))


def train_references(plan: Plan) -> None:
    """Train the reference models that the plan's streams name and that are not there yet."""
    streams = sorted({run.stream for run in plan.runs if run.config.select.reference_model})
    if streams:
        script = str(FOLDER / "references.py")
        subprocess.run([sys.executable, script, "--only", *streams], check=True)


@dataclass(frozen=True)
class Origin:
    """Where and when numbers were made."""

    commit: str  # that finished them; runs that a stopped call had left are kept
    hardware: str
    threads: int  # per run
    date: str

    def __str__(self) -> str:
        return f"commit {self.commit}\n{self.hardware}, threads per run: {self.threads}\n{self.date}"


def origin(workers: int) -> Origin:
    """Commit, processor, threads per run and date, for above a table."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(FOLDER), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    dirty = " dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
    return Origin(
        (git("rev-parse", "HEAD") or "unknown") + dirty,
        environment(torch.device("cpu"))["hardware"],
        max(1, parallel.cores() // workers),
        datetime.now().astimezone().isoformat(" ", "minutes"),
    )


def publish(found: Json, to: Path) -> None:
    """Write what a comparison found, with its origin, as a file to be committed: no path of this machine."""
    found["file"] = Path(found["file"]).name
    for arms in found["streams"].values():
        for run in (run for arm in arms.values() for run in arm["runs"]):
            run["folder"] = "/".join(Path(run["folder"]).parts[-2:])
    to.parent.mkdir(exist_ok=True)
    to.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))  # equal numbers, equal bytes


def some_arms(plan: Plan, arms: Sequence[str]) -> Plan:
    """The plan with these arms alone; the first is what `compare` prints the others against."""
    runs = tuple(run for run in plan.runs if run.arm in arms)
    named = {arm: plan.arms[arm] for arm in arms}
    return replace(plan, arms=named, runs=runs, compare=replace(plan.compare, baseline=arms[0]))


def with_arms(published: Json, anew: Json, made: Origin) -> Json:
    """What was published, with the arms of another comparison in the place of its own.

    Their change of single test windows against the baseline (`tail`) is not known: the baseline's losses by
    window are in its runs, not in what is published.
    """
    baseline, arms = published["baseline"], anew["arms"]
    streams = {stream: dict(theirs) for stream, theirs in published["streams"].items()}
    for stream, ours in anew["streams"].items():
        reference = streams[stream][baseline]["runs"]
        for arm in arms:
            runs = ours[arm]["runs"]
            data = [[run["data_fingerprint"] for run in side] for side in (runs, reference)]
            if data[0] != data[1]:
                raise CurriqError(
                    f"{arm} on {stream} read other data than the published {baseline}: run all arms."
                )
            streams[stream][arm] = assess_arm(runs, reference, None)
    first, *later = published["origin"]["commit"].split(", ")
    kept = [part for part in later if part.partition(" at ")[0] not in arms]
    commit = ", ".join([first, *kept, *(f"{arm} at {made.commit[:7]}" for arm in arms)])
    machine, *others = published["origin"]["hardware"].split("; ")
    elsewhere = [arm for arm in arms if machine != made.hardware]
    others = [part for part in others if part.partition(": ")[0] not in arms]
    hardware = "; ".join([machine, *others, *(f"{arm}: {made.hardware}" for arm in elsewhere)])
    stale = {OTHER_MACHINE.format(arm) for arm in arms}
    notes = [n for n in published["notes"] if n.partition(" on ")[0] not in arms and n not in stale]
    notes = [*map(OTHER_MACHINE.format, elsewhere), *notes, *anew["notes"]]
    return published | {
        "origin": asdict(replace(made, commit=commit, hardware=hardware)),
        "arms": published["arms"] | arms,
        "streams": streams,
        "notes": notes,
    }


def run(name: str, out: Path, workers: int | None, publishing: bool = False, arms: Sequence[str] = ()) -> int:
    """The exit status of one comparison and its scripts; what they print stands below where it is from."""
    print(f"\n== {name}")
    status = 0
    if (FOLDER / f"{name}.toml").exists():
        status = run_comparison(name, out, workers, publishing, arms)
    else:
        print(origin(parallel.cores()), flush=True)  # a script trains in one thread
    whole = PUBLISHED / f"{name}.json.gz" if arms else out / name / "comparison.json"
    places = {"out": out, "comparison": whole}
    for script, *arguments in () if status else SCRIPTS.get(name, ()):
        words = [argument.format_map(places) for argument in arguments]
        done = subprocess.run([sys.executable, str(FOLDER / script), *words], check=False)
        status = done.returncode or status
    return status


def run_comparison(
    name: str, out: Path, workers: int | None, publishing: bool, arms: Sequence[str] = ()
) -> int:
    """The exit status of one comparison, or of some of its arms."""
    whole = load_plan(FOLDER / f"{name}.toml", out / name, workers)
    plan = runnable(whole)
    if not plan.streams:
        return 0
    if publishing and plan != whole:
        print(f"{name} is not run: streams are left out, and --publish needs all of them.", file=sys.stderr)
        return 1
    if arms:
        plan = some_arms(plan, arms)
    made, place = origin(plan.compare.workers), PUBLISHED / f"{name}.json.gz"
    print(made, flush=True)
    train_references(plan)
    status = compare(plan)
    if publishing and not status:
        found = json.loads((plan.out / "comparison.json").read_text(encoding="utf-8"))
        if arms:
            found = with_arms(json.loads(gzip.decompress(place.read_bytes())), found, made)
        publish({"origin": asdict(made)} | found, place)
    return status


def arms_fault(only: Sequence[str], arms: Sequence[str], publishing: bool) -> str:
    """Why these arms cannot be run alone; empty where they can, or all are run."""
    if not arms:
        return ""
    file = FOLDER / f"{only[0]}.toml"
    if len(only) > 1 or not file.exists():
        return "--arms needs one comparison: give --only NAME"
    plan = load_plan(file)
    if unknown := [arm for arm in arms if arm not in plan.arms]:
        return f"--arms {unknown[0]}: {only[0]} has {', '.join(plan.arms)}"
    if plan.compare.baseline in arms:
        return f"--arms {plan.compare.baseline}: all arms are compared with it, so run all of them"
    if not publishing:
        return "--arms without --publish: nothing stands beside these arms"
    if not (PUBLISHED / f"{only[0]}.json.gz").exists():
        return f"--arms: {only[0]} is not published yet, so run all of its arms"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--workers", type=int, help="runs at a time (default: the files' own)")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder of all runs")
    parser.add_argument("--publish", action="store_true", help="keep the numbers in experiments/published")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="these only, of one comparison")
    options = parser.parse_args()
    if fault := arms_fault(options.only, options.arms, options.publish):
        parser.error(fault)
    failed = []
    for name in options.only:
        status = run(name, options.out, options.workers, options.publish, options.arms)
        if status == 130:  # Ctrl-C: the same command goes on
            return status
        failed += [name] if status else []
    if failed:
        print(f"runs failed in {', '.join(failed)}; their notes are above.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
