"""`curriq select` and `curriq score`: a filtered corpus, or the scores that it is filtered by."""

import argparse
import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from curriq.config import SourceConfig, Within, require
from curriq.curate import describe
from curriq.curate.arguments import SCORES
from curriq.curate.corpus import ScoredCorpus, Wanted, score
from curriq.curate.output import Columns, check_output, open_output, require_not_read, write_kept
from curriq.curate.progress import progress
from curriq.curate.ranking import KEYS, Choice, Documents, Keep, choose, parse_keep
from curriq.curate.rows import read_rows
from curriq.data.files import find_files, user_path
from curriq.data.ngrams import document_means
from curriq.errors import CurriqError
from curriq.runlog.storage import make_folder, replacing

_log = logging.getLogger("curriq")


def select_main(options: argparse.Namespace) -> int:
    """`curriq select`: the exit status."""
    keep = _keep(options)
    wanted = _wanted(options, user_path(options.out).absolute().parent)
    check_output(options.out, overwrite=options.overwrite, inputs=_read_for(wanted))
    return _stoppable(lambda: _select(options, wanted, keep))


def score_main(options: argparse.Namespace) -> int:
    """`curriq score`: the exit status."""
    out = user_path(options.out)
    require(out.suffix == ".parquet", f"--out {out}: the scores are written as .parquet.")
    require(not os.path.isdir(out), f"--out {out} is a folder: choose another name, or remove it first.")
    require(
        options.overwrite or not os.path.exists(out),
        f"--out {out} exists: choose another name, or replace it with --overwrite.",
    )
    wanted = _wanted(options, out.absolute().parent)
    require_not_read(str(out), _read_for(wanted))
    return _stoppable(lambda: _score(out, wanted))


def _wanted(options: argparse.Namespace, beside: Path) -> Wanted:
    names = list(options.NAMES)
    run = None
    if not options.target:
        require(
            bool(names),
            "RUN is missing: name the folder of a run, or text of the kind that is wanted with --target: "
            "`curriq select --target news.csv crawl.jsonl --out clean.jsonl`.",
        )
        run = user_path(names.pop(0))
        require(
            os.path.exists(run / "config.toml"),
            f"{run} is no folder of a run (it has no config.toml). To select by text of the kind that is "
            "wanted, without a run, write --target FILE.",
        )
    require(
        bool(names) or run is not None, "there are no FILES to select from: name files, folders or globs."
    )
    if options.window is not None:
        Within("[2, 1e6]").check("window", options.window)
    scores = beside / SCORES if options.scores is None else user_path(options.scores)
    for folder in filter(None, (*names, options.target)):
        _require_unread(scores, folder)
    return Wanted(
        run=run,
        target=options.target,
        files=tuple(names),
        text_field=options.text_field,
        target_text_field=options.target_text_field,
        documents=options.documents,
        on_bad_row=options.on_bad_row,
        source=options.source,
        tokenizer=options.tokenizer,
        model=options.model,
        window=options.window,
        by=getattr(options, "by", None),
        scores=scores,
        workers=options.workers,
    )


def _require_unread(scores: Path, folder: str) -> None:
    """Raise CurriqError where the next call would read the scores as text of a folder."""
    inside, of = scores.resolve(), user_path(folder).resolve()
    if os.path.isdir(of) and inside.is_relative_to(of):
        hidden = any(part.startswith(".") for part in inside.relative_to(of).parts)
        require(
            hidden,
            f"--scores {scores} lies in {folder}, which is read: choose another folder, or .{scores.name}.",
        )


def _read_for(wanted: Wanted) -> list[Path]:
    """What a call reads, as far as it names it: the corpus, the target, the run."""
    files = [] if wanted.run is None else [wanted.run / "config.toml"]
    for path in filter(None, (*wanted.files, wanted.target)):
        with contextlib.suppress(CurriqError):  # what is wrong with it is said where it is read
            files += find_files(SourceConfig(name=path, path=path)).paths
    return files


def _keep(options: argparse.Namespace) -> Keep:
    require(bool(options.prefix), "--prefix is empty: the new columns need names of their own.")
    return parse_keep(options.keep, options.keep_unit, options.threshold)


def _stoppable(work: Callable[[], int]) -> int:
    try:
        return work()
    except KeyboardInterrupt:
        _log.warning("stopped; what has been scored is kept, and the same command goes on from there.")
        return 130


def _select(options: argparse.Namespace, wanted: Wanted, keep: Keep) -> int:
    corpus = score(wanted, progress)
    names = [options.prefix + name for name in ("score", "rank")]
    if taken := sorted({*names} & {*corpus.totals.columns, *corpus.inputs.columns()}):
        raise CurriqError(
            f"the rows have a column {taken[0]!r} already: name the new ones otherwise with --prefix "
            f"(new-{options.prefix} for instance)."
        )
    read = (file.path for file in corpus.inputs.files)  # of a run without FILES only known by now
    out = check_output(options.out, overwrite=options.overwrite, inputs=read)
    documents = corpus.documents()
    by = wanted.by or corpus.scorer.default
    automatic = keep.share is None and keep.threshold is None
    posterior = corpus.posterior(documents) if automatic and len(documents) else None
    choice = choose(documents, by, keep, posterior)
    summary = _write(corpus, documents, choice, out, options.out, names)
    if options.json:
        print(json.dumps(summary.json(), indent=1, ensure_ascii=False))
    else:
        describe.print_summary(
            summary, [f"\nscores  {corpus.folder.folder} (another --keep needs no new ones)"]
        )
    return 0


def _write(
    corpus: ScoredCorpus, documents: Documents, choice: Choice, out: Path, name: str, names: list[str]
) -> describe.Summary:
    """Write the kept rows; returns the summary."""
    if not choice.kept.any():
        best = documents.score(choice.by).max()
        raise CurriqError(
            f"nothing is kept ({choice.rule}); the best document has {best:.4g}. Give --keep SHARE."
        )
    texts = describe.sampled(documents, choice)
    read = np.union1d(np.flatnonzero(choice.kept), np.fromiter(texts, np.int64, len(texts)))
    columns = Columns(names[0], names[1], documents.score(choice.by), choice.rank)
    with open_output(out, columns) as output:
        rows = read_rows(corpus.inputs, documents.file, documents.row, read)
        write_kept(rows, output, choice.kept, texts)
    scorer = corpus.scorer
    return describe.summarise(name, scorer.name, corpus.inputs, corpus.totals, documents, choice, texts)


def _score(out: Path, wanted: Wanted) -> int:
    corpus = score(wanted, progress)
    require_not_read(str(out), (file.path for file in corpus.inputs.files))
    # A name need not be UTF-8, which a table's text is.
    names = (os.fsencode(file.path).decode(errors="backslashreplace") for file in corpus.inputs.files)
    files = pa.array(list(names))
    make_folder(out.absolute().parent)
    windows = 0
    with replacing(out) as temporary:
        writer = None
        for table in corpus.folder.tables():
            named = _with_documents(table.replace_schema_metadata(None), files)
            writer = writer or parquet.ParquetWriter(temporary, named.schema, compression="zstd")
            writer.write_table(named)
            windows += len(named)
        assert writer is not None
        writer.close()
    documents = corpus.documents()
    print(
        f"{out}: {windows:,} windows of {len(documents):,} documents, {int(documents.tokens.sum()):,} tokens"
    )
    for pair, rho in documents.agreement().items():
        print(f"Spearman's ρ of {pair}, over documents: {rho:.3f}")
    return 0


def _with_documents(table: pa.Table, files: pa.Array) -> pa.Table:
    """The table with names of files, and beside the windows' scores those of their documents."""
    first = np.flatnonzero(table.column("window").to_numpy() == 0)
    per_document = np.diff(np.append(first, len(table)))
    taught = table.column("learnt").to_numpy().astype(np.int64)
    for name in [name for name in table.column_names if name not in KEYS]:
        means = document_means(table.column(name).to_numpy(), taught, per_document)
        column = pa.array(np.repeat(means, per_document).astype(np.float32))
        table = table.append_column(f"document_{name}", column)
    names = pa.DictionaryArray.from_arrays(table.column("file").combine_chunks(), files)
    return table.set_column(0, "file", names)
