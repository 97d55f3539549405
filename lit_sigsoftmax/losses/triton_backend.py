"""The loss on a GPU, by Triton kernels: logits exist a tile at a time, in float32, and are never stored.

Forward is one matrix product whose tiles end in the activation and an online log-sum-exp (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018). Backward computes the tiles again, a part of the vocabulary at a
time, and leaves the products of their gradient with weight and hidden to the vendor's library: four matrix products of
the logits' size, where the reference has three and stores the logits. No atomics: the same call gives the same bits.

Memory beyond inputs and gradients is O((N + V) d). The kernels know an activation by exponent, factor and derivative,
which :mod:`lit_sigsoftmax.losses.triton_kernels` holds; another one is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from lit_sigsoftmax.activations import Activation
from lit_sigsoftmax.losses.gemm import aligned_rows
from lit_sigsoftmax.losses.limits import FirstOnly, applied, once
from lit_sigsoftmax.losses.reduction import mix, reduce

__all__ = ["available", "refusal", "score_and_differentiate", "serves", "tf32_allowed", "triton_linear_cross_entropy"]

PROGRAMS = 1024
"""Programs of the forward kernel, at the most, beyond one for each block of rows: some for each multiprocessor of a
large GPU. Each keeps one partial sum a row, so this bounds their memory too."""

MIN_CHUNK = 2**24
"""Logit gradients held at a time, at least: fewer would not fill a GPU."""

_ALIGNED = 8  # a sum over a number that is no multiple takes the vendor's library three times as long in half precision


def available() -> bool:
    """Whether Triton is installed and there is a GPU, or Triton's interpreter is on (``TRITON_INTERPRET=1``)."""
    return _installed() and (torch.cuda.is_available() or _interpreted())


def tf32_allowed() -> bool:
    """Whether PyTorch may round the factors of a float32 product to TF32 on a GPU."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # where it has been used, the older settings raise


def refusal(hidden: Tensor, weight: Tensor, bias: Tensor | None, log_g: Activation) -> str | None:
    """Why :func:`triton_linear_cross_entropy` would refuse these arguments, or None where it takes them.

    Args:
        hidden: Shape (N, d).
        weight: Shape (V, d).
        bias: Shape (V,) or None.
        log_g: The output activation.
    """
    if not (_installed() and (hidden.is_cuda or available())):
        return "Triton or a GPU is missing (Triton's interpreter, TRITON_INTERPRET=1, runs on a CPU)"
    if not (hidden.is_cuda or _interpreted()):
        return f"the hidden vectors are on {hidden.device}, not on a GPU"
    if hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return f"{torch.cuda.get_device_name(hidden.device)} is older than compute capability 8.0"
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{name} is {tensor.dtype}, and its kernels compute in float32"
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        return f"hidden is {hidden.dtype} and weight {weight.dtype}: give both one dtype, or use autocast"
    from lit_sigsoftmax.losses.triton_kernels import ACTIVATIONS

    if not any(log_g is known for known in ACTIVATIONS):
        known = ", ".join(f.__name__ for f in ACTIVATIONS)
        return f"it has no kernel for the output activation {log_g!r} (it has {known})"
    return None


def triton_linear_cross_entropy(
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

    Products are exact to the inputs' dtype and summed in float32; float32 ones are rounded to TF32 where
    :func:`torch.set_float32_matmul_precision` allows it. Under autocast hidden and weight are cast as by ``F.linear``.
    A target outside the vocabulary that is not ``ignore_index`` costs nan: to raise, the host would have to wait.

    Raises:
        ValueError: :func:`refusal` has a reason.
        RuntimeError: The gradient is itself to be differentiated.
    """
    reason = refusal(hidden, weight, bias, log_g)
    if label_smoothing or z_loss:
        reason = "its kernels have neither label_smoothing nor z_loss"
    if reason is not None:
        raise ValueError(f"the loss backend 'triton' does not fit: {reason}; choose 'chunked' or 'auto'")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.contiguous()
    rows, weight = hidden.reshape(-1, weight.shape[1]).contiguous(), weight.contiguous()
    token_loss = torch.compiler.disable(_token_loss) if torch.compiler.is_compiling() else _token_loss
    if log_prior is None:
        nll = token_loss(rows, weight, bias, target.contiguous(), log_g, ignore_index)
    else:
        of_experts = target.repeat_interleave(log_prior.shape[1])
        nll = token_loss(rows, weight, bias, of_experts, log_g, ignore_index)
        nll = torch.where(target != ignore_index, mix(log_prior, nll.view(log_prior.shape)), 0.0)
    return reduce(nll, target, ignore_index, reduction)


def serves(weight: Tensor, log_g: Activation) -> bool:
    """Whether :func:`score_and_differentiate` takes the logits of this weight, shape (V, d)."""
    return refusal(weight, weight, None, log_g) is None


def score_and_differentiate(logits: Tensor, target: Tensor, log_g: Activation, differentiate: bool) -> Tensor:
    """Turn rows of logits into their negative log-likelihoods and, in place, into ``(p - y) * d log_g / dz``.

    Args:
        logits: Shape (n, V), float32, rows contiguous. Overwritten if ``differentiate``.
        target: Shape (n,), int64.
        log_g: An output activation that :func:`serves` accepts.
        differentiate: Whether to overwrite ``logits`` with the gradient.

    Returns:
        Nats, shape (n,), float32; nan where the target is outside the vocabulary.
    """
    from lit_sigsoftmax.losses import triton_kernels as kernels

    nll = logits.new_empty(len(logits))
    with torch.cuda.device_of(logits):
        kernels.rows_kernel[(len(logits),)](
            logits,
            target,
            nll,
            logits.shape[1],
            logits.stride(0),
            kernels.ACTIVATIONS[log_g],
            differentiate,
            4096,
            num_warps=8,
        )
    return nll


def _token_loss(*args: Any) -> Tensor:  # torch.compiler.disable takes no built-in method
    return applied(_TokenLoss, *args)


class _TokenLoss(FirstOnly):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        log_g: Activation,
        ignore_index: int,
    ) -> Tensor:
        nll, peak, log_total = _statistics(hidden, weight, bias, target, log_g, ignore_index)
        ctx.save_for_backward(hidden, weight, bias, target, peak, log_total)
        ctx.log_g, ctx.ignore_index = log_g, ignore_index
        return nll

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *statistics = ctx.saved_tensors
        of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
        d_hidden = None
        d_weight = torch.empty_like(weight) if of_weight else None
        d_bias = torch.empty_like(bias) if of_bias else None
        # By parts of the vocabulary, not of the tokens: the weight's gradient is then rounded once.
        for part in _parts(len(hidden), weight):
            d_logits, sums = _logit_gradient(
                hidden, weight, bias, part, (*statistics, grad), ctx.log_g, ctx.ignore_index, bias_needed=of_bias
            )
            if of_hidden:
                for columns in _aligned(part):
                    product = d_logits[:, columns.start - part.start : columns.stop - part.start] @ weight[columns]
                    d_hidden = product if d_hidden is None else d_hidden.float() + product
            if d_weight is not None:
                torch.mm(d_logits.T, hidden, out=d_weight[part])
            if d_bias is not None and sums is not None:
                d_bias[part] = sums
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, None, None, None


def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, log_g: Activation, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses, the largest exponent and ``log sum exp(log_g(z) - largest)``, each (N,) in float32."""
    from lit_sigsoftmax.losses import triton_kernels as kernels

    n, v = len(hidden), len(weight)
    blocks, tiles = _divide(n, kernels.BLOCK_N), _divide(v, kernels.BLOCK_V)
    span = kernels.BLOCK_V * _divide(tiles, max(1, PROGRAMS // max(1, blocks)))
    spans = _divide(v, span)
    peaks, totals = hidden.new_empty(2, spans, n, dtype=torch.float32)
    score, peak, log_total, nll = hidden.new_empty(4, n, dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        kernels.statistics_kernel[(blocks, spans)](
            hidden, weight, bias, target, peaks, totals, score, n, v, span, **_constants(hidden, log_g)
        )
        rows, at_a_time = 32, 64
        kernels.combine_kernel[(_divide(n, rows),)](
            peaks, totals, score, target, peak, log_total, nll, n, v, spans, ignore_index, rows, at_a_time
        )
    return nll, peak, log_total


def _logit_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    part: slice,
    of_rows: tuple[Tensor, ...],
    log_g: Activation,
    ignore_index: int,
    *,
    bias_needed: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of a part of the logits, (N, part) in the inputs' dtype, and its sums over tokens in float32.

    ``of_rows`` are target, largest exponent, logarithm of the sum and the gradient of the loss, (N,) each.
    """
    from lit_sigsoftmax.losses import triton_kernels as kernels

    weight, bias = weight[part], None if bias is None else bias[part]
    n, v = len(hidden), len(weight)
    blocks = _divide(n, kernels.BLOCK_N)
    d_logits = aligned_rows(hidden, n, v)
    sums = hidden.new_empty(blocks, v, dtype=torch.float32) if bias_needed else None
    with torch.cuda.device_of(hidden):
        kernels.gradient_kernel[(blocks, _divide(v, kernels.BLOCK_V))](
            hidden,
            weight,
            bias,
            *of_rows,
            d_logits,
            sums,
            n,
            v,
            part.start,
            of_rows[-1].stride(0),
            d_logits.stride(0),
            ignore_index,
            **_constants(hidden, log_g),
        )
    return d_logits, None if sums is None else sums.sum(0)


def _constants(hidden: Tensor, log_g: Activation) -> dict[str, Any]:
    """What the kernels are compiled for.

    Sizes and registers were chosen on an H200 (benchmarks/README.md): two programs share a multiprocessor, and one's
    products hide the other's exponentials. They fit the shared memory of smaller GPUs too.
    """
    from lit_sigsoftmax.losses import triton_kernels as kernels

    half = hidden.dtype != torch.float32
    exact = not tf32_allowed()
    return {
        "hidden_size": hidden.shape[1],
        "activation": kernels.ACTIVATIONS[log_g],
        "precision": "ieee" if exact else "tf32",
        "block_n": kernels.BLOCK_N,
        "block_v": kernels.BLOCK_V,
        "block_d": 64 if half else 32,
        "num_warps": 8,
        "num_stages": 3,
        "maxnreg": None if exact and not half else 128,
    }


def _parts(n: int, weight: Tensor) -> Iterator[slice]:
    """The vocabulary in parts whose logit gradients are no more numbers than hidden and weight have."""
    from lit_sigsoftmax.losses.triton_kernels import BLOCK_V

    v, d = weight.shape
    most = max(1, max(MIN_CHUNK, (n + v) * d) // max(1, n) // BLOCK_V)
    tiles = _divide(v, BLOCK_V)
    size = BLOCK_V * _divide(tiles, _divide(tiles, most))
    return (slice(start, min(start + size, v)) for start in range(0, v, size))


def _aligned(part: slice) -> Iterator[slice]:
    """A part as what the vendor's library sums over quickly, and the few columns that remain."""
    border = part.stop - (part.stop - part.start) % _ALIGNED
    return (slice(*ends) for ends in ((part.start, border), (border, part.stop)) if ends[0] < ends[1])


def _divide(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
