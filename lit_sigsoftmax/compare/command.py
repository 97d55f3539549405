"""``lit-sigsoftmax compare``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lit_sigsoftmax.compare.cluster import make_executor, train_on_cluster
from lit_sigsoftmax.compare.job import Job, close, find
from lit_sigsoftmax.compare.options import Options, read_options
from lit_sigsoftmax.compare.outlook import describe
from lit_sigsoftmax.compare.plan import tuning_runs
from lit_sigsoftmax.compare.report import conclude
from lit_sigsoftmax.compare.results import study_runs
from lit_sigsoftmax.compare.run import check, train
from lit_sigsoftmax.compare.study import Study
from lit_sigsoftmax.compare.tuning import choose
from lit_sigsoftmax.connect import connect, connect_again
from lit_sigsoftmax.signals import Stopped, stoppable
from lit_sigsoftmax.spool import sync
from lit_sigsoftmax.store import TrackingError, impatient, reason, sqlite_path, store_root, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["compare"]

# Exit codes of a run that was told to stop: by itself, or where the signal came before it could listen.
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT)


def compare(args: Sequence[str]) -> None:
    """Train every arm of a comparison with every seed, and print and log the table.

    What an earlier, stopped command of the same study has finished is kept, what it has begun is continued.

    Args:
        args: The command line after ``compare``; what it does not know itself goes to every ``fit``.

    Raises:
        SystemExit: 2 for a mistake in the command line or the recipe, or a store that does not answer, 1 where a run
            failed or was stopped, 130 for Ctrl-C, 143 for SIGTERM.
    """
    from mlflow.exceptions import MlflowException

    options = read_options(args)
    again = f"the same command with --study '{options.study}' continues it"
    try:
        with stoppable(signal.SIGTERM):  # as Ctrl-C does, so that the runs write their checkpoints
            _compare(options)
    except (KeyboardInterrupt, Stopped) as stop:
        print(f"interrupted: {again}", file=sys.stderr)
        raise SystemExit(stop.code if isinstance(stop, Stopped) else 130) from None
    except TrackingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except MlflowException as error:
        address = without_password(options.tracking_uri)
        print(f"error: the tracking store {address} fails ({reason(error)}): later, {again}", file=sys.stderr)
        raise SystemExit(2) from None


def _compare(options: Options) -> None:
    first = tuning_runs(options.runs, options.tune)
    recipe = [*options.recipe, f"--trainer.logger.init_args.tracking_uri={options.tracking_uri}"]
    study = Study(options, check([[*recipe, *run.arguments] for run in first]))
    path = sqlite_path(options.tracking_uri)
    if options.dry_run and path and not path.exists():  # a dry run makes no store
        print(describe(study, None))
        return
    client = connect(options.tracking_uri)
    if not options.allow_unfair and (unfair := study.unfair(study_runs(client, options.study))):
        options.fail(
            f"{unfair}; name the keys that are compared with --vary, give those that are chosen with the same --tune, "
            "or pass --allow_unfair"
        )
    if options.dry_run:
        print(describe(study, client))
        return
    executor = _executor(options)
    study.logs.mkdir(parents=True, exist_ok=True)
    failed, runs = 0, options.runs
    if options.tune:
        failed = _train_all(client, options, executor, study.jobs(first, tuning=True))
        runs = choose(client, study, first)
    failed += _train_all(client, options, executor, study.jobs(runs))
    study.mark(client)
    # Whatever is unfair has been asked for by now, or is better shown than lost after hours of training.
    conclude(client, options.tracking_uri, [options.study], allow_unfair=True)
    if failed:
        raise SystemExit(1)


def _executor(options: Options) -> Any:
    if options.executor is None:
        return None
    try:
        return make_executor(options.executor, options.executor_args, store_root(options.tracking_uri) / "jobs")
    except ValueError as error:
        options.fail(str(error))


def _train_all(client: MlflowClient, options: Options, executor: Any, jobs: Sequence[Job]) -> int:
    """Train what is not finished; returns how many runs failed."""
    _send_left(options)
    left = [job for job in jobs if not any(run.info.status == "FINISHED" for run in find(client, job))]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed = 0
    with Progress(*columns, console=Console(stderr=True)) as bars:
        total = bars.add_task("runs", total=len(jobs), completed=len(jobs) - len(left))
        if len(left) < len(jobs):
            bars.print(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished already")
        tasks = {}

        def on_step(job: Job, step: int, steps: int) -> None:
            if job not in tasks:
                tasks[job] = bars.add_task(job.name, total=steps)
            bars.update(tasks[job], completed=step)

        ends = train_on_cluster(left, executor) if executor else train(left, options.workers, on_step)
        open_jobs = dict.fromkeys(left)
        try:
            with closing(ends):
                for job, code in ends:
                    del open_jobs[job]
                    if job in tasks:
                        bars.remove_task(tasks[job])
                    bars.advance(total)
                    bars.print(_outcome(client, job, code), markup=False)
                    failed += code != 0
        finally:
            all(close(client, job, "KILLED") for job in open_jobs)  # none after the first that the store does not hear
    _send_left(options)
    return failed


def _send_left(options: Options) -> None:
    """Send what outages have left of the study's runs; without it they are not finished for the store.

    The store was there when the study began: while it is away, this waits.
    """
    connect_again(options.tracking_uri)
    try:
        sync(options.tracking_uri, options.study)
    except TrackingError as error:
        print(error, file=sys.stderr)


def _outcome(client: MlflowClient, job: Job, code: int) -> str:
    from mlflow.exceptions import MlflowException

    if code in _STOPPED:
        close(client, job, "KILLED")
        return f"{job.name}: stopped from outside; the same command continues it"
    if code:
        close(client, job, "FAILED")
        return f"{job.name}: FAILED, see {job.log}\n{_last_lines(job.log)}\n{job.name} failed"
    try:
        with impatient():
            ended = [run.info for run in find(client, job) if run.info.status == "FINISHED"]
    except MlflowException as error:
        return f"{job.name}: done, but not in the store yet ({reason(error)}); a run that would begin now waits for it"
    if not ended:
        return f"{job.name}: done, but not in the store yet"
    return f"{job.name}: done after {(ended[0].end_time - ended[0].start_time) / 1000:.0f} s"


def _last_lines(log: Path, n: int = 5) -> str:
    lines = log.read_text(errors="replace").rstrip().splitlines() if log.exists() else []
    return "\n".join(lines[-n:])
