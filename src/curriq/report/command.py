"""`curriq report`: one page of one run, of some runs, or of a comparison."""

import argparse
import datetime
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import curriq
from curriq.config import Within, missing_extra, require
from curriq.errors import CurriqError
from curriq.parser import Parser
from curriq.report.chart import Json, Section
from curriq.report.data_mix import learned_from
from curriq.report.explore import explorer, retrieval, shown_texts
from curriq.report.figures import save_figures
from curriq.report.outcome import comparison_helped, runs_helped
from curriq.report.page import render
from curriq.report.policy import policy_health
from curriq.report.runlog import Detail, RunLog, load_run_log
from curriq.report.side_by_side import comparison_learned
from curriq.report.summary import what_ran
from curriq.report.topics import Embed
from curriq.runlog.read import AXES, explained, read_document
from curriq.runlog.storage import write_atomically

MOST_DRAWN = 4
"""Runs whose own charts become figures: each has some thirty, which take a quarter of a minute."""


@dataclass(frozen=True)
class Report:
    """All sections, before they become a page or figures."""

    title: str
    overview: list[Section]
    runs: list[tuple[str, list[Section]]]

    def page(self, live: float | None = None) -> str:
        made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
        detail = "Long runs are drawn in buckets of steps: the line is a bucket's mean, the band its range."
        facts = f"Made by curriq {curriq.__version__} on {made} from the log alone; {{size}}. {detail}"
        # A page that is polled must not change while its data do not.
        return render(self.title, self.overview, self.runs, facts if live is None else detail, live)

    def figures(self, folder: Path, axis: str) -> list[Path]:
        written, prefixes = save_figures(self.overview, folder, axis), set[str]()
        for label, sections in self.runs if len(self.runs) <= MOST_DRAWN else ():
            name = "".join(c if c.isalnum() else "-" for c in label)
            names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
            prefix = next(free for free in names if free not in prefixes)  # lr.1 and lr-1 are two runs
            prefixes.add(prefix)
            written += save_figures(sections, folder, axis, "" if len(self.runs) == 1 else f"{prefix}-")
        return written


def main(arguments: Sequence[str], load_embed: Callable[[str], Embed] | None = None) -> int:
    """The exit status; `load_embed` opens the encoder that `--encoder` names, with torch if it likes."""
    parser = Parser(
        prog="curriq report",
        description="Write one HTML file that shows what runs did, from their logs alone, and the same "
        "charts as PNG and SVG.",
    )
    add = parser.add_argument
    add(
        "--out", type=Path, help="the page (default: report.html in the only RUN, if it is a folder, or here)"
    )
    add("--figures", type=Path, help="folder of the figures (default: figures beside the page)")
    add("--no-figures", action="store_true", help="write the page only")
    axis = "x-axis of the figures (default: windows; the page lets its reader choose)"
    add("--axis", choices=tuple(AXES), default="windows", help=axis)
    encoder = "sentence-transformer by name or folder for the topics (default: TF-IDF, which needs no model)"
    add("--encoder", default="", help=encoder)
    options = parse_runs(parser, arguments)
    embed = load_embed(options.encoder) if options.encoder and load_embed is not None else None
    report = build(options.RUN, options.topics, embed, lambda line: print(line, file=sys.stderr))
    alone = len(options.RUN) == 1 and options.RUN[0].is_dir()
    out = options.out or (options.RUN[0] if alone else Path()) / "report.html"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, report.page().encode())
    except OSError as error:
        raise CurriqError(f"--out {out} cannot be written: {error.strerror}.") from None
    print(f"report   {out} ({out.stat().st_size / 1e6:.2f} MB)")
    if not options.no_figures:
        print(_figures(report, options.figures or out.parent / "figures", options.axis))
    return 0


def parse_runs(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command on the folders `RUN`, with `--topics`; CurriqError where that is refused."""
    runs = "folder of a run or a comparison; or a comparison.json alone, also compressed (.json.gz)"
    parser.add_argument("RUN", type=Path, nargs="+", help=runs)
    parser.add_argument("--topics", type=int, default=8, help="clusters of windows; 0 for none (default: 8)")
    options = parser.parse_args(list(arguments))
    Within("[0, 32]", "; 0 for none").check("topics", options.topics)
    return options


def build(
    folders: list[Path],
    topics: int = 8,
    embed: Embed | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Report:
    """The report on folders of runs, or on that of a comparison, or on its file alone.

    Args:
        topics: clusters of the windows.
        embed: embeds texts for them; TF-IDF when None.
        log: takes a line of progress per run when there are several.

    Raises:
        CurriqError: a folder is neither, or a file in it is damaged.
    """
    compared = [folder for folder in folders if _result_file(folder).exists()]
    if compared and len(folders) > 1:
        raise CurriqError(f"{compared[0]} is a comparison: give it alone, or folders of single runs.")
    result = _result(_result_file(folders[0])) if compared else {}
    with explained(folders[0]):
        places = _runs_of(result, _result_file(folders[0]).parent) if compared else _labelled(folders)
        if compared and (note := _missing(result, places)):
            result["notes"].append(note)
            log(note)
    detail = Detail.of(len(places), topics)
    runs, sections = [], []
    for number, (label, folder) in enumerate(places, 1):
        if len(places) > 1:
            log(f"reading {number}/{len(places)}: {folder}")
        with explained(folder):
            runs.append(load_run_log(folder, label, detail, embed))
            sections.append((label, _sections(runs[-1])))
    with explained(folders[0]):
        overview = _of_comparison(result, runs) if compared else [runs_helped(runs)]
    name = folders[0].resolve().name.removesuffix(".gz").removesuffix(".json")
    name = name if len(folders) == 1 else f"{len(runs)} runs"
    return Report(f"curriq: {name}", overview, sections)


def _result_file(given: Path) -> Path:
    """A comparison's file itself, or where its folder has it."""
    alone = given.is_file() and given.name.endswith((".json", ".json.gz"))
    return given if alone else given / "comparison.json"


def _result(file: Path) -> Json:
    result = read_document(file, "compare again, finished runs are kept")
    required = {"streams", "baseline", "notes"}
    require(
        required <= result.keys(), f"{file} is no result of `curriq compare`: that has {sorted(required)}."
    )
    return result


def _missing(result: Json, places: list[tuple[str, Path]]) -> str:
    """What the page lacks where the folders of finished runs are gone; empty where it lacks nothing."""
    missing = sum(run["finished"] for *_, run in _planned_runs(result)) - len(places)
    if not missing:
        return ""
    return f"The logs of {missing} finished runs are not there: the page cannot show what they learned from."


def _of_comparison(result: Json, runs: list[RunLog]) -> list[Section]:
    """What a comparison says of all its arms together."""
    by_label = {run.label: run for run in runs}
    arms: dict[tuple[str, str], list[RunLog]] = {}
    for stream, arm, label, _ in _planned_runs(result):
        if label in by_label:
            arms.setdefault((stream, arm), []).append(by_label[label])
    sections = (comparison_helped(result, runs), comparison_learned(result, arms))
    return [section for section in sections if section is not None]


def _sections(run: RunLog) -> list[Section]:
    """In the order of the questions."""
    why = explorer(run)
    sections = (learned_from(run), policy_health(run), why, retrieval(run, shown_texts(why)), what_ran(run))
    return [section for section in sections if section is not None]


def _runs_of(result: Json, folder: Path) -> list[tuple[str, Path]]:
    """The finished runs of a comparison, the baseline's last. Their paths hold where the comparison ran; it
    may have moved."""
    places = []
    for stream, _, label, run in _planned_runs(result):
        moved = folder / stream / Path(run["folder"]).name
        path = moved if moved.is_dir() else Path(run["folder"])
        if run["finished"] and (path / "metrics.jsonl").exists():
            places.append((label, path))
    return places


def _planned_runs(result: Json) -> Iterator[tuple[str, str, str, Json]]:
    """Stream, arm, label and record of each run of a comparison, the baseline's last."""
    several = len(result["streams"]) > 1
    for stream, arms in result["streams"].items():
        for arm in sorted(arms, key=lambda name: name == result["baseline"]):
            for run in arms[arm]["runs"]:
                name = Path(run["folder"]).name
                yield stream, arm, f"{stream}/{name}" if several else name, run


def _labelled(folders: list[Path]) -> list[tuple[str, Path]]:
    """Each run under the shortest end of its path that tells it from the others."""
    for folder in folders:
        require(
            (folder / "metrics.jsonl").exists(),
            f"{folder} is neither the folder of a run (it has no metrics.jsonl) nor of a comparison (no "
            "comparison.json): give one that `curriq train` or `curriq compare` has written.",
        )
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return list(zip(labels, folders, strict=True))
    raise CurriqError(f"{folders[0]} is given twice: name every run once.")


def _figures(report: Report, folder: Path, axis: str) -> str:
    try:
        written = report.figures(folder, axis)
    except ImportError:
        return f"figures  none: {missing_extra('drawing them', 'matplotlib', 'report', 'use the page')}"
    except OSError as error:
        raise CurriqError(f"--figures {folder} cannot be written: {error.strerror}.") from None
    of_one = "; of all runs together, those of one by `curriq report RUN`" * (len(report.runs) > MOST_DRAWN)
    return f"figures  {len(written)} in {folder} (PNG and SVG{of_one})"
