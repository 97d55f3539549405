"""A mistake on the command line or in a file: one line that says what is wrong, exit code 2, and no run."""

import re
from pathlib import Path

import pytest
from cli_helpers import QUIET, SMALL, write_text_corpus

from lit_sigsoftmax.cli import main

TEXT = ("--data=lit_sigsoftmax.data.TextCorpus",)
CORPUS = (*TEXT, "--data.root=corpus")
# Not ddp: that would start this test's own process again.
PAIR = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp_spawn")
FILES = {
    "model_key.yaml": "model:\n  class_path: lit_sigsoftmax.LanguageModel\n  init_args:\n    activatoin: softmax\n",
    "trainer_key.yaml": "trainer:\n  max_epoch: 3\n",
    "top_key.yaml": "modle:\n  n_experts: 3\n",
    "syntax.yaml": "model:\n  class_path: [\n",
    "list.yaml": "- trainer\n",
    "damaged.ckpt": "no checkpoint",
    "empty/train.txt": "",
    "one_file/train.txt": "a b\n",
    "nul/train.txt": "a\0b\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".txt") and not name.startswith("one_file"):
            write_text_corpus((folder / name).parent)
        (folder / name).write_bytes(content.encode())
    write_text_corpus(folder / "latin1")
    (folder / "latin1" / "valid.txt").write_bytes(b"a caf\xe9\n")
    write_text_corpus(folder / "corpus")
    return folder


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
    "checkpoint": (["test", *CORPUS, "--ckpt_path=gone.ckpt"], ["gone.ckpt"]),
    "checkpoint to continue": (["fit", *CORPUS, "--ckpt_path=gone.ckpt"], ["gone.ckpt"]),
    "checkpoint before there is one": (["test", *CORPUS, "--ckpt_path=last"], ["last"]),
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
def test_a_mistake_is_one_line_and_exit_code_2_before_any_run(arguments, named, folder, tmp_path, monkeypatch, capsys):
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


def test_the_cases_are_mistakes_alone(folder, tmp_path, monkeypatch, capsys):
    """The files and arguments that the table starts from are right."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    for arguments in (SMALL, CORPUS):
        main(["fit", *arguments, *QUIET, "--trainer.logger=false", "--trainer.fast_dev_run=true"])
    assert capsys.readouterr().out.count("test/perplexity") == 2
