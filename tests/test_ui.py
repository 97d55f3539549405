"""``lit-sigsoftmax ui``: MLflow's UI on the right store, on this machine alone, on the page that compares."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request

import psutil
import pytest
from cli_helpers import SCRIPT
from report_helpers import IDS, write_run

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


class UI:
    """The running command, its output and its processes; whatever is left of them ends with the block."""

    def __init__(self, store, log):
        self.log, self.port = log, free_port()
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*SCRIPT, "ui", "--no_browser", "--port", str(self.port)],
                cwd=store.folder,
                env={**os.environ, "MLFLOW_TRACKING_URI": store.uri, "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=out,
                start_new_session=True,
                # As at a terminal: what a shell runs in the background inherits that interrupts are ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)

    def wait(self):
        """Return the printed address, and remember the processes behind it."""
        head = r"^Head to head: (http\S+)$"
        wait_for(lambda: re.search(head, self.log.read_text(), re.M) or self.process.poll(), 200, self.log.read_text)
        assert self.process.poll() is None, self.log.read_text()
        self.family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        assert len(self.family) > 1
        return re.search(head, self.log.read_text(), re.M)[1]


def get(url, body=None):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.status, answer.read()


def ended(family):
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


def check_page(ui, address, store, run):
    assert address == comparison_url(store.uri, run.experiment_id, port=ui.port)
    assert address.startswith(f"http://127.0.0.1:{ui.port}/#/experiments/{run.experiment_id}/runs?")
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
    key = re.search(r"viewStateShareKey=([\w-]+)", address)[1]
    view = json.loads(tags["new corpus"][f"mlflow.sharedViewState.{key}"])
    assert view["useGroupedValuesInCharts"] is True
    assert "test/perplexity" in {chart["metricKey"] for chart in view["compareRunCharts"]}
    search = {"experiment_ids": [run.experiment_id], "filter": view["searchFilter"]}
    runs = json.loads(get(f"{root}/api/2.0/mlflow/runs/search", search)[1])["runs"]
    assert [found["info"]["run_id"] for found in runs] == [run.run_id]


@pytest.mark.slow
def test_the_page_is_served_to_this_machine_until_interrupted_or_terminated(store, tmp_path):
    record(store, "old corpus")
    run = record(store, "new corpus", activation="sigsoftmax")
    with UI(store, tmp_path / "interrupted.log") as interrupted, UI(store, tmp_path / "terminated.log") as terminated:
        check_page(interrupted, interrupted.wait(), store, run)
        terminated.wait()
        os.killpg(interrupted.process.pid, signal.SIGINT)  # as a terminal does
        terminated.process.terminate()
        assert interrupted.process.wait(60) == 0
        assert "Traceback" not in interrupted.log.read_text()
        terminated.process.wait(60)
        for ui in (interrupted, terminated):
            wait_for(lambda: ended(ui.family), 30, lambda: f"left behind: {ui.family}")  # noqa: B023


@pytest.fixture(scope="module")
def chromium():
    """Returns the page that a real browser makes of an address: the document after its scripts have run.

    What it looks like is kept beside the browser's profile, in the test's folder: ``--basetemp`` says where that is.
    """
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine: the pages are not looked at (apt-get install chromium)")

    def page(address, screenshot):
        profile = screenshot.with_name("profile")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=1600,1100"]
        command = [program, *flags, "--virtual-time-budget=60000", f"--screenshot={screenshot}", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert screenshot.read_bytes().startswith(b"\x89PNG")
        return re.sub(r"<(script|style)\b.*?</\1>", "", done.stdout, flags=re.S)

    return page


@pytest.mark.browser
@pytest.mark.slow
def test_what_a_person_sees(chromium, store, tmp_path, capsys):
    """The report's page, and the page of MLflow that the report points to."""
    for seed in (0, 1):
        for layer, test in (("softmax x1", 100.0 + 3 * seed), ("sigsoftmax x4", 95.0 + seed)):
            write_run(store, layer, seed, test, nll=[test / 20.0] * len(IDS))
    write_run(store, "relu x1", 0, status="failed", study="another")
    main(["report", "--study", "demo", "--out", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    page = chromium((tmp_path / "report" / "report.html").as_uri(), tmp_path / "report.png")
    assert re.search(r'<tr class="baseline">\s*<td><span[^>]*></span>softmax x1</td>', page)
    assert len(re.findall(r"<figure[^>]*><svg", page)) == 4
    assert re.search(
        r"<li>sigsoftmax x4: not significant at 5 %; 2 seeds can show differences above [\d.]+\.</li>", page
    )
    assert {"Study demo", "Every run", "sigsoftmax x4 seed 1"} <= set(re.split(r"<[^>]+>", page))

    with UI(store, tmp_path / "ui.log") as ui:
        ui.wait()
        address = re.search(r"^Compare: (http\S+)$", printed, re.M)[1].replace(":5000/", f":{ui.port}/")
        words = re.split(r"<[^>]+>", chromium(address, tmp_path / "mlflow.png"))
    shown = [word for word in words if word.startswith("Group: ")]
    assert shown == ["Group: sigsoftmax x4", "Group: softmax x1"]  # the lower perplexity first
    assert {f"{layer} seed {seed}" for layer in ("softmax x1", "sigsoftmax x4") for seed in (0, 1)} <= set(words)
    assert "relu x1 seed 0" not in words
    assert {"Head to head", "test/perplexity", "val/perplexity", "101.50", "95.50"} <= set(words)  # means over seeds


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


def test_a_server_that_is_not_there_is_an_error_at_once(store, capsys):
    error = error_of(capsys, "--tracking_uri", "http://me:secret@127.0.0.1:9")
    assert "cannot use the tracking store http://me:***@127.0.0.1:9 (Connection refused): start it, or" in error


def test_a_port_is_a_number(store, capsys):
    assert "'many'" in error_of(capsys, "--port", "many")
