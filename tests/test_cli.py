"""The command line: what a run records, its checkpoints, exact evaluation, and a user's own classes."""

import importlib
import math
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from cli_helpers import NO_SYSTEM_METRICS, PYTHON_M, QUIET, SCRIPT, SMALL, Store, printed_config, run_process
from lightning.pytorch import Callback

from lit_sigsoftmax import LanguageModel, OutputHead
from lit_sigsoftmax.cli import main
from lit_sigsoftmax.data import IGNORE_INDEX
from lit_sigsoftmax.data.streams import eval_streams
from lit_sigsoftmax.recipes.python_docs import PythonDocs
from lit_sigsoftmax.recipes.synthetic import SyntheticLanguage
from lit_sigsoftmax.training import recipe_path, resolve_recipes
from lit_sigsoftmax.training import run as run_training

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|ModelCheckpoint|log_every_n_steps)")

N_STEPS = 5
PYTHON_DOCS = ("--config=python_docs/lstm.yaml", "--data.max_tokens=20000", *QUIET)
FIT = (
    "--seed_everything=3",
    "--model.activation=sigsoftmax",
    "--trainer.max_epochs=1",
    "--trainer.log_every_n_steps=1",
)


@pytest.fixture(scope="module")
def fitted(workplace):
    """The store after one ``fit`` of five steps."""
    with workplace() as store:
        main(["fit", *PYTHON_DOCS, *FIT, f"--trainer.limit_train_batches={N_STEPS}", "--data.test_batch_size=4"])
        assert len(store.runs()) == 1
    return store


@pytest.fixture
def again(fitted, monkeypatch):
    """The working directory and store of that ``fit``, for further commands."""
    monkeypatch.chdir(fitted.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fitted.uri)
    (run,) = fitted.runs("metrics.`train/loss` > 0")
    return fitted, run


@pytest.fixture(scope="module")
def small(workplace):
    """The store after a ``fit`` on the small language, and the path of its checkpoint."""
    with workplace() as store:
        main(["fit", *SMALL, NO_SYSTEM_METRICS])
        return store, store.run().data.tags["checkpoint.best"]


# What a run records


def test_fit_is_one_finished_run_with_all_its_metrics(again):
    store, run = again
    assert (run.info.status, run.info.run_name) == ("FINISHED", "sigsoftmax x1 seed 3")
    assert store.client.get_experiment(run.info.experiment_id).name == "python_docs"
    assert {name for name in run.data.metrics if not name.startswith("system/")} == {
        *(f"{stage}/{name}" for stage in ("train", "val", "test") for name in ("loss", "perplexity")),
        "train/tokens_per_second",
        "val/best_perplexity",
    }
    assert store.steps(run, "train/loss") == list(range(N_STEPS))
    losses = store.history(run, "train/loss")
    assert 0 < losses[-1] < losses[0] < math.log(int(run.data.params["corpus.types"])) + 0.5


def test_perplexity_is_the_exponential_of_the_loss_and_results_stand_at_step_0(again):
    store, run = again
    metrics = run.data.metrics
    for stage in ("val", "test"):
        assert metrics[f"{stage}/perplexity"] == pytest.approx(math.exp(metrics[f"{stage}/loss"]), rel=1e-9)
    assert metrics["val/best_perplexity"] == pytest.approx(min(store.history(run, "val/perplexity")), rel=1e-9)
    for name in ("test/loss", "test/perplexity", "val/best_perplexity"):
        assert store.steps(run, name) == [0]
    mean_loss = sum(store.history(run, "train/loss")) / N_STEPS
    assert metrics["train/perplexity"] == pytest.approx(math.exp(mean_loss), rel=1e-4)
    assert 1 < metrics["train/tokens_per_second"] < 1e9


def test_parameters_are_the_flattened_configuration(again):
    _, run = again
    params = run.data.params
    expected = {
        "seed_everything": "3",
        "model": "lit_sigsoftmax.LanguageModel",
        "model.activation": "sigsoftmax",
        "model.n_experts": "1",
        "model.tie_weights": "True",
        "model.backbone": "lit_sigsoftmax.backbones.RecurrentBackbone",
        "model.backbone.hidden_size": "100",
        "data": "lit_sigsoftmax.recipes.python_docs.PythonDocs",
        "data.max_tokens": "20000",
        "data.batch_size": "20",
        "data.test_batch_size": "4",
        "data.bptt": "35",
        "optimizer": "torch.optim.AdamW",
        "optimizer.lr": "0.01",
        "trainer.max_epochs": "1",
    }
    assert {key: params.get(key) for key in expected} == expected
    corpus = PythonDocs(max_tokens=20000).corpus
    model = LanguageModel.load_from_checkpoint(run.data.tags["checkpoint.best"])
    sizes = {"types": len(corpus.vocabulary), "train": len(corpus.train), "test": len(corpus.test)}
    assert {key: int(params[f"corpus.{key}"]) for key in sizes} == sizes
    assert params["corpus.fingerprint"] == corpus.fingerprint
    assert int(params["parameters"]) == sum(p.numel() for p in model.parameters())


def test_tags_name_layer_data_versions_and_checkpoints(again):
    store, run = again
    tags = run.data.tags
    layer = {
        "dataset": "python_docs",
        "activation": "sigsoftmax",
        "n_experts": "1",
        "seed": "3",
        "loss_backend": "chunked",
    }
    versions = {f"version.{name}": version(name) for name in ("lit-sigsoftmax", "torch", "lightning", "mlflow")}
    expected = layer | versions | {"version.python": ".".join(map(str, sys.version_info[:3]))}
    assert {key: tags.get(key) for key in expected} == expected
    assert "study" not in tags
    folder = store.folder / "mlruns" / "checkpoints" / run.info.run_id
    files = {tags["checkpoint.best"], tags["checkpoint.last"]}
    assert files == {str(path) for path in folder.glob("*.ckpt")} - {str(folder / "last-previous.ckpt")}
    assert len(files) == 2


def test_the_corpus_is_the_runs_input(again):
    _, run = again
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("python_docs", run.data.params["corpus.fingerprint"])
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "train")]
    assert "lit_sigsoftmax.recipes.python_docs.datamodule.PythonDocs" in given.dataset.source


def test_the_recorded_configuration_gives_the_same_configuration(again, capsys):
    store, run = again
    path = store.artifact(run, "config.yaml")
    recorded = yaml.safe_load(path.read_text())
    assert recorded["model"]["init_args"]["activation"] == "sigsoftmax"
    assert printed_config(capsys, "fit", "--config", str(path))[0] == recorded


def test_the_result_is_that_of_the_whole_text_in_one_piece(again):
    _, run = again
    model = LanguageModel.load_from_checkpoint(run.data.tags["checkpoint.best"]).eval()
    corpus = PythonDocs(max_tokens=20000).corpus
    for split, n_streams, key in ((corpus.test, 4, "test/loss"), (corpus.valid, 10, "val/loss")):
        tokens, target = eval_streams(split, n_streams, corpus.vocabulary.eos_id)
        with torch.no_grad():
            log_prob = model.log_prob(tokens.long())[0].double()
        counted = target != IGNORE_INDEX
        assert int(counted.sum()) == len(split)
        nll = -log_prob[counted].gather(1, target[counted].long().unsqueeze(1)).mean().item()
        assert run.data.metrics[key] == pytest.approx(nll, rel=1e-6)


def test_output_says_where_the_run_is_and_where_it_is_compared(store, capsys):
    main(["test", *SMALL, NO_SYSTEM_METRICS])
    run = store.run()
    out = capsys.readouterr().out
    assert f"Run 'softmax x1 seed 0': {run.info.run_id} in {store.uri}" in out
    assert f"http://127.0.0.1:5000/#/experiments/{run.info.experiment_id}/runs?" in out


def test_study_names_and_tags_are_what_the_user_says(store):
    logger = "--trainer.logger.init_args"
    named = [f"{logger}.study=of layers", f"{logger}.experiment_name=mine", f"{logger}.run_name=my run"]
    main(["validate", *SMALL, NO_SYSTEM_METRICS, *named, f"{logger}.tags={{seed: none, a: b}}", "--seed_everything=7"])
    run = store.run()
    assert (run.info.run_name, run.info.status) == ("my run", "FINISHED")
    assert store.client.get_experiment(run.info.experiment_id).name == "mine"
    expected = {"study": "of layers", "seed": "none", "a": "b", "activation": "softmax", "dataset": "synthetic"}
    assert {key: run.data.tags.get(key) for key in expected} == expected


@pytest.mark.parametrize("switch", ["--trainer.logger=false", "--trainer.fast_dev_run=true"])
def test_nothing_is_recorded_without_a_logger_or_in_a_trial(store, switch, capsys):
    main(["fit", *SMALL, switch])
    assert "test/perplexity" in capsys.readouterr().out
    assert store.runs() == []


# A run that fails


class Interrupt(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            raise KeyboardInterrupt


def test_the_recorded_loss_is_chosen_where_training_runs(store, monkeypatch):
    def chosen(head):
        return f"autocast {torch.is_autocast_enabled('cpu')}, training {head.training}"

    monkeypatch.setattr(OutputHead, "loss_backend", property(chosen))
    main(["fit", *SMALL, "--trainer.precision=bf16-mixed", "--trainer.max_steps=1"])
    assert store.run().data.tags["loss_backend"] == "autocast True, training True"


def test_a_run_that_raises_is_failed(store):
    Path("raises_later.py").write_text(
        "calls = []\n\n\ndef log_g(z):\n    calls.append(z)\n"
        "    if len(calls) == 4:\n        raise ArithmeticError('at step 3')\n    return z\n"
    )
    # The reference calls the activation once a step.
    words = ["--trainer.num_sanity_val_steps=0", "--model.loss_backend=reference"]
    with pytest.raises(ArithmeticError, match="at step 3"):
        main(["fit", *SMALL, *words, "--model.activation=raises_later.log_g"])
    run = store.run()
    assert (run.info.run_name, run.info.status) == ("raises_later.log_g x1 seed 0", "FAILED")
    assert store.steps(run, "train/loss") == [0, 1, 2]
    assert run.info.end_time


def test_a_run_that_is_interrupted_is_failed(store):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_training(["fit", *SMALL, NO_SYSTEM_METRICS], [Interrupt()])
    run = store.run()
    assert run.info.status == "FAILED"
    assert store.steps(run, "train/loss") == [0, 1, 2]


# Commands on a checkpoint


def test_the_output_layer_comes_from_the_checkpoint_which_is_said(again):
    store, run = again
    checkpoint = run.data.tags["checkpoint.best"]
    with pytest.warns(
        UserWarning, match=r"activation is 'sigsoftmax' as in the checkpoint, not 'softmax' as config"
    ) as said:
        main(["test", *PYTHON_DOCS, "--data.test_batch_size=4", f"--ckpt_path={checkpoint}", "--model.n_experts=2"])
    messages = [str(warning.message) for warning in said if "as in the checkpoint" in str(warning.message)]
    assert [re.sub(r"init_args\.", "", message).split()[0] for message in messages] == [
        "model.activation",
        "model.n_experts",
    ]
    tested = store.newest()
    assert tested.info.run_id != run.info.run_id
    assert (tested.info.run_name, tested.data.tags["activation"]) == ("sigsoftmax x1 seed 0", "sigsoftmax")
    assert tested.data.params["model.n_experts"] == "1"
    assert tested.data.metrics["test/loss"] == pytest.approx(run.data.metrics["test/loss"], rel=1e-12)


def test_validate_gives_what_fit_found(small, monkeypatch, recwarn):
    store, checkpoint = small
    (fit,) = [run for run in store.runs() if "train/loss" in run.data.metrics]
    monkeypatch.chdir(store.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    main(["validate", *SMALL, NO_SYSTEM_METRICS, f"--ckpt_path={checkpoint}"])
    assert not [warning for warning in recwarn if "as in the checkpoint" in str(warning.message)]
    run = store.newest()
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/loss"] == pytest.approx(fit.data.metrics["val/loss"], rel=1e-12)
    assert not {"test/loss", "train/loss"} & set(run.data.metrics)


def test_perplexity_does_not_depend_on_the_segment_length(small, monkeypatch):
    store, checkpoint = small
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.chdir(store.folder)
    found = []
    for bptt in (10, 35, 200):
        main(["test", *SMALL, NO_SYSTEM_METRICS, f"--ckpt_path={checkpoint}", f"--data.bptt={bptt}"])
        found.append(store.newest().data.metrics["test/perplexity"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("n_streams", [1, 7, 10])
def test_predict_scores_every_token_once(small, monkeypatch, n_streams, capsys):
    store, checkpoint = small
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.chdir(store.folder)
    arguments = [*SMALL, NO_SYSTEM_METRICS, f"--ckpt_path={checkpoint}", f"--data.test_batch_size={n_streams}"]
    main(["test", *arguments, "--data.bptt=9"])
    loss = store.newest().data.metrics["test/loss"]
    main(["predict", *arguments])
    run = store.newest()
    assert run.info.status == "FINISHED"
    out = capsys.readouterr().out
    assert "token_log_probs.tsv" in out
    assert run.info.run_id in out
    head, *lines = store.artifact(run, "token_log_probs.tsv").read_text().splitlines()
    tokens, log_probs = zip(*(line.split("\t") for line in lines), strict=True)
    assert head == "token\tlog_prob"
    corpus = SyntheticLanguage(n_tokens=3000, vocab_size=20, rank=5).corpus
    assert list(tokens) == corpus.vocabulary.decode(corpus.test.tolist())
    assert -sum(map(float, log_probs)) / len(tokens) == pytest.approx(loss, abs=1e-5)


# Configuration files


def test_a_short_path_is_the_packaged_recipe_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = recipe_path("synthetic/lstm.yaml")
    assert Path(packaged).is_file()
    assert packaged.endswith("recipes/synthetic/lstm.yaml")
    assert recipe_path(packaged) == packaged
    assert recipe_path("a: b") == "a: b"  # not a path: jsonargparse takes text as well
    words = ["fit", "-c", "synthetic/lstm.yaml", "--config=synthetic/lstm.yaml", "--data.root", "synthetic/lstm.yaml"]
    assert resolve_recipes(words) == [
        "fit",
        "-c",
        packaged,
        f"--config={packaged}",
        "--data.root",
        "synthetic/lstm.yaml",
    ]
    Path("synthetic").mkdir()
    Path("synthetic/lstm.yaml").write_text("seed_everything: 4\n")
    assert recipe_path("synthetic/lstm.yaml") == "synthetic/lstm.yaml"


def test_a_second_file_and_the_command_line_overlay_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mos.yaml").write_text("model:\n  init_args:\n    n_experts: 15\n    activation: sigmoid\n")
    files = ("--config", "synthetic/lstm.yaml", "--config", "mos.yaml")
    plain = printed_config(capsys, "fit", *files[:2])[0]
    overlaid = printed_config(capsys, "fit", *files, "--model.activation", "sigsoftmax")[0]
    assert (plain["model"]["init_args"]["n_experts"], plain["model"]["init_args"]["activation"]) == (1, "softmax")
    plain["model"]["init_args"].update(n_experts=15, activation="sigsoftmax")
    assert overlaid == plain


# A user's own classes, in processes as the user starts them

MODULE = '''
import torch
from torch import nn

from lit_sigsoftmax import LanguageModel


class GRU(nn.Module):
    """Knows nothing of the library."""

    def __init__(self, vocab_size: int, hidden_size: int = 8):
        super().__init__()
        self.hidden_size = hidden_size
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True)

    def forward(self, tokens, state=None):
        return self.gru(self.embedding(tokens), state)


def capped(z):
    return 30 * torch.tanh(z / 30)


class WithPenalty(LanguageModel):
    def __init__(self, *args, strength: float = 1e-3, **kwargs):
        super().__init__(*args, **kwargs)
        self.strength = strength

    def training_step(self, batch, batch_idx):
        penalty = self.strength * self.head.bias.square().mean()
        self.log("train/penalty", penalty)
        return super().training_step(batch, batch_idx) + penalty
'''
OWN = (
    "--model=my_model.WithPenalty",
    "--model.strength=0.5",
    "--model.backbone=my_model.GRU",
    "--model.tie_weights=true",
)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's directory after ``fit`` by the console script and ``test`` by ``python -m``."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_model.py").write_text(MODULE)
    plain = [word for word in SMALL if "hidden_size" not in word]
    fit = run_process([*SCRIPT, "fit", *plain, *OWN, "--model.activation=my_model.capped"], folder)
    assert fit.returncode == 0, fit.stderr
    store = Store(folder)
    checkpoint = store.run().data.tags["checkpoint.last"]
    test = run_process([*PYTHON_M, "test", *plain, *OWN, f"--ckpt_path={checkpoint}"], folder)
    assert test.returncode == 0, test.stderr
    return store, fit, test


@pytest.mark.slow
def test_own_classes_are_trained_from_the_working_directory(own):
    store, fit, _ = own
    run = min(store.runs(), key=lambda run: run.info.start_time)
    expected = {"model": "my_model.WithPenalty", "model.strength": "0.5", "model.backbone": "my_model.GRU"}
    expected |= {"model.activation": "my_model.capped"}
    assert {key: run.data.params.get(key) for key in expected} == expected
    assert (run.info.run_name, run.info.status) == ("my_model.capped x1 seed 0", "FINISHED")
    assert len(store.history(run, "train/penalty")) == len(store.history(run, "train/loss")) == 5
    assert f"Run 'my_model.capped x1 seed 0': {run.info.run_id} in sqlite:///mlruns/mlflow.db" in fit.stdout
    assert "Traceback" not in fit.stderr


@pytest.mark.slow
def test_everything_that_a_command_writes_is_in_mlruns(own):
    store, *_ = own
    assert {path.name for path in store.folder.iterdir()} - {"__pycache__"} == {"my_model.py", "mlruns"}
    runs = {run.info.run_id for run in store.runs()}
    mlruns = store.folder / "mlruns"
    assert {path.name for path in mlruns.iterdir()} == {
        *("mlflow.db", "mlflow.db.lock", "artifacts", "checkpoints", "spool")
    }
    assert list((mlruns / "spool").iterdir()) == []  # the store has everything
    assert {path.name for path in (mlruns / "artifacts").iterdir()} == runs
    assert all((mlruns / "artifacts" / run / "artifacts" / "config.yaml").is_file() for run in runs)
    assert {path.name for path in (mlruns / "checkpoints").iterdir()} < runs


@pytest.mark.slow
def test_own_classes_are_tested_by_python_m(own):
    store, _, test = own
    fit, tested = sorted(store.runs(), key=lambda run: run.info.start_time)
    assert tested.data.params["model.activation"] == "my_model.capped"
    assert "'my_model.capped' as in the checkpoint, not 'softmax' as configured" in test.stderr
    # one epoch: the last checkpoint is the best one, with which fit ended
    assert tested.data.metrics["test/loss"] == pytest.approx(fit.data.metrics["test/loss"], rel=1e-12)


@pytest.mark.slow
def test_a_checkpoint_of_own_classes_is_data_and_rebuilds_them(own, monkeypatch):
    store, *_ = own
    path = min(store.runs(), key=lambda run: run.info.start_time).data.tags["checkpoint.last"]
    assert torch.load(path, weights_only=True)["hyper_parameters"]["activation"] == "my_model.capped"
    monkeypatch.syspath_prepend(store.folder)
    my_model = importlib.import_module("my_model")
    model = my_model.WithPenalty.load_from_checkpoint(path, weights_only=True)
    assert type(model.backbone) is my_model.GRU
    assert model.strength == 0.5
    assert model.head.activation is my_model.capped
    assert model.head.weight is model.backbone.embedding.weight
    assert model.head.weight.shape == (20, 16)
