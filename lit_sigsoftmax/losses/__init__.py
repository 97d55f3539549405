"""The implementations behind :func:`lit_sigsoftmax.functional.linear_cross_entropy`, one file each.

A backend maps hidden (N, d), weight (V, d), target (N,), bias (V,) or None and ``log_g`` to the negative
log-likelihood in nats: shape (N,) for ``reduction="none"``, a scalar otherwise. A mixture of K experts comes as hidden
(N, K, d) and ``log_prior`` (N, K).
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from lit_sigsoftmax.activations import Activation
from lit_sigsoftmax.losses.chunked import chunked, product_dtype
from lit_sigsoftmax.losses.reference import reference
from lit_sigsoftmax.losses.triton_backend import refusal, tf32_allowed, triton_linear_cross_entropy

__all__ = ["BACKENDS", "Backend", "check_backend", "resolve_backend"]


class Backend(Protocol):
    """One way to compute the loss."""

    def __call__(
        self,
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
        """Return the loss in nats."""
        ...


BACKENDS: dict[str, Backend] = {"reference": reference, "chunked": chunked, "triton": triton_linear_cross_entropy}


def check_backend(name: str) -> None:
    """Refuse a backend that there is not.

    Raises:
        ValueError: The name is unknown.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown loss backend {name!r}: choose 'auto' or one of {', '.join(sorted(BACKENDS))}")


def resolve_backend(
    name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, log_g: Activation, *, penalized: bool = False
) -> str:
    """Return the name that ``"auto"`` stands for, any other name as it is.

    It is ``"triton"`` on a GPU where its kernels serve and the matrix units do (half precision, TF32), else
    ``"chunked"``: exact float32 products are the vendor's library's.

    Args:
        name: A backend, or ``"auto"``.
        hidden: Shape (..., d).
        weight: Shape (V, d).
        bias: Shape (V,).
        log_g: The output activation.
        penalized: Whether there is label smoothing or z-loss.

    Raises:
        ValueError: The name is unknown.
    """
    check_backend(name)
    if name != "auto":
        return name
    if not hidden.is_cuda or penalized or not (product_dtype(hidden, weight) != torch.float32 or tf32_allowed()):
        return "chunked"
    return "chunked" if refusal(hidden, weight, bias, log_g) else "triton"
