"""What the processes of one training run say to each other beside the gradients."""

from __future__ import annotations

import atexit
import os
import random
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["Address", "address", "died", "gather", "leave_at_exit", "random_state", "set_random_state"]

Address = tuple[str, int]
"""Host name and process id."""


def address() -> Address:
    """Return this process's address."""
    return socket.gethostname(), os.getpid()


def died(addresses: Sequence[Address], wait: float = 2.0) -> list[int]:
    """Return the ranks of processes of this machine that are no more.

    Args:
        addresses: Of all ranks.
        wait: Seconds to give a process whose connections are closed already.
    """
    end = time.monotonic() + wait
    while True:
        gone = [rank for rank, (host, pid) in enumerate(addresses) if host == address()[0] and not _alive(pid)]
        if gone or time.monotonic() > end:
            return gone
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text() if os.path.isdir("/proc/self") else ""
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:  # somebody else's
        return True
    return not status.rpartition(")")[2].startswith(" Z")  # a zombie has only not been waited for


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


def leave_at_exit() -> None:
    """Let this process leave its group before the interpreter ends, as Lightning does for NCCL alone.

    A thread of gloo may still let go of the last sum's tensors. It would wait for an interpreter that is no more, and
    abort the process after all its work.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


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
