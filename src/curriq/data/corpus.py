"""Everything that a run needs to know about its text, opened from one configuration."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from curriq.config import DataConfig, RunConfig, SourceConfig
from curriq.data.corruption import corrupted_source
from curriq.data.documents import DocumentSource, read_epoch, short_hash
from curriq.data.encoder import Encoder
from curriq.data.prefetch import Prefetched
from curriq.data.sources import open_source
from curriq.data.split import ContaminationFilter, HeldOutSets, SplitRule, build_held_out
from curriq.data.stream import DecontaminatedSource, SourceMix, SourceReader, WindowStream
from curriq.data.tokenizer import load_tokenizer
from curriq.rng import derive_seed

if TYPE_CHECKING:
    import transformers

_SHARED_SEED = 0
"""Order in which the target is read for the held-out sets and the tokenizer: the same for all seeds."""


LEAST_BLOCKS_AHEAD = 4
"""Blocks of N windows that are read ahead of training, at least."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The text of a run.

    Attributes:
        tokenizer: turns text into tokens and back.
        stream: training windows, without end.
        held_out: reward, validation and test set of the target.
        source_names: names by `Candidates.source`.
        guard: says which documents may be trained on.
    """

    tokenizer: "transformers.PreTrainedTokenizerBase"
    stream: WindowStream | Prefetched
    held_out: HeldOutSets
    source_names: tuple[str, ...]
    guard: ContaminationFilter

    def fingerprint(self) -> dict[str, str]:
        """What must be equal when a run is resumed, by name; see `check_fingerprint`."""
        return self.stream.fingerprint()


def open_corpus(config: RunConfig, encoder: Encoder | None = None, *, read_ahead: bool = False) -> Corpus:
    """Open the sources, load or train the tokenizer, hold out the three sets, begin the stream.

    Args:
        config: the run.
        encoder: embeds windows for topic-coherent sets; `config.data.topic_encoder` when None.
        read_ahead: read the stream in a process of its own while the model trains.

    Raises:
        CurriqError: a source, the tokenizer or the held-out sets cannot be had as asked.
    """
    data = config.data
    tokenizer = load_tokenizer(config.tokenizer, config.lm, lambda: training_texts(data))
    target = open_source(target_of(data), _SHARED_SEED)
    held_out, guard = build_held_out(target, tokenizer, data, encoder)
    mix = open_sources(config, tokenizer, guard)
    fingerprint = data_fingerprint(config, tokenizer, mix, target, held_out)
    stream: WindowStream | Prefetched = open_stream(config, mix, fingerprint)
    if read_ahead:
        ahead = max(LEAST_BLOCKS_AHEAD, config.train.max_read_ratio)
        stream = Prefetched(stream, block=config.train.num_candidates, ahead=ahead)
    return Corpus(
        tokenizer=tokenizer,
        stream=stream,
        held_out=held_out,
        source_names=tuple(source.name for source in data.sources),
        guard=guard,
    )


def open_sources(
    config: RunConfig, tokenizer: "transformers.PreTrainedTokenizerBase", guard: ContaminationFilter
) -> SourceMix:
    """The sources that training reads, at their beginning.

    Raises:
        CurriqError: a source cannot be opened.
    """
    data = config.data
    return SourceMix(
        readers={
            i: _open_reader(i, data, tokenizer, guard, config.train.seed)
            for i, source in enumerate(data.sources)
            if source.weight > 0
        },
        weights=[source.weight for source in data.sources],
        labelled=any(source.difficulty_field and source.weight > 0 for source in data.sources),
    )


def open_stream(config: RunConfig, mix: SourceMix, fingerprint: Mapping[str, str]) -> WindowStream:
    """Their windows, mixed and shuffled."""
    generator = torch.Generator().manual_seed(derive_seed(config.train.seed, "stream"))
    return WindowStream(mix, config.data.shuffle_buffer, generator, fingerprint)


def training_texts(data: DataConfig) -> Iterator[str]:
    """What a tokenizer is trained on: documents of the clean sources, taken in turn, without those that are
    held out by their key. (Near-duplicates cannot be told before the tokenizer has cut the held-out sets.)
    """
    rule = SplitRule.from_config(data)
    clean = [source for source in data.sources if source.corruption == "none"]
    unfinished = [read_epoch(open_source(source, _SHARED_SEED)) for source in clean]
    while unfinished:
        for documents in tuple(unfinished):
            document = next((d for d in documents if rule.side(d) == "train"), None)
            if document is None:
                unfinished.remove(documents)
            else:
                yield document.text


def target_of(data: DataConfig) -> SourceConfig:
    """The source whose held-out documents define reward, validation and test."""
    return next(source for source in data.sources if source.name == data.target)


def data_fingerprint(
    config: RunConfig,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    mix: SourceMix,
    target: DocumentSource,
    held_out: HeldOutSets,
) -> dict[str, str]:
    """What must be equal when a run is resumed, by name."""
    data = config.data
    sources = {
        f"source {data.sources[i].name}": f"{reader.source.fingerprint()} corruption={reader.corruption}"
        for i, reader in mix.readers.items()
    }
    topic = f"pool={data.topic_pool_size} temperature={data.topic_temperature} encoder={data.topic_encoder}"
    return {
        **sources,
        "target": f"{data.target} {target.fingerprint()}",
        "weights": " ".join(f"{source.name}={source.weight}" for source in data.sources),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "window": str(data.window),
        "shuffle_buffer": str(data.shuffle_buffer),
        "held_out_share": str(data.held_out_share),
        "held_out_sizes": " ".join(f"{name}={n}" for name, n in SplitRule.from_config(data).sizes.items()),
        "near_duplicate_threshold": str(data.near_duplicate_threshold),
        "topic": topic if data.topic_coherent else "none",
        # What all of it comes to: an encoder on another device, say, may draw other topic-coherent windows.
        "held_out": short_hash(*(windows.tokens.numpy().tobytes() for windows in vars(held_out).values())),
        "seed": str(config.train.seed),
    }


def tokenizer_fingerprint(tokenizer: "transformers.PreTrainedTokenizerBase") -> str:
    """Short hash of all that decides how a tokenizer cuts text."""
    if tokenizer.is_fast:
        return short_hash(tokenizer.backend_tokenizer.to_str(), str(tokenizer.eos_token_id))
    vocabulary = sorted(tokenizer.get_vocab().items())
    return short_hash(type(tokenizer).__name__, str(vocabulary), str(tokenizer.eos_token_id))


def _open_reader(
    position: int,
    data: DataConfig,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    guard: ContaminationFilter,
    seed: int,
) -> SourceReader:
    source, target = data.sources[position], target_of(data)
    fields = ("path", "hub_split", "hub_revision")
    same_documents = all(getattr(source, field) == getattr(target, field) for field in fields)
    guarded = DecontaminatedSource(open_source(source, seed), guard, of_target=same_documents)
    return SourceReader(
        corrupted_source(source.corruption, guarded, seed),
        source.corruption,
        tokenizer,
        data.window,
        seed,
        position,
    )
