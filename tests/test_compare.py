"""Head to head, in processes of their own, and in fair pairs. (The table and the plan: test_table.py.)"""

import itertools
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, stdev

import pytest
import torch
from cli_helpers import QUIET, SCRIPT, Store, run_process
from lightning.pytorch import Callback

from lit_sigsoftmax.cli import main
from lit_sigsoftmax.compare.fairness import unfair_differences
from lit_sigsoftmax.training import run as run_training

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|ModelCheckpoint|log_every_n_steps)")

RECIPE = (
    "--config=python_docs/lstm.yaml",
    "--data.max_tokens=5000",
    "--model.backbone.hidden_size=8",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=4",
    "--trainer.log_every_n_steps=1",
)
LAYERS = list(itertools.product(("softmax", "sigsoftmax"), ("1", "2")))
STUDY = "two seeds 2026-11-24 23:10:11"

RAISES = """
calls = []


def log_g(z):
    calls.append(z)
    if len(calls) > 2:
        raise ArithmeticError("after two calls")
    return z
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory, empty_store):
    """Three comparisons at the same time: one that works, one with a layer that raises, one with a mistake."""
    study, failing, mistaken = (tmp_path_factory.mktemp(name) for name in ("study", "failing", "mistaken"))
    (failing / "raises.py").write_text(RAISES)
    for folder in (study, failing):
        (folder / "mlruns").mkdir()
        shutil.copy(empty_store, folder / "mlruns")
    layers = ["--activations", "softmax", "sigsoftmax", "--n_experts", "1", "2", "--seeds", "0..1", "--workers", "2"]
    with ThreadPoolExecutor() as pool:
        done = pool.map(
            lambda job: run_process([*SCRIPT, "compare", *job[1:]], job[0]),
            [
                (study, *RECIPE, *layers, "--study", STUDY),
                (failing, *RECIPE, "--activations", "raises.log_g", "softmax", "--study", "failing"),
                (mistaken, *RECIPE, "--activations", "softmax", "sigsofmax"),
            ],
        )
        return list(zip(map(Store, (study, failing, mistaken)), done, strict=True))


@pytest.fixture(scope="module")
def study(processes):
    store, done = processes[0]
    assert done.returncode == 0, done.stderr
    return store, done


def expected_rows(store):
    """Of the table: layer, seeds, both perplexities and speed, from the runs of the store."""
    found = []
    for activation, n_experts in LAYERS:
        query = f"tags.kind = 'fit' and tags.activation = '{activation}' and tags.n_experts = '{n_experts}'"
        runs = store.runs(query)
        values = {key: [run.data.metrics[key] for run in runs] for key in ("val/best_perplexity", "test/perplexity")}
        cells = [f"{mean(sample):.2f} ± {stdev(sample):.2f}" for sample in values.values()]
        speed = mean(run.data.metrics["train/tokens_per_second"] for run in runs)
        row = [f"{activation} x{n_experts}", "2", *cells, f"{speed:,.0f}"]
        found.append((mean(values["test/perplexity"]), row))
    return [row for _, row in sorted(found)]


# A study that works


@pytest.mark.slow
def test_a_study_has_every_combination_once_in_one_experiment(study):
    store, _ = study
    runs = store.runs("tags.kind = 'fit'")
    found = [tuple(run.data.tags[key] for key in ("activation", "n_experts", "seed")) for run in runs]
    assert sorted(found) == sorted((*layer, seed) for layer in LAYERS for seed in ("0", "1"))
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["study"] for run in store.runs()} == {STUDY}
    assert len({run.info.experiment_id for run in store.runs()}) == 1
    for run in runs:
        tags, params = run.data.tags, run.data.params
        expected = (tags["activation"], tags["n_experts"], tags["seed"])
        assert (params["model.activation"], params["model.n_experts"], params["seed_everything"]) == expected
        assert store.steps(run, "train/loss") == [0, 1, 2, 3]
        assert {"test/perplexity", "val/best_perplexity"} <= set(run.data.metrics)
    assert len({run.data.params["corpus.fingerprint"] for run in runs}) == 1


@pytest.mark.slow
def test_the_summarys_numbers_are_the_stores(study):
    store, _ = study
    (summary,) = store.runs("tags.kind = 'summary'")
    assert (summary.info.run_name, summary.info.status) == (f"study {STUDY}", "FINISHED")
    table = json.loads(store.artifact(summary, "table.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    shown = ("output layer", "seeds", "val ppl", "test ppl", "tokens/s")
    assert [[row[column] for column in shown] for row in rows] == expected_rows(store)
    text = store.artifact(summary, "table.md").read_text()
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines()]
    assert cells[0] == table["columns"]
    assert cells[2:] == table["data"]
    assert summary.data.tags["mlflow.note.content"] == text


@pytest.mark.slow
def test_the_terminal_shows_the_table_and_where_it_is(study):
    store, done = study
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in done.stdout.splitlines()]
    shown = [[line[0], line[1], line[2], line[5]] for line in lines if len(line) > 2 and line[1] == "2"]
    assert shown == [[layer, seeds, test, speed] for layer, seeds, _, test, speed in expected_rows(store)]
    for activation, n_experts in LAYERS:
        assert len(re.findall(rf"^{activation} x{n_experts} seed [01]: done after", done.stderr, re.M)) == 2
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.slow
def test_the_printed_page_shows_the_studys_runs(study):
    store, done = study
    (address,) = re.findall(r"^Compare: (http\S+)$", done.stdout, re.M)
    experiment_id, key = re.search(r"/#/experiments/(\d+)/runs\?.*viewStateShareKey=([\w-]+)$", address).groups()
    view = json.loads(store.client.get_experiment(experiment_id).tags[f"mlflow.sharedViewState.{key}"])
    shown = store.client.search_runs([experiment_id], view["searchFilter"])
    assert {run.info.run_id for run in shown} == {run.info.run_id for run in store.runs("tags.kind = 'fit'")}
    assert [group["groupByData"] for group in view["groupBy"]["groupByKeys"]] == ["arm"]


@pytest.mark.slow
def test_each_run_leaves_a_log_and_nothing_is_written_outside_mlruns(study):
    store, _ = study
    logs = {path.stem: path.read_text() for path in store.folder.rglob("*.log")}
    assert set(logs) == {f"{a} x{k} seed {seed}" for (a, k) in LAYERS for seed in (0, 1)}
    assert all(f"Run '{name}'" in text for name, text in logs.items())
    assert {path.name for path in store.folder.iterdir()} == {"mlruns"}
    assert {path.name for path in (store.folder / "mlruns").iterdir()} == {
        *("mlflow.db", "mlflow.db.lock", "artifacts", "checkpoints", "logs", "reports", "spool")
    }


SAME = ("compare", *RECIPE, "--n_experts", "1", "2", "--seeds", "0..1", "--study", STUDY)


@pytest.mark.slow
def test_the_same_command_trains_nothing_again(study, monkeypatch, capsys):
    store, _ = study
    monkeypatch.chdir(store.folder)
    before = {run.info.run_id for run in store.runs("tags.kind = 'fit'")}
    main([*SAME, "--tracking_uri", store.uri, "--dry_run"])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.endswith(": finished")] == [
        f"{a} x{k} seed {seed}: finished" for seed in (0, 1) for k in (1, 2) for a in ("softmax", "sigsoftmax")
    ]
    assert "8 runs, 0 of them to train" in out
    main([*SAME, "--tracking_uri", store.uri])
    assert "8 of 8 runs are finished already" in capsys.readouterr().err
    assert {run.info.run_id for run in store.runs("tags.kind = 'fit'")} == before


@pytest.mark.slow
def test_a_key_that_differs_from_the_studys_is_named_and_refused_unless_asked_for(study, monkeypatch, capsys):
    store, _ = study
    monkeypatch.chdir(store.folder)
    other = [*SAME, "--tracking_uri", store.uri, "--data.eval_batch_size=5", "--dry_run"]
    with pytest.raises(SystemExit) as exit_:
        main(other)
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "data.eval_batch_size differs: 10 in " in error
    assert "5 in softmax x1 seed 0" in error
    assert "--allow_unfair" in error
    main([*other, "--allow_unfair"])
    assert "8 runs, 8 of them to train" in (out := capsys.readouterr().out)
    assert "time, 1 at once: about" in out  # from the runs that have finished


@pytest.mark.slow
def test_runs_of_one_seed_differ_in_the_compared_keys_alone(study):
    store, _ = study
    runs = {run.info.run_name: run.data.params for run in store.runs("tags.kind = 'fit'")}
    assert len(runs) == 8
    assert unfair_differences(runs) == {}
    assert set(unfair_differences(runs, axes=["model.n_experts"])) == {"model.activation"}
    assert len({run.data.tags["config_hash"] for run in store.runs("tags.kind = 'fit'")}) == 8
    assert {run.data.tags["baseline"] for run in store.runs("tags.kind = 'fit'")} == {"softmax x1"}


# Studies that do not


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_the_others_are_compared(processes):
    store, done = processes[1]
    assert done.returncode == 1
    assert re.search(r"^raises\.log_g x1 seed 0: FAILED, see .*\.log", done.stderr, re.M)
    assert "ArithmeticError: after two calls" in done.stderr
    assert "softmax x1 seed 0: done after" in done.stderr
    statuses = {run.data.params["model.activation"]: run.info.status for run in store.runs("tags.kind = 'fit'")}
    assert statuses == {"raises.log_g": "FAILED", "softmax": "FINISHED"}
    (summary,) = store.runs("tags.kind = 'summary'")
    table = json.loads(store.artifact(summary, "table.json").read_text())
    assert [row[:2] for row in table["data"]] == [["softmax x1", "1"], ["raises.log_g x1", "0 (1 failed)"]]
    assert "│ softmax x1" in done.stdout
    assert "Not counted: raises.log_g x1 seed 0 (failed)." in done.stdout


@pytest.mark.slow
def test_a_mistake_in_one_layer_shows_before_any_run(processes):
    store, done = processes[2]
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "'sigsofmax'" in error
    assert "Did you mean 'sigsoftmax'?" in error
    assert "Traceback" not in done.stderr
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seeds", "0", "x"], "'x'"),
        (["--seeds", "0..b"], "'0..b'"),
        (["--seeds", "3..1"], "'3..1'"),
        (["--n_experts", "0"], "n_experts"),
        (["--n_experts", "two"], "'two'"),
        (["--workers", "0"], "workers"),
        (["--study", "it's"], "it's"),
        (["--study", "two: seeds"], "two: seeds"),  # a mapping in YAML
        (["--study", "null"], "null"),
        (["--activations"], "activations"),
        (["--vary", "optimizer.lr"], "--vary takes a key and its values"),
        (["--tune", "optimizer.lr=1", "2"], "--tune takes a key and its values"),
        (["--tune", "optimizer.lr", "1", "--tune", "optimizer.lr", "2"], "optimizer.lr is given twice"),
        (["--vary", "optimizer.lr", "1", "2", "--tune", "optimizer.lr", "1"], "optimizer.lr is either compared"),
        (["--baseline", "relu x1"], "'relu x1' is no arm of this comparison, which has 'softmax x1', 'sigsoftmax x1'"),
        (["--executor", "local", "--executor_args", "timeout_min"], "KEY=VALUE, not 'timeout_min'"),
    ],
)
def test_mistakes_in_compares_own_arguments(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["compare", *RECIPE, *arguments])
    assert exit_.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# Fair pairs


class Spy(Callback):
    """Keeps the initial weights, and of each training step the batch and the hidden vectors."""

    def on_fit_start(self, trainer, pl_module):
        self.initial = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.batches, self.hidden = [], []
        pl_module.backbone.register_forward_hook(
            lambda backbone, _, out: self.hidden.append(out[0].detach().clone()) if backbone.training else None
        )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append([part.clone() for part in batch])


def trained(*arguments):
    spy = Spy()
    evaluation = ("--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.logger=false")
    run_training(["fit", *RECIPE, *evaluation, *QUIET, "--model.backbone.num_layers=2", *arguments], [spy])
    return spy


@pytest.mark.parametrize("tied", ["true", "false"])
def test_with_one_seed_all_layers_have_the_same_weights_batches_and_dropout_masks(tied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = [("softmax", 1), ("sigsoftmax", 4), ("softmax", 4)]
    arguments = [f"--model.tie_weights={tied}", "--seed_everything=5", "--model.backbone.dropout=0.3"]
    spies = [trained(*arguments, f"--model.activation={a}", f"--model.n_experts={k}") for a, k in layers]
    first = spies[0]
    assert len(first.batches) == len(first.hidden) == 4
    for spy in spies[1:]:
        common = set(first.initial) & set(spy.initial)
        assert {"backbone.embedding.weight", "head.weight", "head.bias"} <= common
        assert [name for name in common if not torch.equal(first.initial[name], spy.initial[name])] == []
        assert torch.equal(first.hidden[0], spy.hidden[0])
        for mine, theirs, batch, other in zip(first.hidden, spy.hidden, first.batches, spy.batches, strict=True):
            assert 0.2 < (mine == 0).float().mean() < 0.4
            assert torch.equal(mine == 0, theirs == 0)
            assert all(map(torch.equal, batch, other))
        assert not torch.equal(first.hidden[1], spy.hidden[1])  # by then the layers have taught them different things
    mixtures = [spy.initial for spy in spies[1:]]
    assert all(torch.equal(mixtures[0][name], mixtures[1][name]) for name in mixtures[0])


def test_another_seed_is_another_pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = trained("--seed_everything=5"), trained("--seed_everything=6")
    assert not torch.equal(one.initial["backbone.embedding.weight"], two.initial["backbone.embedding.weight"])
    assert not torch.equal(one.hidden[0] == 0, two.hidden[0] == 0)
