"""The settings of Langevin-RAG (Algorithm 2): the search for queries, and the retrieval of windows."""

from dataclasses import dataclass
from typing import Literal

from curriq.config.checks import flag, require, require_at_least, require_positive

WITHOUT_Q = ("stream", "random-queries", "uniform-buffer")
"""Proposers that read no Q; a sampler of the user's own may read it."""
WITHOUT_QUERY = ("direct-q", "uniform-buffer")
"""Proposers that take windows of the buffer without a query, so that nothing is embedded."""


@dataclass(frozen=True, kw_only=True)
class LangevinConfig:
    """Where the candidates of a step come from, and how queries are searched."""

    proposer: str = "stream"
    """`stream`: the next N windows (Algorithm 1). `langevin`: Algorithm 2. Controls on the same buffer:
    `best-of-random` (no gradient), `random-queries` (no search), `direct-q` (Q of a pool of windows, no
    query), `uniform-buffer` (no Q). `package.module:function`, or `path/to/file.py:function`: Algorithm 2
    with the sampler of queries that this function builds."""
    chains: int = 0
    """K: queries per step, so at most K windows are retrieved; 0 means N (--num-candidates)."""
    query_tokens: int = 16
    """L: tokens of a query."""
    query_start: Literal["random", "buffer"] = "random"
    """The chains' first tokens: uniform over the vocabulary, or the beginnings of windows of the buffer."""
    langevin_steps: int = 20
    """T_max: steps of a search."""
    langevin_step_size: float = 20.0
    """ε of Eq. 13."""
    langevin_noise_scale: float = 0.1
    """σ: standard deviation of the noise η of Eq. 13; the noise of one step is √ε η."""
    langevin_margin: float = 6.0
    """Logit of the chains' first tokens, the others having 0. On the scale of log V: a greater one is
    never overtaken, a smaller one is no token to begin with."""
    langevin_gradient: Literal["clip", "chain", "position"] = "chain"
    """`clip`: shorten each chain's gradient to --langevin-limit (the paper). `chain`, `position`: give the
    gradient of each chain, or of each of its positions, exactly that length, whatever the scale of Q."""
    langevin_limit: float = 1.0
    """G: length that gradients are clipped or scaled to."""
    energy_temperature: float = 1.0
    """τ_sgld of Eq. 12, in units of Q (nats per token). Without effect on scaled gradients."""
    bridge_temperature_start: float = 1.0
    """τ_start: temperature of the softmax bridge in the first step (Eq. 14). Where a token of the margin has
    little of the probability, the relaxed string is near the mean embedding and unlike any text."""
    bridge_temperature_end: float = 0.5
    """τ_end: its temperature in the last step."""
    fluency: float = 0.0
    """Weight of the fluency prior, which draws each token to what θ predicts from those before it; on the
    scale of q/τ_sgld. 0 switches it off."""
    bridge_precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 multiplies with the embedding matrix in bfloat16; λ stays float32."""
    random_strings: int = 40
    """`best-of-random`: random strings per chain of which the best is kept."""

    def __post_init__(self) -> None:
        require_at_least(0, chains=self.chains, fluency=self.fluency)
        require_at_least(0, langevin_noise_scale=self.langevin_noise_scale)
        require_at_least(
            1,
            query_tokens=self.query_tokens,
            langevin_steps=self.langevin_steps,
            random_strings=self.random_strings,
        )
        require_positive(
            langevin_step_size=self.langevin_step_size,
            langevin_margin=self.langevin_margin,
            langevin_limit=self.langevin_limit,
            energy_temperature=self.energy_temperature,
            bridge_temperature_start=self.bridge_temperature_start,
            bridge_temperature_end=self.bridge_temperature_end,
        )


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """The ring buffer of real windows, and how queries retrieve from it (Eq. 16)."""

    buffer_size: int = 2048
    """I: windows in the ring buffer."""
    buffer_initial: int = 0
    """Windows read into the buffer before the first step; 0 fills it."""
    ingest: int = 32
    """n_ingest: fresh windows per step, written over the oldest."""
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence-transformer by name or folder; `hashing`, a quick one without weights; or `hidden-state`, the
    unit vector of what the Q-network reads of a window, by the model itself."""
    encoder_precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps the sentence-transformer's weights in bfloat16: faster where the processor has it."""
    encode_ahead: bool = True
    """Encode the fresh windows of the next step while the model trains on this one."""
    index: Literal["torch", "faiss"] = "torch"
    """What searches the buffer: a matrix product and top-k, or FAISS (IndexFlatIP); the results are equal."""
    retrieval_top_k: int = 16
    """k: nearest windows of a query that one is drawn from."""
    retrieval_temperature: float = 0.1
    """τ_rag of Eq. 16, on the cosine similarity."""
    retrieval_draw: Literal["softmax", "top-1"] = "softmax"
    """Draw one of the top k by Eq. 16, or take the nearest."""
    retrieval_duplicates: Literal["redraw", "drop"] = "redraw"
    """A window that another query of the step has drawn is drawn again from the rest of the top k, so that
    R = K; or dropped (the paper), so that R ≤ K."""
    centre_queries: bool = False
    """Subtract the buffer's mean from the queries' embeddings before the search. All windows then lose the
    same number, so the order is that of centred vectors: what all windows share does not count."""
    refresh: int = 0
    """Rows of the buffer that are embedded anew each step, in turn, with --encoder hidden-state: θ moves, and
    so does the hidden state; 0 leaves them as they came."""
    direct_pool: int = 256
    """`direct-q`: windows of the buffer, drawn uniformly, that Q is measured on each step; 0 takes all."""
    retrieval_probe: int = 0
    """Random windows of the buffer whose Q is measured each step, beside that of the retrieved ones, for
    the log; 0 measures neither."""

    def __post_init__(self) -> None:
        require_at_least(
            1, buffer_size=self.buffer_size, ingest=self.ingest, retrieval_top_k=self.retrieval_top_k
        )
        require_at_least(
            0,
            buffer_initial=self.buffer_initial,
            direct_pool=self.direct_pool,
            retrieval_probe=self.retrieval_probe,
            refresh=self.refresh,
        )
        require(
            self.refresh == 0 or self.encoder == "hidden-state",
            f"--refresh {self.refresh} with --encoder {self.encoder}: its embeddings do not change while the "
            "model trains; use --refresh 0.",
        )
        require_positive(retrieval_temperature=self.retrieval_temperature)
        for name in ("buffer_initial", "ingest"):
            value = getattr(self, name)
            require(
                value <= self.buffer_size,
                f"{flag(name)} = {value}: it must be at most --buffer-size = {self.buffer_size}.",
            )
