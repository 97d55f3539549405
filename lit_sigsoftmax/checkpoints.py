"""Checkpoint files: written whole or not at all, checked before they are read, and data only."""

from __future__ import annotations

import lzma
import os
import shutil
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

__all__ = [
    "LAST",
    "CheckpointError",
    "CheckpointFiles",
    "CheckpointWriteError",
    "keep_previous",
    "open_checkpoint",
    "previous_path",
    "readable_last",
    "verify",
]

LAST = "last.ckpt"


class CheckpointError(ValueError):
    """A checkpoint cannot be used: damaged, or of another model, corpus or configuration."""


class CheckpointWriteError(OSError):
    """A checkpoint cannot be written."""


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, with the guarantees that a crash and a damaged disk call for.

    Lightning replaces a file in one step, but does not wait until the disk has it, checks nothing when it reads, and
    leaves ``weights_only`` to torch. A file elsewhere than on a local disk is left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a temporary file, wait until the disk has it, and put it in the place of the old one.

        Raises:
            CheckpointWriteError: The disk is full or cannot be written; the file that was there is untouched.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            reason = _write_error(error)
            with suppress(OSError):
                temporary.unlink()
            raise CheckpointWriteError(
                f"the checkpoint {path} could not be written: {reason}. What was written before is untouched: make "
                "room, or name another folder with checkpoint.dirpath, and continue with --ckpt_path last"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Check a file and read it, onto the CPU; nothing in it can run unless ``weights_only`` is False.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: It is damaged, no checkpoint, or holds something other than data.
        """
        if "://" not in str(path):
            verify(path)
        try:
            weights_only = True if weights_only is None else weights_only
            return super().load_checkpoint(path, map_location or _on_cpu, weights_only)
        except UnpicklingError as error:
            raise CheckpointError(
                f"{path} is refused, it holds more than data: {str(error).splitlines()[0]}"
            ) from error


def _on_cpu(storage: Any, location: str) -> Any:
    return storage


def verify(path: str | Path) -> None:
    """Read a checkpoint's bytes against their checksums, which torch writes but does not compare.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is cut short, damaged, or no checkpoint.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        # A flipped bit in the archive's directory asks for another compression, a password, a place before the file ...
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError):
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: it is cut short, damaged, or another kind of file"
            ) from None
    if damaged:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: it is damaged in {damaged}")


def open_checkpoint(path: str | Path) -> dict[str, Any]:
    """Check a file and open it; the weights are read when they are used.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, no checkpoint, or holds something other than data.
    """
    verify(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except UnpicklingError as error:
        raise CheckpointError(f"{path} is refused, it holds more than data: {str(error).splitlines()[0]}") from error
    except Exception as error:  # a foreign file may break torch's reader anywhere
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {type(error).__name__} {error}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} cannot be read as a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def previous_path(path: str | Path) -> Path:
    """Return where :func:`keep_previous` keeps a checkpoint."""
    return Path(path).with_name(f"{Path(path).stem}-previous{Path(path).suffix}")


def keep_previous(path: str | Path) -> None:
    """Let a checkpoint that is about to be replaced stay under a second name, without copying where links exist."""
    if not os.path.exists(path):
        return
    previous = previous_path(path)
    temporary = previous.with_name(f"{previous.name}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, previous)


def readable_last(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Open a run's last checkpoint, or with a warning the one before it where the last cannot be used.

    Args:
        folder: The run's folder of checkpoints.

    Returns:
        The path and what :func:`open_checkpoint` returns, None where the folder has neither.

    Raises:
        CheckpointError: Neither can be read.
    """
    last = Path(folder, LAST)
    errors = []
    for path in (last, previous_path(last)):
        try:
            checkpoint = open_checkpoint(path)
        except FileNotFoundError:
            errors.append(f"there is no {path}")
        except CheckpointError as error:
            errors.append(str(error))
        else:
            if errors:
                rank_zero_warn(f"{errors[0]}; going on from the one before it, {path.name}")
            return path, checkpoint
    if not last.exists() and not previous_path(last).exists():
        return None
    raise CheckpointError("; ".join(errors))


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # a rename is on the disk when its folder is
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_error(error: BaseException) -> str:
    while not isinstance(error, OSError) and (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return str(error).splitlines()[0]
