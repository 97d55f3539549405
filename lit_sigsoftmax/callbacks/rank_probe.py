"""The rank of the log-probability matrix on the test split."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics.utilities.distributed import gather_all_tensors

from lit_sigsoftmax.analysis import Spectrum, plot_spectra, spectrum
from lit_sigsoftmax.functional import IGNORE_INDEX
from lit_sigsoftmax.heads import OutputHead
from lit_sigsoftmax.module import LanguageModel
from lit_sigsoftmax.tracking import tracker_of

__all__ = ["RankProbe"]

_ENERGIES = ("1e-3", "1e-4", "1e-5")  # Parthiban et al., AAAI 2021
_NUMBERS = 2**22  # of a block of log-probabilities, over all experts: 32 MB


class RankProbe(Callback):
    """Measures, at the end of a test, how many linearly independent log-output vectors the model has.

    It keeps the hidden vectors that the test computes anyway, (N, d) on rank 0, and from them computes the
    log-probabilities once more, in float64 and block by block: float32 rounding must not count as rank. Nothing of the
    test itself changes. See :mod:`lit_sigsoftmax.analysis` for the measures and the method, and ``docs/rank.md`` for
    what it costs.

    Logged, at step 0:

    - ``test/log_prob_rank``: the count by the threshold of Press et al., at float64's machine epsilon;
    - ``test/log_prob_rank_float32``: the same at float32's, to which the published counts belong;
    - ``test/log_prob_rank_limit``: what either can be at most, the smaller of contexts taken and vocabulary;
    - ``test/effective_rank_1e-3``, ``_1e-4`` and ``_1e-5``.

    An :class:`~lit_sigsoftmax.tracking.MLflowTracker` also gets the artifacts ``spectrum.json``, as
    :meth:`lit_sigsoftmax.analysis.Spectrum.to_json` writes it, and ``spectrum.png``.

    Args:
        max_tokens: How many contexts to take, evenly spread over the test split of all devices; null takes all. The
            counts of different numbers of contexts are not comparable.

    Attributes:
        spectrum: The singular values of the last test, on rank 0; None before.

    Raises:
        ValueError: ``max_tokens`` is below 1.
    """

    def __init__(self, max_tokens: int | None = 4096) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is at least 1, or null for all, not {max_tokens}")
        self.max_tokens = max_tokens
        self.spectrum: Spectrum | None = None
        self._hook: RemovableHandle | None = None
        self._output: Tensor | None = None
        self._hidden: list[Tensor] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the hidden vectors.

        Raises:
            TypeError: The module is not a LanguageModel.
        """
        if not isinstance(pl_module, LanguageModel):
            raise TypeError(f"RankProbe needs a LanguageModel, whose head it measures, not {type(pl_module).__name__}")
        self._stop()
        self.spectrum = None
        self._hook = pl_module.register_forward_hook(self._listen)

    def _listen(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # Under DDP the test step itself comes through here as well, around the real call: it returns no hidden vectors.
        if isinstance(output, tuple) and isinstance(output[0], Tensor):
            self._output = output[0]

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the hidden vectors of the predictions that count.

        Raises:
            RuntimeError: The test step did not call the model on its batch.
        """
        hidden, target = self._output, batch[1]
        self._output = None
        if hidden is None or hidden.shape[:-1] != target.shape:
            raise RuntimeError(
                f"RankProbe needs a hidden vector for each target {tuple(target.shape)}, and the model gave "
                f"{None if hidden is None else tuple(hidden.shape)}: test_step is to call self(tokens, state) once"
            )
        self._hidden.append(hidden[target != IGNORE_INDEX].cpu())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the spectrum on rank 0, of the contexts of all ranks, and log the ranks."""
        assert isinstance(pl_module, LanguageModel)
        hidden = torch.cat(self._hidden)
        self._stop()
        if trainer.world_size > 1:
            hidden = torch.cat(gather_all_tensors(hidden.to(pl_module.device))).cpu()
        if not trainer.is_global_zero or not len(hidden):
            return
        if self.max_tokens is not None and len(hidden) > self.max_tokens:
            hidden = hidden[torch.linspace(0, len(hidden) - 1, self.max_tokens, dtype=torch.float64).round().long()]
        self.spectrum = found = spectrum(_log_probs(pl_module.head, hidden))
        metrics = {
            "log_prob_rank": found.log_prob_rank(),
            "log_prob_rank_float32": found.log_prob_rank(torch.float32),
            "log_prob_rank_limit": min(found.n_rows, found.n_columns),
        } | {f"effective_rank_{eps}": found.effective_rank(float(eps)) for eps in _ENERGIES}
        for name, value in metrics.items():
            pl_module.log(f"test/{name}", float(value), rank_zero_only=True, sync_dist=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the spectrum and its plot to the run."""
        tracker = tracker_of(trainer)
        if self.spectrum is None or tracker is None:
            return
        assert isinstance(pl_module, LanguageModel)
        tracker.log_text(self.spectrum.to_json(), "spectrum.json")
        with TemporaryDirectory() as folder:
            path = Path(folder, "spectrum.png")
            plot_spectra({pl_module.head.name: self.spectrum}).savefig(path)
            tracker.log_artifact(path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._stop()

    def _stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._output, self._hidden = None, None, []


def _log_probs(head: OutputHead, hidden: Tensor) -> Iterator[Tensor]:
    """The log-probabilities of hidden vectors (N, d), computed in float64 in blocks of rows (n, V)."""
    device = head.weight.device
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    head = copy.deepcopy(head).to(device, torch.float64).eval()
    for rows in hidden.split(max(1, _NUMBERS // (head.n_experts * head.vocab_size))):
        yield head.log_prob(rows.to(device, torch.float64))
