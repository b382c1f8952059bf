"""Algorithm 2 put together: Langevin-RAG and its controls, as a method on windows of a ring buffer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from curriq.config import WITHOUT_QUERY, RunConfig, require
from curriq.data.encoder import load_encoder
from curriq.data.stream import Unreadable
from curriq.data.tokenizer import ordinary_ids
from curriq.errors import CurriqError
from curriq.langevin.energy import Encode, Energy, hidden_state_vectors
from curriq.langevin.proposer import BufferProposer, FreshWindows, Phase, retrieval_probe
from curriq.langevin.retrieval import DirectRetriever, QueryRetriever, Retriever, UniformRetriever
from curriq.langevin.ring_buffer import FaissIndex, RingBuffer, TorchIndex
from curriq.langevin.samplers import (
    BestOfRandom,
    IdentitySampler,
    QuerySampler,
    SearchAlarm,
    SoftmaxLangevin,
    Vocabulary,
    random_strings,
)
from curriq.lm.embeddings import InputEmbeddings
from curriq.lm.model import context_length, trunk_flops
from curriq.plugins import find_builder
from curriq.select.base import Context, Method
from curriq.softq.critic import QInputs, TDCritic
from curriq.types import Critic, readings_of


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


SAMPLERS: dict[str, Callable[[SearchContext], QuerySampler]] = {
    "langevin": lambda s: SoftmaxLangevin(
        s.config.langevin, s.q, s.vocabulary, s.noise, s.context.generators("langevin/random-logits")
    ),
    "best-of-random": lambda s: BestOfRandom(
        s.config.langevin.random_strings, s.q, s.vocabulary, s.context.generators("langevin/noise")
    ),
    "random-queries": lambda s: IdentitySampler(),
}
"""The built-in values of `--proposer` that make queries."""


def build(method: Method, config: RunConfig, context: Context) -> Method:
    """The same method on windows retrieved from a ring buffer, by the proposer that `--proposer` names.

    The search climbs the Q of the method's critic.

    Raises:
        CurriqError: the encoder or the index is not there; the model cannot read soft tokens; a query is
            longer than the model's context; the proposer climbs Q, and the method has none.
    """
    retrieval, generators, lm = config.retrieval, context.generators, context.lm
    longest = context_length(lm.network.config)
    require(
        longest is None or config.langevin.query_tokens <= longest,
        f"--query-tokens = {config.langevin.query_tokens} is longer than the model's context, {longest} "
        "tokens: lower it.",
    )
    search = _search_context(method.critic, config, context)
    encode, ages = _encoder(search), _follows_theta(config)
    index = FaissIndex() if retrieval.index == "faiss" else TorchIndex(retrieval.buffer_size, lm.device)
    buffer = RingBuffer(retrieval.buffer_size, index)
    fresh = FreshWindows(
        stream=Unreadable(context.corpus.stream),
        count=retrieval.ingest,
        encode=encode,
        known=(lambda ids: {}) if ages else buffer.vectors_of,
        # The model's own hidden states must not be read in a thread while the model moves.
        ahead=retrieval.encode_ahead and not ages,
    )
    probe = None
    if retrieval.retrieval_probe and search.energy is not None:
        draws = generators("retrieval/probe")
        probe = partial(retrieval_probe, search.energy, retrieval.retrieval_probe, draws)
    refresh = retrieval.refresh if ages else 0
    retriever = _retriever(search, encode)
    proposer = BufferProposer(
        buffer=buffer,
        fresh=fresh,
        initial=retrieval.buffer_initial or retrieval.buffer_size,
        refresh=refresh,
        flops=(retrieval.ingest + refresh) * trunk_flops(lm, config.data.window) if ages else 0,
        phase=_phases(search, retriever),
        mark_used=retrieval.mark_used,
        probe=probe,
        generators=generators,
        readings=readings_of(retriever),
    )
    return replace(method, proposer=proposer)


def _search_context(critic: Critic, config: RunConfig, context: Context) -> SearchContext:
    """Q as an energy where the method has a critic that learns; φ is frozen during searches."""
    inputs, energy = InputEmbeddings(context.lm), None
    if isinstance(critic, TDCritic):
        parameters, strings = list(critic.online.parameters()), config.optim.windows_at_once * 4
        energy = Energy(context.lm, inputs, critic.differentiable, parameters, strings)
    ordinary = torch.from_numpy(ordinary_ids(context.corpus.tokenizer))
    vocabulary = Vocabulary(ordinary, context.lm.device)
    return SearchContext(config=config, context=context, energy=energy, inputs=inputs, vocabulary=vocabulary)


def _follows_theta(config: RunConfig) -> bool:
    """Whether embeddings are of the present θ, so that rows of the buffer age."""
    return config.retrieval.encoder == "hidden-state" and config.langevin.proposer not in WITHOUT_QUERY


def _encoder(search: SearchContext) -> Encode:
    """Embeds strings by what the Q-network reads of their tokens, or by their text as in the paper."""
    config, lm = search.config, search.context.lm
    if config.langevin.proposer in WITHOUT_QUERY:
        return lambda tokens: np.zeros((len(tokens), 1), np.float32)
    if _follows_theta(config):
        inputs = QInputs(config.critic.q_features, lm.width, layer_norm=config.critic.q_layer_norm)
        return partial(hidden_state_vectors, lm, inputs, config.optim.windows_at_once)
    encoder = load_encoder(config.retrieval.encoder, config.retrieval.encoder_precision)
    return lambda tokens: encoder.encode(search.decode(tokens))


def _phases(search: SearchContext, retriever: Retriever) -> Callable[[int], Phase]:
    """Uniform draws from the buffer during Q warm-up, when Q knows nothing to search for; then the search."""
    config = search.config
    random = UniformRetriever(config.queries, search.context.generators("retrieval/warm-up"))
    warm_up, searching = Phase(random, 0), Phase(retriever, _flops(search))
    return lambda step: warm_up if step < config.train.q_warmup_steps else searching


def _retriever(search: SearchContext, encode: Encode) -> Retriever:
    config, kind = search.config, search.config.langevin.proposer
    generators = search.context.generators
    draws = generators("retrieval/draw")
    if kind == "uniform-buffer":
        return UniformRetriever(config.queries, draws)
    if kind == "direct-q":
        return DirectRetriever(config.queries, config.retrieval.direct_pool, search.q, draws)
    return QueryRetriever(
        sampler=find_builder(kind, SAMPLERS, setting="--proposer", group="curriq.samplers")(search),
        energy=search.energy,
        initial_sequences=_initial_sequences(search),
        vocabulary=search.vocabulary,
        decode=search.decode,
        encode=encode,
        config=config.retrieval,
        generator=draws,
        baseline_generator=generators("langevin/baseline"),
        alarm=None if kind == "random-queries" else SearchAlarm(),
    )


def _initial_sequences(search: SearchContext) -> Callable[[RingBuffer], Int[Tensor, "K L"]]:
    """First tokens of the chains; see `LangevinConfig.query_start`."""
    config, generator = search.config, search.context.generators("langevin/start")
    count, length = config.queries, config.langevin.query_tokens
    random = partial(random_strings, count, length, search.vocabulary, generator)

    def beginnings(buffer: RingBuffer) -> Int[Tensor, "K L"]:
        live = buffer.live.nonzero().flatten()
        slots = live[torch.randint(len(live), (count,), generator=generator)]
        tokens = buffer.take(slots).tokens[:, :length].to(search.context.lm.device)
        special = ~torch.isin(tokens, search.vocabulary.ids)
        return torch.where(special, random(), tokens)

    return beginnings if config.langevin.query_start == "buffer" else lambda buffer: random()


def _flops(search: SearchContext) -> int:
    """Operations of the language model in one step's search, without the diagnostics' and a text encoder's.

    A pass backward to the embeddings costs as much as a forward pass: no weight gets a gradient. The bridge
    multiplies twice with W_e per step. A sampler of the user's own reports its cost itself.
    """
    config, c, retrieval = search.config, search.config.langevin, search.config.retrieval
    forward = config.queries * trunk_flops(search.context.lm, c.query_tokens)
    product = 2 * config.queries * c.query_tokens * len(search.vocabulary) * search.inputs.width
    window = trunk_flops(search.context.lm, config.data.window)
    embedded = forward if _follows_theta(config) else 0
    return embedded + {
        "langevin": c.langevin_steps * (2 * forward + 2 * product),
        "best-of-random": c.random_strings * forward,
        "direct-q": (retrieval.direct_pool or retrieval.buffer_size) * window,
    }.get(c.proposer, 0)
