"""The settings of each component: their defaults, their help texts and their bounds."""

import os
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from curriq.config.bounds import (
    ENDLESS,
    IN_MEMORY,
    OVERFLOWS,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Pairs,
    Positive,
    Section,
    Seed,
    Share,
    Size,
    SizeOrAuto,
    SizeOrZero,
    Stock,
    StockOrAuto,
    StockOrZero,
    Within,
)
from curriq.config.checks import flag, require, require_known, require_writable

SELECTORS = (
    *("soft-q", "filter", "uniform", "random-single", "random-k", "high-loss", "low-loss", "uncertainty"),
    *("competence", "rho", "bandit"),
)
"""The built-in selectors."""
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
CorruptionName = Literal["none", "random-tokens", "shuffled-tokens", "ocr", "duplicates"]
FeatureName = Literal["last", "mean", "loss", "source", "static_score"]
PRE_FORWARD_FEATURES: tuple[FeatureName, ...] = ("source", "static_score")
"""Features of a window that need no forward pass."""
MOST_WEIGHT = 1e9
"""Greatest weight of a source."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One named source of documents.

    On the command line a source is one word of `key=value` pairs:
    `--sources name=web,path=data/web-*.jsonl.gz,weight=0.7 name=code,path=embedded:code,weight=0.3`.
    """

    name: str
    """Name in logs and reports."""
    path: str
    """`embedded:prose`, `embedded:code`, a local file, folder or glob (.txt .jsonl .json .csv .parquet
    .arrow, also .gz and .zst), or `hub:NAME[:CONFIG]` for a hub data set. `${NAME}` stands for an environment
    variable, `${NAME:-DEFAULT}` for one with a default."""
    weight: Annotated[float, Within("[0, 1e9]")] = 1.0
    """Relative share of the stream's windows; 0 keeps the source out of the stream (a pure target)."""
    text_field: str = "text"
    """Column of the text, or of the messages of a chat."""
    difficulty_field: str = ""
    """Column of a numeric difficulty label (higher is harder); empty for none."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row without a string as text, or with too few or too many fields, does: end the run, or be left
    out and counted."""
    hub_split: str = "train"
    """Split of a hub data set, or of a folder that holds several."""
    hub_revision: str = ""
    """Revision (branch, tag, commit) of a hub data set; empty pins the newest in the run's config.toml."""
    documents: Literal["file", "paragraph", "line"] = "paragraph"
    """What one document is in a .txt file."""
    corruption: CorruptionName = "none"
    """Noise added to the documents before they are packed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))  # a path object is as good as its text
        for key, value in vars(self).items():
            require_writable(f"source {self.name!r}: {key}", value)
        require(bool(self.name), "a source needs a name: write name=NAME,path=PATH.")
        require(bool(self.path), f"source {self.name!r} needs a path: write name={self.name},path=PATH.")
        require(
            0 <= self.weight <= MOST_WEIGHT,
            f"source {self.name!r}: weight = {self.weight}: it must lie in [0, {MOST_WEIGHT:g}]; 0 keeps the "
            "source out of the stream.",
        )

    @property
    def is_pinned(self) -> bool:
        """Whether `hub_revision` is a commit, which never names other data."""
        return re.fullmatch("[0-9a-f]{40}", self.hub_revision) is not None


EMBEDDED_SOURCES = (
    SourceConfig(name="prose", path="embedded:prose", weight=0.2),
    SourceConfig(name="code", path="embedded:code", weight=0.3),
    SourceConfig(name="random", path="embedded:prose", weight=0.15, corruption="random-tokens"),
    SourceConfig(name="shuffled", path="embedded:prose", weight=0.15, corruption="shuffled-tokens"),
    SourceConfig(name="ocr", path="embedded:prose", weight=0.1, corruption="ocr"),
    SourceConfig(name="duplicates", path="embedded:code", weight=0.1, corruption="duplicates"),
)
"""The default stream: Python's own documentation and source code, mostly off target or corrupted."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The stream of candidate windows, the held-out sets, a recorded curriculum."""

    sources: tuple[SourceConfig, ...] = EMBEDDED_SOURCES
    """Sources of the stream, each written name=…,path=…[,weight=…][,corruption=…]."""
    target: str = "prose"
    """Source to get better at: its held-out documents are the reward, validation and test sets."""
    window: Annotated[int, Within("[2, 1e6]", above=IN_MEMORY)] = 128
    """Tokens per window (T)."""
    shuffle_buffer: Stock = 8192
    """Windows in the shuffle buffer; 1 keeps the order of the sources. Behind a filter only a part of it is
    trained on, so that a small one makes every batch of windows of a few documents."""
    stream_shards: Size = 1
    """Shards of the stream (S), each with its own part of the documents, its own shuffle buffer and its own
    random draws. Several processes (torchrun) read S/W of them each, and a step takes N/S windows from each;
    the windows do not depend on the number of processes. At 1 every process reads the whole stream."""
    held_out_share: Annotated[float, Within("(0, 1)")] = 0.25
    """Share of the target's documents, chosen by document hash, that never enter the stream."""
    split_seed: Seed = 0
    """Seed of the held-out split: another one holds out other documents. `curriq compare` gives each of its
    seeds its own."""
    reward_set_size: Size = 128
    """Windows of the reward set (|D|)."""
    validation_set_size: Size = 64
    """Windows of the validation set."""
    test_set_size: Size = 128
    """Windows of the test set."""
    held_out_sizes: Literal["fit", "exact"] = "fit"
    """`fit`: where the target cannot fill the three held-out sets, all of them shrink in proportion, to 16
    windows each at the least, and the run says so. `exact`: that is an error. A size that you set yourself
    means `exact`, unless you set this too."""
    near_duplicate_threshold: Fraction = 0.6
    """Jaccard similarity of shingles (5 words; 4 or 5 characters of scripts without spaces) from which two
    documents stay on one side of the held-out split; 1 compares exact copies only."""
    topic_coherent: bool = False
    """Draw the held-out windows from one topic: by embedding similarity to a random anchor window."""
    topic_pool_size: Size = 4096
    """Windows that are embedded to choose the topic-coherent sets from."""
    topic_temperature: Positive = 0.1
    """Softmax temperature over cosine similarity to the anchor; the lower, the narrower the topic."""
    topic_encoder: str = MINILM
    """Encoder of --topic-coherent and --topic-similarity-every: a sentence-transformer by name or folder, or
    `hashing`, a fast one without weights."""
    curriculum: str = ""
    """Recorded curriculum (Parquet, from `curriq export`) to train on in place of stream and selector."""
    curriculum_weights: bool = True
    """Use the recorded weights too; off keeps windows and order, and the selector weighs them."""

    def check(self) -> None:
        require(bool(self.sources), "--sources is empty: name at least one source, as name=…,path=….")
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        require(not repeated, f"--sources names {repeated} twice: every source needs its own name.")
        require(
            self.target in names,
            f"--target {self.target!r} is not a source: choose one of {names}, or add it with weight=0.",
        )
        corruption = self.sources[names.index(self.target)].corruption
        require(
            corruption == "none",
            f"--target {self.target!r} has corruption={corruption}: the target must be clean text; choose "
            "another source, or add the clean one with weight=0.",
        )
        require(
            any(source.weight > 0 for source in self.sources),
            "every source has weight 0, so the stream is empty: give one a positive weight.",
        )


_BPE = " for byte-level BPE (256 bytes and EOS)"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """Which tokenizer turns text into tokens, or how one is trained."""

    tokenizer: str = "auto"
    """`train` (byte-level BPE trained on the clean sources and cached), a folder, a hub name, or `auto`: the
    model's own if the model is pretrained, otherwise `train`."""
    vocab_size: Annotated[int, Within("[257, 1e6]", _BPE, IN_MEMORY)] = 2048
    """Vocabulary size V of a tokenizer trained here."""
    tokenizer_sample_bytes: Stock = 4_000_000
    """Bytes of UTF-8 text to train a tokenizer on."""


# Llama, because a GPT-2 of this size with tied embeddings spends most of a short run on the plateau where it
# knows token frequencies only (experiments/LOG.md).
DEFAULT_MODEL = "random:llama:hidden_size=128,intermediate_size=344,num_hidden_layers=3,num_attention_heads=4"


@dataclass(frozen=True, kw_only=True)
class LMConfig(Section):
    """The language model θ (any Hugging Face causal LM): weights, precision, device, LoRA."""

    model: str = DEFAULT_MODEL
    """Hub name or folder of a pretrained model; or, to train from scratch, random:WHAT[:KEY=VALUE,...], where
    WHAT is an architecture (gpt2, llama, gpt_neox, qwen2, opt, ...), a folder or a hub name. `${NAME}` stands
    for an environment variable, as in the path of a source and in every other name of a file or a folder."""
    dropout: Share = 0.0
    """Dropout rate throughout the model; above 0, scoring takes a forward pass of its own without dropout."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward and backward pass in bfloat16 autocast; weights stay float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model's repeated block by torch.compile, for micro-batches of full size: half a minute at
    the start, and faster steps on a GPU. `auto` does on a GPU with triton, except with
    --gradient-checkpointing."""
    cross_entropy: Literal["auto", "fused", "torch"] = "auto"
    """How losses come from hidden states: `torch`, through logits in float32; `fused`, from one buffer in the
    precision of the passes, over a vocabulary padded to a multiple of 128. `auto` is fused on a GPU with
    triton, and torch elsewhere and for models that do more to their logits."""
    attention: Literal["auto", "flash", "cudnn", "math"] = "auto"
    """Kernel of torch's attention, taken where it can be; `auto` leaves the choice to torch."""
    gradient_checkpointing: bool = False
    """Save memory by recomputing activations in the backward pass."""
    resize_embeddings: bool = False
    """Add embeddings to a pretrained model with fewer than its tokenizer has tokens; off, it is refused."""
    device: str = "auto"
    """A torch device such as cpu or cuda:0, or `auto`: a GPU if there is one."""
    engine: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How several processes (torchrun) share the work: `ddp`, each holds the whole model and its optimizer;
    `fsdp`, each holds a part of both, for models that one GPU cannot hold; `hsdp`, the parts are spread over
    one machine, and each machine holds the whole. `auto` is ddp. One process shares nothing."""
    lora_rank: SizeOrZero = 0
    """Train and save LoRA adapters of this rank only, as PEFT does (extra [peft]); 0 trains all weights."""
    lora_alpha: Size = 16
    """Scale of the adapters' output: they are multiplied by α/rank."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Layers that get adapters, by the end of their names (q_proj v_proj); all-linear is all but the head."""
    lora_dropout: Share = 0.0
    """Dropout on the adapters' input."""

    @property
    def pretrained(self) -> bool:
        """Whether the run begins with weights that have been trained."""
        return not self.model.startswith("random:")

    def check(self) -> None:
        require(bool(self.model), "--model is empty: give a hub name, a folder or random:ARCHITECTURE.")
        require(bool(self.lora_targets), "--lora-targets is empty: name layers, or use all-linear.")

    def illegal_pairs(self) -> Pairs:
        if self.gradient_checkpointing and self.compile == "on":
            why = "a block that is forwarded twice is not compiled; drop either"
            yield "compile", "gradient_checkpointing", why


MICRO_BATCH = 8
"""Windows per pass where nothing says how many fit."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """AdamW for the language model: learning rate and its schedule, clipping, micro-batches."""

    lm_lr: Positive = 2e-3
    """Peak learning rate of the language model (α)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay from the peak to zero, which it would reach one step after the last; `constant` for none."""
    lr_warmup_steps: CountOrZero = 20
    """Steps of linear warm-up to the peak."""
    weight_decay: NonNegative = 0.01
    """AdamW's decoupled weight decay."""
    adam_beta2: Annotated[float, Within("(0, 1)")] = 0.999
    """AdamW's second-moment decay; the first-moment decay is 0.9."""
    grad_clip: Positive = 1.0
    """Maximum global gradient norm of the language model."""
    micro_batch: SizeOrAuto = 0
    """Windows per forward and backward pass; changes memory and speed, never the gradient. `auto` (0) takes 8
    on a CPU, and on a GPU as many as fit; where they do not, half as many, and so on."""
    head_chunk_tokens: StockOrAuto = 0
    """Tokens whose logits are in memory at once, at least one window's; `auto` (0) takes 512 on a CPU, and on
    a GPU as many as a 16th of its memory holds."""

    @property
    def windows_at_once(self) -> int:
        """Windows per pass of what is not sized to the memory."""
        return self.micro_batch or MICRO_BATCH


_BETA = "; for a nearly greedy policy use a small value such as 1e-3, for a uniform mixture --no-q-weighting"
_GAMMA = ", or the soft value has no fixed point; for a long horizon use 0.99"
_PASSES = "; after so many readings the size of the source is known"
_Selected = Annotated[float, Within("(0, 1]", "; 1 selects nothing")]


@dataclass(frozen=True, kw_only=True)
class CriticConfig(Section):
    """The Q-network φ: its inputs, what it credits, how it learns, experience replay."""

    temperature: Literal["fixed", "fraction", "gated", "learned"] = "fixed"
    """How the policy's temperature β is set. `fixed`: to --beta (the paper). `fraction`: solved for
    --effective-batch-fraction, or in a stream filter for --accept-fraction. `gated`: the same, but only as
    sharp as Q's rank correlation with measured effects warrants. `learned`: by gradient, as in soft
    actor-critic."""
    beta: Annotated[float, Within("(0, 1e9]", _BETA, OVERFLOWS)] = 1.0
    """Boltzmann temperature β of the policy, in units of Q (nats per token); the lower, the sharper. With
    --temperature learned, the initial one."""
    beta_lr: Positive = 0.01
    """Learning rate of log β with --temperature learned."""
    effective_batch_fraction: _Selected = 0.7
    """Share of the windows that a step effectively trains on, 1/(N‖π‖²); the lower, the sharper the policy.
    β is solved for it; with --temperature gated it is the lowest allowed."""
    accept_fraction: _Selected = 0.25
    """Share of the windows read that the stream filter (--max-read-ratio) accepts; the lower, the more
    selective. With --temperature gated it is the lowest allowed, but for --min-accept-fraction."""
    min_accept_fraction: _Selected = 1.0
    """Lowest share for a Q of --temperature gated that ranks windows better than --corr-for-full-sharpness
    asks for: the share is --accept-fraction to the power r where it ranks r times as well, and at least
    1/--max-read-ratio. 1 for none below --accept-fraction."""
    min_target_accept_rate: Share = 0.8
    """Minimum rate at which Q accepts the target's own text in the stream filter, so that it does not select
    among windows that are all on target. Needs static_score in --q-features; 0 for no minimum."""
    corr_for_full_sharpness: Positive = 0.2
    """How well Q must rank windows before --temperature gated lets the policy be as sharp as it may: the rank
    correlation of Q with measured effects, at its lower confidence bound."""
    uniform_share: Share = 0.0
    """Share ε of the weight that is spread uniformly over all windows."""
    dirichlet_concentration: NonNegative = 0.0
    """Concentration of Dirichlet noise on the weights, which mixture credit needs to explore; the lower, the
    more noise, and 0 for none."""
    gamma: Annotated[float, Within("[0, 1)", _GAMMA)] = 0.9
    """Discount factor γ of the Bellman target (Eq. 3), which `recommended` does without (--no-bellman)."""
    polyak_tau: Fraction = 0.01
    """Share τ of the online network that is averaged into the target network per TD update (Eq. 5)."""
    q_lr: Positive = 1e-3
    """Learning rate η of the Q-network (Adam)."""
    q_grad_clip: Positive = 1.0
    """Maximum global gradient norm of the Q-network."""
    q_hidden: SizeOrZero = 32
    """Hidden units of the Q-network (d → q_hidden → 1); 0 makes it linear."""
    q_features: tuple[FeatureName, ...] = ("last",)
    """What the Q-network sees of a window: `last` (hidden state of its last token, the paper), `mean` (mean
    hidden state), `loss`; and, known before the forward pass, `source` (which source it is from) and
    `static_score` (how target-like it is by --static-score). Name one or more."""
    q_layer_norm: bool = False
    """Apply layer normalisation to each hidden state before the Q-network."""
    q_standardise: bool = False
    """Standardise rewards and effects by running statistics, and start from the same Q for all windows."""
    q_weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay of the Q-network."""
    q_weighting: bool = True
    """Weigh the windows by the policy; off keeps the uniform mixture of Eqs. 9–10 while Q still learns."""
    td_into_theta: bool = False
    """Train the language model on the TD loss too, by forwarding the previous action again (Section 2.7)."""
    td_lambda: NonNegative = 1.0
    """Scale λ of the TD loss's gradient in the language model (not the λ of eligibility traces)."""
    td_step: Literal["joint", "own"] = "joint"
    """How --td-into-theta moves the model: `joint`, its gradient joins the mixture's in one optimizer step;
    `own`, a clipped optimizer step of its own before the mixture step (the paper), for which the windows are
    forwarded a second time."""
    reforward_action: bool = False
    """Forward the previous action again for the TD update, at the present weights (Algorithm 1, line 19);
    off keeps its hidden state of the step before. --td-into-theta always does."""
    credit: Literal["sampled", "mixture", "counterfactual"] = "sampled"
    """What the TD update credits with a reward: `sampled`, the sampled window (the paper); `mixture`, all
    windows through Σ π_i Q(h_i); `counterfactual`, each probed window with its own measured effect."""
    measure_effects: bool = False
    """Measure effects under the other credit rules too, for the log alone: does Q predict them?"""
    probe_windows: Size = 32
    """Windows whose effects are measured in each step that has a reward, at most all of the step; in a stream
    filter a third are rejected ones, which are not trained on."""
    probe_decay: Share = 0.9
    """Decay of the running average of held-out gradients from probe to probe; 0 uses each alone."""
    shuffle_effects: bool = False
    """Ablation: permute a step's measured effects among its windows, so that they carry no information."""
    bellman: bool = True
    """Whether Q learns the Bellman target y beside measured effects; off takes y = 0 (`recommended`)."""
    q_replay_size: StockOrZero = 0
    """Past (h, y) pairs kept for experience replay of Q; 0 switches replay off."""
    q_replay_batch: Size = 32
    """Pairs per replay update."""
    q_replay_updates: Size = 1
    """Replay updates of the Q-network per TD update."""

    def check(self) -> None:
        require(
            bool(self.q_features) and len(set(self.q_features)) == len(self.q_features),
            f"--q-features = {list(self.q_features)}: name at least one of last, mean, loss, source "
            "and static_score, each once.",
        )

    def illegal_pairs(self) -> Pairs:
        if self.credit != "counterfactual":
            effects = "measured effects need --credit counterfactual; use it, or"
            if self.temperature == "gated":
                why = f"the gate correlates Q with effects, and {effects} --temperature fraction"
                yield "temperature", "credit", why
            if self.shuffle_effects:
                yield "shuffle_effects", "credit", f"{effects} drop --shuffle-effects"
            if not self.bellman:
                why = "without the Bellman target this rule has nothing to learn from"
                yield "bellman", "credit", f"{why}; use --credit counterfactual, or give --bellman"
        for name in ("td_into_theta", "reforward_action"):
            if getattr(self, name) and self.credit != "sampled":
                why = "only the sampled window is forwarded again"
                yield name, "credit", f"{why}; use --credit sampled, or drop {flag(name)}"
        if self.td_lambda != 1 and not self.td_into_theta:
            why = "it scales a gradient that is not taken"
            yield "td_lambda", "td_into_theta", f"{why}; use --td-into-theta, or --td-lambda 1"
        if self.q_replay_size and self.credit == "mixture":
            why = "replay keeps single windows with targets, and a mixture has one target for all"
            yield "q_replay_size", "credit", f"{why}; use another --credit, or --q-replay-size 0"


_REFERENCE = (
    "--reference-model, a folder or hub name of a model of the target text; "
    "`curriq train --preset reference` trains one."
)


@dataclass(frozen=True, kw_only=True)
class SelectConfig(Section):
    """The paper's method or a baseline, and the settings of the baselines."""

    selector: str = "soft-q"
    """What selects: `soft-q`, the paper's method; `filter`, the static filter of --static-score and
    --static-rule; a baseline that weighs the candidates (`uniform`, `random-single`, `random-k`, `high-loss`,
    `low-loss`, `uncertainty`, `competence`, `rho`, `bandit`); or your own, `package.module:function` or
    `path/to/file.py:function`, which builds a `curriq.select.base.Method`."""
    selector_temperature: Positive = 0.5
    """Temperature of high-loss, low-loss, uncertainty and rho, in nats per token; the lower, the sharper."""
    random_k: Size = 8
    """Windows that random-k trains on per step."""
    competence_initial: Fraction = 0.1
    """Share of the difficulty range that competence opens at step 0 (c0)."""
    competence_steps: CountOrZero = 0
    """Step from which competence opens the whole range; 0 takes half of --steps."""
    difficulty: Literal["auto", "label", "length", "rarity"] = "auto"
    """What competence sorts by: a label, characters per window, or mean unigram rarity; `auto` takes the
    label if there is one, otherwise rarity."""
    reference_model: str = ""
    """Folder or hub name of a model of the target text, for rho and for --static-score perplexity and rho."""
    prior: bool = False
    """Take the static filter as the prior π₀ of soft-q: π ∝ π₀ exp(Q/β). Off, π₀ is uniform (the paper).
    With --proposer langevin and the like, it decides which windows come into the buffer."""
    static_score: Literal["dsir", "classifier", "embedding", "perplexity", "rho", "labels"] = "dsir"
    """How target-like a window is, known without training: `dsir`, n-gram importance weights; `classifier`, a
    linear model of n-grams; `embedding`, similarity to windows of the target; `perplexity` under
    --reference-model, or `rho`, less that of the model in training; `labels`, the target's own source."""
    static_rule: Literal["posterior", "share", "quantile", "resample"] = "posterior"
    """What a static filter accepts: `posterior`, windows by the probability that they are of the target's
    kind, so that no share has to be chosen; `share`, the best --static-share of the stream; `quantile`, what
    scores as the target's own windows do; `resample`, a share by importance resampling (DSIR as
    published)."""
    static_share: _Selected = 0.125
    """Share of the stream that --static-rule share and resample accept."""
    static_quantile: Share = 0.2
    """Quantile of the target's own scores from which --static-rule quantile accepts a window."""
    static_sharpness: Positive = 4.0
    """Exponent of the probability with which --static-rule posterior accepts; the higher, the sharper."""
    accept_target_source: bool = False
    """Trust the label of the target's own source: its windows are accepted, and others, the most target-like
    first, only where it does not fill a step within --max-read-ratio."""
    target_passes: Annotated[float, Within("[4, 1e9]", _PASSES, ENDLESS)] = 12.0
    """Passes over the target's own source, about, at most, where its label is trusted; others' most
    target-like text fills the rest of the run. A text repeated up to four times is worth nearly as much as a
    new one; after some fifteen repetitions little of its worth is left, and a small model memorises it. 1e9
    for no limit."""
    sharp_start: CountOrZero = 0
    """Windows read at the beginning of which only the most target-like are accepted, wherever they are from:
    the fewer, the less of the stream is like the target; 0 for the rule and the label at once. Without effect
    on a pretrained model, which knows already what such text teaches."""
    static_encoder: str = "hashing"
    """Encoder of --static-score embedding: `hashing`, or a sentence-transformer by name or folder."""
    bandit_exploration: Annotated[float, Within("[0, 1]")] = 0.1
    """Exploration of the bandit (EXP3): share of the uniform distribution over sources."""
    bandit_lr: Positive = 0.05
    """Learning rate of the bandit (EXP3)."""

    def check(self) -> None:
        require_known("--selector", self.selector, SELECTORS, "curriq.selectors")
        require(
            self.selector != "rho" or bool(self.reference_model),
            f"--selector rho needs {_REFERENCE}",
        )
        by_model = self.static_score in ("perplexity", "rho") and (self.prior or self.selector == "filter")
        require(
            not by_model or bool(self.reference_model),
            f"--static-score {self.static_score} needs {_REFERENCE}",
        )
        require(
            not self.prior or self.selector == "soft-q",
            f"--prior with --selector {self.selector}: only soft-q has a prior; drop --prior.",
        )


_THREADS = "each is a thread of the system, of which other programs on the machine need some too"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The training loop: steps, candidates, rewards, seed, threads, ablations."""

    steps: Count = 300
    """Optimizer steps of the language model."""
    num_candidates: Size = 32
    """Windows proposed per step (N)."""
    max_read_ratio: Size = 1
    """Maximum number of windows read per window trained on, or per window that comes into a buffer. Above 1
    the policy filters the stream, so that rejected windows cost no forward pass: the higher its Q, the
    likelier a window is accepted, and all that are accepted weigh the same. --q-features may then be source
    and static_score only."""
    train_on: Literal["mixture", "action"] = "mixture"
    """What soft-q trains on: `mixture`, all windows, weighted by the policy (the paper); `action`, the one
    window that is drawn from the policy and credited with the reward (the single-action formulation)."""
    train_subset_size: SizeOrZero = 0
    """Train on this many windows (B), drawn from the policy without replacement after scoring; 0 for all."""
    reward: Literal["absolute", "paired"] = "absolute"
    """`absolute`: held-out log-probability after the step (the paper). `paired`: its gain over the step."""
    reward_windows: Size = 16
    """Windows of the fresh reward subset of each step that has a reward (M)."""
    reward_every: Count = 1
    """Steps between rewards. Q learns, and effects are measured, in the steps that have one."""
    seed: Seed = 0
    """Seed of every random generator of the run."""
    threads: Annotated[int, Within("[0, 1024]", above=_THREADS)] = 0
    """CPU threads of torch; 0 takes all cores, and one beside a GPU. Results are bitwise equal only at equal
    thread counts."""
    q_warmup_steps: CountOrZero = 0
    """Initial steps in which only Q learns: the mixture is uniform, and the model is reset after each."""
    reset_theta: bool = False
    """Ablation: reset the model after every step, so that only Q learns."""
    alternating_period: CountOrZero = 0
    """Steps per period; in the first and every other one, the model is reset after each step. 0 for none."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """Log and checkpoints: where, how often, how much."""

    run_dir: str = ""
    """Folder of the run; empty makes runs/SELECTOR-SEED, with a number appended if that exists."""
    eval_every: Count = 50
    """Steps between evaluations on the validation set (for downstream tasks, --eval-tasks-every)."""
    checkpoint_every: Count = 100
    """Steps between checkpoints."""
    checkpoint_keep: Size = 2
    """Checkpoints to keep; older ones are removed."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str = ""
    """Weights & Biases project; empty for none. Needs the extra [wandb]."""
    log_candidates: bool = True
    """Write ids, sources, scores and weights of all candidates as Parquet."""
    log_windows_mb: NonNegative = 200.0
    """Maximum megabytes of window tokens (4 bytes each) in the log, for the report's explorer and `curriq
    export`; 0 logs none."""
    topic_similarity_every: CountOrZero = 0
    """Steps between measurements of how similar in topic the selected windows are to the reward set, by
    --topic-encoder; 0 for none."""
    peak_tflops: NonNegative = 0.0
    """Peak of one device in the run's precision, in TFLOP/s, for perf/mfu; 0 takes that of its data
    sheet, where it is a known GPU."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """Progress display; `auto` shows the bar on a terminal and plain lines elsewhere."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Downstream tasks of lm-evaluation-harness during training (extra [eval])."""

    eval_tasks: tuple[str, ...] = ()
    """Tasks or groups by the harness's names, such as hellaswag mmlu lambada_openai wikitext. It downloads
    their data, or reads what a local task file names."""
    eval_tasks_every: CountOrZero = 0
    """Steps between evaluations of the tasks; 0 evaluates them after the last step only."""
    eval_tasks_limit: CountOrZero = 100
    """Examples per task, the first ones; 0 for all."""
    eval_tasks_fewshot: Annotated[int, Within("[-1, 1e6]", above=IN_MEMORY)] = -1
    """Few-shot examples in each prompt; -1 takes the task's own number."""
    eval_tasks_path: str = ""
    """Folder of your own task files (YAML); empty for none."""

    def check(self) -> None:
        require(
            all(self.eval_tasks) and len(set(self.eval_tasks)) == len(self.eval_tasks),
            f"--eval-tasks {' '.join(self.eval_tasks)}: give every task once, by its name.",
        )
