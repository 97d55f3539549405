"""What a run records about itself in MLflow: configuration, data, versions, results."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_sigsoftmax.data import CorpusDataModule
from lit_sigsoftmax.tracking import MLflowTracker

__all__ = ["RunRecorder"]

_PACKAGES = ("lit-sigsoftmax", "torch", "lightning", "mlflow", "torchmetrics")


class RunRecorder(SaveConfigCallback):
    """Records the resolved configuration, the corpus, versions and commit when a run starts, and its checkpoints.

    The command line makes it; nothing is recorded where the trainer has no :class:`MLflowTracker`.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write parameters, ``config.yaml``, the corpus and versions to the run. Called on rank 0 alone."""
        tracker = trainer.logger
        if not isinstance(tracker, MLflowTracker):
            return
        client, run_id = tracker.experiment, str(tracker.run_id)
        assert client is not None  # rank 0
        config = self.parser.dump(self.config, skip_none=False)
        client.log_text(run_id, config, "config.yaml")
        params = {key: value for key, value in self.config.as_dict().items() if key != "config"}
        tracker.log_hyperparams({**params, "parameters": count_parameters(pl_module)})
        for key, value in environment().items():
            client.set_tag(run_id, key, value)
        _log_corpus(tracker, trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record where the checkpoints are and the best validation perplexity."""
        tracker, checkpoint = trainer.logger, trainer.checkpoint_callback
        if not isinstance(tracker, MLflowTracker) or checkpoint is None:
            return
        if (client := tracker.experiment) is None:
            return
        for name, path in (("best", "best_model_path"), ("last", "last_model_path")):
            if value := getattr(checkpoint, path, ""):
                client.set_tag(str(tracker.run_id), f"checkpoint.{name}", value)
        best = getattr(checkpoint, "best_model_score", None)
        if best is not None and getattr(checkpoint, "monitor", None) == "val/loss":
            tracker.log_metrics({"val/best_perplexity": best.double().exp().item()}, step=0)


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of trainable parameters, a tied weight counted once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def environment() -> dict[str, str]:
    """Return tags for package versions, interpreter, machine and the working directory's git commit."""
    tags = {f"version.{name}": version(name) for name in _PACKAGES}
    tags |= {"version.python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
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
    client = tracker.experiment
    if client is None or not isinstance(datamodule, CorpusDataModule):
        return
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    source = CodeDatasetSource(tags={"datamodule": f"{type(datamodule).__module__}.{type(datamodule).__qualname__}"})
    corpus = datamodule.corpus
    dataset: Any = MetaDataset(  # type: ignore[abstract]
        source, name=corpus.name, digest=corpus.fingerprint
    )
    tags = [InputTag("mlflow.data.context", "train")]
    client.log_inputs(str(tracker.run_id), [DatasetInput(dataset._to_mlflow_entity(), tags=tags)])
    sizes = {"types": len(corpus.vocabulary)} | {s: len(getattr(corpus, s)) for s in ("train", "valid", "test")}
    tracker.log_hyperparams({"corpus": {"fingerprint": corpus.fingerprint, **sizes}})
