import functools
import hashlib
import http.server
import pickle
import threading
import warnings
import zipfile
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lit_sigsoftmax.data import EOS, IGNORE_INDEX, Corpus, CorpusDataModule, PublishedCorpus, TextCorpus
from lit_sigsoftmax.data.download import DownloadError
from lit_sigsoftmax.recipes.penn_treebank import PennTreebank
from lit_sigsoftmax.recipes.penn_treebank import datamodule as penn_treebank
from lit_sigsoftmax.recipes.wikitext2 import WikiText2
from lit_sigsoftmax.recipes.wikitext2 import datamodule as wikitext2

SPLITS = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_SIGSOFTMAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIT_SIGSOFTMAX_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def serve():
    """Serves a folder over HTTP and returns its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), None) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()

        def start(folder):
            class Quiet(http.server.SimpleHTTPRequestHandler):
                def log_message(self, *args):
                    pass

            server.RequestHandlerClass = functools.partial(Quiet, directory=folder)
            return f"http://127.0.0.1:{server.server_port}"

        yield start
        server.shutdown()
        thread.join()


@pytest.fixture
def text_folder(tmp_path):
    """40 numbered tokens for training, 13 for validation, 7 for testing, all <eos> aside."""
    folder = tmp_path / "my corpus"
    folder.mkdir()
    numbers = [str(i) for i in range(39)]
    (folder / "train.txt").write_text(" ".join(numbers))
    (folder / "valid.txt").write_text(" ".join(numbers[:12]))
    (folder / "test.txt").write_text(" ".join(numbers[:6]))
    return folder


def stand_in(folder, file_name):
    folder.mkdir(parents=True)
    for split in SPLITS:
        (folder / file_name.format(split=split)).write_text("the <unk> cat\n" * 3)


RECIPES = pytest.mark.parametrize("recipe", [PennTreebank, WikiText2])


# The recipes


@RECIPES
def test_the_published_corpus_is_recognised(recipe, data_root, monkeypatch):
    monkeypatch.setenv("LIT_SIGSOFTMAX_DATA", str(data_root))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_environment = recipe()
        assert by_environment.vocab_size == recipe.n_types
        by_folder = recipe(root=str(data_root / recipe.folder))
        by_parent = recipe(root=str(data_root))
    sizes = tuple(len(getattr(by_folder.corpus, split)) for split in SPLITS)
    assert sizes == recipe.n_tokens
    assert by_environment.corpus.fingerprint == by_folder.corpus.fingerprint == by_parent.corpus.fingerprint
    assert by_environment.name == recipe.corpus_name


@RECIPES
def test_a_stand_in_is_used_with_one_warning(recipe, tmp_path):
    stand_in(tmp_path / "data", recipe.file_name)
    data = recipe(root=str(tmp_path / "data"))
    with pytest.warns(UserWarning, match=r"not the published corpus.*cannot be compared") as caught:
        data.prepare_data()
    assert len(caught) == 1
    message = str(caught[0].message)
    for part in ("12 train tokens", f"published: {recipe.n_tokens[0]:,}", "4 types", f"published: {recipe.n_types:,}"):
        assert part in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.vocab_size == 4


@RECIPES
@pytest.mark.parametrize("variable", [False, True])
def test_a_folder_without_the_files_is_an_error_and_nothing_is_downloaded(recipe, variable, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "fetch", lambda *_: pytest.fail("went to download"))
    if variable:
        monkeypatch.setenv("LIT_SIGSOFTMAX_DATA", str(tmp_path))
    data = recipe(root=None if variable else str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        data.vocab_size  # noqa: B018
    source = "LIT_SIGSOFTMAX_DATA" if variable else "data.root"
    for part in (recipe.file_name.format(split="valid"), str(tmp_path / recipe.folder), f"as {source} says"):
        assert part in str(caught.value)


def test_penn_treebank_is_downloaded_from_a_mirror_and_verified(data_root, serve, tmp_path, monkeypatch):
    address = serve(data_root)
    monkeypatch.setattr(penn_treebank, "_SOURCES", (f"{address}/gone/", f"{address}/ptb/"))
    assert PennTreebank().vocab_size == 10_000
    monkeypatch.setattr(penn_treebank, "_SOURCES", ())  # the second time needs no source
    assert len(PennTreebank().corpus.valid) == 73_760


def test_wikitext2_is_taken_out_of_its_archive(data_root, serve, tmp_path, monkeypatch):
    archive = tmp_path / "served" / "wikitext-2-v1.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as content:
        for split in SPLITS:
            content.write(data_root / f"wikitext-2/wiki.{split}.tokens", f"wikitext-2/wiki.{split}.tokens")
    monkeypatch.setattr(wikitext2, "_SOURCES", (f"{serve(archive.parent)}/{archive.name}",))
    with pytest.raises(DownloadError, match="another file"):  # this archive is not the published one
        WikiText2().prepare_data()
    monkeypatch.setattr(wikitext2, "_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    assert WikiText2().vocab_size == 33_278
    archive.unlink()
    assert len(WikiText2().corpus.test) == 245_569


@RECIPES
def test_without_network_the_error_says_what_to_do(recipe, monkeypatch):
    module = penn_treebank if recipe is PennTreebank else wikitext2
    monkeypatch.setattr(module, "_SOURCES", ("http://127.0.0.1:9/",))
    with pytest.raises(DownloadError, match=r"127.0.0.1:9.*(?s:.)*--data.root"):
        recipe().prepare_data()


# Any folder of text


def test_text_corpus(text_folder):
    data = TextCorpus(root=str(text_folder), batch_size=4, eval_batch_size=3, bptt=6)
    assert (data.name, data.vocab_size) == ("my corpus", 40)
    assert data.corpus is data.corpus
    train = list(data.train_dataloader())
    assert [inputs.shape for inputs, _ in train] == [(4, 6), (4, 4)]
    assert data.corpus.vocabulary.decode(train[0][0][:, 0]) == [EOS, "9", "19", "29"]
    assert data.val_dataloader().target.shape == (3, 5)
    assert data.test_dataloader().target.shape == data.predict_dataloader().target.shape == (1, 7)


def test_text_corpus_by_other_names(text_folder, monkeypatch):
    (text_folder / "valid.txt").rename(text_folder / "dev")
    monkeypatch.chdir(text_folder)
    data = TextCorpus(root=".", min_count=2, valid="dev")
    assert (data.name, data.corpus.vocabulary.tokens) == ("my corpus", ("<unk>", EOS))
    with pytest.raises(FileNotFoundError, match=r"no valid.txt or nothing in .*my corpus: check data.root"):
        TextCorpus(root=".", test="nothing").prepare_data()


@pytest.mark.parametrize("recipe", [PennTreebank, functools.partial(TextCorpus, "folder")])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *((name, value) for name in ("batch_size", "eval_batch_size", "test_batch_size", "bptt") for value in (0, 2.5)),
        ("context_min", -1),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(recipe, argument, value):
    with pytest.raises(ValueError, match=rf"data.{argument} must be an integer of at least \d, got {value}"):
        recipe(**{argument: value})


@pytest.mark.parametrize(("base", "method"), [(CorpusDataModule, "load_corpus"), (PublishedCorpus, "fetch")])
def test_the_base_classes_say_what_to_implement(base, method):
    with pytest.raises(TypeError, match=method):
        base()


# Streams


@pytest.mark.parametrize("loaded", [False, True])
def test_a_datamodule_can_be_sent_to_another_process(text_folder, loaded):
    data = TextCorpus(root=str(text_folder))
    if loaded:
        data.prepare_data()
    assert pickle.loads(pickle.dumps(data)).corpus.fingerprint == data.corpus.fingerprint


def test_context_belongs_to_evaluation_only(text_folder):
    data = TextCorpus(root=str(text_folder), batch_size=4, eval_batch_size=2, bptt=2, context_min=3)
    assert (data.train_dataloader().context, data.val_dataloader().context, data.test_dataloader().context) == (0, 3, 3)
    assert max(inputs.shape[1] for inputs, _ in data.val_dataloader()) == 5


def test_ranks_share_the_streams(text_folder):
    whole = TextCorpus(root=str(text_folder), batch_size=4, eval_batch_size=3, bptt=6)
    ranks = [TextCorpus(root=str(text_folder), batch_size=4, eval_batch_size=3, bptt=6) for _ in range(2)]
    for rank, data in enumerate(ranks):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
    for loader in ("train_dataloader", "val_dataloader"):
        parts = [getattr(data, loader)() for data in ranks]
        assert torch.equal(torch.cat([part.target for part in parts]), getattr(whole, loader)().target)
        assert len(parts[0]) == len(parts[1])
    targets = [data.test_dataloader().target for data in ranks]  # one stream for two ranks
    assert sorted(bool((target == IGNORE_INDEX).all()) for target in targets) == [False, True]


def test_streams_that_cannot_be_cut_fail_before_training(text_folder):
    data = TextCorpus(root=str(text_folder), batch_size=5)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"data.batch_size.*5 do not divide over 2 devices"):
        data.setup("fit")
    data.setup("test")


class Recorder(LightningModule):
    """Keeps what it is trained on."""

    def __init__(self, vocab_size: int = 1):
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch[1].tolist()))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(text_folder, checkpoints, max_steps, resume=None, save_every=1000):
    model = Recorder()
    keep = ModelCheckpoint(checkpoints, filename="{step}", every_n_train_steps=save_every, save_top_k=-1)
    trainer = Trainer(
        max_steps=max_steps,
        callbacks=[keep],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, TextCorpus(root=str(text_folder), batch_size=4, bptt=2, eval_batch_size=2), ckpt_path=resume)
    return model.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [3, 5, 7])
def test_lightning_resumes_the_streams_where_they_stopped(text_folder, tmp_path, step):
    """Five segments an epoch: within the first epoch, at its end, within the second."""
    whole = train(text_folder, tmp_path / "whole", 12, save_every=step)
    assert [(epoch, batch) for epoch, batch, _ in whole[4:7]] == [(0, 4), (1, 0), (1, 1)]
    resumed = train(text_folder, tmp_path / "rest", 12, resume=tmp_path / "whole" / f"step={step}.ckpt")
    assert resumed == whole[step:]


class Synthetic(CorpusDataModule):
    """A user's own datamodule."""

    def load_corpus(self) -> Corpus:
        return Corpus.from_tokens("mine", ["a", "b", EOS] * 20, ["a"] * 20, ["b"])


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_links_the_vocabulary_size(text_folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lit-sigsoftmax"])

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")

    def instantiate(*arguments):
        return CLI(Recorder, CorpusDataModule, subclass_mode_data=True, run=False, args=list(arguments))

    cli = instantiate("--data=TextCorpus", f"--data.root={text_folder}", "--data.batch_size=8", "--data.min_count=1")
    assert (cli.model.vocab_size, cli.datamodule.batch_size, cli.datamodule.bptt) == (40, 8, 35)
    assert instantiate(f"--data={__name__}.Synthetic", "--data.bptt=3").model.vocab_size == 3
