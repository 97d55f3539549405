"""Independent oracles, from the papers' formulas: mpmath with 50 digits, or float64 in probability space.

Nothing here is imported from the library. The library works in log space; these work with ``g(z)`` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import mpmath
import torch
from mpmath import mpf
from torch import Tensor

mpmath.mp.dps = 50

FORMULAS: dict[str, Callable[[mpf], mpf]] = {
    "softmax": lambda z: mpmath.exp(z),
    "sigsoftmax": lambda z: mpmath.exp(z) / (1 + mpmath.exp(-z)),
    "sigmoid": lambda z: 1 / (1 + mpmath.exp(-z)),
    "relu": lambda z: max(z, mpf(0)) + mpf(1e-8),
}
"""``g(z)`` of the activations that the paper compares (Kanai et al. 2018)."""

# What tells one activation from another. A new one needs no entry unless it belongs here.
KEEP_EVERY_TOKEN_POSSIBLE = {"relu"}  # g(-inf) > 0, so -inf is no mask
LINEAR_IN_LOG_SPACE = {"softmax"}  # so the rank of the log-probabilities is capped


def log_probabilities(logits: Iterable[float], g: Callable[[mpf], mpf]) -> list[mpf]:
    """``log(g(z_i) / sum_m g(z_m))`` of one row, to 50 digits."""
    scores = [g(mpf(float(z))) for z in logits]
    total = mpmath.fsum(scores)
    return [mpmath.log(score / total) for score in scores]


def error(actual: Tensor, logits: Tensor, g: Callable[[mpf], mpf]) -> float:
    """The largest error of log-probabilities (N, V), in units of ``eps * max(|exact|, 1)`` of their dtype."""
    eps = torch.finfo(actual.dtype).eps
    return max(
        float(abs(mpf(value) - exact) / (eps * max(abs(exact), 1)))
        for values, row in zip(actual.tolist(), logits.tolist(), strict=True)
        for value, exact in zip(values, log_probabilities(row, g), strict=True)
    )


def probabilities(logits: Tensor, log_g: Callable[[Tensor], Tensor]) -> Tensor:
    """``g(z) / sum g(z)`` over the last dimension, in float64; for logits of moderate size."""
    g = log_g(logits.double()).exp()
    return g / g.sum(-1, keepdim=True)


def mixture(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    prior: Tensor,
    projections: Iterable[tuple[Tensor, Tensor]],
    log_g: Callable[[Tensor], Tensor],
) -> Tensor:
    """``sum_k pi_k g(z_k) / sum g(z_k)`` (N, V) of hidden (N, d), with ``z_k = W tanh(U_k h + c_k) + b``, in float64.

    ``prior`` is (K, d) and ``projections`` are the K pairs ``(U_k, c_k)`` of shapes (d, d) and (d,).
    """
    hidden, weight, bias = hidden.double(), weight.double(), bias.double()
    odds = (hidden @ prior.double().T).exp()
    total = hidden.new_zeros(len(hidden), len(weight))
    for k, (u, c) in enumerate(projections):
        expert = torch.tanh(hidden @ u.double().T + c.double())
        share = (odds[:, k] / odds.sum(-1)).unsqueeze(-1)
        total += share * probabilities(expert @ weight.T + bias, log_g)
    return total


def sigsoftmax_jacobian(logits: Tensor) -> Tensor:
    """``d log f_i / d z_j = (delta_ij - f_j) (2 - sigmoid(z_j))`` of one row (V,), as (V, V)."""
    sigmoid = 1 / (1 + torch.exp(-logits))
    f = torch.exp(logits) * sigmoid
    f = f / f.sum()
    return (torch.eye(len(logits), dtype=logits.dtype) - f) * (2 - sigmoid)


def press_rank(matrix: Tensor) -> int:
    """Numerical rank with the threshold of Press et al. (2007), as the papers count independent log-outputs."""
    values = torch.linalg.svdvals(matrix.detach())
    threshold = 0.5 * math.sqrt(sum(matrix.shape) + 1) * float(values[0]) * torch.finfo(matrix.dtype).eps
    return int((values > threshold).sum())
