"""The loss in chunks of tokens, as autograd and torch.compile see it.

:mod:`lit_sigsoftmax.losses.chunks` makes the gradients in the forward pass already; backward scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lit_sigsoftmax.activations import Activation, derivative_of
from lit_sigsoftmax.losses import operator
from lit_sigsoftmax.losses.chunks import Layer, losses_and_gradients, scaled_gradients
from lit_sigsoftmax.losses.limits import FirstOnly, applied, once, refuse_forward_mode
from lit_sigsoftmax.losses.pointwise import Penalty, leaves, scores_of
from lit_sigsoftmax.losses.reduction import reduce

__all__ = ["chunked", "product_dtype"]


def chunked(
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
    """Return the loss in nats; see :class:`lit_sigsoftmax.losses.Backend`.

    First derivatives only, of hidden, weight, bias, ``log_prior`` and the leaf tensors that ``log_g`` uses.

    Raises:
        IndexError: A target is out of bounds, on a CPU.
        RuntimeError: A second derivative, forward mode, or a transform of ``torch.func`` is asked for.
    """
    layer = Layer(log_g, ignore_index, Penalty(label_smoothing, z_loss), product_dtype(hidden, weight))
    experts = hidden if log_prior is not None else hidden.unsqueeze(1)
    loss: Callable[..., Tensor] = _loss
    if torch.compiler.is_compiling():
        loss = operator.token_losses if derivative_of(log_g) is not None else torch.compiler.disable(_loss)
    return reduce(loss(layer, target, experts, weight, bias, log_prior), target, ignore_index, reduction)


def _loss(layer: Layer, target: Tensor, *tensors: Tensor | None) -> Tensor:
    differentiable, weight = torch.is_grad_enabled(), tensors[1]
    assert weight is not None
    if derivative_of(layer.log_g) is None:  # which may hold a tensor with a tangent
        refuse_forward_mode()
    held = _held_tensors(layer.log_g, weight, layer.precision) if differentiable else []
    return applied(_Chunked, layer, differentiable, target, *tensors, *held)


class _Chunked(FirstOnly):
    """Losses (N,) of hidden (N, K, d)."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, differentiable: bool, target: Tensor, *tensors: Tensor | None) -> Tensor:
        wanted = [differentiable and needed for needed in ctx.needs_input_grad[3:]]
        row_weight = layer.row_weight(target)
        nll, gradients = losses_and_gradients(layer, target, tensors, wanted, row_weight)
        if any(wanted):
            ctx.layer, ctx.wanted, ctx.gradients = layer, wanted, gradients
            ctx.save_for_backward(target, row_weight, *tensors)
        return nll

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        target, row_weight, *tensors = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        found = scaled_gradients(ctx.layer, target, tensors, ctx.wanted, row_weight, gradients, grad)
        return None, None, None, *found


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of ``F.linear(hidden, weight)``, under autocast too, or the wider one where it would refuse."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _held_tensors(log_g: Activation, weight: Tensor, precision: torch.dtype) -> list[Tensor]:
    """The leaf tensors to which a gradient flows through ``log_g``: a module's parameters, a closure's captives."""
    if derivative_of(log_g) is not None:
        return []
    with torch.enable_grad():
        logits = torch.zeros(1, len(weight), dtype=precision, device=weight.device, requires_grad=True)
        return [leaf for leaf in leaves(scores_of(log_g, logits).grad_fn) if leaf is not logits]
