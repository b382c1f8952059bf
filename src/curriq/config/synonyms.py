"""Names that other training programs give to our settings, for "did you mean": none of them is accepted."""

from collections.abc import Iterable

_RENAMED = {
    "num_candidates": (
        *("batch_size", "train_batch_size", "per_device_train_batch_size", "per_gpu_train_batch_size"),
        *("global_batch_size", "micro_batch_size_per_gpu", "bs"),
    ),
    "micro_batch": ("gradient_accumulation_steps", "grad_accum", "accumulate_grad_batches"),
    "lm_lr": ("lr", "learning_rate", "lm_learning_rate", "max_lr", "peak_lr"),
    "lr_schedule": ("lr_scheduler", "lr_scheduler_type", "scheduler"),
    "lr_warmup_steps": ("warmup", "warmup_steps", "warmup_ratio", "num_warmup_steps", "warmup_iters"),
    "grad_clip": ("max_grad_norm", "gradient_clipping", "clip_grad_norm", "gradient_clip_val"),
    "steps": (
        *("max_steps", "num_steps", "train_steps", "max_train_steps", "training_steps", "iterations"),
        *("max_iters", "iters", "epochs", "num_epochs", "num_train_epochs", "max_epochs"),
    ),
    "sources": (
        *("data", "dataset", "datasets", "dataset_name", "dataset_path", "data_path", "data_dir"),
        *("train_file", "train_data", "train_dataset", "corpus", "files", "text_column"),
        *("dataset_text_field", "text_field", "dataset_config_name"),
    ),
    "target": ("validation_file", "eval_dataset", "eval_data", "validation_data", "valid_data", "val_file"),
    "model": (
        *("model_name_or_path", "model_name", "model_path", "pretrained_model_name_or_path", "base_model"),
        *("checkpoint", "config_name"),
    ),
    "tokenizer": ("tokenizer_name", "tokenizer_path", "tokenizer_name_or_path"),
    "window": (
        *("max_length", "max_len", "max_seq_length", "max_seq_len", "seq_len", "seq_length"),
        *("sequence_length", "block_size", "context_length", "context_size", "ctx_len", "n_ctx"),
    ),
    "run_dir": ("output_dir", "out_dir", "out", "output", "save_dir", "logging_dir", "log_dir", "workdir"),
    "eval_every": ("eval_steps", "eval_interval", "evaluation_interval", "val_check_interval"),
    "checkpoint_every": ("save_steps", "save_interval", "save_every", "checkpoint_interval"),
    "checkpoint_keep": ("save_total_limit", "max_checkpoints"),
    "precision": ("bf16", "fp16", "fp32", "dtype", "torch_dtype", "mixed_precision", "amp"),
    "lora_rank": ("lora_r", "lora_dim", "use_peft", "lora"),
    "lora_targets": ("lora_target_modules", "target_modules"),
    "wandb": ("report_to", "wandb_project", "project"),
    "seed": ("random_seed", "data_seed"),
    "threads": ("num_workers", "num_threads", "dataloader_num_workers", "cpus"),
    "adam_beta2": ("betas", "adam_betas"),
    "validation_set_size": ("eval_batches", "max_eval_samples", "eval_iters", "validation_split"),
    "selector": ("method", "algorithm", "strategy"),
    "max_read_ratio": ("oversampling", "candidate_ratio", "super_batch_factor"),
    "device": ("gpu", "gpus", "devices", "cuda", "no_cuda", "use_cpu"),
}
MEANINGS = {
    "num_candidates": "windows per step; --micro-batch is how many are forwarded at once",
    "micro_batch": "windows per forward pass; the gradient is that of the whole step whatever its value",
    "lm_lr": "peak learning rate of the language model",
    "lr_schedule": "cosine, linear or constant",
    "lr_warmup_steps": "steps, not a share",
    "grad_clip": "maximum gradient norm",
    "steps": "optimizer steps; the log counts epochs",
    "sources": "one word per source, name=web,path=data/*.jsonl[,text_field=…]",
    "target": "name of the source whose held-out documents losses are measured on",
    "model": "hub name, folder, or random:ARCHITECTURE to start from scratch",
    "tokenizer": "hub name, folder, train or auto",
    "window": "tokens per training example",
    "run_dir": "folder of log, summary and checkpoints",
    "eval_every": "steps between validations",
    "checkpoint_every": "steps between checkpoints",
    "checkpoint_keep": "how many checkpoints stay",
    "precision": "fp32 or bf16",
    "lora_rank": "rank of the adapters; 0 for none",
    "lora_targets": "layers that get adapters",
    "wandb": "project of Weights & Biases",
    "seed": "of training; --split-seed is that of the held-out split",
    "threads": "of torch on the CPU",
    "adam_beta2": "β₂; β₁ is 0.9",
    "validation_set_size": "windows of the validation set",
    "selector": "what selects the training data",
    "max_read_ratio": "windows read per window trained on",
    "device": "auto, cpu or cuda",
}
"""Our name of a setting → what it is, in a few words."""
SOURCE_KEYS = {
    **dict.fromkeys(("file", "files", "data_files", "dataset", "name_or_path", "url", "folder"), "path"),
    **dict.fromkeys(("column", "text_column", "content", "dataset_text_field", "messages"), "text_field"),
    **dict.fromkeys(("probability", "proportion", "ratio", "share", "sampling_weight"), "weight"),
    **{
        "split": "hub_split",
        "revision": "hub_revision",
        "difficulty": "difficulty_field",
        "noise": "corruption",
    },
}
"""Another name of a source's key → ours."""
OURS = {theirs: ours for ours, names in _RENAMED.items() for theirs in names}
"""Another program's name of a setting → ours."""


def synonym(name: str, known: Iterable[str]) -> tuple[str, str] | None:
    """The one of the known names that another program's name stands for, and what it means; None without one.

    All may be flags or fields: `--batch-size`, `batch_size`.
    """
    ours = OURS.get(plain(name))
    found = next((candidate for candidate in known if ours is not None and plain(candidate) == ours), None)
    return None if ours is None or found is None else (found, MEANINGS[ours])


def plain(name: str) -> str:
    """The flat name of a setting that is written as a flag: `--q-lr` → `q_lr`."""
    return name.lstrip("-").replace("-", "_").lower()
