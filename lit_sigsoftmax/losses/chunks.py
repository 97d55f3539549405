r"""Losses and gradients in chunks of tokens: the logits of all tokens never exist at once, and none is computed twice.

A chunk's logits are made, turned into the derivative of its losses in place, and multiplied into the gradients of
hidden and weight, in the forward pass already: three products in all, as the plain loss takes. For token :math:`i`,
expert :math:`k` and type :math:`v`

.. math:: \frac{\partial\,\mathrm{nll}_i}{\partial z_{ikv}} = r_{ik} (p_{ikv} - y_{iv}) \frac{d \log g}{dz}(z_{ikv}),

with the responsibilities :math:`r_{ik} = \pi_{ik}\, p_{ik}(y_i) / p_i(y_i)` of a mixture, 1 without one; for sigsoftmax
the last factor is :math:`2 - \sigma(z)` (Kanai et al., NeurIPS 2018, equation 12).

Two other ways to the same losses and gradients are taken where they are faster: :mod:`lit_sigsoftmax.losses.sweeps`
goes over the vocabulary, and makes logits twice, and :mod:`lit_sigsoftmax.losses.compiled` has the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lit_sigsoftmax.activations import Activation
from lit_sigsoftmax.losses import closed_forms, compiled, sizes, sweeps, triton_backend
from lit_sigsoftmax.losses.closed_forms import closed_form, has_closed_form, shares_exponentials
from lit_sigsoftmax.losses.gemm import linear
from lit_sigsoftmax.losses.pointwise import Penalty, Pointwise, general
from lit_sigsoftmax.losses.reduction import check_targets, mix

__all__ = ["Layer", "losses_and_gradients", "no_gradients", "scaled_gradients"]

_TYPES = 4096  # of the vocabulary, whose half-precision product is held before it is added


@dataclass(frozen=True)
class Layer:
    """What does not change from chunk to chunk, tensors apart."""

    log_g: Activation
    ignore_index: int
    penalty: Penalty
    dtype: torch.dtype  # of the products

    def row_weight(self, target: Tensor) -> Tensor:
        """Of the losses in what is differentiated beforehand, shape (N,): their mean, or in half precision their sum.

        There a loss scaler would come too late for values that have vanished.
        """
        counted = (target != self.ignore_index).to(self.precision)
        return counted if self.in_half else counted / counted.sum().clamp(min=1)

    @property
    def in_half(self) -> bool:
        """Whether the products are of half precision."""
        return self.dtype in (torch.float16, torch.bfloat16)

    @property
    def precision(self) -> torch.dtype:
        """The dtype of sums and of everything between the products."""
        return torch.float32 if self.in_half else self.dtype


def losses_and_gradients(
    layer: Layer, target: Tensor, tensors: Sequence[Tensor | None], wanted: Sequence[bool], row_weight: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the losses, and the gradients of their weighted sum.

    Args:
        layer: What does not change from chunk to chunk.
        target: Shape (N,), int64.
        tensors: hidden (N, K, d), weight (V, d), bias (V,) or None, log_prior (N, K) or None, and those that ``log_g``
            holds.
        wanted: For each tensor, whether its gradient is.
        row_weight: Shape (N,), zero where a target is ignored.

    Returns:
        Nats, shape (N,), and gradients: hidden's of its dtype, others of ``layer.precision``; None where not wanted.
    """
    hidden, weight, *_ = tensors
    assert hidden is not None
    assert weight is not None
    counted = target != layer.ignore_index
    if _on_cpu(target):  # a GPU would have to wait
        check_targets(target[counted], len(weight))
    target, row_weight = target.where(counted, 0), row_weight.to(layer.precision)
    with torch.autocast(hidden.device.type, enabled=False), _unsaved():
        evaluator, given = _evaluator(layer, tensors, any(wanted)), (target, tensors, wanted, row_weight)
        if _sweeps_serve(layer, weight, evaluator):
            found = _by_sweeps(layer, evaluator, *given) or _by_chunks(layer, None, *given)
        elif evaluator and any(wanted) and (rows := _rows_of_tiles(layer, tensors)):
            found = _by_tiles(layer, evaluator, rows, *given) or _by_chunks(layer, None, *given)
        else:
            found = _by_chunks(layer, evaluator, *given)
        nll, gradients = found
    return nll.where(counted, 0.0), gradients


def scaled_gradients(
    layer: Layer,
    target: Tensor,
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    row_weight: Tensor,
    gradients: list[Tensor | None] | None,
    grad: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of the losses weighted by ``grad``, of the tensors' dtypes.

    Args:
        layer: As in :func:`losses_and_gradients`, as are the next three.
        target: Shape (N,), int64.
        tensors: What the gradients are of.
        wanted: For each tensor, whether its gradient is.
        row_weight: Shape (N,): the weights that ``gradients`` were made with.
        gradients: What :func:`losses_and_gradients` has made, overwritten; None if that is no more.
        grad: Shape (N,).
    """
    ratio = None if gradients is None else _common_ratio(grad, row_weight)
    if gradients is None or ratio is None:
        # Rows of unequal weight, or a second backward pass: the sums of the forward pass do not serve.
        _, gradients = losses_and_gradients(layer, target, tensors, wanted, grad.where(row_weight > 0, 0.0))
    elif grad.is_cuda or ratio != 1:  # a GPU would have to wait for the comparison
        for gradient in gradients:
            if gradient is not None:
                gradient.view(-1).mul_(ratio.view(1))  # a scalar factor would be rounded to half precision
    return [
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, tensors, strict=True)
    ]


def _common_ratio(grad: Tensor, row_weight: Tensor) -> Tensor | None:
    """What the rows' weights, shape (N,), are to be multiplied by to become ``grad``; None if that differs."""
    if len(grad) and grad.stride() == (0,):  # of a mean or sum: one number, for which no GPU has to wait
        weight = row_weight.amax()
        return torch.where(weight > 0, grad[0] / weight, 1.0)
    ratio = (grad / row_weight)[row_weight > 0]
    if (ratio != ratio[:1]).any():
        return None
    return ratio[0] if len(ratio) else ratio.new_ones(())


def no_gradients(layer: Layer, tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Return zeros to add to: hidden's, the first, of its dtype, others of ``layer.precision``; None if not wanted."""
    return [
        torch.zeros(tensor.shape, dtype=layer.precision if i else tensor.dtype, device=tensor.device)
        if want and tensor is not None
        else None
        for i, (tensor, want) in enumerate(zip(tensors, wanted, strict=True))
    ]


def _evaluator(layer: Layer, tensors: Sequence[Tensor | None], gradient: bool) -> compiled.Evaluator | None:
    _, weight, _, _, *held = tensors
    assert weight is not None
    if any(layer.penalty) or held or layer.precision != torch.float32 or not _on_cpu(weight):
        return None
    return compiled.evaluator(layer.log_g, len(weight), gradient)


def _rows_of_tiles(layer: Layer, tensors: Sequence[Tensor | None]) -> int:
    """Rows of a chunk whose products are compiled too; 0 where that does not serve, or a library is faster."""
    hidden, weight, _, log_prior, *_ = tensors
    assert hidden is not None
    assert weight is not None
    if log_prior is not None or not compiled.serves_tiles(hidden, weight, layer.dtype):
        return 0
    return sizes.of_tiles(len(hidden), weight, layer.in_half)


def _by_tiles(
    layer: Layer,
    evaluator: compiled.Evaluator,
    chunk: int,
    target: Tensor,
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    row_weight: Tensor,
) -> tuple[Tensor, list[Tensor | None]] | None:
    hidden, weight, bias, *_ = tensors
    assert hidden is not None
    assert weight is not None
    rows = hidden.squeeze(1).contiguous()
    nll, (of_hidden, *others) = compiled.tiled_losses_and_gradients(
        rows,
        weight,
        None if bias is None else bias.to(layer.dtype).to(layer.precision).contiguous(),
        target,
        row_weight.contiguous(),
        evaluator,
        rounded=layer.in_half,
        chunk=chunk,
        wanted=wanted[:3],
    )
    if not evaluator.trusts(nll):
        return None
    of_hidden = None if of_hidden is None else of_hidden.to(hidden.dtype).unsqueeze(1)
    return nll, [of_hidden, *others, *[None] * (len(tensors) - 3)]


def _sweeps_serve(layer: Layer, weight: Tensor, evaluator: compiled.Evaluator | None) -> bool:
    takes = evaluator is not None or (has_closed_form(layer.log_g) and not any(layer.penalty))
    return takes and sweeps.serves(weight, layer.dtype)


def _by_sweeps(
    layer: Layer,
    evaluator: compiled.Evaluator | None,
    target: Tensor,
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    row_weight: Tensor,
) -> tuple[Tensor, list[Tensor | None]] | None:
    """None where some logits are too far from zero, or the evaluator is not trusted: what is added up is of no use."""
    hidden, weight, bias, log_prior, *_ = tensors
    assert hidden is not None
    assert weight is not None
    experts, size = hidden.shape[1:]
    of_hidden, of_weight, of_bias, of_prior, *_ = gradients = no_gradients(layer, tensors, wanted)

    def losses_of(tokens: slice) -> Tensor | None:
        def weigh(expert_nll: Tensor) -> tuple[Tensor, Tensor]:
            prior = None if log_prior is None else log_prior[tokens].to(layer.precision)
            nll, share = _combine(prior, row_weight[tokens], 0, expert_nll)
            if of_prior is not None:
                of_prior[tokens] = -share
            return nll, share.reshape(-1).contiguous()

        rows, of_expert = hidden[tokens].reshape(-1, size), target[tokens].repeat_interleave(experts)
        of_rows = None if of_hidden is None else of_hidden[tokens].to(layer.precision).view(-1, size)
        sums = [of_rows, of_weight, of_bias]
        bands = compiled.Bands(of_expert, evaluator) if evaluator else closed_forms.Bands(of_expert, layer.log_g)
        nll = sweeps.losses_and_gradients(rows, weight, bias, bands, weigh, sums)
        if of_hidden is not None and of_rows is not None:  # the same where it is float32
            of_hidden[tokens] = of_rows.view(-1, experts, size)
        return nll

    nll = hidden.new_empty(len(target), dtype=layer.precision)
    for tokens in sizes.groups(len(target), experts, sweeps.ROWS):
        losses = losses_of(tokens)
        if losses is None:
            return None
        nll[tokens] = losses
    return nll, gradients


def _by_chunks(
    layer: Layer,
    evaluator: compiled.Evaluator | None,
    target: Tensor,
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    row_weight: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    hidden, weight, *_ = tensors
    assert hidden is not None
    assert weight is not None
    sums = _Sums(layer, evaluator, tensors, wanted)
    nll = hidden.new_empty(len(target), dtype=layer.precision)
    for tokens in sizes.of_chunks(hidden, weight, sums.way, layer.in_half, any(wanted)):
        nll[tokens] = sums.add(tokens, target[tokens], row_weight[tokens])
    return nll, sums.gradients


class _Sums:
    """The gradients, as they grow chunk by chunk."""

    def __init__(
        self, layer: Layer, evaluator: compiled.Evaluator | None, tensors: Any, wanted: Sequence[bool]
    ) -> None:
        self.layer, self.evaluator = layer, evaluator
        self.hidden, weight, bias, self.log_prior, *self.held = tensors
        self.way = _way(layer, weight, self.held, evaluator)
        self.weight, self.bias = weight.to(layer.dtype), None if bias is None else bias.to(layer.dtype)
        self.gradients = no_gradients(layer, tensors, wanted)

    def add(self, tokens: slice, target: Tensor, row_weight: Tensor) -> Tensor:
        """Add the gradients of some tokens and return their losses, shape (n,)."""
        experts, size = self.hidden.shape[1:]
        rows = self.hidden[tokens].reshape(-1, size).to(self.layer.dtype)
        log_prior = None if self.log_prior is None else self.log_prior[tokens].to(self.layer.precision)
        combine = partial(_combine, log_prior, row_weight)
        logits, outcome = self._pointwise(rows, target.repeat_interleave(experts), experts, combine)
        nll, share = combine(0, outcome.loss)
        of_hidden, of_weight, of_bias, of_prior, *of_held = self.gradients
        if of_prior is not None:
            of_prior[tokens] = -share
        for total, found in zip(of_held, outcome.of_parameters, strict=False):
            if total is not None:
                total.add_(found)
        # Rows of the small matrices are scaled, not those of the logits: but for half precision, whose range ends soon.
        scale = share.view(-1, 1) if outcome.scale is None else (outcome.scale * share.view(-1)).unsqueeze(-1)
        if self.layer.in_half:
            logits.mul_(scale)
            scale = torch.ones_like(scale)
        if of_bias is not None:
            of_bias.add_((scale.t() @ logits).view(-1))
        derivative = logits.to(self.layer.dtype)
        if of_hidden is not None:
            product = linear(derivative, self.weight.t())
            torch.mul(product, scale, out=of_hidden[tokens].view(-1, size))
        if of_weight is not None and self.layer.in_half:
            for part, d in zip(of_weight.split(_TYPES), derivative.t().split(_TYPES), strict=True):
                part.add_(d @ rows)  # a half-precision product, summed in float32
        elif of_weight is not None:
            of_weight.addmm_(derivative.t(), rows * scale)
        return nll

    def _pointwise(
        self, rows: Tensor, target: Tensor, experts: int, combine: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Pointwise]:
        layer, gradient = self.layer, any(total is not None for total in self.gradients)
        logits = linear(rows, self.weight, self.bias).to(layer.precision)
        if self.way == "triton":
            loss = triton_backend.score_and_differentiate(logits, target, layer.log_g, gradient)
            return logits, Pointwise(loss)
        if self.way != "general":
            if outcome := self._unless_general(logits, target, gradient):
                return logits, outcome
            self.way = "general"  # and so it will be for the next chunks
            logits = linear(rows, self.weight, self.bias).to(layer.precision)
        outcome = general(
            logits,
            target,
            layer.log_g,
            layer.penalty,
            gradient,
            block=experts * max(1, sizes.of_block(logits) // experts),  # whole tokens
            parameters=self.held,
            weigh=lambda start, loss: combine(start, loss)[1].view(-1),
        )
        return logits, outcome

    def _unless_general(self, logits: Tensor, target: Tensor, gradient: bool) -> Pointwise | None:
        """None where logits are too far from zero, or the evaluator is not trusted."""
        if self.evaluator is None:
            return closed_form(logits, target, self.layer.log_g, gradient)
        loss = compiled.score_and_differentiate(logits, target, self.evaluator, gradient)
        return Pointwise(loss) if self.evaluator.trusts(loss) else None


def _way(
    layer: Layer, weight: Tensor, held: Sequence[Tensor], evaluator: compiled.Evaluator | None
) -> Literal["compiled", "triton", "closed form", "derivative", "general"]:
    """How logits become losses and derivatives: the modules that ``_Sums._pointwise`` calls."""
    if evaluator:
        return "compiled"
    if any(layer.penalty) or held:  # the gradients of what it holds want the losses' weights
        return "general"
    if not _on_cpu(weight):
        by_triton = layer.precision == torch.float32 and triton_backend.serves(weight, layer.log_g)
        return "triton" if by_triton else "general"
    if shares_exponentials(layer.log_g):
        return "closed form"
    return "derivative" if has_closed_form(layer.log_g) else "general"


def _combine(log_prior: Tensor | None, factor: Tensor, start: int, expert_nll: Tensor) -> tuple[Tensor, Tensor]:
    """From losses (n * K,) of experts, the first row given, to those of tokens (n,) and weights of rows (n, K)."""
    if log_prior is None:
        return expert_nll, factor[start : start + len(expert_nll)].unsqueeze(-1)
    first, n = start // log_prior.shape[1], len(expert_nll) // log_prior.shape[1]
    log_prior, expert_nll = log_prior[first : first + n], expert_nll.view(n, log_prior.shape[1])
    nll = mix(log_prior, expert_nll)
    share = torch.exp(log_prior - expert_nll + nll.unsqueeze(-1))
    factor = factor[first : first + n].unsqueeze(-1)
    return nll, torch.where(factor == 0, 0.0, share * factor)  # an ignored token's own loss may be infinite


def _unsaved() -> AbstractContextManager[Any]:
    """Keep what autograd saves on the way, which lives no longer than the call, from checkpointing and its like."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: None)  # not public
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor) if top(True) else nullcontext()


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
