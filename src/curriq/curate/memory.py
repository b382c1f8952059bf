"""Scores and selection of documents that a program holds, such as a `datasets.Dataset`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from curriq.config import RunConfig, require
from curriq.curate.build import StaticJudge, build_target, posterior_of, scorer_of_run, target_tokenizer
from curriq.curate.documents import Cutter
from curriq.curate.ranking import Documents, Unit, choose, parse_keep
from curriq.curate.scoring import Judge
from curriq.data.documents import Document, shorten, valid_text
from curriq.data.ngrams import NgramCounts, document_means
from curriq.errors import CurriqError

BATCH = 1024

Row = str | Mapping[str, Any]
By = Literal["dsir", "q", "policy"]


@dataclass(frozen=True)
class DocumentScores:
    """Scores of documents.

    Attributes:
        indices: place of each scored document among those given, ascending; the others hold no text.
        tokens: of each.
        scores: by name: `dsir`, nats per n-gram; of a run also `q`, nats per token, and `policy`, the mean
            probability with which its filter accepts the document's windows.
        default: the score that documents are ranked by where nothing else is said.
    """

    indices: Int[np.ndarray, "d"]
    tokens: Int[np.ndarray, "d"]
    scores: dict[str, Float[np.ndarray, "d"]]
    default: str
    posterior: Float[np.ndarray, "d"] | None

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Selection:
    """Documents that are worth keeping: `dataset.select(selection.indices)`.

    Attributes:
        indices: their places among those given, ascending.
        scores: of each.
        ranks: of each, from 1, the best of all.
        tokens: of each.
    """

    indices: Int[np.ndarray, "k"]
    scores: Float[np.ndarray, "k"]
    ranks: Int[np.ndarray, "k"]
    tokens: Int[np.ndarray, "k"]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices.tolist())


def score_documents(
    documents: Iterable[Row],
    *,
    target: Iterable[Row] | None = None,
    run: str | Path | None = None,
    text_field: str = "text",
    source: int = 0,
    window: int = 128,
    tokenizer: str = "auto",
) -> DocumentScores:
    """The scores of some documents, by a target or by a finished run.

    Args:
        documents: texts, or rows with a text; a list, since a target needs them twice, and no generator.
        target: texts or rows of the kind that is wanted.
        run: folder of a run, in place of a target.
        source: position of the run's source that the documents are like.
        window: with a target, tokens per window.
        tokenizer: with a target: a folder, a name of the hub, or `auto`, which trains one.

    Raises:
        CurriqError: neither or both of target and run are given, a row has no such column, nothing holds a
            text, or the run ranks no documents.
    """
    require((target is None) != (run is None), "score_documents: give either a target or a run.")
    _require_listed("documents", documents)
    _require_listed("target", () if target is None else target)
    require(
        iter(documents) is not documents,
        "documents: they are read twice, so give a list, and no iterator or generator.",
    )
    if run is not None:
        scorer, _ = scorer_of_run(Path(run))
        cutter = Cutter(scorer.tokenizer, scorer.length)
        return _scored(_documents(documents, text_field), cutter, scorer.judge, source, scorer.default)
    assert target is not None
    wanted = [document for _, part in _documents(target, text_field) for document in part]
    require(bool(wanted), "target: it holds no text; give texts of the kind that is wanted.")
    config = RunConfig().override(tokenizer=tokenizer, window=window)

    def corpus() -> Iterator[Document]:
        return (document for _, part in _documents(documents, text_field) for document in part)

    chosen = target_tokenizer(config, lambda: iter(wanted), corpus)
    cutter = Cutter(chosen, window)
    own = build_target("target", wanted, chosen, window)
    counts = NgramCounts.none()
    for _, part in _documents(documents, text_field):
        counts = counts + NgramCounts.of(cutter(part)[1], of_target=False)
    dsir = own.against(counts)
    found = _scored(_documents(documents, text_field), cutter, StaticJudge(dsir), 0, "dsir")
    posterior = posterior_of(_as_documents(found), own.scores(dsir)) if len(found) else None
    return DocumentScores(found.indices, found.tokens, found.scores, found.default, posterior)


def select_documents(
    documents: Iterable[Row],
    *,
    keep: float | Literal["auto"] = "auto",
    keep_unit: Unit = "tokens",
    threshold: float | None = None,
    by: By | None = None,
    **how: Any,
) -> Selection:
    """The documents worth keeping; see docs/select.md.

    Args:
        documents: as in `score_documents`.
        keep: share in (0, 1] of the tokens or documents; `auto` keeps what is likelier as text of the target
            than as text of the corpus.
        threshold: least score, in place of a share.
        by: score to rank by; when None a target's `dsir`, or a run's policy, or its `q` where it filters no
            stream.
        how: target or run, and whatever else `score_documents` takes.

    Raises:
        CurriqError: as `score_documents`; or the share is not in (0, 1], or there is no such score.
    """
    wanted = parse_keep(keep, keep_unit, threshold)
    scores = score_documents(documents, **how)
    require(len(scores) > 0, "documents: none of them holds a text, so there is nothing to keep.")
    if wanted.share is None and wanted.threshold is None and scores.posterior is None:
        raise CurriqError("keep='auto': Q of this run says of no document that it is enough: give a share.")
    choice = choose(_as_documents(scores), by or scores.default, wanted, scores.posterior)
    kept = choice.kept
    ranked = scores.scores[choice.by][kept]
    return Selection(scores.indices[kept], ranked, choice.rank[kept], scores.tokens[kept])


def _require_listed(name: str, rows: Any) -> None:
    """CurriqError for what Python would iterate over and is no list of documents: the letters of a text, the
    columns of a table."""
    kind = type(rows).__name__
    if isinstance(rows, str | bytes):
        raise CurriqError(
            f"{name}: one {kind} is no list of documents; write [{name}], or read the file first."
        )
    if isinstance(rows, Mapping) or hasattr(rows, "columns"):
        names = ", ".join(map(str, islice(getattr(rows, "column_names", rows), 5)))
        raise CurriqError(
            f"{name}: a {kind} is a table or several ({names}), no list of documents; give one column or "
            f"split of it, such as list({name}['text']) or {name}['train']."
        )


def _as_documents(found: DocumentScores) -> Documents:
    one_file = np.zeros(len(found), np.int32)
    return Documents(one_file, found.indices, found.tokens, found.scores)


def _documents(rows: Iterable[Row], text_field: str) -> Iterator[tuple[list[int], list[Document]]]:
    """Places and documents of the rows with a text, in batches."""
    numbered = enumerate(rows)
    while batch := list(islice(numbered, BATCH)):
        texts = [(place, _text(row, text_field, place)) for place, row in batch]
        full = [(place, text) for place, text in texts if text and not text.isspace()]
        yield [place for place, _ in full], [Document(valid_text(text).strip("\n")) for _, text in full]


def _text(row: Row, text_field: str, place: int) -> str:
    value = row.get(text_field) if isinstance(row, Mapping) else row
    if not isinstance(value, str):
        if not isinstance(row, Mapping):
            raise CurriqError(f"document {place}: {shorten(row)} is neither a text nor a row with columns.")
        columns = f"; columns: {', '.join(map(str, row))}"
        raise CurriqError(f"document {place}: there is no text in text_field={text_field!r}{columns}.")
    return value


def _scored(
    parts: Iterable[tuple[list[int], list[Document]]], cutter: Cutter, judge: Judge, source: int, default: str
) -> DocumentScores:
    indices, tokens = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    scores: dict[str, list[np.ndarray]] = {name: [np.zeros(0)] for name in judge.columns}
    for places, documents in parts:
        kept, cut = cutter(documents)
        found = judge(cut, None if judge.dsir is None else judge.dsir(cut), source)
        indices.append(np.array(places, np.int64)[np.array(kept, np.int64)])
        first = cut.per_document.cumsum() - cut.per_document
        tokens.append(np.add.reduceat(cut.windows, first) if len(first) else first)
        for name, values in found.items():
            scores[name].append(document_means(values, cut.taught, cut.per_document))
    joined = {name: np.concatenate(values) for name, values in scores.items()}
    policy = joined.get("policy")
    return DocumentScores(np.concatenate(indices), np.concatenate(tokens), joined, default, policy)
