"""What the benchmarks share: alternating timings, peak memory, the machine they ran on, and tables."""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
import random
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = [
    "Quartiles",
    "alternate",
    "extra_memory",
    "in_child",
    "in_order",
    "keep_freed_memory",
    "machine",
    "quartiles",
    "ratios",
    "table",
]

_T = TypeVar("_T")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Quartiles(NamedTuple):
    """The middle of some measurements and half of them around it."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Format each number, as in ``0.93 [0.91, 0.96]``."""
        return f"{self.median:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the quartiles of some measurements."""
    at = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    return Quartiles(*torch.tensor(values, dtype=torch.float64).quantile(at).tolist())


def ratios(values: Sequence[float], baseline: Sequence[float]) -> Quartiles:
    """Return the quartiles of the ratio to a baseline, taken within each round."""
    return quartiles([value / base for value, base in zip(values, baseline, strict=True)])


def alternate(steps: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Time every step once in each round, after a round that does not count.

    Args:
        steps: What to time; a result is dropped when the clock has stopped.
        repeats: The number of rounds.
        device: Where the steps run.

    Returns:
        Seconds of each step in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number, name in in_order(steps, 1 + repeats):
        _synchronize(device)
        start = time.perf_counter()
        result = steps[name]()
        _synchronize(device)
        elapsed = time.perf_counter() - start
        del result
        if number:
            seconds[name].append(elapsed)
    return seconds


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as it comes to do where one step is run again and again.

    With many steps in one process it depends on the others whether a step's memory is given back to the system, and its
    pages paid for anew each time. Blocks of 32 MB and more are always given back.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def in_order(names: Iterable[str], repeats: int) -> Iterator[tuple[int, str]]:
    """Yield each name once in each round, with the round's number from 0; each round has an order of its own.

    What a step costs depends on what ran before it: caches, the allocator's state.
    """
    order, rng = list(names), random.Random(0)
    for number in range(repeats):
        rng.shuffle(order)
        yield from ((number, name) for name in order)


def extra_memory(step: Callable[[], Sequence[Tensor]], device: torch.device) -> int | None:
    """Return the peak of a step's memory in bytes, beyond what was there before and the gradients that it returns.

    The step runs twice; the first run pays for what is paid once, such as the libraries' code. On the CPU it is the
    growth of the resident set: call this once in a fresh process (:func:`in_child`). None where the system does not
    tell.
    """
    libc = ctypes.CDLL(None)
    glibc = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if glibc:  # freed blocks go back to the system at once
        libc.mallopt(_M_MMAP_THRESHOLD, 2**16)
    step()
    if glibc:  # and those that this process has from the one before
        libc.malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        gradients = step()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = _status("VmRSS")
            gradients = step()
            peak = _status("VmHWM")
        except OSError:
            return None
    return peak - before - sum(gradient.nbytes for gradient in gradients)


def in_child(function: Callable[[], _T]) -> _T:
    """Return what a function returns in a process of its own, forked from this one, which must not have computed yet.

    Raises:
        RuntimeError: The process died, for instance for lack of memory.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function()))
    process.start()
    sender.close()
    try:
        result: _T = receiver.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(f"a measuring process ended with code {process.exitcode}") from error
    process.join()
    return result


def machine(device: torch.device) -> dict[str, str | int]:
    """Return date, commit, processor or GPU, threads and versions."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        **gpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, all columns but the first aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split("\t: ", 1) for line in (line.replace("\t\t", "\t") for line in lines) if "\t: " in line)
    return f"{facts.get('model name', platform.machine())}, family {facts.get('cpu family', '?')}"
