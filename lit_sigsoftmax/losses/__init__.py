"""The implementations behind :func:`lit_sigsoftmax.functional.linear_cross_entropy`, one file each.

A backend maps hidden (N, d), weight (V, d), target (N,), bias (V,) or None and ``log_g`` to the negative
log-likelihood in nats: shape (N,) for ``reduction="none"``, a scalar otherwise.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from lit_sigsoftmax.activations import Activation
from lit_sigsoftmax.losses.reference import reference

__all__ = ["BACKENDS", "Backend", "get_backend"]


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
    ) -> Tensor:
        """Return the loss in nats."""
        ...


BACKENDS: dict[str, Backend] = {"reference": reference}


def get_backend(name: str) -> Backend:
    """Return a backend by name; ``"auto"`` is the fastest that fits.

    Raises:
        ValueError: The name is unknown.
    """
    if name == "auto":
        return reference
    if name not in BACKENDS:
        raise ValueError(f"unknown loss backend {name!r}: choose 'auto' or one of {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]
