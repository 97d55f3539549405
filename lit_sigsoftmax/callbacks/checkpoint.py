"""Checkpoints of a run stand in a folder named after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_sigsoftmax.tracking import tracker_of

__all__ = ["RunCheckpoint"]


class RunCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint by validation loss in ``mlruns/checkpoints/<run_id>``.

    The command line adds a second one without a monitor, which keeps ``last.ckpt``: with a monitor, Lightning's
    ``save_last`` keeps the last that was among the best.

    Args:
        dirpath: Another folder.
        filename: Pattern of the checkpoint's name.
        monitor: The metric that decides which is best; None keeps the latest.
        mode: Whether the metric is better when lower or higher.
        save_top_k: How many of the best are kept.
        save_weights_only: Whether optimizer and loop states are left out; such a checkpoint cannot be continued.
        every_n_epochs: Epochs between checkpoints.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "best-{step}",
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_weights_only: bool = False,
        every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            every_n_epochs=every_n_epochs,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's folder, the same on all ranks."""
        if self.dirpath is None and (tracker := tracker_of(trainer)):
            folder = Path(tracker.save_dir, "checkpoints", str(tracker.run_id)).resolve()
            self.dirpath = trainer.strategy.broadcast(str(folder))
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up which checkpoints are the best, also where their folder has been moved with them."""
        moved = {key: self._here(state_dict.get(key)) for key in ("best_model_path", "kth_best_model_path")}
        if self.dirpath and moved["best_model_path"]:
            best = {self._here(path): score for path, score in state_dict.get("best_k_models", {}).items()}
            best.pop(None, None)
            kept = {key: path or "" for key, path in moved.items()}
            state_dict = {**state_dict, **kept, "best_k_models": best, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)

    def _here(self, path: str | None) -> str | None:
        here = Path(str(self.dirpath), Path(path or "").name)
        return str(here) if path and here.is_file() else None
