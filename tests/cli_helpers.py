"""The command line as the tests use it: in this process or in a new one, on a store and a corpus of its own."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from lit_sigsoftmax.cli import main
from lit_sigsoftmax.compare import command as compare_command

PYTHON_M = (sys.executable, "-m", "lit_sigsoftmax")
SCRIPT = (str(Path(sys.executable).with_name("lit-sigsoftmax")),)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
NO_SYSTEM_METRICS = "--trainer.logger.init_args.system_metrics=false"
# A language of 20 types, 3,000 training tokens and 300 of validation and test each: some 0.1 s an epoch.
SMALL = (
    "--config=synthetic/lstm.yaml",
    "--data.n_tokens=3000",
    "--data.vocab_size=20",
    "--data.rank=5",
    "--model.backbone.hidden_size=8",
    "--trainer.max_epochs=1",
    "--trainer.log_every_n_steps=1",
    *QUIET,
)
CPU_PAIR = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")


class Store:
    """The tracking store that a command used which ran in ``folder``."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.uri = f"sqlite:///{self.folder / 'mlruns' / 'mlflow.db'}"

    @cached_property
    def client(self):
        return MlflowClient(self.uri)

    def runs(self, query=""):
        return list(self.client.search_runs([e.experiment_id for e in self.client.search_experiments()], query))

    def run(self):
        """The only run."""
        (run,) = self.runs()
        return run

    def newest(self):
        return max(self.runs(), key=lambda run: run.info.start_time)

    def history(self, run, key):
        points = self.client.get_metric_history(run.info.run_id, key)
        return [point.value for point in sorted(points, key=lambda point: point.step)]

    def steps(self, run, key):
        return sorted(point.step for point in self.client.get_metric_history(run.info.run_id, key))

    def artifact(self, run, name):
        """The file, where the store of a command in ``folder`` has to keep it."""
        return self.folder / "mlruns" / "artifacts" / run.info.run_id / "artifacts" / name


def run_process(command, cwd, timeout=300, **environment):
    """Run a command to its end, and end with it whatever it started."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    env.pop("MLFLOW_TRACKING_URI", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(list(command), cwd=cwd, env=env, text=True, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def printed_config(capsys, *arguments):
    """What ``--print_config`` makes of a command line, and its text."""
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--print_config"])
    text, error = capsys.readouterr()
    assert exit_.value.code == 0, error
    return yaml.safe_load(text), text


def write_text_corpus(folder, train="train.txt", valid="valid.txt", test="test.txt", n_lines=60):
    """A folder with three text files of lines of nine random words: ``n_lines`` for training, 20 for the others."""
    folder.mkdir(parents=True, exist_ok=True)
    words, rng = [f"w{i}" for i in range(12)], random.Random(0)
    for name, lines in ((train, n_lines), (valid, 20), (test, 20)):
        text = [" ".join(words)] + [" ".join(rng.choice(words) for _ in range(9)) for _ in range(lines)]
        (folder / name).write_text("".join(f"{line}\n" for line in text))
    return folder


def check_command(line, monkeypatch, capsys):
    """Parse a command line of the documentation as the program does, and run nothing; returns its configurations."""
    program, command, *arguments = shlex.split(line)
    assert program == "lit-sigsoftmax"
    if command == "ui":
        with pytest.raises(SystemExit) as exit_:
            main(["ui", *arguments, "--help"])
        assert exit_.value.code == 0, capsys.readouterr().err
        return []
    if command == "report":
        with pytest.raises(SystemExit):
            main(["report", *arguments])
        assert "no tracking store" in capsys.readouterr().err  # it came as far as looking for it
        return []
    if command != "compare":
        return [printed_config(capsys, command, *arguments)[0]]
    fits = []

    def stop(command_lines):
        fits.extend(command_lines)
        raise SystemExit(3)

    monkeypatch.setattr(compare_command, "check", stop)
    with pytest.raises(SystemExit) as exit_:
        main(["compare", *arguments])
    assert exit_.value.code == 3, capsys.readouterr().err  # it came as far as the check
    return [printed_config(capsys, "fit", *fit)[0] for fit in fits]
