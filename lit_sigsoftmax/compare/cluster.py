"""Runs as jobs of a cluster, through submitit.

submitit and not Ray: who trains language models at a university sits on SLURM, which submitit speaks and which needs no
daemon of ours; Ray wants a cluster of its own and hundreds of megabytes. The cluster schedules: all jobs are
handed over at once.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_sigsoftmax.compare.job import Job

__all__ = ["make_executor", "train_on_cluster"]

_POLL_SECONDS = 1.0


def make_executor(name: str, parameters: Mapping[str, Any], folder: Path) -> Any:
    """Make a submitit executor.

    Args:
        name: ``slurm``, or ``local`` for processes of this machine.
        parameters: submitit's parameters, such as ``timeout_min``, ``cpus_per_task`` or ``slurm_partition``.
        folder: Where submitit keeps its files; all machines of the cluster must see it.

    Raises:
        ValueError: submitit is not installed, does not know the executor or a parameter, or there is no such cluster.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError('--executor needs submitit: pip install "lit-sigsoftmax[cluster]"') from None
    try:
        executor = submitit.AutoExecutor(folder=str(folder), cluster=name)
        executor.update_parameters(**parameters)
    except (NameError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"submitit does not take --executor {name} {dict(parameters)}: {error}") from None
    return executor


def train_on_cluster(jobs: Sequence[Job], executor: Any) -> Generator[tuple[Job, int], None, None]:
    """Hand all jobs to the cluster and wait for them; those not done are cancelled when the iteration ends early.

    Yields:
        The job that has ended, and 0 where it succeeded, 1 where not.
    """
    with executor.batch():
        submitted = [(job, executor.submit(job)) for job in jobs]
    try:
        while submitted:
            for job, handle in list(submitted):
                if handle.done():
                    submitted.remove((job, handle))
                    _keep_log(job, handle)
                    yield job, int(handle.exception() is not None)
            time.sleep(_POLL_SECONDS if submitted else 0)
    finally:
        for _, handle in submitted:
            handle.cancel()


def _keep_log(job: Job, handle: Any) -> None:
    with job.log.open("a") as log:
        log.write((handle.stdout() or "") + (handle.stderr() or ""))
