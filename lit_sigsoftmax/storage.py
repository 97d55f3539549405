"""Where downloads and encoded corpora are kept, and how concurrent processes write there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

__all__ = ["CACHE_VARIABLE", "atomic_write", "cache_dir", "exclusive"]

CACHE_VARIABLE = "LIT_SIGSOFTMAX_CACHE"


def cache_dir() -> Path:
    """``$LIT_SIGSOFTMAX_CACHE``, else ``$XDG_CACHE_HOME/lit_sigsoftmax``, else ``~/.cache/lit_sigsoftmax``."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_sigsoftmax"


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time work on ``path``; the others wait here. A killed process gives the lock up.

    Raises:
        OSError: If the folder of ``path`` cannot be made or written to.
    """
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise OSError(
            f"cannot write to {path.parent} ({error.strerror or error}): "
            f"set {CACHE_VARIABLE} to a folder that can be written to"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path`` when the block ends, or vanishes if the block raises.

    The caller holds :func:`exclusive`: the temporary name is the same for every process, so that what a killed one left
    is overwritten by the next.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
