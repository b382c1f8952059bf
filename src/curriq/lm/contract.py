"""What a language model has beside what curriq trains: parameters that no text reaches, a loss of its own."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from curriq.lm.engine import OneProcess
from curriq.types import IGNORED, Windows

if TYPE_CHECKING:
    from curriq.lm.model import LanguageModel

logger = logging.getLogger("curriq")

TOLERANCE = 1e-3
"""Relative difference of two losses that rounding explains."""


def train_what_text_reaches(lm: "LanguageModel") -> None:
    """Take parameters that no text reaches out of training, see `freeze_unreached`."""
    lm.network.eval()  # gradient checkpointing, which hides the graph, works in training mode alone
    with torch.enable_grad():
        tokens = torch.zeros((1, 2), dtype=torch.long, device=lm.device)
        freeze_unreached(lm.network, lm.head(lm.trunk(tokens)))
    lm.network.train()
    lm.engine = OneProcess(lm.network)  # of what is left to train


def freeze_unreached(network: nn.Module, output: Tensor) -> None:
    """Take what no text can reach, such as a vision tower, out of training: without a gradient it would only
    decay. An expert that these tokens are not routed to stays.

    Args:
        output: what the network makes of some text, with its graph.
    """
    reached = _reached(output)
    for name, part in _unreached("", network, reached):
        parameters = [p for p in part if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        if parameters:
            count = sum(p.numel() for p in parameters)
            logger.info(f"no text reaches {name}: its {count:,} parameters are not trained.")


def _reached(output: Tensor) -> set[int]:
    """Identities of the parameters in the graph of a tensor; nothing is computed."""
    found, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.add(id(node.variable))
            waiting += [before for before, _ in node.next_functions]
    return found


def _unreached(name: str, module: nn.Module, reached: set[int]) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """The largest parts of a module of which nothing is reached, with their parameters."""
    own = [(key, p) for key, p in module.named_parameters(recurse=False) if id(p) not in reached]
    yield from ((f"{name}.{key}".strip("."), [p]) for key, p in own)
    for key, child in module.named_children():
        parameters = list(child.parameters())
        if any(id(p) in reached for p in parameters):
            yield from _unreached(f"{name}.{key}".strip("."), child, reached)
        elif not isinstance(module, nn.ModuleList | nn.ModuleDict):  # a list has experts, or layers
            yield f"{name}.{key}".strip("."), parameters


def log_own_loss(lm: "LanguageModel", windows: Windows) -> None:
    """Compare the loss that curriq trains on with the model's own on the same windows, and say so where it
    adds something, such as the auxiliary loss of a router."""
    labels = windows.tokens if windows.labels is None else windows.labels
    counts = (labels[:, 1:] != IGNORED).sum(1).double()
    with lm.full_precision():
        losses = lm.window_losses(windows).cpu().double()
    ours = (losses * counts).sum().item() / max(1.0, counts.sum().item())
    tokens, targets = windows.tokens.to(lm.device), labels.to(lm.device)
    try:
        with lm.measuring(), lm.full_precision():
            result = lm.network(input_ids=tokens, labels=targets, use_cache=False)
        own = float(result["loss"])
    except Exception as error:  # a model without labels
        logger.info(f"the model has no loss of its own to compare with ({type(error).__name__}).")
        return
    if abs(own - ours) <= TOLERANCE * max(1.0, abs(ours)):
        logger.info(
            f"the model's own loss on {len(windows)} windows is that of curriq, {ours:.4f} nats per token."
        )
        return
    others = {key: value for key, value in result.items() if key.endswith("_loss") and value is not None}
    parts = [f"{key} = {float(value):.4g}" for key, value in others.items()]
    logger.warning(
        f"the model's own loss on {len(windows)} windows is {own:.4f}, that of curriq {ours:.4f} nats per "
        "token: curriq trains on the cross-entropy of the next token alone and leaves out what the model "
        f"adds ({', '.join(parts) or 'its outputs do not say what'})."
    )
