"""The settings of each component: their defaults, their help texts and their bounds."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from curriq.config.checks import require, require_at_least, require_positive, require_share

SelectorName = Literal[
    "soft-q",
    "uniform",
    "random-single",
    "random-k",
    "high-loss",
    "low-loss",
    "uncertainty",
    "competence",
    "rho",
    "bandit",
]
CorruptionName = Literal["none", "random-tokens", "shuffled-tokens", "ocr", "duplicates"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One named source of documents.

    On the command line a source is one word of `key=value` pairs:
    `--sources name=web,path=data/web-*.jsonl.gz,weight=0.7 name=code,path=embedded:code,weight=0.3`.
    """

    name: str
    """Name in logs and reports."""
    path: str
    """`embedded:prose`, `embedded:code`, a local file, folder or glob
    (.txt .jsonl .json .csv .parquet, also .gz and .zst), or `hub:NAME[:CONFIG]` for a hub data set."""
    weight: float = 1.0
    """Relative share of the stream's windows; 0 keeps the source out of the stream (a pure target)."""
    text_field: str = "text"
    """Column that holds the text."""
    difficulty_field: str = ""
    """Column that holds a numeric difficulty label (higher is harder); empty for none."""
    hub_split: str = "train"
    """Split of a hub data set."""
    hub_revision: str = ""
    """Revision (branch, tag, commit) of a hub data set; empty takes the newest and pins it in the run's
    config.toml."""
    documents: Literal["file", "paragraph", "line"] = "paragraph"
    """What one document is in a .txt file."""
    corruption: CorruptionName = "none"
    """How the documents are spoiled before they are packed."""

    def __post_init__(self) -> None:
        require(bool(self.name), "a source needs a name: write name=NAME,path=PATH.")
        require(bool(self.path), f"source {self.name!r} needs a path: write name={self.name},path=PATH.")
        require(
            0 <= self.weight < math.inf,
            f"source {self.name!r}: weight = {self.weight}: it must be a finite number of at least 0; "
            "0 keeps the source out of the stream.",
        )

    @property
    def is_pinned(self) -> bool:
        """Whether `hub_revision` is a commit, which names the same data for ever."""
        return re.fullmatch("[0-9a-f]{40}", self.hub_revision) is not None


EMBEDDED_SOURCES = (
    SourceConfig(name="prose", path="embedded:prose", weight=0.2),
    SourceConfig(name="code", path="embedded:code", weight=0.3),
    SourceConfig(name="random", path="embedded:prose", weight=0.15, corruption="random-tokens"),
    SourceConfig(name="shuffled", path="embedded:prose", weight=0.15, corruption="shuffled-tokens"),
    SourceConfig(name="ocr", path="embedded:prose", weight=0.1, corruption="ocr"),
    SourceConfig(name="duplicates", path="embedded:code", weight=0.1, corruption="duplicates"),
)
"""The default stream: Python's own documentation and source, most of it off-target or spoiled."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The stream of candidate windows and the three held-out sets."""

    sources: tuple[SourceConfig, ...] = EMBEDDED_SOURCES
    """Sources of the stream, each as name=…,path=…[,weight=…][,corruption=…]."""
    target: str = "prose"
    """Name of the source whose held-out documents define reward, validation and test."""
    window: int = 128
    """T: tokens per window."""
    shuffle_buffer: int = 1024
    """Windows held in the shuffle buffer; 1 keeps the order of the sources."""
    held_out_share: float = 0.25
    """Share of the target's documents, chosen by document hash, that never enter the stream."""
    reward_set_size: int = 128
    """|D|: windows of the reward set."""
    validation_set_size: int = 64
    """Windows of the validation set."""
    test_set_size: int = 128
    """Windows of the test set."""
    near_duplicate_threshold: float = 0.6
    """Jaccard similarity of word 5-shingles from which two documents must lie on one side of the split;
    1 compares exact copies only."""
    topic_coherent: bool = False
    """Draw the held-out windows around a random anchor window by embedding similarity."""
    topic_pool_size: int = 4096
    """Windows that are embedded to choose the topic-coherent sets from."""
    topic_temperature: float = 0.1
    """Softmax temperature over cosine similarity to the anchor; low gives a tight topic."""
    topic_encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence-transformer by name or folder, or `hashing` for a quick one without weights."""
    curriculum: str = ""
    """Parquet file of `curriq export`: its windows, order and weights replace the stream and the selector."""
    curriculum_weights: bool = True
    """Replay the weights too; off keeps the windows and their order, and the selector weighs them."""

    def __post_init__(self) -> None:
        require(bool(self.sources), "--sources is empty: name at least one source, as name=…,path=….")
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        require(not repeated, f"--sources names {repeated} twice: every source needs its own name.")
        require(
            self.target in names,
            f"--target {self.target!r} is no source: choose one of {names}, or add it with weight=0.",
        )
        target = self.sources[names.index(self.target)]
        require(
            target.corruption == "none",
            f"--target {self.target!r} is spoiled by corruption={target.corruption}: the target must be clean text.",
        )
        require(
            any(source.weight > 0 for source in self.sources),
            "every source has weight 0, so the stream is empty: give one a positive weight.",
        )
        require_at_least(2, window=self.window)
        require_at_least(
            1,
            shuffle_buffer=self.shuffle_buffer,
            reward_set_size=self.reward_set_size,
            validation_set_size=self.validation_set_size,
            test_set_size=self.test_set_size,
            topic_pool_size=self.topic_pool_size,
        )
        require(
            0 < self.held_out_share < 1,
            f"--held-out-share = {self.held_out_share}: it must lie strictly between 0 and 1.",
        )
        require(
            0 < self.near_duplicate_threshold <= 1,
            f"--near-duplicate-threshold = {self.near_duplicate_threshold}: "
            "it must be greater than 0 and at most 1.",
        )
        require_positive(topic_temperature=self.topic_temperature)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer turns text into tokens."""

    tokenizer: str = "auto"
    """`train` (byte-level BPE trained on the clean sources and cached), a folder, a hub name, or `auto`:
    the model's own when the model is pretrained, otherwise `train`."""
    vocab_size: int = 2048
    """V of a tokenizer trained here."""
    tokenizer_sample_bytes: int = 4_000_000
    """Text that a tokenizer is trained on, in bytes of UTF-8."""

    def __post_init__(self) -> None:
        require(
            self.vocab_size >= 257,
            f"--vocab-size = {self.vocab_size}: byte-level BPE needs at least 257 (256 bytes and EOS).",
        )
        require_positive(tokenizer_sample_bytes=self.tokenizer_sample_bytes)


DEFAULT_MODEL = "random:llama:hidden_size=128,intermediate_size=344,num_hidden_layers=3,num_attention_heads=4"
"""Llama's shape and not GPT-2's: at this size a GPT-2 with tied embeddings spends most of a short run on the
plateau where it knows token frequencies only (experiments/LOG.md)."""


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """θ: any Hugging Face causal language model."""

    model: str = DEFAULT_MODEL
    """A hub name or folder of a pretrained model; or, to train from scratch, random:WHAT[:KEY=VALUE,...],
    where WHAT is an architecture (gpt2, llama, gpt_neox, qwen2, opt, ...), a folder or a hub name."""
    dropout: float = 0.0
    """Every dropout of the model. Above 0 the step scores without dropout first, in two passes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward and backward pass in bfloat16 autocast; weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    device: str = "auto"
    """`auto` takes a GPU when there is one; otherwise a torch device such as cpu or cuda:0."""

    def __post_init__(self) -> None:
        require(bool(self.model), "--model is empty: give a hub name, a folder or random:ARCHITECTURE.")
        require(0 <= self.dropout < 1, f"--dropout = {self.dropout}: it must lie in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW for θ and how the mixture step is cut into pieces that fit memory."""

    lm_lr: float = 2e-3
    """α: peak learning rate of θ."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay from the peak; it would reach zero one step after the last. `constant` does not decay."""
    lr_warmup_steps: int = 20
    """Steps of linear warm-up to the peak."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    adam_beta2: float = 0.999
    """AdamW's second-moment decay; the first-moment decay is 0.9."""
    grad_clip: float = 1.0
    """Greatest global gradient norm of θ."""
    micro_batch: int = 8
    """Windows per forward and backward pass. Changes memory and speed, never the gradient."""
    head_chunk_tokens: int = 512
    """Tokens whose logits are held at once; at least one window's are."""

    def __post_init__(self) -> None:
        require_positive(lm_lr=self.lm_lr, grad_clip=self.grad_clip)
        require_at_least(0, lr_warmup_steps=self.lr_warmup_steps, weight_decay=self.weight_decay)
        require(0 < self.adam_beta2 < 1, f"--adam-beta2 = {self.adam_beta2}: it must lie in (0, 1).")
        require_at_least(1, micro_batch=self.micro_batch, head_chunk_tokens=self.head_chunk_tokens)


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """How candidates are weighed: the method, or a baseline in the same loop."""

    selector: SelectorName = "soft-q"
    """The paper's method, or a baseline."""
    selector_temperature: float = 0.5
    """Temperature of high-loss, low-loss, uncertainty and rho, in nats per token; low picks the extreme."""
    random_k: int = 8
    """Windows that random-k trains on per step."""
    competence_initial: float = 0.1
    """c0 of the competence schedule: share of the difficulty range that is open at step 0."""
    competence_steps: int = 0
    """Step at which the whole range is open; 0 means half of the run."""
    difficulty: Literal["auto", "label", "length", "rarity"] = "auto"
    """What competence sorts by: a label, characters per window, or mean unigram rarity; `auto` takes the
    label when there is one, otherwise rarity."""
    reference_model: str = ""
    """Folder or hub name of the reference model that rho subtracts."""
    bandit_exploration: float = 0.1
    """EXP3's exploration: share of uniform over sources."""
    bandit_lr: float = 0.05
    """EXP3's learning rate."""

    def __post_init__(self) -> None:
        require_positive(selector_temperature=self.selector_temperature, bandit_lr=self.bandit_lr)
        require_at_least(1, random_k=self.random_k)
        require_at_least(0, competence_steps=self.competence_steps)
        require(
            0 < self.competence_initial <= 1,
            f"--competence-initial = {self.competence_initial}: it must lie in (0, 1].",
        )
        require_share(bandit_exploration=self.bandit_exploration)
        require(
            self.selector != "rho" or bool(self.reference_model),
            "--selector rho needs --reference-model, a folder or hub name of a model of the target text; "
            "`curriq train --preset reference` trains one.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how many candidates, which seed."""

    steps: int = 300
    """Optimiser steps."""
    num_candidates: int = 32
    """N: windows proposed per step."""
    max_read_ratio: int = 1
    """Windows read from the stream for each that is trained on, at the most. Above 1 the policy is spent
    before the forward pass: a window is taken with a probability that grows with its Q, and what is taken
    is weighed evenly. --target-fraction is then the share that is taken, --q-features may name only what is
    known beforehand: source and dsir_score."""
    train_subset: int = 0
    """B: train on B windows drawn from the policy without replacement, scored in a pass of their own; 0
    trains on the mixture of all."""
    reward: Literal["absolute", "paired"] = "absolute"
    """`absolute` is the held-out log-probability after the step (the paper), `paired` its gain over before
    the step on the same windows."""
    reward_windows: int = 16
    """M: windows of the fresh reward subset of each step that has a reward."""
    reward_every: int = 1
    """Steps between rewards. Q learns from the steps that have one, and effects are probed in these."""
    seed: int = 0
    """Seeds every generator of the run."""
    threads: int = 0
    """CPU threads of torch; 0 takes all cores. Results are bitwise equal only at equal thread counts."""
    q_warmup_steps: int = 0
    """First steps in which the mixture is uniform and θ is reset after each step, so that only Q learns."""
    reset_theta: bool = False
    """Ablation: reset θ after every step, so that only Q learns."""
    alternating_period: int = 0
    """If positive, alternate periods of this many steps: θ reset after each step, then regular training."""

    def __post_init__(self) -> None:
        require_at_least(
            1,
            steps=self.steps,
            num_candidates=self.num_candidates,
            reward_windows=self.reward_windows,
            reward_every=self.reward_every,
        )
        require_at_least(1, max_read_ratio=self.max_read_ratio)
        require_at_least(
            0,
            seed=self.seed,
            threads=self.threads,
            train_subset=self.train_subset,
            q_warmup_steps=self.q_warmup_steps,
            alternating_period=self.alternating_period,
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the run writes, how often it evaluates and saves."""

    run_dir: str = ""
    """Folder of the run; empty makes runs/SELECTOR-SEED, with a number where that exists."""
    eval_every: int = 50
    """Steps between evaluations on the validation set."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    checkpoint_keep: int = 2
    """Checkpoints kept; older ones are removed."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str = ""
    """Weights & Biases project; empty for none. Needs the extra [wandb]."""
    log_candidates: bool = True
    """Write ids, sources, scores and weights of all candidates as Parquet."""
    log_windows_mb: float = 200.0
    """Megabytes of windows (4 bytes per token, once per window) kept for the report's explorer and for
    `curriq export`; later windows are not kept. 0 keeps none."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """Live display; `auto` takes the bar on a terminal and plain lines elsewhere."""

    def __post_init__(self) -> None:
        require_at_least(
            1,
            eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
            checkpoint_keep=self.checkpoint_keep,
        )
        require_at_least(0, log_windows_mb=self.log_windows_mb)
