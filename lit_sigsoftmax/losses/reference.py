"""The plain loss: logits held whole, derivatives of any order by autograd. Every other backend is tested against it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_sigsoftmax.activations import Activation, widen
from lit_sigsoftmax.losses.reduction import mix, reduce

__all__ = ["reference"]


def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    log_g: Activation,
    *,
    ignore_index: int,
    reduction: Literal["mean", "sum", "none"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    log_prior: Tensor | None = None,
) -> Tensor:
    """Return the loss in nats; see :class:`lit_sigsoftmax.losses.Backend`."""
    scores = log_g(widen(F.linear(hidden, weight, bias)))
    if log_prior is not None:
        experts = target.unsqueeze(-1).expand(log_prior.shape)
        expert_nll = F.cross_entropy(scores.movedim(-1, 1), experts, ignore_index=ignore_index, reduction="none")
        nll = mix(log_prior, expert_nll).masked_fill(target == ignore_index, 0.0)
        return reduce(nll, target, ignore_index, reduction)
    nll = F.cross_entropy(scores, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        penalty = z_loss * torch.logsumexp(scores, dim=-1).square()
        nll = nll + penalty.masked_fill(target == ignore_index, 0.0)
    return reduce(nll, target, ignore_index, reduction)
