"""The logger that writes a run to MLflow, and never lets the store stop the training."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_sigsoftmax.journal import Journal
from lit_sigsoftmax.spool import Spool, spool_folder
from lit_sigsoftmax.store import (
    TrackingError,
    default_tracking_uri,
    flatten,
    open_client,
    sqlite_path,
    start_run,
    store_root,
    without_password,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from lit_sigsoftmax.system_metrics import SystemMetrics

__all__ = ["MLflowTracker", "default_tracking_uri", "flatten", "open_client", "sqlite_path", "store_root", "tracker_of"]

_STATUS = {"failed": "FAILED", "killed": "KILLED"}
_PATIENCE = 20.0  # seconds without progress after which the end of a run no longer waits for the store

_log = logging.getLogger(__name__)


class MLflowTracker(Logger):
    """Writes one training run to an MLflow store.

    Lightning's own MLFlowLogger opens the store in every process and calls it from the training loop. This one opens it
    on first use, on rank 0 alone, and puts what is logged in a spool (``mlruns/spool/<run_id>``), which a thread sends.
    A store that is away, slow or locked costs no training step and no point: what it has not taken when the run ends
    stays there for ``lit-sigsoftmax report --sync``.

    Args:
        tracking_uri: The store; ``MLFLOW_TRACKING_URI`` or ``sqlite:///mlruns/mlflow.db`` by default.
        experiment_name: The experiment; the corpus's name by default.
        run_name: Name of the run; by default the output layer and the seed, as in ``sigsoftmax x1 seed 2``.
        study: The comparison that the run belongs to, a tag.
        tags: More tags for the run.
        system_metrics: Whether processor, memory and GPU use are recorded along with the run.
        on_outage: What to do where the store does not answer at the start. ``fail`` raises before training. ``spool``
            trains without it; the run gets a local id, which names its checkpoints' folder and becomes its tag
            ``local_id``, and is created when the store is there.
        run_id: A run to continue. Its parameters and tags stay, and points are dropped at steps that the store has.

    Attributes:
        more_to_come: Whether success of the trainer, which is told after training already, leaves the run open.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment_name: str | None = None,
        run_name: str | None = None,
        study: str | None = None,
        tags: dict[str, str] | None = None,
        system_metrics: bool = True,
        on_outage: Literal["fail", "spool"] = "fail",
        run_id: str | None = None,
    ) -> None:
        super().__init__()
        self.tracking_uri = tracking_uri or default_tracking_uri()
        self.experiment_name = experiment_name
        self.run_name = run_name
        self.tags = {**({"study": study} if study else {}), **(tags or {})}
        self.system_metrics = system_metrics
        self.on_outage = on_outage
        self.continued = run_id is not None
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self._run_id = run_id
        self._header: dict[str, Any] | None = None
        self._spool: Spool | None = None
        self._system_step = 0
        self._monitor: SystemMetrics | None = None
        self._patience = _PATIENCE
        self.more_to_come = False

    def describe(self, experiment_name: str, run_name: str, tags: Mapping[str, str]) -> None:
        """Fill in what the user has not named, before the run is opened."""
        self.experiment_name = self.experiment_name or experiment_name
        self.run_name = self.run_name or run_name
        self.tags = {**tags, **self.tags}

    @property
    def experiment(self) -> MlflowClient | None:
        """The MLflow client on rank 0, None on other ranks. Its own calls wait for the store, and raise."""
        if getattr(rank_zero_only, "rank", 0) != 0:
            return None
        self._open()
        return self._client

    @property
    def run_id(self) -> str | None:
        """The run's id on rank 0, None on other ranks."""
        if self._header is None:
            _ = self.experiment
        return self._run_id if self._header else None

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id on rank 0; None on other ranks, and where the store was not there."""
        if self._header is None:
            _ = self.experiment
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
        """Log parameters; a nested name has dots. A run that is continued keeps those it has."""
        params = vars(params) if isinstance(params, Namespace) else params
        entries = [(key, str(value)[:6000]) for key, value in flatten(params)]
        for start in range(0, 0 if self.continued else len(entries), 100):  # MLflow's limit
            self._append({"params": dict(entries[start : start + 100])})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of a step, test results at step 0 (drawn as bars); what is not finite is a tag ``diverged``."""
        if lost := [key for key, value in metrics.items() if not math.isfinite(value)]:
            self.log_tags({"diverged": f"{', '.join(lost)} at step {step}"})
        now = int(time.time() * 1000)
        points = [
            (key, float(value), now, 0 if key.startswith("test/") else step or 0)
            for key, value in metrics.items()
            if key != "epoch" and math.isfinite(value)
        ]
        if points:
            self._append({"metrics": points})

    @rank_zero_only
    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._append({"tags": {key: str(value) for key, value in tags.items()}})

    @rank_zero_only
    def log_text(self, text: str, name: str) -> None:
        """Write a text to the artifact of that name, such as ``config.yaml`` or ``tables/words.tsv``."""
        self._artifact(text, name)

    @rank_zero_only
    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Copy a file, as it is now, to the run's artifacts, or a folder in them.

        Raises:
            OSError: The file cannot be read.
        """
        self._artifact(Path(path), f"{folder}/{Path(path).name}")

    @rank_zero_only
    def log_dataset(self, name: str, digest: str, source: Mapping[str, str], context: str = "train") -> None:
        """Record a dataset as an input of the run.

        Args:
            name: What MLflow calls it.
            digest: At most 36 characters that differ where the data does.
            source: Tags that say where it comes from.
            context: What it is used for.
        """
        origin = json.dumps({"tags": dict(source)})  # MLflow's CodeDatasetSource
        dataset = {"name": name, "digest": digest, "source_type": "code", "source": origin}
        self._append({"dataset": {"context": context, "dataset": dataset}})

    def flush(self, patience: float = _PATIENCE) -> bool:
        """Wait until the store has everything, or has taken nothing for ``patience`` seconds.

        Returns:
            Whether the store has everything.
        """
        return self._spool is None or self._spool.wait(patience)

    @rank_zero_only
    def save_journal(self) -> None:
        """Have what has been logged until now on the disk itself, where it outlives a power cut."""
        if self._spool is not None:
            with suppress(OSError):  # a disk that fails is not the training's concern
                self._spool.journal.save()

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Close the run as FINISHED, FAILED where training raised, or KILLED; wait for the store, but not for long."""
        if self._spool is None or (self.more_to_come and status == "success"):
            return
        end = _STATUS.get(status, "FINISHED")
        self._append({"status": {"status": end, "time": int(time.time() * 1000)}})
        self._close()

    def _append(self, record: Mapping[str, Any]) -> None:
        self._open().journal.append(record)

    def _artifact(self, source: Path | str, name: str) -> None:
        folder, _, base = name.strip("/").rpartition("/")
        if kept := self._open().journal.add_file(source, base):  # None: the disk is full
            self._append({"artifact": {"file": kept, "folder": folder}})

    def _open(self) -> Spool:
        if self._spool is None:
            again = self._header is not None
            journal = self._journal(self._header or self._begin())
            self._spool = Spool(journal, self.tracking_uri, self._client)
            self._spool.start()
            atexit.register(self._close)
            if again or self.continued:
                journal.append({"status": {"status": "RUNNING"}})
            self._start_monitor()
        return self._spool

    def _journal(self, header: dict[str, Any]) -> Journal:
        try:
            journal = Journal((spool_folder(self.tracking_uri) / str(self._run_id)).absolute(), header)
        except TrackingError:
            if self._client and not self.continued:
                self._client.set_terminated(str(self._run_id), "FAILED")
            raise
        if self.continued:  # what a process that was killed has left was not
            journal.update(continued=True)
        self._header = journal.header
        return journal

    def _begin(self) -> dict[str, Any]:
        header = {
            "tracking_uri": without_password(self.tracking_uri),
            "experiment": self.experiment_name or "default",
            "run_name": self.run_name,
            "tags": self.tags,
            "start_time": int(time.time() * 1000),
            "run_id": self._run_id,
            "continued": self.continued,
        }
        begun = spool_folder(self.tracking_uri) / str(self._run_id) / "run.json"
        if self.continued and begun.exists():  # the store may not have been told of the run yet
            header |= json.loads(begun.read_text())
        started = start_run(self.tracking_uri, header, without_store=self.on_outage == "spool")
        self._client, self._experiment_id = started.client, started.experiment_id
        self._system_step = started.system_step
        self._run_id = started.header.get("local_id") or started.header["run_id"]  # as its folders are called
        return started.header

    def _start_monitor(self) -> None:
        if self.system_metrics:
            from lit_sigsoftmax.system_metrics import SystemMetrics

            self._monitor = SystemMetrics(self.log_metrics, self._system_step)
            self._monitor.start()

    def _close(self) -> None:
        """Send what is left, and end the threads. Also when the program ends without :meth:`finalize`."""
        atexit.unregister(self._close)
        if self._spool is None or self._spool.journal.owner != os.getpid():  # a forked process has no thread
            return
        if self._monitor is not None:
            self._monitor.finish()
            self._system_step, self._monitor = self._monitor.step, None
        spool, self._spool = self._spool, None
        if not spool.wait(self._patience):
            self._patience = 2.0  # it has been waited for once
            _log.warning(
                "the run is not whole in %s: the rest is in %s. When the store is back: lit-sigsoftmax report --sync",
                *(without_password(self.tracking_uri), spool.journal.folder),
            )
        spool.close()


def tracker_of(trainer: Trainer) -> MLflowTracker | None:
    """Return the trainer's tracker, if it has one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, MLflowTracker)), None)
