"""What a run records about itself in MLflow: configuration, data, versions, results."""

from __future__ import annotations

import math
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from lit_sigsoftmax.data import CorpusDataModule
from lit_sigsoftmax.data.corpus import SPLITS
from lit_sigsoftmax.module import LanguageModel
from lit_sigsoftmax.tracking import MLflowTracker, tracker_of

__all__ = ["RunRecorder"]

_PACKAGES = ("lit-sigsoftmax", "torch", "lightning", "mlflow", "torchmetrics")


class RunRecorder(SaveConfigCallback):
    """Records the resolved configuration, the corpus, versions and commit when a run starts, and its checkpoints.

    The command line makes it; nothing is recorded where the trainer has no :class:`MLflowTracker`.
    """

    best_perplexity = math.inf

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write parameters, ``config.yaml``, the corpus and versions to the run. Called on rank 0 alone.

        A run that is continued keeps what it was started with.
        """
        tracker = tracker_of(trainer)
        if tracker is None or tracker.continued:
            return
        tracker.log_text(self.parser.dump(self.config, skip_none=False), "config.yaml")
        params = {key: value for key, value in self.config.as_dict().items() if key != "config"}
        tracker.log_hyperparams({**params, "parameters": count_parameters(pl_module)})
        tracker.log_tags(environment())
        _log_corpus(tracker, trainer.datamodule)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """The best validation perplexity so far."""
        return {"best_perplexity": self.best_perplexity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best validation perplexity so far."""
        self.best_perplexity = state_dict["best_perplexity"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record which implementation of the loss serves the model on its device and in its precision."""
        tracker = tracker_of(trainer)
        if tracker is not None and not tracker.continued and isinstance(pl_module, LanguageModel):
            with trainer.precision_plugin.train_step_context():
                tracker.log_tags({"loss_backend": pl_module.head.loss_backend})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the best validation perplexity."""
        if not trainer.sanity_checking and "val/perplexity" in trainer.callback_metrics:
            self.best_perplexity = min(self.best_perplexity, trainer.callback_metrics["val/perplexity"].item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record where the checkpoints are and the best validation perplexity."""
        tracker = tracker_of(trainer)
        if tracker is None:
            return
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
                kind = "best" if checkpoint.monitor else "last"
                tracker.log_tags({f"checkpoint.{kind}": checkpoint.best_model_path})
        tracker.log_metrics({"val/best_perplexity": self.best_perplexity}, step=0)


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of trainable parameters, a tied weight counted once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def environment() -> dict[str, str]:
    """Return tags for package versions, interpreter, machine and the working directory's git commit."""
    tags = {f"version.{name}": version(name) for name in _PACKAGES}
    tags |= {"version.python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    # Without the password of a database's address.
    tags["command"] = re.sub(r"://[^/@\s]+@", "://***@", shlex.join(["lit-sigsoftmax", *sys.argv[1:]]))
    if torch.cuda.is_available():
        tags["machine"] += f" {torch.cuda.get_device_name()}"
    if commit := _git("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    return tags


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _log_corpus(tracker: MLflowTracker, datamodule: LightningDataModule | None) -> None:
    if not isinstance(datamodule, CorpusDataModule):
        return
    corpus = datamodule.corpus
    source = {"datamodule": f"{type(datamodule).__module__}.{type(datamodule).__qualname__}"}
    tracker.log_dataset(corpus.name, corpus.fingerprint, source)
    facts: dict[str, Any] = {"types": len(corpus.vocabulary)} | {split: len(getattr(corpus, split)) for split in SPLITS}
    if (entropy := getattr(datamodule, "entropy", None)) is not None:  # a language that knows its own floor
        facts |= {"entropy": entropy, "perplexity_floor": math.exp(entropy)}
    tracker.log_hyperparams({"corpus": {"fingerprint": corpus.fingerprint, **facts}})
