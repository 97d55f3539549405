r"""The loss in chunks of tokens: the logits of all tokens never exist at once, and no logit is computed twice.

A chunk's logits are made, turned into the derivative of its losses in place, and multiplied into the gradients of
hidden and weight, in the forward pass already: three products in all, as the plain loss takes. For token :math:`i`,
expert :math:`k` and type :math:`v`

.. math:: \frac{\partial\,\mathrm{nll}_i}{\partial z_{ikv}} = r_{ik} (p_{ikv} - y_{iv}) \frac{d \log g}{dz}(z_{ikv}),

with the responsibilities :math:`r_{ik} = \pi_{ik}\, p_{ik}(y_i) / p_i(y_i)` of a mixture, 1 without one; for sigsoftmax
the last factor is :math:`2 - \sigma(z)` (Kanai et al., NeurIPS 2018, equation 12).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lit_sigsoftmax.activations import Activation, derivative_of, name_of
from lit_sigsoftmax.losses import compiled, triton_backend
from lit_sigsoftmax.losses.gemm import linear
from lit_sigsoftmax.losses.pointwise import Penalty, Pointwise, closed_form, general, has_closed_form
from lit_sigsoftmax.losses.reduction import check_targets, mix, reduce

__all__ = ["chunked", "product_dtype"]

# A chunk has at most this share of all rows, so that with what the passes over it hold it is within an eighth ...
_SHARE, _SHARE_IN_PLACE = 13, 9
_TILE = 128  # rows that a GPU's product takes at a time
_ROWS = 192  # ... and no more than this on a processor: the products do not get faster
_TYPES = 4096  # of the vocabulary, whose half-precision product is held before it is added
_LEAST, _LEAST_ON_GPU = 2**18, 2**25  # logits of the smallest chunk
_LEAST_BLOCK_ON_GPU = 2**22  # logits: with fewer it waits for the host
_FIRST_ONLY = "has first derivatives only, and no torch.func transforms: use backend='reference'"


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
        RuntimeError: A second derivative or a transform of ``torch.func`` is asked for.
    """
    layer = _Layer(log_g, ignore_index, Penalty(label_smoothing, z_loss), product_dtype(hidden, weight))
    experts = hidden if log_prior is not None else hidden.unsqueeze(1)
    loss = torch.compiler.disable(_loss) if torch.compiler.is_compiling() else _loss
    return reduce(loss(layer, target, experts, weight, bias, log_prior), target, ignore_index, reduction)


def _loss(layer: _Layer, target: Tensor, *tensors: Tensor | None) -> Tensor:
    differentiable, weight = torch.is_grad_enabled(), tensors[1]
    assert weight is not None
    if target.device.type == "cpu":  # a GPU would have to wait
        check_targets(target[target != layer.ignore_index], len(weight))
    held = _held_tensors(layer.log_g, weight, layer.precision) if differentiable else []
    try:
        return _Chunked.apply(layer, differentiable, target, *tensors, *held)
    except RuntimeError as error:
        if "functorch" in str(error):
            raise RuntimeError(f"the chunked loss {_FIRST_ONLY}") from error
        raise


@dataclass(frozen=True)
class _Layer:
    """What does not change from chunk to chunk, tensors apart."""

    log_g: Activation
    ignore_index: int
    penalty: Penalty
    dtype: torch.dtype  # of the products

    @property
    def precision(self) -> torch.dtype:
        """The dtype of sums and of everything between the products."""
        return torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else self.dtype


class _Chunked(torch.autograd.Function):
    """Losses (N,) of hidden (N, K, d).

    What is differentiated beforehand is their mean, or their sum in half precision: a loss scaler would come too late
    for values that have vanished.
    """

    @staticmethod
    def forward(ctx: Any, layer: _Layer, differentiable: bool, target: Tensor, *tensors: Tensor | None) -> Tensor:
        wanted = [differentiable and needed for needed in ctx.needs_input_grad[3:]]
        row_weight = (target != layer.ignore_index).to(layer.precision)
        if layer.dtype == layer.precision:
            row_weight /= row_weight.sum().clamp(min=1)
        nll, gradients = _run(layer, target, tensors, wanted, row_weight)
        if any(wanted):
            ctx.layer, ctx.wanted, ctx.gradients = layer, wanted, gradients
            ctx.save_for_backward(target, row_weight, *tensors)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"the chunked loss {_FIRST_ONLY}")
        target, row_weight, *tensors = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        ratio = None if gradients is None else _common_ratio(grad, row_weight)
        if gradients is None or ratio is None:
            # Rows of unequal weight, or a second backward pass: the sums of the forward pass do not serve.
            _, gradients = _run(ctx.layer, target, tensors, ctx.wanted, grad.where(row_weight > 0, 0.0))
        elif grad.is_cuda or ratio != 1:  # a GPU would have to wait for the comparison
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(ratio)
        found = [None if g is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)]
        return None, None, None, *found


def _common_ratio(grad: Tensor, row_weight: Tensor) -> Tensor | None:
    """What the rows' weights, shape (N,), are to be multiplied by to become ``grad``; None if that differs."""
    if len(grad) and grad.stride() == (0,):  # of a mean or sum: one number, for which no GPU has to wait
        weight = row_weight.amax()
        return torch.where(weight > 0, grad[0] / weight, 1.0)
    ratio = (grad / row_weight)[row_weight > 0]
    if (ratio != ratio[:1]).any():
        return None
    return ratio[0] if len(ratio) else ratio.new_ones(())


def _run(
    layer: _Layer, target: Tensor, tensors: Any, wanted: list[bool], row_weight: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    hidden, weight, *_ = tensors
    counted = target != layer.ignore_index
    target, row_weight = target.where(counted, 0), row_weight.to(layer.precision)
    with torch.autocast(hidden.device.type, enabled=False):
        sums = _Sums(layer, tensors, wanted)
        nll = hidden.new_empty(len(target), dtype=layer.precision)
        for tokens in _chunks(len(target), hidden.shape[1], len(weight), sums.way, hidden.device):
            nll[tokens] = sums.add(tokens, target[tokens], row_weight[tokens])
    return nll.where(counted, 0.0), sums.gradients


class _Sums:
    """The gradients, as they grow chunk by chunk."""

    def __init__(self, layer: _Layer, tensors: Any, wanted: list[bool]) -> None:
        self.layer = layer
        self.hidden, weight, bias, self.log_prior, *self.held = tensors
        self.way = _way(layer, weight)
        self.weight, self.bias = weight.to(layer.dtype), None if bias is None else bias.to(layer.dtype)
        kept = [self.hidden.dtype, *[layer.precision] * (len(tensors) - 1)]
        self.gradients = [
            torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) if want else None
            for tensor, dtype, want in zip(tensors, kept, wanted, strict=True)
        ]

    def add(self, tokens: slice, target: Tensor, row_weight: Tensor) -> Tensor:
        """Add the gradients of some tokens and return their losses, shape (n,)."""
        n, experts, size = self.hidden[tokens].shape
        rows = self.hidden[tokens].reshape(-1, size).to(self.layer.dtype)
        log_prior = None if self.log_prior is None else self.log_prior[tokens].to(self.layer.precision)
        combine = partial(_combine, log_prior, row_weight)
        of_rows = target.unsqueeze(-1).expand(n, experts).reshape(-1)
        logits, outcome = self._pointwise(rows, of_rows, experts, combine)
        nll, share = combine(0, outcome.loss)
        of_hidden, of_weight, of_bias, of_prior, *of_held = self.gradients
        if of_prior is not None:
            of_prior[tokens] = -share
        for total, found in zip(of_held, outcome.of_parameters, strict=False):
            if total is not None:
                total.add_(found)
        # Rows of the small matrices are scaled, not those of the logits: but for half precision, whose range ends soon.
        scale = share.view(-1, 1) if outcome.scale is None else (outcome.scale * share.view(-1)).unsqueeze(-1)
        if half := self.layer.dtype != self.layer.precision:
            logits.mul_(scale)
            scale = torch.ones_like(scale)
        if of_bias is not None:
            of_bias.add_((scale.t() @ logits).view(-1))
        derivative = logits.to(self.layer.dtype)
        if of_hidden is not None:
            product = linear(derivative, self.weight.t())
            torch.mul(product, scale, out=of_hidden[tokens].view(-1, size))
        if of_weight is not None and half:
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
        if self.way == "compiled":
            loss = compiled.score_and_differentiate(logits, target, str(name_of(layer.log_g)), gradient)
            return logits, Pointwise(loss)
        if self.way == "triton":
            loss = triton_backend.score_and_differentiate(logits, target, layer.log_g, gradient)
            return logits, Pointwise(loss)
        if self.way == "closed form":
            if outcome := closed_form(logits, target, layer.log_g, gradient):
                return logits, outcome
            logits = linear(rows, self.weight, self.bias).to(layer.precision)
        outcome = general(
            logits,
            target,
            layer.log_g,
            layer.penalty,
            gradient,
            block=experts * max(1, _block(logits) // experts),  # whole tokens
            parameters=self.held,
            weigh=lambda start, loss: combine(start, loss)[1].view(-1),
        )
        return logits, outcome


def _block(logits: Tensor) -> int:
    """Rows that are differentiated at a time; several copies of them are held on the way."""
    return max(len(logits) // 8, _LEAST_BLOCK_ON_GPU // logits.shape[1] if logits.is_cuda else 0)


def _way(layer: _Layer, weight: Tensor) -> Literal["compiled", "triton", "closed form", "general"]:
    """How logits become losses and derivatives, see :mod:`lit_sigsoftmax.losses.pointwise`."""
    name = name_of(layer.log_g)
    if any(layer.penalty):
        return "general"
    if weight.device.type != "cpu":
        by_triton = layer.precision == torch.float32 and triton_backend.serves(weight, layer.log_g)
        return "triton" if by_triton else "general"
    if layer.precision == torch.float32 and compiled.serves(name):
        return "compiled"
    return "closed form" if has_closed_form(name) else "general"


def _combine(log_prior: Tensor | None, factor: Tensor, start: int, expert_nll: Tensor) -> tuple[Tensor, Tensor]:
    """From losses (n * K,) of experts, the first row given, to those of tokens (n,) and weights of rows (n, K)."""
    if log_prior is None:
        return expert_nll, factor[start : start + len(expert_nll)].unsqueeze(-1)
    first, n = start // log_prior.shape[1], len(expert_nll) // log_prior.shape[1]
    log_prior, expert_nll = log_prior[first : first + n], expert_nll.view(n, -1)
    nll = mix(log_prior, expert_nll)
    share = torch.exp(log_prior - expert_nll + nll.unsqueeze(-1))
    factor = factor[first : first + n].unsqueeze(-1)
    return nll, torch.where(factor == 0, 0.0, share * factor)  # an ignored token's own loss may be infinite


def _chunks(tokens: int, experts: int, vocab_size: int, way: str, device: torch.device) -> Iterator[slice]:
    least = max(32, (_LEAST if device.type == "cpu" else _LEAST_ON_GPU) // vocab_size)
    in_place = way in ("compiled", "triton")
    rows = max(tokens * experts // (_SHARE_IN_PLACE if in_place else _SHARE), least)
    if device.type == "cpu":
        rows = min(rows, max(_ROWS, least))
    step = -(-tokens // max(1, tokens * experts // rows))  # of nearly equal sizes: a small rest costs like a chunk
    if device.type != "cpu":
        step = -(-step * experts // _TILE) * _TILE // experts
    return (slice(start, start + step) for start in range(0, tokens, max(1, step)))


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
        nodes, seen, found = [log_g(logits).grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None and leaf is not logits:
            found.append(leaf)
    return found
