"""Runs as processes of their own: what one does to itself does not touch the others."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_sigsoftmax.compare.job import Job
from lit_sigsoftmax.store import TrackingError

__all__ = ["Share", "check", "shares", "train"]

# What a run may take, when it is told to end, for the step under way, its last checkpoint, and the store, for which
# alone it waits 20 s.
_PATIENCE = 120.0


@dataclass(frozen=True)
class Share:
    """What one worker may use of the machine.

    Attributes:
        threads: Processor threads.
        devices: The value of ``CUDA_VISIBLE_DEVICES``; None leaves it as it is.
    """

    threads: int
    devices: str | None = None


def shares(workers: int, cpus: int, gpus: Sequence[str] = ()) -> list[Share]:
    """Divide a machine among workers.

    Args:
        workers: Number of runs at a time.
        cpus: Number of processor cores.
        gpus: The GPUs, as ``CUDA_VISIBLE_DEVICES`` names them. Workers beyond their number share them in turn.

    Example:
        >>> shares(2, 8, ["0", "1", "2"])
        [Share(threads=4, devices='0,1'), Share(threads=4, devices='2')]
    """
    threads = max(1, cpus // workers)
    if not gpus:
        return [Share(threads)] * workers
    if workers > len(gpus):
        return [Share(threads, gpus[i % len(gpus)]) for i in range(workers)]
    size, more = divmod(len(gpus), workers)
    starts = [i * size + min(i, more) for i in range(workers + 1)]
    return [Share(threads, ",".join(gpus[a:b])) for a, b in itertools.pairwise(starts)]


def train(
    jobs: Sequence[Job], workers: Sequence[Share], on_step: Callable[[Job, int, int], None]
) -> Generator[tuple[Job, int], None, None]:
    """Train jobs in processes of their own, as many at a time as there are workers.

    However the iteration ends, no process is left: each run leads a process group, which is ended as a whole, and each
    ends itself when this process is gone.

    Args:
        jobs: The runs.
        workers: What each worker may use.
        on_step: Called with the steps done and the steps in all.

    Yields:
        The job that has ended, and its exit code, that of a signal negative where the signal ended it.
    """
    waiting, free = list(jobs), list(workers)
    running: dict[Connection, tuple[Job, Share, _Child]] = {}
    try:
        while waiting or running:
            while waiting and free:
                job, share = waiting.pop(0), free.pop(0)
                child = _Child(_train, job, share)
                running[child.receiver] = (job, share, child)
            for receiver in wait(list(running)):
                job, share, child = running[receiver]  # type: ignore[index]
                try:
                    on_step(job, *child.receiver.recv())
                except EOFError:  # the process has ended
                    del running[child.receiver]
                    free.append(share)
                    yield job, child.end()
    finally:
        for _, _, child in running.values():
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        for _, _, child in running.values():
            child.end(max(0.0, deadline - time.monotonic()))


def check(command_lines: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Make model, data and trainer of each command line without training, so that a mistake shows before hours.

    Returns:
        The flattened configuration of each, with the corpus's fingerprint and number of types.

    Raises:
        SystemExit: One cannot be made; the error has been printed.
    """
    child = _Child(_check, [list(line) for line in command_lines])
    params: list[dict[str, str]] = []
    try:
        with contextlib.suppress(EOFError):
            while True:
                params.append(child.receiver.recv())
    except BaseException:
        child.end(0)
        raise
    if code := child.end():
        raise SystemExit(code)
    return params


class _Child:
    """A process with a pipe for what it reports, and one that tells it when its parent is gone."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        self.receiver, sender = multiprocessing.Pipe(duplex=False)
        watched, self.lifeline = multiprocessing.Pipe(duplex=False)
        self.process: BaseProcess = _context().Process(target=_main, args=(target, sender, watched, *args))
        self.process.start()
        sender.close()
        watched.close()

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(self.process.pid or 0), number)

    def end(self, patience: float = _PATIENCE) -> int:
        """Wait a moment, end what is left of the process's group, and return its exit code."""
        self.process.join(patience)
        self.signal(signal.SIGKILL)
        self.process.kill()  # where it has no group yet
        self.process.join()
        self.lifeline.close()
        self.receiver.close()
        return int(self.process.exitcode or 0)


def _main(target: Callable[..., None], sender: Connection, watched: Connection, *args: Any) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
    target(sender, *args)


def _end_with_parent(watched: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        watched.recv()  # nothing is ever sent: this returns when the other end is closed, by whatever death
    os.killpg(0, signal.SIGKILL)


class _Reporter(Callback):
    def __init__(self, sender: Connection) -> None:
        self.sender = sender

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            batches = int(trainer.num_training_batches)
            self.sender.send((trainer.current_epoch * batches + batch_idx + 1, (trainer.max_epochs or 1) * batches))


def _context() -> Any:
    # The fork server imports the library once; each run then starts in a moment.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lit_sigsoftmax.training", "mlflow", "mlflow.store.tracking.sqlalchemy_store"])
    return context


def _train(sender: Connection, job: Job, share: Share) -> None:
    import torch

    with job.log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(share.threads)
    if share.devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = share.devices
    try:
        job([_Reporter(sender)])
    except TrackingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def _check(sender: Connection, command_lines: list[list[str]]) -> None:
    from lit_sigsoftmax.training import LanguageModelCLI, silence_noise

    silence_noise()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for line in command_lines:
        cli = LanguageModelCLI(line, run=False)
        sender.send(_params(cli.config.as_dict(), cli.datamodule.corpus))


def _params(config: Mapping[str, Any], corpus: Any) -> dict[str, str]:
    from lit_sigsoftmax.store import flatten

    facts = {"fingerprint": corpus.fingerprint, "types": len(corpus.vocabulary)}
    return {key: str(value)[:6000] for key, value in flatten({**config, "corpus": facts})}
