"""A tracking server that dies, freezes or is not there: training goes on, and every point is stored exactly once."""

import json
import os
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cli_helpers import SMALL
from fork_helpers import CONTEXT
from lightning.pytorch import Callback
from server_helpers import Server

from lit_sigsoftmax import tracking, training
from lit_sigsoftmax.journal import Journal
from lit_sigsoftmax.spool import sync
from lit_sigsoftmax.store import TrackingError
from lit_sigsoftmax.tracking import MLflowTracker

POSTGRES = "LIT_SIGSOFTMAX_POSTGRES"
N_CUT = 6000
STEPS = 150  # of FIT: 3,000 tokens in 5 streams
FIT = ("fit", *SMALL, "--data.bptt=4", "--data.batch_size=5")


@pytest.fixture(
    scope="module",
    params=[
        "sqlite",
        pytest.param(
            "postgresql",
            marks=pytest.mark.skipif(
                POSTGRES not in os.environ, reason=f"no PostgreSQL: set {POSTGRES} to the address of an empty database"
            ),
        ),
    ],
)
def started(request, empty_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    if request.param == "sqlite":
        shutil.copy(empty_store, folder / "mlflow.db")
    server = Server(folder, f"sqlite:///{folder}/mlflow.db" if request.param == "sqlite" else os.environ[POSTGRES])
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(started, tmp_path, monkeypatch):
    """A server that runs, a working directory, and a corpus of its own name for each test."""
    if started.process is None or started.process.poll() is not None:
        started.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.uri)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    return started


class At(Callback):
    """Does something after a training step, and logs a text to the run."""

    def __init__(self, **actions):
        self.actions = {int(step.removeprefix("step_")): action for step, action in actions.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if action := self.actions.get(trainer.global_step):
            action()
            trainer.logger.log_text(f"{trainer.global_step}", f"notes/{trainer.global_step}.txt")


def fit(name, *arguments, **actions):
    training.run([*FIT, f"--trainer.logger.init_args.experiment_name={name}", *arguments], [At(**actions)])


def assert_whole(server, name, status="FINISHED"):
    run = server.run(name)
    assert server.points(run) == dict.fromkeys(range(STEPS), 1)
    assert server.points(run, "test/loss") == {0: 1}
    assert run.info.status == status
    assert run.data.params["model.activation"] == "softmax"
    assert {"checkpoint.best", "version.torch", "seed"} <= set(run.data.tags)
    assert [item.path for item in server.client.list_artifacts(run.info.run_id, "notes")]
    assert "config.yaml" in [item.path for item in server.client.list_artifacts(run.info.run_id)]
    assert [len(run.inputs.dataset_inputs), run.inputs.dataset_inputs[0].dataset.name] == [1, "synthetic"]
    return run


def spools(folder):
    return sorted(path.name for path in (folder / "mlruns" / "spool").glob("*"))


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_gets_every_point_once(server, tmp_path, caplog):
    fit("restarted", step_30=server.kill, step_90=server.start)
    assert_whole(server, "restarted")
    assert spools(tmp_path) == []
    assert "training goes on" in caplog.text
    assert "answers again" in caplog.text


@pytest.mark.slow
def test_what_a_server_that_stays_away_has_missed_is_sent_by_sync(server, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(tracking, "_PATIENCE", 0.5)
    fit("away", step_30=server.kill)
    (left,) = spools(tmp_path)
    assert f"spool/{left}. When the store is back: lit-sigsoftmax report --sync" in caplog.text
    assert f": {left} in {server.uri}" in capsys.readouterr().out
    with pytest.raises(TrackingError, match=rf"{server.uri} does not take .*{left}: Connection refused"):
        sync(server.uri)
    away = 1000 * time.time()
    server.start()
    kept = tmp_path / "mlruns" / "spool"
    shutil.copytree(kept, tmp_path / "again")
    assert sync(server.uri) == 1
    whole = assert_whole(server, "away")
    assert whole.info.run_id == left
    assert whole.info.end_time < away  # when it ended, not when that was heard of
    assert spools(tmp_path) == []
    # a second time, as where the first was interrupted before it could remove what it had sent
    kept.rmdir()
    shutil.move(tmp_path / "again", kept)
    assert sync(server.uri) == 1
    assert_whole(server, "away")
    assert sync(server.uri) == 0


@pytest.mark.slow
def test_a_server_that_is_not_there_at_the_start(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_PATIENCE", 0.5)
    server.kill()
    with pytest.raises(SystemExit) as exit_:
        fit("absent")
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2
    assert error.startswith(f"error: cannot use the tracking store {server.uri} (Connection refused): start it, ")
    assert "on_outage=spool" in error
    assert list(tmp_path.iterdir()) == []
    fit("absent", "--trainer.logger.init_args.on_outage=spool", step_10=lambda: None)
    (local,) = spools(tmp_path)
    assert (tmp_path / "mlruns" / "checkpoints" / local / "last.ckpt").is_file()
    server.start()
    assert sync(server.uri) == 1
    run = assert_whole(server, "absent")
    assert (run.data.tags["local_id"], run.info.run_name) == (local, "softmax x1 seed 0")
    assert run.info.start_time <= min(
        p.timestamp for p in server.client.get_metric_history(run.info.run_id, "train/loss")
    )


def points_of(server, name):
    """How many points of the metric "a" are known of an experiment's run, 0 where there is none yet."""
    experiment = server.client.get_experiment_by_name(name)
    runs = server.client.search_runs([experiment.experiment_id]) if experiment else []
    return int(runs[0].data.metrics.get("a", -1)) + 1 if runs else 0


@pytest.mark.slow
def test_a_run_without_a_store_is_one_run_there_however_often_it_is_cut_off(server, tmp_path, monkeypatch):
    """At its start, twice in the middle of being sent, and again when it is continued."""
    monkeypatch.setattr(tracking, "_PATIENCE", 0.1)
    without_store = {"experiment_name": "cut", "system_metrics": False, "on_outage": "spool"}
    server.kill()
    first = MLflowTracker(**without_store)
    for step in range(N_CUT):
        first.log_metrics({"a": float(step), "b": step / 3}, step)
        if step % 1000 == 0:
            first.log_text(f"{step}", f"notes/{step}.txt")
    first.finalize("failed")
    (local,) = spools(tmp_path)
    for known in (1, N_CUT // 2):
        server.start()
        with ThreadPoolExecutor() as pool:
            sending = pool.submit(sync, server.uri)
            while points_of(server, "cut") < known:
                assert not sending.done()
            server.kill()
            with pytest.raises(TrackingError, match=local):
                sending.result()
    server.start()
    assert points_of(server, "cut") < N_CUT
    assert sync(server.uri) == 1
    server.kill()
    again = MLflowTracker(run_id=local, **without_store)
    for step in range(N_CUT - 10, N_CUT + 10):
        again.log_metrics({"a": float(step), "b": step / 3}, step)
    server.start()
    assert again.flush(patience=60)
    server.kill()
    for step in range(N_CUT + 10, N_CUT + 20):
        again.log_metrics({"a": float(step), "b": step / 3}, step)
    again.finalize("failed")
    once_more = MLflowTracker(run_id=local, **without_store)
    for step in range(N_CUT + 20, N_CUT + 30):
        once_more.log_metrics({"a": float(step), "b": step / 3}, step)
    once_more.finalize()
    server.start()
    assert sync(server.uri) == 1
    assert spools(tmp_path) == []
    run = server.run("cut")
    assert (run.info.status, run.data.tags["local_id"]) == ("FINISHED", local)
    assert server.points(run, "a") == server.points(run, "b") == dict.fromkeys(range(N_CUT + 30), 1)
    assert len(server.client.list_artifacts(run.info.run_id, "notes")) == N_CUT // 1000


@pytest.mark.slow
def test_a_server_that_freezes_takes_no_time_and_an_answer_that_is_lost_doubles_nothing(server, tmp_path, monkeypatch):
    """Frozen, it accepts a request that it will serve later, when the tracker has long sent it again."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = MLflowTracker(experiment_name="frozen", system_metrics=False)
    run.log_metrics({"a": 0.0}, step=0)
    assert run.flush()
    server.send(signal.SIGSTOP)
    for step in range(1, 100):
        run.log_metrics({"a": step / 3}, step)
    assert not run.flush(patience=3)
    server.send(signal.SIGCONT)
    run.finalize()
    found = server.run("frozen")
    assert server.points(found, "a") == dict.fromkeys(range(100), 1)
    assert [p.value for p in server.client.get_metric_history(found.info.run_id, "a")] == [s / 3 for s in range(100)]


@pytest.mark.slow
def test_a_run_that_is_continued_through_an_outage_has_every_step_once(server):
    first = MLflowTracker(experiment_name="continued", system_metrics=False)
    for step in range(10):
        first.log_metrics({"a": 1.0}, step)
    first.finalize("failed")
    again = MLflowTracker(run_id=first.run_id, system_metrics=False)
    again.log_metrics({"a": 2.0}, step=8)
    assert again.flush()
    server.kill()
    for step in range(9, 20):
        again.log_metrics({"a": 2.0}, step)
    assert not again.flush(patience=0.5)
    server.start()
    again.finalize()
    run = server.run("continued")
    assert (run.info.status, server.points(run, "a")) == ("FINISHED", dict.fromkeys(range(20), 1))


def log_until_killed(uri, started):
    run = MLflowTracker(uri, experiment_name="killed", system_metrics=False)
    for step in range(1_000_000):
        run.log_metrics({"a": float(step)}, step)
        started.send((run.run_id, step))


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_what_it_has_logged(store):
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=log_until_killed, args=(store.uri, sender))
    process.start()
    logged = (None, 0)
    while logged[1] < 3000:
        logged = receiver.recv()
    assert sync(store.uri) == 0  # it is still being written
    process.kill()
    process.join()
    while receiver.poll():
        logged = receiver.recv()
    assert sync(store.uri) == 1
    steps = store.steps(store.run(), "a")
    assert steps[: logged[1] + 1] == list(range(logged[1] + 1))
    assert len(steps) - len(set(steps)) == 0


def write_run(uri, name, barrier):
    barrier.wait()
    run = MLflowTracker(uri, experiment_name="shared", run_name=name, system_metrics=False)
    for step in range(200):
        run.log_metrics({"train/loss": step / 7, "val/loss": step / 3}, step)
        time.sleep(0.005)  # so that the runs overlap
    run.log_tags({"done": "yes"})
    run.finalize()


@pytest.mark.slow
def test_four_processes_write_one_sqlite_store_at_once(store, capfd):
    barrier = CONTEXT.Barrier(4)
    processes = [CONTEXT.Process(target=write_run, args=(store.uri, f"run {i}", barrier)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    runs = store.runs()
    assert sorted(run.info.run_name for run in runs) == [f"run {i}" for i in range(4)]
    for run in runs:
        assert (run.info.status, run.data.tags["done"]) == ("FINISHED", "yes")
        assert store.history(run, "train/loss") == [step / 7 for step in range(200)]
        assert store.history(run, "val/loss") == [step / 3 for step in range(200)]
    assert "locked" not in "".join(capfd.readouterr())
    assert spools(store.folder) == []


def test_a_spool_of_another_store_is_left_and_named(store, tmp_path, caplog):
    folder = store.folder / "mlruns" / "spool" / "r"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"tracking_uri": "http://elsewhere:1"}))
    assert sync(store.uri) == 0
    assert "is of the store http://elsewhere:1: left as it is" in caplog.text
    assert spools(store.folder) == ["r"]


def leave_spool(store, name, study=None):
    """What a process that was killed leaves."""
    header = {"tracking_uri": store.uri, "experiment": "e", "run_name": name, "run_id": None, "start_time": 0}
    journal = Journal(store.folder / "mlruns" / "spool" / name, {**header, "tags": {"study": study} if study else {}})
    journal.append({"metrics": [("a", 1.0, 0, 0)]})
    journal.close()


def test_damaged_spools_are_named_and_all_others_are_sent(store):
    for name in "abcd":
        leave_spool(store, name)
    for name in "ac":
        (store.folder / "mlruns" / "spool" / name / "run.json").write_text("{")
    with pytest.raises(TrackingError, match=r"does not take .*/a: .*does not take .*/c: .*; 2 runs sent$"):
        sync(store.uri)
    assert sorted(run.info.run_name for run in store.runs()) == ["b", "d"]
    assert spools(store.folder) == ["a", "c"]


def test_the_spools_of_one_study_are_sent_alone(store):
    for name, study in (("a", "one"), ("b", "two"), ("c", None)):
        leave_spool(store, name, study)
    assert sync(store.uri, study="two") == 1
    assert spools(store.folder) == ["a", "c"]


def test_a_full_disk_costs_a_file_and_not_the_run(store, tmp_path, caplog):
    (tmp_path / "large").write_bytes(bytes(100_000))
    run = MLflowTracker(experiment_name="full", system_metrics=False)
    run.log_text("a", "a.txt")
    assert run.flush()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        run.log_text("b" * 100_000, "b.txt")
        run.log_artifact(tmp_path / "large")
        assert list(next((store.folder / "mlruns" / "spool").iterdir()).glob("files/*/*")) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(FileNotFoundError):
        run.log_artifact(tmp_path / "missing")
    run.finalize()
    assert store.run().info.status == "FINISHED"
    assert [file.path for file in store.client.list_artifacts(run.run_id)] == ["a.txt"]
    assert [record.message for record in caplog.records if "LOST" in record.message] == [caplog.records[0].message]
