"""Documents by their scores: pooled from windows, ranked, and how many of them are kept."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr

from curriq.config import Within, did_you_mean, require
from curriq.data.ngrams import document_means
from curriq.errors import CurriqError

_log = logging.getLogger("curriq")

Unit = Literal["tokens", "documents"]
LONG = 0.1
"""Of a budget of tokens; a longer document is passed over where it does not fit, and does not end it."""
MISSED = 0.05
"""Of the share of tokens that is asked for; what misses it by more is said."""
KEYS = ("file", "row", "window", "tokens", "learnt")
"""Columns of the windows' table that are no scores."""
EVEN = 0.5
"""Without a share a document is kept where it is as likely of the target's kind as not."""


@dataclass(frozen=True)
class Documents:
    """The scored documents of a corpus, in its order.

    Attributes:
        file: position of each document's file.
        row: its row there, from 0.
        tokens: its tokens.
        scores: by name: the mean over its windows, each weighed by its tokens.
    """

    file: Int[np.ndarray, "d"]
    row: Int[np.ndarray, "d"]
    tokens: Int[np.ndarray, "d"]
    scores: dict[str, Float[np.ndarray, "d"]]

    def __len__(self) -> int:
        return len(self.row)

    def score(self, name: str) -> Float[np.ndarray, "d"]:
        """The scores of this name; CurriqError where there are none."""
        if name not in self.scores:
            raise CurriqError(
                f"--by {name}: these documents have the scores {', '.join(self.scores)}."
                f"{did_you_mean(name, self.scores)} Q and policy are those of a run: give the folder of one "
                "that was trained with a stream filter (--preset recommended) in place of --target."
            )
        return self.scores[name]

    def order(self, by: str) -> Int[np.ndarray, "d"]:
        """Places of the documents, best first. Equal ones are ordered by the other scores, `dsir` first, and
        then as the corpus has them, so that the order does not depend on anything else."""
        names = [by, *(name for name in ("dsir", "q", "policy") if name in self.scores and name != by)]
        keys = [-self.score(name) for name in reversed(names)]
        return np.lexsort([np.arange(len(self)), *keys])

    def agreement(self) -> dict[str, float]:
        """Spearman's ρ of each two scores, NaN where either is constant; by "dsir and q"."""
        found = {}
        for one, other in combinations(self.scores, 2):
            a, b = self.scores[one], self.scores[other]
            varies = len(self) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
            found[f"{one} and {other}"] = float(spearmanr(a, b).statistic) if varies else float("nan")
        return found


def pooled(tables: Iterable[pa.Table]) -> Documents:
    """The documents of tables with one row per window."""
    parts: list[Documents] = []
    for table in tables:
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        first = np.flatnonzero(columns["window"] == 0)
        per_document = np.diff(np.append(first, len(columns["window"])))
        tokens = columns["tokens"].astype(np.int64)
        scores = {
            name: document_means(values, columns["learnt"].astype(np.int64), per_document)
            for name, values in columns.items()
            if name not in KEYS
        }
        total = np.add.reduceat(tokens, first) if len(first) else tokens
        parts.append(Documents(columns["file"][first], columns["row"][first], total, scores))
    joined = {name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores}
    file, row, tokens = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("file", "row", "tokens")
    )
    return Documents(file, row, tokens, joined)


@dataclass(frozen=True)
class Keep:
    """How much is kept: a share, all from a threshold on, or (neither) what is like the target.

    Attributes:
        share: in (0, 1], of the unit.
        unit: whether the share is one of all tokens or of all documents.
        threshold: least score.
    """

    share: float | None = None
    unit: Unit = "tokens"
    threshold: float | None = None


def parse_keep(keep: str | float, unit: Unit = "tokens", threshold: float | None = None) -> Keep:
    """How much is kept; CurriqError for a share outside (0, 1], or a share and a threshold."""
    require(threshold is None or not math.isnan(threshold), "--threshold nan: it must be a score.")
    shared = unit == "tokens" or keep != "auto"
    require(shared, f"--keep-unit {unit} says what --keep is a share of: give --keep SHARE, such as 0.3.")
    if keep == "auto":
        return Keep(threshold=threshold)
    require(threshold is None, "--keep with --threshold: give one of them.")
    try:
        share = float(keep)
    except (TypeError, ValueError):
        raise CurriqError(f"--keep {keep}: it must be a share such as 0.3, or auto.") from None
    Within("(0, 1]", "; 0.3 keeps 30 %").check("keep", share)
    return Keep(share=share, unit=unit)


@dataclass(frozen=True)
class Choice:
    """The documents that are kept.

    Attributes:
        kept: whether each document is.
        rank: of each document, from 1, the best.
        by: name of the score.
        least: score of the last document kept; NaN where none is.
        rule: how it was chosen, in words.
    """

    kept: Bool[np.ndarray, "d"]
    rank: Int[np.ndarray, "d"]
    by: str
    least: float
    rule: str


def choose(documents: Documents, by: str, keep: Keep, posterior: Float[np.ndarray, "d"] | None) -> Choice:
    """The documents to keep.

    Args:
        posterior: probability of each that it is of the target's kind, for a `keep` without share and
            threshold.

    Raises:
        CurriqError: there is no such score, or no document to keep.
    """
    if not len(documents):
        raise CurriqError("no row holds a text, so there is nothing to keep.")
    score, order = documents.score(by), documents.order(by)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    kept = np.zeros(len(order), bool)
    if keep.threshold is not None:
        kept, rule = score >= keep.threshold, f"{by} of {keep.threshold:g} or more"
    elif keep.share is not None:
        kept[order] = _within(documents.tokens[order], keep)
        rule = f"the best {keep.share:.1%} of the {keep.unit} by {by}".replace(".0%", "%")
        if over := int((~kept & (rank < rank[kept].max())).sum()):
            rule += f", but for {over:,} longer than what was left"
    else:
        assert posterior is not None
        kept = posterior >= EVEN
        if "dsir" in documents.scores:  # a target that the corpus has nothing of: what is nearest to it
            kept |= documents.scores["dsir"] >= 0
        rule = "what is likelier as text of the target than as text of the corpus"
    least = float(score[kept].min()) if kept.any() else float("nan")
    return Choice(kept, rank, by, least, rule)


def _within(tokens: Int[np.ndarray, "d"], keep: Keep) -> Bool[np.ndarray, "d"]:
    """Which of documents with so many tokens, best first, the share holds; at least one. A budget of tokens
    is not exceeded: it ends with the first document that does not fit, but for `LONG` ones, of which no more
    are passed over than are kept, or one: others would come from far down the ranking."""
    assert keep.share is not None
    kept = np.zeros(len(tokens), bool)
    if keep.unit == "documents":
        kept[: max(1, round(keep.share * len(tokens)))] = True
        return kept
    budget = keep.share * tokens.sum() * (1 + 1e-12)
    total = tokens.cumsum()
    place, over = 0, 0  # documents passed over, and their tokens
    for passed in range(len(tokens)):
        end = max(place, int(np.searchsorted(total, budget + over, side="right")))
        kept[place:end] = True
        if end == len(tokens) or tokens[end] <= LONG * budget or passed >= max(1, kept.sum()):
            break
        place, over = end + 1, over + int(tokens[end])
    kept[0] |= not kept.any()
    share = tokens[kept].sum() / tokens.sum()
    if abs(share / keep.share - 1) > MISSED:
        _log.warning(
            f"--keep {keep.share:g}: what is kept holds {share:.2%} of the tokens, because documents are too "
            "long for a closer share; --keep-unit documents keeps a share of the documents."
        )
    return kept
