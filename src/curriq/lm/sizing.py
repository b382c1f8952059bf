"""How many windows go through the model at once: as many as fit into the memory."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from curriq import parallel
from curriq.errors import CurriqError
from curriq.lm.engine import local
from curriq.lm.model import LanguageModel
from curriq.types import Windows

Result = TypeVar("Result")
logger = logging.getLogger("curriq")

MARGIN = 0.85
"""Share of the memory that is free which the passes may take; the rest is for what fragments it."""
OPTIMIZER_COPIES = 5
"""Copies of θ that a step needs beside θ and its gradient: two moments and, in a probe, three more."""


def even(windows: int, most: int) -> int:
    """Windows per pass, at most so many, so that all passes over the windows are nearly equally full."""
    passes = -(-windows // max(1, most))
    return -(-windows // max(1, passes))


def fitting_micro_batch(lm: LanguageModel, windows: Windows, passes: Callable[[Windows], object]) -> int:
    """Windows per forward and backward pass that fit into the GPU's memory, the same on all ranks: from what
    `passes`, which runs some windows at once, takes for one window per rank and for two.
    """
    here = max(1, -(-len(windows) // parallel.world_size()))
    if here == 1:
        return 1
    all_ranks = parallel.world_size()
    one, two = (_peak(lm, lambda n=n: passes(windows.take(slice(n * all_ranks)))) for n in (1, 2))
    unused = torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(lm.device)
    free = torch.cuda.mem_get_info(lm.device)[0] + unused
    weights = sum(local(p).numel() * p.element_size() for p in lm.parameters)
    room = MARGIN * free - OPTIMIZER_COPIES * weights - (one - (two - one))
    most = int(room / max(1, two - one))
    found = -int(parallel.reduce_max(-float(max(1, min(most, here)))))
    return even(here, found)


def _peak(lm: LanguageModel, work: Callable[[], object]) -> int:
    """Bytes that some work takes on the GPU at most, beside what is there before."""
    before = torch.cuda.memory_allocated(lm.device)
    torch.cuda.reset_peak_memory_stats(lm.device)
    work()
    return torch.cuda.max_memory_allocated(lm.device) - before


def backing_off(lm: LanguageModel, work: Callable[[], Result]) -> Result:
    """What `work` returns, run again with half the windows per pass when it runs out of the GPU's memory.

    Raises:
        CurriqError: one window at a time does not fit, or there are several processes, which would have to
            agree on the new size in the middle of a pass.
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            size = lm.pieces.micro_batch
            if size == 1 or parallel.world_size() > 1:
                raise CurriqError(
                    f"the GPU has too little memory for {size} windows at once ({_first_line(error)}): "
                    + ("lower --micro-batch." if size > 1 else "try --gradient-checkpointing, or --window.")
                ) from error
        # Here the error is gone, and with it the frames that held the tensors of the pass.
        lm.pieces = lm.pieces._replace(micro_batch=size // 2)
        gc.collect()
        torch.cuda.empty_cache()
        logger.warning(f"the GPU ran out of memory with {size} windows per pass: on with {size // 2}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().split(". ", maxsplit=1)[0]
