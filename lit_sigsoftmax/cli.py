"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lit_sigsoftmax import training
from lit_sigsoftmax.compare import compare
from lit_sigsoftmax.ui import serve

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run ``lit-sigsoftmax``.

    Args:
        args: The command line, ``sys.argv[1:]`` by default.
    """
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the user's own modules, also from the console script
    words = list(sys.argv[1:] if args is None else args)
    commands = {"compare": compare, "ui": serve}
    if words and words[0] in commands:
        commands[words[0]](words[1:])
    else:
        training.run(words)
