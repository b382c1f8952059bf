"""The settings of each component: their defaults, their help texts and their bounds."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from curriq.config.checks import (
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
    Section,
    Share,
    Within,
    require,
    require_known,
)

SELECTORS = (
    *("soft-q", "uniform", "random-single", "random-k", "high-loss", "low-loss", "uncertainty"),
    *("competence", "rho", "bandit"),
)
"""The built-in selectors."""
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
    """`embedded:prose`, `embedded:code`, a local file, folder or glob (.txt .jsonl .json .csv .parquet, also
    .gz and .zst), or `hub:NAME[:CONFIG]` for a hub data set. `${NAME}` stands for an environment variable,
    `${NAME:-DEFAULT}` for one with a default."""
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
    """Noise that is added to the documents before they are packed."""

    def __post_init__(self) -> None:
        require(bool(self.name), "a source needs a name: write name=NAME,path=PATH.")
        require(bool(self.path), f"source {self.name!r} needs a path: write name={self.name},path=PATH.")
        require(
            0 <= self.weight < float("inf"),
            f"source {self.name!r}: weight = {self.weight}: it must be a finite number of at least 0; "
            "0 keeps the source out of the stream.",
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
    """The stream of candidate windows and the three held-out sets."""

    sources: tuple[SourceConfig, ...] = EMBEDDED_SOURCES
    """Sources of the stream, each as name=…,path=…[,weight=…][,corruption=…]."""
    target: str = "prose"
    """Source to get better at: its held-out documents are the reward, validation and test sets."""
    window: Annotated[int, Within("[2, inf)")] = 128
    """T: tokens per window."""
    shuffle_buffer: Count = 1024
    """Windows in the shuffle buffer; 1 keeps the order of the sources."""
    held_out_share: Annotated[float, Within("(0, 1)")] = 0.25
    """Share of the target's documents, chosen by document hash, that never enter the stream."""
    reward_set_size: Count = 128
    """|D|: windows of the reward set."""
    validation_set_size: Count = 64
    """Windows of the validation set."""
    test_set_size: Count = 128
    """Windows of the test set."""
    near_duplicate_threshold: Fraction = 0.6
    """Jaccard similarity of word 5-shingles from which two documents are on the same side of the held-out
    split; 1 compares exact copies only."""
    topic_coherent: bool = False
    """Draw the held-out windows around a random anchor window by embedding similarity."""
    topic_pool_size: Count = 4096
    """Windows that are embedded to choose the topic-coherent sets from."""
    topic_temperature: Positive = 0.1
    """Softmax temperature over cosine similarity to the anchor; the lower, the narrower the topic."""
    topic_encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence-transformer by name or folder, or `hashing` for a fast one without weights."""
    curriculum: str = ""
    """Recorded curriculum to train on, a Parquet file of `curriq export`: its windows, order and weights
    replace the stream and the selector."""
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


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """Which tokenizer turns text into tokens."""

    tokenizer: str = "auto"
    """`train` (byte-level BPE trained on the clean sources and cached), a folder, a hub name, or `auto`: the
    model's own if the model is pretrained, otherwise `train`."""
    vocab_size: Annotated[int, Within("[257, inf)", " for byte-level BPE (256 bytes and EOS)")] = 2048
    """V of a tokenizer trained here."""
    tokenizer_sample_bytes: Count = 4_000_000
    """Bytes of UTF-8 text to train a tokenizer on."""


# Llama, because a GPT-2 of this size with tied embeddings spends most of a short run on the plateau where it
# knows token frequencies only (experiments/LOG.md).
DEFAULT_MODEL = "random:llama:hidden_size=128,intermediate_size=344,num_hidden_layers=3,num_attention_heads=4"


@dataclass(frozen=True, kw_only=True)
class LMConfig(Section):
    """θ: any Hugging Face causal language model."""

    model: str = DEFAULT_MODEL
    """Hub name or folder of a pretrained model; or, to train from scratch, random:WHAT[:KEY=VALUE,...], where
    WHAT is an architecture (gpt2, llama, gpt_neox, qwen2, opt, ...), a folder or a hub name."""
    dropout: Share = 0.0
    """Dropout rate everywhere in the model. Above 0, a step scores without dropout in a pass of its own."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward and backward pass in bfloat16 autocast; weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    device: str = "auto"
    """`auto` takes a GPU if there is one; otherwise a torch device such as cpu or cuda:0."""
    lora_rank: CountOrZero = 0
    """Rank of LoRA adapters, which alone are then trained and saved, as PEFT does; 0 trains all weights.
    Needs the extra [peft]."""
    lora_alpha: Count = 16
    """Scale of the adapters' output: they are multiplied by α/rank."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Layers that get adapters, by the end of their names (q_proj v_proj); `all-linear` is all but the
    head."""
    lora_dropout: Share = 0.0
    """Dropout on the adapters' input."""

    def check(self) -> None:
        require(bool(self.model), "--model is empty: give a hub name, a folder or random:ARCHITECTURE.")
        require(bool(self.lora_targets), "--lora-targets is empty: name layers, or use all-linear.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """AdamW for θ, and how a step is split into micro-batches."""

    lm_lr: Positive = 2e-3
    """α: peak learning rate of θ."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay from the peak to zero, which it would reach one step after the last, or no decay (`constant`)."""
    lr_warmup_steps: CountOrZero = 20
    """Steps of linear warm-up to the peak."""
    weight_decay: NonNegative = 0.01
    """AdamW's decoupled weight decay."""
    adam_beta2: Annotated[float, Within("(0, 1)")] = 0.999
    """AdamW's second-moment decay; the first-moment decay is 0.9."""
    grad_clip: Positive = 1.0
    """Maximum global gradient norm of θ."""
    micro_batch: Count = 8
    """Windows per forward and backward pass. Changes memory and speed, never the gradient."""
    head_chunk_tokens: Count = 512
    """Tokens whose logits are in memory at once, at least one window's."""


@dataclass(frozen=True, kw_only=True)
class SelectConfig(Section):
    """The selector, and the settings of the baselines."""

    selector: str = "soft-q"
    """What weighs the candidates: `soft-q`, the paper's method; a baseline (`uniform`, `random-single`,
    `random-k`, `high-loss`, `low-loss`, `uncertainty`, `competence`, `rho`, `bandit`); or your own,
    `package.module:function` or `path/to/file.py:function`, which builds a `curriq.select.base.Method`."""
    selector_temperature: Positive = 0.5
    """Temperature of high-loss, low-loss, uncertainty and rho, in nats per token; low takes the extreme."""
    random_k: Count = 8
    """Windows that random-k trains on per step."""
    competence_initial: Fraction = 0.1
    """c0: share of the difficulty range that competence opens at step 0."""
    competence_steps: CountOrZero = 0
    """Step from which the whole range is open; 0 takes half of --steps."""
    difficulty: Literal["auto", "label", "length", "rarity"] = "auto"
    """What competence sorts by: a label, characters per window, or mean unigram rarity; `auto` takes the
    label if there is one, otherwise rarity."""
    reference_model: str = ""
    """Folder or hub name of the reference model whose loss rho subtracts."""
    bandit_exploration: Annotated[float, Within("[0, 1]")] = 0.1
    """EXP3's exploration: share of the uniform distribution over sources."""
    bandit_lr: Positive = 0.05
    """EXP3's learning rate."""

    def check(self) -> None:
        require_known("--selector", self.selector, SELECTORS, "curriq.selectors")
        require(
            self.selector != "rho" or bool(self.reference_model),
            "--selector rho needs --reference-model, a folder or hub name of a model of the target text; "
            "`curriq train --preset reference` trains one.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The loop: how long, how many candidates, which seed."""

    steps: Count = 300
    """Optimiser steps."""
    num_candidates: Count = 32
    """N: windows proposed per step."""
    max_read_ratio: Count = 1
    """Maximum number of windows read per window trained on. Above 1, the policy is a stream filter, applied
    before the forward pass: it accepts windows with a probability that grows with their Q, and accepted
    windows weigh the same. --q-features may then be source and dsir_score only."""
    train_subset_size: CountOrZero = 0
    """B: train on B windows, drawn from the policy without replacement after a scoring pass; 0 trains on
    all."""
    reward: Literal["absolute", "paired"] = "absolute"
    """`absolute`: held-out log-probability after the step (the paper). `paired`: its gain over the step."""
    reward_windows: Count = 16
    """M: windows of the fresh reward subset of each step that has a reward."""
    reward_every: Count = 1
    """Steps between rewards. Q learns, and effects are measured, in the steps that have one."""
    seed: CountOrZero = 0
    """Seed of every random generator of the run."""
    threads: CountOrZero = 0
    """CPU threads of torch; 0 takes all cores. Results are bitwise equal only at equal thread counts."""
    q_warmup_steps: CountOrZero = 0
    """Initial steps with a uniform mixture and θ reset after each, so that only Q learns."""
    reset_theta: bool = False
    """Ablation: reset θ after every step, so that only Q learns."""
    alternating_period: CountOrZero = 0
    """Alternate periods of this many steps, with θ reset after each step and without; 0 never resets."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """Where the run writes, how often it evaluates and saves."""

    run_dir: str = ""
    """Folder of the run; empty makes runs/SELECTOR-SEED, with a number appended if that exists."""
    eval_every: Count = 50
    """Steps between evaluations on the validation set (for downstream tasks, --eval-tasks-every)."""
    checkpoint_every: Count = 100
    """Steps between checkpoints."""
    checkpoint_keep: Count = 2
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
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """Progress display; `auto` shows the bar on a terminal and plain lines elsewhere."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Tasks of lm-evaluation-harness during training (extra [eval])."""

    eval_tasks: tuple[str, ...] = ()
    """Tasks or groups by the harness's names, such as hellaswag mmlu lambada_openai wikitext. It downloads
    their data, or reads what a local task file names."""
    eval_tasks_every: CountOrZero = 0
    """Steps between evaluations of the tasks; 0 evaluates them after the last step only."""
    eval_tasks_limit: CountOrZero = 100
    """Examples per task, the first ones; 0 for all."""
    eval_tasks_fewshot: Annotated[int, Within("[-1, inf)")] = -1
    """Few-shot examples in each prompt; -1 takes the task's own number."""
    eval_tasks_path: str = ""
    """Folder of your own task files (YAML); empty for none."""

    def check(self) -> None:
        require(
            all(self.eval_tasks) and len(set(self.eval_tasks)) == len(self.eval_tasks),
            f"--eval-tasks {' '.join(self.eval_tasks)}: give every task once, by its name.",
        )
