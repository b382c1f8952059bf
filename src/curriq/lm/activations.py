"""The same activation function in one kernel."""

from torch import nn


def fuse_activations(network: nn.Module) -> None:
    """Replace GPT-2's GELU by PyTorch's, in place.

    `NewGELUActivation` writes out x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))) in eight elementwise operations,
    most of which keep a tensor of the feed-forward layer's width for the backward pass. That is much of the
    memory of a pass. `nn.GELU(approximate="tanh")` is the same formula in one kernel. The modules have no
    weights, so checkpoints and the configuration stay as they are.
    """
    from transformers.activations import NewGELUActivation

    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))
