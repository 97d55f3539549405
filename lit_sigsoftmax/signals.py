"""SIGTERM and Ctrl-C as a request to stop at the next good moment."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopSignals", "Stopped", "stoppable"]


class Stopped(SystemExit):
    """Ends a run that was told to stop, with the exit code of the signal: 143 for SIGTERM, 130 for Ctrl-C.

    Args:
        signum: The signal.
        quietly: With exit code 0: of several processes that stop together, only the first reports the signal, so that
            none is taken for one that died.
    """

    def __init__(self, signum: int, quietly: bool = False) -> None:
        super().__init__(0 if quietly else 128 + signum)
        self.signum = signum


@contextmanager
def stoppable(*signums: int) -> Iterator[None]:
    """Let signals end the block with :class:`Stopped`, at once.

    From other threads than the main one Python lets nobody handle signals.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, stop) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class StopSignals:
    """Remembers the first SIGTERM or SIGINT while ``deferred`` is True; otherwise, and the second time, stops at once.

    Attributes:
        received: The number of the signal, 0 before there is one.
        deferred: Whether there is somebody who looks at ``received``.
    """

    def __init__(self) -> None:
        self.received = 0
        self.deferred = False

    def install(self) -> None:
        """Handle the signals from now on; Lightning puts the handlers back that were there before it began.

        From other threads than the main one Python lets nobody handle signals.
        """
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.deferred or self.received:
            raise Stopped(signum)
        self.received = signum
        name = signal.Signals(signum).name
        print(f"{name}: stopping after this step, with a checkpoint; once more stops at once", file=sys.stderr)
