"""What a run would read, looked at before torch is loaded: the files of each source, a sample of their rows,
and every fault of them at once, with a way to fix it.

`curriq check` prints it, and `curriq train` refuses what has a fault. Documents are read by the sources
themselves (`data/sources.py`), so that what passes here is what a run reads.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import starmap
from pathlib import Path
from typing import Any

from curriq.config import RunConfig, SourceConfig
from curriq.data.chat import read_conversation, render_plain
from curriq.data.files import LocalFiles, extension_of, find_files, user_path
from curriq.data.hub import locate
from curriq.data.rows import FORMATS, BadRow, Row
from curriq.data.sources import LocalSource, NoText, open_source
from curriq.errors import CurriqError
from curriq.plugins import load_object, own_components

SAMPLE_DOCUMENTS = 400
"""Documents of a source that are read, over all its files."""
SAMPLE_CHARACTERS = 2_000_000
MOST_FILES = 40
"""Files of a source that rows are read from, at even distances."""
GUESS_ROWS = 20
"""Rows that the column of the text is guessed from."""
LEAST_LENGTH = 10
"""Mean characters of a column that may be a text."""
DELIMITERS = {";": "';'", "\t": "tabs", "|": "'|'"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that keeps a run from starting, and how to fix it.

    Attributes:
        where: the source or the setting.
        problem: what is wrong, in sentences.
        fix: what to write instead, such as `text_field=content`; empty where the problem says it.
    """

    where: str
    problem: str
    fix: str = ""

    def __post_init__(self) -> None:
        for separator in (": ", ", ", " "):  # errors name the place themselves
            object.__setattr__(self, "problem", self.problem.removeprefix(f"{self.where}{separator}"))

    def __str__(self) -> str:
        separator = " " if self.problem.startswith("'") else ": "  # --model 'name' is …
        return f"{self.where}{separator}{self.problem}" + (f" → {self.fix}" if self.fix else "")


@dataclass(frozen=True, kw_only=True)
class SourceSurvey:
    """What was read of one source.

    Attributes:
        files: number of files; 0 for the embedded corpus and for hub data sets, which are read later.
        bytes: of all files, as they lie on the disk.
        sampled_files: files that rows were read from.
        texts: the documents that were read.
        skipped: rows of these files that `on_bad_row = "skip"` left out.
        whole: whether all documents of the source were read.
    """

    name: str
    path: str
    files: int = 0
    bytes: int = 0
    sampled_files: int = 0
    texts: tuple[str, ...] = field(default=(), repr=False)
    skipped: int = 0
    whole: bool = False
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All sources of a run, and the faults of the models and files that its settings name."""

    sources: tuple[SourceSurvey, ...]
    names: tuple[Fault, ...]

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Of the sources first."""
        return (*(fault for source in self.sources for fault in source.faults), *self.names)


def survey(*configs: RunConfig) -> Survey:
    """What runs would read, each source once; nothing is raised, and no network is asked."""
    sources = dict.fromkeys(source for config in configs for source in config.data.sources)
    names = dict.fromkeys(fault for config in configs for fault in _names(config))
    own = dict.fromkeys(part for config in configs for part in own_components(config).items())
    faults = (*filter(None, starmap(_not_there, own)), *names)
    return Survey(sources=tuple(map(survey_source, sources)), names=faults)


def _not_there(setting: str, name: str) -> Fault | None:
    """What is wrong with the name of a component of the user's own, whose module is loaded."""
    try:
        load_object(name)
    except CurriqError as error:
        return Fault(where=setting, problem=str(error))
    return None


def require_usable(*configs: RunConfig) -> None:
    """Raise CurriqError with every fault that `survey` finds in any of the runs, each once."""
    if faults := survey(*configs).faults:
        raise CurriqError(*dict.fromkeys(map(str, faults)))


def survey_source(config: SourceConfig) -> SourceSurvey:
    """What is read of one source: of a local one its files and a sample of their rows."""
    where, seen = f"source {config.name!r}", dict[str, Any](name=config.name, path=config.path)
    scheme = config.path.partition(":")[0]
    try:
        if scheme == "hub":  # needs the network
            return SourceSurvey(**seen)
        if scheme == "embedded":
            source, texts = open_source(config, 0), list[str]()
            while len(texts) < SAMPLE_DOCUMENTS and (document := source.next_document()) is not None:
                texts.append(document.text)
            return SourceSurvey(**seen, texts=tuple(texts))
        files = find_files(config)
    except CurriqError as error:
        return SourceSurvey(**seen, faults=(Fault(where=where, problem=str(error), fix=_near(config)),))
    sample = _sample(config, files)
    return SourceSurvey(
        **seen, files=len(files.paths), bytes=sum(path.stat().st_size for path in files.paths), **sample
    )


def _sample(config: SourceConfig, files: LocalFiles) -> dict[str, Any]:
    """Documents of some of the files, and what is wrong with these."""
    count = min(len(files.paths), MOST_FILES)
    texts, faults = list[str](), list[Fault]()
    skipped, whole = 0, count == len(files.paths)
    for path in (files.paths[i * len(files.paths) // count] for i in range(count)):
        source = replace(config, path=str(path))
        columns = _column_faults(source, path)
        faults += columns.values()
        if "text_field" in columns and not columns["text_field"].fix:
            continue
        # With the columns that the faults propose, so that what else is wrong shows too.
        named = {name: fault.fix.partition("=")[2] for name, fault in columns.items()}
        more, left_out, ended, others = _read(replace(source, **named), count)
        texts += more
        faults += others
        skipped, whole = skipped + left_out, whole and ended
    if not texts and not faults:
        what = f"{config.path} holds no document with text: every text is empty. Give it a file with text."
        faults.append(Fault(where=f"source {config.name!r}", problem=what))
    found = {"texts": tuple(texts), "skipped": skipped, "whole": whole, "sampled_files": count}
    return found | {"faults": tuple(_once(faults))}


def _once(faults: list[Fault]) -> Iterator[Fault]:
    """The first of the faults that have one fix, and in how many files it is."""
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(fault.fix or fault.problem, []).append(fault)
    for first, *others in kinds.values():
        more = f" ({len(others) + 1} files have this.)" if others else ""
        yield replace(first, problem=first.problem + more)


def _read(config: SourceConfig, files: int) -> tuple[list[str], int, bool, list[Fault]]:
    """Texts of one file where so many are read, the rows skipped among them, whether these are all, and the
    fault that ended reading."""
    most, most_characters = SAMPLE_DOCUMENTS // files + 1, SAMPLE_CHARACTERS // files
    texts, characters = list[str](), 0
    try:
        source = LocalSource(config, named_rows=0)
    except CurriqError as error:
        return texts, 0, False, [Fault(where=f"source {config.name!r}", problem=str(error))]
    try:
        while len(texts) < most and characters < most_characters:
            if (document := source.next_document()) is None:
                return texts, source.skipped, True, []
            texts.append(document.text)
            characters += len(document.text)
    except NoText:  # other files of the source may have some
        return texts, source.skipped, True, []
    except CurriqError as error:
        fault = Fault(where=f"source {config.name!r}", problem=str(error))
        return texts, source.skipped, False, [fault]
    return texts, source.skipped, False, []


def _column_faults(config: SourceConfig, path: Path) -> dict[str, Fault]:
    """Key of the source → what is wrong with the column that it names in a file."""
    rows = list(_rows(config, path))
    if not rows:
        return {}  # an unreadable or empty file, which reading its documents explains
    columns, where = list(dict.fromkeys(name for row in rows for name in row)), f"source {config.name!r}"
    text, difficulty = config.text_field, config.difficulty_field
    shown = ", ".join(repr(name) if _is_padded(name) else name for name in columns)
    faults = {}
    if text not in columns:
        problem = f"there is no column {text!r} for the text in {path}. Columns: {shown}."
        separator = next(
            (name for sign, name in DELIMITERS.items() if len(columns) == 1 and sign in shown), ""
        )
        if separator and extension_of(path) == ".csv":
            problem += f" Its fields seem to be separated by {separator}: write the file with commas."
        if padded := [name for name in columns if _is_padded(name) and name.strip() == text]:
            problem += f" Take the spaces out of the name {padded[0]!r} in the file."
        faults["text_field"] = Fault(where=where, problem=problem, fix="" if padded else _text_column(rows))
    elif all(_length(row.get(text)) is None for row in rows):
        problem = f"column {text!r} of {path} holds no text. Columns: {shown}."
        faults["text_field"] = Fault(where=where, problem=problem, fix=_text_column(rows))
    if difficulty and difficulty not in columns:
        problem = f"there is no column {difficulty!r} for the difficulty in {path}. Columns: {shown}."
        near = next(iter(get_close_matches(difficulty, columns, n=1)), "")
        fix = f"difficulty_field={near}" if near else "leave difficulty_field out"
        faults["difficulty_field"] = Fault(where=where, problem=problem, fix=fix)
    return faults


def _is_padded(name: str) -> bool:
    return name.strip() != name or not name


def _rows(config: SourceConfig, path: Path) -> Iterator[Row]:
    """The first rows of a file with all their columns; those that do not fit, and what no reader opens, are
    left out."""
    files = find_files(replace(config, path=str(path)))
    reader = FORMATS[files.extension]
    if files.extension == ".txt":
        return
    try:
        every = replace(config, difficulty_field="")
        for number, raw in enumerate(reader.read(files.readable(path), every, 0)):
            if number == GUESS_ROWS:
                return
            try:
                row = reader.parse(raw, every)
                if config.text_field not in row and row:  # of a CSV file without it the values are left out
                    row = reader.parse(raw, replace(every, text_field=next(iter(row))))
                yield row
            except BadRow:
                if header := getattr(raw, "header", None):  # of a CSV file, whatever is wrong with the row
                    yield dict.fromkeys(header)
    except Exception:  # whatever a library raises for a damaged file; the source explains it
        return


def _text_column(rows: Sequence[Row]) -> str:
    """`text_field=COLUMN`, the column with the longest texts or conversations; empty where none has any."""
    columns = dict.fromkeys(name for row in rows for name in row)
    means = {}
    for name in columns:
        lengths = [length for row in rows if (length := _length(row.get(name))) is not None]
        if 2 * len(lengths) >= len(rows):
            means[name] = sum(lengths) / len(lengths)
    best = max(means, key=lambda name: means[name], default="")
    return f"text_field={best}" if best and means[best] >= LEAST_LENGTH else ""


def _length(value: Any) -> int | None:
    """Characters of a text or a conversation; None for any other value."""
    messages = read_conversation(value)
    text = value if messages is None else render_plain(messages)
    return len(text) if isinstance(text, str) else None


def _near(config: SourceConfig) -> str:
    """`path=…` of a file beside the one that is missing, with nearly its name; empty where there is none."""
    path = user_path(config.path)
    is_there, has_folder = os.path.exists(path), os.path.isdir(path.parent)  # no error for a long name
    if is_there or config.path.startswith("embedded:") or not has_folder:
        return ""
    beside = (file for file in path.parent.iterdir() if file.exists())  # no link to nothing
    names = sorted(file.name for file in beside if not file.name.startswith("."))
    near = get_close_matches(path.name, names, n=1)
    return f"path={path.with_name(near[0])}" if near else ""


def _names(config: RunConfig) -> Iterator[Fault]:
    """Folders and files that settings name and that are not there. A name that the hub may have passes."""
    named = {"--reference-model": config.select.reference_model}
    if not config.lm.model.startswith("random:"):
        named["--model"] = config.lm.model
    if config.tokenizer.tokenizer not in ("auto", "train"):
        named["--tokenizer"] = config.tokenizer.tokenizer
    for setting, name in named.items():
        try:
            if name:
                locate(setting, name)
        except CurriqError as error:
            more = " `curriq train --preset reference` trains one." * (setting == "--reference-model")
            yield Fault(where=setting, problem=str(error) + more)
    if config.data.curriculum and not Path(config.data.curriculum).is_file():
        problem = f"there is no file {config.data.curriculum!r}; `curriq export RUN` writes one."
        yield Fault(where="--curriculum", problem=problem)
