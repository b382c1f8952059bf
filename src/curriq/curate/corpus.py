"""A corpus and its scores, from what a user names: a run or a target, and files."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from curriq import parallel
from curriq.config import RunConfig, SourceConfig, did_you_mean, require
from curriq.curate.build import (
    Progress,
    Target,
    build_target,
    documents_of,
    posterior_of,
    scorer_of_run,
    scorer_of_target,
    target_tokenizer,
    with_corpus,
)
from curriq.curate.documents import TARGET
from curriq.curate.inputs import READING, CorpusSource, Inputs, open_inputs
from curriq.curate.pool import one_thread
from curriq.curate.ranking import Documents, pooled
from curriq.curate.scoring import ScoreFolder, Scorer, Totals, score_corpus
from curriq.data.documents import short_hash
from curriq.errors import CurriqError

_log = logging.getLogger("curriq")

SMALL_CORPUS = 1 << 25
"""Bytes below which a second process takes longer to start than it saves."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a user asked for.

    Attributes:
        run: folder of a run; None with a target.
        target: file, folder or glob of the target; empty with a run.
        files: of the corpus; none for those of the run's sources.
        scores: folder of scores.
        text_field: column of the text; None for `text`, and for that of the run's source.
        documents, on_bad_row: as in a source; None for its default, and for those of the run's source.
        source: name of the run's source whose text the files are like.
        by: score to rank by; None for the best there is.
        workers: processes; 0 for as many as the machine has cores.
    """

    run: Path | None
    target: str
    files: tuple[str, ...]
    scores: Path
    text_field: str | None = None
    target_text_field: str | None = None
    documents: str | None = None
    on_bad_row: str | None = None
    source: str | None = None
    tokenizer: str = "auto"
    model: str | None = None
    window: int | None = None
    by: str | None = None
    workers: int = 0

    @property
    def reading(self) -> dict[str, Any]:
        """What was given of how documents are read, by key of a source."""
        given = {name: getattr(self, name) for name in READING}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class ScoredCorpus:
    """A corpus with its scores.

    Attributes:
        target: None where a run scored it.
    """

    inputs: Inputs
    scorer: Scorer
    folder: ScoreFolder
    totals: Totals
    target: Target | None

    def documents(self) -> Documents:
        return pooled(self.folder.tables())

    def posterior(self, documents: Documents) -> np.ndarray:
        """The probability of each document that it is of the target's kind: what a run's filter would accept
        it with, or that of its n-grams.

        Raises:
            CurriqError: the run has no such probability.
        """
        if self.target is not None:
            assert self.scorer.judge.dsir is not None
            return posterior_of(documents, self.target.scores(self.scorer.judge.dsir))
        if "policy" not in documents.scores:
            raise CurriqError(
                "Q of this run ranks documents, but says of none that it is enough: give --keep SHARE."
            )
        return documents.scores["policy"]


def score(wanted: Wanted, progress: Progress) -> ScoredCorpus:
    """Score the corpus, or what an earlier call has left of it.

    Raises:
        CurriqError: something that was named is not there, or cannot be read or used; see the parts.
        KeyboardInterrupt: a stop was requested; the same call goes on where it ended.
    """
    require(0 <= wanted.workers <= 1024, f"--workers {wanted.workers}: choose from 0 (all cores) to 1024.")
    scorer, inputs, target = _of_run(wanted) if wanted.run is not None else _of_target(wanted)
    require(
        wanted.by is None or wanted.by in scorer.judge.columns,
        f"--by {wanted.by}: {scorer.name} gives the scores {', '.join(scorer.judge.columns)}."
        + " Q and policy are those of a run: give its folder in place of --target." * (target is not None),
    )
    folder = ScoreFolder(wanted.scores / short_hash(scorer.key, inputs.fingerprint()))
    workers = wanted.workers or (parallel.cores() if inputs.size > SMALL_CORPUS else 1)
    if workers == 1:
        one_thread()
    if target is not None:
        scorer = with_corpus(scorer, target, inputs, folder.folder, workers, progress)
    _, before, finished = folder.progress()
    if finished:
        _log.info(f"the scores in {folder.folder} are of these files: nothing has to be scored again.")
    elif before.rows:
        _log.info(f"going on after row {before.rows:,} of all: the scores before are in {folder.folder}.")
    with progress("scoring", inputs.size) as advance:
        totals = score_corpus(inputs, scorer, folder, workers, advance)
    if totals.skipped:
        _log.warning(f"{totals.skipped:,} of {totals.rows:,} rows did not fit and were skipped.")
    return ScoredCorpus(inputs, scorer, folder, totals, target)


def _of_target(wanted: Wanted) -> tuple[Scorer, Inputs, Target]:
    require(
        wanted.source is None,
        f"--source {wanted.source} with --target: it names a source of a run. Leave it out, or give the run.",
    )
    inputs = open_inputs([CorpusSource(config) for config in _named(wanted)])
    config = RunConfig().override(tokenizer=wanted.tokenizer, window=wanted.window or RunConfig().data.window)
    if wanted.model is not None:
        config = config.override(model=wanted.model)
    own = {} if wanted.target_text_field is None else {"text_field": wanted.target_text_field}
    source = replace(SourceConfig(name=TARGET, path=wanted.target), **(wanted.reading | own))
    like = open_inputs([CorpusSource(source)])
    # Rows of the corpus that do not fit are told of where it is read for good.
    tokenizer = target_tokenizer(
        config, lambda: documents_of(like, source.on_bad_row), lambda: documents_of(inputs, "skip")
    )
    documents = documents_of(like, source.on_bad_row)
    target = build_target(wanted.target, documents, tokenizer, config.data.window)
    _log.info(f"target: {len(target.cut.per_document):,} documents, {len(target.cut.tokens):,} tokens.")
    return scorer_of_target(target, tokenizer, config.data.window), inputs, target


def _of_run(wanted: Wanted) -> tuple[Scorer, Inputs, None]:
    assert wanted.run is not None
    unused = {"tokenizer": wanted.tokenizer != "auto", "model": wanted.model, "window": wanted.window}
    unused |= {"target-text-field": wanted.target_text_field}
    for name in (name for name, given in unused.items() if given):
        raise CurriqError(f"--{name}: the run {wanted.run} has its own: leave it out, or use --target.")
    scorer, config = scorer_of_run(wanted.run)
    sources = config.data.sources
    names = [source.name for source in sources]
    require(
        wanted.source is None or wanted.source in names,
        f"--source {wanted.source}: the run has the sources {', '.join(names)}."
        + did_you_mean(str(wanted.source), names),
    )
    require(
        wanted.source is None or bool(wanted.files),
        f"--source {wanted.source} without FILES: each source of the run is read as itself. Name the FILES "
        "whose text is like it, or leave it out.",
    )
    if not wanted.files:
        own = [replace(part, config=replace(part.config, **wanted.reading)) for part in _files_of(config)]
        return scorer, open_inputs(own), None
    streamed = [place for place, source in enumerate(sources) if source.weight > 0]
    corpus = []
    for named in _named(wanted):
        same = [place for place, source in enumerate(sources) if source.path == named.path]
        known = [names.index(wanted.source)] if wanted.source else same or streamed
        if len(known) > 1 and _tells_sources_apart(config):
            raise CurriqError(
                f"{named.path}: the run learnt what its sources are worth, and this is none of their paths. "
                f"Say which one its text is like: --source {' or '.join(names[place] for place in known)}."
            )
        like = sources[known[0]]
        reading = {name: getattr(like, name) for name in READING} | wanted.reading
        if known[0] in same:  # the same folder holds the same splits
            reading["hub_split"] = like.hub_split
        corpus.append(CorpusSource(replace(named, **reading), known[0]))
    return scorer, open_inputs(corpus), None


def _tells_sources_apart(config: RunConfig) -> bool:
    return "source" in config.critic.q_features or config.select.accept_target_source


def _files_of(config: RunConfig) -> list[CorpusSource]:
    """The sources of a run's stream that are files of the user's own, as they are."""
    found = []
    for place, source in enumerate(config.data.sources):
        if source.weight == 0:
            continue
        if source.corruption != "none" or source.path.startswith(("hub:", "embedded:")):
            _log.info(
                f"source {source.name!r} is left out: it is no file (or noise is added to it in the run)."
            )
        else:
            found.append(CorpusSource(source, place))
    if not found:
        raise CurriqError(
            "no source of this run is a local file without added noise: name the FILES to select from."
        )
    return found


def _named(wanted: Wanted) -> list[SourceConfig]:
    """A source for each file, folder or glob that was named."""
    return [replace(SourceConfig(name=path, path=path), **wanted.reading) for path in wanted.files]
