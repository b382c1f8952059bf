"""Local files: which ones a path names, what is left out of a folder, and how compressed ones are opened."""

import fnmatch
import functools
import glob
import io
import json
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curriq.config import SourceConfig, did_you_mean
from curriq.data.cache import file_hash
from curriq.data.documents import short_hash
from curriq.data.scratch import scratch_folder
from curriq.errors import CurriqError

FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Extension → name of the compression in Arrow."""
SEEKABLE = (".parquet", ".arrow")
"""Formats whose reader seeks, which no compressed file allows."""
NEVER_EMPTY = (".json", *SEEKABLE)
"""Formats that have no file of no bytes: such a file has been cut."""
_RENAMED = {
    **dict.fromkeys((".ndjson", ".jsonlines"), " Rename JSON Lines to .jsonl."),
    **dict.fromkeys((".pq", ".pqt"), " Rename Parquet files to .parquet."),
    ".tsv": " Write it with commas, as .csv.",
    ".md": " Rename it to .txt.",
}
"""Extension of other programs → what to do."""
_KNOWN = f"Known: {', '.join(FORMATS)}, each also with {' or '.join(COMPRESSIONS)}."
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words by which `datasets` tells the splits of a folder → name of the split."""
_SPLIT = re.compile(rf"(?:.*[-_.])?({'|'.join(_SPLITS)})(_\w+?)?(?:[-_.]\d+(?:-of-\d+)?)?", re.IGNORECASE)
_METADATA = re.compile(
    r"(dataset_infos?|dataset_dict|state)\.json|(readme|licen[cs]e|notice|changelog)(\.(md|txt|rst))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LocalFiles:
    """The files of one source, sorted by path; `extension` is theirs without that of the compression.

    `skipped` has the files of its folder that are not read, by reason.
    """

    paths: list[Path]
    extension: str
    skipped: dict[str, list[Path]] = field(default_factory=dict)

    @functools.cached_property
    def scratch(self) -> Path:
        """Folder for decompressed copies of Parquet and Arrow files; removed with this object."""
        return scratch_folder(self)

    def fingerprint(self) -> str:
        """Hash of each file's name and whole content."""
        # A name need not be UTF-8.
        named = ((os.fsencode(path.name), file_hash(path).sha256) for path in self.paths)
        return short_hash(*(part for pair in named for part in pair))

    def summary(self) -> str:
        """What is read and what is not, in one line."""
        text = f"reads {_listed(self.paths)}"
        if self.skipped:
            reasons = (f"{_listed(paths)}: {reason}" for reason, paths in self.skipped.items())
            text += f"; skips {'; '.join(reasons)}"
        return text

    def readable(self, path: Path) -> Path:
        """The file itself, or a decompressed copy where its reader seeks."""
        if self.extension not in SEEKABLE or path.suffix.lower() not in COMPRESSIONS:
            return path
        copy = self.scratch / f"{short_hash(os.fsencode(path))}{self.extension}"
        if not copy.exists():
            part = copy.with_suffix(".part")
            with open_decompressed(path) as packed, part.open("wb") as file:
                shutil.copyfileobj(packed, file)
            part.rename(copy)  # a copy that was cut by an error is none
        return copy


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path that a user means: the one that is there under this very name, or else with `~` and `~NAME` as
    the home folder where there is one. `Path.expanduser` raises RuntimeError for ~NAME of nobody's."""
    path = Path(text)
    return path if os.path.lexists(path) else Path(os.path.expanduser(path))


def find_files(config: SourceConfig) -> LocalFiles:
    """The files that `config.path` names: a file, a folder with all below it, or a glob.

    Of a folder, `LocalFiles.skipped` says what is not read. Linked folders and files are followed, each real
    file once. A folder that `datasets` saved has the files that its own list names; of a folder with several
    splits, `config.hub_split` is read.

    Raises:
        CurriqError: nothing matches, a file is missing or cut to no bytes, a folder cannot be read, all files
            are empty, a format is unknown, formats are mixed, or there is no such split.
    """
    where = f"source {config.name!r}: path {config.path!r}"
    path = user_path(config.path)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        _refuse_revisions(path, where)
        found, skipped = _in_folder(path, config.hub_split, where)
        pattern = path / "**" / "*"
    else:
        named = [path] if os.path.lexists(path) else _glob(path, where)
        found, skipped = _read_once(sorted(file for file in named if not file.is_dir()))
        pattern = path
    if not found:
        raise CurriqError(
            f"{where} matches no file (current folder: {Path.cwd()}). Give a file, a folder or a glob such "
            "as 'data/*.jsonl.gz'; a data set of the hub is hub:NAME, the built-in text embedded:prose."
        )
    sizes = {file: _size(file, where) for file in found}
    extension = _common_extension(found, pattern, where)
    filled = [file for file in found if sizes[file]]
    if not filled:
        raise CurriqError(f"{where} holds no document with text: all its files are empty.")
    if len(filled) < len(found):
        skipped["empty"] = [file for file in found if not sizes[file]]
    return LocalFiles(filled, extension, skipped)


def _common_extension(found: list[Path], pattern: Path, where: str) -> str:
    by_extension = {extension_of(file): file for file in reversed(found)}
    for extension, file in by_extension.items():
        if extension not in FORMATS:
            hint = _RENAMED.get(extension) or did_you_mean(extension, FORMATS, "{}")
            raise CurriqError(f"{where}: {file.name} has the unknown format {extension!r}.{hint} {_KNOWN}")
    if len(by_extension) > 1:
        of_one = [file for file in found if extension_of(file) == min(by_extension)]
        examples = ", ".join(sorted(file.name for file in by_extension.values()))
        raise CurriqError(
            f"{where} mixes the formats {', '.join(sorted(by_extension))} ({examples}). One source has one "
            f"format: give each its own source, such as path='{_only(pattern, of_one)}'."
        )
    return min(by_extension)


def _only(pattern: Path, wanted: list[Path]) -> Path:
    """The pattern, narrowed to files of one extension."""
    extension = extension_of(wanted[0])
    if all(file.suffix.lower() in COMPRESSIONS for file in wanted):
        extension += wanted[0].suffix if len({file.suffix for file in wanted}) == 1 else ".*"
    elif any(file.suffix.lower() in COMPRESSIONS for file in wanted):
        extension += "*"
    before = pattern.name.removesuffix(".*")
    return pattern.with_name(before + ("" if before.endswith("*") else "*") + extension)


def _size(file: Path, where: str) -> int:
    """Bytes of a file; CurriqError where it is missing, or cut to none."""
    if not file.is_file():
        what = "is a link to nothing" if file.is_symlink() else "is missing"
        what = "is no regular file" if file.exists() else what
        raise CurriqError(f"{where}: {file} {what}. Fetch it, or take its name away.")
    size = file.stat().st_size
    if size == 0 and (extension_of(file) in NEVER_EMPTY or file.suffix.lower() in COMPRESSIONS):
        raise CurriqError(f"{where}: {file} has no bytes, so it has been cut: fetch it again, or remove it.")
    return size


Skipped = dict[str, list[Path]]


def _refuse_revisions(folder: Path, where: str) -> None:
    """CurriqError for a data set in the hub's cache of which several revisions are stored."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir() or not (folder / "blobs").is_dir():
        return
    revisions = sorted(at.name for at in snapshots.iterdir())
    if len(revisions) > 1:
        raise CurriqError(
            f"{where} holds {len(revisions)} revisions of a data set ({', '.join(revisions)}): name the "
            f"folder of one, such as path={snapshots / revisions[0]}."
        )


def _in_folder(folder: Path, split: str, where: str) -> tuple[list[Path], Skipped]:
    """The data files of a folder, sorted, and what is left out of them, by reason."""
    skipped: Skipped = defaultdict(list)
    inside = []
    saved = functools.cache(_saved)
    for file in _walk(folder, where):
        if file.name.startswith("."):
            skipped["hidden"].append(file)
        elif _METADATA.fullmatch(file.name) and (file.name != "state.json" or saved(file.parent)):
            skipped["about the data"].append(file)
        elif extension_of(file) not in FORMATS and not _leads_nowhere(file):
            skipped["of no known format"].append(file)
        elif saved(file.parent) and file.name not in saved(file.parent):
            skipped["not in the list of state.json"].append(file)
        else:
            inside.append(file)
    lists = [file.parent for file in skipped["about the data"] if file.name == "state.json"]
    listed = {at / name for at in lists for name in saved(at)}
    inside = _of_split(folder, sorted({*inside, *listed}), split, skipped, where)
    found, again = _read_once(inside)
    skipped = {reason: files for reason, files in (skipped | again).items() if files}
    if skipped and not found:
        seen = "; ".join(f"{_listed(paths)}: {reason}" for reason, paths in skipped.items())
        raise CurriqError(f"{where} holds no file of a known format. {_KNOWN} Skipped: {seen}.")
    return found, skipped


def _glob(pattern: Path, where: str) -> list[Path]:
    """The files that a pattern matches. `**` enters linked folders as `_walk` does: `glob` would follow a
    loop of links in every possible way."""
    parts = pattern.parts
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if "**" not in parts[magic:]:
        return [Path(name) for name in glob.glob(str(pattern))]
    above = Path(*parts[:magic])
    files = _walk(above, where) if os.path.isdir(above) else ()
    return [file for file in files if _matches(file.relative_to(above).parts, parts[magic:])]


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    first, *others = patterns
    if first == "**":
        return any(_matches(names[i:], others or ["*"]) for i in range(len(names)))
    hidden = bool(names) and names[0].startswith(".") and not first.startswith(".")
    return bool(names) and not hidden and fnmatch.fnmatch(names[0], first) and _matches(names[1:], others)


def _walk(folder: Path, where: str) -> Iterator[Path]:
    """Every file below a folder, through linked folders too, each real folder once and no hidden one."""

    def refuse(error: OSError) -> None:
        raise CurriqError(f"{where}: the folder {error.filename} cannot be read ({error.strerror}).")

    entered: set[str] = set()
    for at, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(at)
        if real in entered:  # a link to a folder above it, or to one that has been read
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(at, name) for name in sorted(names))


def _leads_nowhere(file: Path) -> bool:
    """Whether this is a link to nothing, perhaps for a folder of documents; a loop of links cannot be one."""
    try:
        file.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _saved(folder: Path) -> tuple[str, ...]:
    """Names of the data files in a folder that `Dataset.save_to_disk` wrote; none for any other folder."""
    entries = _entries(folder / "state.json", "_data_files")
    return tuple(
        str(entry["filename"]) for entry in entries if isinstance(entry, dict) and "filename" in entry
    )


def _entries(file: Path, key: str) -> list[Any]:
    """The list in a file of metadata; empty where it is not one that `datasets` wrote."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return []
    return entries if isinstance(entries, list) else []


def _of_split(folder: Path, files: list[Path], split: str, skipped: Skipped, where: str) -> list[Path]:
    """Files of one split, and those that name none; all where there are not two splits."""
    dicts = {
        file.parent: _entries(file, "splits")
        for file in skipped.get("about the data", ())
        if file.name == "dataset_dict.json"
    }
    split_of = {file: _split_name(file, folder, dicts) for file in files}
    counts = Counter(name for name in split_of.values() if name)
    counts.update({str(name): 0 for names in dicts.values() for name in names})
    if len(counts) < 2:
        return files
    wanted = split if split in counts else _SPLITS.get(split, split)
    if not counts[wanted]:
        raise CurriqError(
            f"{where} holds the splits {', '.join(sorted(+counts))}, but no file of {split!r}: name one of "
            "them with hub_split=SPLIT, or the files with a glob."
        )
    for name in sorted(+counts):
        if name != wanted:
            others = [file for file in files if split_of[file] == name]
            skipped[f"split {name!r}, while hub_split={split}"] = others
    return [file for file in files if split_of[file] in (None, wanted)]


def _split_name(file: Path, folder: Path, dicts: Iterable[Path]) -> str | None:
    """The split of a file: its folder in a `DatasetDict`, or what `datasets` would understand by its name."""
    for above in dicts:
        if file.is_relative_to(above) and len(parts := file.relative_to(above).parts) > 1:
            return parts[0]
    *folders, name = file.relative_to(folder).parts
    for part in (*folders, Path(name).stem, name.split(".")[0]):
        if match := _SPLIT.fullmatch(part):
            word = match[1].lower()
            return word + match[2] if match[2] else _SPLITS[word]
    return None


def _read_once(files: Iterable[Path]) -> tuple[list[Path], Skipped]:
    """The first name of each real file, and the others."""
    names: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        names[os.path.realpath(file)].append(file)
    again = [file for _, *others in names.values() for file in others]
    skipped: Skipped = {"another name of a file that is read": again} if again else {}
    return [first for first, *_ in names.values()], skipped


def _listed(paths: list[Path], shown: int = 3) -> str:
    """`3 files (a.txt, b.txt, …)`."""
    names = ", ".join(path.name for path in paths[:shown]) + (", …" if len(paths) > shown else "")
    return f"{len(paths)} {'file' if len(paths) == 1 else 'files'} ({names})"


def extension_of(path: Path) -> str:
    """Extension of the format, in lower case, without that of the compression."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


def open_decompressed(path: Path) -> io.BufferedReader:
    """The file without its compression, open for reading; OSError where a compressed file ends early."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    import pyarrow

    # Arrow's reader: that of zstandard takes the end of a cut file, or of its first frame, for the end.
    packed = pyarrow.input_stream(str(path), compression=compression)
    return io.BufferedReader(packed, 1 << 17)
