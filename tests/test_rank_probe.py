"""The rank probe: what it logs is the rank of the test split's log-probabilities, and the test is as without it."""

import math

import pytest
import torch
from cli_helpers import NO_SYSTEM_METRICS, SMALL, Store
from fork_helpers import Run
from lightning.pytorch import LightningModule, Trainer

from lit_sigsoftmax import LanguageModel
from lit_sigsoftmax.analysis import Spectrum
from lit_sigsoftmax.backbones import RecurrentBackbone, TransformerBackbone
from lit_sigsoftmax.callbacks import RankProbe
from lit_sigsoftmax.cli import main
from lit_sigsoftmax.functional import IGNORE_INDEX
from lit_sigsoftmax.recipes.synthetic import SyntheticLanguage

pytestmark = pytest.mark.filterwarnings("ignore:.*(LeafSpec|many workers|carries no state|ModelCheckpoint)")

VOCAB, HIDDEN, N_TEST = 40, 6, 300
PROBE = "--trainer.callbacks+=lit_sigsoftmax.callbacks.RankProbe"
NAMES = ["log_prob_rank", "log_prob_rank_float32", "log_prob_rank_limit"]
NAMES += [f"effective_rank_{eps}" for eps in ("1e-3", "1e-4", "1e-5")]


def language(**streams):
    return SyntheticLanguage(vocab_size=VOCAB, rank=5, n_tokens=10 * N_TEST, **{"test_batch_size": 7, **streams})


def model(activation="softmax", n_experts=1, backbone=None, **arguments):
    torch.manual_seed(0)
    backbone = backbone or RecurrentBackbone(VOCAB, HIDDEN, num_layers=1)
    built = LanguageModel(backbone, VOCAB, activation, n_experts, **arguments)
    with torch.no_grad():
        built.backbone.embedding.weight.mul_(20)  # far from the uniform distribution, as after training
        if built.head.bias is not None:
            built.head.bias.normal_()
    return built


def run_test(built, data, probe=None):
    callbacks = [probe] if probe else []
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False, enable_checkpointing=False
    )
    (metrics,) = trainer.test(built, data, verbose=False)
    return metrics


def test_log_probs(built, data):
    """The whole matrix in float64, rows in the order of the evaluation."""
    state, rows = None, []
    double = model(built.head.activation_spec, built.head.n_experts).head.double()
    double.load_state_dict(built.head.state_dict())
    with torch.no_grad():
        for tokens, target in data.test_dataloader():
            hidden, state = built.eval()(tokens, state)
            rows.append(double.log_prob(hidden.double())[target != IGNORE_INDEX])
    return torch.cat(rows)


test_log_probs.__test__ = False


def expected(matrix):
    """The metrics, from a dense SVD."""
    values, (n_rows, n_columns) = torch.linalg.svdvals(matrix), matrix.shape
    unit = 0.5 * math.sqrt(n_rows + n_columns + 1) * values[0]
    ranks = [int((values > unit * eps).sum()) for eps in (2**-52, 2**-23)] + [min(n_rows, n_columns)]
    held = values.square().cumsum(0) / values.square().sum()
    return [*ranks, *(1 + int((held >= 1 - eps).nonzero()[0]) for eps in (1e-3, 1e-4, 1e-5))]


def ranks(metrics):
    return [metrics[f"test/{name}"] for name in NAMES]


@pytest.mark.parametrize(("activation", "n_experts"), [("softmax", 1), ("sigsoftmax", 1), ("softmax", 3)])
def test_it_logs_the_ranks_of_the_test_split(activation, n_experts):
    """An LSTM carries its state over 7 streams of 42 or 43 tokens: some positions are only padding."""
    built, data = model(activation, n_experts), language()
    metrics = run_test(built, data, RankProbe())
    matrix = test_log_probs(built, data)
    assert len(matrix) == N_TEST
    assert ranks(metrics) == expected(matrix)
    assert (metrics["test/log_prob_rank"] == HIDDEN + 2) == ((activation, n_experts) == ("softmax", 1))
    assert metrics["test/log_prob_rank"] > HIDDEN + 1


def test_without_a_bias_softmax_has_the_rank_of_the_papers():
    assert run_test(model(bias=False), language(), RankProbe())["test/log_prob_rank"] == HIDDEN + 1


def test_half_precision_is_not_counted_as_rank():
    probe, data = RankProbe(), language()
    trainer = Trainer(accelerator="cpu", precision="bf16-true", logger=False, callbacks=[probe])
    trainer.test(model(), data, verbose=False)
    assert probe.spectrum.dtype == torch.float64
    assert probe.spectrum.log_prob_rank() == HIDDEN + 2


def test_overlapping_windows_count_each_token_once():
    backbone = TransformerBackbone(VOCAB, HIDDEN, num_layers=1, num_heads=1)
    probe = RankProbe(max_tokens=None)
    run_test(model(backbone=backbone), language(bptt=10, context_min=20), probe)
    assert probe.spectrum.n_rows == N_TEST


def test_the_contexts_taken_are_spread_evenly():
    built, data, probe = model("sigsoftmax"), language(test_batch_size=1), RankProbe(max_tokens=30)
    metrics = run_test(built, data, probe)
    matrix = test_log_probs(built, data)[[round(i * (N_TEST - 1) / 29) for i in range(30)]]
    assert ranks(metrics) == expected(matrix)
    assert (probe.spectrum.n_rows, metrics["test/log_prob_rank_limit"]) == (30, 30)
    assert torch.allclose(probe.spectrum.singular_values, torch.linalg.svdvals(matrix), rtol=1e-9)


def test_the_test_is_as_without_it():
    data, built = language(), model("sigsoftmax", 2)
    plain = run_test(built, data)
    weights, generator = {k: v.clone() for k, v in built.state_dict().items()}, torch.get_rng_state()
    probe = RankProbe()
    probed = run_test(built, data, probe)
    assert {name: probed[name] for name in plain} == plain
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, weights[key]) for key, value in built.state_dict().items())
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    assert not built._forward_hooks
    assert ranks(run_test(built, data, probe)) == ranks(probed)  # the next test starts afresh


# In a run


@pytest.fixture(scope="module")
def fit(workplace):
    """The store after a ``fit``, which ends with the test of its best checkpoint."""
    with workplace() as store:
        main(["fit", *SMALL, NO_SYSTEM_METRICS, PROBE, "--trainer.callbacks.max_tokens=200"])
    return store


def test_a_run_gets_the_metrics_at_step_zero_and_the_spectrum(fit):
    run = fit.run()
    assert {f"test/{name}" for name in NAMES} <= set(run.data.metrics)
    for name in NAMES:
        assert fit.steps(run, f"test/{name}") == [0]
    count, _, limit, *_ = ranks(run.data.metrics)
    assert (count, limit) == (10, 20)  # 8 hidden units and a bias, 20 types
    found = Spectrum.from_json(fit.artifact(run, "spectrum.json").read_text())
    assert (found.n_rows, found.n_columns, found.dtype) == (200, 20, torch.float64)
    assert found.log_prob_rank() == run.data.metrics["test/log_prob_rank"]
    assert fit.artifact(run, "spectrum.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_processes_find_what_one_finds(fit, tmp_path):
    """Three test streams are shared out 1 : 2."""
    arguments = ["test", *SMALL, NO_SYSTEM_METRICS, "--data.test_batch_size=3", PROBE]
    arguments.append(f"--ckpt_path={fit.run().data.tags['checkpoint.best']}")
    arguments.append("--trainer.accelerator=cpu")
    processes = Run(arguments, tmp_path, 2)
    assert processes.wait() == [0, 0], processes.output
    pair = Store(tmp_path).run()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(fit.folder)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", fit.uri)
        main(arguments)
    single = fit.newest()
    assert single.data.params["data.test_batch_size"] == "3"
    assert ranks(pair.data.metrics) == ranks(single.data.metrics)
    assert pair.data.metrics["test/loss"] == pytest.approx(single.data.metrics["test/loss"], rel=1e-6)
    one, two = (
        Spectrum.from_json(store.artifact(run, "spectrum.json").read_text())
        for store, run in ((fit, single), (Store(tmp_path), pair))
    )
    assert one.n_rows == two.n_rows == N_TEST
    assert torch.allclose(one.singular_values[:8], two.singular_values[:8], rtol=1e-5)


# What it cannot measure


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_it_needs_a_context(max_tokens):
    with pytest.raises(ValueError, match=f"max_tokens is at least 1, or null for all, not {max_tokens}"):
        RankProbe(max_tokens)


class NoCall(LanguageModel):
    """Its test step does not call the model."""

    def test_step(self, batch, batch_idx):
        pass


class Other(LightningModule):
    def test_step(self, batch, batch_idx):
        pass


def test_what_has_no_head_or_hidden_vectors_is_an_error():
    with pytest.raises(TypeError, match=r"RankProbe needs a LanguageModel, .* not Other"):
        run_test(Other(), language(), RankProbe())
    built = NoCall(RecurrentBackbone(VOCAB, HIDDEN), VOCAB)
    with pytest.raises(RuntimeError, match="the model gave None: test_step is to call"):
        run_test(built, language(), RankProbe())
    assert not built._forward_hooks
