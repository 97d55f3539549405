"""One run of a study: found in the store, continued, or started."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from lightning.pytorch import Callback

from lit_sigsoftmax.checkpoints import CheckpointError, readable_last
from lit_sigsoftmax.connect import connect_again
from lit_sigsoftmax.resume import run_folder
from lit_sigsoftmax.spool import spool_folder
from lit_sigsoftmax.store import TrackingError, impatient, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Job", "close", "find"]

_LOGGER = "--trainer.logger.init_args."


@dataclass(frozen=True)
class Job:
    """A run that is to be trained, wherever that is done.

    Attributes:
        name: The run in words.
        arguments: The command line after ``fit``.
        tracking_uri: The store.
        study: The study.
        config_hash: What the run is known by within the study.
        log: The file for what it prints.
    """

    name: str
    arguments: tuple[str, ...]
    tracking_uri: str
    study: str
    config_hash: str
    log: Path

    @property
    def lock(self) -> FileLock:
        """What the process that trains this run holds."""
        return FileLock(self.log.with_suffix(".lock"))

    def __call__(self, callbacks: Sequence[Callback] = ()) -> None:
        """Train in this process, from the last checkpoint where an earlier attempt left one.

        The lock is the system's: it goes with the process, however that ends. So an unfinished run without its lock is
        known to be dead, and two commands of one study never train the same run twice. What is finished and what can be
        continued is known by the store alone: while that is away, this waits.

        Raises:
            TrackingError: The run is being trained elsewhere, as far as the store knows.
        """
        from lit_sigsoftmax import training

        with self.lock:
            client = connect_again(self.tracking_uri)
            runs = find(client, self)
            if any(run.info.status == "FINISHED" for run in runs):
                return  # another command has trained it while this one waited
            arguments = [*self.arguments, *_continue(client, self, runs)]
            # What Lightning starts the other processes of a DDP run with.
            sys.argv = [str(Path(training.__file__).with_name("__main__.py")), "fit", *arguments]
            training.run(sys.argv[1:], callbacks)

    def checkpoint(self) -> Any:
        """Queue the same job again: submitit calls this when a cluster takes the machine away."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def find(client: MlflowClient, job: Job) -> list[Any]:
    """Return the job's runs in the store, newest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"tags.study = '{job.study}' and tags.config_hash = '{job.config_hash}' and tags.kind = 'fit'"
    return list(client.search_runs(experiments, query, order_by=["attributes.start_time DESC"])) if experiments else []


def close(client: MlflowClient, job: Job, status: str) -> bool:
    """Give the job's runs that count as running a status, where their process has ended without doing so.

    Returns:
        Whether the store answers.
    """
    from mlflow.exceptions import MlflowException

    with suppress(Timeout), job.lock.acquire(blocking=False), impatient():  # another command may be training it
        try:
            for run in find(client, job):
                if run.info.status == "RUNNING" and _is_ours(job, run):
                    client.set_terminated(run.info.run_id, status)
        except MlflowException:
            return False
    return True


def _is_ours(job: Job, run: Any) -> bool:
    # The lock is a file of this working directory: of a run that has left nothing here it says nothing. What belongs to
    # a SQLite store lies beside it, wherever one works.
    folders = (run_folder(job.tracking_uri, ""), spool_folder(job.tracking_uri))
    return sqlite_path(job.tracking_uri) is not None or any(
        (f / name).exists() for f in folders for name in _names(run)
    )


def _names(run: Any) -> list[str]:
    # As its folders may be called: by its local id, where it was begun while the store was away.
    return [*filter(None, [run.data.tags.get("local_id")]), run.info.run_id]


def _continue(client: MlflowClient, job: Job, runs: Sequence[Any]) -> list[str]:
    # The newest that has a checkpoint goes on; the others are deleted: an attempt that starts again at step 0 would
    # draw its curves over those of the first.
    ours = [run for run in runs if _is_ours(job, run)]
    for run in runs:
        if run not in ours and run.info.status == "RUNNING":
            raise TrackingError(
                f"{job.name} is running as {run.info.run_id}, and nothing of that is in this working directory: wait "
                f"for it, or go on where it was begun; where it is dead, mlflow runs delete --run-id {run.info.run_id}"
            )
    arguments: list[str] = []
    for run in ours:
        name = next((name for name in _names(run) if not arguments and _can_go_on(job, name)), None)
        if name:
            arguments = ["--ckpt_path=last", f"{_LOGGER}run_id={name}"]
        else:
            client.delete_run(run.info.run_id)
    return arguments


def _can_go_on(job: Job, run_id: str) -> bool:
    try:
        return readable_last(run_folder(job.tracking_uri, run_id)) is not None
    except CheckpointError as error:
        print(f"{job.name} starts again: {error}", file=sys.stderr)
        return False
