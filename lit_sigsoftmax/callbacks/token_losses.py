"""The loss of every test token, kept with the run: what a comparison looks at afterwards."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lit_sigsoftmax.data import CorpusDataModule
from lit_sigsoftmax.functional import IGNORE_INDEX
from lit_sigsoftmax.tracking import tracker_of

__all__ = ["TokenLosses"]


class TokenLosses(Callback):
    """Stores the test split's loss token by token, in the order of the text, whatever the number of streams or devices.

    Two artifacts of the run, which ``lit-sigsoftmax report`` reads:

    - ``test_token_nll.npy``: (N,) float32, nats.
    - ``test_tokens.npz``: what these tokens are, so that a report needs no corpus. ``ids`` (N,) int32; ``types``, the
      UTF-8 bytes of the vocabulary, one type a line, (bytes,) uint8; ``counts`` (V,) int64, how often each type occurs
      in the training split.

    Nothing is stored where ``test_step`` returns no loss of each token, or the trainer has no
    :class:`~lit_sigsoftmax.tracking.MLflowTracker`.
    """

    def __init__(self) -> None:
        self._nll: list[Tensor] = []
        self._target: list[Tensor] = []

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        self._nll, self._target = [], []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a segment's losses, (streams, time)."""
        if isinstance(outputs, Tensor) and outputs.shape == batch[1].shape:
            self._nll.append(outputs.detach().float())
            self._target.append(batch[1])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather and store them."""
        if not self._nll:
            return
        nll, target = torch.cat(self._nll, dim=1), torch.cat(self._target, dim=1)
        self._nll, self._target = [], []
        counted = target != IGNORE_INDEX
        # Streams follow each other in the text, and ranks in the streams: row by row, rank by rank is its order.
        losses, ids = _all_ranks(trainer, nll[counted]), _all_ranks(trainer, target[counted])
        tracker, datamodule = tracker_of(trainer), trainer.datamodule  # type: ignore[attr-defined]
        if tracker is None or not trainer.is_global_zero:
            return
        with TemporaryDirectory() as folder:
            np.save(Path(folder, "test_token_nll.npy"), losses)
            if isinstance(datamodule, CorpusDataModule):
                corpus = datamodule.corpus
                np.savez_compressed(
                    Path(folder, "test_tokens.npz"),
                    ids=ids.astype(np.int32),
                    types=np.frombuffer("\n".join(corpus.vocabulary.tokens).encode(), np.uint8),
                    counts=np.bincount(corpus.train.numpy(), minlength=len(corpus.vocabulary)),
                )
            for file in sorted(Path(folder).iterdir()):
                tracker.log_artifact(file)


def _all_ranks(trainer: Trainer, values: Tensor) -> Any:
    parts = gather_all_tensors(values) if trainer.world_size > 1 else [values]
    return torch.cat(parts).cpu().numpy()
