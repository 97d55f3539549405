"""Runs as training leaves them in a store, without the training: for the tests of what is made of them."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from lit_sigsoftmax.analysis import Spectrum
from lit_sigsoftmax.tracking import MLflowTracker

TYPES = ("<eos>", "the", "cat", "sat", "rare")
IDS = np.array([1, 2, 3, 0] * 30 + [4], np.int32)
COUNTS = np.array([500, 1500, 50, 5, 0])


def write_run(store, layer, seed, test=None, *, nll=None, spectrum=None, status="success", **given):
    """Write a run of ``layer``, as in ``softmax x1``; returns its id.

    ``test`` is its test perplexity, ``nll`` its token losses; ``given`` are more tags, and ``params`` and ``metrics``.
    """
    params, metrics = given.pop("params", {}), given.pop("metrics", {})
    arm = given.pop("arm", layer)
    activation, n_experts = layer.rsplit(" x", 1)
    tags = {"kind": "fit", "activation": activation, "n_experts": n_experts, "arm": arm, "seed": str(seed)}
    tags |= {"study": "demo", "command": "lit-sigsoftmax fit --config demo.yaml", "machine": "Linux x86_64"} | given
    tracker = MLflowTracker(store.uri, "corpus", f"{arm} seed {seed}", tags=tags, system_metrics=False)
    model = {"activation": activation, "n_experts": n_experts}
    tracker.log_hyperparams({"model": model, "corpus": {"fingerprint": "f" * 32}, "parameters": 1234, **params})
    for step, value in enumerate((120.0, 105.0, 100.0)):
        tracker.log_metrics({"val/perplexity": value + seed}, step=10 * step + 9)
    tracker.log_metrics(
        {"val/best_perplexity": 100.0 + seed, "train/tokens_per_second": 1000.0 * (seed + 1), **metrics}, 29
    )
    if test is not None:
        tracker.log_metrics({"test/perplexity": test, "test/loss": float(np.log(test))})
    client, run_id = tracker.experiment, tracker.run_id
    if nll is not None:
        with TemporaryDirectory() as folder:
            np.save(Path(folder, "test_token_nll.npy"), np.asarray(nll, np.float32))
            types = np.frombuffer("\n".join(TYPES).encode(), np.uint8)
            np.savez_compressed(Path(folder, "test_tokens.npz"), ids=IDS, types=types, counts=COUNTS)
            client.log_artifacts(run_id, folder)
    if spectrum is not None:
        values = torch.tensor(spectrum, dtype=torch.float64)
        client.log_text(run_id, Spectrum(values, len(IDS), len(TYPES), torch.float64).to_json(), "spectrum.json")
    if status != "running":
        tracker.finalize(status)
    return run_id
