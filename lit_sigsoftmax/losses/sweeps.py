"""The loss in bfloat16 by two sweeps over the vocabulary, for processors with matrix units for it.

Chunks of tokens need the whole weight in bfloat16, which alone may be more than an eighth of the logits. Here the
vocabulary is outermost: a band of the weight is rounded when its turn comes, and forgotten. The sums of g run over the
whole vocabulary, so the logits are made twice, first for these and then for the derivatives: four products instead of
three. But they, and the pass between them, compiled or not, are in the cache, and where such products are quick that
counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_sigsoftmax.losses import closed_forms, compiled
from lit_sigsoftmax.losses.gemm import bfloat16_pays, linear

__all__ = ["ROWS", "losses_and_gradients", "serves"]

ROWS = 2048
"""That :func:`losses_and_gradients` should be given at a time, at the most."""

_SHARE = 20  # A band has this part of the vocabulary, ...
_LEAST = 7 * 2**16  # or so many logits, where there are few rows, ...
_OF_SIZE = 1.25  # or this times the hidden size, beside which the sum of hidden's gradient costs little, ...
_MOST = 2**22  # but no more logits.


def serves(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether :func:`losses_and_gradients` takes this weight, and products of this dtype."""
    return weight.is_cpu and dtype == torch.bfloat16 and bfloat16_pays()


def losses_and_gradients(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bands: closed_forms.Bands | compiled.Bands,
    weigh: Callable[[Tensor], tuple[Tensor, Tensor]],
    gradients: Sequence[Tensor | None],
) -> Tensor | None:
    """Return the losses of tokens, and add to the gradients of their weighted sum.

    Args:
        rows: Hidden vectors of tokens, or of the experts of each, shape (n, d).
        weight: Shape (V, d).
        bias: Shape (V,), or None.
        bands: What takes their logits, and knows their targets.
        weigh: From the losses of rows, (n,), to those of tokens and the weights of rows, both float32.
        gradients: Of rows, weight and bias, float32; None where not wanted.

    Returns:
        None, with nothing added, where ``bands`` has no losses.
    """
    rows = rows.to(torch.bfloat16)
    steps = range(0, len(weight), _types(len(rows), rows.shape[1], len(weight)))

    def band(first: int) -> tuple[Tensor, Tensor]:
        part = weight[first : first + steps.step].to(torch.bfloat16)
        of_part = None if bias is None else bias[first : first + steps.step].to(torch.bfloat16)
        return part, linear(rows, part, of_part)

    for first in steps:
        part, logits = band(first)
        bands.add(logits, first)
    losses = bands.losses()
    if losses is None:
        return None
    nll, row_weight = weigh(losses)
    of_rows, of_weight, of_bias = gradients
    for first in reversed(steps) if any(gradient is not None for gradient in gradients) else ():
        if first != steps[-1]:  # the last band is still there
            part, logits = band(first)
        bands.differentiate(logits, first, row_weight)
        types = slice(first, first + len(part))
        if of_rows is not None:
            of_rows.add_(logits @ part)
        if of_weight is not None:
            of_weight[types] += logits.t() @ rows
        if of_bias is not None:
            of_bias[types] += logits.sum(0, dtype=torch.float32)
    return nll


def _types(rows: int, size: int, vocab_size: int) -> int:
    """Of a band."""
    types = min(max(vocab_size / _SHARE, _LEAST / rows, _OF_SIZE * size), _MOST / rows)
    return math.ceil(types / 32) * 32
