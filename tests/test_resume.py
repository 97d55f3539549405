"""A training that was interrupted, again and again and by whatever, ends as one that never was: bit for bit."""

import random
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
import torch
from cli_helpers import NO_SYSTEM_METRICS, SMALL, Store
from fork_helpers import AtCall, FullDisk, Run

pytestmark = pytest.mark.slow

# 10 batches an epoch, steps of two batches, a validation after 4 and 8 batches, dropout.
FIT = (
    "fit",
    *SMALL,
    NO_SYSTEM_METRICS,
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=5",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=4",
    "--data.bptt=15",
    "--data.eval_batch_size=3",
    "--model.backbone.dropout=0.2",
    "--model.backbone.input_dropout=0.1",
    "--model.n_experts=2",
    "--model.activation=sigsoftmax",
    "--last_checkpoint.every_n_steps=1",
)
SEED = 0
OF_THE_RUN = ("best_model_path", "kth_best_model_path", "dirpath", "best_k_models", "run_id", "seconds")


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def reference(request, tmp_path_factory):
    """A run that is not interrupted, the number of its processes, and its Python calls."""
    folder = tmp_path_factory.mktemp("reference")
    run = Run(FIT, folder, request.param, AtCall(0, counted=folder / "calls"))
    assert run.wait() == [0] * request.param, run.output
    return Store(folder), request.param, int((folder / "calls").read_text())


def interruptions(calls, processes):
    """What happens to the run, to which process, and with which exit code that ends."""
    rng, step = random.Random(SEED), calls // 25
    moments = [(rng.randrange(step, 3 * step), None, 0)]  # later than the first checkpoint
    # Over the whole training, but not beyond its end: a restart takes calls too, of one process more for a step.
    moments += [(rng.randrange(1, (4 - processes) * step), None, i % processes) for i in range(15)]
    # And surely in the middle of a validation, and of the first, second and third checkpoint, which rank 0 writes.
    moments += [(rng.randrange(1, 1000), "_evaluation_step", processes - 1)]
    moments += [(rng.randrange(400 * i, 400 * i + 400), "save_checkpoint", 0) for i in range(3)]
    for call, inside, rank in moments:
        yield AtCall(call, SIGKILL, inside), rank, -SIGKILL
    yield AtCall(rng.randrange(1, step), SIGTERM), 0, 128 + SIGTERM
    yield AtCall(rng.randrange(1, step), SIGINT), 0, 128 + SIGINT
    yield AtCall(rng.randrange(1, step), error=KeyError("somebody's mistake")), 0, 1
    yield FullDisk(2), 0, 1


def test_an_interrupted_run_ends_as_one_that_never_was(reference, tmp_path):
    whole, processes, calls = reference
    words, kills, steps = list(FIT), 0, []
    for what, rank, code in interruptions(calls, processes):
        run = Run(words, tmp_path, processes, what, rank)
        codes = run.wait()
        assert codes[rank] == code, run.output
        cut = Store(tmp_path)
        assert cut.run().info.status == {130: "KILLED", 143: "KILLED", 1: "FAILED"}.get(code, cut.run().info.status)
        if processes == 2 and code < 0:
            assert codes[1 - rank] == 1
            assert f"error: rank {rank} (process {run.children[rank].pid})" in run.output
        kills += code == -SIGKILL
        steps.append(
            torch.load(*Path(tmp_path).glob("mlruns/checkpoints/*/last.ckpt"), weights_only=True)["global_step"]
        )
        words = [*FIT, "--ckpt_path=last"]
    print(f"{processes} processes, {kills} SIGKILLs, {len(steps)} interruptions; continued from the steps {steps}")
    assert kills == 20
    assert len(set(steps)) > 5  # of 25: it is the state in the middle of training that is restored
    run = Run(words, tmp_path, processes)
    assert run.wait() == [0] * processes, run.output
    assert differences(last(whole), last(cut)) == []
    assert points(whole) == points(cut)
    assert cut.run().info.status == "FINISHED"


def last(store):
    return torch.load(Path(store.run().data.tags["checkpoint.last"]), weights_only=True)


def points(store):
    """Step and value of each point of each metric; the clock's are left out."""
    run = store.run()
    keys = [key for key in run.data.metrics if key != "train/tokens_per_second"]
    history = {key: store.client.get_metric_history(run.info.run_id, key) for key in keys}
    return {key: sorted((point.step, point.value) for point in found) for key, found in history.items()}


def differences(a, b, path=""):
    """The paths of what differs, but for what belongs to the folder and to the clock."""
    if path.rpartition(".")[2] in OF_THE_RUN:
        return []
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and len(a) == len(b):
        return [found for i in range(len(a)) for found in differences(a[i], b[i], f"{path}.{i}")]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [f"{path}: {a} and {b}"]
