"""How passes compute: compiled blocks, the kernel of attention, the kernels of the loss.

None of it changes what is computed, only how fast; the plain way is always there, and on a CPU it is the
default.
"""

import importlib.util
import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curriq.errors import CurriqError
from curriq.lm.linear_loss import TORCH, RowKernels

Result = TypeVar("Result")
logger = logging.getLogger("curriq")

HAS_TRITON = importlib.util.find_spec("triton") is not None
ATTENTION = {
    # The rest are there for what the first cannot take, such as a mask.
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "math": [],
}


def row_kernels(name: str, device: torch.device) -> RowKernels | None:
    """The kernels of the fused loss that `--cross-entropy` names; None for the loss by torch's own functions.

    Raises:
        CurriqError: `fused` on a GPU without triton.
    """
    if name == "torch" or (name == "auto" and not _has_kernels(device)):
        return None
    if device.type != "cuda":
        return TORCH
    if not HAS_TRITON:
        raise CurriqError(
            "--cross-entropy fused needs triton on a GPU, which is not installed: pip install triton, or use "
            "--cross-entropy torch."
        )
    from curriq.lm.linear_loss_triton import TRITON

    return TRITON


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and HAS_TRITON


def attention_kernel(name: str) -> AbstractContextManager:
    """The context that makes torch's attention use this kernel where it can."""
    return sdpa_kernel([*ATTENTION[name], SDPBackend.MATH], set_priority=True)


def compiles(name: str, device: torch.device) -> bool:
    """Whether `--compile` asks for compiled blocks on this device; `auto` does on a GPU."""
    return name == "on" or (name == "auto" and _has_kernels(device))


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a Hugging Face model."""
    kinds = getattr(network, "_no_split_modules", None) or ()
    return [module for module in network.modules() if type(module).__name__ in kinds]


class CompiledBlocks:
    """The repeated blocks of a model, compiled by torch for a few shapes of input.

    Blocks share their code, so torch compiles one of them and uses it for all: seconds to a minute per shape,
    once with gradient and once without. They are compiled inside `run` alone. Whatever runs outside (a shape
    that is rare, a search, a downstream task) runs as it is, so that no shape that occurs twice in a run
    costs another minute.

    Args:
        blocks: names and values of their weights stay.
        must: whether a failure ends the run; otherwise blocks go on uncompiled, with a warning.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, must: bool) -> None:
        self._blocks: list[tuple[nn.Module, Any]] = []
        self._must = must
        self._ready: set[tuple[bool, int]] = set()
        for block in blocks:
            block.compile(dynamic=False)
            self._blocks.append((block, block._compiled_call_impl))
            block._compiled_call_impl = None

    def run(self, work: Callable[[], Result], windows: int = 1) -> Result:
        """What a pass of so many windows through the compiled blocks returns.

        Raises:
            CurriqError: torch cannot compile them, and they `must` be compiled.
        """
        shape = torch.is_grad_enabled(), windows
        if shape in self._ready:
            with self._switched_on():
                return work()
        from torch._dynamo.exc import TorchDynamoException  # seconds, for those who compile

        began = time.perf_counter()
        try:
            with self._switched_on():
                result = work()
        except TorchDynamoException as error:
            self._give_up(error)
            return work()
        self._ready.add(shape)
        if self._blocks:
            how = "with" if torch.is_grad_enabled() else "without"
            logger.info(
                f"compiled the model's blocks for {windows} windows {how} gradient: "
                f"{time.perf_counter() - began:.0f} s"
            )
        return result

    @contextmanager
    def _switched_on(self) -> Generator[None]:
        for block, compiled in self._blocks:
            block._compiled_call_impl = compiled
        try:
            yield
        finally:
            for block, _ in self._blocks:
                block._compiled_call_impl = None

    def _give_up(self, error: Exception) -> None:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        if self._must:
            raise CurriqError(
                f"--compile on: torch cannot compile the model's blocks ({reason}). Use --compile off."
            ) from error
        logger.warning(f"the model's blocks run uncompiled, because torch cannot compile them ({reason}).")
        self._blocks = []
