"""Algorithm 2 put together: Langevin-RAG and its controls, as a method on windows of a ring buffer."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from curriq.config import WITHOUT_QUERY, RunConfig, require
from curriq.data.encoder import load_encoder
from curriq.data.stream import Unreadable
from curriq.data.tokenizer import ordinary_ids
from curriq.errors import CurriqError
from curriq.langevin.diagnostics import SearchAlarm
from curriq.langevin.encoder import HiddenStateEncoder, NoEncoder, TextEncoder, WindowEncoder
from curriq.langevin.energy import Energy
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
from curriq.lm.model import context_length
from curriq.plugins import find_builder
from curriq.select.base import Context, Method
from curriq.softq.critic import TDCritic
from curriq.softq.features import QInputs
from curriq.types import Critic


@dataclass(frozen=True, kw_only=True)
class SearchContext:
    """What retrievers and samplers of queries may be built from.

    Attributes:
        energy: Q of strings; None when the run has no Q.
        vocabulary: the tokens that a query may hold.
    """

    config: RunConfig
    context: Context
    energy: Energy | None
    inputs: InputEmbeddings
    vocabulary: Vocabulary

    @property
    def q(self) -> Energy:
        """Q of strings.

        Raises:
            CurriqError: the run has no Q.
        """
        if self.energy is None:
            raise CurriqError(f"--proposer {self.config.langevin.proposer} climbs Q: use --selector soft-q.")
        return self.energy

    def noise(self) -> torch.Generator:
        """A generator on the model's device, seeded for each search from one on the CPU, whose state is all
        that a checkpoint needs."""
        seed = torch.randint(2**62, (), generator=self.context.generators("langevin/noise")).item()
        return torch.Generator(self.context.lm.device).manual_seed(int(seed))

    def decode(self, tokens: Int[Tensor, "n T"]) -> list[str]:
        return self.context.corpus.tokenizer.batch_decode(tokens.tolist())


def build(method: Method, config: RunConfig, context: Context) -> Method:
    """The same method on windows retrieved from a ring buffer, by the proposer that `--proposer` names.

    Args:
        method: its critic is what the search climbs.
        config: the run; `proposer` is not `stream`.
        context: stream, tokenizer, θ and generators.

    Raises:
        CurriqError: the encoder or the index is not there; the model cannot read soft tokens; a query is
            longer than the model's context; the proposer climbs Q, and the method has none.
    """
    retrieval, kind, lm = config.retrieval, config.langevin.proposer, context.lm
    most = context_length(lm.network.config)
    require(
        most is None or config.langevin.query_tokens <= most,
        f"--query-tokens = {config.langevin.query_tokens} is longer than the model's context, {most} "
        "tokens: lower it.",
    )
    search = _search_context(method.critic, config, context)
    encoder = _encoder(kind, search)
    ages = encoder.follows_theta
    index = FaissIndex() if retrieval.index == "faiss" else TorchIndex(retrieval.buffer_size, lm.device)
    buffer = RingBuffer(retrieval.buffer_size, index)
    fresh = FreshWindows(
        Unreadable(context.corpus.stream),
        retrieval.ingest,
        search.decode,
        encoder,
        known=(lambda window: None) if ages else buffer.vector_of,
        # The model's own hidden states must not be read in a thread while the model moves.
        ahead=retrieval.encode_ahead and not ages,
    )
    probe, draws = None, context.generators("retrieval/probe")
    if retrieval.retrieval_probe and search.energy is not None:
        probe = RetrievalProbe(retrieval.retrieval_probe, search.energy, lm.device, draws)
    refresher = None
    if ages and retrieval.refresh:
        refresher = Refresher(retrieval.refresh, encoder, search.decode)
    proposer = BufferProposer(
        buffer=buffer,
        fresh=fresh,
        refresher=refresher,
        initial=retrieval.buffer_initial or retrieval.buffer_size,
        finder=_finder(kind, search, encoder),
        flops=_flops(kind, search),
        probe=probe,
        generators=context.generators,
    )
    return replace(method, proposer=proposer)


def _search_context(critic: Critic, config: RunConfig, context: Context) -> SearchContext:
    """Q as an energy where the method has a critic that learns; φ is frozen during searches."""
    inputs, energy = InputEmbeddings(context.lm), None
    if isinstance(critic, TDCritic):
        parameters, strings = list(critic.online.parameters()), config.optim.micro_batch * 4
        energy = Energy(context.lm, inputs, critic.differentiable, parameters, strings)
    return SearchContext(
        config=config,
        context=context,
        energy=energy,
        inputs=inputs,
        vocabulary=Vocabulary(torch.from_numpy(ordinary_ids(context.corpus.tokenizer)), context.lm.device),
    )


def _encoder(kind: str, search: SearchContext) -> WindowEncoder:
    retrieval, critic = search.config.retrieval, search.config.critic
    if kind in WITHOUT_QUERY:
        return NoEncoder()
    if retrieval.encoder == "hidden-state":
        inputs = QInputs(critic.q_features, search.context.lm.width, layer_norm=critic.q_layer_norm)
        return HiddenStateEncoder(search.context.lm, inputs, search.config.optim.micro_batch)
    return TextEncoder(load_encoder(retrieval.encoder, retrieval.encoder_precision))


def _finder(kind: str, search: SearchContext, encoder: WindowEncoder) -> Retriever:
    config, draws = search.config, search.context.generators("retrieval/draw")
    if kind == "uniform-buffer":
        return UniformRetriever(config.queries, draws)
    if kind == "direct-q":
        pool = config.retrieval.direct_pool
        return DirectRetriever(config.queries, pool, search.q, draws)
    sampler = find_builder(kind, SAMPLERS, setting="--proposer", group="curriq.samplers")(search)
    return QueryRetriever(
        sampler=sampler,
        energy=search.energy,
        initial_sequences=_initial_sequences(search),
        vocabulary=search.vocabulary,
        decode=search.decode,
        encoder=encoder,
        retrieval=config.retrieval,
        generator=draws,
        baseline_generator=search.context.generators("langevin/baseline"),
        alarm=None if kind == "random-queries" else SearchAlarm(),
    )


def _initial_sequences(search: SearchContext) -> Callable[[RingBuffer], Int[Tensor, "K L"]]:
    """First tokens of the chains; see `LangevinConfig.query_start`."""
    config, generator = search.config, search.context.generators("langevin/start")
    count, length = config.queries, config.langevin.query_tokens

    def random(buffer: RingBuffer) -> Int[Tensor, "K L"]:
        return random_strings(count, length, search.vocabulary, generator)

    def beginnings(buffer: RingBuffer) -> Int[Tensor, "K L"]:
        live = buffer.live.nonzero().flatten()
        slots = live[torch.randint(len(live), (count,), generator=generator)]
        tokens = buffer.take(slots).tokens[:, :length].to(search.context.lm.device)
        special = ~torch.isin(tokens, search.vocabulary.ids)
        return torch.where(special, random(buffer), tokens)

    return {"random": random, "buffer": beginnings}[config.langevin.query_start]


def _langevin(search: SearchContext) -> QuerySampler:
    return SoftmaxLangevin(
        search.config.langevin,
        search.q,
        search.inputs,
        lambda: search.context.lm.network.get_output_embeddings().weight.detach(),
        search.vocabulary,
        search.noise,
    )


def _best_of_random(search: SearchContext) -> QuerySampler:
    count, generator = search.config.langevin.random_strings, search.context.generators("langevin/noise")
    return BestOfRandom(count, search.q, search.vocabulary, generator)


SAMPLERS: dict[str, Callable[[SearchContext], QuerySampler]] = {
    "langevin": _langevin,
    "best-of-random": _best_of_random,
    "random-queries": lambda search: IdentitySampler(),
}
"""The built-in values of `--proposer` that make queries."""


def _flops(kind: str, search: SearchContext) -> int:
    """Operations of the language model in one step's search, without the diagnostics' and a text encoder's.

    A pass backward to the embeddings costs as much as a forward pass: no weight gets a gradient. The bridge
    multiplies twice with W_e per step. A sampler of the user's own reports its cost itself.
    """
    c, chains = search.config.langevin, search.config.queries
    forward = chains * trunk_flops(search.context.lm, c.query_tokens)
    product = 2 * chains * c.query_tokens * len(search.vocabulary) * search.inputs.width
    steps = c.langevin_steps
    retrieval, window = search.config.retrieval, trunk_flops(search.context.lm, search.config.data.window)
    pool = retrieval.direct_pool or retrieval.buffer_size
    embedding = 0
    if retrieval.encoder == "hidden-state" and kind not in WITHOUT_QUERY:
        embedding = (retrieval.ingest + retrieval.refresh) * window + forward
    return embedding + {
        "langevin": steps * (2 * forward + 2 * product),
        "best-of-random": c.random_strings * forward,
        "direct-q": pool * window,
    }.get(kind, 0)
