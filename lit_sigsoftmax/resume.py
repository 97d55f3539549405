"""Which checkpoint ``fit`` goes on from: that of an interrupted run of the same configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lit_sigsoftmax.checkpoints import LAST, CheckpointError, previous_path, readable_last
from lit_sigsoftmax.tracking import flatten, open_client, store_root

__all__ = ["Resumption", "in_folder", "newest", "run_folder", "run_lock", "settings"]

# What a run may go on with another value of: where things are, and what is only shown.
_FREE = (
    "config",
    "ckpt_path",
    "weights_only",
    "checkpoint.dirpath",
    "last_checkpoint",
    "data.root",
    "trainer.default_root_dir",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.logger",
)


@dataclass(frozen=True)
class Resumption:
    """A checkpoint to go on from.

    Args:
        path: The file.
        run_id: The MLflow run that wrote it, None where there was no tracker.
    """

    path: Path
    run_id: str | None


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what decides a run's result, from the resolved configuration of ``fit``: one line for each key."""
    lines = {key: str(value) for key, value in flatten(config)}
    return {k: v for k, v in lines.items() if not any(k == free or k.startswith(f"{free}.") for free in _FREE)}


def run_folder(tracking_uri: str, run_id: str) -> Path:
    """Return where a run keeps its checkpoints."""
    return store_root(tracking_uri) / "checkpoints" / run_id


def run_lock(folder: str | Path) -> FileLock:
    """Return the lock that a training process holds on its folder of checkpoints, and loses when it dies."""
    return FileLock(Path(folder, "training.lock"))


def in_folder(folder: Path, own: Mapping[str, str]) -> Resumption | None:
    """Return the last checkpoint of a folder, None if there is none.

    Args:
        folder: The folder.
        own: The :func:`settings` of the run that is to go on from it.

    Raises:
        CheckpointError: It cannot be read, or is of another configuration.
    """
    if (path := readable_last(folder)) is None:
        return None
    resumption, theirs = _read(path)
    if differences := _differences(theirs, own):
        raise CheckpointError(
            f"{path} is of another configuration: {differences}; make them equal, or use another folder or run"
        )
    return resumption


def newest(tracking_uri: str, own: Mapping[str, str], check_running: bool = True) -> Resumption:
    """Return the last checkpoint of the newest run of this configuration that has been interrupted.

    Args:
        tracking_uri: The store that says which runs have finished.
        own: The :func:`settings` of the run that is to go on.
        check_running: Whether runs that a process is training now are left out.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    root = run_folder(tracking_uri, "")
    reasons = []
    for folder in _newest_first(root):
        path = readable_last(folder)
        if path is None:
            continue
        resumption, theirs = _read(path)
        if differences := _differences(theirs, own):
            reasons.append(f"{folder.name} differs: {differences}")
        elif _finished(tracking_uri, folder.name):
            reasons.append(f"{folder.name} has finished")
        elif check_running and _running(folder):
            reasons.append(f"{folder.name} is still running")
        else:
            return resumption
    newest_reason = f"; the newest, {reasons[0]}" if reasons else ""
    raise CheckpointError(f"no interrupted run of this configuration has a checkpoint in {root}{newest_reason}")


def _newest_first(root: Path) -> Iterator[Path]:
    times = {}
    for folder in root.glob("*/"):
        files = [path for path in (folder / LAST, previous_path(folder / LAST)) if path.is_file()]
        if files:
            times[folder] = max(path.stat().st_mtime_ns for path in files)
    yield from sorted(times, key=lambda folder: times[folder], reverse=True)


def _read(path: Path) -> tuple[Resumption, dict[str, str]]:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # the weights are not read
    return Resumption(path.resolve(), checkpoint.get("run_id")), checkpoint.get("settings", {})


def _differences(theirs: Mapping[str, str], own: Mapping[str, str]) -> str:
    keys = [key for key in dict.fromkeys([*theirs, *own]) if theirs.get(key) != own.get(key)]
    return ", ".join(f"{key} is {theirs.get(key)}, here {own.get(key)}" for key in keys[:5])


def _finished(tracking_uri: str, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(open_client(tracking_uri).get_run(run_id).info.status == "FINISHED")
    except MlflowException:  # a run of another store
        return True


def _running(folder: Path) -> bool:
    try:
        with run_lock(folder).acquire(blocking=False):
            return False
    except Timeout:
        return True
