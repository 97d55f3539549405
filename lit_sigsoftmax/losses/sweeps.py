"""The loss in bfloat16 by two sweeps over the vocabulary, with a compiled pass over each band of it.

Chunks of tokens need the whole weight in bfloat16, which alone may be more than an eighth of the logits. Here the
vocabulary is outermost: a band of the weight is rounded when its turn comes, and forgotten. The sums of g run over the
whole vocabulary, so the logits are made twice, first for these and then for the derivatives: four products instead of
three, but they and what lies between them in the cache. With matrix units for bfloat16 that is the faster way too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_sigsoftmax.activations import Activation, name_of
from lit_sigsoftmax.losses import compiled
from lit_sigsoftmax.losses.gemm import linear

__all__ = ["losses_and_gradients", "serves"]

_SHARE = 20  # A band has this part of the vocabulary, ...
_LEAST = 2**18  # or so many logits, where there are few rows, ...
_OF_SIZE = 1.25  # or this times the hidden size, so that adding its part of hidden's gradient costs little, ...
_MOST = 2**22  # but no more logits ...
_LEAST_TYPES = 256  # unless it had fewer types.


def serves(weight: Tensor, dtype: torch.dtype, log_g: Activation) -> bool:
    """Whether :func:`losses_and_gradients` takes this weight, products of this dtype, and this activation."""
    return weight.is_cpu and dtype == torch.bfloat16 and compiled.serves(name_of(log_g))


def losses_and_gradients(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    log_g: Activation,
    weigh: Callable[[Tensor], tuple[Tensor, Tensor]],
    gradients: Sequence[Tensor | None],
) -> Tensor:
    """Return the losses of tokens, and add to the gradients of their weighted sum.

    Args:
        rows: Hidden vectors of tokens, or of the experts of each, shape (n, d).
        weight: Shape (V, d).
        bias: Shape (V,), or None.
        target: Shape (n,), int64, contiguous, each below V.
        log_g: The output activation.
        weigh: From the losses of rows, (n,), to those of tokens and the weights of rows, both float32.
        gradients: Of rows, weight and bias, zero, float32; None where not wanted.
    """
    rows = rows.to(torch.bfloat16)
    bands = compiled.Bands(target, str(name_of(log_g)))
    steps = range(0, len(weight), _types(len(rows), rows.shape[1], len(weight)))

    def band(first: int) -> tuple[slice, Tensor, Tensor]:
        types = slice(first, first + steps.step)
        part = weight[types].to(torch.bfloat16)
        return types, part, linear(rows, part, None if bias is None else bias[types].to(torch.bfloat16))

    for first in steps:
        bands.add(band(first)[-1], first)
    nll, row_weight = weigh(bands.losses(log_g))
    of_rows, of_weight, of_bias = gradients
    for first in steps if any(gradient is not None for gradient in gradients) else ():
        types, part, derivative = band(first)
        bands.differentiate(derivative, first, row_weight)
        if of_rows is not None:
            of_rows.add_(derivative @ part)
        if of_weight is not None:
            of_weight[types] = derivative.t() @ rows
        if of_bias is not None:
            of_bias[types] = derivative.sum(0, dtype=torch.float32)
    return nll


def _types(rows: int, size: int, vocab_size: int) -> int:
    """Of a band."""
    rows = max(1, rows)
    types = min(max(vocab_size / _SHARE, _LEAST / rows, _OF_SIZE * size), _MOST / rows)
    return max(_LEAST_TYPES, math.ceil(types / 32) * 32)
