"""The chunked loss as one operator of PyTorch, which ``torch.compile`` keeps in its graph.

It gives the mean or the sum alone: their gradients are one factor away from those made in the forward pass. An operator
takes no callable, so this is for activations registered with a derivative, which go by their name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_sigsoftmax.activations import get_activation, name_of
from lit_sigsoftmax.losses.chunks import FIRST_ONLY, Layer, losses_and_gradients, precision_of
from lit_sigsoftmax.losses.pointwise import Penalty
from lit_sigsoftmax.losses.reduction import reduce

__all__ = ["reduced_loss"]


def reduced_loss(
    layer: Layer,
    target: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_prior: Tensor | None,
    mean: bool,
) -> Tensor:
    """Return the mean or the sum of the losses, a scalar in nats.

    Args:
        layer: Its activation is registered, with a derivative.
        target: Shape (N,), int64.
        hidden: Shape (N, K, d).
        weight: Shape (V, d).
        bias: Shape (V,).
        log_prior: Shape (N, K).
        mean: Whether to divide by the number of targets that count.
    """
    tensors = (hidden, weight, bias, log_prior)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    penalty = (layer.penalty.label_smoothing, layer.penalty.z_loss)
    name = str(name_of(layer.log_g))
    loss, *_ = _operator(*tensors, target, name, layer.ignore_index, *penalty, layer.dtype, mean, wanted)
    return loss


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_prior: Tensor | None,
    target: Tensor,
    activation: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    dtype: torch.dtype,
    mean: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    layer = Layer(get_activation(activation), ignore_index, Penalty(label_smoothing, z_loss), dtype)
    tensors = (hidden, weight, bias, log_prior)
    nll, gradients = losses_and_gradients(layer, target, tensors, wanted, layer.row_weight(target))
    loss = reduce(nll, target, ignore_index, "mean" if mean else "sum")
    count = (target != ignore_index).sum().clamp(min=1).to(loss.dtype)
    factor = torch.ones_like(count) if mean == layer.of_mean else count if layer.of_mean else 1 / count
    return loss, factor, *(hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, dtype, wanted = (hidden, weight, *args[:2]), args[-3], args[-1]
    precision = precision_of(dtype)
    kept = (hidden.dtype, precision, precision, precision)
    gradients = (
        torch.empty(t.shape, dtype=kind, device=hidden.device) if want and t is not None else hidden.new_empty(0)
        for t, kind, want in zip(tensors, kept, wanted, strict=True)
    )
    return hidden.new_empty((), dtype=precision), hidden.new_empty((), dtype=precision), *gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.kinds = [None if tensor is None else tensor.dtype for tensor in inputs[:4]]
    ctx.wanted = inputs[-1]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *of_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(of is not None for of in of_gradients):
        raise RuntimeError(FIRST_ONLY)
    factor, *gradients = ctx.saved_tensors
    found = [
        (gradient * (grad * factor)).to(kind) if want else None
        for gradient, kind, want in zip(gradients, ctx.kinds, ctx.wanted, strict=True)
    ]
    return *found, *[None] * 8


_operator = torch.library.custom_op(
    "lit_sigsoftmax::linear_cross_entropy",
    _forward,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? log_prior, Tensor target, str activation, "
    "int ignore_index, float label_smoothing, float z_loss, ScalarType dtype, bool mean, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_operator.register_fake(_fake)
_operator.register_autograd(_backward, setup_context=_setup)
