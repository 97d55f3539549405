"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lit_sigsoftmax import training

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run ``lit-sigsoftmax``.

    Args:
        args: The command line, ``sys.argv[1:]`` by default.
    """
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the user's own modules, also from the console script
    words = list(sys.argv[1:] if args is None else args)
    command, rest = (words or [""])[0], words[1:]
    # Imported where they are needed: a run that only trains does not wait for SciPy.
    if command == "compare":
        from lit_sigsoftmax.compare.command import compare

        compare(rest)
    elif command == "report":
        from lit_sigsoftmax.compare.report import report

        report(rest)
    elif command == "ui":
        from lit_sigsoftmax.ui import serve

        serve(rest)
    else:
        training.run(words)
