"""The three held-out sets, and the filter that keeps their documents out of the stream.

Only the target's documents fill the sets; the filter then applies to every source.

The windows of a document must stay in one set. For topic-coherent sets too the documents are therefore
divided first, and each set then draws its windows around one random anchor from its own share. A draw without
replacement with probability ∝ exp(cosine/temperature) is the top k of the log-weights plus Gumbel noise (Kool
et al. 2019, "Stochastic Beams and Where to Find Them"), and the top k of each share is such a draw from it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import DataConfig
from curriq.data.contamination import ContaminationFilter, HeldOutName, SplitRule
from curriq.data.documents import DocumentSource, read_epoch
from curriq.data.encoder import Encoder, load_encoder
from curriq.data.stream import Encoded, Packer, Window, batch, encode_documents
from curriq.data.tokenizer import document_marks
from curriq.data.words import FastEncoder
from curriq.errors import CurriqError
from curriq.rng import derive_seed
from curriq.types import Windows

if TYPE_CHECKING:
    import transformers

log = logging.getLogger("curriq")

_BATCH_DOCUMENTS = 256

DOCUMENTS = 256
"""Documents that a held-out set is spread over, where there are as many. Windows of a few long documents
would represent these documents and not the target: what is learnt for them need not help its others."""


LEAST_WINDOWS = 16
"""Windows that a fitted held-out set has at least: the mean loss of fewer says little."""

MIXED_DOCUMENTS = 4096
"""Held-out documents that are read before any is chosen, so that the sets are spread over the source."""


@dataclass(frozen=True, kw_only=True)
class HeldOutSets:
    """Three disjoint sets of windows of the target; no document has tokens in two of them.

    Attributes:
        reward: D, from which the reward subsets are drawn.
        validation: for decisions during a run.
        test: for the report alone.
        reference: every window of the documents that D is drawn from: the target's text
            for scores that learn from it before the first step. Of topic-coherent sets D alone, because the
            rest of its documents is of other topics.
    """

    reward: Windows
    validation: Windows
    test: Windows
    reference: Windows


def build_held_out(
    source: DocumentSource,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: DataConfig,
    encoder: Encoder | None = None,
) -> tuple[HeldOutSets, ContaminationFilter]:
    """The three held-out sets, from one epoch of the target or from its beginning until they are full.

    A set is drawn evenly from at least `DOCUMENTS` documents, or from one per window where it has fewer
    windows, or from all that the epoch holds for it. Where the target cannot fill all three, they are
    smaller, see `fitted_sizes`.

    Args:
        source: the target at the beginning of an epoch.
        encoder: embeds windows for topic-coherent sets; `config.topic_encoder` when None.

    Raises:
        CurriqError: the held-out documents do not fill the sets, and `config.held_out_sizes` is "exact", or
            they would be too small.
    """
    contamination = ContaminationFilter(SplitRule.from_config(config), config.near_duplicate_threshold)
    sizes = contamination.rule.sizes
    wanted = dict(sizes)
    if config.topic_coherent:  # a pool in proportion to the sets, which are then drawn from it
        total = sum(sizes.values())
        wanted = {name: max(size, config.topic_pool_size * size // total) for name, size in sizes.items()}
    full = _fill_pools(source, tokenizer, config.window, wanted, contamination)
    contamination.freeze()
    sizes = _taken(source.name, config, sizes, {name: len(pool) for name, pool in full.items()})
    drawn_from = wanted if config.topic_coherent else sizes
    pools = {name: _thinned(full[name], drawn_from[name]) for name in sizes}
    reference = full["reward"]
    if config.topic_coherent:
        encoder = encoder or load_encoder(config.topic_encoder)
        embeddings = {
            name: encoder.encode(tokenizer.batch_decode([window.tokens.tolist() for window in pool]))
            for name, pool in pools.items()
        }
        drawn = draw_topic(embeddings, sizes, config.topic_temperature, config.split_seed)
        pools = {name: [pools[name][i] for i in drawn[name]] for name in pools}
        reference = pools["reward"]
    sets = {name: batch(pool, labelled=False) for name, pool in pools.items()}
    return HeldOutSets(**sets, reference=batch(reference, labelled=False)), contamination


def _fill_pools(
    source: DocumentSource,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    window: int,
    wanted: Mapping[HeldOutName, int],
    contamination: ContaminationFilter,
) -> dict[HeldOutName, list[Window]]:
    """All windows of each held-out set's documents, one document after another; the epoch is read until each
    set has the wanted number and enough documents, or to its end."""
    packers = {name: Packer(source.name, window, document_marks(tokenizer)) for name in wanted}
    pools: dict[HeldOutName, list[Window]] = {name: [] for name in wanted}
    documents_of = dict.fromkeys(wanted, 0)

    def is_full(name: HeldOutName) -> bool:
        return len(pools[name]) >= wanted[name] and documents_of[name] >= min(wanted[name], DOCUMENTS)

    held_out = (d for d in read_epoch(source) if contamination.rule.side(d) != "train")
    # A file may be sorted, by date or by topic: its beginning would not represent it. The number is a hash.
    encoded = Encoded(FastEncoder(tokenizer), most_bytes=0)  # no document comes twice
    mixed = iter(sorted(islice(held_out, MIXED_DOCUMENTS), key=lambda document: document.number))
    held_out = chain(mixed, held_out)
    while not all(map(is_full, wanted)) and (documents := list(islice(held_out, _BATCH_DOCUMENTS))):
        for document, (ids, learnt) in zip(documents, encode_documents(encoded, documents), strict=True):
            side = contamination.place(document)
            if side is not None and not is_full(side):
                contamination.add(document, side)
                documents_of[side] += 1
                pools[side] += packers[side].add(ids, document.difficulty, learnt, document.number)
    return pools


def fitted_sizes(
    sizes: Mapping[HeldOutName, int], available: Mapping[HeldOutName, int]
) -> dict[HeldOutName, int] | None:
    """The sizes, shrunk in one proportion until every set is available; None where one would have fewer than
    `LEAST_WINDOWS` windows, or fewer than asked for where that is less."""
    share = min(1.0, *(available[name] / size for name, size in sizes.items()))
    fitted = {name: min(available[name], round(size * share)) for name, size in sizes.items()}
    enough = all(fitted[name] >= min(LEAST_WINDOWS, size) for name, size in sizes.items())
    return fitted if enough else None


def _taken(
    name: str, config: DataConfig, sizes: Mapping[HeldOutName, int], available: Mapping[HeldOutName, int]
) -> Mapping[HeldOutName, int]:
    """The sizes as asked for, or fitted to what the target `name` holds, which the log then says."""
    if all(available[side] >= size for side, size in sizes.items()):
        return sizes
    fit = config.held_out_sizes == "fit"
    fitted = fitted_sizes(sizes, available) if fit else None
    if fitted is not None:
        shown = ", ".join(f"{side} {fitted[side]} of {size}" for side, size in sizes.items())
        log.info(
            f"the held-out sets are fitted to what the target {name!r} can spare, in windows of "
            f"{config.window} tokens: {shown}. A larger --held-out-share or a shorter --window gives more."
        )
        return fitted
    shown = ", ".join(f"{side} {size} (available {available[side]})" for side, size in sizes.items())
    if fit:
        least = (f"{side} {min(LEAST_WINDOWS, size)}" for side, size in sizes.items())
        shown += f"; needed at least: {', '.join(least)}"
    raise CurriqError(
        f"the held-out sets are larger than the held-out documents of the target {name!r}, in windows of "
        f"{config.window} tokens: {shown}. Lower --reward-set-size, --validation-set-size or "
        f"--test-set-size, raise --held-out-share = {config.held_out_share}, shorten --window, or give the "
        "target more text."
    )


def _thinned(pool: list[Window], wanted: int) -> list[Window]:
    """As many windows as are wanted, at even distances; all where there are not more."""
    count = min(wanted, len(pool))
    return [pool[i * len(pool) // count] for i in range(count)]


def draw_topic(
    embeddings: Mapping[HeldOutName, Float[np.ndarray, "_ e"]],
    sizes: Mapping[HeldOutName, int],
    temperature: float,
    seed: int = 0,
) -> dict[HeldOutName, list[int]]:
    """Rows of each set's pool that are nearest in topic to one random anchor of all pools.

    Args:
        embeddings: unit-norm embeddings of each set's pool of windows.
        sizes: windows to draw for each set, at most as many as its pool has.
        temperature: softmax temperature over the cosine similarity.
        seed: of the split, not of the run: training seeds of one split share the sets.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "topic"))
    everything = torch.from_numpy(np.concatenate(list(embeddings.values()))).double()
    anchor = everything[torch.randint(len(everything), (), generator=generator)]
    drawn = {}
    for name, pool in embeddings.items():
        similarity = torch.from_numpy(pool).double() @ anchor
        drawn[name] = gumbel_top_k(similarity / temperature, sizes[name], generator).tolist()
    return drawn


def gumbel_top_k(log_weights: Float[Tensor, "m"], k: int, generator: torch.Generator) -> Int[Tensor, "k"]:
    """k of m items without replacement, each draw with probability ∝ exp(log_weights) among those left."""
    uniform = torch.rand(len(log_weights), dtype=torch.float64, generator=generator)
    # −log(1 − u) is Exp(1), and −log of that is Gumbel. u = 0 gives +∞, which sorts like the rest.
    gumbel = -torch.log(-torch.log1p(-uniform))
    return torch.topk(log_weights + gumbel, k).indices
