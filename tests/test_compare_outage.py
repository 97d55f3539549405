"""Comparisons whose store goes away, is shared with other machines, or is written by several commands."""

import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL

import pytest
from cli_helpers import NO_SYSTEM_METRICS, SCRIPT, SMALL, run_process
from fork_helpers import AtCall, Run
from server_helpers import Server

from lit_sigsoftmax.cli import main
from lit_sigsoftmax.compare.job import Job, close
from lit_sigsoftmax.spool import sync
from lit_sigsoftmax.store import TrackingError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*many workers")]

TINY = (*SMALL, NO_SYSTEM_METRICS, "--trainer.limit_train_batches=4")
# Waits in training while there is a file of its name.
WAITS = """
import time
from pathlib import Path


def log_g(z):
    while z.requires_grad and Path(__name__).exists():
        time.sleep(0.05)
    return z
"""
# The end of a run waits for a store that is away, but not for 20 s.
HURRIES = """
from lit_sigsoftmax.spool import Spool

wait = Spool.wait
Spool.wait = lambda spool, patience: wait(spool, 0.5)
"""
NOWHERE = "http://me:secret@127.0.0.1:9"


@pytest.fixture(scope="module")
def started(empty_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "mlflow.db")
    server = Server(folder, f"sqlite:///{folder}/mlflow.db")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(started, tmp_path, monkeypatch):
    """A server that runs, and a working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.uri)
    return started


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def runs_of(server, study):
    experiments = [experiment.experiment_id for experiment in server.client.search_experiments()]
    return list(server.client.search_runs(experiments, f"tags.study = '{study}' and tags.kind = 'fit'"))


def test_a_run_that_ends_in_an_outage_takes_nothing_with_it_and_is_compared(server):
    for name, source in {"first": WAITS + HURRIES, "second": WAITS}.items():
        Path(f"{name}.py").write_text(source)
        Path(name).touch()
    arms = ("first.log_g", "second.log_g", "softmax")
    command = [*SCRIPT, "compare", *TINY, "--activations", *arms, "--study", "outage"]
    environment = {**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "OMP_NUM_THREADS": "1"}
    errors = Path("errors.txt")
    with errors.open("w") as err:
        process = subprocess.Popen([*command, "--workers=2"], env=environment, stderr=err, stdout=subprocess.PIPE)
    try:
        wait_until(lambda: process.poll() is not None or len(list(Path().rglob("last.ckpt"))) == 2)
        server.kill()
        Path("first").unlink()
        wait_until(lambda: process.poll() is not None or "first.log_g x1 seed 0: done" in errors.read_text())
        assert "first.log_g x1 seed 0: done, but not in the store yet (Connection refused)" in errors.read_text()
        begins = Path("mlruns", "logs", "outage", "softmax x1 seed 0.log")
        wait_until(
            lambda: begins.exists() and f"waiting: cannot use the tracking store {server.uri}" in begins.read_text()
        )
        server.start()
        Path("second").unlink()
        out = process.communicate(timeout=120)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 0, errors.read_text()
    assert "Traceback" not in errors.read_text()
    assert "second.log_g x1 seed 0: done after" in errors.read_text()
    assert [run.info.status for run in runs_of(server, "outage")] == ["FINISHED"] * 3
    assert {f"{arm} x1" for arm in arms} <= {word.strip() for word in out.split("│")}


def test_a_run_that_was_begun_and_killed_in_an_outage_goes_on(server):
    log = Path("a run.log").absolute()
    tags = json.dumps({"config_hash": "abcd"})
    logger = {"tracking_uri": server.uri, "study": "spooled", "tags": tags, "on_outage": "spool"}
    given = [f"--trainer.logger.init_args.{key}={value}" for key, value in logger.items()]
    arguments = (*TINY, "--trainer.accelerator=cpu", *given)
    server.kill()
    begun = Run(["fit", *arguments], Path().absolute(), 1, AtCall(1, SIGKILL, inside="on_train_batch_end"))
    assert begun.wait() == [-SIGKILL], begun.output
    (local,) = (path.name for path in Path("mlruns", "spool").iterdir())
    server.start()
    assert sync(server.uri) == 1
    (before,) = runs_of(server, "spooled")
    Job("a run", arguments, server.uri, "spooled", "abcd", log)()
    (run,) = runs_of(server, "spooled")
    assert (run.info.run_id, run.info.status) == (before.info.run_id, "FINISHED")
    assert run.data.tags["local_id"] == local
    assert server.points(run) == dict.fromkeys(range(4), 1)


def test_a_run_of_another_working_directory_is_left_alone(server):
    job = Job("a run", ("--no-such-argument",), server.uri, "elsewhere", "abcd", Path("a run.log").absolute())
    tags = {"study": job.study, "config_hash": job.config_hash, "kind": "fit"}
    run_id = server.client.create_run(server.client.create_experiment("corpus"), tags=tags).info.run_id
    with pytest.raises(TrackingError, match=f"a run is running as {run_id}, and nothing of that is in this"):
        job()
    assert close(server.client, job, "KILLED")
    assert [run.info.status for run in runs_of(server, "elsewhere")] == ["RUNNING"]
    Path("mlruns", "checkpoints", run_id).mkdir(parents=True)  # now it is this one's, and has no checkpoint
    with pytest.raises(SystemExit):
        job()
    assert runs_of(server, "elsewhere") == []


@pytest.mark.parametrize(
    "command", [("report", "--study", "s"), ("compare", *TINY, "--activations", "softmax", "--study", "s")]
)
def test_a_server_that_is_not_there_is_an_error_at_once(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--tracking_uri", NOWHERE])
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: cannot use the tracking store http://me:***@127.0.0.1:9 (Connection refused): start it, or" in error


def test_two_comparisons_at_once_share_one_sqlite_store(store):
    command = [*SCRIPT, "compare", *TINY, "--tracking_uri", store.uri, "--study"]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda study: run_process([*command, study], store.folder), ("one", "two")))
    for one in done:
        assert one.returncode == 0, one.stderr
        assert "database is locked" not in one.stdout + one.stderr
    runs = store.runs("tags.kind = 'fit'")
    found = sorted((run.data.tags["study"], run.data.tags["activation"], run.info.status) for run in runs)
    assert found == [(study, name, "FINISHED") for study in ("one", "two") for name in ("sigsoftmax", "softmax")]
    logs = "".join(path.read_text() for path in store.folder.rglob("*.log"))
    assert "locked" not in logs
