"""The settings of Algorithm 2: the search for queries, the buffer and the retrieval."""

from dataclasses import dataclass
from typing import Annotated, Literal

from curriq.config.bounds import (
    OVERFLOWS,
    Fraction,
    NonNegative,
    Pairs,
    Positive,
    Section,
    Size,
    SizeOrZero,
    Stock,
    StockOrZero,
    Within,
)
from curriq.config.checks import require_known
from curriq.config.sections import MINILM

PROPOSERS = (
    *("stream", "langevin", "vector-langevin"),
    *("best-of-random", "random-queries", "reward-queries", "direct-q", "uniform-buffer"),
)
"""The built-in proposers."""
WITHOUT_Q = ("stream", "random-queries", "reward-queries", "uniform-buffer")
"""Proposers that read no Q; a sampler of the user's own may read it."""
WITHOUT_QUERY = ("direct-q", "uniform-buffer")
"""Proposers that take windows of the buffer without a query, so that nothing is embedded."""


@dataclass(frozen=True, kw_only=True)
class LangevinConfig(Section):
    """Where candidates come from; Langevin search for queries of high Q (Algorithm 2)."""

    proposer: str = "stream"
    """Where candidates come from. `stream`: the next N windows (Algorithm 1). `langevin`: Algorithm 2.
    `vector-langevin`: the search takes place in the retriever's own space. Controls: `best-of-random` (no
    gradient), `random-queries` (no search), `reward-queries` (held-out windows as queries, no Q), `direct-q`
    (Q of a pool of windows, no query), `uniform-buffer` (no Q). `package.module:function` or
    `path/to/file.py:function`: Algorithm 2 with the sampler of queries that this function builds."""
    chains: SizeOrZero = 0
    """Chains per step, each of which gives one query (K); 0 takes as many as --num-candidates."""
    query_tokens: Size = 16
    """Tokens of a query (L)."""
    query_start: Literal["random", "buffer", "best", "reward"] = "random"
    """Initial tokens of the chains: uniform over the vocabulary; beginnings of buffered windows, by chance or
    those of greatest Q among --direct-pool windows; or beginnings of held-out reward windows."""
    search_every: Size = 1
    """Steps from one search to the next; between them the same queries are used."""
    langevin_steps: Size = 20
    """Steps of a search (T_max)."""
    langevin_step_size: Positive = 20.0
    """Step size ε of Eq. 13."""
    langevin_noise_scale: NonNegative = 0.1
    """Standard deviation σ of the noise η of Eq. 13; the noise of one step is √ε η."""
    langevin_margin: Positive = 6.0
    """Initial logit of the chains' initial tokens, all others having 0. Compare it with log V: far above, no
    token is ever overtaken; far below, the initial tokens have little of the probability."""
    langevin_gradient: Literal["clip", "chain", "position"] = "chain"
    """`clip`: clip each chain's gradient to norm --langevin-limit (the paper). `chain`, `position`: rescale
    the gradient of each chain, or of each position, to exactly that norm, whatever the scale of Q."""
    langevin_limit: Positive = 1.0
    """Norm G that gradients are clipped or rescaled to."""
    energy_temperature: Positive = 1.0
    """Temperature τ_sgld of Eq. 12, in units of Q (nats per token). No effect on rescaled gradients."""
    bridge_temperature_start: Positive = 1.0
    """Temperature τ_start of the softmax bridge in the first step (Eq. 14). If it is high for the margin, the
    relaxed string is close to the mean embedding and unlike any text."""
    bridge_temperature_end: Positive = 0.5
    """Temperature τ_end of the softmax bridge in the last step."""
    target_pull: NonNegative = 1.0
    """Weight of the prior in the energy of vector-langevin: how likely a query is among the embeddings of the
    reward windows, on the scale of q/τ_sgld; 0 for none."""
    fluency: NonNegative = 0.0
    """Weight of the fluency prior, the model's own predictions, on the scale of q/τ_sgld; 0 for none."""
    bridge_precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 multiplies by the embedding matrix in bfloat16; λ stays float32."""
    random_strings: Size = 40
    """Random strings per chain of best-of-random, of which it keeps the best."""

    def check(self) -> None:
        require_known("--proposer", self.proposer, PROPOSERS, "curriq.samplers")


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(Section):
    """The ring buffer of real windows that queries retrieve from, and how (Algorithm 2, Eq. 16)."""

    buffer_size: Stock = 2048
    """Windows in the ring buffer (I)."""
    buffer_initial: StockOrZero = 0
    """Windows read into the buffer before the first step; 0 fills it."""
    ingest: Size = 32
    """New windows per step, written over the oldest ones (n_ingest)."""
    encoder: str = MINILM
    """Sentence-transformer by name or folder; `hashing`, a fast one without weights; or `hidden-state`, the
    model's own hidden state as the Q-network reads it, at unit norm."""
    encoder_precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps the sentence-transformer's weights in bfloat16, which is faster on hardware that has it."""
    encode_ahead: bool = True
    """Encode the next step's new windows while the model trains on this step's."""
    index: Literal["torch", "faiss"] = "torch"
    """Nearest-neighbour search: a matrix product and top-k, or FAISS (IndexFlatIP). The results are equal."""
    retrieval_top_k: Size = 16
    """Nearest windows of a query, of which one is drawn (k)."""
    retrieval_temperature: Annotated[float, Within("[1e-30, 1e9]", above=OVERFLOWS)] = 0.1
    """Softmax temperature τ_rag over the cosine similarity (Eq. 16)."""
    retrieval_draw: Literal["softmax", "top-1", "set"] = "softmax"
    """Draw one of the top k by Eq. 16, take the nearest, or draw a set: each window for what it tells of the
    queries beyond those drawn before it, with τ_rag as the variance of its noise."""
    retrieval_duplicates: Literal["redraw", "drop"] = "redraw"
    """If two queries of a step draw the same window: redraw from the rest of the second's top k, so that R =
    K, or drop it (the paper), so that R ≤ K."""
    mark_used: bool = True
    """Retrieve a window, and its copies in the buffer, once only; off leaves it in the buffer until it is
    overwritten (the paper)."""
    centre_queries: bool = False
    """Subtract the buffer's mean embedding from the queries, to ignore what all windows have in common."""
    refresh: SizeOrZero = 0
    """Rows of the buffer re-embedded per step, in turn, as hidden states change (--encoder hidden-state)."""
    refresh_below: Fraction = 1.0
    """Re-embed only as many of them as it takes: half as many as in the step before where their mean cosine
    with their previous values was above this, twice as many where it was below; 1 re-embeds all of them."""
    direct_pool: SizeOrZero = 256
    """Windows that direct-q draws uniformly from the buffer per step to evaluate Q on; 0 takes all."""
    retrieval_probe: SizeOrZero = 0
    """Random windows of the buffer per step whose Q is logged beside that of the retrieved ones."""

    def illegal_pairs(self) -> Pairs:
        if self.refresh and self.encoder != "hidden-state":
            yield "refresh", "encoder", "its embeddings do not change while the model trains; use --refresh 0"
        for name in ("buffer_initial", "ingest"):
            if getattr(self, name) > self.buffer_size:
                yield name, "buffer_size", "the buffer holds no more; lower the one or raise the other"
        if self.retrieval_draw == "set" and self.retrieval_duplicates == "drop":
            why = "a set has no window twice"
            yield "retrieval_duplicates", "retrieval_draw", f"{why}; use --retrieval-duplicates redraw"
