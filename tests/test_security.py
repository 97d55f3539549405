"""What comes from outside is data: it runs nothing, and reaches nothing that it should not."""

import html
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from cli_helpers import NO_SYSTEM_METRICS, QUIET, SMALL, write_text_corpus

from lit_sigsoftmax import LanguageModel, tracking
from lit_sigsoftmax.backbones import RecurrentBackbone
from lit_sigsoftmax.cli import main
from lit_sigsoftmax.data.download import extract_member
from lit_sigsoftmax.journal import Journal
from lit_sigsoftmax.spool import sync
from lit_sigsoftmax.store import TrackingError
from lit_sigsoftmax.tracking import MLflowTracker


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """A path that must not come to be."""
    path = tmp_path / "sprung"
    yield Trap(path)
    assert not path.exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


# Checkpoints


@pytest.mark.parametrize("where", ["callbacks", "state_dict", "hyper_parameters", "extra"])
def test_a_checkpoint_runs_nothing(trap, where, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    backbone = RecurrentBackbone(vocab_size=20, hidden_size=8)
    checkpoint = {"state_dict": LanguageModel(backbone, vocab_size=20).state_dict(), "hyper_parameters": {}}
    checkpoint[where] = {"trap": trap}
    torch.save(checkpoint, tmp_path / "hostile.ckpt")
    with pytest.raises(SystemExit) as exit_:
        main(["test", *SMALL, "--ckpt_path=hostile.ckpt"])
    assert exit_.value.code == 2
    assert "hostile.ckpt is refused, it holds more than data" in capsys.readouterr().err
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        LanguageModel.load_from_checkpoint(tmp_path / "hostile.ckpt", backbone=backbone)


def test_a_cached_corpus_runs_nothing(trap, tmp_path, monkeypatch):
    from lit_sigsoftmax.data import TextCorpus

    monkeypatch.setenv("LIT_SIGSOFTMAX_CACHE", str(tmp_path / "cache"))
    root = str(write_text_corpus(tmp_path / "corpus"))
    first = TextCorpus(root).corpus.fingerprint
    (cached,) = (tmp_path / "cache").rglob("*.pt")
    torch.save({"tokens": trap}, cached)
    assert TextCorpus(root).corpus.fingerprint == first  # built again


# Corpora


@pytest.mark.parametrize(
    "token", ["!!python/object/apply:os.system", "{{7*7}}", "$(touch sprung)", "\x1b[2J", "../../x"]
)
def test_a_corpus_is_words(token, store, capsys):
    write_text_corpus(store.folder / "corpus")
    for split in ("train", "valid", "test"):
        with (store.folder / "corpus" / f"{split}.txt").open("a", encoding="utf-8") as file:
            file.write(f"{token} " * 30 + "\n")
    corpus = ("--data=lit_sigsoftmax.data.TextCorpus", "--data.root=corpus", "--trainer.max_epochs=1")
    main(["fit", *corpus, *QUIET, NO_SYSTEM_METRICS])
    assert "test/perplexity" in capsys.readouterr().out
    assert not (store.folder / "sprung").exists()


@pytest.mark.parametrize("member", ["../evil", "/absolute", "link"])
def test_an_archive_chooses_no_place(member, tmp_path):
    archive = tmp_path / "in" / "a.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as content:
        info = zipfile.ZipInfo(member)
        info.external_attr = (0o120777 if member == "link" else 0o100644) << 16
        content.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match=r"outside the archive|a link or a folder"):
        extract_member(archive, member, tmp_path / "in" / "out")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.suffix != ".lock") == ["a.zip", "in"]


# Configurations


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch sprung']",
        "!!python/object/new:pathlib.Path ['sprung']",
        "!!python/name:os.system",
    ],
)
def test_yaml_tags_make_no_objects(value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.yaml").write_text(f"data:\n  n_tokens: {value}\n")
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *SMALL, "--config=hostile.yaml"])
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.yaml"]


@pytest.mark.parametrize(
    ("key", "path"),
    [("model", "subprocess.Popen"), ("data", "os.system"), ("model.backbone", "pathlib.Path")],
)
def test_a_class_path_is_of_the_kind_that_the_key_takes(key, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *SMALL, f"--{key}={path}"])
    assert exit_.value.code == 2
    assert path in capsys.readouterr().err


# The tracking store


@pytest.mark.parametrize(
    "record",
    [
        {"artifact": {"file": "../../../secret", "folder": ""}},
        {"artifact": {"file": "/etc/hostname", "folder": ""}},
        {"exec": "touch sprung"},
        {"__class__": "os.system"},
        {"dataset": {"context": "train", "dataset": {"name": "n", "digest": "d", "class_path": "os.system"}}},
    ],
)
def test_a_spool_sends_its_own_files_and_runs_nothing(record, store):
    (store.folder / "secret").write_text("secret")
    run = MLflowTracker(store.uri, experiment_name="e", system_metrics=False)
    run.log_metrics({"a": 1.0}, step=0)
    run.finalize()
    header = {"tracking_uri": store.uri, "run_id": run.run_id}
    journal = Journal(store.folder / "mlruns" / "spool" / "hostile", header)
    journal.append(record)
    journal.close()
    with pytest.raises(TrackingError, match=r"does not take .*hostile"):
        sync(store.uri)
    assert store.client.list_artifacts(run.run_id) == []
    assert not (store.folder / "sprung").exists()


def test_a_spool_holds_no_password_and_is_for_its_owner(store, monkeypatch):
    monkeypatch.setattr(tracking, "_PATIENCE", 0.1)
    run = MLflowTracker("http://me:secret@127.0.0.1:9", experiment_name="e", system_metrics=False, on_outage="spool")
    run.log_metrics({"a": 1.0}, step=0)
    run.finalize()
    (spool,) = (store.folder / "mlruns" / "spool").iterdir()
    assert spool.stat().st_mode & 0o077 == 0
    assert json.loads((spool / "run.json").read_text())["tracking_uri"] == "http://me:***@127.0.0.1:9"
    assert [path for path in spool.rglob("*") if path.is_file() and b"secret" in path.read_bytes()] == []


@pytest.mark.parametrize(
    "name", ["__import__('os').system('touch sprung')", "<script>sprung()</script>", "{{ 7 * 6 }}"]
)
def test_what_a_store_says_of_a_run_is_data(name, store, trap, capsys):
    """Tags and parameters that look like code or markup go through table and page as they are."""
    run = MLflowTracker(
        store.uri,
        experiment_name="e",
        study="s",
        tags={"kind": "fit", "activation": name, "n_experts": "1", "seed": "0"},
        system_metrics=False,
    )
    run.log_hyperparams({"parameters": 3})
    run.log_metrics({"val/best_perplexity": 1.0, "test/perplexity": 2.0, "train/tokens_per_second": 3.0}, step=0)
    run.finalize()
    main(["report", "--study", "s", "--tracking_uri", store.uri])
    page = Path("mlruns", "reports", "s", "report.html").read_text()
    assert html.escape(name, quote=True).replace("&#x27;", "&#39;") in page
    assert "<script>sprung" not in page
    assert not Path("sprung").exists()
