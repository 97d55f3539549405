"""``lit-sigsoftmax ui``: MLflow's UI on the right store, on this machine alone, on the page that compares."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from types import SimpleNamespace

import psutil
import pytest
from cli_helpers import SCRIPT

from lit_sigsoftmax.cli import main
from lit_sigsoftmax.tracking import MLflowTracker
from lit_sigsoftmax.views import comparison_url


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def record(store, experiment, kind="fit", **tags):
    """A finished run, as training leaves it."""
    run = MLflowTracker(store.uri, experiment_name=experiment, tags={"kind": kind, **tags}, system_metrics=False)
    run.log_metrics({"test/perplexity": 99.0})
    run.finalize()
    return run


def wait_for(condition, seconds, message):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, message()
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def served(store, tmp_path, *arguments):
    """The running command, its output and its processes; whatever is left of them ends with the block."""
    log = tmp_path / "ui.log"
    port = free_port()
    command = [*SCRIPT, "ui", "--no_browser", "--port", str(port), *arguments]
    env = {**os.environ, "MLFLOW_TRACKING_URI": store.uri, "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=store.folder,
            env=env,
            stdout=out,
            stderr=out,
            start_new_session=True,
            # As at a terminal: what a shell runs in the background inherits that interrupts are ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        head = r"^Head to head: (http\S+)$"
        address = wait_for(
            lambda: re.search(head, log.read_text(), re.M) or (process.poll() is not None and process.returncode),
            200,
            log.read_text,
        )
        assert process.poll() is None, log.read_text()
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        yield SimpleNamespace(process=process, log=log, port=port, address=address[1], family=family)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def get(url, body=None):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.status, answer.read()


def ended(family):
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


@pytest.mark.slow
def test_the_page_is_served_to_this_machine_until_interrupted(store, tmp_path):
    record(store, "old corpus")
    run = record(store, "new corpus", activation="sigsoftmax")
    with served(store, tmp_path) as ui:
        assert ui.address == comparison_url(store.uri, run.experiment_id, port=ui.port)
        assert ui.address.startswith(f"http://127.0.0.1:{ui.port}/#/experiments/{run.experiment_id}/runs?")
        listening = {
            connection.laddr
            for process in ui.family
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {("127.0.0.1", ui.port)}

        root = f"http://127.0.0.1:{ui.port}"
        status, page = get(f"{root}/")
        assert status == 200
        assert b"<title>MLflow</title>" in page
        found = json.loads(get(f"{root}/api/2.0/mlflow/experiments/search", {"max_results": 10})[1])["experiments"]
        tags = {e["name"]: {tag["key"]: tag["value"] for tag in e.get("tags", [])} for e in found}
        key = re.search(r"viewStateShareKey=([\w-]+)", ui.address)[1]
        view = json.loads(tags["new corpus"][f"mlflow.sharedViewState.{key}"])
        assert view["useGroupedValuesInCharts"] is True
        assert "test/perplexity" in {chart["metricKey"] for chart in view["compareRunCharts"]}
        search = {"experiment_ids": [run.experiment_id], "filter": view["searchFilter"]}
        runs = json.loads(get(f"{root}/api/2.0/mlflow/runs/search", search)[1])["runs"]
        assert [found["info"]["run_id"] for found in runs] == [run.run_id]

        ui.process.send_signal(signal.SIGINT)
        assert ui.process.wait(60) == 0
        assert "Traceback" not in ui.log.read_text()
        wait_for(lambda: ended(ui.family), 30, lambda: f"left behind: {ui.family}")


@pytest.mark.slow
def test_a_terminated_ui_leaves_no_server_behind(store, tmp_path):
    record(store, "corpus")
    with served(store, tmp_path) as ui:
        assert len(ui.family) > 1
        ui.process.terminate()
        ui.process.wait(60)
        wait_for(lambda: ended(ui.family), 30, lambda: f"left behind: {ui.family}")


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["ui", "--no_browser", *arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_port_in_use_is_an_error(store, capsys):
    record(store, "corpus")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} is in use" in error_of(capsys, "--port", str(port))


def test_a_store_without_runs_is_an_error(store, capsys):
    assert f"no runs in {store.uri}" in error_of(capsys)


def test_a_store_that_is_not_there_is_an_error_and_is_not_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "no runs in sqlite:///mlruns/mlflow.db" in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_port_is_a_number(store, capsys):
    assert "'many'" in error_of(capsys, "--port", "many")
