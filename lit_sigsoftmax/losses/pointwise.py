"""From logits to losses and their derivative: the part of the loss between its matrix products.

Three ways, from the fastest to the most general: a closed form that shares its exponentials, for the cache of a
processor, which makes its passes cheap; the derivative that the activation was registered with; and autograd within a
block of rows. Two more do it in one pass: :mod:`lit_sigsoftmax.losses.compiled` on a CPU, and on a GPU
:func:`lit_sigsoftmax.losses.triton_backend.score_and_differentiate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lit_sigsoftmax.activations import Activation, derivative_of, name_of

__all__ = ["Penalty", "Pointwise", "closed_form", "general", "has_closed_form"]


class Penalty(NamedTuple):
    """What is added to the negative log-likelihood.

    Attributes:
        label_smoothing: The share of the target's mass that is spread evenly over the vocabulary.
        z_loss: Weight of the squared logsumexp.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


class Pointwise(NamedTuple):
    """What comes out of a chunk of n rows of logits, beside their derivatives.

    Attributes:
        loss: Nats, shape (n,).
        scale: What the derivatives of each row are still to be multiplied by, shape (n,); None for nothing.
        of_parameters: Gradients of the tensors that the activation holds.
    """

    loss: Tensor
    scale: Tensor | None = None
    of_parameters: Sequence[Tensor] = ()


def has_closed_form(name: str | None) -> bool:
    """Whether :func:`closed_form` serves a registered activation."""
    return name in _CLOSED_FORMS


def closed_form(logits: Tensor, target: Tensor, log_g: Activation, gradient: bool) -> Pointwise | None:
    """Take the activation's closed form.

    Args:
        logits: Shape (n, V), float32 or float64; used up, and overwritten by the derivatives of each row's loss.
        target: Valid token ids, shape (n,).
        log_g: The output activation.
        gradient: Whether the logits are differentiated.

    Returns:
        None where a target is so improbable that the closed form, which is not in log space, cannot say how much.
    """
    form = _CLOSED_FORMS[name_of(log_g) or ""]
    blocks = zip(logits.chunk(2), target.unsqueeze(-1).chunk(2), strict=True)
    total, of_target, scale = (torch.cat(column) for column in zip(*(form(*b, gradient) for b in blocks), strict=True))
    if bool((of_target < _TINY).any()):
        return None
    return Pointwise((total.log() - of_target.log()).squeeze(-1), scale.squeeze(-1))


def general(
    logits: Tensor,
    target: Tensor,
    log_g: Activation,
    penalty: Penalty,
    gradient: bool,
    *,
    block: int,
    parameters: Sequence[Tensor] = (),
    weigh: Callable[[int, Tensor], Tensor] | None = None,
) -> Pointwise:
    """Take any activation: in log space, with its registered derivative or by autograd.

    Args:
        logits: Shape (n, V), float32 or float64; overwritten by the derivatives of each row's loss.
        target: Valid token ids, shape (n,).
        log_g: The output activation.
        penalty: Label smoothing and z-loss.
        gradient: Whether the logits are differentiated.
        block: Rows taken at a time.
        parameters: Tensors that ``log_g`` holds and whose gradients are wanted.
        weigh: From the first row and the losses of a block to the weights of its rows in these gradients.
    """
    losses = []
    totals = [torch.zeros_like(parameter, dtype=logits.dtype) for parameter in parameters]
    for start in range(0, len(logits), block):
        z, t = logits[start : start + block], target[start : start + block].unsqueeze(-1)
        weigh_block = None if weigh is None else partial(weigh, start)
        loss, found = _block(z, t, log_g, penalty, gradient, parameters, weigh_block)
        losses.append(loss)
        for total, of_block in zip(totals, found, strict=False):
            total.add_(of_block)
    return Pointwise(torch.cat(losses), of_parameters=totals)


def _block(
    logits: Tensor,
    index: Tensor,
    log_g: Activation,
    penalty: Penalty,
    gradient: bool,
    parameters: Sequence[Tensor],
    weigh: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Sequence[Tensor]]:
    derivative = derivative_of(log_g)  # none where there are parameters
    by_autograd = gradient and derivative is None
    z = logits.detach().requires_grad_(by_autograd)
    with torch.set_grad_enabled(by_autograd):
        scores = log_g(z)
    s = scores.detach()
    slope = torch.softmax(s, -1)
    peak, log_total = s.amax(-1), -slope.amax(-1).log()  # relative to the peak: large scores cost no digits
    smoothing, z_loss = penalty
    loss = log_total - (1 - smoothing) * (s.gather(-1, index).squeeze(-1) - peak)
    if smoothing:
        loss = loss - smoothing * (s - peak.unsqueeze(-1)).mean(-1)
    if z_loss:
        lse = peak + log_total
        loss = loss + z_loss * lse.square()
        slope.mul_((1 + 2 * z_loss * lse).unsqueeze(-1))
    if not gradient:
        return loss, ()
    slope.scatter_add_(-1, index, slope.new_full(index.shape, smoothing - 1))
    if smoothing:
        slope.sub_(smoothing / slope.shape[-1])
    if derivative is not None:
        torch.mul(slope, derivative(logits), out=logits)
        return loss, ()
    of_parameters: Sequence[Tensor] = ()
    if weigh is not None and parameters:
        weighted = slope * weigh(loss).unsqueeze(-1)
        of_parameters = torch.autograd.grad(scores, parameters, weighted, retain_graph=True)
    (own,) = torch.autograd.grad(scores, z, slope)  # of all rows at once: log_g is elementwise
    logits.copy_(own)
    return loss, of_parameters


# Closed forms, on a block (n, V) with targets (n, 1). Each leaves the derivatives in place of the logits, up to a
# factor for each row, and returns the sum of g over the row, g of the target and that factor, shape (n, 1) each. A
# common factor of the first two does not matter: it cancels in the loss.

_TINY = 1e-30  # g of the target relative to the sum of g: below it float32 soon ends
_Form = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]


def _softmax(z: Tensor, index: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    of_target = torch.softmax(z, -1, out=z).gather(-1, index)
    one = torch.ones_like(of_target)
    if gradient:
        z.scatter_add_(-1, index, -one)
    return one, of_target, one


def _sigsoftmax(z: Tensor, index: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    sigmoid = torch.sigmoid(z)
    torch.softmax(z, -1, out=z).mul_(sigmoid)
    total, of_target = z.sum(-1, keepdim=True), z.gather(-1, index)
    if gradient:  # half of g (2 - sigmoid), in one pass
        torch.addcmul(z, z, sigmoid, value=-0.5, out=z)
        z.scatter_add_(-1, index, total * (0.5 * sigmoid.gather(-1, index) - 1))
    return total, of_target, 2 / total


def _sigmoid(z: Tensor, index: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    slope = z.neg().sigmoid_()
    z.sigmoid_()
    total, of_target = z.sum(-1, keepdim=True), z.gather(-1, index)
    if gradient:
        z.mul_(slope).scatter_add_(-1, index, -total * slope.gather(-1, index))
    return total, of_target, 1 / total


def _relu(z: Tensor, index: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    z.relu_()
    total, of_target = z.sum(-1, keepdim=True) + 1e-8 * z.shape[-1], z.gather(-1, index) + 1e-8
    if gradient:  # g times its logarithm's derivative is 1 where z is positive
        z.sign_().scatter_add_(-1, index, -total * z.gather(-1, index) / of_target)
    return total, of_target, 1 / total


_CLOSED_FORMS: dict[str, _Form] = {
    "softmax": _softmax,
    "sigsoftmax": _sigsoftmax,
    "sigmoid": _sigmoid,
    "relu": _relu,
}
