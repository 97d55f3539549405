import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import NO_SYSTEM_METRICS, SMALL, Store
from lightning.pytorch import Trainer

from lit_sigsoftmax import LanguageModel
from lit_sigsoftmax.backbones import RecurrentBackbone
from lit_sigsoftmax.callbacks import LastCheckpoint, RunCheckpoint
from lit_sigsoftmax.checkpoints import CheckpointError, CheckpointFiles, CheckpointWriteError, previous_path, verify
from lit_sigsoftmax.cli import main
from lit_sigsoftmax.data import Corpus, CorpusDataModule
from lit_sigsoftmax.journal import Journal
from lit_sigsoftmax.spool import sync

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
    callbacks = [RunCheckpoint(str(tmp_path)), LastCheckpoint(str(tmp_path))]
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
    assert kept.keys() == {"last.ckpt", "last-previous.ckpt", f"best-step={steps // 3}.ckpt"}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in kept["last.ckpt"]["state_dict"].items())


CONTENT = {"weights": torch.arange(3000.0), "step": 3}


@pytest.fixture
def file(tmp_path):
    """A checkpoint file."""
    CheckpointFiles().save_checkpoint(CONTENT, tmp_path / "some" / "last.ckpt")
    return tmp_path / "some" / "last.ckpt"


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "cut short":
        path.write_bytes(data[:-500])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "another kind of file":
        path.write_text("weights: none")
    else:  # torch reads the wrong weights without a word
        data[3000] ^= 1
        path.write_bytes(data)
        assert not torch.equal(torch.load(path, weights_only=True)["weights"], CONTENT["weights"])


DAMAGES = ("cut short", "empty", "another kind of file", "one bit")


def test_a_file_comes_back_and_leaves_nothing_beside_it(file):
    assert torch.equal(CheckpointFiles().load_checkpoint(file)["weights"], CONTENT["weights"])
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named(kind, file):
    damage(file, kind)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))} cannot be read as a checkpoint"):
        CheckpointFiles().load_checkpoint(file)


def test_a_bit_that_is_flipped_in_the_directory_of_the_archive_is_damage_or_nothing(file):
    """There it may ask for another compression, a password or a place before the file."""
    data, refused = file.read_bytes(), 0
    for position in range(data.index(b"PK\x01\x02") * 8, len(data) * 8):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        try:
            verify(file)
        except CheckpointError:
            refused += 1
    assert refused > 1000


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_a_file_that_tries_to_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Attack()}, "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt is refused"):
        CheckpointFiles().load_checkpoint("bad.ckpt")
    assert not Path("attacked").exists()


def test_a_full_disk_keeps_the_old_file(file):
    """The kernel lets no file grow beyond 5,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(CheckpointWriteError, match=r"last\.ckpt could not be written: .*File too large.*make room"):
            CheckpointFiles().save_checkpoint({"weights": torch.zeros(9000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert CheckpointFiles().load_checkpoint(file)["step"] == 3
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


LOGGER = "--trainer.logger.init_args"
FIT = ("fit", *SMALL, NO_SYSTEM_METRICS, "--trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def interrupted(workplace):
    """A store with a run of two epochs that a mistake ended in the second, and its id."""
    with workplace() as store:
        Path("broken.py").write_text(BROKEN)
        with pytest.raises(KeyError, match="the second epoch"):
            main([*FIT, "--trainer.max_epochs=2", "--model=broken.Broken", "--last_checkpoint.every_n_steps=1"])
        return store, store.run().info.run_id


BROKEN = """
from pathlib import Path

from lit_sigsoftmax import LanguageModel

class Broken(LanguageModel):
    def training_step(self, batch, batch_idx):
        if self.global_step == 7 and not Path("mended").exists():
            raise KeyError("the second epoch")
        return super().training_step(batch, batch_idx)
"""
AGAIN = (*FIT, "--trainer.max_epochs=2", "--model=broken.Broken", "--last_checkpoint.every_n_steps=1")


@pytest.fixture
def place(interrupted, tmp_path, monkeypatch, empty_store):
    """A copy of that store, in which the mistake is mended, and the run's folder of checkpoints."""
    store, run_id = interrupted
    shutil.copytree(store.folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.syspath_prepend(tmp_path / "copy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/copy/mlruns/mlflow.db")
    Path("mended").touch()
    return Store(tmp_path / "copy"), Path("mlruns", "checkpoints", run_id)


def test_a_failed_run_goes_on_where_it_was(place):
    """With ``last.ckpt`` of step 7, which stays as the one before until the end."""
    store, folder = place
    assert store.run().info.status == "FAILED"
    main([*AGAIN[:-1], "--ckpt_path=last"])
    assert torch.load(previous_path(folder / "last.ckpt"), weights_only=True)["global_step"] == 7
    run = store.run()
    assert run.info.status == "FINISHED"
    assert store.steps(run, "train/loss") == list(range(10))
    assert store.steps(run, "val/loss") == [4, 9]


def test_a_run_that_is_named_goes_on_by_itself(place):
    store, folder = place
    main([*AGAIN, f"--trainer.logger.init_args.run_id={folder.name}"])
    assert store.run().info.status == "FINISHED"
    assert store.steps(store.run(), "train/loss") == list(range(10))


def test_a_folder_that_is_named_goes_on_by_itself(place):
    store, folder = place
    main([*AGAIN, f"--checkpoint.dirpath={folder}"])
    assert store.steps(store.run(), "train/loss") == list(range(10))


def test_without_being_asked_a_new_run_starts(place):
    store, _ = place
    main(AGAIN)
    assert sorted(run.info.status for run in store.runs()) == ["FAILED", "FINISHED"]


@pytest.mark.parametrize("kind", [*DAMAGES, "missing"])
def test_the_checkpoint_before_stands_in_for_a_damaged_one(kind, place):
    store, folder = place
    if kind == "missing":
        (folder / "last.ckpt").unlink()
    else:
        damage(folder / "last.ckpt", kind) if kind != "one bit" else flip_a_bit(folder / "last.ckpt")
    with pytest.warns(UserWarning, match=r"going on from the one before it, last-previous\.ckpt"):
        main([*AGAIN, "--ckpt_path=last"])
    assert store.steps(store.run(), "train/loss") == list(range(10))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_file_that_tries_to_run_code_is_stood_in_for(place):
    store, folder = place
    torch.save({"weights": Attack()}, folder / "last.ckpt")
    with pytest.warns(UserWarning, match=r"is refused, it holds more.*the one before it, last-previous\.ckpt"):
        main([*AGAIN, "--ckpt_path=last"])
    assert not Path("attacked").exists()
    assert store.steps(store.run(), "train/loss") == list(range(10))


@pytest.mark.parametrize("content", [{"weights": Attack()}, [1, 2], b"PK"], ids=["code", "a list", "no archive"])
def test_a_foreign_folder_does_not_keep_a_run_from_going_on(content, place):
    store, folder = place
    foreign = folder.with_name("foreign")
    foreign.mkdir()
    torch.save(content, foreign / "last.ckpt")
    with pytest.warns(UserWarning, match=r"left out: .*foreign.last\.ckpt"):
        main([*AGAIN, "--ckpt_path=last"])
    assert store.steps(store.run(), "train/loss") == list(range(10))


def test_a_moved_folder_keeps_its_best_checkpoint(place):
    """The mistake came after the validation that made it."""
    _, folder = place
    moved = folder.rename(folder.with_name("moved")).resolve()
    main([*AGAIN, f"--checkpoint.dirpath={moved}"])
    state = torch.load(moved / "last.ckpt", weights_only=True)["callbacks"]
    (best,) = [state for name, state in state.items() if name.startswith("RunCheckpoint")]
    (kept,) = moved.glob("best-*.ckpt")
    assert list(best["best_k_models"]) == [best["best_model_path"]] == [str(kept)]


def test_a_store_that_is_away_is_no_finished_run(place, capsys, monkeypatch):
    monkeypatch.setattr("lit_sigsoftmax.tracking._PATIENCE", 0.1)
    store, _ = place
    away = [*AGAIN, "--ckpt_path=last", f"{LOGGER}.tracking_uri=http://127.0.0.1:9"]
    assert "which runs have finished (Connection refused): start it" in refuse(away, capsys)
    main([*away, f"{LOGGER}.on_outage=spool"])
    main([*AGAIN, "--ckpt_path=last"])  # what was spooled is sent
    assert store.steps(store.run(), "train/loss") == list(range(10))


@pytest.mark.parametrize("told", [True, False], ids=["told of the run", "not told"])
def test_a_run_begun_without_the_store_goes_on_once_it_is_back(told, place, tmp_path, empty_store, monkeypatch):
    shutil.rmtree("mlruns")
    Path("mended").unlink()
    spooled = [f"{LOGGER}.tracking_uri=http://127.0.0.1:9", f"{LOGGER}.on_outage=spool"]
    monkeypatch.setattr("lit_sigsoftmax.tracking._PATIENCE", 0.1)
    with pytest.raises(KeyError):
        main([*AGAIN, *spooled])
    Path("mended").touch()
    (spool,) = Path("mlruns", "spool").iterdir()
    back = Store(tmp_path / "copy")
    shutil.copy(empty_store, "mlruns/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", back.uri)
    header = json.loads((spool / "run.json").read_text())
    (spool / "run.json").write_text(json.dumps({**header, "tracking_uri": back.uri}))
    if told:
        assert sync(back.uri) == 1
    main([*AGAIN, "--ckpt_path=last"])
    run = back.run()
    assert (run.info.status, run.data.tags["local_id"]) == ("FINISHED", spool.name)
    assert back.steps(run, "train/loss") == list(range(10))
    assert not spool.exists()


def test_what_was_logged_is_on_the_disk_before_the_checkpoint(store, monkeypatch):
    order = []
    for cls, name in ((Journal, "save"), (CheckpointFiles, "save_checkpoint")):
        method = getattr(cls, name)

        def noted(*args, method=method, name=name, **kwargs):
            order.append(name)
            method(*args, **kwargs)

        monkeypatch.setattr(cls, name, noted)
    main([*FIT, "--last_checkpoint.every_n_steps=1"])
    last = [i for i, name in enumerate(order) if name == "save"]
    assert len(last) >= 5
    assert {order[i + 1] for i in last} == {"save_checkpoint"}


def refuse(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return error


def test_two_damaged_checkpoints_are_named(place, capsys):
    _, folder = place
    for path in (folder / "last.ckpt", previous_path(folder / "last.ckpt")):
        damage(path, "cut short")
    error = refuse([*AGAIN, "--ckpt_path=last"], capsys)
    assert "last.ckpt cannot be read" in error
    assert "last-previous.ckpt cannot be read" in error


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model.n_experts", 4, "model.init_args.n_experts is 1, here 4"),
        ("data.batch_size", 10, "data.init_args.batch_size is 20, here 10"),
        ("seed_everything", 5, "seed_everything is 0, here 5"),
    ],
)
@pytest.mark.parametrize("how", ["last", "run", "folder"])
def test_another_configuration_is_named(how, key, value, named, place, capsys):
    _, folder = place
    asked = {"run": f"--trainer.logger.init_args.run_id={folder.name}", "folder": f"--checkpoint.dirpath={folder}"}
    error = refuse([*AGAIN, asked.get(how, "--ckpt_path=last"), f"--{key}={value}"], capsys)
    assert named.replace(".init_args", "") in error.replace(".init_args", "")
    assert folder.name in error


def test_a_finished_run_is_not_gone_on_with(place, capsys):
    store, folder = place
    store.client.set_terminated(folder.name, "FINISHED")
    assert f"{folder.name} has finished" in refuse([*AGAIN, "--ckpt_path=last"], capsys)


def test_a_run_under_way_is_left_alone(place, capsys):
    from lit_sigsoftmax.resume import run_lock

    _, folder = place
    with run_lock(folder).acquire():
        assert f"{folder.name} is still running" in refuse([*AGAIN, "--ckpt_path=last"], capsys)
        error = refuse([*AGAIN, f"--trainer.logger.init_args.run_id={folder.name}"], capsys)
        assert f"another process is training in {folder.resolve()}" in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data.vocab_size=21", "--data.rank=5"], "vocab_size 20, here 21"),
        (["--model.activation=sigmoid"], "'softmax', here 'sigmoid'"),
        (["--model.n_experts=2"], "n_experts 1, here 2"),
        (["--model.backbone.num_layers=2"], "layers.1.weight_ih_l0"),
        (["--data.seed=3"], "another text"),
        (["--data.bptt=20"], "segments"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_the_reason(arguments, named, place, capsys):
    """Also where the path of a checkpoint is given, which starts a new run from it."""
    _, folder = place
    path = folder / "last.ckpt"
    assert named in refuse([*AGAIN, *arguments, f"--ckpt_path={path}"], capsys)


def test_a_checkpoint_of_other_words_is_refused(tmp_path):
    class Other(Data):
        def load_corpus(self):
            words = ["<eos>", "x", "y", "z"]
            return Corpus.from_tokens("others", words * 50, words * 5, words * 5)

    Other.__qualname__ = Data.__qualname__
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    model = LanguageModel(RecurrentBackbone(len(WORDS), 4, 1))
    Trainer(max_epochs=1, callbacks=[LastCheckpoint(str(tmp_path))], **quiet).fit(model, Data(batch_size=2))
    with pytest.raises(CheckpointError, match=r"another vocabulary: it was trained on 'tiny'.*of 'others' here"):
        Trainer(**quiet).test(model, Other(), ckpt_path=tmp_path / "last.ckpt")
