"""The script for SLURM, where there is none: a stand-in for srun starts the tasks as SLURM would, on this machine."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import NO_SYSTEM_METRICS, SCRIPT, SMALL

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "slurm.sh"
# Two machines with a task each. In the first allocation the tasks get SIGTERM once there is a checkpoint, as of
# --signal=TERM@120; srun ends with the highest exit code of its tasks.
SRUN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys, time

tasks = []
for i in "01":
    place = {{"SLURM_PROCID": i, "SLURM_NODEID": i, "SLURM_LOCALID": "0"}}
    tasks.append(subprocess.Popen(sys.argv[1:], env=os.environ | place))
while os.environ["SLURM_RESTART_COUNT"] == "0" and all(task.poll() is None for task in tasks):
    if pathlib.Path("runs", os.environ["SLURM_JOB_ID"], "last.ckpt").exists():
        for task in tasks:
            task.send_signal(signal.SIGTERM)
        break
    time.sleep(0.01)
codes = [task.wait() for task in tasks]
print("tasks ended with", codes)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol.txt
"""
WHICH = """
import os

from lightning.pytorch import Callback


class Which(Callback):
    def on_fit_start(self, trainer, pl_module):
        os.write(1, f"{type(trainer.strategy.cluster_environment).__name__} rank {trainer.global_rank}\\n".encode())
"""


def job_id():
    """One whose last four digits, from which Lightning makes the port, make a free one."""
    for number in range(1001, 9999):
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", 15000 + number)):
                return str(number)
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_the_script_is_told_to_stop_queues_again_and_goes_on_in_one_run(store):
    words = [*SMALL, NO_SYSTEM_METRICS, "--trainer.accelerator=cpu", "--trainer.max_epochs=5"]
    script = EXAMPLE.read_text()
    for theirs, here in {
        "--config wikitext2/lstm.yaml": shlex.join([*words, "--trainer.callbacks+=which.Which"]),
        "--trainer.devices 4": "--trainer.devices 1",
    }.items():
        assert theirs in script
        script = script.replace(theirs, here)
    (store.folder / "which.py").write_text(WHICH)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "job.sh": script}.items():
        (store.folder / name).write_text(text)
        (store.folder / name).chmod(0o700)
    job = {"SLURM_JOB_ID": job_id(), "SLURM_JOB_NAME": "slurm.sh", "SLURM_NODELIST": "127.0.0.[1-2]"}
    job |= {"SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    job |= {"PATH": os.pathsep.join([str(store.folder), str(Path(*SCRIPT).parent), os.environ["PATH"]])}
    outputs = []
    for restart, (code, tasks) in enumerate([(143, "[143, 0]"), (0, "[0, 0]")]):
        environment = {**os.environ, **job, "SLURM_RESTART_COUNT": str(restart)}
        done = subprocess.run(
            ["./job.sh"], cwd=store.folder, env=environment, capture_output=True, text=True, timeout=300
        )
        outputs.append(done.stdout + done.stderr)
        assert done.returncode == code, outputs[-1]
        assert f"tasks ended with {tasks}" in done.stdout.splitlines(), outputs[-1]
        assert {"SLURMEnvironment rank 0", "SLURMEnvironment rank 1"} <= set(done.stdout.splitlines())
        assert store.run().info.status == ("FINISHED" if restart else "KILLED")
    assert (store.folder / "scontrol.txt").read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
    assert "stopping after this step, with a checkpoint" in outputs[0]
    steps = store.steps(store.run(), "train/loss")
    assert steps == list(range(len(steps)))
    assert len(steps) % 5 == 0
