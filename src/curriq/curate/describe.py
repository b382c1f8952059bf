"""What was kept and what was dropped, in words and numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curriq import terminal
from curriq.config import source_table
from curriq.curate.inputs import READING, Inputs
from curriq.curate.ranking import Choice, Documents
from curriq.curate.scoring import Totals
from curriq.report.topics import STOP_WORDS, WORD, find_topics

if TYPE_CHECKING:
    from rich.table import Table

SAMPLE = 1000
"""Kept documents, and dropped ones, whose words are looked at."""
EXAMPLES = 3
"""Documents that are shown from each end of the ranking."""
SHOWN = 110
"""Characters of an example."""
LOOKED_AT = 4000
"""Characters of a document whose words are counted."""
TOPICS = 8
WORDS = 12
PRIOR_WORDS = 1000.0
"""Mass of the prior of the words' log-odds."""


@dataclass(frozen=True)
class SourceShare:
    """What is kept of a source; `weight` is its share of the tokens that are kept, `reading` how its rows are
    read, where that is not the default."""

    name: str
    path: str
    reading: dict[str, str]
    documents: int
    documents_kept: int
    tokens: int
    tokens_kept: int
    weight: float


@dataclass(frozen=True)
class TopicShare:
    """A kind of text: words that are typical of it, share of the documents, share of these that is kept."""

    words: str
    share: float
    kept: float


@dataclass(frozen=True)
class Summary:
    """What a selection did; `examples` have (score, text) of the highest and the lowest documents."""

    out: str
    scored_by: str
    by: str
    rule: str
    least: float
    rows: int
    rows_without_text: int
    rows_skipped: int
    documents: int
    documents_kept: int
    tokens: int
    tokens_kept: int
    agreement: dict[str, float]
    sources: list[SourceShare]
    topics: list[TopicShare]
    words_kept: list[str]
    words_dropped: list[str]
    highest: list[tuple[float, str]]
    lowest: list[tuple[float, str]]

    def json(self) -> dict[str, Any]:
        """Plain values; None for a number that is not defined."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sampled(documents: Documents, choice: Choice) -> dict[int, str]:
    """Places of the documents whose text `summarise` needs, evenly over the corpus and at both ends of the
    ranking; their texts are still empty."""
    by_rank = choice.rank.argsort()
    places = [by_rank[:EXAMPLES], by_rank[-EXAMPLES:]]
    places += [_spread(np.flatnonzero(choice.kept == kept)) for kept in (True, False)]
    return dict.fromkeys(sorted(set(np.concatenate(places).tolist())), "")


def _spread(places: np.ndarray) -> np.ndarray:
    return places[np.unique(np.linspace(0, len(places) - 1, SAMPLE).astype(int))] if len(places) else places


def summarise(
    out: str,
    scored_by: str,
    inputs: Inputs,
    totals: Totals,
    documents: Documents,
    choice: Choice,
    texts: dict[int, str],
) -> Summary:
    """The summary of a selection; `texts` has those that `sampled` asked for."""
    kept, by_rank = choice.kept, choice.rank.argsort()
    looked = [[texts[place][:LOOKED_AT] for place in texts if kept[place] == side] for side in (True, False)]
    score = documents.score(choice.by)

    def examples(places: np.ndarray) -> list[tuple[float, str]]:
        return [(float(score[place]), _one_line(texts[place])) for place in places.tolist()]

    most, least = _typical_words(*looked)
    return Summary(
        out=out,
        scored_by=scored_by,
        by=choice.by,
        rule=choice.rule,
        least=choice.least,
        rows=totals.rows,
        rows_without_text=totals.empty,
        rows_skipped=totals.skipped,
        documents=len(documents),
        documents_kept=int(kept.sum()),
        tokens=int(documents.tokens.sum()),
        tokens_kept=int(documents.tokens[kept].sum()),
        agreement=documents.agreement(),
        sources=_shares(inputs, documents, kept),
        topics=_topics(*looked, int(kept.sum()), int((~kept).sum())),
        words_kept=most,
        words_dropped=least,
        highest=examples(by_rank[:EXAMPLES]),
        lowest=examples(by_rank[-EXAMPLES:]),
    )


def _one_line(text: str) -> str:
    line = " ".join(text[: 4 * SHOWN].split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def _shares(inputs: Inputs, documents: Documents, kept: np.ndarray) -> list[SourceShare]:
    of_file = np.array([file.source for file in inputs.files], np.int64)
    source = of_file[documents.file]
    count = len(inputs.sources)
    counted = {
        "documents": np.bincount(source, minlength=count),
        "documents_kept": np.bincount(source[kept], minlength=count),
        "tokens": np.bincount(source, documents.tokens, count).astype(np.int64),
        "tokens_kept": np.bincount(source[kept], documents.tokens[kept], count).astype(np.int64),
    }
    total = max(1, int(counted["tokens_kept"].sum()))
    keys = (*READING, "hub_split")  # what a source that reads the same documents needs
    return [
        SourceShare(
            entry.config.name,
            entry.config.path,
            {name: value for name, value in source_table(entry.config).items() if name in keys},
            **{name: int(values[place]) for name, values in counted.items()},
            weight=int(counted["tokens_kept"][place]) / total,
        )
        for place, entry in enumerate(inputs.sources)
    ]


def _topics(kept: list[str], dropped: list[str], kept_in_all: int, dropped_in_all: int) -> list[TopicShare]:
    """Topics of a sample, each with the share that is kept, most first."""
    found = find_topics([*kept, *dropped], TOPICS) if kept and dropped else None
    if found is None:
        return []
    each = np.array([kept_in_all / len(kept)] * len(kept) + [dropped_in_all / len(dropped)] * len(dropped))
    is_kept = np.arange(len(each)) < len(kept)
    size = np.bincount(found.of, each, len(found.names))
    share = np.bincount(found.of, each * is_kept, len(found.names)) / size
    order = np.argsort(-share, kind="stable").tolist()
    return [TopicShare(found.names[i], float(size[i] / size.sum()), float(share[i])) for i in order]


def _typical_words(kept: Sequence[str], dropped: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that set kept documents apart from dropped ones, and the other way round.

    By the z-score of the log-odds ratio with an informative Dirichlet prior (Monroe et al. 2008, "Fightin'
    Words"), counting in how many documents a word occurs.
    """
    counts = [Counter(word for text in texts for word in _words(text)) for texts in (kept, dropped)]
    together = counts[0] + counts[1]
    words = sorted(word for word in together if together[word] > 1)  # sets have an order of each process
    if not kept or not dropped or len(words) < 2:  # the odds of a word are against the others
        return [], []
    prior = np.array([together[word] for word in words], float)
    prior *= PRIOR_WORDS / prior.sum()
    ours, theirs = (np.array([count[word] for word in words]) + prior for count in counts)
    odds = np.log(ours / (ours.sum() - ours)) - np.log(theirs / (theirs.sum() - theirs))
    z = odds / np.sqrt(1 / ours + 1 / theirs)
    order = np.argsort(-z, kind="stable").tolist()
    return (
        [words[i] for i in order[:WORDS] if z[i] > 0],
        [words[i] for i in order[::-1][:WORDS] if z[i] < 0],
    )


def _words(text: str) -> set[str]:
    return set(WORD.findall(text.lower())) - STOP_WORDS


def print_summary(summary: Summary, extra: Sequence[str] = ()) -> None:
    """The summary for a reader."""
    from rich.text import Text

    console = terminal.console(soft_wrap=True)
    kept = f"{summary.documents_kept:,} of {summary.documents:,} documents"
    tokens = f"{summary.tokens_kept:,} of {summary.tokens:,} tokens"
    shares = [
        _percent(summary.documents_kept, summary.documents),
        _percent(summary.tokens_kept, summary.tokens),
    ]
    console.print(Text.assemble("\n", (summary.out, "bold"), f"  {summary.rule}"))
    console.print(f"kept {kept} ({shares[0]}), {tokens} ({shares[1]})")
    console.print(
        f"scored by {summary.scored_by}; the last that is kept has {summary.by} {summary.least:.4g}"
    )
    left_out = {"without text": summary.rows_without_text, "skipped": summary.rows_skipped}
    if told := ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count):
        console.print(f"rows left out: {told}")
    console.print(_source_table(summary))
    for pair, rho in summary.agreement.items():
        undefined = "undefined: one of them is the same for all documents"
        console.print(f"Spearman's ρ of {pair}: {undefined if math.isnan(rho) else f'{rho:.3f}'}")
    if summary.topics:
        console.print(_topic_table(summary))
    for name, words in (("kept", summary.words_kept), ("dropped", summary.words_dropped)):
        if words:
            console.print(f"words of what was {name}: {', '.join(words)}")
    for name, examples in (("highest", summary.highest), ("lowest", summary.lowest)):
        console.print(Text(f"\n{name} by {summary.by}", style="bold"))
        for score, text in examples:
            console.print(f"  {score:8.3f}  {text}")
    for line in extra:
        console.print(line)
    console.print(
        Text("\nthe same mixture of the sources as they are, without choosing documents", style="bold")
    )
    console.print(mixture(summary))


def _percent(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"


def _source_table(summary: Summary) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("source", no_wrap=True)
    for heading in ("documents", "kept", "tokens", "kept", "of what is kept"):
        table.add_column(heading, justify="right")
    for source in summary.sources:
        table.add_row(
            source.name,
            f"{source.documents:,}",
            _percent(source.documents_kept, source.documents),
            f"{source.tokens:,}",
            _percent(source.tokens_kept, source.tokens),
            f"{source.weight:.1%}",
        )
    return table


def _topic_table(summary: Summary) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("kept", justify="right")
    table.add_column("of all", justify="right")
    table.add_column("kind of text, by its words (a sample)")
    for topic in summary.topics:
        table.add_row(f"{topic.kept:.0%}", f"{topic.share:.0%}", topic.words)
    return table


def mixture(summary: Summary) -> str:
    """`[[data.sources]]` of a run file, with the shares of the tokens kept as weights."""
    import tomlkit

    sources = tomlkit.aot()
    for source in summary.sources:
        table = tomlkit.table()
        table.update({"name": source.name, "path": source.path, "weight": round(source.weight, 4)})
        table.update(source.reading)
        sources.append(table)
    document = tomlkit.document()
    document["data"] = {"sources": sources}
    return tomlkit.dumps(document).strip()
