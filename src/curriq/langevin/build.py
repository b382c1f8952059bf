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
from curriq.langevin.proposer import PROPOSING, BufferProposer, FreshWindows, retrieval_probe
from curriq.langevin.retrieval import (
    DirectRetriever,
    QueryRetriever,
    Retriever,
    UniformRetriever,
    uniform_slots,
)
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
from curriq.langevin.search import RepeatedSearch, Search, StringSearch
from curriq.langevin.vectors import VectorSearch
from curriq.lm.embeddings import InputEmbeddings
from curriq.lm.model import context_length, trunk_flops
from curriq.plugins import find_builder
from curriq.select.base import Context, Method
from curriq.select.stream_filter import FilteredStream
from curriq.softq.critic import QInputs, TDCritic
from curriq.types import Critic, Windows, readings_of


@dataclass(frozen=True, kw_only=True)
class SearchContext:
    """What retrievers and samplers of queries may be built from.

    Attributes:
        critic: Q and what it reads.
        energy: Q of strings; None when the run has no Q.
        vocabulary: the tokens that a query may hold.
    """

    config: RunConfig
    context: Context
    critic: Critic
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

    def reward_windows(self, generator: torch.Generator) -> Windows:
        """As many windows of the reward set as there are queries, by a CPU generator."""
        held_out, count = self.context.corpus.held_out.reward, self.config.queries
        return held_out.take(torch.randint(len(held_out), (count,), generator=generator))

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
    "reward-queries": lambda s: IdentitySampler(),
}
"""The built-in values of `--proposer` that make queries."""


def build(method: Method, config: RunConfig, context: Context) -> Method:
    """The same method on windows retrieved from a ring buffer, by the proposer that `--proposer` names.

    The search climbs the Q of the method's critic. Where the method filters the stream, only what its filter
    accepts comes into the buffer: the prior π₀ is applied there, once, and the search adds exp(Q/β).

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
    filtered = method.proposer if isinstance(method.proposer, FilteredStream) else None
    fresh = FreshWindows(
        stream=Unreadable(filtered or context.corpus.stream),
        count=retrieval.ingest,
        encode=encode,
        known=(lambda ids: {}) if ages else buffer.vectors_of,
        # The model's own hidden states must not be read in a thread while the model moves, and what a filter
        # has accepted cannot be given back to it.
        ahead=retrieval.encode_ahead and not ages and filtered is None,
    )
    probe = None
    if retrieval.retrieval_probe and search.energy is not None:
        draws = generators("retrieval/probe")
        probe = partial(retrieval_probe, search.energy, retrieval.retrieval_probe, draws)
    retriever = _retriever(search, encode)
    random = UniformRetriever(config.queries, generators("retrieval/warm-up"))
    repeated = retriever.search if isinstance(retriever, QueryRetriever) else None
    proposer = BufferProposer(
        buffer=buffer,
        fresh=fresh,
        initial=retrieval.buffer_initial or retrieval.buffer_size,
        refresh=retrieval.refresh if ages else 0,
        refresh_below=retrieval.refresh_below,
        flops=trunk_flops(lm, config.data.window) if ages else 0,
        # During Q warm-up Q knows nothing to search for.
        phase=lambda step: random if step < config.train.q_warmup_steps else retriever,
        mark_used=retrieval.mark_used,
        probe=probe,
        generators=generators,
        searching=repeated if isinstance(repeated, RepeatedSearch) else None,
        readings=(*readings_of(filtered), *readings_of(retriever), PROPOSING),
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
    return SearchContext(
        config=config, context=context, critic=critic, energy=energy, inputs=inputs, vocabulary=vocabulary
    )


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


def _retriever(search: SearchContext, encode: Encode) -> Retriever:
    config, kind = search.config, search.config.langevin.proposer
    draws = search.context.generators("retrieval/draw")
    if kind == "uniform-buffer":
        return UniformRetriever(config.queries, draws)
    if kind == "direct-q":
        per_window = trunk_flops(search.context.lm, config.data.window)
        return DirectRetriever(config.queries, config.retrieval.direct_pool, search.q, draws, per_window)
    found = (_vector_search if kind == "vector-langevin" else _string_search)(search, encode)
    if (every := config.langevin.search_every) > 1:
        found = RepeatedSearch(inner=found, every=every, encode=encode, flops=_embedding_flops(search))
    return QueryRetriever(search=found, decode=search.decode, config=config.retrieval, generator=draws)


def _string_search(search: SearchContext, encode: Encode) -> Search:
    kind, generators = search.config.langevin.proposer, search.context.generators
    return StringSearch(
        sampler=find_builder(kind, SAMPLERS, setting="--proposer", group="curriq.samplers")(search),
        energy=search.energy,
        initial_sequences=_initial_sequences(search),
        vocabulary=search.vocabulary,
        decode=search.decode,
        encode=encode,
        baseline_generator=generators("langevin/baseline"),
        flops=_search_flops(search),
        alarm=None if kind in ("random-queries", "reward-queries") else SearchAlarm(),
    )


def _vector_search(search: SearchContext, encode: Encode) -> Search:
    config, generators, critic = search.config, search.context.generators, search.critic
    assert isinstance(critic, TDCritic), "the settings refuse it without Q"
    length, anchors = critic.inputs.length, generators("langevin/anchors")
    assert length is not None, "the settings refuse inputs of different lengths"
    generator = generators("langevin/start")

    def rows(buffer: RingBuffer) -> Tensor:
        return buffer.vectors(_by_chance(buffer, config.queries, generator))

    def held_out(draws: torch.Generator) -> Tensor:
        return torch.from_numpy(encode(search.reward_windows(draws).tokens))

    of_rows = config.langevin.query_start != "reward"
    forward = config.queries * trunk_flops(search.context.lm, config.data.window)
    return VectorSearch(
        config=config.langevin,
        q=lambda vectors: critic.of_inputs(length * vectors),
        start=rows if of_rows else lambda buffer: held_out(generator),
        anchors=lambda: held_out(anchors),
        concentration=1 / config.retrieval.retrieval_temperature,
        noise=search.noise,
        flops=forward * ((config.langevin.target_pull > 0) + (not of_rows)),
    )


def _initial_sequences(search: SearchContext) -> Callable[[RingBuffer], Int[Tensor, "K L"]]:
    """First tokens of the chains; see `LangevinConfig.query_start`."""
    config, generator = search.config, search.context.generators("langevin/start")
    count, length = config.queries, config.langevin.query_tokens
    random = partial(random_strings, count, length, search.vocabulary, generator)
    if config.langevin.proposer == "reward-queries":  # whole windows: nothing changes their tokens
        return lambda buffer: search.reward_windows(generator).tokens.to(search.context.lm.device)

    def beginnings(windows: Windows) -> Int[Tensor, "m L"]:
        tokens = windows.tokens[:, :length].to(search.context.lm.device)
        special = ~torch.isin(tokens, search.vocabulary.ids)
        if not special.any():
            return tokens
        others = random_strings(len(tokens), length, search.vocabulary, generator)
        return torch.where(special, others, tokens)

    def best(buffer: RingBuffer) -> Int[Tensor, "K L"]:
        pool = uniform_slots(buffer, config.retrieval.direct_pool or len(buffer), generator)
        tokens = beginnings(buffer.take(pool))
        return tokens[search.q.hard(tokens).topk(min(count, len(tokens))).indices]

    return {
        "random": lambda buffer: random(),
        "buffer": lambda buffer: beginnings(buffer.take(_by_chance(buffer, count, generator))),
        "best": best,
        "reward": lambda buffer: beginnings(search.reward_windows(generator)),
    }[config.langevin.query_start]


def _by_chance(buffer: RingBuffer, count: int, generator: torch.Generator) -> Int[Tensor, "K"]:
    """Live slots, drawn with replacement."""
    live = buffer.live.nonzero().flatten()
    return live[torch.randint(len(live), (count,), generator=generator)]


def _embedding_flops(search: SearchContext) -> int:
    """Operations of the language model that embed the strings of a step; none where a text encoder does."""
    config = search.config
    tokens = config.langevin.query_tokens
    if config.langevin.proposer == "reward-queries":
        tokens = config.data.window
    return config.queries * trunk_flops(search.context.lm, tokens) if _follows_theta(config) else 0


def _search_flops(search: SearchContext) -> int:
    """Operations of the language model in one search for strings, without the diagnostics' and a text
    encoder's.

    A pass backward to the embeddings costs as much as a forward pass: no weight gets a gradient. The bridge
    multiplies twice with W_e per step. A sampler of the user's own reports its cost itself.
    """
    config, c = search.config, search.config.langevin
    forward = trunk_flops(search.context.lm, c.query_tokens)
    product = 2 * config.queries * c.query_tokens * len(search.vocabulary) * search.inputs.width
    pool = config.retrieval.direct_pool or config.retrieval.buffer_size
    start = pool * forward if c.query_start == "best" else 0
    searched = {
        "langevin": c.langevin_steps * (2 * config.queries * forward + 2 * product),
        "best-of-random": c.random_strings * config.queries * forward,
    }.get(c.proposer, 0)
    return _embedding_flops(search) + start + searched
