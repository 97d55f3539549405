"""What goes wrong in a training step is said with the remedy, and harms nothing that was good."""

import math
from signal import SIGKILL, SIGTERM

import pytest
import torch
from cli_helpers import NO_SYSTEM_METRICS, SMALL, Store
from fork_helpers import Run
from lightning.pytorch import Trainer
from torch import nn

from lit_sigsoftmax import LanguageModel
from lit_sigsoftmax.backbones import RecurrentBackbone
from lit_sigsoftmax.callbacks import LastCheckpoint
from lit_sigsoftmax.data import Corpus, CorpusDataModule
from lit_sigsoftmax.faults import LossMemoryError, NonFiniteLossError

pytestmark = pytest.mark.filterwarnings("ignore:.*(LeafSpec|log_every_n_steps|many workers|not empty)")
WORDS = ["<eos>", "a", "b", "c"]


class Data(CorpusDataModule):
    """200 training tokens: in two streams, ten segments of ten."""

    def __init__(self):
        super().__init__(batch_size=2, eval_batch_size=1, bptt=10)

    def load_corpus(self):
        return Corpus.from_tokens("tiny", WORDS * 50, WORDS * 5, WORDS * 5)


class Faulty(LanguageModel):
    """Its loss is of a given value at one step."""

    def __init__(self, value, at=13, **options):
        super().__init__(RecurrentBackbone(len(WORDS), 4, 1), **options)
        self.value, self.at, self.losses, self.weights = value, at, [], []

    def token_nll(self, batch, stage):
        nll = super().token_nll(batch, stage)
        if stage == "train":
            self.weights.append(self.head.weight.detach().clone())
            if self.trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
                nll = nll * self.value
            self.losses.append(nll.mean().item())
        return nll


def fit(model, folder=None, epochs=2, **options):
    callbacks = [LastCheckpoint(str(folder), every_n_steps=1)] if folder else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_epochs": epochs, "callbacks": callbacks, "enable_checkpointing": bool(folder), **quiet, **options}
    trainer = Trainer(**options)
    trainer.fit(model, Data())
    return trainer


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(value, tmp_path):
    model = Faulty(value)
    with pytest.raises(NonFiniteLossError) as caught:
        fit(model, tmp_path)
    message = str(caught.value)
    assert f"the loss of step 13 is {value}: epoch 1, segment 3 of 10, tokens 30 to 39 of the 100 of every" in message
    assert "gradient_clip_val" in message
    assert torch.equal(model.head.weight, model.weights[-1])
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 13
    assert torch.equal(last["state_dict"]["head.weight"], model.head.weight)


class OwnLoss(LanguageModel):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / 0


def test_a_subclass_is_watched_too():
    with pytest.raises(NonFiniteLossError, match="step 0 is inf"):
        fit(OwnLoss(RecurrentBackbone(len(WORDS), 4, 1)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_such_a_step_can_be_skipped(accumulate):
    model = Faulty(math.nan, on_nonfinite_loss="skip")
    with pytest.warns(UserWarning, match=r"skipped: the loss of step \d+ is nan"):
        trainer = fit(model, accumulate_grad_batches=accumulate)
    begin = 13 // accumulate * accumulate
    assert torch.equal(model.weights[begin], model.weights[begin + accumulate])
    assert not torch.equal(model.weights[begin + accumulate], model.weights[begin + 2 * accumulate])
    finite = [loss for loss in model.losses[10:] if math.isfinite(loss)]
    assert len(finite) == 9
    perplexity = trainer.callback_metrics["train/perplexity"].item()
    assert perplexity == pytest.approx(math.exp(sum(finite) / 9), rel=1e-6)


class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class BadGradient(LanguageModel):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return NaNGradient.apply(loss) if self.global_step == 4 else loss


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path):
    """The loss of step 4 is finite, its gradient is not; the loss shows it a step later."""
    with (
        pytest.warns(UserWarning, match=r"weights are not finite any more: .*last\.ckpt keeps"),
        pytest.raises(NonFiniteLossError, match="step 5"),
    ):
        fit(BadGradient(RecurrentBackbone(len(WORDS), 4, 1)), tmp_path)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert all(weight.isfinite().all() for weight in last["state_dict"].values())


class Wide(nn.Module):
    """Hidden vectors of more positions than any machine has memory for the logits of, in no memory themselves."""

    hidden_size, vocab_size = 4, 2**16

    def forward(self, tokens, state=None):
        return torch.zeros(1, 1, 4).expand(2**20, 2**16, 4)


def test_memory_that_does_not_suffice_for_the_loss_names_the_remedy():
    model = LanguageModel(Wide(), tie_weights=False)
    target = torch.zeros(1, 1, dtype=torch.int64).expand(2**20, 2**16)
    with pytest.raises(LossMemoryError, match=r"over 65536 types: set model\.loss_backend to chunked, or lower data\."):
        model.token_nll((target, target), "train")


class Worse(LanguageModel):
    def training_step(self, batch, batch_idx):
        return -super().training_step(batch, batch_idx)


def test_a_perplexity_that_explodes_is_shown_as_such():
    model = Worse(RecurrentBackbone(len(WORDS), 4, 1))
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=10.0)
    with pytest.warns(UserWarning, match=r"val/perplexity is .*, far above the 4 of guessing"):
        trainer = fit(model)
    assert trainer.callback_metrics["val/perplexity"] > 1e3


HANGING = """
import os, signal, time
from lit_sigsoftmax import LanguageModel

class Slow(LanguageModel):
    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        os.kill(os.getpid(), signal.SIGNAL)
        time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code", "status"), [(SIGTERM, 128 + SIGTERM, "KILLED"), (SIGKILL, -SIGKILL, "RUNNING")]
)
def test_a_signal_during_the_test_ends_the_run_at_once(signum, code, status, tmp_path):
    """And the run goes on with its test."""
    hanging = HANGING.replace("SIGNAL", signum.name)
    (tmp_path / "slow.py").write_text(hanging)
    words = ["fit", *SMALL, NO_SYSTEM_METRICS, "--trainer.accelerator=cpu", "--model=slow.Slow"]
    run = Run(words, tmp_path)
    assert run.wait() == [code], run.output
    assert Store(tmp_path).run().info.status == status
    (tmp_path / "slow.py").write_text(hanging.replace(f"os.kill(os.getpid(), signal.{signum.name})", "return"))
    again = Run([*words, "--ckpt_path=last"], tmp_path)
    assert again.wait() == [0], again.output
    run = Store(tmp_path).run()
    assert run.info.status == "FINISHED"
    assert Store(tmp_path).steps(run, "test/loss") == [0]
    assert Store(tmp_path).steps(run, "train/loss") == list(range(5))
