"""Journal: what a run has written and the tracking store has not taken yet, as a folder of files.

A record is in the file before the call that logs it returns, so that neither a store that is away nor a process that is
killed loses it. The folder ``mlruns/spool/<run_id>`` holds::

    run.json      the run: its store, experiment, name, tags, and its id in the store once it has one
    queue.jsonl   one record a line, in the order of logging: {"metrics": ...}, {"tags": ...}, {"artifact": ...}, ...
    files/        the artifacts that are still to be sent
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from lit_sigsoftmax.store import TrackingError

__all__ = ["Journal", "JournalInUseError"]

LIMIT = 1 << 30  # bytes of records: some ten million points; metrics beyond that are dropped

_log = logging.getLogger(__name__)


class JournalInUseError(TrackingError):
    """Another process writes this run."""


class Journal:
    """A queue of records on disk with one writer and one reader, threads of one process.

    Args:
        folder: Where it is kept, made where missing and readable by its owner alone.
        header: What ``run.json`` holds where there is none yet.

    Raises:
        JournalInUseError: Another process has it open.
        TrackingError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.owner = os.getpid()
        self.dropped = 0
        self._turn = threading.Lock()
        self._lock = FileLock(folder / "lock", thread_local=False)
        try:
            self._open(header or {})
        except Timeout:
            raise JournalInUseError(f"another process writes the run of {folder}: wait for it, or end it") from None
        except OSError as error:
            raise TrackingError(f"cannot write to {folder} ({error.strerror}): work where you may write") from error

    def _open(self, header: Mapping[str, Any]) -> None:
        (self.folder / "files").mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._lock.acquire(timeout=0)
        if not (self.folder / "run.json").exists():
            self._write_header(header)
        self.header: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        self._file = (self.folder / "queue.jsonl").open("a+b", buffering=0)
        self._size, self._offset = self._whole_lines(), 0
        self._file.truncate(self._size)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record of plain data. A disk that takes no more costs the record, never the training."""
        line = json.dumps(record).encode() + b"\n"
        with self._turn:
            try:
                if self._size + len(line) > LIMIT and "metrics" in record:
                    raise OSError(f"the spool has reached {LIMIT:,} bytes")
                self._write(line)
            except OSError as error:
                self._lose(error)

    def add_file(self, source: Path | str, name: str) -> str | None:
        """Keep a copy of a file, or a text, until it is sent. A disk that takes no more costs the file alone.

        Returns:
            Its path below ``files/``, in a folder of its own; None where it is lost.

        Raises:
            OSError: The source cannot be read.
        """
        with source.open("rb") if isinstance(source, Path) else BytesIO(source.encode()) as content:
            try:
                return self._keep(content, name)
            except OSError as error:
                with self._turn:
                    self._lose(error)
                return None

    def file(self, path: str) -> Path:
        """Return the file that :meth:`add_file` kept.

        Raises:
            ValueError: The path leads out of ``files/``: somebody else has written the journal.
        """
        root = (self.folder / "files").resolve()
        if root not in (found := (root / path).resolve()).parents:
            raise ValueError(f"{path!r} is outside {root}")
        return found

    @property
    def empty(self) -> bool:
        """Whether the store has all."""
        return self._offset == self._size

    def read(self, n: int = 1000) -> tuple[list[dict[str, Any]], int]:
        """Return up to ``n`` records that are not done yet, and the offset after them for :meth:`done`."""
        end = self._offset
        records: list[dict[str, Any]] = []
        with (self.folder / "queue.jsonl").open("rb") as file:
            file.seek(self._offset)
            while len(records) < n and end < self._size and (line := file.readline()):
                end += len(line)
                try:
                    records.append(dict(json.loads(line)))
                except (TypeError, ValueError):
                    _log.warning("skipped a damaged line of %s, up to byte %d", file.name, end)
        return records, end

    def done(self, offset: int) -> None:
        """Take note that the store has everything up to ``offset``."""
        with self._turn:
            self._offset = offset
            if self._offset == self._size:
                self._file.truncate(0)
                self._offset = self._size = 0

    def update(self, **changes: Any) -> None:
        """Change the header."""
        self.header |= changes
        self._write_header(self.header)

    def save(self) -> None:
        """Have the records on the disk itself, where they outlive a power cut."""
        os.fsync(self._file.fileno())

    def close(self, remove: bool = False) -> None:
        """Give the folder up, and remove it where nothing in it is needed."""
        self._file.close()
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def _keep(self, content: BinaryIO, name: str) -> str:
        number = sum(1 for _ in (self.folder / "files").iterdir())
        while (kept := self.folder / "files" / str(number) / name).parent.exists():
            number += 1
        kept.parent.mkdir()
        try:
            with kept.open("wb") as copy:
                shutil.copyfileobj(content, copy)
        except OSError:
            shutil.rmtree(kept.parent, ignore_errors=True)  # room for the records
            raise
        return f"{number}/{name}"

    def _lose(self, error: OSError) -> None:
        if not self.dropped:
            _log.warning("%s takes no more: what is logged is LOST from here on (%s)", self.folder, error)
        self.dropped += 1

    def _write(self, line: bytes) -> None:
        written = self._file.write(line) or 0
        if written < len(line):  # the disk is full: half a record is none
            self._file.truncate(self._size)
            raise OSError("no space left")
        self._size += written

    def _write_header(self, header: Mapping[str, Any]) -> None:
        part = self.folder / "run.json.part"
        with part.open("w") as file:
            json.dump(header, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.folder / "run.json")

    def _whole_lines(self) -> int:
        # A process that was killed may have left half a line.
        end = self._file.seek(0, os.SEEK_END)
        start = self._file.seek(max(0, end - (1 << 20)))
        return start + self._file.read().rfind(b"\n") + 1
