"""A mistake on the command line or in a file: one line that says what is wrong, exit code 2, and no run."""

import ctypes
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cli_helpers import QUIET, SMALL, write_text_corpus

from lit_sigsoftmax.cli import main
from lit_sigsoftmax.recipes.penn_treebank import datamodule as penn_treebank
from lit_sigsoftmax.recipes.wikitext2 import datamodule as wikitext2

TEXT = ("--data=lit_sigsoftmax.data.TextCorpus",)
CORPUS = (*TEXT, "--data.root=corpus")
# Not ddp: that would start this test's own process again.
STORE = "--trainer.logger.init_args.tracking_uri"
PAIR = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp_spawn")
FILES = {
    "model_key.yaml": "model:\n  class_path: lit_sigsoftmax.LanguageModel\n  init_args:\n    activatoin: softmax\n",
    "trainer_key.yaml": "trainer:\n  max_epoch: 3\n",
    "top_key.yaml": "modle:\n  n_experts: 3\n",
    "syntax.yaml": "model:\n  class_path: [\n",
    "list.yaml": "- trainer\n",
    "damaged.ckpt": "no checkpoint",
    "narrow_embedding.py": """
from torch import nn


class Narrow(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int = 8):
        super().__init__()
        self.hidden_size = hidden_size
        self.embedding = nn.Embedding(vocab_size, 4)
""",
    "empty/train.txt": "",
    "one_file/train.txt": "a b\n",
    "nul/train.txt": "a\0b\n",
    "stranger/valid.txt": "w0 stranger\n",
    "short/train.txt": "w0 w1\n",
    "short/valid.txt": "w0 w1\n",
    "short/test.txt": "w0 w1\n",
    "folder/test.txt/file": "a folder where a file should be",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    write_text_corpus(folder / "folder", test="elsewhere.txt")
    for name, content in FILES.items():
        path = folder / name
        if path.suffix == ".txt" and not path.parent.exists() and not name.startswith("one_file"):
            write_text_corpus(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    write_text_corpus(folder / "latin1")
    (folder / "latin1" / "valid.txt").write_bytes(b"a caf\xe9\n")
    write_text_corpus(folder / "corpus")
    return folder


class Answers(http.server.BaseHTTPRequestHandler):
    """What stands where an MLflow server or a corpus should be: the address says what it answers."""

    def do_GET(self):
        status, kind, body = 200, "text/html", b"<!doctype html><p>This bucket has moved"
        if "/500" in self.path or "/403" in self.path:
            status = 500 if "/500" in self.path else 403
        elif "/page" not in self.path:
            kind, body = "application/zip", b"something else"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) + 10 * ("/truncated" in self.path)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def web():
    """The address of a web server that answers everything wrongly."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


CASES = {
    # the output layer
    "activation": (["fit", *SMALL, "--model.activation=sigsofmax"], ["'sigsofmax'", "mean 'sigsoftmax'", "softmax"]),
    "activation's module": (["fit", *SMALL, "--model.activation=nowhere.f"], ["'nowhere.f'"]),
    "activation's name": (["fit", *SMALL, "--model.activation=math.sinn"], ["'math.sinn'"]),
    "n_experts of no layer": (["fit", *SMALL, "--model.n_experts=0"], ["n_experts", "at least 1", "0"]),
    # keys
    "model key": (["fit", *SMALL, "--model.activatoin=softmax"], ["'activatoin'", "mean 'activation'"]),
    "model key in a file": (["fit", *CORPUS, "--config=model_key.yaml"], ["'activatoin'", "mean 'activation'"]),
    "backbone key": (["fit", *SMALL, "--model.backbone.hiden_size=4"], ["'hiden_size'", "mean 'hidden_size'"]),
    "data key": (["fit", *SMALL, "--data.batchsize=4"], ["'batchsize'", "mean 'batch_size'"]),
    "inherited data key": (["fit", *CORPUS, "--data.btpt=4"], ["'btpt'", "mean 'bptt'"]),
    "trainer key": (["fit", *SMALL, "--trainer.max_epoxs=4"], ["trainer.max_epoxs", "mean 'trainer.max_epochs'"]),
    "trainer key in a file": (
        ["fit", *CORPUS, "--config=trainer_key.yaml"],
        ["trainer.max_epoch", "mean 'trainer.max_epochs'"],
    ),
    "top key": (["fit", *SMALL, "--modle.n_experts=3"], ["modle.n_experts"]),
    "top key in a file": (["fit", *CORPUS, "--config=top_key.yaml"], ["modle"]),
    "word": (["fit", *SMALL, "softmax"], ["softmax"]),
    # values
    "words for a number": (["fit", *SMALL, "--data.batch_size=ten"], ["batch_size", "ten"]),
    "fraction for a number": (["fit", *SMALL, "--model.n_experts=2.5"], ["n_experts", "2.5"]),
    "words for a trainer's number": (["fit", *SMALL, "--trainer.max_epochs=many"], ["trainer.max_epochs", "many"]),
    "words for a truth": (["fit", *SMALL, "--model.tie_weights=perhaps"], ["tie_weights", "perhaps"]),
    "words for a seed": (["fit", *SMALL, "--seed_everything=lucky"], ["seed_everything", "lucky"]),
    "negative batch size": (["fit", *SMALL, "--data.batch_size", "-1"], ["data.batch_size", "-1"]),
    "no streams": (["fit", *SMALL, "--data.test_batch_size=0"], ["data.test_batch_size", "0"]),
    "no segment": (["fit", *SMALL, "--data.bptt=0"], ["data.bptt", "0"]),
    "no context": (["fit", *SMALL, "--data.context_min=-5"], ["data.context_min", "-5"]),
    "no hidden vector": (["fit", *SMALL, "--model.backbone.hidden_size=0"], ["hidden_size", "0"]),
    "no layer": (["fit", *SMALL, "--model.backbone.num_layers=-2"], ["num_layers", "-2"]),
    "dropout": (["fit", *SMALL, "--model.backbone.dropout=1.5"], ["dropout", "1.5"]),
    "cell": (["fit", *SMALL, "--model.backbone.cell=lstn"], ["cell", "lstn", "lstm"]),
    "rate": (["fit", *SMALL, "--optimizer.lr=-1"], ["learning rate", "-1"]),
    "rank": (["fit", *SMALL, "--data.rank=21"], ["data.rank", "21"]),
    "heads": (
        [
            "fit",
            *CORPUS,
            "--model.backbone=lit_sigsoftmax.backbones.TransformerBackbone",
            "--model.backbone.num_heads=3",
        ],
        ["num_heads", "3"],
    ),
    # streams that the corpus cannot be cut into
    "batch size": (["fit", *CORPUS, "--data.batch_size=10000"], ["data.batch_size", "10000"]),
    "validation streams": (["fit", *CORPUS, "--data.eval_batch_size=10000"], ["data.eval_batch_size", "10000"]),
    "test streams": (["fit", *CORPUS, "--data.test_batch_size=10000"], ["data.test_batch_size", "10000"]),
    "batch size on two devices": (
        ["fit", *CORPUS, *PAIR, "--data.batch_size=21"],
        ["data.batch_size", "21", "2 devices"],
    ),
    # classes
    "data class": (["fit", "--data=nowhere.Corpus"], ["nowhere.Corpus"]),
    "model class": (["fit", *CORPUS, "--model=nowhere.Model"], ["nowhere.Model"]),
    "model of another kind": (["fit", *CORPUS, "--model=torch.nn.Linear"], ["torch.nn.Linear"]),
    "backbone class": (["fit", *CORPUS, "--model.backbone=torch.nn.Rnnn"], ["torch.nn.Rnnn"]),
    "optimizer class": (["fit", *SMALL, "--optimizer=Adammm"], ["Adammm"]),
    "strategy": (["fit", *CORPUS, "--trainer.strategy=dpp"], ["'dpp'"]),
    "accelerator": (["fit", *CORPUS, "--trainer.accelerator=gpuu"], ["'gpuu'"]),
    "devices that are not there": (
        ["fit", *CORPUS, "--trainer.accelerator=gpu", "--trainer.devices=64"],
        ["gpu"],
    ),
    "sizes of tied weights": (
        ["fit", *CORPUS, "--model.tie_weights=true", "--model.backbone=narrow_embedding.Narrow"],
        ["tied weights", "(13, 4)"],
    ),
    "devices": (["fit", *CORPUS, "--trainer.accelerator=cpu", "--trainer.devices=0"], ["devices", "0"]),
    # files
    "recipe": (
        ["fit", "--config=penn/lstm.yaml"],
        ["penn/lstm.yaml", "penn_treebank/lstm.yaml", "synthetic/lstm.yaml"],
    ),
    "recipe after a space": (["fit", "--config", "penn/lstm.yaml"], ["penn/lstm.yaml", "wikitext2/lstm.yaml"]),
    "file without suffix": (["fit", "--config=penn"], ["penn"]),
    "YAML syntax": (["fit", *CORPUS, "--config=syntax.yaml"], ["line 3"]),
    "YAML of another form": (["fit", *CORPUS, "--config=list.yaml"], ["trainer"]),
    "no data": (["fit"], ["data"]),
    "no root": (["fit", *TEXT], ["root"]),
    "corpus folder": (["fit", *TEXT, "--data.root=nowhere"], ["train.txt", "nowhere"]),
    "published corpus's folder": (
        ["fit", "--config=penn_treebank/lstm.yaml", "--data.root=nowhere"],
        ["ptb.train.txt", "nowhere"],
    ),
    "corpus file": (["fit", *TEXT, "--data.root=one_file"], ["valid.txt or test.txt", "one_file"]),
    "empty file": (["fit", *TEXT, "--data.root=empty"], ["empty/train.txt", "is empty"]),
    "binary file": (["fit", *TEXT, "--data.root=nul"], ["nul/train.txt", "NUL"]),
    "file of another encoding": (["fit", *TEXT, "--data.root=latin1"], ["latin1/valid.txt", "UTF-8"]),
    "token that training lacks": (["fit", *TEXT, "--data.root=stranger"], ["valid", "'stranger'"]),
    "corpus too short": (["fit", *TEXT, "--data.root=short"], ["3 tokens", "data.batch_size"]),
    "folder for a file": (["fit", *TEXT, "--data.root=folder"], ["test.txt", "folder"]),
    # the tracking store
    "store under a file": (
        ["fit", *SMALL, f"{STORE}=sqlite:///damaged.ckpt/mlflow.db"],
        ["damaged.ckpt", "name another"],
    ),
    "store that is no database": (["fit", *SMALL, f"{STORE}=sqlite:///damaged.ckpt"], ["damaged.ckpt", "database"]),
    "store that is a folder": (["fit", *SMALL, f"{STORE}=sqlite:///empty"], ["empty is no SQLite database"]),
    "store's address": (["fit", *SMALL, f"{STORE}=sqllite:///a.db"], ["sqllite:///a.db", "tracking_uri"]),
    "store's driver": (["fit", *SMALL, f"{STORE}=mssql+nothing://h/d"], ["mssql+nothing://h/d", "tracking_uri"]),
    "no server": (["fit", *SMALL, f"{STORE}=http://127.0.0.1:9"], ["http://127.0.0.1:9", "refused", "on_outage=spool"]),
    "no server to test": (["test", *SMALL, f"{STORE}=http://127.0.0.1:9"], ["http://127.0.0.1:9", "refused"]),
    "server's password": (["fit", *SMALL, f"{STORE}=http://me:secret@127.0.0.1:9"], ["http://me:***@127.0.0.1:9"]),
    "server that fails": (["fit", *SMALL, f"{STORE}=http://SERVER/500"], ["500", "tracking_uri", "on_outage=spool"]),
    "server that forbids": (["fit", *SMALL, f"{STORE}=http://SERVER/403"], ["403", "tracking_uri"]),
    "server of something else": (["fit", *SMALL, f"{STORE}=http://SERVER/page"], ["JSON", "tracking_uri"]),
    "on_outage": (["fit", *SMALL, "--trainer.logger.init_args.on_outage=wait"], ["on_outage", "wait", "spool"]),
    # checkpoints
    "checkpoint": (["test", *CORPUS, "--ckpt_path=gone.ckpt"], ["gone.ckpt"]),
    "checkpoint to continue": (["fit", *CORPUS, "--ckpt_path=gone.ckpt"], ["gone.ckpt"]),
    "checkpoint before there is one": (["test", *CORPUS, "--ckpt_path=last"], ["last"]),
    "best checkpoint before there is one": (["fit", *CORPUS, "--ckpt_path=best"], ["best says nothing to fit", "path"]),
    "damaged checkpoint": (["test", *CORPUS, "--ckpt_path=damaged.ckpt"], ["damaged.ckpt"]),
    # commands
    "command": (["fitt", *CORPUS], ["'fitt'", "fit"]),
    "no command": ([], ["fit", "test"]),
    "no value": (["fit", "--config"], ["--config"]),
    "prediction on two devices": (
        ["predict", *CORPUS, *PAIR],
        ["predict", "one device"],
    ),
}


@pytest.mark.parametrize(("arguments", "named"), CASES.values(), ids=CASES)
def test_a_mistake_is_one_line_and_exit_code_2_before_any_run(
    arguments, named, folder, web, tmp_path, monkeypatch, capsys
):
    arguments = [argument.replace("SERVER", web) for argument in arguments]
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LIT_SIGSOFTMAX_DATA", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, *QUIET] if arguments[1:2] not in ([], ["--config"]) else arguments)
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert [name for name in named if name not in errors[0]] == []
    assert not re.search(r"Traceback|<class 'NoneType'>|Does not validate against", "\n".join(lines))
    assert not (tmp_path / "mlruns").exists()
    assert not Path("mlruns").exists()


DOWNLOADS = {
    "truncated": "bytes: the connection broke",
    "other": "gave another file",
    "500": "HTTP Error 500",
    "403": "HTTP Error 403",
    "page": "gave a web page, not the file",
}


@pytest.mark.parametrize("recipe", [penn_treebank, wikitext2])
@pytest.mark.parametrize(("answer", "named"), DOWNLOADS.items(), ids=DOWNLOADS)
def test_a_download_that_fails_is_told_before_any_run(recipe, answer, named, web, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_SIGSOFTMAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIT_SIGSOFTMAX_DATA", raising=False)
    monkeypatch.setattr(recipe, "_SOURCES", (f"http://{web}/{answer}/", f"http://{web}/500/"))
    with pytest.raises(SystemExit) as exit_:
        main(["fit", f"--config={recipe.__name__.split('.')[-2]}/lstm.yaml", *QUIET])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("error: ") == 1
    assert f"http://{web}/{answer}/" in error
    assert named in error
    assert "HTTP Error 500" in error
    assert "point --data.root at a folder that holds the corpus" in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


FORBIDDEN = {
    "corpus file": ("corpus/valid.txt", 0o000, ["--data.root=corpus"], ["corpus/valid.txt", "ermission"]),
    "corpus folder": ("corpus", 0o000, ["--data.root=corpus"], ["corpus", "ermission"]),
    "recipe": ("recipe.yaml", 0o000, ["--config=recipe.yaml"], ["recipe.yaml", "not readable"]),
    "store's folder": ("store", 0o500, [f"{STORE}=sqlite:///store/mlflow.db"], ["store", "ermission"]),
    "store's file": (
        "store/mlflow.db",
        0o000,
        [f"{STORE}=sqlite:///store/mlflow.db"],
        ["store/mlflow.db", "ermission"],
    ),
    "store to read": (
        "store/mlflow.db",
        0o400,
        [f"{STORE}=sqlite:///store/mlflow.db"],
        ["store/mlflow.db", "ermission"],
    ),
}


# Runs each command line in a fork of its own, in its folder; what it prints goes into err.txt.
FORKS = """
import json, os, sys
import fork_preload
from lit_sigsoftmax.cli import main
for folder, words in json.loads(sys.argv[1]):
    if not os.fork():
        os.chdir(folder)
        os.dup2(os.open("err.txt", os.O_WRONLY | os.O_CREAT), 2)
        try:
            main(words)
        except SystemExit as exit_:
            sys.stderr.flush()
            os._exit(exit_.code)  # at once: an interpreter's end takes seconds
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def forbidden(tmp_path_factory):
    """For each case its folder and the exit code of a command that has not the right to do there what it would."""
    folders = {}
    for case, (path, mode, _, _) in FORBIDDEN.items():
        folders[case] = folder = tmp_path_factory.mktemp("forbidden")
        write_text_corpus(folder / "corpus")
        (folder / "recipe.yaml").write_text("trainer:\n  max_epochs: 1\n")
        (folder / "store").mkdir()
        if path.startswith("store/"):
            (folder / path).touch()
        (folder / path).chmod(mode)
    jobs = [(str(folders[case]), ["fit", *CORPUS, *QUIET, *FORBIDDEN[case][2]]) for case in FORBIDDEN]
    # A program of its own: the rights are given up when it starts.
    command = [sys.executable, "-c", FORKS, json.dumps(jobs)]
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
    done = subprocess.run(command, preexec_fn=_obey_permissions, **options)
    for case, (path, *_) in FORBIDDEN.items():
        (folders[case] / path).chmod(0o700)
    return dict(zip(FORBIDDEN, zip(folders.values(), map(int, done.stdout.split()), strict=True), strict=True))


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_may_not_be_read_or_written_is_one_line(case, forbidden):
    folder, code = forbidden[case]
    printed = (folder / "err.txt").read_text()
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), printed
    assert [name for name in FORBIDDEN[case][3] if name not in errors[0]] == []
    assert "Traceback" not in printed
    assert not (folder / "mlruns").exists()


def _obey_permissions() -> None:
    # Root may read everything: the bounding set is what a new program keeps of that. Others have no such right to drop.
    drop_from_bounding_set, override, read_search = 24, 1, 2
    for capability in (override, read_search):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


LINE = " ".join(f"w{i % 12}" for i in range(600))
ODD = {
    "Windows line ends": "\r\n".join([LINE] * 3) + "\r\n",
    "byte order mark": f"\ufeff{LINE}\n",
    "one line": " ".join([LINE] * 100) + "\n",
    "no newline at the end": LINE,
    "nothing but <unk>": "<unk> " * 600 + "\n",
    "blank lines": f"\n\n{LINE}\n\n\n",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_text_that_is_odd_but_right_trains(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text_corpus(tmp_path / "odd")
    for split in ("train", "valid", "test"):
        (tmp_path / "odd" / f"{split}.txt").write_bytes(text.encode())
    main(["fit", *TEXT, "--data.root=odd", *QUIET, "--trainer.logger=false", "--trainer.fast_dev_run=true"])
    assert "test/perplexity" in capsys.readouterr().out


def test_the_cases_are_mistakes_alone(folder, tmp_path, monkeypatch, capsys):
    """The files and arguments that the table starts from are right."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    for arguments in (SMALL, CORPUS):
        main(["fit", *arguments, *QUIET, "--trainer.logger=false", "--trainer.fast_dev_run=true"])
    assert capsys.readouterr().out.count("test/perplexity") == 2
