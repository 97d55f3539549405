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

    def state_dict(self) -> dict[str, Any]:
        """What has been counted of the epoch."""
        return {"seconds": self.seconds, "tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds, self.tokens = state_dict["seconds"], state_dict["tokens"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of an epoch that goes on."""
        self._start = time.perf_counter()

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
            # By rank 0's clock: the ranks keep step. An average over them would be taken when it is first read, which
            # the progress bar does on rank 0 alone, and then waits for ever.
            pl_module.log("train/tokens_per_second", self.tokens / self.seconds, rank_zero_only=True, sync_dist=True)
