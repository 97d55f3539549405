"""A tracking server that a test can kill, freeze and start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from functools import cached_property

import psutil
from mlflow import MlflowClient


class Server:
    """A real ``mlflow server``."""

    def __init__(self, folder, backend):
        self.folder, self.backend = folder, backend
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    @cached_property
    def client(self):
        return MlflowClient(self.uri)

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.backend, "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port)]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)

    def send(self, number):
        """Send a signal to the server and all that it has started."""
        for process in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            process.send_signal(number)

    def kill(self):
        if self.process is not None:
            self.send(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def run(self, name):
        """The only run of an experiment."""
        (run,) = self.client.search_runs([self.client.get_experiment_by_name(name).experiment_id])
        return run

    def points(self, run, key="train/loss"):
        """How often each step of a metric is stored."""
        return Counter(point.step for point in self.client.get_metric_history(run.info.run_id, key))
