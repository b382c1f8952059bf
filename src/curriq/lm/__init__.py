"""θ: the language model, its single-pass mixture step, and the held-out reward."""
