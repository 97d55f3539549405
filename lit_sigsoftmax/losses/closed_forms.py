"""The sum of g and its derivative, without a maximum: what most logits are near enough to zero for.

``log p = log g(z) - log sum g`` needs no more, and the passes over the logits are few and cheap. For four activations
they share their exponentials; any other that is registered with its derivative is taken as ``exp(log_g)``. Rows come
whole (:func:`closed_form`) or in bands of the vocabulary (:class:`Bands`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from lit_sigsoftmax.activations import Activation, derivative_of, name_of
from lit_sigsoftmax.losses.pointwise import Pointwise

__all__ = ["Bands", "closed_form", "has_closed_form", "shares_exponentials"]

_BLOCK_OF_BAND = 2**17  # logits that a pass takes at a time


def has_closed_form(log_g: Activation) -> bool:
    """Whether :func:`closed_form` and :class:`Bands` serve an activation: it is registered with its derivative."""
    return derivative_of(log_g) is not None


def shares_exponentials(log_g: Activation) -> bool:
    """Whether its closed form is one of those written here, which hold less than any function and its derivative."""
    return name_of(log_g) in _CLOSED_FORMS


def closed_form(logits: Tensor, target: Tensor, log_g: Activation, gradient: bool) -> Pointwise | None:
    """Take the sum of g and its derivative, without a maximum.

    Args:
        logits: Shape (n, V), float32 or float64; used up, and overwritten by the derivatives of each row's loss.
        target: Valid token ids, shape (n,).
        log_g: The output activation.
        gradient: Whether the logits are differentiated.

    Returns:
        None where logits are so far from zero that their exponentials come near the end of the numbers.
    """
    form, derivative, index = _form(log_g), derivative_of(log_g), target.unsqueeze(-1)
    assert derivative is not None
    of_target = logits.gather(-1, index)
    total = torch.cat([form.total(block, gradient) for block in logits.chunk(form.blocks)])
    if not _far_from_the_end(total):
        return None
    if gradient:
        logits.scatter_add_(-1, index, derivative(of_target) / -form.factor * total)
    loss = total.double().log() - log_g(of_target.double())  # both may be large
    return Pointwise(loss.to(total.dtype).squeeze(-1), (form.factor / total).squeeze(-1))


class Bands:
    """The closed form for rows whose logits come in bands of the vocabulary: :class:`compiled.Bands` in PyTorch.

    Args:
        target: Shape (n,), int64, each below V.
        log_g: An activation that :func:`has_closed_form` accepts.
    """

    def __init__(self, target: Tensor, log_g: Activation) -> None:
        self.target, self.log_g, self.form = target, log_g, _form(log_g)
        self.total = torch.zeros_like(target, dtype=torch.float32).unsqueeze(-1)
        self.of_target = torch.zeros_like(target, dtype=torch.float64)

    def add(self, logits: Tensor, first: int) -> None:
        """Take logits, shape (n, m), of half precision, of the types from ``first`` on."""
        for rows, block in _blocks_of(logits):
            self.total[rows] += self.form.total(block.float(), False)
        row, column = self._targets(logits, first)
        self.of_target[row] = logits[row, column].double()

    def losses(self) -> Tensor | None:
        """Return the rows' losses, shape (n,), float32, when all bands have been taken; None as the closed form."""
        if not _far_from_the_end(self.total):
            return None
        return self._loss.float()

    def differentiate(self, logits: Tensor, first: int, row_weight: Tensor) -> None:
        """Overwrite a band with the derivatives of the losses' sum weighted by ``row_weight``: (n,), float32."""
        scale = self.form.factor / self.total * row_weight.unsqueeze(-1)
        for rows, block in _blocks_of(logits):
            z = block.float()
            self.form.total(z, True)
            block.copy_(z.mul_(scale[rows]))
        row, column = self._targets(logits, first)
        logits[row, column] = (self._slope * row_weight)[row].to(logits.dtype)

    @cached_property
    def _loss(self) -> Tensor:
        return self.total.squeeze(-1).double().log() - self.log_g(self.of_target)

    @cached_property
    def _slope(self) -> Tensor:
        """Of the losses in the targets' logits."""
        derivative = derivative_of(self.log_g)
        assert derivative is not None
        return (derivative(self.of_target) * torch.expm1(-self._loss)).float()

    def _targets(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        column = self.target - first
        row = ((column >= 0) & (column < logits.shape[1])).nonzero().squeeze(-1)
        return row, column[row]


def _blocks_of(band: Tensor) -> Iterator[tuple[slice, Tensor]]:
    rows = max(1, _BLOCK_OF_BAND // band.shape[1])
    for start in range(0, len(band), rows):
        yield slice(start, start + rows), band[start : start + rows]


def _far_from_the_end(total: Tensor) -> bool:
    most = torch.finfo(total.dtype).max ** 0.75  # what is between it and the end is for rows' weights
    return bool(((total > 1 / most) & (total < most)).all())


class _Form(NamedTuple):
    """From logits (n, m) of some rows and types to the sum of g over each row, shape (n, 1).

    The derivatives of g, divided by ``factor``, take the place of the logits. Sums of parts are added up, so neither
    may depend on other logits of the row, as on a maximum.
    """

    total: Callable[[Tensor, bool], Tensor]
    factor: float = 1.0
    blocks: int = 5  # of a chunk's rows: what a pass needs beside the logits is held for one at a time


def _form(log_g: Activation) -> _Form:
    derivative = derivative_of(log_g)
    assert derivative is not None
    return _CLOSED_FORMS.get(name_of(log_g) or "") or _Form(partial(_by_derivative, log_g, derivative), blocks=9)


def _by_derivative(log_g: Activation, derivative: Activation, z: Tensor, gradient: bool) -> Tensor:
    g = log_g(z).exp()  # not in its place: it may be z itself
    total = g.sum(-1, keepdim=True)
    if gradient:
        torch.mul(g, derivative(z), out=z)
    return total


def _softmax(z: Tensor, gradient: bool) -> Tensor:
    return z.exp_().sum(-1, keepdim=True)


def _sigsoftmax(z: Tensor, gradient: bool) -> Tensor:
    sigmoid = torch.sigmoid(z)
    total = z.exp_().mul_(sigmoid).sum(-1, keepdim=True)
    if gradient:  # half of g (2 - sigmoid), in one pass
        torch.addcmul(z, z, sigmoid, value=-0.5, out=z)
    return total


def _sigmoid(z: Tensor, gradient: bool) -> Tensor:
    of_minus = z.neg().sigmoid_()
    total = z.sigmoid_().sum(-1, keepdim=True)
    if gradient:
        z.mul_(of_minus)
    return total


def _relu(z: Tensor, gradient: bool) -> Tensor:
    total = z.relu_().sum(-1, keepdim=True) + 1e-8 * z.shape[-1]
    if gradient:
        z.sign_()
    return total


_CLOSED_FORMS = {
    "softmax": _Form(_softmax),
    "sigsoftmax": _Form(_sigsoftmax, 2.0),
    "sigmoid": _Form(_sigmoid),
    "relu": _Form(_relu),
}
