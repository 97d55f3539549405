"""What the processes of one training run say to each other beside the gradients."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["gather", "random_state", "set_random_state"]


def gather(value: Any) -> list[Any]:
    """Return every process's value, in the order of ranks; all processes call this together.

    Args:
        value: Numbers, strings, tensors on the CPU, and lists, tuples and mappings of them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def random_state() -> dict[str, Any]:
    """Return the state of this process's random number generators, as plain data: Python's, NumPy's and torch's."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {"python": random.getstate(), "numpy": (name, [int(key) for key in keys], *rest)}
    return state | {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state: dict[str, Any]) -> None:
    """Set this process's random number generators to what :func:`random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
