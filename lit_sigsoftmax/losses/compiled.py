"""A chunk's losses and derivatives compiled for this CPU: an optional fast path, off without a C++ compiler.

A backend that works in chunks of rows has their logits in the cache and needs loss and gradient. In PyTorch, each step
of the formula is one more pass over the chunk; ``compiled.cpp`` does them all while a row is in the cache, also where
it comes in bands (:class:`Bands`). Where rows are few, ``tiles.cpp`` does the matrix products too. They are compiled
for this machine when first used (some seconds) and kept in the cache folder. Without a compiler, or with
``LIT_SIGSOFTMAX_COMPILE=0``, nothing is served and the caller does it in PyTorch.

Some activations are compiled with them (``activations.h``); others come as a program that ``interpreter.h`` runs
(:mod:`lit_sigsoftmax.losses.programs`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sigsoftmax.activations import Activation, name_of
from lit_sigsoftmax.losses.programs import Program, Recording, record
from lit_sigsoftmax.losses.reduction import check_targets
from lit_sigsoftmax.storage import atomic_write, cache_dir, exclusive

__all__ = [
    "COMPILE_VARIABLE",
    "Bands",
    "Evaluator",
    "available",
    "evaluator",
    "score_and_differentiate",
    "serves",
    "serves_tiles",
    "tiled_losses_and_gradients",
]

COMPILE_VARIABLE = "LIT_SIGSOFTMAX_COMPILE"

_SOURCES = [
    Path(__file__).with_name(name)
    for name in ("compiled.cpp", "tiles.cpp", "activations.h", "bfloat16.h", "interpreter.h")
]
# Not -ffast-math: it drops infinities, and its startup code would flush denormals in the whole process.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")


def available() -> bool:
    """Whether the compiled pass can be used in this process. The first call may compile it; none raises.

    A compilation that fails warns, once.
    """
    return _library() is not None


def serves(activation: str | None) -> bool:
    """Whether the activation of this name is compiled itself; None is a custom one."""
    return activation is not None and hasattr(_library(), f"rows_{activation}")


@dataclass(frozen=True)
class Evaluator:
    """An output activation as the compiled loss takes it; see :func:`evaluator`.

    Attributes:
        log_g: The activation.
        program: What is interpreted; None where the activation is compiled itself.
    """

    log_g: Activation
    program: Program | None = None

    def call(self, function: str, *arguments: Any) -> None:
        """Call one of the library's functions, with as many threads as PyTorch's."""
        threads = ctypes.c_int(torch.get_num_threads())
        symbol = f"program_{function}" if self.program else f"{function}_{name_of(self.log_g)}"
        program = None if self._structure is None else ctypes.byref(self._structure)
        getattr(_library(), symbol)(program, *arguments, threads)

    def reproduces(self, recording: Recording) -> bool:
        """Whether its program makes of the row what the function made: it may do more than PyTorch dispatches."""
        library = _library()
        assert library is not None
        assert self._structure is not None
        rows = [row.contiguous() for row in (recording.logits, recording.score, recording.slope)]
        count = ctypes.c_int64(rows[0].numel())
        return bool(library.reproduces(ctypes.byref(self._structure), *map(_pointer, rows), count))

    def trusts(self, nll: Tensor) -> bool:
        """Whether the losses that it made are right.

        Those of a program are NaN where ``g`` comes near ``e^64`` times that of the largest logit. The activations that
        are compiled do not decrease.
        """
        return self.program is None or not bool(nll.isnan().any())

    @cached_property
    def _structure(self) -> _Program | None:
        if (program := self.program) is None:
            return None
        return _Program(
            _pointer(program.steps),
            _pointer(program.constants),
            program.steps_to_score,
            len(program.steps),
            len(program.constants),
            program.registers,
            program.score,
            program.slope,
        )


class _Program(ctypes.Structure):
    """A :class:`Program` as ``interpreter.h`` has it."""

    _fields_ = [
        ("steps", ctypes.c_void_p),
        ("constants", ctypes.c_void_p),
        *(
            (name, ctypes.c_int32)
            for name in ("steps_to_score", "steps_to_slope", "constant_count", "register_count", "score", "slope")
        ),
    ]


def evaluator(log_g: Activation, types: int, gradient: bool) -> Evaluator | None:
    """Return what takes an activation; None where there is no compiler, or it is no program.

    Args:
        log_g: An activation that holds no tensor with a gradient; without ``gradient`` any.
        types: V.
        gradient: Whether its derivative will be wanted.
    """
    if not available():
        return None
    if serves(name_of(log_g)):
        return Evaluator(log_g)
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return None
    if (recording := record(log_g, types, gradient, _operations())) is None:
        return None
    found = Evaluator(log_g, recording.program)
    return found if found.reproduces(recording) else None


def score_and_differentiate(logits: Tensor, target: Tensor, evaluator: Evaluator, differentiate: bool) -> Tensor:
    """Turn rows of logits into their negative log-likelihoods and, in place, into gradients.

    With ``p`` the distribution of a row and ``y`` its target, one-hot, the row becomes ``(p - y) * d log_g / dz``. Uses
    as many threads as PyTorch.

    Args:
        logits: Shape (n, V), float32, contiguous, on the CPU. Overwritten if ``differentiate``.
        target: Shape (n,), int64, each below V.
        evaluator: What takes the output activation.
        differentiate: Whether to overwrite ``logits`` with the gradient.

    Returns:
        Nats, shape (n,), float32: within float32's rounding of the float64 value. So is the gradient, but
        that a probability below ``exp(-64)`` of the row's largest counts as 0. A program's scores are float32, and its
        losses NaN where :meth:`Evaluator.trusts` does not.

    Raises:
        ValueError: The tensors are not as described.
        IndexError: A target is negative, or not below V.
    """
    rows, columns = logits.shape
    for name, tensor, shape, dtype in (
        ("logits", logits, (rows, columns), torch.float32),
        ("target", target, (rows,), torch.int64),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: "
                f"expected {shape}, {dtype}, contiguous, on the CPU"
            )
    check_targets(target, columns)
    nll = logits.new_empty(rows)
    evaluator.call(
        "rows",
        *map(_pointer, (logits, target, nll)),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_int(differentiate),
    )
    return nll


class Bands:
    """Losses and derivatives of rows whose logits come in bands of the vocabulary, in bfloat16.

    Every band is given to :meth:`add`, and then, made anew, to :meth:`differentiate`. Uses as many threads as PyTorch.

    Args:
        target: Shape (n,), int64, contiguous, each below V, which is not checked.
        evaluator: What takes the output activation.
    """

    def __init__(self, target: Tensor, evaluator: Evaluator) -> None:
        self.target, self.evaluator = target, evaluator
        self.peak = torch.full_like(target, torch.finfo(torch.float32).min, dtype=torch.float32)
        self.sum = torch.zeros_like(target, dtype=torch.float64)  # of g, relative to that of the peak
        self.of_target = torch.zeros_like(self.peak)

    def add(self, logits: Tensor, first: int) -> None:
        """Take logits, shape (n, m), contiguous, of the types from ``first`` on."""
        self._call("add_band", logits, self.target, self.peak, self.sum, self.of_target, first=first)

    def losses(self) -> Tensor | None:
        """Return the rows' losses in nats, shape (n,), float32, when all bands have been taken.

        None where they are not to be trusted (:meth:`Evaluator.trusts`).
        """
        nll, rows = torch.empty_like(self.peak), ctypes.c_int64(len(self.peak))
        self.evaluator.call("bands_losses", *map(_pointer, (self.peak, self.sum, self.of_target, nll)), rows)
        return nll if self.evaluator.trusts(nll) else None

    def differentiate(self, logits: Tensor, first: int, row_weight: Tensor) -> None:
        """Overwrite a band with the derivatives of the losses' sum weighted by ``row_weight``: (n,), float32."""
        self._call("differentiate_band", logits, self.target, self.peak, self.sum, row_weight, first=first)

    def _call(self, name: str, *tensors: Tensor, first: int) -> None:
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert tensors[0].dtype == torch.bfloat16
        self.evaluator.call(name, *map(_pointer, tensors), *map(ctypes.c_int64, (*tensors[0].shape, first)))


def serves_tiles(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether :func:`tiled_losses_and_gradients` takes these tensors, and products of this dtype."""
    return (
        weight.is_cpu
        and weight.is_contiguous()
        and {hidden.dtype, weight.dtype, dtype} <= {torch.float32, torch.bfloat16}
        and (library := _library()) is not None
        and bool(library.tiles_take(ctypes.c_int64(weight.shape[1])))
    )


def tiled_losses_and_gradients(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    evaluator: Evaluator,
    *,
    rounded: bool,
    chunk: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the losses, and the gradients of their weighted sum, by tiles of the vocabulary.

    Sums are float32, and with ``rounded`` nothing is rounded but the factors of the logits. Uses as many threads as
    PyTorch.

    Args:
        rows: Hidden vectors, shape (n, d), float32 or bfloat16, contiguous.
        weight: Shape (V, d), one that :func:`serves_tiles` accepts.
        bias: Shape (V,), float32, contiguous, or None.
        target: Shape (n,), int64, contiguous, each below V, which is not checked.
        row_weight: Shape (n,), float32, contiguous.
        evaluator: What takes the output activation.
        rounded: Whether rows and weight are to be rounded to bfloat16.
        chunk: Rows whose logits are held at a time.
        wanted: Whether the gradients of rows, weight and bias are.

    Returns:
        Nats, shape (n,), float32, and gradients, float32; None where not wanted.
    """
    nll = row_weight.new_empty(len(rows))
    made = zip((rows, weight, bias), wanted, strict=True)
    gradients = [torch.empty_like(t, dtype=torch.float32) if want and t is not None else None for t, want in made]
    if not len(rows):
        return nll, [None if gradient is None else gradient.zero_() for gradient in gradients]
    evaluator.call(
        "tiles",
        _pointer(rows),
        ctypes.c_int(rows.dtype == torch.bfloat16),
        _pointer(weight),
        ctypes.c_int(weight.dtype == torch.bfloat16),
        ctypes.c_int(rounded),
        *map(_pointer, (bias, target, row_weight, nll, *gradients)),
        *map(ctypes.c_int64, (*rows.shape, len(weight), chunk)),
    )
    return nll, gradients


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@cache
def _operations() -> list[str]:
    library = _library()
    assert library is not None
    function = library.operations
    function.restype = ctypes.c_char_p
    return function().decode().split()


@cache
def _library() -> ctypes.CDLL | None:
    chosen = os.environ.get("CXX")
    command = shlex.split(chosen or "c++")
    if os.name != "posix" or os.environ.get(COMPILE_VARIABLE) == "0":
        return None
    if shutil.which(command[0]) is None:
        if chosen:
            warnings.warn(f"there is no compiler CXX={chosen!r}: PyTorch's operations do the loss", stacklevel=2)
        return None
    try:
        return ctypes.CDLL(str(_compiled(*command)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(
            f"the faster loss could not be compiled, so PyTorch's operations do its work: {reason}\n"
            f"{COMPILE_VARIABLE}=0 turns it off and this warning too.",
            stacklevel=2,
        )
        return None


def _compiled(*compiler: str) -> Path:
    """Compile for this machine, unless that is in the cache, and return the library's path."""
    # What the compiler predefines names its version and every extension of the processor: a home folder may be shared.
    machine = _run(*compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
    sources = [source.read_bytes() for source in _SOURCES]
    digest = hashlib.sha256(b"\0".join([*sources, " ".join(_FLAGS).encode(), machine])).hexdigest()
    path = _private(cache_dir() / "compiled") / f"loss-{digest[:16]}.so"
    with exclusive(path):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                units = [str(source) for source in _SOURCES if source.suffix == ".cpp"]
                _run(*compiler, *_FLAGS, "-shared", *units, "-o", f"{folder}/library.so")
                with atomic_write(path) as file:
                    file.write(Path(folder, "library.so").read_bytes())
    return path


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout


def _private(folder: Path) -> Path:
    """Make a folder that nobody else can write to: what lies in it is run."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} belongs to somebody else or can be written by others: make it yours alone (chmod 700)")
    return folder
