"""Which checkpoint ``fit`` goes on from: that of an interrupted run of the same configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_warn

from lit_sigsoftmax.checkpoints import LAST, CheckpointError, previous_path, readable_last
from lit_sigsoftmax.spool import spool_folder
from lit_sigsoftmax.store import (
    TrackingError,
    below,
    find_run,
    flatten,
    impatient,
    open_client,
    reason,
    store_root,
    without_password,
)

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
    return {k: v for k, v in lines.items() if not below(k, _FREE)}


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
    if (found := readable_last(folder)) is None:
        return None
    resumption, theirs = _resumption(*found)
    if differences := _differences(theirs, own):
        raise CheckpointError(
            f"{found[0]} is of another configuration: {differences}; make them equal, or use another folder or run"
        )
    return resumption


def newest(
    tracking_uri: str, own: Mapping[str, str], check_running: bool = True, without_store: bool = False
) -> Resumption:
    """Return the last checkpoint of the newest run of this configuration that has been interrupted.

    Args:
        tracking_uri: The store that says which runs have finished.
        own: The :func:`settings` of the run that is to go on.
        check_running: Whether runs that a process is training now are left out.
        without_store: Whether runs count as unfinished where the store does not answer.

    Raises:
        CheckpointError: There is none that can be read.
        TrackingError: The store does not answer.
    """
    root = run_folder(tracking_uri, "")
    reasons = []
    for folder in _newest_first(root):
        try:
            found = readable_last(folder)
        except (CheckpointError, OSError) as error:
            reasons.append(str(error))
            rank_zero_warn(f"left out: {error}")
            continue
        if found is None:  # removed meanwhile
            continue
        resumption, theirs = _resumption(*found)
        if differences := _differences(theirs, own):
            reasons.append(f"{folder.name} differs: {differences}")
        elif _finished(tracking_uri, folder.name, without_store):
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


def _resumption(path: Path, checkpoint: Mapping[str, Any]) -> tuple[Resumption, Mapping[str, str]]:
    theirs = checkpoint.get("settings")  # of a foreign file, none or anything
    return Resumption(path.resolve(), checkpoint.get("run_id")), theirs if isinstance(theirs, dict) else {}


def _differences(theirs: Mapping[str, str], own: Mapping[str, str]) -> str:
    keys = [key for key in dict.fromkeys([*theirs, *own]) if theirs.get(key) != own.get(key)]
    return ", ".join(f"{key} is {theirs.get(key)}, here {own.get(key)}" for key in keys[:5])


def _finished(tracking_uri: str, run_id: str, without_store: bool) -> bool:
    try:
        with impatient():
            run = find_run(open_client(tracking_uri), run_id)
    except TrackingError:
        raise
    except Exception as error:
        if without_store:
            return False
        raise TrackingError(
            f"cannot ask the tracking store {without_password(tracking_uri)} which runs have finished "
            f"({reason(error)}): start it, or go on without it: trainer.logger.init_args.on_outage=spool"
        ) from error
    if run is None:  # a run of another store, unless this one is still to be told
        return not (spool_folder(tracking_uri) / run_id).exists()
    return bool(run.info.status == "FINISHED")


def _running(folder: Path) -> bool:
    try:
        with run_lock(folder).acquire(blocking=False):
            return False
    except Timeout:
        return True
