"""From logits to losses and their derivative: the part of the loss between its matrix products.

Here in log space, for any activation, penalty and size of the logits: with the derivative that the activation was
registered with, or by autograd within a block of rows. What is faster, and serves less:
:mod:`lit_sigsoftmax.losses.closed_forms`, and in one pass :mod:`lit_sigsoftmax.losses.compiled` on a CPU and
:func:`lit_sigsoftmax.losses.triton_backend.score_and_differentiate` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from lit_sigsoftmax.activations import Activation, derivative_of

__all__ = ["Penalty", "Pointwise", "general", "leaves", "scores_of"]

_NEGLIGIBLE = -64.0  # e^-64 is 1e-28


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
    if by_autograd:
        z, scores, graph = _traced(log_g, logits, parameters)
    else:
        z, scores, graph = logits, scores_of(log_g, logits), None
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


def _traced(log_g: Activation, logits: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, GradientEdge]:
    """Return logits that want a gradient, their scores without one, and the graph between them.

    The scores' numbers are let go of with them, unless the graph needs them itself.

    Args:
        log_g: The output activation.
        logits: Shape (n, V).
        parameters: The tensors that ``log_g`` holds.

    Raises:
        ValueError: There is no gradient, or it would reach other tensors as well.
    """
    z = logits.detach().requires_grad_()
    with torch.enable_grad():
        scores = scores_of(log_g, z)
    if not scores.requires_grad:
        raise ValueError(
            "the output activation's result does not depend on its input, as far as autograd sees (a constant, "
            "detach() or no_grad() in it?), so nothing could be learnt: mend it, or register it with its derivative"
        )
    graph = get_gradient_edge(scores)
    if any(leaf is not z and all(leaf is not p for p in parameters) for leaf in leaves(graph.node)):
        raise ValueError(
            "the output activation uses a tensor with a gradient for some logits and not for zeros, which is where the "
            "fused loss asks what it uses: use it for all of them, as with torch.where, or use backend='reference'"
        )
    return z, scores.detach(), graph


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
