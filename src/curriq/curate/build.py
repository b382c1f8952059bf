"""Puts together what scores a corpus: from a target alone, or from a finished run."""

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from curriq.config import RunConfig
from curriq.curate.documents import Cutter, NgramScore, parse
from curriq.curate.inputs import Inputs, read_chunks
from curriq.curate.ranking import Documents
from curriq.curate.scoring import Advance, Scorer, count_corpus
from curriq.data.chat import DEFAULT_TEMPLATE
from curriq.data.documents import Document, short_hash
from curriq.data.ngrams import Cut, NgramCounts, document_means
from curriq.data.tokenizer import load_tokenizer, serialised
from curriq.errors import CurriqError
from curriq.runlog.storage import make_folder, write_atomically
from curriq.select.documents import NgramScorer
from curriq.select.offline import offline_policy
from curriq.select.rules import TargetPosterior
from curriq.train.checkpoint import latest_checkpoint
from curriq.train.run import load_run

if TYPE_CHECKING:
    import transformers

_log = logging.getLogger("curriq")

FORMAT = 2
"""Goes up when scores change, so that those of an older version are not used."""
SAMPLE_CHARACTERS = 1 << 25
"""Text of the corpus that the target is compared with. A larger corpus is sampled: its n-grams are known well
enough from some ten million tokens."""
MOST_SCORES = 1 << 16
"""Scores that the posterior is fitted to, at even distances."""


@dataclass(frozen=True)
class StaticJudge:
    """The importance weight by n-grams, and nothing else."""

    dsir: NgramScore
    columns: tuple[str, ...] = ("dsir",)
    reads_text: bool = False

    def __call__(self, cut: Cut, dsir: np.ndarray | None, source: int) -> dict[str, np.ndarray]:
        assert dsir is not None
        return {"dsir": dsir}


@dataclass(frozen=True)
class Target:
    """What a corpus is compared with: its documents, each once, cut into windows."""

    name: str
    cut: Cut

    @property
    def counts(self) -> NgramCounts:
        return NgramCounts.of(self.cut, of_target=True)

    def against(self, corpus: NgramCounts) -> NgramScore:
        """The score by this target's n-grams and those of a corpus."""
        return NgramScorer(self.counts + corpus)

    def scores(self, dsir: NgramScore) -> np.ndarray:
        """Scores of the target's own documents, each without its own text."""
        return document_means(dsir(self.cut), self.cut.taught, self.cut.per_document)


def build_target(
    name: str, documents: Iterable[Document], tokenizer: "transformers.PreTrainedTokenizerBase", length: int
) -> Target:
    """A target of some documents; copies count once. CurriqError where no document has a token."""
    unique = {document.number: document for document in documents}
    _, cut = Cutter(tokenizer, length)(list(unique.values()))
    if not len(cut.per_document):
        raise CurriqError(f"the target {name} holds no text: give it some.")
    return Target(name, cut)


def target_tokenizer(
    config: RunConfig, target: Callable[[], Iterator[Document]], corpus: Callable[[], Iterator[Document]]
) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer that the configuration names; one trained here learns from target and corpus in turn, as
    that of a run learns from its clean sources."""

    def texts() -> Iterator[str]:
        both = [target(), corpus()]
        while both:
            for documents in tuple(both):
                document = next(documents, None)
                if document is None:
                    both.remove(documents)
                else:
                    yield document.text

    return load_tokenizer(config.tokenizer, config.lm, texts)


def documents_of(inputs: Inputs, on_bad_row: Literal["error", "skip"]) -> Iterator[Document]:
    """The documents of some files, in their order."""
    for chunk in read_chunks(inputs):
        config = replace(inputs.config(chunk.file), on_bad_row=on_bad_row)
        yield from parse(chunk, inputs.files[chunk.file].path, config).documents


Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""A progress bar for so many characters, as a context."""


def scorer_of_target(
    target: Target, tokenizer: "transformers.PreTrainedTokenizerBase", length: int
) -> Scorer:
    """A scorer by n-grams of the target, which does not know those of a corpus yet; see `with_corpus`."""
    # Without a template, conversations are written in the default one: `encode_chat` sets it when it meets
    # the first, so by now it may be set or not, for the same scores.
    template = tokenizer.chat_template or DEFAULT_TEMPLATE
    marks = (str(tokenizer.eos_token_id), str(tokenizer.special_tokens_map), str(template))
    learnt = b"" if target.cut.learnt is None else target.cut.learnt.tobytes()
    cut = short_hash(serialised(tokenizer), *marks, str(length), target.cut.tokens.tobytes(), learnt)
    key = short_hash(str(FORMAT), "target", cut, target.cut.numbers.tobytes())
    return Scorer(
        f"the target {target.name}",
        key,
        tokenizer,
        length,
        StaticJudge(target.against(NgramCounts.none())),
        "dsir",
    )


def with_corpus(
    scorer: Scorer, target: Target, inputs: Inputs, folder: Path, workers: int, progress: Progress
) -> Scorer:
    """The scorer of a target, with the n-grams of the corpus: those in the folder of its scores, or else
    counted now, and kept there."""
    file = folder / "corpus.npz"
    if file.exists():
        with np.load(file) as saved:
            seen = saved["seen"]
    else:
        every = max(1, -(-inputs.size // SAMPLE_CHARACTERS))
        with progress("counting n-grams", inputs.size) as advance:
            seen = count_corpus(inputs, scorer.tokenizer, scorer.length, every, workers, advance).seen
        make_folder(folder)
        content = io.BytesIO()
        np.savez_compressed(content, seen=seen)
        write_atomically(file, content.getvalue())
    return replace(scorer, judge=StaticJudge(target.against(replace(NgramCounts.none(), seen=seen))))


def scorer_of_run(run_dir: Path) -> tuple[Scorer, RunConfig]:
    """A scorer by what a run has learnt by its newest checkpoint, and the run's configuration.

    Raises:
        CurriqError: there is no such run, its data have changed, or it ranks no documents.
    """
    manifest = latest_checkpoint(run_dir).manifest
    run = load_run(run_dir)
    config, parts = run.config, run.session.components
    judge = offline_policy(parts.proposer, parts.critic, run.lm, config.critic.q_features)
    if judge.reads_text:
        _log.warning(
            f"Q of {run_dir} reads the model's hidden state, so every window takes a forward pass. A run of "
            "--preset recommended needs none."
        )
    default = "policy" if "policy" in judge.columns else judge.columns[-1]
    key = short_hash(str(FORMAT), "run", manifest["sha256"])
    length, tokenizer = config.data.window, run.corpus.tokenizer
    return Scorer(f"the run {run_dir}", key, tokenizer, length, judge, default), config


def posterior_of(documents: Documents, target: np.ndarray, score: str = "dsir") -> np.ndarray:
    """The probability of each document that it is of the target's kind, by `TargetPosterior`.

    Args:
        target: scores of the target's own documents.
    """
    scores = torch.from_numpy(np.ascontiguousarray(documents.scores[score], np.float64))
    places = np.unique(np.linspace(0, len(scores) - 1, MOST_SCORES).round().astype(np.int64))
    sample = scores[scores.argsort()[torch.from_numpy(places)]]
    return TargetPosterior()(scores, sample, torch.from_numpy(target)).numpy()
