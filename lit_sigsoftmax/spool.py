"""Spool: sends what a run has written to the tracking store, as soon as and as often as it takes.

Everything can be sent twice: a point is stored once, since its key, step, timestamp and value are the key of MLflow's
table; parameters, tags, artifacts and the status are overwritten with themselves; a run that was created unheard is
found by its tag. So an answer that got lost, a process that was killed and a spool replayed twice need no care.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_sigsoftmax.journal import Journal, JournalInUseError
from lit_sigsoftmax.store import (
    TrackingError,
    create_run,
    find_run,
    impatient,
    open_client,
    reason,
    rejects,
    store_root,
    without_password,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Spool", "spool_folder", "sync"]

_INTERVAL = 2.0  # seconds between two batches: each takes some 40 ms of a core
_LONGEST = 5.0  # between two attempts while the store is away: each takes some of the interpreter's time from training

_log = logging.getLogger(__name__)


def spool_folder(tracking_uri: str) -> Path:
    """Return the folder that keeps what a store has not taken yet, a folder for each run."""
    return store_root(tracking_uri) / "spool"


class Spool:
    """Sends a journal to its store.

    Args:
        journal: What is to be sent.
        tracking_uri: The store.
        client: The store, where it is open already.
    """

    def __init__(self, journal: Journal, tracking_uri: str, client: MlflowClient | None = None) -> None:
        self.journal = journal
        self.tracking_uri = tracking_uri
        self.error: Exception | None = None
        self._client = client
        self._latest: dict[str, tuple[int, float]] | None = None
        self._refused: set[str] = set()
        self._wake, self._ended = threading.Event(), threading.Event()
        self._pause = _INTERVAL
        self._progress = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="Spool", daemon=True)

    def start(self) -> None:
        """Send in the background from now on."""
        self._thread.start()

    @property
    def empty(self) -> bool:
        """Whether the store has everything."""
        return self.journal.empty and self.journal.header["run_id"] is not None

    def wait(self, patience: float) -> bool:
        """Wait until the store has everything, or has taken nothing for ``patience`` seconds.

        Returns:
            Whether the store has everything.
        """
        self._progress = time.monotonic()
        self._pause = _INTERVAL
        self._wake.set()
        while not self.empty and time.monotonic() - self._progress < patience:
            time.sleep(0.01)
        return self.empty

    def close(self) -> None:
        """End the thread, and the journal with it; what has not been sent stays on disk."""
        self._ended.set()
        self._wake.set()
        self._thread.join(1.0)  # longer only where a server has gone silent; the thread then ends by itself
        if not self.empty:
            self._save()
        self.journal.close(remove=self.empty)

    def send(self) -> None:
        """Send everything, in the order of logging.

        Raises:
            Exception: Whatever the store raises while it is away. What it has taken until then is not sent again.
        """
        with impatient():
            if self._client is None:
                self._client = open_client(self.tracking_uri)
            if self.journal.header["run_id"] is None:
                info = create_run(self._client, self.tracking_uri, self.journal.header)
                self.journal.update(run_id=info.run_id)
            if self._latest is None and self.journal.header.get("continued"):
                self._latest = self._go_on()
            while not self.journal.empty:
                records, end = self.journal.read()
                for kind, group in groupby(records, key=lambda record: next(iter(record), "")):
                    contents: list[Any] = [record.get(kind) for record in group]
                    if kind == "metrics":
                        self._metrics([point for content in contents for point in content])
                    else:
                        for content in contents:
                            self._try(kind, content)
                self.journal.done(end)
                self._progress = time.monotonic()

    def _work(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(self._pause)
            self._wake.clear()
            try:
                self.send()
                if self.error is not None:
                    _log.warning("the tracking store answers again and has everything")
                self.error, self._pause = None, _INTERVAL
            except Exception as error:  # whatever happens to the store is not the training's concern
                if self.error is None and not self._ended.is_set():
                    _log.warning(
                        "the tracking store %s does not answer (%s): training goes on, and what it logs is kept in %s",
                        *(without_password(self.tracking_uri), reason(error), self.journal.folder),
                    )
                self.error, self._pause = error, min(2 * self._pause, _LONGEST)
                self._save()

    def _save(self) -> None:
        try:
            self.journal.save()
        except (OSError, ValueError):  # a disk that fails, or a journal that has been closed meanwhile
            _log.debug("the spool could not be saved", exc_info=True)

    # One method for each kind of record

    def _try(self, kind: str, content: Any) -> None:
        """Send one record; one that the store will never take is named and left out."""
        handlers: dict[str, Callable[[Any], None]] = {
            "batch": self._batch,
            "params": self._params,
            "tags": self._tags,
            "artifact": self._artifact,
            "dataset": self._dataset,
            "status": self._status,
        }
        try:
            handlers[kind](content)
        except Exception as error:
            if not rejects(error, self.tracking_uri):
                raise
            name = f"the metric {content[0][0]!r}" if kind == "batch" else f"the run's {kind}"
            if name not in self._refused:
                self._refused.add(name)
                _log.error("the tracking store refuses %s: %s", name, reason(error))

    def _metrics(self, points: list[Any]) -> None:
        latest = None if self._latest is None else dict(self._latest)
        points = [point for point in points if latest is None or _is_new(latest, *point)]
        try:
            self._batch(points)
        except Exception as error:
            if not rejects(error, self.tracking_uri):
                raise
            for _, same in groupby(sorted(points, key=lambda point: point[0]), key=lambda point: point[0]):
                self._try("batch", list(same))
        self._latest = latest  # not before they are stored: otherwise they are sent again

    def _batch(self, points: list[Any]) -> None:
        from mlflow.entities import Metric

        if points:
            self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in points])

    def _params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        self.client.log_batch(self.run_id, params=[Param(key, value) for key, value in params.items()])

    def _tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _artifact(self, content: Mapping[str, str]) -> None:
        file = self.journal.file(content["file"])
        if file.exists():  # otherwise it has been sent before
            self.client.log_artifact(self.run_id, str(file), content["folder"] or None)
            file.unlink()

    def _dataset(self, content: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", content["context"])]
        self.client.log_inputs(self.run_id, [DatasetInput(Dataset(**content["dataset"]), tags=tags)])

    def _status(self, content: Mapping[str, Any]) -> None:
        if content["status"] == "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.client.set_terminated(self.run_id, content["status"], content["time"])

    # A run that is continued logs some steps again

    def _go_on(self) -> dict[str, tuple[int, float]]:
        """Return the latest point of each metric, and find the run where it was continued by its local id."""
        if (run := find_run(self.client, self.run_id)) is None:
            raise TrackingError(f"it has no run {self.run_id}")
        self.journal.update(run_id=run.info.run_id, local_id=run.data.tags.get("local_id"))
        return {point.key: (point.step, point.value) for point in run.data._metric_objs}

    @property
    def client(self) -> MlflowClient:
        """The store, once it is open."""
        assert self._client is not None
        return self._client

    @property
    def run_id(self) -> str:
        """The run's id in the store, once it has one."""
        return str(self.journal.header["run_id"])


def _is_new(latest: dict[str, tuple[int, float]], key: str, value: float, _timestamp: int, step: int) -> bool:
    """Return whether a point is beyond the latest of its metric, and take note of it."""
    known_step, known_value = latest.get(key, (-1, 0.0))
    # Step 0 is that of results of the run as a whole, which may change when it goes on.
    stored = step < known_step or (step == known_step and (step > 0 or value == known_value))
    if stored and not key.startswith("system/"):
        return False
    latest[key] = (step, value)
    return True


def sync(tracking_uri: str, study: str | None = None) -> int:
    """Send what outages and killed processes have left of runs in a store, and remove it here.

    Spools of other stores and of runs that are still going on stay as they are, and are named.

    Args:
        tracking_uri: The store.
        study: Only the runs of this comparison.

    Returns:
        The number of runs that the store now has whole.

    Raises:
        TrackingError: The store does not answer, or spools are damaged; all others have been sent by then. What has
            been taken is not sent again.
    """
    files = sorted(spool_folder(tracking_uri).glob("*/run.json"))
    sent, errors = 0, []
    for file in files:
        try:
            if study is None or _is_of(file, study):
                sent += _sync(file.parent, tracking_uri)
        except TrackingError as error:
            errors.append(error)
    if errors:
        raise TrackingError("; ".join([*map(str, errors), f"{sent} runs sent"])) from errors[0]
    return sent


def _is_of(file: Path, study: str) -> bool:
    try:
        return bool(json.loads(file.read_text())["tags"]["study"] == study)
    except (OSError, KeyError, TypeError, ValueError):  # damaged, or of a run outside comparisons
        return False


def _sync(folder: Path, tracking_uri: str) -> bool:
    address = without_password(tracking_uri)
    try:
        with closing(Journal(folder)) as journal:
            if (other := journal.header["tracking_uri"]) != address:
                _log.warning("%s is of the store %s: left as it is", folder, other)
                return False
            Spool(journal, tracking_uri).send()
            journal.close(remove=True)
            return True
    except JournalInUseError as error:
        _log.warning("%s", error)
        return False
    except Exception as error:
        raise TrackingError(f"the tracking store {address} does not take {folder}: {reason(error)}") from error
