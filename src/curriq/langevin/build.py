"""Puts Langevin-RAG and its controls together from the settings; `train/build.py` calls it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from curriq.config import WITHOUT_QUERY, RunConfig, require
from curriq.data import Corpus
from curriq.data.encoder import load_encoder
from curriq.data.tokenizer import ordinary_ids
from curriq.langevin.diagnostics import SearchAlarm
from curriq.langevin.encoder import HiddenStateEncoder, NoEncoder, TextEncoder, WindowEncoder
from curriq.langevin.energy import Energy, QFunction
from curriq.langevin.ingest import FreshWindows
from curriq.langevin.proposer import BufferProposer, Refresher, RetrievalProbe
from curriq.langevin.retrievers import DirectRetriever, QueryRetriever, Retriever, UniformRetriever
from curriq.langevin.ring_buffer import FaissIndex, RingBuffer, TorchIndex
from curriq.langevin.samplers import (
    BestOfRandom,
    IdentitySampler,
    QuerySampler,
    SoftmaxLangevin,
    Vocabulary,
    random_strings,
)
from curriq.lm.embeddings import InputEmbeddings
from curriq.lm.flops import trunk_flops
from curriq.lm.model import LanguageModel, context_length
from curriq.plugins import find_builder
from curriq.rng import Generators
from curriq.softq.features import QInputs

PURPOSES = ("langevin/start", "langevin/noise", "langevin/baseline", "retrieval/draw", "retrieval/probe")
"""Generators of this proposer, one per purpose."""


@dataclass(kw_only=True)
class Parts:
    """What the builders below share."""

    config: RunConfig
    corpus: Corpus
    lm: LanguageModel
    generators: Generators
    energy: Energy | None
    inputs: InputEmbeddings
    vocabulary: Vocabulary

    @property
    def q(self) -> Energy:
        assert self.energy is not None, "RunConfig lets no proposer that needs Q be without one"
        return self.energy

    def noise(self) -> torch.Generator:
        """A generator on the model's device, seeded anew for each search from one on the CPU, whose state is
        all that a checkpoint needs."""
        seed = torch.randint(2**62, (), generator=self.generators("langevin/noise")).item()
        return torch.Generator(self.lm.device).manual_seed(int(seed))

    def decode(self, tokens: Int[Tensor, "n T"]) -> list[str]:
        return self.corpus.tokenizer.batch_decode(tokens.tolist())


def buffer_proposer(
    config: RunConfig,
    corpus: Corpus,
    lm: LanguageModel,
    generators: Generators,
    q_function: QFunction | None,
    q_parameters: Sequence[nn.Parameter],
) -> BufferProposer:
    """The proposer that `--proposer` names, over a ring buffer.

    Args:
        config: the run; `proposer` is not `stream`.
        corpus: gives the stream and the tokenizer.
        lm: θ.
        generators: of the run.
        q_function: Q_φ; None when the run has no Q.
        q_parameters: φ, frozen during searches.

    Raises:
        CurriqError: the encoder or the index is not there; the model cannot read soft tokens; a query is
            longer than the model's context.
    """
    retrieval, kind = config.retrieval, config.langevin.proposer
    context = context_length(lm.network.config)
    require(
        context is None or config.langevin.query_tokens <= context,
        f"--query-tokens = {config.langevin.query_tokens} is longer than the model's context, {context} "
        "tokens: lower it.",
    )
    inputs = InputEmbeddings(lm)
    energy = None
    if q_function is not None:
        energy = Energy(lm, inputs, q_function, q_parameters, config.optim.micro_batch * 4)
    parts = Parts(
        config=config,
        corpus=corpus,
        lm=lm,
        generators=generators,
        energy=energy,
        inputs=inputs,
        vocabulary=Vocabulary(torch.from_numpy(ordinary_ids(corpus.tokenizer)), lm.device),
    )
    encoder = _encoder(kind, parts)
    ages = encoder.follows_theta
    index = FaissIndex() if retrieval.index == "faiss" else TorchIndex(retrieval.buffer_size, lm.device)
    buffer = RingBuffer(retrieval.buffer_size, index)
    probe = None
    if retrieval.retrieval_probe and energy is not None:
        probe = RetrievalProbe(retrieval.retrieval_probe, energy, lm.device, generators("retrieval/probe"))
    return BufferProposer(
        buffer=buffer,
        fresh=FreshWindows(
            corpus.stream,
            retrieval.ingest,
            parts.decode,
            encoder,
            known=(lambda window: None) if ages else buffer.vector_of,
            # The model's own hidden states must not be read in a thread while the model moves.
            ahead=retrieval.encode_ahead and not ages,
        ),
        refresher=Refresher(retrieval.refresh, encoder, parts.decode) if ages and retrieval.refresh else None,
        initial=retrieval.buffer_initial or retrieval.buffer_size,
        finder=_finder(kind, parts, encoder),
        flops=_flops(kind, parts),
        probe=probe,
        generators={purpose: generators(purpose) for purpose in PURPOSES},
    )


def _encoder(kind: str, parts: Parts) -> WindowEncoder:
    retrieval, critic = parts.config.retrieval, parts.config.critic
    if kind in WITHOUT_QUERY:
        return NoEncoder()
    if retrieval.encoder == "hidden-state":
        inputs = QInputs(critic.q_features, parts.lm.width, layer_norm=critic.q_layer_norm)
        return HiddenStateEncoder(parts.lm, inputs, parts.config.optim.micro_batch)
    return TextEncoder(load_encoder(retrieval.encoder, retrieval.encoder_precision))


def _finder(kind: str, parts: Parts, encoder: WindowEncoder) -> Retriever:
    config, draws = parts.config, parts.generators("retrieval/draw")
    if kind == "uniform-buffer":
        return UniformRetriever(config.queries, draws)
    if kind == "direct-q":
        pool = config.retrieval.direct_pool
        return DirectRetriever(config.queries, pool, parts.q, draws)
    return QueryRetriever(
        sampler=find_builder(kind, SAMPLERS, setting="--proposer", group="curriq.samplers")(parts),
        energy=parts.energy,
        initial_sequences=_initial_sequences(parts),
        vocabulary=parts.vocabulary,
        decode=parts.decode,
        encoder=encoder,
        retrieval=config.retrieval,
        generator=draws,
        baseline_generator=parts.generators("langevin/baseline"),
        alarm=None if kind == "random-queries" else SearchAlarm(),
    )


def _initial_sequences(parts: Parts) -> Callable[[RingBuffer], Int[Tensor, "K L"]]:
    """First tokens of the chains; see `LangevinConfig.query_start`."""
    config, generator = parts.config, parts.generators("langevin/start")
    count, length = config.queries, config.langevin.query_tokens

    def random(buffer: RingBuffer) -> Int[Tensor, "K L"]:
        return random_strings(count, length, parts.vocabulary, generator)

    def beginnings(buffer: RingBuffer) -> Int[Tensor, "K L"]:
        live = buffer.live.nonzero().flatten()
        slots = live[torch.randint(len(live), (count,), generator=generator)]
        tokens = buffer.take(slots).tokens[:, :length].to(parts.lm.device)
        special = ~torch.isin(tokens, parts.vocabulary.ids)
        return torch.where(special, random(buffer), tokens)

    return {"random": random, "buffer": beginnings}[config.langevin.query_start]


def _langevin(parts: Parts) -> QuerySampler:
    return SoftmaxLangevin(
        parts.config.langevin,
        parts.q,
        parts.inputs,
        lambda: parts.lm.network.get_output_embeddings().weight.detach(),
        parts.vocabulary,
        parts.noise,
    )


def _best_of_random(parts: Parts) -> QuerySampler:
    count, generator = parts.config.langevin.random_strings, parts.generators("langevin/noise")
    return BestOfRandom(count, parts.q, parts.vocabulary, generator)


SAMPLERS: dict[str, Callable[[Parts], QuerySampler]] = {
    "langevin": _langevin,
    "best-of-random": _best_of_random,
    "random-queries": lambda parts: IdentitySampler(),
}
"""The built-in values of `--proposer` that make queries."""


def _flops(kind: str, parts: Parts) -> int:
    """Operations of the language model in one step's search, without the diagnostics' and a text encoder's.

    A pass backward to the embeddings costs as much as a forward pass: no weight gets a gradient. The bridge
    multiplies twice with W_e per step. A sampler of the user's own is not counted.
    """
    c, chains = parts.config.langevin, parts.config.queries
    forward = chains * trunk_flops(parts.lm, c.query_tokens)
    product = 2 * chains * c.query_tokens * len(parts.vocabulary) * parts.inputs.width
    steps = c.langevin_steps
    retrieval, window = parts.config.retrieval, trunk_flops(parts.lm, parts.config.data.window)
    pool = retrieval.direct_pool or retrieval.buffer_size
    embedding = 0
    if retrieval.encoder == "hidden-state" and kind not in WITHOUT_QUERY:
        embedding = (retrieval.ingest + retrieval.refresh) * window + forward
    return embedding + {
        "langevin": steps * (2 * forward + 2 * product),
        "best-of-random": c.random_strings * forward,
        "direct-q": pool * window,
    }.get(kind, 0)
