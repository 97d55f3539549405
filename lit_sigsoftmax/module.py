"""LanguageModel: the LightningModule that joins a backbone and an output head, and that users subclass."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule

# A private name: it tells the constructor that the command line builds the model, from plain data.
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lit_sigsoftmax.activations import ActivationSpec, vouched_for
from lit_sigsoftmax.backbones.interface import embedding_weight, sizes
from lit_sigsoftmax.checkpoints import CheckpointError
from lit_sigsoftmax.data.streams import Segments
from lit_sigsoftmax.faults import TrainingError, loss_memory, non_finite_loss
from lit_sigsoftmax.functional import IGNORE_INDEX
from lit_sigsoftmax.heads import OutputHead
from lit_sigsoftmax.metrics import NegativeLogLikelihood

__all__ = ["LanguageModel"]


class LanguageModel(LightningModule):
    r"""A language model: tokens -> backbone -> hidden vectors -> output head -> nats per token.

    Args:
        backbone: Maps token ids (batch, time), and the carried state or None, to hidden vectors
            (batch, time, hidden_size) and the next state; a module that carries no state may return the hidden
            vectors alone. It has an attribute ``hidden_size``, and ``embedding`` where weights are tied.
        vocab_size: Number of tokens; ``backbone.vocab_size`` where it is not given. The command line takes it from
            the data.
        activation: Output activation: a registered name (softmax, sigsoftmax, sigmoid, relu), an import path, or a
            mapping of class_path and init_args. From Python also a callable.
        n_experts: Number of mixed distributions; 1 is the plain layer, softmax with 15 is MoS, sigsoftmax with 15 is
            MoSS.
        tie_weights: Whether the output weight is the backbone's embedding weight.
        bias: Whether the logits have a bias.
        loss_backend: The implementation of the loss, see :mod:`lit_sigsoftmax.losses`; ``"auto"`` chooses.
        on_nonfinite_loss: Whether a training loss that is infinite or not a number stops the training, or the step is
            skipped: weights, carried state and sums stay as they were before it.

    Attributes:
        head: The :class:`~lit_sigsoftmax.OutputHead`.

    Raises:
        ValueError: Vocabulary or hidden size is unknown, or tied weights do not fit.
    """

    def __init__(
        self,
        backbone: nn.Module,
        vocab_size: int | None = None,
        activation: ActivationSpec = "softmax",
        n_experts: int = 1,
        tie_weights: bool = True,
        bias: bool = True,
        loss_backend: str = "auto",
        on_nonfinite_loss: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        # Checkpoints hold plain data: a module built in Python is handed to load_from_checkpoint again.
        from_python = _given_hyperparameters.get() is None
        self.save_hyperparameters(ignore=["activation", "backbone"] if from_python else ["activation"])
        self.backbone = backbone
        self.tie_weights = tie_weights
        self.head = OutputHead(*sizes(backbone, vocab_size), activation, n_experts, bias=bias, backend=loss_backend)
        self.save_hyperparameters({"activation": self.head.activation_spec})
        if tie_weights:
            self.head.weight = embedding_weight(backbone, self.head.weight.shape)
        self.nll = nn.ModuleDict({f"{stage}_nll": NegativeLogLikelihood() for stage in ("train", "val", "test")})
        self.on_nonfinite_loss = on_nonfinite_loss
        self._state: dict[str, Any] = {}
        self._skip = False

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return the hidden vectors and the next state.

        Args:
            tokens: Token ids, int64, shape (batch, time).
            state: What the last call returned, or None to start afresh.

        Returns:
            Hidden vectors (batch, time, hidden_size), and a state, None for a backbone that carries none.
        """
        out = self.backbone(tokens) if state is None else self.backbone(tokens, state)
        return out if isinstance(out, tuple) else (out, None)

    def log_prob(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return the log-probabilities of the token that follows each position, and the next state.

        Args:
            tokens: Token ids, int64, shape (batch, time).
            state: What the last call returned, or None to start afresh.

        Returns:
            Nats, shape (batch, time, vocab_size), and the state.
        """
        hidden, state = self(tokens, state)
        return self.head.log_prob(hidden), state

    def token_nll(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """Return the negative log-likelihood of a segment that continues the last one of its stage.

        Args:
            batch: Input and target token ids, int64, shape (batch, time) each.
            stage: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``; each carries a state of its own.

        Returns:
            Nats, shape (batch, time), zero where the target is ignored.
        """
        tokens, target = batch
        hidden, state = self(tokens, self._state.get(stage))
        # Truncated back-propagation through time: the next segment sees the state, not its gradient.
        self._state[stage] = apply_to_collection(state, Tensor, Tensor.detach)
        with loss_memory(self.head.vocab_size):
            return self.head.nll(hidden, target)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        before = self._state.get(stage)
        nll, count = self.token_nll(batch, stage), (batch[1] != IGNORE_INDEX).sum()
        if stage != "train":
            self._check_context(stage)
        if stage == "train" and self.on_nonfinite_loss == "skip" and not nll.sum().isfinite():
            self._state[stage] = before
        else:
            self._metric(stage).update(nll, count)
        return nll

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a segment in nats per token."""
        loss = self._step(batch, "train").sum() / (batch[1] != IGNORE_INDEX).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True, batch_size=batch[1].numel())
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        """Look whether the loss is finite, in a subclass's ``training_step`` too, before it reaches the weights.

        Raises:
            NonFiniteLossError: It is not, and such a step is not to be skipped.
        """
        if loss.isfinite():
            return
        trainer = self.trainer
        batch_idx, loader = trainer.fit_loop.epoch_loop.batch_idx, trainer.train_dataloader
        place = loader.place(batch_idx) if isinstance(loader, Segments) else f"batch {batch_idx}"
        error = non_finite_loss(loss, trainer.global_step, trainer.current_epoch, place)
        if self.on_nonfinite_loss == "stop":
            raise error
        rank_zero_warn(f"skipped: {error}")
        self._skip = True

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate; memory that does not suffice is an error that names the remedy."""
        with loss_memory(self.head.vocab_size):
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the weights alone, on all processes, where a loss of one of them was not finite."""
        if self.on_nonfinite_loss == "skip" and self.trainer.strategy.reduce_boolean_decision(self._skip, all=False):
            optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
            self._skip = False

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a segment to the validation sums."""
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Add a segment to the test sums, and return the loss of each token, nats, shape (batch, time)."""
        return self._step(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the log-probability of each target token, nats, shape (batch, time)."""
        nll = self.token_nll(batch, "predict")
        self._check_context("predict")
        return -nll

    def on_train_epoch_start(self) -> None:
        """Start the training streams with fresh state and sums."""
        self._begin("train")

    def on_validation_epoch_start(self) -> None:
        """Start the validation streams with fresh state and sums."""
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        """Start the test streams with fresh state and sums."""
        self._begin("test")

    def on_predict_epoch_start(self) -> None:
        """Start the streams to score with fresh state."""
        self._state.pop("predict", None)

    def on_train_epoch_end(self) -> None:
        """Log the perplexity of the epoch, as it was while the weights changed."""
        self.log("train/perplexity", self._metric("train").compute().exp(), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log nats per token and perplexity."""
        self._log_sums("val")

    def on_test_epoch_end(self) -> None:
        """Log nats per token and perplexity."""
        self._log_sums("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW at 1e-3; a recipe's ``optimizer`` and ``lr_scheduler`` replace it."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def carried(self) -> dict[str, Any]:
        """Return what this process carries from training step to training step beside the weights.

        :class:`~lit_sigsoftmax.callbacks.LastCheckpoint` keeps it, for each process.

        Returns:
            The carried state and the sums of the epoch under way, on the CPU.
        """
        metric = self._metric("train")
        state = apply_to_collection(self._state.get("train"), Tensor, Tensor.cpu)
        return {"state": state, "nats": metric.nats.cpu(), "tokens": metric.tokens.cpu()}

    def carry_on(self, carried: dict[str, Any]) -> None:
        """Take up what :meth:`carried` returned."""
        metric, carried = self._metric("train"), apply_to_collection(carried, Tensor, Tensor.to, self.device)
        self._state["train"], metric.nats, metric.tokens = carried["state"], carried["nats"], carried["tokens"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what the output layer is, so that it cannot come back as another one."""
        checkpoint["output_layer"] = self._output_layer()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another output layer.

        Raises:
            CheckpointError: Activation, experts, sizes or tying differ from the checkpoint's.
        """
        # A subclass with its own on_save_checkpoint may leave the record out; the hyperparameters are always there.
        own, theirs = self._output_layer(), checkpoint.get("output_layer") or checkpoint.get("hyper_parameters", {})
        different = [
            f"{key} {theirs[key]!r}, here {value!r}"
            for key, value in own.items()
            if theirs.get(key) not in (None, value) and not (key == "activation" and vouched_for(theirs[key], value))
        ]
        if different:
            raise CheckpointError(f"the checkpoint is of another output layer: {'; '.join(different)}")

    def _output_layer(self) -> dict[str, Any]:
        head = self.head
        return {
            "activation": head.activation_spec,
            "n_experts": head.n_experts,
            "vocab_size": head.vocab_size,
            "hidden_size": head.hidden_size,
            "tie_weights": self.tie_weights,
        }

    def _metric(self, stage: str) -> NegativeLogLikelihood:
        metric = self.nll[f"{stage}_nll"]
        assert isinstance(metric, NegativeLogLikelihood)
        return metric

    def _begin(self, stage: str) -> None:
        self._state.pop(stage, None)
        self._metric(stage).reset()

    def _check_context(self, stage: str) -> None:
        context_min = getattr(getattr(self.trainer, "datamodule", None), "context_min", None)
        carries_state = self._state[stage] is not None
        if carries_state and context_min:
            raise TrainingError(
                f"data.context_min is {context_min}, but the backbone carries its state from segment to segment and "
                "would read the overlap twice: set data.context_min to 0"
            )
        if not carries_state and context_min == 0:
            rank_zero_warn(
                "the backbone carries no state and data.context_min is 0: the first predictions of an evaluation "
                "segment see almost nothing, and perplexity depends on data.bptt. Set data.context_min to let them see "
                "more"
            )

    def _log_sums(self, stage: str) -> None:
        loss = self._metric(stage).compute()
        if loss > math.log(self.head.vocab_size) + 1 and not self.trainer.sanity_checking:
            rank_zero_warn(
                f"{stage}/perplexity is {loss.exp():.4g}, far above the {self.head.vocab_size} of guessing any type "
                "with the same probability: training has diverged; lower the learning rate, or set "
                "trainer.gradient_clip_val"
            )
        # Every rank has the same sums already; sync_dist only says so.
        self.log(f"{stage}/loss", loss, sync_dist=True)
        self.log(f"{stage}/perplexity", loss.exp(), prog_bar=True, sync_dist=True)
