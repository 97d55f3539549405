# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"
"""The kernels of :mod:`lit_sigsoftmax.losses.triton_backend`, which alone imports this module: it needs Triton.

Both compute a tile of logits in float32 and never store it. Rows of a tile are tokens, columns are vocabulary entries.
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

MAX_BLOCK_V = 256
"""Columns of the widest tile."""

# Triton times these at the first call for a hidden size, activation and dtype; its interpreter cannot. The first fits
# GPUs with little shared memory, and float32. 256 columns need 16 warps: eight run out of registers.
_CONFIGS = [
    triton.Config({"block_v": 128, "block_d": 32}, num_warps=8, num_stages=3),
    triton.Config({"block_v": 128, "block_d": 64}, num_warps=8, num_stages=3),
    triton.Config({"block_v": MAX_BLOCK_V, "block_d": 64}, num_warps=16, num_stages=3),
]
_tuned = triton.autotune(_CONFIGS[:1] if _INTERPRETED.value else _CONFIGS, key=["hidden_size", "activation"])


@triton.jit
def _softmax(z):
    return z, tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def _sigsoftmax(z):
    e = tl.exp(-tl.abs(z))
    return z + tl.minimum(z, 0.0) - tl.log(1.0 + e), 1.0 + tl.where(z > 0, e, 1.0) / (1.0 + e)


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.minimum(z, 0.0) - tl.log(1.0 + e), tl.where(z > 0, e, 1.0) / (1.0 + e)


@triton.jit
def _relu(z):
    g = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) + 1e-8
    return tl.log(g), tl.where(z > 0, 1.0 / g, 0.0)


ACTIVATIONS: dict[activations.Activation, Any] = {
    activations.softmax: _softmax,
    activations.sigsoftmax: _sigsoftmax,
    activations.sigmoid: _sigmoid,
    activations.relu: _relu,
}
"""``log_g`` to its kernel form: float32 logits to the pair of ``log_g`` and its derivative."""


@triton.jit
def _logits(hidden, weight, bias, rows, columns, hidden_size, precision, block_n, block_v, block_d):
    z = tl.zeros((block_n, block_v), tl.float32)
    for start in range(0, hidden_size, block_d):
        units = start + tl.arange(0, block_d)
        h = tl.load(hidden + rows[:, None] * hidden_size + units[None, :], mask=units[None, :] < hidden_size, other=0.0)
        w = tl.load(
            weight + columns[None, :] * hidden_size + units[:, None], mask=units[:, None] < hidden_size, other=0.0
        )
        if _INTERPRETED:  # it multiplies bfloat16 as integers (3.9); float32 products of halves are exact
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision=precision)
    if bias is not None:
        z += tl.load(bias + columns)[None, :].to(tl.float32)
    return z


@_tuned
@triton.jit
def statistics_kernel(
    hidden,
    weight,
    bias,
    target,
    peak,
    total,
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
    """The largest score and the sum of ``exp(score - largest)`` of a span of columns; the target's score.

    Args:
        hidden: Shape (n_rows, hidden_size), contiguous, as all are.
        weight: Shape (vocab_size, hidden_size).
        bias: Shape (vocab_size,) or None.
        target: Shape (n_rows,), int64.
        peak: Shape (spans, n_rows), float32, written.
        total: Shape (spans, n_rows), float32, written.
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
    row = tl.program_id(0) * block_n + tl.arange(0, block_n)
    rows = tl.minimum(row, n_rows - 1).to(tl.int64)
    wanted = tl.load(target + rows).to(tl.int32)
    found = tl.zeros((block_n,), tl.float32)
    largest = tl.full((block_n,), -float("inf"), tl.float32)
    mass = tl.zeros((block_n,), tl.float32)
    first = tl.program_id(1) * span
    stop = tl.minimum(first + span, vocab_size)
    for start in range(first, stop, block_v):
        column = start + tl.arange(0, block_v)
        columns = tl.minimum(column, vocab_size - 1).to(tl.int64)
        z = _logits(hidden, weight, bias, rows, columns, hidden_size, precision, block_n, block_v, block_d)
        scores, _ = activation(z)
        found += tl.sum(tl.where(column[None, :] == wanted[:, None], scores, 0.0), 1)
        scores = tl.where(column[None, :] < vocab_size, scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(larger == -float("inf"), 0.0, larger)  # masked entries alone
        mass = mass * tl.exp(largest - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
        largest = larger
    place = tl.program_id(1).to(tl.int64) * n_rows + rows
    tl.store(peak + place, largest, mask=row < n_rows)
    tl.store(total + place, mass, mask=row < n_rows)
    tl.store(score + rows, found, mask=(row < n_rows) & (wanted >= first) & (wanted < stop))


@_tuned
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
        target: Shape (n_rows,), int64, counted from the first row of ``weight``.
        peak: Shape (n_rows,), float32: the largest score over the whole vocabulary.
        log_total: Shape (n_rows,), float32: the logarithm of the sum of ``exp(score - peak)`` over it.
        grad: Shape (n_rows,), float32: the gradient with respect to the tokens' losses.
        d_logits: Shape (n_rows, vocab_size), any floating dtype, written.
        d_bias: Shape (blocks of rows, vocab_size), float32, written: sums over each block's rows; or None.
        n_rows: Tokens.
        vocab_size: Vocabulary entries.
        hidden_size: Of the hidden vectors.
        activation: A value of :data:`ACTIVATIONS`.
        precision: ``"ieee"`` or ``"tf32"``: of float32 products.
        block_n: Rows of a tile.
        block_v: Columns of a tile.
        block_d: Hidden units taken at a time.
    """
    row = tl.program_id(0) * block_n + tl.arange(0, block_n)
    column = tl.program_id(1) * block_v + tl.arange(0, block_v)
    rows = tl.minimum(row, n_rows - 1).to(tl.int64)
    columns = tl.minimum(column, vocab_size - 1).to(tl.int64)
    z = _logits(hidden, weight, bias, rows, columns, hidden_size, precision, block_n, block_v, block_d)
    scores, slope = activation(z)
    p = tl.exp((scores - tl.load(peak + rows)[:, None]) - tl.load(log_total + rows)[:, None])
    hit = column[None, :] == tl.load(target + rows).to(tl.int32)[:, None]
    upstream = tl.load(grad + rows, mask=row < n_rows, other=0.0)
    gradient = (p - tl.where(hit, 1.0, 0.0)) * slope * upstream[:, None]
    inside = (row[:, None] < n_rows) & (column[None, :] < vocab_size)
    tl.store(d_logits + rows[:, None] * vocab_size + column[None, :], gradient, mask=inside)
    if d_bias is not None:
        place = tl.program_id(0).to(tl.int64) * vocab_size + columns
        tl.store(d_bias + place, tl.sum(gradient, 0), mask=column < vocab_size)
