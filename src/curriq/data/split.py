"""The three held-out sets, and the filter that keeps their documents out of the stream.

Only the target's documents fill the sets; the filter then applies to every source.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from curriq.config import DataConfig
from curriq.data.contamination import ContaminationFilter, HeldOutName, SplitRule
from curriq.data.documents import DocumentSource, read_epoch
from curriq.data.encoder import Encoder, load_encoder
from curriq.data.stream import Packer, Window, batch, encode_documents
from curriq.data.tokenizer import eos_id
from curriq.data.topic import draw_topic
from curriq.errors import CurriqError
from curriq.types import Windows

if TYPE_CHECKING:
    import transformers

_BATCH_DOCUMENTS = 256

DOCUMENTS = 256
"""Documents that a held-out set is spread over, where there are as many. Windows of a few long documents
would represent these documents and not the target: what is learnt for them need not help its others."""


@dataclass(frozen=True, kw_only=True)
class HeldOutSets:
    """Three disjoint sets of windows of the target; no document has tokens in two of them.

    Attributes:
        reward: D, from which the reward subsets are drawn.
        validation: for decisions during a run.
        test: for the report alone.
    """

    reward: Windows
    validation: Windows
    test: Windows


def build_held_out(
    source: DocumentSource,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: DataConfig,
    encoder: Encoder | None = None,
) -> tuple[HeldOutSets, ContaminationFilter]:
    """The three held-out sets, from one epoch of the target or from its beginning until they are full.

    A set is drawn evenly from at least `DOCUMENTS` documents, or from one per window where it has fewer
    windows, or from all that the epoch holds for it.

    Args:
        source: the target at the beginning of an epoch.
        tokenizer: turns its documents into tokens.
        config: sizes, shares, the near-duplicate threshold and the topic settings.
        encoder: embeds windows for topic-coherent sets; `config.topic_encoder` when None.

    Raises:
        CurriqError: the held-out documents do not fill the sets.
    """
    contamination = ContaminationFilter(SplitRule.from_config(config), config.near_duplicate_threshold)
    sizes = contamination.rule.sizes
    wanted = dict(sizes)
    if config.topic_coherent:  # a pool in proportion to the sets, which are then drawn from it
        total = sum(sizes.values())
        wanted = {name: max(size, config.topic_pool_size * size // total) for name, size in sizes.items()}
    pools = _fill_pools(source, tokenizer, config.window, wanted, contamination)
    contamination.freeze()
    if any(len(pools[name]) < size for name, size in sizes.items()):
        raise CurriqError(_too_small(source.name, contamination.rule, pools, config.window))
    if config.topic_coherent:
        encoder = encoder or load_encoder(config.topic_encoder)
        texts = {
            name: tokenizer.batch_decode([w.tokens.tolist() for w in pool]) for name, pool in pools.items()
        }
        embeddings = {name: encoder.encode(pool) for name, pool in texts.items()}
        drawn = draw_topic(embeddings, sizes, config.topic_temperature)
        pools = {name: [pools[name][i] for i in drawn[name]] for name in pools}
    sets = HeldOutSets(**{name: batch(pool, labelled=False) for name, pool in pools.items()})
    return sets, contamination


def _fill_pools(
    source: DocumentSource,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    window: int,
    wanted: Mapping[HeldOutName, int],
    contamination: ContaminationFilter,
) -> dict[HeldOutName, list[Window]]:
    """Windows for each held-out set, in reading order; the epoch is read until each has the wanted number and
    enough documents, or to its end."""
    packers = {name: Packer(source.name, window, eos_id(tokenizer)) for name in wanted}
    pools: dict[HeldOutName, list[Window]] = {name: [] for name in wanted}
    documents_of = dict.fromkeys(wanted, 0)

    def is_full(name: HeldOutName) -> bool:
        return len(pools[name]) >= wanted[name] and documents_of[name] >= min(wanted[name], DOCUMENTS)

    held_out = (d for d in read_epoch(source) if contamination.rule.side(d) != "train")
    while not all(map(is_full, wanted)) and (documents := list(islice(held_out, _BATCH_DOCUMENTS))):
        for document, (ids, learnt) in zip(documents, encode_documents(tokenizer, documents), strict=True):
            side = contamination.place(document)
            if side is not None and not is_full(side):
                contamination.add(document, side)
                documents_of[side] += 1
                pools[side] += packers[side].add(ids, document.difficulty, learnt)
    return {name: _spread(pool, wanted[name]) for name, pool in pools.items()}


def _spread(pool: list[Window], most: int) -> list[Window]:
    """At most that many windows, at even distances."""
    n = min(most, len(pool))
    return [pool[i * len(pool) // n] for i in range(n)]


def _too_small(name: str, rule: SplitRule, pools: Mapping[HeldOutName, list[Window]], window: int) -> str:
    sets = ", ".join(f"{side} {size} (available {len(pools[side])})" for side, size in rule.sizes.items())
    return (
        f"the held-out sets are larger than the held-out documents of the target {name!r}, in windows of "
        f"{window} tokens: {sets}. Lower --reward-set-size, --validation-set-size or --test-set-size, raise "
        f"--held-out-share = {rule.held_out_share}, shorten --window, or give the target more text."
    )
