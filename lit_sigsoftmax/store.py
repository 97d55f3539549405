"""The tracking store: where it is, and how it is opened.

It is ``sqlite:///mlruns/mlflow.db`` with artifacts in ``mlruns/artifacts`` and checkpoints in
``mlruns/checkpoints/<run_id>``, unless ``MLFLOW_TRACKING_URI`` or ``tracking_uri`` names another, such as a server.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock

from lit_sigsoftmax.views import experiment_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run, RunInfo

__all__ = [
    "Started",
    "TrackingError",
    "below",
    "create_run",
    "default_tracking_uri",
    "find_run",
    "flatten",
    "get_experiment",
    "impatient",
    "open_client",
    "reason",
    "rejects",
    "sqlite_path",
    "start_run",
    "store_root",
    "without_password",
]

_SQLITE = "sqlite:///"
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    _TIMEOUT: "10",
}
_environment = threading.RLock()

_log = logging.getLogger(__name__)


class TrackingError(OSError):
    """The tracking store cannot be used: the message says which, why, and what to do."""


def default_tracking_uri() -> str:
    """Return ``MLFLOW_TRACKING_URI`` where it is set, else the SQLite store in ``mlruns``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlruns/mlflow.db"


def store_root(tracking_uri: str) -> Path:
    """Return the folder of a local store, or ``mlruns`` for a store elsewhere: where checkpoints go."""
    path = sqlite_path(tracking_uri)
    return path.parent if path else Path("mlruns")


def sqlite_path(tracking_uri: str) -> Path | None:
    """Return the database file of a local store, None for a store elsewhere."""
    return Path(tracking_uri.removeprefix(_SQLITE)) if tracking_uri.startswith(_SQLITE) else None


def without_password(tracking_uri: str) -> str:
    """Return a store's address as it may be shown and written down."""
    return re.sub(r"(://[^/@:]*):[^@]*@", r"\1:***@", tracking_uri)


@contextmanager
def impatient() -> Iterator[None]:
    """MLflow's HTTP calls within the block fail after 10 s instead of trying again for four minutes, and print nothing.

    MLflow takes this from the environment of the process alone; what the user has set for the timeout stays.
    """
    with _environment:
        before = {name: os.environ.get(name) for name in _IMPATIENT}
        timeout = os.environ.get(_TIMEOUT) or _IMPATIENT[_TIMEOUT]
        os.environ.update(_IMPATIENT | {_TIMEOUT: timeout})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def open_client(tracking_uri: str) -> MlflowClient:
    """Open a tracking store, making a local one where there is none.

    Processes that open a new SQLite store at the same time break it for good (MLflow migrates it without a lock), so
    they take turns.

    Raises:
        OSError: A local store's folder cannot be made.
        TrackingError: A local store's file is no database, or may not be written.
    """
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _turn(tracking_uri):
        path = sqlite_path(tracking_uri)
        if path and path.exists():
            _check_database(path)
        client = MlflowClient(tracking_uri)
        if path:
            client.search_experiments(max_results=1)  # the first query migrates
    return client


def _check_database(path: Path) -> None:
    # MLflow would try again for 100 s.
    another = "name another store with trainer.logger.init_args.tracking_uri or MLFLOW_TRACKING_URI"
    for place in (path, path.parent):  # SQLite keeps its journal beside the file
        if not os.access(place, os.R_OK | os.W_OK):
            raise TrackingError(f"{place} may not be read and written (permission denied): allow it, or {another}")
    try:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        raise TrackingError(f"{path} is no SQLite database ({error}): move it away, or {another}") from None


def get_experiment(client: MlflowClient, tracking_uri: str, name: str) -> str:
    """Return the id of an experiment, made where there is none.

    Raises:
        TrackingError: It has been deleted.
    """
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        if found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"the experiment {name!r} has been deleted: restore it with mlflow experiments restore "
                f"--experiment-id {found.experiment_id}, or name another with trainer.logger.init_args.experiment_name"
            )
        return str(found.experiment_id)
    path = sqlite_path(tracking_uri)
    location = (path.parent / "artifacts").resolve().as_uri() if path else None
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=experiment_tags()))
    except MlflowException:  # another process made it in between
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def create_run(client: MlflowClient, tracking_uri: str, header: Mapping[str, Any]) -> RunInfo:
    """Create the run that a journal's header describes, or find it where an earlier answer was lost.

    Args:
        client: The store.
        tracking_uri: Its address.
        header: ``experiment``, ``run_name``, ``tags`` and ``start_time`` (milliseconds), and ``local_id`` of a run
            that was named before the store was there.

    Returns:
        What the store says of the run: ``run_id``, ``experiment_id`` and so on.
    """
    experiment_id = get_experiment(client, tracking_uri, header["experiment"])
    tags = dict(header["tags"])
    if local := header.get("local_id"):
        if found := client.search_runs([experiment_id], f"tags.local_id = '{local}'", max_results=1):
            return found[0].info
        tags["local_id"] = local
    return client.create_run(experiment_id, header["start_time"], tags, header["run_name"]).info


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """Return a run by its id, or by the local id with which it was begun; None where the store knows neither."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.local_id = '{run_id}'", max_results=1)
    return found[0] if found else None


class Started(NamedTuple):
    """A run that has been begun: its store, where that answered, and where it stands there."""

    client: MlflowClient | None
    header: dict[str, Any]
    experiment_id: str | None = None
    system_step: int = 0


def start_run(tracking_uri: str, header: Mapping[str, Any], without_store: bool) -> Started:
    """Create a run, or find the one to continue.

    Args:
        tracking_uri: The store.
        header: As :func:`create_run` takes it; ``run_id`` is that of a run to continue, its local id
            where it was begun with one, or None.
        without_store: Whether a run is given a local id where the store does not answer.

    Raises:
        TrackingError: The store cannot be used, or does not know the run.
    """
    client = None
    try:
        with impatient():
            client = open_client(tracking_uri)
            if run_id := header["run_id"]:
                if (run := find_run(client, run_id)) is None:
                    raise TrackingError(f"the tracking store {without_password(tracking_uri)} has no run {run_id}")
                local = {"local_id": run_id} if run.info.run_id != run_id else {}
                steps = [point.step for point in run.data._metric_objs if point.key.startswith("system/")]
                found = {**header, **local, "run_id": str(run.info.run_id)}
                return Started(client, found, str(run.info.experiment_id), max(steps, default=-1) + 1)
            info = create_run(client, tracking_uri, header)
            return Started(client, {**header, "run_id": str(info.run_id)}, str(info.experiment_id))
    except TrackingError:
        raise
    except Exception as error:
        address, why = without_password(tracking_uri), reason(error)
        if not without_store or rejects(error, tracking_uri):
            raise TrackingError(
                f"cannot use the tracking store {address} ({why}): start it, name another with "
                "trainer.logger.init_args.tracking_uri or MLFLOW_TRACKING_URI, or train without it and send the run "
                "later: trainer.logger.init_args.on_outage=spool"
            ) from error
        _log.warning("the tracking store %s does not answer (%s): the run is spooled", address, why)
        local = {} if header["run_id"] or header.get("local_id") else {"local_id": uuid.uuid4().hex}
        return Started(client, {**header, **local})


def rejects(error: BaseException, tracking_uri: str) -> bool:
    """Return whether the store has understood a request and will never accept it; otherwise it is worth another try.

    A server's answer counts only in MLflow's own form: a proxy in front of it has error pages of its own.
    """
    from mlflow.exceptions import MlflowException, RestException

    kind = RestException if tracking_uri.startswith("http") else MlflowException
    return isinstance(error, kind) and error.error_code == "INVALID_PARAMETER_VALUE"


def reason(error: BaseException) -> str:
    """Return in one line why a store cannot be reached: the innermost cause, such as a refused connection."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return without_password(text.splitlines()[0])[:300]


def _turn(tracking_uri: str) -> Any:
    if not (path := sqlite_path(tracking_uri)):
        return nullcontext()
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``("model.activation", "sigsoftmax")`` and so on from a nested configuration.

    ``init_args`` is left out of the names, a ``class_path`` stands for the object that it makes, and None is dropped.
    """
    for key, value in params.items():
        name = prefix if key in ("init_args", "class_path") and prefix else f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            yield from flatten(value, name)
        elif value is not None:
            yield name, value


def below(key: str, parents: Iterable[str]) -> bool:
    """Whether a flattened name is one of some names or lies below one."""
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)
