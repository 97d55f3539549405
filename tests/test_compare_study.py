"""Studies that vary, tune, stop and go on, and studies on a cluster."""

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from cli_helpers import NO_SYSTEM_METRICS, SCRIPT, SMALL

from lit_sigsoftmax.cli import main
from lit_sigsoftmax.compare.job import Job, close

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*many workers")]

TINY = (*SMALL, NO_SYSTEM_METRICS, "--trainer.limit_train_batches=4")
# Takes its time in training while there is a file called slow.
SLOW = """
import time
from pathlib import Path


def log_g(z):
    time.sleep(0.3 * (z.requires_grad and Path("slow").exists()))
    return z
"""
SLOWLY = (*TINY, "--trainer.max_epochs=3", "--last_checkpoint.every_n_steps=1")
FAILS = """
def log_g(z):
    if z.requires_grad:
        raise ArithmeticError("on purpose")
    return z
"""


def test_each_arm_chooses_among_the_same_values_by_validation(store, capsys):
    command = ["compare", *TINY, "--activations", "sigsoftmax", "--seeds", "0", "1", "--study", "tuned", "--workers=2"]
    command += ["--vary", "model.backbone.hidden_size", "4", "8", "--tune", "optimizer.lr", "1e-7", "0.05"]
    main(command)
    runs = store.runs("tags.kind = 'fit'")
    arms = {"sigsoftmax x1 hidden_size=4", "sigsoftmax x1 hidden_size=8"}
    assert {run.data.tags["arm"] for run in runs} == arms
    assert {run.data.tags["baseline"] for run in runs} == {"sigsoftmax x1 hidden_size=4"}
    lost = [run for run in runs if run.data.tags.get("role") == "tuning"]
    kept = [run for run in runs if "role" not in run.data.tags]
    assert {(run.data.tags["arm"], run.data.tags["seed"]) for run in lost} == {(arm, "0") for arm in arms}
    assert {(run.data.tags["arm"], run.data.tags["seed"]) for run in kept} == {(arm, s) for arm in arms for s in "01"}
    assert len(lost) == 2
    assert len(kept) == 4
    for run in kept:
        (other,) = [one for one in lost if one.data.tags["arm"] == run.data.tags["arm"]]
        assert run.data.params["optimizer.lr"] != other.data.params["optimizer.lr"]
        if run.data.tags["seed"] == "0":
            assert run.data.metrics["val/best_perplexity"] < other.data.metrics["val/best_perplexity"]
    out = capsys.readouterr().out
    assert "sigsoftmax x1 hidden_size=8: optimizer.lr=0.05 chosen by validation" in out
    assert "sigsoftmax x1 hidden_size=8 chose optimizer.lr=0.05 by validation perplexity" in " ".join(out.split())
    main([*command, "--dry_run"])
    assert capsys.readouterr().out.endswith("6 runs, 0 of them to train\n")
    wider = [*command, "1e-8"]  # of every arm one run more, and the choice as before
    main([*wider, "--dry_run"])
    assert "8 runs, 4 of them to train" in capsys.readouterr().out
    main(wider)
    runs = store.runs("tags.kind = 'fit'")
    assert len(runs) == 8
    assert {run.data.tags["tune"] for run in runs} == {'{"optimizer.lr": ["0.05", "1e-7", "1e-8"]}'}
    assert sum("role" not in run.data.tags for run in runs) == 4


def test_to_do_without_a_key_can_be_chosen(store, capsys):
    """A value of null leaves no parameter behind."""
    command = ["compare", *TINY, "--activations", "softmax", "--seeds", "0", "--study", "tuned"]
    main([*command, "--tune", "trainer.gradient_clip_val", "null", "1e-9"])
    won, lost = sorted(store.runs("tags.kind = 'fit'"), key=lambda run: run.data.metrics["val/best_perplexity"])
    assert "trainer.gradient_clip_val" not in won.data.params
    assert "role" not in won.data.tags
    assert lost.data.tags["role"] == "tuning"
    out = capsys.readouterr().out
    assert f"{won.data.metrics['test/perplexity']:.2f}" in out
    assert "softmax x1 chose trainer.gradient_clip_val=null by validation" in " ".join(out.split())


def test_a_dry_run_shows_the_plan_and_makes_no_store(store, capsys):
    (store.folder / "mlruns" / "mlflow.db").unlink()
    arguments = ["--seeds", "0..2", "--tune", "optimizer.lr", "0.1", "0.2", "0.3", "--n_experts", "1", "2"]
    main(["compare", *TINY, "--activations", "softmax", *arguments, "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "softmax x1 lr=0.1 seed 0: to be trained"
    assert lines[-3:] == [
        "4 more, with the values that each arm chooses: its other seeds",
        "10 runs, 10 of them to train",
        "time, 1 at once: no estimate yet",
    ]
    assert not (store.folder / "mlruns" / "mlflow.db").exists()


def test_a_dry_run_estimates_each_arm_by_its_own_finished_runs(store, capsys):
    experiment = store.client.create_experiment("corpus")
    for arm, seconds in (("softmax x1", 50), ("softmax x1", 60), ("softmax x1", 70), ("softmax x4", 240)):
        tags = {"kind": "fit", "study": "timed", "arm": arm, "config_hash": "of another seed"}
        run = store.client.create_run(experiment, start_time=1000, tags=tags)
        store.client.set_terminated(run.info.run_id, end_time=1000 + 1000 * seconds)
    for further, estimate in (
        ([], "about 5.0 minutes"),
        (["relu"], "about 7.5 minutes (the mean of the others for relu x1)"),
    ):
        main(["compare", *TINY, "--study", "timed", "--dry_run", "--activations", "softmax", "softmax x4", *further])
        assert capsys.readouterr().out.splitlines()[-1] == f"time, 1 at once: {estimate}"


def wait_until(condition, seconds=120):
    for _ in range(seconds * 10):
        if found := condition():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{condition.__name__} did not come about")


def listen():
    """Answer Ctrl-C, which a shell's background commands inherit as ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
STOPPED = ["compare", *SLOWLY, "--activations", "slow.log_g", "softmax", "--study", "stopped"]


@pytest.fixture(scope="module")
def stopped(workplace):
    """For each signal, a study that got it in its first run: its store, processes, exit code and last words.

    All at the same time: most of it is the start of processes.
    """
    commands = {}
    for number in SIGNALS:
        with workplace() as store:
            Path("slow.py").write_text(SLOW)
            Path("slow").touch()
            commands[number] = (
                store,
                subprocess.Popen([*SCRIPT, *STOPPED], stderr=subprocess.PIPE, text=True, preexec_fn=listen),
            )

    def stop(number):
        store, process = commands[number]
        wait_until(lambda: list(store.folder.rglob("last.ckpt")))
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        error = process.communicate(timeout=180)[1]
        return store, family, process.returncode, error

    try:
        with ThreadPoolExecutor() as pool:
            return dict(zip(SIGNALS, pool.map(stop, SIGNALS), strict=True))
    finally:
        for _, process in commands.values():
            process.kill()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_study_that_is_stopped_leaves_no_process_and_goes_on(number, stopped, monkeypatch):
    store, family, code, error = stopped[number]
    monkeypatch.chdir(store.folder)
    monkeypatch.syspath_prepend(store.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert len(family) > 1
    wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family), 30)
    (begun,) = store.runs("tags.kind = 'fit'")
    log = store.folder / "mlruns" / "logs" / "stopped" / "slow.log_g x1 seed 0.log"
    if number == signal.SIGKILL:
        assert code == -number
    else:
        assert code == 128 + number
        assert error.splitlines()[-1].startswith("interrupted: the same command")
        assert "Traceback" not in error
        assert begun.info.status == "KILLED"
        assert "SIGTERM: stopping after this step, with a checkpoint" in log.read_text()
    Path("slow").unlink()
    main(STOPPED)
    runs = store.runs("tags.kind = 'fit'")
    assert sorted(run.data.tags["activation"] for run in runs) == ["slow.log_g", "softmax"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert begun.info.run_id in {run.info.run_id for run in runs}
    assert "Restored all states from the checkpoint" in log.read_text()


def test_a_run_that_is_stopped_from_outside_has_not_failed(store):
    Path("slow.py").write_text(SLOW)
    Path("slow").touch()
    command = [*SCRIPT, "compare", *SLOWLY, "--activations", "slow.log_g", "softmax", "--study", "outside"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: list(store.folder.rglob("last.ckpt")))
        (run,) = [one for one in psutil.Process(process.pid).children(recursive=True) if os.getsid(one.pid) == one.pid]
        Path("slow").unlink()
        run.terminate()
        error = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 1
    assert "slow.log_g x1 seed 0: stopped from outside" in error
    assert "FAILED" not in error
    assert "softmax x1 seed 0: done after" in error
    statuses = {run.data.tags["activation"]: run.info.status for run in store.runs("tags.kind = 'fit'")}
    assert statuses == {"slow.log_g": "KILLED", "softmax": "FINISHED"}


def stored_job(store, status):
    """A job of which the store has one run."""
    job = Job("a run", ("--no-such-argument",), store.uri, "shared", "abcd", store.folder / "a run.log")
    tags = {"study": job.study, "config_hash": job.config_hash, "kind": "fit"}
    run = store.client.create_run(store.client.create_experiment("corpus"), tags=tags)
    store.client.set_terminated(run.info.run_id, status)
    return job


def test_what_another_command_has_finished_is_not_trained_again(store):
    job = stored_job(store, "FINISHED")
    job()  # with these arguments, training would be an error
    assert store.run().info.status == "FINISHED"
    with pytest.raises(SystemExit):
        replace(job, config_hash="another")()


def test_a_run_that_another_process_trains_is_not_called_dead(store):
    job = stored_job(store, "RUNNING")
    with job.lock:
        close(store.client, job, "KILLED")
        assert store.run().info.status == "RUNNING"
    close(store.client, job, "KILLED")
    assert store.run().info.status == "KILLED"


def test_an_attempt_without_a_checkpoint_is_deleted_before_the_next(store):
    job = stored_job(store, "FAILED")
    with pytest.raises(SystemExit):
        job()
    assert store.runs() == []


def test_on_a_cluster_a_run_that_fails_takes_nothing_with_it(store, capsys):
    Path("fails.py").write_text(FAILS)
    arguments = ["--activations", "fails.log_g", "softmax", "--study", "cluster"]
    with pytest.raises(SystemExit) as exit_:
        main(["compare", *TINY, *arguments, "--executor", "local", "--executor_args", "timeout_min=10"])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert "fails.log_g x1 seed 0: FAILED, see " in error
    assert "ArithmeticError: on purpose" in error
    assert "softmax x1 seed 0: done after" in error
    statuses = {run.data.tags["activation"]: run.info.status for run in store.runs("tags.kind = 'fit'")}
    assert statuses == {"fails.log_g": "FAILED", "softmax": "FINISHED"}
