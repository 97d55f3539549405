"""Training runs as processes of their own: what one does to itself does not touch the others."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["check", "train"]

Progress = Callable[[int, int], None]


def train(arguments: Sequence[str], log: Path, progress: Progress, threads: int) -> bool:
    """Run ``fit`` with the given arguments in a new process.

    Args:
        arguments: The command line after ``fit``.
        log: The file that gets what the run prints.
        progress: Called with the steps done and the steps in all.
        threads: The processor threads that it may use.

    Returns:
        Whether the run succeeded.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = _context().Process(target=_train, args=(list(arguments), str(log), sender, threads))
    process.start()
    sender.close()
    try:
        while True:
            progress(*receiver.recv())
    except EOFError:  # the process has ended, or at least closed its end
        process.join()
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
    return process.exitcode == 0


def check(command_lines: Sequence[Sequence[str]]) -> int:
    """Make model, data and trainer of each command line without training, so that a mistake shows before hours.

    Returns:
        The exit code: 0 where all can be made; otherwise the error has been printed.
    """
    process = _context().Process(target=_check, args=([list(line) for line in command_lines],))
    process.start()
    process.join()
    return process.exitcode or 0


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
    context.set_forkserver_preload(["lit_sigsoftmax.training", "mlflow"])
    return context


def _train(arguments: list[str], log: str, sender: Connection, threads: int) -> None:
    import torch

    from lit_sigsoftmax import training

    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(threads)
    # What Lightning starts the other processes of a DDP run with.
    sys.argv = [str(Path(training.__file__).with_name("__main__.py")), "fit", *arguments]
    try:
        training.run(sys.argv[1:], [_Reporter(sender)])
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def _check(command_lines: list[list[str]]) -> None:
    from lit_sigsoftmax.training import LanguageModelCLI, silence_noise

    silence_noise()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for line in command_lines:
        LanguageModelCLI(line, run=False)
