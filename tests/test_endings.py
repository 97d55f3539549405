"""However a run ends, the store says how: none is left RUNNING, and what is the user's mistake is one line."""

from signal import SIGINT, SIGTERM

import pytest
from cli_helpers import NO_SYSTEM_METRICS, SMALL
from fork_helpers import Run
from lightning.pytorch import Trainer

from lit_sigsoftmax import LanguageModel
from lit_sigsoftmax.backbones import RecurrentBackbone

pytestmark = pytest.mark.slow

SHORT = (*SMALL, NO_SYSTEM_METRICS, "--trainer.accelerator=cpu", "--trainer.limit_train_batches=2")
FIT = ("fit", *SHORT)
# A module of the working directory with something that happens in one of its hooks.
USERS = """
import os, sys

from lightning.pytorch import Callback
from lit_sigsoftmax import LanguageModel


class Mistake(Callback):
    def HOOK(self, *args, **kwargs):
        ACTION


class NoPrediction(LanguageModel):
    def predict_step(self, batch, batch_idx):
        return None
"""


def users(command, hook, action):
    return [*command, "--trainer.callbacks+=users.Mistake"], USERS.replace("HOOK", hook).replace("ACTION", action)


def raises(hook):
    return users(FIT, hook, "raise KeyError('a mistake')")


def gets(signum, hook):
    return users(FIT, hook, f"os.kill(os.getpid(), {int(signum)})")


# The command line with the user's module, the exit code, the status, and what the last line that is printed names.
ENDINGS = {
    "a mistake that is seen late": (([*FIT, "--data.context_min=5"], ""), 1, "FAILED", "error: data.context_min is 5"),
    "another model's weights": (([*FIT, "--ckpt_path=other.ckpt"], ""), 2, "FAILED", "error: the checkpoint is of an"),
    "an exception before training": (raises("on_fit_start"), 1, "FAILED", "KeyError: 'a mistake'"),
    "an exception in the test after it": (raises("on_test_start"), 1, "FAILED", "KeyError: 'a mistake'"),
    "an exception after the trainer": (
        (["predict", *SHORT, "--model=users.NoPrediction"], USERS.replace("ACTION", "pass")),
        1,
        "FAILED",
        "TypeError",
    ),
    "sys.exit": (users(FIT, "on_train_batch_end", "sys.exit(7)"), 7, "FAILED", ""),
    "Ctrl-C before the sanity check": (gets(SIGINT, "on_fit_start"), 130, "KILLED", ""),
    "Ctrl-C in the sanity check": (gets(SIGINT, "on_validation_batch_start"), 130, "KILLED", ""),
    "SIGTERM before the sanity check": (gets(SIGTERM, "on_fit_start"), 143, "KILLED", ""),
    "SIGTERM between training and test": (gets(SIGTERM, "on_fit_end"), 143, "KILLED", ""),
}


@pytest.mark.parametrize(("case", "code", "status", "said"), ENDINGS.values(), ids=ENDINGS)
def test_the_store_says_how_a_run_ended(case, code, status, said, store):
    words, module = case
    (store.folder / "users.py").write_text(module)
    other = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    other.strategy.connect(LanguageModel(RecurrentBackbone(vocab_size=20, hidden_size=4), vocab_size=20))
    other.save_checkpoint("other.ckpt")
    run = Run(words, store.folder)
    assert run.wait() == [code], run.output
    assert store.run().info.status == status, run.output
    assert said in run.output.splitlines()[-1]
    assert ("Traceback" in run.output) == ("Error" in said)
