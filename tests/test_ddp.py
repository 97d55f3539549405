"""Two processes on gloo give the run of one: the same losses, the same perplexity, one MLflow run."""

import pytest
from cli_helpers import CPU_PAIR, NO_SYSTEM_METRICS, PYTHON_M, QUIET, SMALL, TORCHRUN, Store, run_process

from lit_sigsoftmax.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*(many workers|ModelCheckpoint)")]

N_STEPS = 10
# Three validation streams over two devices: an uneven share. Segments of 15 make ten training steps of 3,000 tokens.
FIT = ("fit", *SMALL, NO_SYSTEM_METRICS, "--data.bptt=15", "--data.eval_batch_size=3", "--model.activation=sigsoftmax")
FIT = (*FIT, "--model.n_experts=2")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The store after ``fit`` on two devices, started by the command line itself on a new store."""
    folder = tmp_path_factory.mktemp("pair")
    # With the progress bar, which reads metrics on rank 0 alone: a sum over processes there would wait for ever.
    shown = [word for word in FIT if word not in QUIET]
    done = run_process([*PYTHON_M, *shown, *CPU_PAIR], folder, timeout=200)
    assert done.returncode == 0, done.stderr
    return Store(folder), done


@pytest.fixture(scope="module")
def single(workplace):
    """The store after the same ``fit`` in one process."""
    with workplace() as store:
        main([*FIT, "--trainer.accelerator=cpu"])
    return store


def test_two_processes_are_one_run(pair):
    store, done = pair
    run = store.run()
    assert (run.info.run_name, run.info.status) == ("sigsoftmax x2 seed 0", "FINISHED")
    assert "Starting with 2 processes" in done.stderr + done.stdout
    assert "train/loss:" in done.stdout
    assert "sync_dist" not in done.stderr
    assert done.stdout.count("Run 'sigsoftmax x2 seed 0'") == 1
    assert run.data.params["trainer.devices"] == "2"
    assert {path.name for path in (store.folder / "mlruns" / "checkpoints").iterdir()} == {run.info.run_id}
    assert {path.name for path in store.folder.iterdir()} == {"mlruns"}


def test_the_losses_of_two_processes_are_those_of_one(pair, single):
    store, one, two = pair[0], single.run(), pair[0].run()
    assert store.steps(two, "train/loss") == list(range(N_STEPS))
    assert store.history(two, "train/loss") == pytest.approx(single.history(one, "train/loss"), rel=1e-4)
    assert store.history(two, "train/loss")[-1] < 0.98 * store.history(two, "train/loss")[0]
    for name in (
        "train/perplexity",
        "val/loss",
        "val/perplexity",
        "val/best_perplexity",
        "test/loss",
        "test/perplexity",
    ):
        assert two.data.metrics[name] == pytest.approx(one.data.metrics[name], rel=1e-4), name


def test_evaluation_on_two_processes_is_exact(pair, single, monkeypatch):
    """One process finds in the checkpoint of two what those found, to the last digits that sums of float64 leave."""
    two = pair[0].run()
    monkeypatch.chdir(single.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", single.uri)
    checkpoint = f"--ckpt_path={two.data.tags['checkpoint.best']}"
    main(["validate", *FIT[1:], checkpoint])
    assert single.newest().data.metrics["val/loss"] == pytest.approx(two.data.metrics["val/loss"], rel=1e-6)
    main(["test", *FIT[1:], checkpoint])
    assert single.newest().data.metrics["test/loss"] == pytest.approx(two.data.metrics["test/loss"], rel=1e-6)


def test_torchrun_on_a_new_store(pair, single, monkeypatch, tmp_path):
    """Both processes start at once, where no store is yet; 7 test streams are shared out 3 : 4."""
    checkpoint = f"--ckpt_path={pair[0].run().data.tags['checkpoint.last']}"
    arguments = ["test", *FIT[1:], checkpoint, "--data.test_batch_size=7"]
    torchrun = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "-m", "lit_sigsoftmax"]
    done = run_process([*torchrun, *arguments, *CPU_PAIR], tmp_path)
    assert done.returncode == 0, done.stderr
    found = Store(tmp_path).run()
    assert (found.info.run_name, found.info.status) == ("sigsoftmax x2 seed 0", "FINISHED")
    monkeypatch.chdir(single.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", single.uri)
    main(arguments)
    assert found.data.metrics["test/loss"] == pytest.approx(single.newest().data.metrics["test/loss"], rel=1e-6)
