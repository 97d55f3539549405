"""What the losses share: which targets they take, how experts become tokens, and tokens one number."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["check_targets", "mix", "reduce"]


def check_targets(target: Tensor, vocab_size: int) -> None:
    """Refuse token ids that there are not.

    Raises:
        IndexError: A target is negative, or not below the vocabulary's size.
    """
    if target.numel():
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise IndexError(f"target {wrong} is out of bounds for a vocabulary of {vocab_size}")


def reduce(nll: Tensor, target: Tensor, ignore_index: int, reduction: Literal["mean", "sum", "none"]) -> Tensor:
    """Return the sum of the losses, their mean over the targets that count, or the losses themselves."""
    if reduction == "none":
        return nll
    total = nll.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


def mix(log_prior: Tensor, expert_nll: Tensor) -> Tensor:
    """Return the loss of a mixture, shape (N,), from log-priors and losses of its experts, shape (N, K) each."""
    return -torch.logsumexp(log_prior - expert_nll, dim=-1)
