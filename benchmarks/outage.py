"""What an outage of the tracking server costs a training.

    python benchmarks/outage.py

A real ``mlflow server`` stores what a recipe logs at every tenth step. Each round trains the same run in three ways, in
changing order:

- there: the server answers all the time;
- frozen: it is stopped (SIGSTOP) after a quarter of the steps, and goes on when the training loop has ended;
- killed: it is killed (SIGKILL) after a quarter of the steps, and started again when the loop has ended.

The time is that of the training loop with its validations and checkpoints. Afterwards every point must be in the store
once: the script ends with an error where one is not. What the end of a run waits for its last points is not counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from measure import in_order, machine, quartiles, ratios, table

from lit_sigsoftmax import training
from lit_sigsoftmax.store import get_experiment, open_client


class Server:
    """An ``mlflow server`` on this machine, on a SQLite file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", f"{self.folder}/artifacts"]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None:
                    raise RuntimeError((self.folder / "server.log").read_text()) from None
                time.sleep(0.1)

    def send(self, signum: int) -> None:
        """Send a signal to the server and its workers."""
        os.killpg(self.process.pid, signum)

    def kill(self) -> None:
        """Kill it."""
        self.send(signal.SIGKILL)
        self.process.wait()


class Loop(Callback):
    """Times the training loop; an outage begins after a quarter of it and ends with it."""

    def __init__(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        self.begin, self.end = begin, end
        self.start = self.seconds = 0.0
        self.steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin the outage."""
        if trainer.global_step == int(trainer.estimated_stepping_batches) // 4:
            self.begin()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and end the outage."""
        self.seconds = time.perf_counter() - self.start
        self.steps = trainer.global_step
        self.end()


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    training.silence_noise()
    for library in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{library}").setLevel(logging.ERROR)
    facts = machine(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        server = Server(Path(folder))
        try:
            seconds = _measure(
                server, [f"--config={options.recipe}", *(f"--{key}" for key in options.set)], options.repeats
            )
        finally:
            server.kill()
    header = ["the server is", "seconds", "of there"]
    rows = [[way, f"{quartiles(s):.2f}", f"{ratios(s, seconds['there']):.3f}"] for way, s in seconds.items()]
    print(table(header, rows))
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "results": [{"seconds": seconds}]}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="python_docs/lstm.yaml", metavar="YAML")
    parser.add_argument(
        "--set",
        nargs="*",
        default=["data.max_tokens=100000", "trainer.max_epochs=6"],
        metavar="KEY=VALUE",
        help="more of the recipe's keys",
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds, after one that does not count")
    parser.add_argument("--threads", type=int, default=1, help="of the training; the server needs a core too")
    parser.add_argument(
        "--json", type=lambda name: Path(name).absolute(), metavar="FILE", help="where every measurement is written"
    )
    return parser.parse_args()


def _measure(server: Server, words: list[str], repeats: int) -> dict[str, list[float]]:
    words = [
        *words,
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=10",
        "--trainer.limit_test_batches=1",
        f"--trainer.logger.init_args.tracking_uri={server.uri}",
    ]
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "there": (lambda: None, lambda: None),
        "frozen": (lambda: server.send(signal.SIGSTOP), lambda: server.send(signal.SIGCONT)),
        "killed": (server.kill, server.start),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number, way in in_order(ways, 1 + repeats):
        loop = Loop(*ways[way])
        name = f"{way} {number}"
        with redirect_stdout(None):
            training.run(["fit", *words, f"--trainer.logger.init_args.experiment_name={name}"], [loop])
        _check(server, name, loop.steps)
        if number:
            seconds[way].append(loop.seconds)
    return seconds


def _check(server: Server, name: str, steps: int) -> None:
    client = open_client(server.uri)
    (run,) = client.search_runs([get_experiment(client, server.uri, name)])
    found = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    if sorted(found) != list(range(9, steps, 10)) or run.info.status != "FINISHED":
        raise RuntimeError(f"{name}: the store has steps {sorted(found)} and status {run.info.status}")


if __name__ == "__main__":
    main()
