"""The command line's parser: LightningCLI's, with errors of one line."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

__all__ = ["Parser", "one_line", "place"]

# What jsonargparse says besides, of the alternatives that a type has and of a whole object.
_ASIDES = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value type:"
    r"|Given value: (Namespace|NestedArg|\{)"
)


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, without the list of all options before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        sys.stderr.write(f"error: {one_line(message)}\nAll options: {self.prog.replace(' [options]', '')} --help\n")
        raise SystemExit(2)


def one_line(message: str) -> str:
    """Return the part of an error message that says what is wrong, with the nearest name that would be right."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = " ".join(line for line in lines if line and not _ASIDES.match(line))
    return kept + _suggestion(kept)


def place(error: BaseException) -> str:
    """Return where an error arose, if in somebody else's class: it is then not a mistake in the command line."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    frames = traceback.extract_tb(cause.__traceback__)
    known = ("lit_sigsoftmax", "lightning", "jsonargparse", "recipes")
    if not frames or any(part in known for part in Path(frames[-1].filename).parts):
        return ""
    return f" ({type(cause).__name__} in {frames[-1].filename}, line {frames[-1].lineno})"


def _suggestion(message: str) -> str:
    unknown = re.search(r"class_path '([\w.]+)': Option '([\w.]+)' is not accepted", message)
    if unknown:
        name, known = unknown[2], _parameters(unknown[1])
    elif unknown := re.search(r"(?:option '|--)(trainer\.\w+)", message):
        name, known = unknown[1], [f"trainer.{parameter}" for parameter in inspect.signature(Trainer).parameters]
    else:
        return ""
    close = [] if name in known else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    classes = inspect.getmro(getattr(import_module(module), name))
    return [parameter for cls in classes if cls is not object for parameter in inspect.signature(cls).parameters]
