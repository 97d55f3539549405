"""The output layer as plain functions, for users of PyTorch alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_sigsoftmax.activations import Activation, ActivationSpec, get_activation, widen
from lit_sigsoftmax.losses import get_backend

__all__ = ["IGNORE_INDEX", "linear_cross_entropy", "log_normalize", "log_sigsoftmax", "sigsoftmax"]

IGNORE_INDEX = -100
"""Targets with this value are not predicted: they cost nothing and count nowhere."""


def log_normalize(logits: Tensor, log_g: Activation, dim: int = -1) -> Tensor:
    """Log-probabilities of an output activation: ``log_g(z) - logsumexp(log_g(z))``.

    Args:
        logits: Shape (..., V), any floating dtype.
        log_g: The output activation.
        dim: The dimension of the vocabulary.

    Returns:
        Shape (..., V), in nats, float32 for half-precision logits and of the logits' dtype otherwise.
    """
    return _normalize(log_g(widen(logits)), dim)


def log_sigsoftmax(logits: Tensor, dim: int = -1) -> Tensor:
    """Logarithm of :func:`sigsoftmax`, like :func:`torch.nn.functional.log_softmax`.

    Args:
        logits: Shape (...), any floating dtype; computed in float32 for half precision. ``-inf`` masks an entry.
        dim: The dimension that sums to one.

    Returns:
        Shape and dtype of ``logits``. Finite wherever the logit is finite (the dtype's lowest value stands for what
        lies below it), and ``-inf`` where the logit is.

    Reference: Kanai et al., "Sigsoftmax: Reanalysis of the Softmax Bottleneck", NeurIPS 2018, Definition 1.

    Example:
        >>> log_sigsoftmax(torch.tensor([-300.0, -200.0, -150.0]))
        tensor([-300., -100.,    0.])
    """
    log_p = _log_sigsoftmax(logits, dim).clamp(min=torch.finfo(logits.dtype).min)
    return log_p.masked_fill(logits == -torch.inf, -torch.inf).to(logits.dtype)


def sigsoftmax(logits: Tensor, dim: int = -1) -> Tensor:
    """``exp(z) sigmoid(z)``, normalised: like :func:`torch.nn.functional.softmax`.

    Args:
        logits: Shape (...), any floating dtype; computed in float32 for half precision. ``-inf`` masks an entry.
        dim: The dimension that sums to one.

    Returns:
        Probabilities, shape and dtype of ``logits``.

    Example:
        >>> sigsoftmax(torch.tensor([1.0, 2.0, 3.0]))
        tensor([0.0719, 0.2356, 0.6925])
    """
    return _log_sigsoftmax(logits, dim).exp().to(logits.dtype)


def _log_sigsoftmax(logits: Tensor, dim: int) -> Tensor:
    # log g(z) = z + min(z, 0) - log(1 + exp(-|z|)). Each term is taken relative to the largest logit before they are
    # added, so that large logits cost no digits and cannot overflow. The shift cancels in the normalisation, value
    # and gradient.
    z = widen(logits)
    peak = z.detach().amax(dim, keepdim=True)
    linear = (z - peak) + (_negative_part(z) - _negative_part(peak))
    return _normalize(linear - (_log1p_exp_neg_abs(z) - _log1p_exp_neg_abs(peak)), dim)


# Not torch.minimum and abs: their derivatives at zero are the mean of both sides, which makes the second one wrong.
def _negative_part(z: Tensor) -> Tensor:
    return torch.where(z < 0, z, 0.0)


def _log1p_exp_neg_abs(z: Tensor) -> Tensor:
    return torch.log1p(torch.exp(torch.where(z < 0, z, -z)))


def _normalize(scores: Tensor, dim: int) -> Tensor:
    # In two steps: F.log_softmax loses up to 6e-6 of the total probability over a vocabulary of 33,278 in float32.
    scores = scores - scores.detach().amax(dim, keepdim=True)
    return scores - torch.logsumexp(scores, dim, keepdim=True)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    activation: ActivationSpec = "softmax",
    ignore_index: int = IGNORE_INDEX,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: str = "auto",
) -> Tensor:
    """Negative log-likelihood of ``target`` under an output layer, from the hidden vectors.

    Equals ``F.nll_loss(log_normalize(F.linear(hidden, weight, bias), log_g), target)``.

    Args:
        hidden: Shape (..., d).
        weight: Shape (V, d).
        target: Token ids, int64, shape (...).
        bias: Shape (V,).
        activation: Any activation specification, callable or module (see :mod:`lit_sigsoftmax.activations`).
        ignore_index: Targets with this value cost nothing and do not count in the mean.
        reduction: ``"mean"`` over the counted targets, ``"sum"``, or ``"none"`` for shape (...).
        backend: An implementation of :mod:`lit_sigsoftmax.losses`; ``"auto"`` chooses.

    Returns:
        Nats; float32 for half-precision input. Differentiable in hidden, weight, bias and in the parameters of the
        activation.

    Raises:
        ValueError: Shapes do not fit, or ``reduction`` or ``backend`` is unknown.

    Example:
        >>> hidden, weight, target = torch.zeros(5, 3), torch.zeros(7, 3), torch.arange(5)
        >>> linear_cross_entropy(hidden, weight, target, activation="sigsoftmax").exp()
        tensor(7.0000)
    """
    fits = weight.dim() == 2 and hidden.shape == (*target.shape, weight.shape[1])
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, target {tuple(target.shape)} and "
            f"bias {None if bias is None else tuple(bias.shape)} do not fit: expected (..., d), (V, d), (...) and (V,)"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', not {reduction!r}")
    loss = get_backend(backend)(
        hidden.flatten(0, -2) if hidden.dim() > 1 else hidden.unsqueeze(0),
        weight,
        target.reshape(-1),
        bias,
        get_activation(activation),
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return loss.view(target.shape) if reduction == "none" else loss
