"""The tracking store, and the logger that writes a run to it.

The store is ``sqlite:///mlruns/mlflow.db`` with artifacts in ``mlruns/artifacts`` and checkpoints in
``mlruns/checkpoints/<run_id>``, unless ``MLFLOW_TRACKING_URI`` or ``tracking_uri`` names another, such as a server.
"""

from __future__ import annotations

import logging
import math
import os
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_sigsoftmax.views import experiment_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

__all__ = ["MLflowTracker", "default_tracking_uri", "open_client", "sqlite_path", "store_root", "tracker_of"]

_SQLITE = "sqlite:///"
_STATUS = {"failed": "FAILED", "killed": "KILLED"}


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


def open_client(tracking_uri: str) -> MlflowClient:
    """Open a tracking store, making a local one where there is none.

    Processes that open a new SQLite store at the same time break it for good (MLflow migrates it without a lock), so
    they take turns.

    Raises:
        OSError: A local store's folder cannot be made.
    """
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _turn(tracking_uri):
        client = MlflowClient(tracking_uri)
        if sqlite_path(tracking_uri):
            client.search_experiments(max_results=1)  # the first query migrates
    return client


class MLflowTracker(Logger):
    """Writes one training run to an MLflow store.

    Lightning's own MLFlowLogger opens the store in every process as soon as it is made; this one waits for the first
    use and opens it on rank 0 alone.

    Args:
        tracking_uri: The store; ``MLFLOW_TRACKING_URI`` or ``sqlite:///mlruns/mlflow.db`` by default.
        experiment_name: The experiment; the corpus's name by default.
        run_name: Name of the run; by default the output layer and the seed, as in ``sigsoftmax x1 seed 2``.
        study: The comparison that the run belongs to, a tag.
        tags: More tags for the run.
        system_metrics: Whether processor, memory and GPU use are recorded along with the run.
        run_id: Continue this run: its parameters stay, and points at steps that a metric already has are dropped, since
            MLflow would add them a second time.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment_name: str | None = None,
        run_name: str | None = None,
        study: str | None = None,
        tags: dict[str, str] | None = None,
        system_metrics: bool = True,
        run_id: str | None = None,
    ) -> None:
        super().__init__()
        self.tracking_uri = tracking_uri or default_tracking_uri()
        self.experiment_name = experiment_name
        self.run_name = run_name
        self.tags = {**({"study": study} if study else {}), **(tags or {})}
        self.system_metrics = system_metrics
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self._run_id = run_id
        self._logged: dict[str, int] = {}  # the last step of each metric of a run that is continued
        self._running = False
        self._monitor: SystemMetricsMonitor | None = None

    def describe(self, experiment_name: str, run_name: str, tags: Mapping[str, str]) -> None:
        """Fill in what the user has not named, before the run is opened."""
        self.experiment_name = self.experiment_name or experiment_name
        self.run_name = self.run_name or run_name
        self.tags = {**tags, **self.tags}

    @property
    def experiment(self) -> MlflowClient | None:
        """The MLflow client on rank 0, None on other ranks; the first use opens the store and starts the run."""
        return self._open() if getattr(rank_zero_only, "rank", 0) == 0 else None

    def _open(self) -> MlflowClient:
        if self._client is None:
            self._client = open_client(self.tracking_uri)
            if self._run_id is not None:
                self._continue(self._client, self._run_id)
            else:
                self._experiment_id = get_experiment(self._client, self.tracking_uri, self.experiment_name or "default")
                run = self._client.create_run(self._experiment_id, tags=self.tags, run_name=self.run_name)
                self._run_id = run.info.run_id
        elif not self._running:
            self._client.update_run(str(self._run_id), status="RUNNING")
        if not self._running:
            self._running = True
            self._start_monitor()
        return self._client

    def _continue(self, client: MlflowClient, run_id: str) -> None:
        run = client.get_run(run_id)
        self._experiment_id, self.run_name = run.info.experiment_id, run.info.run_name
        for key in run.data.metrics:
            if not key.startswith("system/"):
                self._logged[key] = max(point.step for point in client.get_metric_history(run_id, key))
        client.update_run(run_id, status="RUNNING")

    @property
    def run_id(self) -> str | None:
        """The run's id on rank 0; on other ranks None, but for a run that is continued."""
        _ = self._run_id or self.experiment
        return self._run_id

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id on rank 0, None on other ranks."""
        _ = self._experiment_id or self.experiment
        return self._experiment_id

    @property
    def name(self) -> str | None:
        """The experiment's name."""
        return self.experiment_name

    @property
    def version(self) -> str | None:
        """The run's id."""
        return self.run_id

    @property
    def save_dir(self) -> str:
        """The folder of the store."""
        return str(store_root(self.tracking_uri))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log parameters; a nested name has dots."""
        from mlflow.entities import Param

        params = vars(params) if isinstance(params, Namespace) else params
        client = self._open()
        known = client.get_run(str(self.run_id)).data.params  # of a run that is continued
        entities = [Param(key, str(value)[:6000]) for key, value in flatten(params) if key not in known]
        for start in range(0, len(entities), 100):  # MLflow's limit
            client.log_batch(str(self.run_id), params=entities[start : start + 100])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics at a step. Test results are of the run as a whole: step 0, where MLflow draws them as bars.

        MLflow stores infinity as 1.8e308, which no chart survives: a value that is not finite becomes the tag
        ``diverged`` instead.
        """
        from mlflow.entities import Metric

        if lost := [key for key, value in metrics.items() if not math.isfinite(value)]:
            self._open().set_tag(str(self.run_id), "diverged", f"{', '.join(lost)} at step {step}")
        now = int(time.time() * 1000)
        steps = {key: 0 if key.startswith("test/") else step or 0 for key in metrics}
        entities = [
            Metric(key, float(value), now, steps[key])
            for key, value in metrics.items()
            if key != "epoch" and math.isfinite(value) and steps[key] > self._logged.get(key, -1)
        ]
        if entities:
            self._open().log_batch(str(self.run_id), metrics=entities)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Close the run as FINISHED, as FAILED where training raised, or as KILLED where it was told to stop."""
        if not self._running or self._client is None:
            return
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        self._client.set_terminated(str(self._run_id), _STATUS.get(status, "FINISHED"))
        self._running = False

    def _start_monitor(self) -> None:
        if self.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self._run_id, tracking_uri=self.tracking_uri, resume_logging=True)
            self._monitor.start()


def tracker_of(trainer: Trainer) -> MLflowTracker | None:
    """Return the trainer's tracker, if it has one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, MLflowTracker)), None)


def get_experiment(client: MlflowClient, tracking_uri: str, name: str) -> str:
    """Return the id of an experiment, made where there is none.

    Raises:
        ValueError: It has been deleted.
    """
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        if found.lifecycle_stage == "deleted":
            raise ValueError(
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


def _turn(tracking_uri: str) -> Any:
    if not (path := sqlite_path(tracking_uri)):
        return nullcontext()
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")
