import pytest
import torch
from lightning.pytorch import Trainer

from lit_sigsoftmax import LanguageModel
from lit_sigsoftmax.backbones import RecurrentBackbone
from lit_sigsoftmax.callbacks import RunCheckpoint
from lit_sigsoftmax.data import Corpus, CorpusDataModule

WORDS = ["<eos>", "a", "b", "c"]


class Data(CorpusDataModule):
    def load_corpus(self):
        return Corpus.from_tokens("tiny", WORDS * 50, WORDS * 5, WORDS * 5)


class GettingWorse(LanguageModel):
    """Its weights move away from the good ones, so that the first epoch is the best."""

    def training_step(self, batch, batch_idx):
        return -super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|log_every_n_steps|many workers)")
def test_last_is_the_last_epoch_and_best_the_best(tmp_path):
    torch.manual_seed(0)
    model = GettingWorse(RecurrentBackbone(len(WORDS), 4, 1))
    callbacks = [RunCheckpoint(str(tmp_path)), RunCheckpoint(str(tmp_path), "last", monitor=None)]
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Data(batch_size=2, eval_batch_size=1))
    steps = trainer.global_step
    kept = {path.name: torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")}
    assert kept["last.ckpt"]["global_step"] == steps
    assert kept.keys() == {"last.ckpt", f"best-step={steps // 3}.ckpt"}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in kept["last.ckpt"]["state_dict"].items())
