"""The commands that train and evaluate: LightningCLI with this library's defaults."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import MappingProxyType
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_sigsoftmax.callbacks import LastCheckpoint, RankWatch, RunCheckpoint, RunRecorder, Throughput, TokenLosses
from lit_sigsoftmax.checkpoints import CheckpointError, CheckpointFiles, CheckpointWriteError, open_checkpoint
from lit_sigsoftmax.data import CorpusDataModule
from lit_sigsoftmax.faults import TrainingError
from lit_sigsoftmax.module import LanguageModel
from lit_sigsoftmax.parser import Parser, place
from lit_sigsoftmax.processes import leave_at_exit
from lit_sigsoftmax.resume import in_folder, newest, run_folder, settings
from lit_sigsoftmax.scoring import score_table
from lit_sigsoftmax.signals import Stopped, stoppable
from lit_sigsoftmax.store import TrackingError, default_tracking_uri, flatten, without_password
from lit_sigsoftmax.tracking import tracker_of
from lit_sigsoftmax.views import comparison_url

__all__ = ["LanguageModelCLI", "recipe_path", "resolve_recipes", "run", "silence_noise"]

_RECIPES = "lit_sigsoftmax.recipes"
_DESCRIPTION = """Output layers for language models, head to head. Further commands: compare trains several output
layers over several seeds; report rebuilds its tables and figures; ui shows the runs in MLflow."""
_CHOSEN = "LIT_SIGSOFTMAX_CKPT_PATH"  # for the processes that this one starts
_BAR_STEPS = 10  # between two states of the progress bar
_KEYWORDS = ("hpc", "registry")  # of Lightning
_NOISE = (
    "LightningCLI's args parameter is intended",
    "`LanguageModel.configure_optimizers` will be overridden",  # by the recipe's optimizer, as it should
    "The dirpath has changed from",  # a checkpoint of another run is tested in a run of its own
    "Checkpoint directory .* exists and is not empty",  # a run that goes on
    ".*treespec, LeafSpec.* is deprecated",  # Lightning's own use of torch
)


class LanguageModelCLI(LightningCLI):
    """Trains and evaluates a :class:`LanguageModel`, or a subclass of it, on a :class:`CorpusDataModule`.

    Args:
        args: The command line, ``sys.argv[1:]`` by default.
        callbacks: Further callbacks of the trainer.
        run: Whether the subcommand is run, or the objects are only made.
    """

    _settings: Mapping[str, str] = MappingProxyType({})

    def __init__(self, args: Sequence[str] | None = None, callbacks: Sequence[Callback] = (), run: bool = True) -> None:
        super().__init__(
            LanguageModel,
            CorpusDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_callback=RunRecorder,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={
                "logger": {"class_path": "lit_sigsoftmax.tracking.MLflowTracker"},
                "callbacks": [Throughput(), TokenLosses(), RankWatch(), *callbacks],
                "use_distributed_sampler": False,  # the datamodule shards the streams
                "enable_autolog_hparams": False,  # RunRecorder logs the whole configuration
            },
            parser_kwargs={"description": _DESCRIPTION},
            args=list(args) if args is not None else None,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the checkpoint callback, and let the data say how many types there are."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.link_arguments("checkpoint.dirpath", "last_checkpoint.dirpath")
        backbone = {"class_path": "lit_sigsoftmax.backbones.RecurrentBackbone"}
        parser.set_defaults(
            {"model": {"class_path": "lit_sigsoftmax.LanguageModel", "init_args": {"backbone": backbone}}}
        )
        for target in ("model.init_args.vocab_size", "model.init_args.backbone.init_args.vocab_size"):
            parser.link_arguments("data.vocab_size", target, apply_on="instantiate")
        parser.add_lr_scheduler_args()
        # A cosine spans the training, however long it is made.
        parser.link_arguments("trainer.max_epochs", "lr_scheduler.init_args.T_max")

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; what is wrong with them is an error of the command line."""
        try:
            super().instantiate_classes()
            self.datamodule.check(self.trainer.world_size)
        except (MisconfigurationException, OSError, TypeError, ValueError) as error:
            self.parser.error(f"{error}{place(error)}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with checkpoint files that survive a crash and a progress bar that costs little."""
        trainer = super().instantiate_trainer(**kwargs)
        chosen = self._get(self.config_init, "trainer")["callbacks"] or []
        if isinstance(bar := trainer.progress_bar_callback, RichProgressBar) and bar not in chosen:
            # Lightning's choice where rich is installed; drawing it takes a tenth of a small model's training.
            often = _BAR_STEPS if sys.stderr.isatty() else 10 * _BAR_STEPS
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            callbacks[callbacks.index(bar)] = TQDMProgressBar(refresh_rate=often)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.settings = dict(self._settings)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Name the run after what it compares, and keep it open to the end of the command."""
        tracker, model = tracker_of(self.trainer), self.model
        if tracker:
            tracker.more_to_come = bool(self.subcommand)
        if tracker and isinstance(model, LanguageModel):
            seed, dataset = str(self._get(self.config, "seed_everything")), str(self.datamodule.name)
            activation, n_experts = model.head.name.rsplit(" x", 1)
            tags = {"dataset": dataset, "activation": activation, "n_experts": n_experts, "seed": seed}
            tags["arm"] = model.head.name  # what reports and views group by; a comparison adds what else it varies
            tracker.describe(dataset, f"{model.head.name} seed {seed}", {**tags, "kind": self.subcommand or "none"})

    def _parse_ckpt_path(self) -> None:
        self._find_checkpoint()
        if self.config.get("subcommand") == "fit":
            return  # trains what is configured; a checkpoint of another model is refused when it is loaded
        # LightningCLI lets the checkpoint's hyperparameters win without a word.
        before = dict(flatten(self._model_config()))
        super()._parse_ckpt_path()
        for key, value in flatten(self._model_config()):
            if key in before and before[key] != value:
                rank_zero_warn(f"model.{key} is {value!r} as in the checkpoint, not {before[key]!r} as configured")

    def _find_checkpoint(self) -> None:
        if not (command := self.config.get("subcommand")):
            return
        config = self.config[command]
        path, self._settings = config.get("ckpt_path"), settings(config.as_dict())
        try:
            if command == "fit" and path in (None, "last"):
                self._find_last(config)
            elif path in ("best", "last"):
                self.parser.error(
                    f"{path} says nothing to {command}: give the path of a checkpoint, a run's tag checkpoint.{path} "
                    "says it"
                )
            elif path and path not in _KEYWORDS and "://" not in path:
                open_checkpoint(path)
        except FileNotFoundError:
            self.parser.error(f"no checkpoint at {path}: give the path of a .ckpt file with ckpt_path")
        except (CheckpointError, OSError) as error:
            self.parser.error(str(error))

    def _find_last(self, config: Any) -> None:
        tracker = _tracker_arguments(config)
        parent, _, chosen = os.environ.get(_CHOSEN, "").partition(" ")
        if parent == str(os.getppid()):  # one that has chosen for the processes that it starts, such as this
            config["ckpt_path"] = chosen or None
            return
        uri = (tracker or {}).get("tracking_uri") or default_tracking_uri()
        run_id, own, found = (tracker or {}).get("run_id"), self._settings, None
        if folder := config["checkpoint.dirpath"] or (run_id and run_folder(uri, run_id)):
            found = in_folder(Path(folder), own)
            if found is None and config["ckpt_path"] and not run_id:
                self.parser.error(
                    f"no checkpoint to go on from in {folder}: leave out ckpt_path to start from the beginning"
                )
        elif config["ckpt_path"]:
            found = newest(
                uri, own, getattr(rank_zero_only, "rank", 0) == 0, (tracker or {}).get("on_outage") == "spool"
            )
        config["ckpt_path"] = str(found.path) if found else None
        os.environ[_CHOSEN] = f"{os.getpid()} {config['ckpt_path'] or ''}"
        if found and tracker is not None and found.run_id:
            tracker["run_id"] = found.run_id

    def _model_config(self) -> dict[str, object]:
        command = self.config.get("subcommand")
        return self.config[command]["model"].as_dict() if command else {}

    def _run_subcommand(self, subcommand: str) -> None:
        # Lightning closes a run that ends within the trainer, and looks for signals from the middle of the start on.
        try:
            with stoppable(SIGTERM, SIGINT):
                super()._run_subcommand(subcommand)
        except BaseException as error:
            if tracker := tracker_of(self.trainer):
                tracker.finalize("killed" if isinstance(error, Stopped) else "failed")
            raise

    def fit(self, **kwargs: Any) -> None:
        """Train.

        Raises:
            CheckpointError: The weights to go on from are of another model.
        """
        try:
            self.trainer.fit(**kwargs)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise CheckpointError(
                f"{kwargs['ckpt_path']} is of another model: {' '.join(str(error).split())}"
            ) from error

    def after_fit(self) -> None:
        """Test the best checkpoint in the same run."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best" if best else None)
        self._say_where()

    def after_validate(self) -> None:
        """Say where the result is."""
        self._say_where()

    def after_test(self) -> None:
        """Say where the result is."""
        self._say_where()

    def predict(self, **kwargs: Any) -> None:
        """Score every token of the test split; the table is an artifact of the run."""
        if self.trainer.world_size > 1:
            self.parser.error("predict runs on one device: set trainer.devices to 1")
        predictions: Any = self.trainer.predict(**kwargs)
        tracker, data = tracker_of(self.trainer), self.datamodule
        if tracker:
            table = score_table(predictions, data.predict_dataloader(), data.corpus.vocabulary)
            tracker.log_text(table, "token_log_probs.tsv")
            print("Scores: artifact token_log_probs.tsv")
        self._say_where()

    @rank_zero_only
    def _say_where(self) -> None:
        if tracker := tracker_of(self.trainer):
            print(f"Run {tracker.run_name!r}: {tracker.run_id} in {without_password(tracker.tracking_uri)}")
            if tracker.experiment_id:
                print(f"Compare: {comparison_url(tracker.tracking_uri, tracker.experiment_id)}")
            tracker.more_to_come = False
            tracker.finalize()


def _tracker_arguments(config: Any) -> Any:
    # What makes the MLflowTracker, where there is one; a logger may also be True, False or one of several.
    loggers = config["trainer"].get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if "run_id" in (getattr(logger, "init_args", None) or {}):
            return logger.init_args
    return None


def run(words: Sequence[str], callbacks: Sequence[Callback] = ()) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        words: The command line.
        callbacks: Further callbacks of the trainer.

    Raises:
        SystemExit: 2 for a mistake in the command line, or where the tracking store cannot be used.
    """
    silence_noise()
    leave_at_exit()
    try:
        LanguageModelCLI(resolve_recipes(words), callbacks)
    except (CheckpointError, TrackingError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (TrainingError, CheckpointWriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        os.environ.pop(_CHOSEN, None)  # what this process starts from here on is another run


def silence_noise() -> None:
    """Turn off the warnings that say nothing to a user of this command line."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)


def resolve_recipes(words: Sequence[str]) -> list[str]:
    """Replace the value of each ``--config`` by the packaged recipe of that name, where there is no such file."""
    resolved = list(words)
    for i, word in enumerate(resolved):
        if word in ("-c", "--config") and i + 1 < len(resolved):
            resolved[i + 1] = recipe_path(resolved[i + 1])
        elif word.startswith("--config="):
            resolved[i] = f"--config={recipe_path(word.removeprefix('--config='))}"
    return resolved


def recipe_path(name: str) -> str:
    """Return the path of a configuration file: the file itself, or the packaged recipe of that name.

    Args:
        name: For instance ``penn_treebank/lstm.yaml``. Anything that names neither is returned as it is.

    Raises:
        SystemExit: A YAML file of that name is neither here nor among the recipes.
    """
    from importlib.resources import files

    root = Path(str(files(_RECIPES)))
    if Path(name).exists() or not name.endswith((".yaml", ".yml")):
        return name
    if (root / name).is_file():
        return str(root / name)
    known = ", ".join(sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml")))
    print(f"error: no configuration file {name}, here or among the packaged recipes: {known}", file=sys.stderr)
    raise SystemExit(2)
