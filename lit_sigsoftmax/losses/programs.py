"""An output activation as a program of PyTorch's elementwise operations, for the compiled loss.

The function is run once on a row of logits, and the operations that PyTorch dispatches for it and for autograd's way
back are written down: the derivative is autograd's own, custom functions and ``detach()`` included. ``interpreter.h``
does them on logits that are in the cache. They are recorded anew for every loss, so that numbers which the function
uses may change from step to step, and compared with what came of that row.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import set_detect_anomaly
from torch.utils._python_dispatch import TorchDispatchMode

from lit_sigsoftmax.activations import Activation, derivative_of
from lit_sigsoftmax.losses.pointwise import scores_of

__all__ = ["Program", "Recording", "record"]


@dataclass(frozen=True)
class Program:
    """From logits, in register 0, and constants, in the next ones, to log g and its derivative.

    Attributes:
        steps: int32, shape (m, 6): the number of an operation, the register of its result, and four of its arguments.
        constants: float32, shape (c,).
        steps_to_score: So many steps lead to log g; all of them to its derivative as well.
        registers: How many there are.
        score: The register of log g.
        slope: The register of its derivative.
    """

    steps: Tensor
    constants: Tensor
    steps_to_score: int
    registers: int
    score: int
    slope: int


class Recording(NamedTuple):
    """A program, and what the function itself made of a row.

    Attributes:
        program: What was recorded.
        logits: The row, shape (1, V), float32, as are the others.
        score: Its log g.
        slope: The derivative, or log g where none was wanted.
    """

    program: Program
    logits: Tensor
    score: Tensor
    slope: Tensor


def record(log_g: Activation, types: int, gradient: bool, operations: Sequence[str]) -> Recording | None:
    """Record an activation; None where it does anything else, or has no derivative.

    Args:
        log_g: An activation that holds no tensor with a gradient; without ``gradient`` any.
        types: V: it is shown a row of so many logits.
        gradient: Whether the derivative is wanted.
        operations: The names of those that the interpreter knows, in the order of their numbers.
    """
    derivative = derivative_of(log_g)
    by_autograd = gradient and derivative is None
    logits = torch.linspace(-_FARTHEST, _FARTHEST, types, dtype=torch.float32, device="cpu").unsqueeze(0)
    recorder = _Recorder(operations, logits.requires_grad_(by_autograd))
    try:
        # torch.compile would give up a function for good that it sees under a dispatch mode.
        with _ONE_AT_A_TIME, torch.compiler.set_stance("force_eager"), set_detect_anomaly(False), recorder:
            with torch.set_grad_enabled(by_autograd):
                score = slope = scores_of(log_g, logits)
                steps_to_score = len(recorder.steps)
                if gradient and derivative is not None:
                    slope = derivative(logits)
            if by_autograd:
                (slope,) = torch.autograd.grad(score, logits, recorder.ones)
        results = recorder.operand(score), recorder.operand(slope)
    except Exception:  # the function's own, about these logits, is raised by the next way if it is about others too
        return None
    if recorder.failed or {score.dtype, slope.dtype} != {torch.float32} or slope.shape != logits.shape:
        return None
    program = _compact(recorder.steps, steps_to_score, *results)
    return Recording(program, logits.detach(), score.detach(), slope.detach())


_FARTHEST = 12.0  # logit of the row: ordinary ones of either sign
_ONE_AT_A_TIME = threading.RLock()  # stance and anomaly detection are the process's, and put back


class _NoProgramError(Exception):
    """The activation does something else than elementwise operations that the interpreter knows."""


class _Constant(NamedTuple):
    number: float
    sign: float  # of a zero, which is all the same to ==


_Operand = int | _Constant  # an int is the number of a value: 0 of the logits, n of what the n-th step makes
_Step = tuple[int, list[_Operand]]  # an operation and its operands


class _Recorder(TorchDispatchMode):
    """Writes down the operations on tensors of the logits' shape."""

    def __init__(self, operations: Sequence[str], logits: Tensor) -> None:
        super().__init__()
        self.operations = {name: number for number, name in enumerate(operations)}
        self.logits, self.ones = logits, logits.new_ones(()).expand_as(logits)
        self.steps: list[_Step] = []
        self.failed = False
        self._known: dict[int, tuple[Tensor, _Operand]] = {}  # by identity, so the tensors must not go
        self._know(self.logits, 0)
        self._know(self.ones, self.operand(1.0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.failed:
            try:
                self._write(func._schema, args, kwargs or {}, result)
            except _NoProgramError:  # which is none of the function's business
                self.failed = True
        return result

    def _write(self, schema: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        name = schema.name.removeprefix("aten::")
        out = result[0] if name == "log_sigmoid_forward" else result
        if not isinstance(out, Tensor) or out.dtype not in (torch.float32, torch.bool):
            raise _NoProgramError
        if schema.is_mutable:  # in place, which no other tensor may notice
            known = (tensor for tensor, _ in self._known.values())
            if any(argument.is_out for argument in schema.arguments) or any(
                t is not out and _share_memory(t, out) for t in known
            ):
                raise _NoProgramError
            name = name.removesuffix("_")
        given = {argument.name: argument.default_value for argument in schema.arguments}
        given |= dict(zip(given, args, strict=False)) | kwargs
        if name in _CONSTANTS and out.dtype == torch.float32:
            self._know(out, self.operand(_CONSTANTS[name](given)))
        elif out.shape == self.logits.shape and out is not self.logits:
            self._know(out, self._value(name, given, out.dtype == torch.bool))
        else:
            raise _NoProgramError

    def operand(self, given: Any) -> _Operand:
        """What an operation's argument is: the value that a tensor is known to have, or a number."""
        if isinstance(given, Tensor):
            if id(given) in self._known:
                return self._known[id(given)][1]
            if given.dim() or not given.is_cpu:
                raise _NoProgramError
            given = given.item()
        if not isinstance(given, (bool, int, float)):
            raise _NoProgramError
        return _Constant(float(given), math.copysign(1, given))

    def _know(self, tensor: Tensor, value: _Operand) -> None:
        self._known[id(tensor)] = (tensor, value)

    def _value(self, name: str, given: dict[str, Any], is_truth: bool) -> _Operand:
        unusual = any(given.get(key, usual) != usual for key, usual in _USUAL.items())
        if unusual or (is_truth and name not in _TRUTHS):
            raise _NoProgramError
        operands = {key: value for key, value in given.items() if key not in _USUAL and key not in _WITHOUT_MEANING}
        if name == "clamp":
            operands = {key: _ENDS[key] if value is None else value for key, value in operands.items()}
        if name == "pow":
            name = _POWERS.get(operands.pop("exponent"), "")
        name = _OTHER_NAMES.get(name, name)
        found = [self.operand(value) for value in operands.values()]
        if name == "same":
            return found[0]
        if name not in self.operations:
            raise _NoProgramError
        step = self.operations[name], found
        if step not in self.steps:  # nor is anything computed twice
            self.steps.append(step)
        return self.steps.index(step) + 1


_CONSTANTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "full_like": lambda given: given["fill_value"],
    "ones_like": lambda given: 1,
    "scalar_tensor": lambda given: given["s"],
    "zeros_like": lambda given: 0,
}
_POWERS = {1: "same", 2: "square", 3: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
_ENDS = {"min": -math.inf, "max": math.inf}
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
# Operations whose result may be true or false.
_TRUTHS = _COMPARISONS | {"logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"}
_TRUTHS |= {"where", "detach", "clone", "alias"}
_OTHER_NAMES = {
    "sign": "sgn",
    "bitwise_and": "logical_and",
    "bitwise_or": "logical_or",
    "bitwise_not": "logical_not",
} | dict.fromkeys(("_to_copy", "alias", "clone", "detach", "lift_fresh"), "same")
# Arguments that the interpreter does not take: it serves their usual value, or any.
_USUAL = {"alpha": 1, "rounding_mode": None, "self_is_result": False}
_WITHOUT_MEANING = {"buffer", "device", "dtype", "layout", "memory_format", "non_blocking", "pin_memory"}


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _compact(steps: Sequence[_Step], steps_to_score: int, *results: _Operand) -> Program:
    """Leave out the steps that lead nowhere, and give each value a register, again once it is not needed any more."""
    last_use: dict[_Operand, int] = dict.fromkeys(results, len(steps) + 1)
    for number in range(len(steps), 0, -1):
        if number in last_use:
            for operand in steps[number - 1][1]:
                last_use.setdefault(operand, number)
    constants = [operand for operand in last_use if isinstance(operand, _Constant)]
    registers: dict[_Operand, int] = {0: 0} | {constant: k for k, constant in enumerate(constants, start=1)}
    count, free, code, kept_to_score = len(registers), list[int](), list[list[int]](), 0
    for number, (operation, operands) in enumerate(steps, start=1):
        if number not in last_use:
            continue
        arguments = [registers[operand] for operand in operands]
        free += {registers[o] for o in operands if isinstance(o, int) and o and last_use[o] == number}
        if not free:
            free.append(count)
            count += 1
        registers[number] = free.pop()
        code.append([operation, registers[number], *arguments, *[0] * (4 - len(arguments))])
        kept_to_score += number <= steps_to_score
    score, slope = (registers[result] for result in results)
    return Program(
        torch.tensor(code, dtype=torch.int32, device="cpu").view(-1, 6),
        torch.tensor([c.number for c in constants], dtype=torch.float32, device="cpu"),
        kept_to_score,
        count,
        score,
        slope,
    )
