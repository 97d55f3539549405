"""Perplexity from sums, never from a mean of means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["NegativeLogLikelihood"]


class NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood in nats per token; its exponential is the perplexity.

    Two sums, of nats in float64 (float32 on Apple's GPUs, which have no other) and of tokens, so that batches of any
    size and processes of any number give the same value. (torchmetrics' Perplexity applies softmax itself, which no
    other output layer can use.)

    Example:
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(torch.tensor([1.0, 2.0]), 2)
        >>> metric.update(torch.tensor([6.0]), 1)
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor | int) -> None:
        """Add token losses.

        Args:
            nll: Nats of each token, any shape, zero where a target is ignored.
            tokens: The number of targets that count.
        """
        self.nats += nll.to(self.nats.dtype).sum()
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Return nats per token, a float64 scalar; NaN before the first token."""
        return self.nats / self.tokens

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> NegativeLogLikelihood:
        # The sums follow the model to its device, but never to its precision: in bfloat16 they would stand still.
        def move(state: Tensor) -> Tensor:
            device = fn(torch.zeros((), device=state.device)).device
            lacks_float64 = device.type == "mps" and state.dtype == torch.float64
            return state.to(device, torch.float32) if lacks_float64 else state.to(device)

        super()._apply(move, *args, **kwargs)
        return self
