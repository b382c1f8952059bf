"""The settings of Langevin-RAG (Algorithm 2): the search for queries, and the retrieval of windows."""

from dataclasses import dataclass
from typing import Literal

from curriq.config.checks import (
    Count,
    CountOrZero,
    NonNegative,
    Pairs,
    Positive,
    Section,
    require_known,
)

PROPOSERS = ("stream", "langevin", "best-of-random", "random-queries", "direct-q", "uniform-buffer")
"""The built-in proposers."""
WITHOUT_Q = ("stream", "random-queries", "uniform-buffer")
"""Proposers that read no Q; a sampler of the user's own may read it."""
WITHOUT_QUERY = ("direct-q", "uniform-buffer")
"""Proposers that take windows of the buffer without a query, so that nothing is embedded."""


@dataclass(frozen=True, kw_only=True)
class LangevinConfig(Section):
    """Where the candidates of a step come from, and how queries are searched."""

    proposer: str = "stream"
    """Where candidates come from. `stream`: the next N windows (Algorithm 1). `langevin`: Algorithm 2.
    Controls: `best-of-random` (no gradient), `random-queries` (no search), `direct-q` (Q of a pool of
    windows, no query), `uniform-buffer` (no Q). `package.module:function` or `path/to/file.py:function`:
    Algorithm 2 with the sampler of queries that this function builds."""
    chains: CountOrZero = 0
    """K: chains per step, each of which gives one query; 0 takes as many as --num-candidates."""
    query_tokens: Count = 16
    """L: tokens of a query."""
    query_start: Literal["random", "buffer"] = "random"
    """Initial tokens of the chains: uniform over the vocabulary, or the first tokens of buffered windows."""
    langevin_steps: Count = 20
    """T_max: steps of a search."""
    langevin_step_size: Positive = 20.0
    """ε of Eq. 13: the step size."""
    langevin_noise_scale: NonNegative = 0.1
    """σ: standard deviation of the noise η of Eq. 13; the noise of one step is √ε η."""
    langevin_margin: Positive = 6.0
    """Initial logit of the chains' initial tokens, all others having 0. Compare it with log V: far above, no
    token is ever overtaken; far below, the initial tokens have little of the probability."""
    langevin_gradient: Literal["clip", "chain", "position"] = "chain"
    """`clip`: clip each chain's gradient to norm --langevin-limit (the paper). `chain`, `position`: rescale
    the gradient of each chain, or of each position, to exactly that norm, whatever the scale of Q."""
    langevin_limit: Positive = 1.0
    """G: norm that gradients are clipped or rescaled to."""
    energy_temperature: Positive = 1.0
    """τ_sgld of Eq. 12, in units of Q (nats per token). No effect on rescaled gradients."""
    bridge_temperature_start: Positive = 1.0
    """τ_start: temperature of the softmax bridge in the first step (Eq. 14). If it is high for the margin,
    the relaxed string is close to the mean embedding and unlike any text."""
    bridge_temperature_end: Positive = 0.5
    """τ_end: temperature of the softmax bridge in the last step."""
    fluency: NonNegative = 0.0
    """Weight of the fluency prior, on the scale of q/τ_sgld: it pulls tokens towards θ's predictions. 0 for
    none."""
    bridge_precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 multiplies by the embedding matrix in bfloat16; λ stays float32."""
    random_strings: Count = 40
    """`best-of-random`: random strings per chain, of which the best is kept."""

    def check(self) -> None:
        require_known("--proposer", self.proposer, PROPOSERS, "curriq.samplers")


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(Section):
    """The ring buffer of real windows, and how queries retrieve from it (Eq. 16)."""

    buffer_size: Count = 2048
    """I: windows in the ring buffer."""
    buffer_initial: CountOrZero = 0
    """Windows read into the buffer before the first step; 0 fills it."""
    ingest: Count = 32
    """n_ingest: new windows per step, written over the oldest ones."""
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence-transformer by name or folder; `hashing`, a fast one without weights; or `hidden-state`, the
    model's own hidden state as the Q-network reads it, at unit norm."""
    encoder_precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps the sentence-transformer's weights in bfloat16, which is faster on hardware that has it."""
    encode_ahead: bool = True
    """Encode the next step's new windows while the model trains on this step's."""
    index: Literal["torch", "faiss"] = "torch"
    """Nearest-neighbour search: a matrix product and top-k, or FAISS (IndexFlatIP). The results are equal."""
    retrieval_top_k: Count = 16
    """k: nearest windows of a query, of which one is drawn."""
    retrieval_temperature: Positive = 0.1
    """τ_rag of Eq. 16, on the cosine similarity."""
    retrieval_draw: Literal["softmax", "top-1"] = "softmax"
    """Draw one of the top k by Eq. 16, or take the nearest."""
    retrieval_duplicates: Literal["redraw", "drop"] = "redraw"
    """If two queries of a step draw the same window: redraw from the rest of the second's top k, so that R =
    K, or drop it (the paper), so that R ≤ K."""
    centre_queries: bool = False
    """Subtract the buffer's mean embedding from the queries, so that what all windows share does not
    count."""
    refresh: CountOrZero = 0
    """Rows of the buffer that are re-embedded per step, in turn, because hidden states change as θ trains
    (--encoder hidden-state only)."""
    direct_pool: CountOrZero = 256
    """`direct-q`: windows drawn uniformly from the buffer per step to evaluate Q on; 0 takes all."""
    retrieval_probe: CountOrZero = 0
    """Random windows of the buffer to evaluate Q on per step, to log Q of the retrieved ones beside
    theirs."""

    def illegal_pairs(self) -> Pairs:
        if self.refresh and self.encoder != "hidden-state":
            yield "refresh", "encoder", "its embeddings do not change while the model trains; use --refresh 0"
        for name in ("buffer_initial", "ingest"):
            if getattr(self, name) > self.buffer_size:
                yield name, "buffer_size", "the buffer holds no more; lower the one or raise the other"
