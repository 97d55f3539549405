"""The MLflow UI, opened on the page that compares."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Sequence

import psutil

from lit_sigsoftmax.connect import connect
from lit_sigsoftmax.store import TrackingError, default_tracking_uri, sqlite_path
from lit_sigsoftmax.views import HOST, PORT, comparison_url

__all__ = ["serve"]


def serve(args: Sequence[str]) -> None:
    """Run ``lit-sigsoftmax ui``: serve the store on this machine alone until interrupted, and open a browser.

    Args:
        args: The command line after ``ui``.
    """
    parser = argparse.ArgumentParser("lit-sigsoftmax ui", description="Open the MLflow UI on the page that compares.")
    parser.add_argument("--tracking_uri", default=default_tracking_uri(), help="the store (default: %(default)s)")
    parser.add_argument("--host", default=HOST, help="address to bind (default: this machine only)")
    parser.add_argument("--port", type=int, default=PORT, help="port (default: %(default)s)")
    parser.add_argument("--no_browser", action="store_true", help="only print the address")
    options = parser.parse_args(args)
    try:
        experiment_id = _newest_experiment(options.tracking_uri)
    except TrackingError as error:
        parser.error(str(error))
    if experiment_id is None:
        parser.error(f"no runs in {options.tracking_uri} yet: start with lit-sigsoftmax fit or compare")
    url = comparison_url(options.tracking_uri, experiment_id, port=options.port)
    if options.tracking_uri.startswith("http"):
        _show(url, options.no_browser)
        return
    with socket.socket() as probe:
        if probe.connect_ex((options.host, options.port)) == 0:
            parser.error(f"port {options.port} is in use: choose another with --port")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda *_: sys.exit(0))  # so that the server ends with this process
    server = _start(options.tracking_uri, options.host, options.port)
    try:
        _wait(server, options.host, options.port)
        _show(url, options.no_browser)
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        _end(server)


def _newest_experiment(tracking_uri: str) -> str | None:
    if (path := sqlite_path(tracking_uri)) and not path.exists():
        return None  # opening it would make it
    client = connect(tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=1, order_by=["attributes.start_time DESC"])
    return str(runs[0].info.experiment_id) if runs else None


def _start(tracking_uri: str, host: str, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    # MLflow's job runner would add eight processes that this UI has no use for. Ctrl-C is for this process alone, which
    # ends the server: it would print where it was.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _end(server: subprocess.Popen[bytes]) -> None:
    # MLflow's command does not always take its web server along.
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    end(process)
            _, family = psutil.wait_procs(family, timeout=10)


def _wait(server: subprocess.Popen[bytes], host: str, port: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the MLflow server ended at start with exit code {server.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.2)
    raise SystemExit(f"the MLflow server did not answer on {host}:{port} within {seconds:.0f} s")


def _show(url: str, no_browser: bool) -> None:
    print(f"Head to head: {url}", flush=True)
    if not no_browser:
        webbrowser.open(url)
