"""Tokens per second of training."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["Throughput"]


class Throughput(Callback):
    """Logs ``train/tokens_per_second`` of each epoch, over all devices, validation left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.seconds, self.tokens, self._start = 0.0, 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, from the end of the last one to the end of this."""
        now = time.perf_counter()
        self.seconds, self._start = self.seconds + now - self._start, now
        self.tokens += batch[1].numel() * trainer.world_size

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation out."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rate."""
        if self.seconds:
            pl_module.log("train/tokens_per_second", self.tokens / self.seconds, sync_dist=True)
            # The average is taken when it is first read: here on all ranks, not later by rank 0's progress bar alone.
            _ = trainer.callback_metrics
