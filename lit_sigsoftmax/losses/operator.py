"""The chunked loss as an operator of PyTorch, which ``torch.compile`` keeps in its graph.

An operator takes no callable, so this is for activations registered with a derivative, which go by their name. And its
outputs are new tensors: the gradients made in the forward pass are copied before they are scaled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_sigsoftmax.activations import get_activation, name_of
from lit_sigsoftmax.losses.chunks import Layer, losses_and_gradients, no_gradients, scaled_gradients
from lit_sigsoftmax.losses.limits import FIRST_ONLY, refuse_forward_mode, refuse_transforms
from lit_sigsoftmax.losses.pointwise import Penalty

__all__ = ["token_losses"]

_LAYER = "str activation, int ignore_index, float label_smoothing, float z_loss, ScalarType dtype"
_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? log_prior, Tensor target"


def token_losses(
    layer: Layer, target: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, log_prior: Tensor | None
) -> Tensor:
    """Return the losses in nats, shape (N,).

    Args:
        layer: Its activation is registered, with a derivative.
        target: Shape (N,), int64.
        hidden: Shape (N, K, d).
        weight: Shape (V, d).
        bias: Shape (V,).
        log_prior: Shape (N, K).

    Raises:
        RuntimeError: Forward mode or a transform of ``torch.func`` is under way.
    """
    tensors = (hidden, weight, bias, log_prior)
    refuse_forward_mode()
    refuse_transforms()
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    named = (str(name_of(layer.log_g)), layer.ignore_index, *layer.penalty, layer.dtype)
    nll, *_ = _forward(*tensors, target, wanted, *named)
    return nll


def _run_forward(*inputs: Any) -> tuple[Tensor, ...]:
    tensors, target, wanted, layer = _parsed(inputs)
    nll, gradients = losses_and_gradients(layer, target, tensors, wanted, layer.row_weight(target))
    return nll, *_all(gradients, nll)


def _run_backward(
    grad: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor, d_prior: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    tensors, target, wanted, layer = _parsed(inputs)
    made = zip((d_hidden, d_weight, d_bias, d_prior), wanted, strict=True)
    gradients = [gradient.clone() if want else None for gradient, want in made]
    row_weight = layer.row_weight(target)
    return _all(scaled_gradients(layer, target, tensors, wanted, row_weight, gradients, grad), grad)


def _parsed(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor, list[bool], Layer]:
    *tensors, target, wanted, activation, ignore_index, label_smoothing, z_loss, dtype = inputs
    layer = Layer(get_activation(activation), ignore_index, Penalty(label_smoothing, z_loss), dtype)
    return tuple(tensors), target, wanted, layer


def _all(gradients: list[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An empty tensor stands for None, which an operator does not return."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_forward(*inputs: Any) -> tuple[Tensor, ...]:
    tensors, target, wanted, layer = _parsed(inputs)
    nll = tensors[0].new_empty(target.shape, dtype=layer.precision)
    return nll, *_all(no_gradients(layer, tensors, wanted), nll)


def _fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    tensors, _, wanted, _ = _parsed(inputs[4:])
    return _all([t.new_empty(t.shape) if want else None for t, want in zip(tensors, wanted, strict=True)], grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.rest = inputs[5:]


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    wanted, found = ctx.rest[0], _backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *(gradient if want else None for gradient, want in zip(found, wanted, strict=True)), *[None] * 7


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(FIRST_ONLY)


_forward = torch.library.custom_op(
    "lit_sigsoftmax::token_losses",
    _run_forward,
    mutates_args=(),
    schema=f"({_TENSORS}, bool[] wanted, {_LAYER}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_forward.register_fake(_fake_forward)
_forward.register_autograd(_differentiate, setup_context=_setup)
_backward = torch.library.custom_op(
    "lit_sigsoftmax::token_losses_backward",
    _run_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor d_prior, "
    f"{_TENSORS}, bool[] wanted, {_LAYER}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_backward.register_fake(_fake_backward)
_backward.register_autograd(_refuse)
