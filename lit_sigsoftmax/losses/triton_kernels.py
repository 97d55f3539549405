# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"
"""The kernels of :mod:`lit_sigsoftmax.losses.triton_backend`, which alone imports this module: it needs Triton.

The first and third compute tiles of logits in float32 and never store them: rows of a tile are tokens, columns are
vocabulary entries. The last works on logits that a library's product has made.

``exp(log_g(z))`` is taken as ``exp(exponent) * factor``, where the exponent does not decrease in z and the factor is
what remains: no logarithm for each logit, and the largest logit has the largest exponent.
"""

from __future__ import annotations

import os
from typing import Any

import triton
from triton import language as tl

from lit_sigsoftmax import activations

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

BLOCK_N = 128
"""Rows of a tile."""

BLOCK_V = 128
"""Columns of a tile."""


@triton.jit
def _softmax(z):
    one = tl.full(z.shape, 1.0, tl.float32)
    return z, one, one


@triton.jit
def _sigsoftmax(z):
    e = tl.exp(-tl.abs(z))
    sigmoid_of_magnitude = 1.0 / (1.0 + e)
    return z + tl.minimum(z, 0.0), sigmoid_of_magnitude, 1.0 + tl.where(z > 0, e, 1.0) * sigmoid_of_magnitude


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    sigmoid_of_magnitude = 1.0 / (1.0 + e)
    return tl.minimum(z, 0.0), sigmoid_of_magnitude, tl.where(z > 0, e, 1.0) * sigmoid_of_magnitude


@triton.jit
def _relu(z):
    g = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) + 1e-8
    return tl.zeros(z.shape, tl.float32), g, tl.where(z > 0, 1.0 / g, 0.0)


ACTIVATIONS: dict[activations.Activation, Any] = {
    activations.softmax: _softmax,
    activations.sigsoftmax: _sigsoftmax,
    activations.sigmoid: _sigmoid,
    activations.relu: _relu,
}
"""``log_g`` to its kernel form: float32 logits to exponent, factor and the derivative of ``log_g``."""


@triton.jit
def _logits(
    hidden, weight, bias, first_row, first_column, n_rows, vocab_size, hidden_size, precision, block_n, block_v, block_d
):
    """A tile; rows and columns beyond the last repeat the last."""
    row = tl.minimum(tl.arange(0, block_n), n_rows - 1 - first_row)
    column = tl.minimum(tl.arange(0, block_v), vocab_size - 1 - first_column)
    unit = tl.arange(0, block_d)
    wide = tl.full(
        (), hidden_size, tl.int64
    )  # 64 bits for one offset of the tile, and 32 within it: they fill registers
    hidden += wide * first_row
    weight += wide * first_column
    z = tl.zeros((block_n, block_v), tl.float32)
    for start in range(0, hidden_size, block_d):
        left = hidden_size - start
        h = tl.load(hidden + (row[:, None] * hidden_size + unit[None, :] + start), mask=unit[None, :] < left, other=0.0)
        w = tl.load(
            weight + (column[None, :] * hidden_size + unit[:, None] + start), mask=unit[:, None] < left, other=0.0
        )
        if _INTERPRETED:  # it multiplies bfloat16 as integers (3.9); float32 products of halves are exact
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision=precision)
    if bias is not None:
        z += tl.load(bias + (first_column + column))[None, :].to(tl.float32)
    return z


@triton.jit
def statistics_kernel(
    hidden,
    weight,
    bias,
    target,
    peaks,
    totals,
    score,
    n_rows,
    vocab_size,
    span,
    hidden_size: tl.constexpr,
    activation: tl.constexpr,
    precision: tl.constexpr,
    block_n: tl.constexpr,
    block_v: tl.constexpr,
    block_d: tl.constexpr,
):
    """The largest exponent and the sum of ``exp(log_g(z) - largest)`` of a span of columns; the target's ``log_g(z)``.

    Args:
        hidden: Shape (n_rows, hidden_size), contiguous, as all are.
        weight: Shape (vocab_size, hidden_size).
        bias: Shape (vocab_size,) or None.
        target: Shape (n_rows,), int64.
        peaks: Shape (spans, n_rows), float32, written: of the exponents.
        totals: Shape (spans, n_rows), float32, written: relative to the peak.
        score: Shape (n_rows,), float32, written where the target is a vocabulary entry.
        n_rows: Tokens.
        vocab_size: Vocabulary entries.
        span: Columns for one program, a multiple of ``block_v``.
        hidden_size: Of the hidden vectors.
        activation: A value of :data:`ACTIVATIONS`.
        precision: ``"ieee"`` or ``"tf32"``: of float32 products.
        block_n: Rows of a tile.
        block_v: Columns of a tile.
        block_d: Hidden units taken at a time.
    """
    first_row = tl.program_id(0) * block_n
    row = first_row + tl.arange(0, block_n)
    rows = tl.minimum(row, n_rows - 1).to(tl.int64)
    wanted = tl.load(target + rows).to(tl.int32)
    found = tl.zeros((block_n,), tl.float32)
    largest = tl.full((block_n,), -float("inf"), tl.float32)
    mass = tl.zeros((block_n,), tl.float32)
    first = tl.program_id(1) * span
    stop = tl.minimum(first + span, vocab_size)
    for start in range(first, stop, block_v):
        column = start + tl.arange(0, block_v)
        z = _logits(
            hidden,
            weight,
            bias,
            first_row,
            start,
            n_rows,
            vocab_size,
            hidden_size,
            precision,
            block_n,
            block_v,
            block_d,
        )
        found += tl.sum(tl.where(column[None, :] == wanted[:, None], z, 0.0), 1)
        inside = column[None, :] < vocab_size
        top, _, _ = activation(tl.max(tl.where(inside, z, -float("inf")), 1))
        larger = tl.maximum(largest, top)
        shift = tl.where(larger == -float("inf"), 0.0, larger)  # masked entries alone
        exponent, factor, _ = activation(z)
        parts = tl.where(inside, tl.exp(exponent - shift[:, None]) * factor, 0.0)
        mass = mass * tl.exp(largest - shift) + tl.sum(parts, 1)
        largest = larger
    exponent, factor, _ = activation(found)
    place = tl.program_id(1).to(tl.int64) * n_rows + rows
    tl.store(peaks + place, largest, mask=row < n_rows)
    tl.store(totals + place, mass, mask=row < n_rows)
    tl.store(score + rows, exponent + tl.log(factor), mask=(row < n_rows) & (wanted >= first) & (wanted < stop))


@triton.jit
def combine_kernel(
    peaks,
    totals,
    score,
    target,
    peak,
    log_total,
    nll,
    n_rows,
    vocab_size,
    spans,
    ignore_index,
    block_n: tl.constexpr,
    block_spans: tl.constexpr,
):
    """The negative log-likelihoods, and what the gradient needs, from what :func:`statistics_kernel` has written.

    Args:
        peaks: Shape (spans, n_rows).
        totals: Shape (spans, n_rows).
        score: Shape (n_rows,).
        target: Shape (n_rows,), int64.
        peak: Shape (n_rows,), float32, written: the largest exponent over the whole vocabulary.
        log_total: Shape (n_rows,), float32, written: the logarithm of the sum of ``exp(log_g(z) - peak)`` over it.
        nll: Shape (n_rows,), float32, written; nan where the target is no vocabulary entry.
        n_rows: Tokens.
        vocab_size: Vocabulary entries.
        spans: Of columns.
        ignore_index: Targets with this value cost nothing.
        block_n: Rows for one program.
        block_spans: Spans taken at a time.
    """
    row = tl.program_id(0) * block_n + tl.arange(0, block_n)
    rows = tl.minimum(row, n_rows - 1)
    largest = tl.full((block_n,), -float("inf"), tl.float32)
    mass = tl.zeros((block_n,), tl.float32)
    for start in range(0, spans, block_spans):
        span = start + tl.arange(0, block_spans)[:, None]
        place = span.to(tl.int64) * n_rows + rows[None, :]
        top = tl.load(peaks + place, mask=span < spans, other=-float("inf"))
        part = tl.load(totals + place, mask=span < spans, other=0.0)
        larger = tl.maximum(largest, tl.max(top, 0))
        shift = tl.where(larger == -float("inf"), 0.0, larger)  # masked entries alone
        mass = mass * tl.exp(largest - shift) + tl.sum(part * tl.exp(top - shift[None, :]), 0)
        largest = larger
    wanted = tl.load(target + rows)
    loss = (largest - tl.load(score + rows)) + tl.log(mass)
    loss = tl.where((wanted >= 0) & (wanted < vocab_size), loss, float("nan"))
    tl.store(nll + rows, tl.where(wanted == ignore_index, 0.0, loss), mask=row < n_rows)
    tl.store(peak + rows, largest, mask=row < n_rows)
    tl.store(log_total + rows, tl.log(mass), mask=row < n_rows)


@triton.jit
def gradient_kernel(
    hidden,
    weight,
    bias,
    target,
    peak,
    log_total,
    grad,
    d_logits,
    d_bias,
    n_rows,
    vocab_size,
    first,
    grad_stride,
    stride,
    ignore_index,
    hidden_size: tl.constexpr,
    activation: tl.constexpr,
    precision: tl.constexpr,
    block_n: tl.constexpr,
    block_v: tl.constexpr,
    block_d: tl.constexpr,
):
    """The gradient with respect to the logits: ``grad * (p - onehot(target)) * log_g'(z)``.

    Args:
        hidden: Shape (n_rows, hidden_size), contiguous, as all are.
        weight: Shape (vocab_size, hidden_size): the vocabulary, or a part of it.
        bias: Shape (vocab_size,) or None.
        target: Shape (n_rows,), int64.
        peak: Shape (n_rows,), float32: the largest exponent over the whole vocabulary.
        log_total: Shape (n_rows,), float32: the logarithm of the sum of ``exp(log_g(z) - peak)`` over it.
        grad: Shape (n_rows,), float32: the gradient with respect to the tokens' losses; any stride.
        d_logits: Shape (n_rows, vocab_size), any floating dtype, rows contiguous, written.
        d_bias: Shape (blocks of rows, vocab_size), float32, written: sums over each block's rows; or None.
        n_rows: Tokens.
        vocab_size: Rows of ``weight``.
        first: The vocabulary entry of its first row.
        grad_stride: Of ``grad``, 0 where all tokens share one gradient.
        stride: From one row of ``d_logits`` to the next.
        ignore_index: Targets with this value have no gradient.
        hidden_size: Of the hidden vectors.
        activation: A value of :data:`ACTIVATIONS`.
        precision: ``"ieee"`` or ``"tf32"``: of float32 products.
        block_n: Rows of a tile.
        block_v: Columns of a tile.
        block_d: Hidden units taken at a time.
    """
    first_row, first_column = tl.program_id(0) * block_n, tl.program_id(1) * block_v
    z = _logits(
        hidden,
        weight,
        bias,
        first_row,
        first_column,
        n_rows,
        vocab_size,
        hidden_size,
        precision,
        block_n,
        block_v,
        block_d,
    )
    row, column = first_row + tl.arange(0, block_n), first_column + tl.arange(0, block_v)
    rows = tl.minimum(row, n_rows - 1).to(tl.int64)
    exponent, factor, slope = activation(z)
    p = tl.exp((exponent - tl.load(peak + rows)[:, None]) - tl.load(log_total + rows)[:, None]) * factor
    wanted = tl.load(target + rows)
    hit = first + column[None, :] == wanted.to(tl.int32)[:, None]
    upstream = tl.load(grad + rows * grad_stride, mask=(row < n_rows) & (wanted != ignore_index), other=0.0)
    gradient = (p - tl.where(hit, 1.0, 0.0)) * slope * upstream[:, None]
    inside = (row[:, None] < n_rows) & (column[None, :] < vocab_size)
    tl.store(d_logits + rows[:, None] * stride + column[None, :], gradient, mask=inside)
    if d_bias is not None:
        place = tl.program_id(0).to(tl.int64) * vocab_size + column
        tl.store(d_bias + place, tl.sum(gradient, 0), mask=column < vocab_size)


@triton.jit
def rows_kernel(
    logits,
    target,
    nll,
    vocab_size,
    stride,
    activation: tl.constexpr,
    differentiate: tl.constexpr,
    block: tl.constexpr,
):
    """The negative log-likelihood of a row of logits and, in their place, its gradient.

    Args:
        logits: Shape (n_rows, vocab_size), float32; overwritten where the row is differentiated.
        target: Shape (n_rows,), int64.
        nll: Shape (n_rows,), float32, written; nan where the target is no vocabulary entry.
        vocab_size: Vocabulary entries.
        stride: From one row of logits to the next.
        activation: A value of :data:`ACTIVATIONS`.
        differentiate: Whether to.
        block: Columns taken at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    wanted = tl.load(target + row)
    largest = tl.full((block,), -float("inf"), tl.float32)
    mass = tl.zeros((block,), tl.float32)
    found = tl.zeros((block,), tl.float32)
    for start in range(0, vocab_size, block):  # each lane sums for itself
        column = start + tl.arange(0, block)
        z = tl.load(logits + column, mask=column < vocab_size, other=0.0)
        found += tl.where(column == wanted, z, 0.0)
        exponent, factor, _ = activation(z)
        exponent += tl.where(column < vocab_size, 0.0, -float("inf"))
        larger = tl.maximum(largest, exponent)
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        mass = mass * tl.exp(largest - shift) + tl.exp(exponent - shift) * factor
        largest = larger
    peak = tl.max(largest, 0)
    log_total = tl.log(tl.sum(mass * tl.exp(largest - tl.where(peak == -float("inf"), 0.0, peak)), 0))
    of_target, factor_of_target, _ = activation(tl.sum(found, 0))
    loss = (peak - of_target - tl.log(factor_of_target)) + log_total
    tl.store(nll + row, tl.where((wanted >= 0) & (wanted < vocab_size), loss, float("nan")))
    if differentiate:
        for start in range(0, vocab_size, block):
            column = start + tl.arange(0, block)
            z = tl.load(logits + column, mask=column < vocab_size, other=0.0)
            exponent, factor, slope = activation(z)
            p = tl.exp((exponent - peak) - log_total) * factor
            gradient = (p - tl.where(column == wanted, 1.0, 0.0)) * slope
            tl.store(logits + column, gradient, mask=column < vocab_size)
