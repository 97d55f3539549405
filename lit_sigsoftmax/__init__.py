"""Output layers for language models, head to head: softmax, sigsoftmax and their mixtures.

Every output layer here is an output activation ``log_g`` (see :mod:`lit_sigsoftmax.activations`) and a mixture size:
``log p = log_g(z) - logsumexp(log_g(z))``, mixed over ``n_experts`` projections of the hidden vector.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_sigsoftmax.activations import available_activations as available_activations
    from lit_sigsoftmax.activations import get_activation as get_activation
    from lit_sigsoftmax.activations import register_activation as register_activation
    from lit_sigsoftmax.heads import OutputHead as OutputHead
    from lit_sigsoftmax.module import LanguageModel as LanguageModel

__version__ = "0.1.0"

# Loaded when first used, so that the functional part costs no import of Lightning.
_HOME = {
    "LanguageModel": "lit_sigsoftmax.module",
    "OutputHead": "lit_sigsoftmax.heads",
    "available_activations": "lit_sigsoftmax.activations",
    "get_activation": "lit_sigsoftmax.activations",
    "register_activation": "lit_sigsoftmax.activations",
}

__all__ = [
    "LanguageModel",
    "OutputHead",
    "__version__",
    "available_activations",
    "get_activation",
    "register_activation",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
