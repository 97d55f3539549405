"""Matrix products of the loss, and which of them are the faster ones on this machine.

PyTorch sends float32 products on a CPU to one BLAS library, which is slow on some processors. oneDNN, which PyTorch
brings along, is reached by an operator that is not public: it is used only where it exists and was the faster one. So
with bfloat16. What is faster is measured once and kept in the user's cache, so that every run on the machine computes
the same bits.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_sigsoftmax.storage import atomic_write, cache_dir, exclusive

__all__ = ["aligned_rows", "bfloat16_pays", "linear", "uses_onednn"]

_ROWS, _INNER, _COLUMNS = 128, 256, 8192  # of the measured product, like a chunk of the loss
_ALIGNED = 32  # numbers of 16 bits
_VARIABLE = "LIT_SIGSOFTMAX_GEMM"

_Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, without gradients.

    Args:
        x: Shape (n, d).
        weight: Shape (m, d), any strides.
        bias: Shape (m,).

    Returns:
        Shape (n, m), of the inputs' dtype; on a GPU its rows may be further apart.
    """
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 and weight.numel() > 0
    if plain and (weight.is_contiguous() or weight.t().is_contiguous()) and uses_onednn():
        return _onednn(x.contiguous(), weight, None if bias is None else bias.contiguous())
    if not x.is_cuda:
        return F.linear(x, weight, bias)
    out = aligned_rows(x, len(x), len(weight))
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def aligned_rows(like: Tensor, n: int, m: int) -> Tensor:
    """Return an uninitialised (n, m) whose rows begin at multiples of 64 bytes on a GPU.

    Products with others cost it twice the time in float32, in half precision more. On a CPU rows follow one another:
    oneDNN's bfloat16 products (torch 2.13) take in what lies between them, and nan times zero is nan.
    """
    return like.new_empty(n, -(-m // _ALIGNED) * _ALIGNED if like.is_cuda else m)[:, :m]


@cache
def uses_onednn() -> bool:
    """Whether float32 products go through oneDNN on this machine.

    ``LIT_SIGSOFTMAX_GEMM=onednn`` or ``=torch`` decides; otherwise a measurement made once on this machine does.
    """
    if not _onednn_works():
        return False
    choice = os.environ.get(_VARIABLE) or _faster("gemm", {"onednn": _onednn, "torch": F.linear}, "torch")
    if choice not in ("onednn", "torch"):
        raise ValueError(f"{_VARIABLE} is 'onednn' or 'torch', not {choice!r}")
    return choice == "onednn"


@cache
def bfloat16_pays() -> bool:
    """Whether a product in bfloat16 takes less time on this machine than in float32, the rounding for it and all.

    So it does with matrix units for bfloat16. A measurement made once on this machine says it.
    """
    return _faster("bfloat16", {"bfloat16": _in_bfloat16, "float32": linear}, "float32") == "bfloat16"


def _in_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_works() -> bool:
    x, weight = _numbers(3, 4), _numbers(5, 4)
    try:
        return torch.allclose(_onednn(x, weight, None), F.linear(x, weight), rtol=1e-5)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _faster(question: str, ways: Mapping[str, _Product], default: str) -> str:
    """The faster way, as measured when the question was first asked on this machine."""
    machine = " ".join((torch.__version__, platform.machine(), _processor()))
    path = cache_dir() / f"{question}-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.txt"
    try:
        with exclusive(path):
            if not (path.exists() and path.read_text() in ways):
                with atomic_write(path) as file:
                    file.write(_measure(ways).encode())
            return path.read_text()
    except OSError:  # nowhere to write, so nowhere to stay the same
        return default


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return " ".join(sorted({line for line in lines if line.startswith(("model", "cpu family", "flags"))}))


def _measure(ways: Mapping[str, _Product]) -> str:
    x, weight = _numbers(_ROWS, _INNER), _numbers(_COLUMNS, _INNER)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(9):
        for name, product in ways.items():
            start = time.perf_counter()
            product(x, weight, None)
            seconds[name].append(time.perf_counter() - start)
    return min(seconds, key=lambda name: median(seconds[name]))


def _numbers(rows: int, columns: int) -> Tensor:
    # Whatever the default dtype and device are when the first loss is computed.
    return torch.linspace(-1, 2, rows * columns, dtype=torch.float32, device="cpu").view(rows, columns)
