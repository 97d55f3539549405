"""What the fused losses do not do, which they say rather than compute wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["FIRST_ONLY", "FirstOnly", "applied", "once", "refuse_forward_mode", "refuse_transforms"]

FIRST_ONLY = (
    "the fused losses have first derivatives only, no forward mode, no torch.func transforms and no batched gradients: "
    "use backend='reference'"
)


class FirstOnly(torch.autograd.Function):
    """A function that makes its gradients itself, and so has first derivatives only."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse forward mode."""
        raise RuntimeError(FIRST_ONLY)


def applied(function: type[FirstOnly], *args: Any) -> Any:
    """Return ``function.apply(*args)``.

    Raises:
        RuntimeError: A transform of ``torch.func`` asks for it.
    """
    with _named():
        return function.apply(*args)


def once(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Have the ``backward`` of a :class:`FirstOnly` refuse second derivatives and batched gradients."""

    @wraps(backward)
    def checked(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(FIRST_ONLY)
        with _named():
            return backward(ctx, grad)

    return checked


def refuse_forward_mode() -> None:
    """Raise where a level of forward mode has been entered: not every tangent shows on the tensors that come in."""
    if getattr(forward_ad, "_current_level", -1) >= 0:  # not public
        raise RuntimeError(FIRST_ONLY)


def refuse_transforms() -> None:
    """Raise where a transform of ``torch.func`` is under way, which tensors do not show inside ``torch.compile``."""
    if getattr(torch._C, "_are_functorch_transforms_active", bool)():  # not public
        raise RuntimeError(FIRST_ONLY)


@contextmanager
def _named() -> Iterator[None]:
    """Say in our words what PyTorch's errors about transforms and batched gradients mean here."""
    try:
        yield
    except RuntimeError as error:
        if any(word in str(error) for word in ("functorch", "Batching rule", "BatchedTensor")):
            raise RuntimeError(FIRST_ONLY) from error
        raise
