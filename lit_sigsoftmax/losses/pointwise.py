"""From logits to losses and their derivative: the part of the loss between its matrix products.

Three ways, from the fastest to the most general: the sum of g and its derivative, in a form that shares exponentials
or as log g and its registered derivative give them (:class:`Bands` is the same for rows that come piece by piece); the
same in log space, for logits far from zero and for penalties; and autograd within a block of rows. Two more do it in
one pass: :mod:`lit_sigsoftmax.losses.compiled` on a CPU, and on a GPU
:func:`lit_sigsoftmax.losses.triton_backend.score_and_differentiate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from lit_sigsoftmax.activations import Activation, derivative_of, name_of

__all__ = [
    "Bands",
    "Penalty",
    "Pointwise",
    "closed_form",
    "general",
    "has_closed_form",
    "leaves",
    "scores_of",
    "shares_exponentials",
]


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
        scores = scores_of(log_g, z)
    if by_autograd and not scores.requires_grad:
        raise ValueError(
            "the output activation's result does not depend on its input, as far as autograd sees (a constant, "
            "detach() or no_grad() in it?), so nothing could be learnt: mend it, or register it with its derivative"
        )
    graph = get_gradient_edge(scores) if by_autograd else None
    if graph is not None and any(
        leaf is not z and all(leaf is not p for p in parameters) for leaf in leaves(graph.node)
    ):
        raise ValueError(
            "the output activation uses a tensor with a gradient for some logits and not for zeros, which is where the "
            "fused loss asks what it uses: use it for all of them, as with torch.where, or use backend='reference'"
        )
    scores = scores.detach()
    smoothing, z_loss = penalty
    peak = scores.amax(-1) if z_loss else None
    log_p = torch.log_softmax(scores, -1)
    del scores  # where the graph does not need them, their memory is free
    loss = (smoothing - 1) * log_p.gather(-1, index).squeeze(-1)
    if smoothing:
        loss = loss - smoothing * log_p.mean(-1)
    lse = None if peak is None else peak - log_p.amax(-1)
    if lse is not None:
        loss = loss + z_loss * lse.square()
    if not gradient:
        return loss, ()
    # Probabilities of no weight become 0, or all that follows would compute with denormal numbers, which is slow.
    slope = torch.threshold_(log_p, _NEGLIGIBLE, -torch.inf).exp_()
    if lse is not None:
        slope.mul_((1 + 2 * z_loss * lse).unsqueeze(-1))
    slope.scatter_add_(-1, index, slope.new_full(index.shape, smoothing - 1))
    if smoothing:
        slope.sub_(smoothing / slope.shape[-1])
    if graph is None:
        assert derivative is not None
        torch.mul(slope, derivative(logits), out=logits)
        return loss, ()
    of_parameters: Sequence[Tensor] = ()
    if weigh is not None and parameters:
        weighted = slope * weigh(loss).unsqueeze(-1)
        with _unhooked(parameters):  # hooks are for the gradient of all tokens
            of_parameters = torch.autograd.grad(graph, parameters, weighted, retain_graph=True, materialize_grads=True)
    (own,) = torch.autograd.grad(graph, z, slope)  # of all rows at once: log_g is elementwise
    logits.copy_(own)
    return loss, of_parameters


def scores_of(log_g: Activation, logits: Tensor) -> Tensor:
    """Return ``log_g(logits)``.

    Raises:
        ValueError: It has another shape, or is no tensor.
        RuntimeError: ``log_g`` changes its input.
    """
    try:
        scores = log_g(logits)
    except RuntimeError as error:
        if "in-place" in str(error):
            raise RuntimeError("the output activation changes its input: let it return a new tensor") from error
        raise
    if not isinstance(scores, Tensor) or scores.shape != logits.shape:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"an output activation maps logits to scores one by one: given {tuple(logits.shape)} it returned {found}"
        )
    return scores


@contextmanager
def _unhooked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Have the hooks of tensors rest."""
    hooks = [found for tensor in tensors if (found := getattr(tensor, "_backward_hooks", None))]
    resting = [dict(of_tensor) for of_tensor in hooks]
    for of_tensor in hooks:
        of_tensor.clear()
    try:
        yield
    finally:
        for of_tensor, rested in zip(hooks, resting, strict=True):
            of_tensor.update(rested)


def leaves(node: Node | None) -> list[Tensor]:
    """Return the leaf tensors to which a gradient flows from a node of autograd's graph."""
    nodes, seen, found = [node], set[Node](), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
    return found


_NEGLIGIBLE = -64.0  # e^-64 is 1e-28
_BLOCK_OF_BAND = 2**17  # logits that a pass takes at a time


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
