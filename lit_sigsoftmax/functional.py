"""The output layer as plain functions, for users of PyTorch alone."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_sigsoftmax.activations import Activation, ActivationSpec, get_activation, widen
from lit_sigsoftmax.losses import BACKENDS, resolve_backend

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
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    log_prior: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Negative log-likelihood of ``target`` under an output layer, from the hidden vectors.

    Equals ``F.nll_loss(log_normalize(F.linear(hidden, weight, bias), log_g), target)``, without holding the logits
    whole. Of a mixture it is :math:`-\operatorname{logsumexp}_k(\log \pi_k + \log p_k(y))`.

    Args:
        hidden: Shape (..., d); (..., K, d) for a mixture of K experts.
        weight: Shape (V, d).
        target: Token ids, int64, shape (...).
        bias: Shape (V,).
        activation: Any activation specification, callable or module (see :mod:`lit_sigsoftmax.activations`).
        ignore_index: Targets with this value cost nothing and do not count in the mean.
        reduction: ``"mean"`` over the counted targets, ``"sum"``, or ``"none"`` for shape (...).
        label_smoothing: The share of the target's mass that is spread evenly over the vocabulary (Szegedy et al., CVPR
            2016), in [0, 1].
        z_loss: Weight of the squared ``logsumexp(log_g(z))`` that is added to each token's loss (Chowdhery et al.,
            "PaLM", 2022).
        log_prior: Log-probabilities of the experts, shape (..., K). A mixture has neither of the last two.
        backend: An implementation of :mod:`lit_sigsoftmax.losses`: ``"reference"``, ``"chunked"`` or ``"triton"``;
            ``"auto"`` is the fastest that serves.

    Returns:
        Nats; float32 for half-precision input. Differentiable in hidden, weight, bias, log_prior and in the parameters
        of the activation. The chunked backend has the gradients of the mean ready: a derivative that weighs tokens
        unequally, or a second backward pass, costs it the whole computation again.

    Raises:
        TypeError: ``bias`` is not a tensor.
        ValueError: Shapes or the target's dtype do not fit, ``reduction`` or ``backend`` is unknown, a penalty is out
            of its range, or a mixture has one.
        RuntimeError: The backend lacks what is asked for, such as second derivatives; ``"reference"`` has everything.

    Example:
        >>> hidden, weight, target = torch.zeros(5, 3), torch.zeros(7, 3), torch.arange(5)
        >>> linear_cross_entropy(hidden, weight, target, activation="sigsoftmax").exp()
        tensor(7.0000)
    """
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(
            f"bias is a tensor or None, not {bias!r}: an activation is given by its keyword, activation=..."
        )
    mixed = () if log_prior is None else log_prior.shape[-1:]
    fits = weight.dim() == 2 and hidden.shape == (*target.shape, *mixed, weight.shape[1])
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, target {tuple(target.shape)}, "
            f"bias {_shape(bias)} and log_prior {_shape(log_prior)} do not fit: expected (..., d), (V, d), (...), (V,) "
            "and None, or (..., K, d) and (..., K) for a mixture"
        )
    if log_prior is not None and (log_prior.shape[:-1] != target.shape or label_smoothing or z_loss):
        raise ValueError(
            f"a mixture has log_prior of shape (..., K), here {_shape(log_prior)} for targets {_shape(target)}, and "
            "neither label_smoothing nor z_loss"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', not {reduction!r}")
    if target.dtype != torch.int64:
        raise ValueError(f"target is int64, not {target.dtype}")
    if not (0 <= label_smoothing <= 1 and 0 <= z_loss < math.inf):
        raise ValueError(
            f"label_smoothing is in [0, 1] and z_loss a weight of 0 or more, not {label_smoothing} and {z_loss}"
        )
    log_g = get_activation(activation)
    name = resolve_backend(backend, hidden, weight, bias, log_g, penalized=bool(label_smoothing or z_loss))
    loss = BACKENDS[name](
        hidden.reshape(target.numel(), *mixed, weight.shape[1]),
        weight,
        target.reshape(-1),
        bias,
        log_g,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        log_prior=None if log_prior is None else log_prior.reshape(target.numel(), *mixed),
    )
    return loss.view(target.shape) if reduction == "none" else loss


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
