"""The plain loss: logits held whole, derivatives of any order by autograd. Every other backend is tested against it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from lit_sigsoftmax.activations import Activation, widen


def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    log_g: Activation,
    *,
    ignore_index: int,
    reduction: Literal["mean", "sum", "none"],
) -> Tensor:
    """Return the loss in nats; see :class:`lit_sigsoftmax.losses.Backend`."""
    scores = log_g(widen(F.linear(hidden, weight, bias)))
    return F.cross_entropy(scores, target, ignore_index=ignore_index, reduction=reduction)
