"""What the fused losses do not do, which they say rather than compute wrongly."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["FIRST_ONLY", "FirstOnly", "applied"]

FIRST_ONLY = (
    "the fused losses have first derivatives only, no forward mode and no torch.func transforms: "
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
    try:
        return function.apply(*args)
    except RuntimeError as error:
        if "functorch" in str(error):
            raise RuntimeError(FIRST_ONLY) from error
        raise
