"""The text of a run, opened from its configuration: tokenizer, training stream and held-out sets."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from curriq.config import DataConfig, RunConfig, SourceConfig
from curriq.data.cache import FileHash, file_hash
from curriq.data.contamination import ContaminationFilter, SplitRule
from curriq.data.corruption import Duplicates
from curriq.data.documents import WHOLE, DocumentSource, Shard, read_epoch, short_hash
from curriq.data.encoder import Encoder
from curriq.data.files import user_path
from curriq.data.prefetch import Prefetched, prefetched, reading_processes
from curriq.data.shards import ShardedStream, own_shards
from curriq.data.sources import NAMED_ROWS, local_paths, log_files, open_source
from curriq.data.split import HeldOutSets, build_held_out
from curriq.data.stream import DecontaminatedSource, SourceReader, WindowStream
from curriq.data.tokenizer import load_tokenizer, log_marks, serialised
from curriq.data.words import FastEncoder
from curriq.rng import derive_seed

if TYPE_CHECKING:
    import transformers

LEAST_STEPS_AHEAD = 4
"""Steps whose N windows are read ahead of training, at least."""
MOST_STEPS_AT_ONCE = 4
"""Steps whose N windows the process that reads hands over in one message, at most."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The text of a run: an endless stream of training windows, the held-out sets of the target, the sources'
    names by `Windows.source`, the rows skipped while the target's held-out documents were read, the local
    files that a resume reads again, and the processes that read ahead of this one (0 where it reads
    itself)."""

    tokenizer: "transformers.PreTrainedTokenizerBase"
    stream: WindowStream | Prefetched | ShardedStream
    held_out: HeldOutSets
    source_names: tuple[str, ...]
    files: dict[str, FileHash] = field(default_factory=dict)
    target_skipped: dict[str, int] = field(default_factory=dict)
    readers: int = 0

    def skipped_rows(self) -> dict[str, int]:
        """Rows left out of each source that has left out any, by its name."""
        return self.target_skipped | self.stream.skipped

    def fingerprint(self) -> dict[str, str]:
        """What must be equal when a run is resumed, by name."""
        return self.stream.fingerprint


def open_corpus(config: RunConfig, encoder: Encoder | None = None, *, read_ahead: bool = False) -> Corpus:
    """The corpus of a run, its stream at the beginning.

    Args:
        config: the run.
        encoder: embeds windows for topic-coherent sets; `config.data.topic_encoder` when None.
        read_ahead: read the stream in another process while the model trains.

    Raises:
        CurriqError: a source, the tokenizer or the held-out sets cannot be had as asked.
    """
    data = config.data
    own = own_shards(data.stream_shards)
    tokenizer = load_tokenizer(config.tokenizer, config.lm, lambda: training_texts(data))
    # In the split's order, not the run's, so that training seeds of one split share the held-out sets.
    for source in data.sources:
        log_files(source)
    wanted = target_of(data)
    # The stream names the same rows.
    target = open_source(wanted, data.split_seed, named_rows=0 if wanted.weight > 0 else NAMED_ROWS)
    held_out, contamination = build_held_out(target, tokenizer, data, encoder)
    if tokenizer.name_or_path:  # not trained here
        documents = itertools.islice(read_epoch(open_source(wanted, data.split_seed, named_rows=0)), 8)
        log_marks(tokenizer, [document.text for document in documents if document.messages is None])

    words = FastEncoder(tokenizer)

    def opened(shard: Shard) -> WindowStream:
        readers = _open_readers(config, words, contamination, shard)
        fingerprint = data_fingerprint(config, tokenizer, readers, target, held_out)
        return _window_stream(config, readers, fingerprint, shard)

    count = data.stream_shards
    shards: Mapping[int, WindowStream | Prefetched]
    shards = {number: opened(WHOLE if count == 1 else Shard(number, count)) for number in own}
    if read_ahead:
        at_once = _steps_at_once(config)
        block = -(-config.train.num_candidates * at_once // count)
        shards = prefetched(shards, tokenizer, block=block, ahead=-(-_steps_ahead(config) // at_once))
    names = tuple(source.name for source in data.sources)
    return Corpus(
        tokenizer=tokenizer,
        stream=shards[0] if count == 1 else ShardedStream(shards, count),
        held_out=held_out,
        source_names=names,
        readers=reading_processes(len(shards)) if read_ahead else 0,
        target_skipped={target.name: target.skipped} if target.skipped else {},
        files={str(path): file_hash(path) for path in input_files(config)},
    )


def most_steps_ahead(config: RunConfig) -> int:
    """Steps whose N windows have been read before they are asked for, at most, where another process reads:
    those that wait, and a message that is being handed over."""
    return _steps_ahead(config) + _steps_at_once(config)


def _steps_ahead(config: RunConfig) -> int:
    """Steps whose N windows wait."""
    return max(LEAST_STEPS_AHEAD, 2 * _steps_at_once(config), config.train.max_read_ratio)


def _steps_at_once(config: RunConfig) -> int:
    """Steps whose N windows travel in one message: a filter needs several for each that it accepts, and a
    message costs the process that trains milliseconds, however long it is."""
    return min(config.train.max_read_ratio, MOST_STEPS_AT_ONCE)


def input_files(config: RunConfig) -> list[Path]:
    """Every local file that a run reads, and reads again when it is resumed: text, a curriculum, and the
    folders of models that no checkpoint holds."""
    paths = [path for source in config.data.sources for path in local_paths(source)]
    if config.data.curriculum:
        paths.append(Path(config.data.curriculum))
    base = config.lm.model if config.lm.lora_rank else ""
    for name in (base, config.select.reference_model, config.retrieval.encoder, config.data.topic_encoder):
        folder = user_path(name)
        if name and folder.is_dir():
            paths += sorted(path for path in folder.rglob("*") if path.is_file())
    return sorted({path.absolute() for path in paths})


def _window_stream(
    config: RunConfig, readers: Mapping[int, SourceReader], fingerprint: Mapping[str, str], shard: Shard
) -> WindowStream:
    """The windows of a shard; all shards together hold as many windows in their buffers as one stream."""
    data = config.data
    purpose = "stream" if shard == WHOLE else f"stream/{shard.number}"
    return WindowStream(
        readers,
        [source.weight for source in data.sources],
        -(-data.shuffle_buffer // shard.count),
        torch.Generator().manual_seed(derive_seed(config.train.seed, purpose)),
        fingerprint,
        labelled=any(source.difficulty_field and source.weight > 0 for source in data.sources),
    )


def _open_readers(
    config: RunConfig,
    words: FastEncoder,
    contamination: ContaminationFilter,
    shard: Shard,
) -> dict[int, SourceReader]:
    data, seed, target = config.data, config.train.seed, target_of(config.data)
    fields = ("path", "hub_split", "hub_revision")
    readers = {}
    for position, source in enumerate(data.sources):
        if source.weight > 0:
            of_target = all(getattr(source, field) == getattr(target, field) for field in fields)
            repeated = source.corruption == "duplicates"
            part = open_source(source, seed, shard=WHOLE if repeated else shard)
            clean = DecontaminatedSource(part, contamination, of_target=of_target)
            documents = Duplicates(clean, seed, shard=shard) if repeated else clean
            corruption, window = source.corruption, data.window
            readers[position] = SourceReader(
                documents, corruption, words.tokenizer, window, seed, position, words
            )
    return readers


def training_texts(data: DataConfig) -> Iterator[str]:
    """Texts that a tokenizer is trained on: documents of the clean sources in turn, without those that are
    held out by their key. (Finding near-duplicates takes the held-out sets, and these the tokenizer.)"""
    rule = SplitRule.from_config(data)
    clean = [source for source in data.sources if source.corruption == "none"]
    unfinished = [read_epoch(open_source(source, data.split_seed, named_rows=0)) for source in clean]
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


def _sizes(held_out: HeldOutSets) -> str:
    """`reward=128 validation=64 test=128`."""
    sets = ("reward", "validation", "test")
    return " ".join(f"{name}={len(getattr(held_out, name))}" for name in sets)


def data_fingerprint(
    config: RunConfig,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    readers: Mapping[int, SourceReader],
    target: DocumentSource,
    held_out: HeldOutSets,
) -> dict[str, str]:
    """What must be equal when a run is resumed, by name."""
    data = config.data
    sources = {
        f"source {data.sources[i].name}": f"{reader.source.fingerprint()} corruption={reader.corruption}"
        for i, reader in readers.items()
    }
    settings = ("window", "shuffle_buffer", "held_out_share", "near_duplicate_threshold")
    topic = f"pool={data.topic_pool_size} temperature={data.topic_temperature} encoder={data.topic_encoder}"
    if tokenizer.is_fast:
        cut = (serialised(tokenizer),)
    else:
        cut = (type(tokenizer).__name__, str(sorted(tokenizer.get_vocab().items())))
    marks = (str(tokenizer.eos_token_id), str(tokenizer.chat_template or ""))
    return {
        **sources,
        **{name: str(getattr(data, name)) for name in settings},
        "target": f"{data.target} {target.fingerprint()}",
        "weights": " ".join(f"{source.name}={source.weight}" for source in data.sources),
        "tokenizer": short_hash(*cut, *marks),
        "held_out_sizes": _sizes(held_out),
        "split_seed": str(data.split_seed),
        "topic": topic if data.topic_coherent else "none",
        # The sets themselves too: an encoder on another device, say, may draw other topic-coherent windows.
        "held_out": short_hash(*(windows.tokens.numpy().tobytes() for windows in vars(held_out).values())),
        "seed": str(config.train.seed),
        # Runs of versions that had no shards go on.
        **({"stream_shards": str(data.stream_shards)} if data.stream_shards > 1 else {}),
    }
