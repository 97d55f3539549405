"""The loss of every test token, stored in the order of the text, whatever the streams and devices."""

import math

import numpy as np
import pytest
from cli_helpers import NO_SYSTEM_METRICS, SMALL, Store
from fork_helpers import Run

from lit_sigsoftmax.cli import main
from lit_sigsoftmax.recipes.synthetic import SyntheticLanguage

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|ModelCheckpoint|log_every_n_steps)")

ARGUMENTS = (*SMALL, NO_SYSTEM_METRICS, "--data.test_batch_size=7")  # 300 tokens: streams of 43 and 42


@pytest.fixture(scope="module")
def fitted(workplace):
    with workplace() as store:
        main(["fit", *ARGUMENTS])
        return store, store.run()


def losses(store, run):
    return np.load(store.artifact(run, "test_token_nll.npy"))


def test_the_losses_are_those_of_the_text(fitted, monkeypatch):
    store, run = fitted
    corpus = SyntheticLanguage(n_tokens=3000, vocab_size=20, rank=5).corpus
    found = losses(store, run)
    assert (found.dtype, found.shape) == (np.float32, corpus.test.shape)
    assert math.exp(found.astype(np.float64).mean()) == pytest.approx(run.data.metrics["test/perplexity"], rel=1e-6)
    with np.load(store.artifact(run, "test_tokens.npz")) as stored:
        assert np.array_equal(stored["ids"], corpus.test)
        assert bytes(stored["types"]).decode().split("\n") == list(corpus.vocabulary.tokens)
        assert np.array_equal(stored["counts"], np.bincount(corpus.train, minlength=20))
    monkeypatch.chdir(store.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    main(["predict", *ARGUMENTS, f"--ckpt_path={run.data.tags['checkpoint.best']}"])
    _, *lines = store.artifact(store.newest(), "token_log_probs.tsv").read_text().splitlines()
    assert [-float(line.split("\t")[1]) for line in lines] == pytest.approx(found.tolist(), abs=1e-5)


@pytest.mark.slow
def test_two_processes_store_the_same(fitted, tmp_path):
    """Their streams are shared out 3 : 4."""
    store, run = fitted
    checkpoint = f"--ckpt_path={run.data.tags['checkpoint.best']}"
    processes = Run(["test", *ARGUMENTS, checkpoint, "--trainer.accelerator=cpu"], tmp_path, 2)
    assert processes.wait() == [0, 0], processes.output
    pair = Store(tmp_path)
    np.testing.assert_allclose(losses(pair, pair.run()), losses(store, run), rtol=1e-5)
