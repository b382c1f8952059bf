"""The arguments of `curriq select` and `curriq score`, which can be parsed before torch is loaded."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from curriq.parser import Parser

SELECT = """Write the documents worth keeping: every input column, and score and rank beside them.

  curriq select --target news.csv crawl/*.jsonl.gz --keep 0.3 --out clean.jsonl
  curriq select runs/mine --keep 0.3 --out clean.parquet      the run's own sources, by what it has learnt
  curriq select runs/mine more.jsonl --by q --out more/       a folder for datasets.load_from_disk

A document is kept or dropped whole. Its score is the mean over its windows, weighed by their tokens. Without
--keep and --threshold, what is likelier as text of the target than as text of the corpus is kept. Scores lie
in a folder beside the output, so another share, or going on after Ctrl-C, scores nothing twice."""
SCORES = ".curriq-scores"
"""Folder of the scores, beside the output; hidden, so that no folder of the corpus holds it as text."""
SCORE = """Write the scores of every window and document as one Parquet file.

  curriq score --target news.csv crawl/*.jsonl.gz --out scores.parquet
  curriq score runs/mine --out scores.parquet

Columns: file, row, window, tokens; dsir (nats per n-gram), q (nats per token), policy (probability of being
accepted) of the window, those that there are; and document_dsir and so on, of the whole row."""


def select_options(arguments: Sequence[str]) -> argparse.Namespace:
    """What `curriq select` is given."""
    parser = _parser("curriq select", SELECT, "--out OUT")
    add = parser.add_argument_group("what is kept").add_argument
    add("--keep", metavar="SHARE", default="auto", help="share in (0, 1], or auto (default: auto)")
    unit = "what --keep is a share of (default: tokens, the budget of training)"
    add("--keep-unit", choices=("tokens", "documents"), default="tokens", help=unit)
    add("--threshold", type=float, metavar="SCORE", help="keep what scores at least this, in place of --keep")
    of_run = "policy of a run, or q where it filters no stream"
    add("--by", choices=("dsir", "q", "policy"), help=f"rank by (default: dsir of a target, {of_run})")
    add = parser.add_argument_group("output").add_argument
    out = ".jsonl (also .gz, .zst), .parquet, or a folder for datasets.load_from_disk"
    add("--out", required=True, help=out)
    prefix = "of the new columns PREFIXscore and PREFIXrank (default: curriq_)"
    add("--prefix", default="curriq_", help=prefix)
    replaced = "replace an output that exists; of folders, a data set that was written before"
    add("--overwrite", action="store_true", help=replaced)
    add("--json", action="store_true", help="print the summary as JSON")
    return parser.parse_args(list(arguments))


def score_options(arguments: Sequence[str]) -> argparse.Namespace:
    """What `curriq score` is given."""
    parser = _parser("curriq score", SCORE, "[--out OUT]")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("scores.parquet"), help="the file (default: scores.parquet)")
    add("--overwrite", action="store_true", help="replace a file that exists")
    return parser.parse_args(list(arguments))


def _parser(prog: str, description: str, out: str) -> Parser:
    usage = f"{prog} (RUN | --target TARGET) [FILES ...] {out} [options]"
    how = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=prog, usage=usage, description=description, formatter_class=how)
    named = (
        "folder of a run, unless --target is given; then files, folders or globs (default: the run's sources)"
    )
    parser.add_argument("NAMES", nargs="*", metavar="RUN FILES", help=named)
    add = parser.add_argument_group("what is read").add_argument
    add("--target", default="", help="text of the kind that is wanted: a file, folder or glob; needs no run")
    add("--text-field", metavar="COLUMN", help="column of the text (default: text, or as in the run)")
    add("--target-text-field", metavar="COLUMN", help="the same of the target (default: --text-field)")
    documents = "what one document is in a .txt file (default: paragraph, or as in the run)"
    add("--documents", choices=("file", "paragraph", "line"), help=documents)
    bad = "what a row that does not fit does: end the call, or be left out (default: error, or as in the run)"
    add("--on-bad-row", choices=("error", "skip"), help=bad)
    add("--source", metavar="NAME", help="source of the run that the FILES are like")
    add = parser.add_argument_group("how it is scored").add_argument
    add(
        "--tokenizer",
        default="auto",
        help="with --target: folder, hub name or train (default: that of --model)",
    )
    add("--model", help="with --target: model whose tokenizer is used (default: one is trained)")
    add("--window", type=int, help="with --target: tokens per window (default: 128)")
    add("--workers", type=int, default=0, help="processes; 0 for all cores (default: 0)")
    add("--scores", type=Path, help=f"folder of the scores (default: {SCORES} beside the output)")
    return parser
