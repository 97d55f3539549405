r"""Output activations: the idea of this library on one page.

A language model turns a hidden vector into logits ``z`` over the vocabulary. An output activation is a function
``log_g`` that maps the logits elementwise to unnormalised log-scores; the distribution is

.. math:: \log p = \log g(z) - \operatorname{logsumexp}(\log g(z)).

Softmax is ``log_g(z) = z``: every vector of log-probabilities is then the logits plus a constant, so a matrix of them
has rank ``hidden_size + 1`` at the most, one more with a bias (Yang et al., ICLR 2018). Any activation that is
nonlinear in log space breaks that cap with no extra parameters; sigsoftmax, ``log_g(z) = z + logsigmoid(z)``, is the
one that Kanai et al. (NeurIPS 2018) derived.

A *specification* names an activation in a recipe, a checkpoint or a tracked run:

- a registered name: ``"sigsoftmax"``;
- the import path of a function or of an ``nn.Module`` class: ``"my_module.my_log_g"``;
- ``{"class_path": "my_module.MyActivation", "init_args": {...}}`` for an ``nn.Module`` with arguments.

A callable itself (a lambda, an ``nn.Module``) serves too. Everything else in the library is written once against
``log_g`` and knows no activation by name.
"""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Activation",
    "ActivationSpec",
    "activation_spec",
    "available_activations",
    "derivative_of",
    "get_activation",
    "name_of",
    "register_activation",
    "relu",
    "sigmoid",
    "sigsoftmax",
    "softmax",
]

Activation = Callable[[Tensor], Tensor]
ActivationSpec = str | dict[str, Any] | Activation

_T = TypeVar("_T", bound=Activation)
_REGISTRY: dict[str, Activation] = {}
_DERIVATIVES: dict[str, Activation] = {}


def register_activation(name: str, derivative: Activation | None = None) -> Callable[[_T], _T]:
    """Register a function, or an ``nn.Module`` class without required arguments, as an output activation.

    Once registered, the activation is launched, tested, compared and benchmarked by its name.

    Args:
        name: The name that recipes and the command line use.
        derivative: From logits to ``d log_g / dz``, elementwise. It spares the fused loss the graph of ``log_g``; a
            function without one, and any ``nn.Module``, is differentiated by autograd, and so are the tensors it holds.

    Raises:
        ValueError: The name is taken, the derivative is not the function's at some points, or the function changes its
            input, or holds tensors that want a gradient, which a derivative would keep from them.

    Example:
        >>> from lit_sigsoftmax.activations import available_activations, register_activation
        >>> available_activations()
        ('relu', 'sigmoid', 'sigsoftmax', 'softmax')
    """

    def register(log_g: _T) -> _T:
        if name in _REGISTRY:
            raise ValueError(f"output activation {name!r} is already registered: choose another name")
        if derivative is not None:
            _check_derivative(name, log_g, derivative)
            _DERIVATIVES[name] = derivative
        _REGISTRY[name] = log_g
        return log_g

    return register


_POINTS, _STEP = (-3.7, -1.3, -0.41, 0.23, 0.9, 2.6, 7.1), 1e-6


def _check_derivative(name: str, log_g: Activation, derivative: Activation) -> None:
    of = f"output activation {name!r} is registered with a derivative, "
    if inspect.isclass(log_g):
        raise ValueError(f"{of}but it is a class, whose modules autograd differentiates: leave the derivative out")
    for point in _POINTS:  # one by one, or OpenMP would start its threads, and a process that has them cannot fork
        z = torch.tensor([[point]], dtype=torch.float64, device="cpu")
        with torch.enable_grad():
            try:
                scores = log_g(z)
            except RuntimeError:  # not for a CPU, or not for float64: it cannot be checked here
                return
        if scores.requires_grad:
            raise ValueError(f"{of}but it holds tensors that want a gradient of their own: leave the derivative out")
        if z.item() != point:
            raise ValueError(f"{of}but it changes its input: let it return a new tensor")
        given, slope = derivative(z), ((log_g(z + _STEP) - log_g(z - _STEP)) / (2 * _STEP)).item()
        if given.shape != z.shape or not math.isclose(given.item(), slope, rel_tol=1e-3, abs_tol=1e-5):
            raise ValueError(f"{of}which at z = {point} is {given.tolist()}; the function's is [[{slope:.4f}]]")


@register_activation("softmax", derivative=torch.ones_like)
def softmax(logits: Tensor) -> Tensor:
    """``log g(z) = z``: the layer that every other one is compared with."""
    return logits


@register_activation("sigsoftmax", derivative=lambda z: 2 - torch.sigmoid(z))
def sigsoftmax(logits: Tensor) -> Tensor:
    """``log g(z) = z + log sigmoid(z)``, that is ``g(z) = exp(z) sigmoid(z)`` (Kanai et al. 2018, Definition 1)."""
    return logits + F.logsigmoid(logits)


@register_activation("sigmoid", derivative=lambda z: torch.sigmoid(-z))
def sigmoid(logits: Tensor) -> Tensor:
    """A rival with a bounded ``g``: ``g(z) = 1 / (1 + exp(-z))`` (ibid.)."""
    return F.logsigmoid(logits)


@register_activation("relu", derivative=lambda z: torch.where(z > 0, 1 / (z + 1e-8), 0.0))
def relu(logits: Tensor) -> Tensor:
    """``log g(z) = log(max(z, 0) + 1e-8)``: a rival whose gradient ``1 / (z + 1e-8)`` is known to be unstable (ibid.).

    The floor keeps every token possible, so unlike the other activations this one does not turn ``-inf`` into a mask.
    """
    return torch.log(F.relu(logits) + 1e-8)


def widen(x: Tensor) -> Tensor:
    """Return float16 and bfloat16 as float32, anything else as it is: what an activation gets to see."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def available_activations() -> tuple[str, ...]:
    """Return the registered names, sorted."""
    return tuple(sorted(_REGISTRY))


def name_of(log_g: Activation) -> str | None:
    """Return the registered name of a function, None where it has none."""
    return next((name for name, known in _REGISTRY.items() if known is log_g), None)


def derivative_of(log_g: Activation) -> Activation | None:
    """Return the derivative that ``log_g`` was registered with, if any."""
    return _DERIVATIVES.get(name_of(log_g) or "")


def get_activation(spec: ActivationSpec) -> Activation:
    """Turn a specification (see the module's docstring) into the callable ``log_g``.

    Args:
        spec: A registered name, an import path, ``{"class_path": ..., "init_args": {...}}`` or a callable.

    Returns:
        A callable, elementwise on logits of shape (..., vocab_size). An ``nn.Module`` may hold parameters.

    Raises:
        ValueError: The name is unknown, the import path does not resolve, or the specification has another form.
        TypeError: What the path names is not callable, or its ``class_path`` is not an ``nn.Module`` class.

    Example:
        >>> import torch
        >>> get_activation("sigsoftmax")(torch.tensor([0.0]))
        tensor([-0.6931])
    """
    if isinstance(spec, str):
        found = _REGISTRY.get(spec) or _import(spec)
        return _build(found, {}, spec) if inspect.isclass(found) else found
    if isinstance(spec, dict):
        if "custom" in spec:
            raise ValueError(
                f"the output activation was a custom callable, {spec['custom']}, which a checkpoint cannot hold: "
                "hand it over again, as in load_from_checkpoint(path, activation=...)"
            )
        if not {"class_path"} <= set(spec) <= {"class_path", "init_args"}:
            raise ValueError(
                f"an activation given as a mapping has the key 'class_path' and may have 'init_args', not {spec}"
            )
        return _build(_import(spec["class_path"]), spec.get("init_args") or {}, spec["class_path"])
    if inspect.isclass(spec):
        return _build(spec, {}, spec.__name__)
    if callable(spec):
        return spec
    raise TypeError(f"an activation is a name, an import path, a mapping or a callable, not {type(spec).__name__}")


def activation_spec(spec: ActivationSpec) -> str | dict[str, Any]:
    """Return plain data from which :func:`get_activation` rebuilds the activation, for checkpoints and tracking.

    A callable that no name or import path leads back to is recorded as ``{"custom": description}``;
    :func:`get_activation` refuses that form, so that such a checkpoint never comes back as another activation.
    """
    if isinstance(spec, (str, dict)):
        return spec
    if registered := name_of(spec):
        return registered
    module, name = getattr(spec, "__module__", None), getattr(spec, "__qualname__", "")
    if module not in (None, "__main__") and getattr(sys.modules.get(str(module)), name, None) is spec:
        return f"{module}.{name}"
    return {"custom": f"{module}.{name}" if name else type(spec).__qualname__}


def vouched_for(recorded: str | dict[str, Any], given: str | dict[str, Any]) -> bool:
    """Whether ``given`` may be the custom callable that a checkpoint recorded: one of that name, wherever it is found.

    A function of a script that is run is ``__main__.f`` there and ``script.f`` when it is imported.
    """
    if not (isinstance(recorded, dict) and "custom" in recorded):
        return False
    name = given if isinstance(given, str) else str(given.get("custom"))
    return name not in _REGISTRY and name.rpartition(".")[2] == recorded["custom"].rpartition(".")[2]


def _import(path: str) -> Activation:
    module, _, name = path.rpartition(".")
    if not module:
        close = difflib.get_close_matches(path, _REGISTRY, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown output activation {path!r}.{hint} Known: {', '.join(available_activations())}; "
            "or give an import path such as my_module.my_log_g"
        )
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"output activation {path!r} cannot be imported: {error}") from error
    if not callable(found):
        raise TypeError(f"output activation {path!r} is a {type(found).__name__}, not a function or nn.Module class")
    return found


def _build(cls: Any, init_args: dict[str, Any], path: str) -> Activation:
    # Only modules: a specification comes from files, and must not become a way to call anything importable.
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise TypeError(f"class_path {path!r} of an output activation is not an nn.Module class")
    try:
        return cls(**init_args)
    except TypeError as error:
        raise TypeError(f"output activation {path!r} with init_args {init_args}: {error}") from error
