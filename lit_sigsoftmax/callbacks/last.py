"""The checkpoint from which a run goes on as if it had never been interrupted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_sigsoftmax.callbacks.checkpoint import RunCheckpoint
from lit_sigsoftmax.checkpoints import LAST, CheckpointError, keep_previous
from lit_sigsoftmax.module import LanguageModel
from lit_sigsoftmax.processes import gather, random_state, set_random_state
from lit_sigsoftmax.resume import run_lock
from lit_sigsoftmax.signals import Stopped, StopSignals
from lit_sigsoftmax.tracking import tracker_of

__all__ = ["LastCheckpoint"]


class LastCheckpoint(RunCheckpoint):
    """Keeps ``last.ckpt``, and the one before it, so that training can be continued bit for bit.

    A checkpoint is written just before a step, when everything about the step before it has been done and logged, a
    validation included: at the start of every epoch, at intervals within it, and at the end. Beside Lightning's own
    state it holds, of every process, the random number generators and what the model carries from step to step. SIGTERM
    and Ctrl-C are answered there too: the run writes a checkpoint and ends with exit code 143 or 130.

    (A checkpoint that Lightning writes at the end of a step comes before that step is logged and validated; at the end
    of a validation or an epoch, before the rest of that.)

    Args:
        dirpath: The folder, by default that of the run.
        every_n_steps: Optimizer steps between checkpoints; 0 for none but those of the other rules.
        minutes: Minutes between checkpoints.

    Attributes:
        settings: What is recorded as the configuration of the run; the command line compares it on resuming.
    """

    def __init__(self, dirpath: str | None = None, every_n_steps: int = 0, minutes: float = 10.0) -> None:
        if every_n_steps < 0 or minutes <= 0:
            raise ValueError(
                "last_checkpoint needs every_n_steps of at least 0 and minutes above 0, "
                f"got {every_n_steps} and {minutes}"
            )
        super().__init__(dirpath, filename=Path(LAST).stem, monitor=None)
        self.every_n_steps = every_n_steps
        self.minutes = minutes
        self.settings: dict[str, str] = {}
        self._lock: BaseFileLock | None = None
        self._signals = StopSignals()
        self._time = 0.0
        self._loaders: dict[str, Any] | None = None  # position of the data before the next step, if that is to be saved
        self._saving = False
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and let no other process train in it.

        Raises:
            CheckpointError: Another process does.
        """
        super().setup(trainer, pl_module, stage)
        self.best_model_path = self._path
        if stage == "fit" and trainer.is_global_zero and not _is_trial(trainer):
            Path(str(self.dirpath)).mkdir(parents=True, exist_ok=True)
            self._lock = run_lock(str(self.dirpath))
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise CheckpointError(f"another process is training in {self.dirpath}: wait, or end it") from None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that all processes go on from the same checkpoint.

        Raises:
            CheckpointError: They do not.
        """
        if len(found := set(gather(str(trainer.ckpt_path)))) > 1:
            raise CheckpointError(
                f"the processes found different checkpoints to go on from, {' and '.join(sorted(found))}: name one "
                "with ckpt_path, on a file system that all machines share"
            )

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the last checkpoint is always at the same place."""
        return {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals in place of Lightning, whose handler starts a collective wherever the process is."""
        self._signals.install()
        self._signals.deferred = True
        self._time = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals; outside training they end the run at once."""
        self._signals.install()

    on_test_start = on_predict_start = on_validation_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before the first step of an epoch."""
        self._loaders = trainer.fit_loop.on_save_checkpoint()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether to save before the next step: all processes together, where one of them wants to."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return  # gradients that wait for more are in no checkpoint
        due = self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0
        due |= time.monotonic() - self._time > 60 * self.minutes or self._signals.received > 0
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._loaders = trainer.fit_loop.on_save_checkpoint()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save, if it is time to; after a restart, first put the random number generators where they were."""
        if self._restored is not None:
            own = self._restored["processes"][trainer.global_rank]
            set_random_state(own["random"])
            if isinstance(pl_module, LanguageModel):
                pl_module.carry_on(own["carried"])
            # Lightning counts a validation that it has had, and does not repeat, as a step of the loggers.
            trainer.fit_loop.epoch_loop._batches_that_stepped = self._restored["logged_steps"]
            self._restored = self._loaders = None
        elif self._loaders is not None and not _is_trial(trainer):
            self._save(trainer)
            self._stop_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save nothing: the start of the next step does."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save nothing: the start of the next epoch does."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished training."""
        if not _is_trial(trainer):
            self._loaders = None
            self._save(trainer)
            self._stop_if_told(trainer)
        self._signals.deferred = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the run as killed, if it was."""
        self._signals.deferred = False
        self._release()
        if isinstance(exception, Stopped) and (tracker := tracker_of(trainer)):
            tracker.finalize("killed")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let others train in the folder."""
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what the continued run needs beside Lightning's own state."""
        checkpoint["settings"] = self.settings
        tracker = tracker_of(trainer)
        checkpoint["run_id"] = tracker.run_id if tracker else None
        if self._saving:
            carried = pl_module.carried() if isinstance(pl_module, LanguageModel) else None
            checkpoint["resume"] = {
                "processes": gather({"random": random_state(), "carried": carried}),
                "logged_steps": trainer.fit_loop.epoch_loop._batches_that_stepped,
                "stopped": trainer.should_stop,
            }
            _set_to_step_boundary(checkpoint["loops"]["fit_loop"], self._loaders)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take what :meth:`on_save_checkpoint` added.

        Raises:
            CheckpointError: Another number of processes wrote the checkpoint.
        """
        if not trainer.training or (restored := checkpoint.get("resume")) is None:
            return
        if (processes := len(restored["processes"])) != trainer.world_size:
            raise CheckpointError(
                f"the checkpoint was written by {processes} processes and is to be continued by {trainer.world_size}: "
                f"each has a state of its own, so set trainer.devices and trainer.num_nodes to make {processes}"
            )
        self._restored = restored
        trainer.should_stop = restored["stopped"]

    @property
    def _path(self) -> str:
        return str(Path(str(self.dirpath), LAST))

    def _save(self, trainer: Trainer) -> None:
        if not all(parameter.isfinite().all() for parameter in trainer.lightning_module.parameters()):
            rank_zero_warn(f"the weights are not finite any more: {self._path} keeps what it has")
            return
        # A last checkpoint from which this run did not go on was damaged: the one before it is worth more.
        if trainer.is_global_zero and self._path in (self._last_checkpoint_saved, str(trainer.ckpt_path)):
            keep_previous(self._path)
        if tracker := tracker_of(trainer):
            tracker.save_journal()  # what was logged before the checkpoint is not logged again
        self._saving = True
        try:
            self._save_checkpoint(trainer, self._path)
        finally:
            self._saving = False
        self._loaders, self._time = None, time.monotonic()

    def _stop_if_told(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self._signals.received > 0, all=False):
            signum = max(gather(self._signals.received))
            raise Stopped(signum, quietly=not trainer.is_global_zero)


def _is_trial(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _set_to_step_boundary(fit_loop: dict[str, Any], loaders: dict[str, Any] | None) -> None:
    """Let the loops' state be that between two steps.

    Lightning has counted the next step as ready and its data as given out. Without the data's position, training has
    ended: should it be made longer, an epoch begins.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False
    for count in (progress["total"], progress["current"]):
        count["ready"] = count["completed"]
    if loaders is None:
        progress["current"] = dict.fromkeys(progress["current"], 0)
    fit_loop["state_dict"] = loaders or {}
