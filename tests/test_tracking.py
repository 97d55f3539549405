"""The tracking store and what is written to it."""

import argparse
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_helpers import Store
from fork_helpers import CONTEXT, start_server
from lightning.pytorch.utilities import rank_zero_only

from lit_sigsoftmax import journal as journal_module
from lit_sigsoftmax.callbacks import Throughput
from lit_sigsoftmax.callbacks.recorder import count_parameters, environment
from lit_sigsoftmax.journal import Journal, JournalInUseError
from lit_sigsoftmax.store import TrackingError, get_experiment, without_password
from lit_sigsoftmax.tracking import (
    MLflowTracker,
    default_tracking_uri,
    flatten,
    open_client,
    store_root,
)


def tracker(store, **arguments):
    return MLflowTracker(tracking_uri=store.uri, system_metrics=False, **arguments)


# Where the store is


def test_the_store_is_in_mlruns_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_tracking_uri() == MLflowTracker().tracking_uri == "sqlite:///mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert default_tracking_uri() == MLflowTracker().tracking_uri == "http://tracking.example:5000"
    assert MLflowTracker(tracking_uri="sqlite:///here.db").tracking_uri == "sqlite:///here.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert default_tracking_uri() == "sqlite:///mlruns/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("sqlite:///mlruns/mlflow.db", "mlruns"),
        ("sqlite:////abs/olute/store.db", "/abs/olute"),
        ("sqlite:///store.db", "."),
        ("http://tracking.example:5000", "mlruns"),
        ("postgresql://user@host/db", "mlruns"),
    ],
)
def test_checkpoints_stand_beside_a_local_store_and_in_mlruns_for_another(uri, folder):
    assert store_root(uri) == Path(folder)
    assert MLflowTracker(tracking_uri=uri).save_dir == folder


def test_opening_makes_the_store_and_its_folder(tmp_path):
    uri = f"sqlite:///{tmp_path}/a/new/folder/store.db"
    assert [e.name for e in open_client(uri).search_experiments()] == ["Default"]
    assert (tmp_path / "a" / "new" / "folder" / "store.db").is_file()


def test_a_store_whose_folder_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        open_client(f"sqlite:///{tmp_path}/file/store.db")


def first_client(uri, barrier, outcomes):
    barrier.wait()
    try:
        client = open_client(uri)
        run = MLflowTracker(uri, experiment_name="shared", system_metrics=False)
        run.log_metrics({"rank": 1.0})
        run.finalize()
        outcomes.put(len(client.search_experiments()))
    except BaseException as error:
        outcomes.put(repr(error))
        raise


@pytest.mark.slow
def test_four_processes_may_open_a_new_store_at_once(tmp_path):
    """MLflow alone breaks it for good. All four also make the same experiment and a run in it."""
    start_server()
    store = Store(tmp_path)
    barrier, outcomes = CONTEXT.Barrier(4), CONTEXT.SimpleQueue()
    processes = [CONTEXT.Process(target=first_client, args=(store.uri, barrier, outcomes)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0], outcomes.get()
    assert {e.name for e in open_client(store.uri).search_experiments()} == {"Default", "shared"}
    assert [run.info.status for run in store.runs()] == ["FINISHED"] * 4


# When it is opened


def test_making_a_tracker_opens_nothing_and_the_first_use_starts_the_run(tmp_path, store):
    elsewhere = Store(tmp_path / "later")
    made = tracker(elsewhere, experiment_name="e", run_name="r", tags={"a": "b"})
    assert (made.name, made.save_dir) == ("e", str(tmp_path / "later" / "mlruns"))
    assert list(tmp_path.iterdir()) == []
    opened = tracker(store, experiment_name="e", run_name="r", tags={"a": "b"}, study="s")
    assert store.runs() == []
    assert opened.version == opened.run_id
    run = store.run()
    assert (run.info.run_id, run.info.run_name, run.info.status) == (opened.run_id, "r", "RUNNING")
    assert (run.data.tags["a"], run.data.tags["study"]) == ("b", "s")
    assert run.info.experiment_id == opened.experiment_id
    assert run.info.artifact_uri == f"file://{store.folder}/mlruns/artifacts/{run.info.run_id}/artifacts"


def test_other_ranks_never_open_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    other = MLflowTracker(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db", experiment_name="e")
    assert (other.experiment, other.run_id, other.experiment_id, other.version) == (None, None, None, None)
    other.log_metrics({"a": 1.0}, step=0)
    other.log_hyperparams({"a": 1})
    other.finalize()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_importing_the_library_imports_no_mlflow_transformers_or_matplotlib():
    # A finder that notes what is asked for also sees what is not installed.
    code = (
        "import sys\n"
        "asked = set()\n"
        "class Note:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        asked.add(name.partition('.')[0])\n"
        "sys.meta_path.insert(0, Note())\n"
        "import lit_sigsoftmax\n"
        "print(sorted(asked & {'torch', 'lightning', 'mlflow', 'transformers', 'matplotlib'}))\n"
        "lit_sigsoftmax.OutputHead\n"
        "import lit_sigsoftmax.functional\n"
        "print(sorted(set(sys.modules) & {'torch', 'lightning', 'mlflow', 'transformers', 'matplotlib'}))\n"
        "lit_sigsoftmax.LanguageModel\n"
        "print(sorted(set(sys.modules) & {'lightning', 'mlflow', 'transformers'}))\n"  # torchmetrics takes matplotlib
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines() == ["[]", "['torch']", "['lightning']"], done.stderr


# What is written


def test_metrics_and_parameters_of_a_run(store):
    run = tracker(store, experiment_name="e")
    for step in range(3):
        run.log_metrics({"train/loss": 3.0 - step, "epoch": 0}, step)
    run.log_metrics({"test/loss": 0.5}, step=3)
    run.log_metrics({"epoch": 1}, step=4)
    run.log_hyperparams({"model": {"class_path": "a.B", "init_args": {"n": 2, "none": None}}, "long": "x" * 7000})
    run.log_hyperparams(argparse.Namespace(**{f"many_{i}": i for i in range(250)}))
    run.finalize()
    found = store.run()
    assert found.data.metrics == {"train/loss": 1.0, "test/loss": 0.5}
    assert store.history(found, "train/loss") == [3.0, 2.0, 1.0]
    assert store.steps(found, "train/loss") == [0, 1, 2]
    assert store.steps(found, "test/loss") == [0]
    expected = {"model": "a.B", "model.n": "2", "long": "x" * 6000} | {f"many_{i}": str(i) for i in range(250)}
    assert found.data.params == expected


@pytest.mark.parametrize(("status", "recorded"), [("success", "FINISHED"), ("failed", "FAILED")])
def test_the_status_of_a_run(store, status, recorded):
    run = tracker(store, experiment_name="e")
    run.log_metrics({"a": 1.0}, step=0)
    run.finalize(status)
    assert store.run().info.status == recorded
    run.log_metrics({"a": 2.0}, step=1)  # a test after training goes on with the run
    assert run.flush()
    assert store.run().info.status == "RUNNING"
    run.finalize()
    assert store.run().info.status == "FINISHED"
    assert store.history(store.run(), "a") == [1.0, 2.0]


def test_artifacts_tags_and_dataset_of_a_run(store, tmp_path):
    run = tracker(store, experiment_name="e")
    (tmp_path / "plot.png").write_bytes(b"\x89PNG")
    run.log_text("a: 1\n", "config.yaml")
    run.log_text("é", "tables/words.tsv")
    run.log_artifact(tmp_path / "plot.png", "plots")
    run.log_artifact(str(tmp_path / "plot.png"))
    run.log_tags({"checkpoint.best": "somewhere", "n": 3})
    run.log_dataset("ptb", "0" * 32, {"datamodule": "mine.Data"})
    run.finalize()
    found = store.run()
    assert store.artifact(found, "config.yaml").read_text() == "a: 1\n"
    assert store.artifact(found, "tables/words.tsv").read_text(encoding="utf-8") == "é"
    assert store.artifact(found, "plots/plot.png").read_bytes() == b"\x89PNG"
    assert store.artifact(found, "plot.png").read_bytes() == b"\x89PNG"
    assert (found.data.tags["checkpoint.best"], found.data.tags["n"]) == ("somewhere", "3")
    (dataset,) = found.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest, dataset.tags[0].value) == ("ptb", "0" * 32, "train")
    assert "mine.Data" in dataset.dataset.source


@pytest.mark.slow
def test_a_run_that_is_not_finalized_is_stored_when_the_program_ends(store):
    code = (
        "from lit_sigsoftmax.tracking import MLflowTracker\n"
        f"MLflowTracker({store.uri!r}, experiment_name='e', system_metrics=False).log_metrics({{'a': 1.0}}, step=0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert store.history(store.run(), "a") == [1.0]
    assert list((store.folder / "mlruns" / "spool").iterdir()) == []


def test_a_name_that_mlflow_refuses_costs_that_metric_alone(store, caplog):
    run = tracker(store, experiment_name="e")
    for step in range(3):
        run.log_metrics({"a": 1.0, "../b": 2.0, "c": 3.0}, step=step)
    run.finalize()
    assert store.run().info.status == "FINISHED"
    assert store.history(store.run(), "a") == [1.0] * 3
    assert store.history(store.run(), "c") == [3.0] * 3
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["the tracking store refuses the metric '../b'"]


def test_what_is_not_finite_is_a_tag(store):
    run = tracker(store, experiment_name="e")
    run.log_metrics({"train/loss": float("nan"), "train/perplexity": float("inf"), "lr": 0.1}, step=7)
    run.finalize()
    assert store.run().data.metrics == {"lr": 0.1}
    assert store.run().data.tags["diverged"] == "train/loss, train/perplexity at step 7"


# A run that is continued


def test_a_run_that_is_continued_keeps_what_it_has(store):
    first = tracker(store, experiment_name="e", run_name="r", tags={"seed": "0"})
    first.log_hyperparams({"max_epochs": 1})
    for step in range(10):
        first.log_metrics({"train/loss": 10.0 - step}, step)
    first.log_metrics({"test/loss": 1.0, "test/perplexity": 2.0}, step=10)
    first.finalize("failed")
    again = tracker(store, run_id=first.run_id, run_name="other", tags={"seed": "1"})
    again.log_hyperparams({"max_epochs": 2})
    for step in range(5, 15):
        again.log_metrics({"train/loss": 100.0 - step}, step)
    assert again.flush()
    assert store.run().info.status == "RUNNING"
    again.log_metrics({"test/loss": 0.5, "test/perplexity": 2.0}, step=15)
    again.finalize()
    found = store.run()
    assert (found.info.status, found.info.run_name, again.run_id) == ("FINISHED", "r", first.run_id)
    assert again.experiment_id == found.info.experiment_id
    assert (found.data.params, found.data.tags["seed"]) == ({"max_epochs": "1"}, "0")
    assert store.steps(found, "train/loss") == list(range(15))
    assert store.history(found, "train/loss") == [10.0 - s for s in range(10)] + [100.0 - s for s in range(10, 15)]
    assert found.data.metrics["test/loss"] == 0.5  # a result of the run as a whole, which has changed
    assert store.history(found, "test/perplexity") == [2.0]


def test_a_run_to_continue_that_the_store_lacks(store):
    with pytest.raises(TrackingError, match="0" * 32):
        tracker(store, run_id="0" * 32).log_metrics({"a": 1.0}, step=0)
    assert store.runs() == []


def test_a_run_has_one_writer(store):
    first = tracker(store, experiment_name="e")
    first.log_metrics({"a": 1.0}, step=0)
    with pytest.raises(TrackingError, match="another process writes the run"):
        tracker(store, run_id=first.run_id).log_metrics({"a": 1.0}, step=0)
    first.finalize()
    assert store.run().info.status == "FINISHED"


# The spool's files


def test_a_journal_keeps_what_a_killed_process_has_written_whole(tmp_path):
    journal = Journal(tmp_path / "j", {"run_id": "r"})
    for i in range(5):
        journal.append({"tags": {"i": str(i)}})
    records, end = journal.read(n=2)
    assert [record["tags"]["i"] for record in records] == ["0", "1"]
    journal.done(end)
    with (tmp_path / "j" / "queue.jsonl").open("ab") as file:
        file.write(b'{"tags": {"i": "to')
    journal.close()
    again = Journal(tmp_path / "j")
    again.append({"tags": {"i": "5"}})
    records, end = again.read()
    assert [record["tags"]["i"] for record in records] == ["0", "1", "2", "3", "4", "5"]
    assert again.header == {"run_id": "r"}
    again.done(end)
    assert again.empty
    assert (tmp_path / "j" / "queue.jsonl").read_bytes() == b""
    again.close(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_has_one_owner_who_alone_can_read_it(tmp_path):
    journal = Journal(tmp_path / "j", {})
    with pytest.raises(JournalInUseError, match="another process"):
        Journal(tmp_path / "j")
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o700
    journal.close()
    Journal(tmp_path / "j").close()


def test_a_journal_is_bounded_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(journal_module, "LIMIT", 200)
    journal = Journal(tmp_path / "j", {})
    for step in range(10):
        journal.append({"metrics": [["a", 1.0, 0, step]]})
    journal.append({"status": {"status": "FINISHED", "time": 0}})  # what is needed goes in nevertheless
    records, _ = journal.read()
    assert [record["metrics"][0][3] for record in records[:-1]] == [0, 1, 2, 3, 4, 5]
    assert "status" in records[-1]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"{tmp_path}/j takes no more"]


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "."])
def test_a_journal_hands_out_its_own_files_alone(tmp_path, path):
    journal = Journal(tmp_path / "j", {})
    kept = journal.add_file("text", "a.txt")
    assert journal.file(kept).read_text() == "text"
    with pytest.raises(ValueError, match="outside"):
        journal.file(path)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("sqlite:///mlruns/mlflow.db", "sqlite:///mlruns/mlflow.db"),
        ("http://tracking.example:5000", "http://tracking.example:5000"),
        ("https://me:secret@tracking.example", "https://me:***@tracking.example"),
        ("postgresql+psycopg2://me:sec:ret@host:5432/db", "postgresql+psycopg2://me:***@host:5432/db"),
    ],
)
def test_a_password_is_not_written_down(uri, shown):
    assert without_password(uri) == shown


def test_a_run_that_was_never_opened_is_not_closed(store):
    tracker(store, experiment_name="e").finalize()
    assert store.runs() == []


def test_what_the_user_named_is_not_described_over(store):
    run = tracker(store, run_name="mine", tags={"seed": "none"})
    run.describe("corpus", "softmax x1 seed 0", {"seed": "0", "activation": "softmax"})
    assert (run.name, run.run_name) == ("corpus", "mine")
    assert run.tags == {"seed": "none", "activation": "softmax"}


def test_an_experiment_is_made_once_and_has_the_view_that_compares(store):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: get_experiment(store.client, store.uri, "corpus"), range(4)))
    assert len(set(made)) == 1
    experiment = store.client.get_experiment(made[0])
    assert experiment.artifact_location == f"file://{store.folder}/mlruns/artifacts"
    assert [tag for tag in experiment.tags if tag.startswith("mlflow.sharedViewState.")]


def test_system_metrics_are_sampled_while_the_run_is_open(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    before = set(threading.enumerate())
    run = MLflowTracker(tracking_uri=store.uri, experiment_name="e")
    assert run.run_id
    deadline = time.monotonic() + 60
    while not (names := {name for name in store.run().data.metrics if name.startswith("system/")}):
        assert time.monotonic() < deadline, "no sample within a minute"
        time.sleep(0.2)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= names
    run.finalize()
    assert store.run().info.status == "FINISHED"
    assert set(threading.enumerate()) <= before


def test_flatten():
    nested = {
        "seed_everything": 0,
        "model": {
            "class_path": "lit_sigsoftmax.LanguageModel",
            "init_args": {
                "activation": {"class_path": "mine.Cap", "init_args": {"limit": 30.0}},
                "n_experts": 1,
                "backbone": {"class_path": "mine.GRU", "init_args": {"hidden_size": 8, "unset": None}},
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.999]}},
        "tie": False,
    }
    assert dict(flatten(nested)) == {
        "seed_everything": 0,
        "model": "lit_sigsoftmax.LanguageModel",
        "model.activation": "mine.Cap",
        "model.activation.limit": 30.0,
        "model.n_experts": 1,
        "model.backbone": "mine.GRU",
        "model.backbone.hidden_size": 8,
        "optimizer": "torch.optim.AdamW",
        "optimizer.betas": [0.9, 0.999],
        "tie": False,
    }


def test_a_run_tells_the_commit_and_whether_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "git.dirty" not in environment()
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b.c",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b.c",
    }
    for name, value in identity.items():
        monkeypatch.setenv(name, value)

    def git(*words):
        return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout.strip()

    Path("file").write_text("one")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "First")
    Path("untracked").write_text("")
    clean = environment()
    assert (clean["mlflow.source.git.commit"], clean["git.dirty"]) == (git("rev-parse", "HEAD"), "false")
    Path("file").write_text("two")
    assert environment()["git.dirty"] == "true"


def test_tied_and_frozen_parameters_are_counted_as_they_are_trained():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    assert count_parameters(model) == 24
    model[1].weight = model[0].weight
    assert count_parameters(model) == 15
    model[1].bias.requires_grad_(False)
    assert count_parameters(model) == 12


def test_the_speed_is_that_of_all_devices_without_validation():
    logged = {}
    trainer, module = (
        SimpleNamespace(world_size=2, callback_metrics={}),
        SimpleNamespace(log=lambda name, rate, **_: logged.update({name: rate})),
    )
    batch = (torch.zeros(4, 5), torch.zeros(4, 5))
    throughput = Throughput()
    throughput.on_train_epoch_start(trainer, module)
    start = time.perf_counter()
    time.sleep(0.1)
    throughput.on_train_batch_end(trainer, module, None, batch, 0)
    trained = time.perf_counter() - start
    time.sleep(1.0)
    throughput.on_validation_end(trainer, module)
    start = time.perf_counter()
    time.sleep(0.1)
    throughput.on_train_batch_end(trainer, module, None, batch, 1)
    trained += time.perf_counter() - start
    throughput.on_train_epoch_end(trainer, module)
    assert logged["train/tokens_per_second"] == pytest.approx(80 / trained, rel=0.2)
