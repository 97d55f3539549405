"""From the losses of tokens to one number, and from the losses of experts to those of tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["mix", "reduce"]


def reduce(nll: Tensor, target: Tensor, ignore_index: int, reduction: Literal["mean", "sum", "none"]) -> Tensor:
    """Return the sum of the losses, their mean over the targets that count, or the losses themselves."""
    if reduction == "none":
        return nll
    total = nll.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


def mix(log_prior: Tensor, expert_nll: Tensor) -> Tensor:
    """Return the loss of a mixture, shape (N,), from log-priors and losses of its experts, shape (N, K) each."""
    return -torch.logsumexp(log_prior - expert_nll, dim=-1)
