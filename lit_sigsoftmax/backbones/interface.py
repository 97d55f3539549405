"""What the language model asks of a backbone."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["embedding_weight", "sizes"]


def sizes(backbone: nn.Module, vocab_size: int | None) -> tuple[int, int]:
    """Return hidden size and vocabulary size.

    Args:
        backbone: With an attribute ``hidden_size``, and ``vocab_size`` where that is not given.
        vocab_size: Number of tokens.

    Raises:
        ValueError: One of them is unknown.
    """
    name = type(backbone).__name__
    hidden_size = getattr(backbone, "hidden_size", None)
    if hidden_size is None:
        raise ValueError(f"{name} needs an attribute hidden_size, the size of the hidden vectors that it returns")
    if vocab_size is None:
        vocab_size = getattr(backbone, "vocab_size", None)
    if vocab_size is None:
        raise ValueError(f"the vocabulary size is unknown: give vocab_size, or {name} an attribute vocab_size")
    return hidden_size, vocab_size


def embedding_weight(backbone: nn.Module, shape: torch.Size) -> nn.Parameter:
    """Return the weight of ``backbone.embedding``, for the output layer to share.

    Args:
        backbone: The backbone.
        shape: What the output layer needs, (vocab_size, hidden_size).

    Raises:
        ValueError: There is none, or it has another shape.
    """
    name, weight = type(backbone).__name__, getattr(getattr(backbone, "embedding", None), "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"tie_weights needs {name}.embedding, an nn.Embedding whose weight the output layer shares: "
            "name it so, or set tie_weights to false"
        )
    if weight.shape != shape:
        raise ValueError(
            f"tied weights differ in size: {name}.embedding is {tuple(weight.shape)}, the output layer "
            f"(vocab_size, hidden_size) = {tuple(shape)}; make them equal, or set tie_weights to false"
        )
    return weight
