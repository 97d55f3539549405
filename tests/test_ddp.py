"""Several processes on gloo give the run of one: the same losses, the same perplexity, one MLflow run."""

import subprocess
import sys
from functools import cache
from signal import SIGKILL

import pytest
from cli_helpers import CPU_PAIR, NO_SYSTEM_METRICS, PYTHON_M, QUIET, SMALL, TORCHRUN, Store, run_process
from fork_helpers import AtCall, Run, free_port

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*(many workers|ModelCheckpoint)")]

N_STEPS = 50
# Segments of 3 make 50 training steps of 3,000 tokens. Three validation streams and one test stream are uneven shares.
FIT = ("fit", *SMALL, NO_SYSTEM_METRICS, "--trainer.accelerator=cpu", "--data.bptt=3", "--data.eval_batch_size=3")
FIT = (*FIT, "--data.test_batch_size=1", "--model.activation=sigsoftmax", "--model.n_experts=2")
VARIANTS = {
    "float32": (),
    "bfloat16": ("--trainer.precision=bf16-mixed",),
    "accumulation": ("--trainer.accumulate_grad_batches=4",),
}
METRICS = ("val/loss", "val/perplexity", "val/best_perplexity", "test/loss", "test/perplexity")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The store after ``fit`` on two devices, started by the command line itself on a new store."""
    folder = tmp_path_factory.mktemp("pair")
    # With the progress bar, which reads metrics on rank 0 alone: a sum over processes there would wait for ever.
    shown = [word for word in FIT if word not in QUIET]
    done = run_process([*PYTHON_M, *shown, *CPU_PAIR], folder, timeout=200)
    assert done.returncode == 0, done.stderr
    return Store(folder), done


def test_the_command_line_starts_two_processes_as_one_run(pair):
    store, done = pair
    run = store.run()
    assert (run.info.run_name, run.info.status) == ("sigsoftmax x2 seed 0", "FINISHED")
    assert "Starting with 2 processes" in done.stderr + done.stdout
    assert "train/loss=" in done.stdout + done.stderr  # the bar, which reads metrics on rank 0 alone
    assert "sync_dist" not in done.stderr
    assert done.stdout.count("Run 'sigsoftmax x2 seed 0'") == 1
    assert run.data.params["trainer.devices"] == "2"
    assert {path.name for path in (store.folder / "mlruns" / "checkpoints").iterdir()} == {run.info.run_id}
    assert {path.name for path in store.folder.iterdir()} == {"mlruns"}


def fitted(folder, processes, variant):
    run = Run([*FIT, *VARIANTS[variant]], folder, processes)
    assert run.wait() == [0] * processes, run.output
    return Store(folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The store after ``fit`` of a variant in one process."""
    return cache(lambda variant: fitted(tmp_path_factory.mktemp("single"), 1, variant))


@pytest.mark.parametrize(
    ("variant", "processes"), [("float32", 2), ("float32", 4), ("bfloat16", 2), ("accumulation", 4)]
)
def test_the_losses_of_several_processes_are_those_of_one(variant, processes, single, tmp_path):
    one = single(variant)
    several = fitted(tmp_path, processes, variant)
    losses, expected = (store.history(store.run(), "train/loss") for store in (several, one))
    deviation = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    print(f"{variant}, {processes} processes: losses of {len(losses)} steps differ by {deviation:.1e} at the most")
    assert len(losses) == (13 if variant == "accumulation" else N_STEPS)
    assert losses[-1] < 0.95 * losses[0]
    # bfloat16 has 8 bits: a rounding that falls otherwise is worth more than that of any sum
    tolerance = 1e-3 if variant == "bfloat16" else 1e-5
    assert deviation <= tolerance
    for name in METRICS:
        assert several.run().data.metrics[name] == pytest.approx(one.run().data.metrics[name], rel=tolerance), name


@pytest.mark.parametrize("processes", [2, 4])
def test_evaluation_on_several_processes_is_exact(processes, single, tmp_path):
    """The same checkpoint, to the last digits that sums of float64 leave: 3 streams, and 1, on 2 and 4 processes."""
    one = single("float32")
    checkpoint = f"--ckpt_path={one.run().data.tags['checkpoint.best']}"
    run = Run(["test", *FIT[1:], checkpoint], tmp_path, processes)
    assert run.wait() == [0] * processes, run.output
    found, expected = (store.run().data.metrics["test/loss"] for store in (Store(tmp_path), one))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_when_a_process_dies_the_others_stop_and_name_it(rank, tmp_path):
    run = Run(FIT, tmp_path, 4, AtCall(20_000, SIGKILL), rank)
    codes = run.wait(timeout=120)
    assert codes[rank] == -SIGKILL
    assert all(code == 1 for i, code in enumerate(codes) if i != rank)
    assert f"rank {rank} (process {run.children[rank].pid})" in run.output
    assert "--ckpt_path last continues the run" in run.output


def test_two_agents_of_torchrun_are_one_run(tmp_path):
    """The documented command for two machines, both on this one; both start at once, where no store is yet."""
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    words = [*FIT, "--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    command = [*TORCHRUN, *rendezvous, "--rdzv_id=1", "-m", "lit_sigsoftmax", *words]
    other = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        done = run_process(command, tmp_path, timeout=200)
        assert done.returncode == 0, done.stderr
        assert other.wait(60) == 0
    finally:
        other.kill()
    run = Store(tmp_path).run()
    assert run.info.status == "FINISHED"
    assert Store(tmp_path).steps(run, "train/loss") == list(range(N_STEPS))


WITH_THREADS_AT_EXIT = """
import atexit, contextlib, pathlib, sys, time

def show():
    time.sleep(1)  # a thread that has been waited for may still be listed
    names = []
    for path in pathlib.Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):
            names.append(path.read_text().strip())
    print("threads at exit:", *names)

atexit.register(show)
from lit_sigsoftmax.cli import main
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the threads' names are those of /proc")
def test_no_thread_of_the_group_outlives_the_work(tmp_path):
    """One that met the interpreter's end would abort the process, after a whole run."""
    words = [*FIT, "--trainer.devices=1", "--trainer.strategy=ddp", "--trainer.limit_train_batches=5"]
    done = run_process([sys.executable, "-c", WITH_THREADS_AT_EXIT, *words], tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "distributed_backend=gloo" in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("threads at exit:")]
    assert "python" in line
    assert "gloo" not in line
