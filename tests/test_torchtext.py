"""from_torchtext: with the real torchtext 0.6, with stand-ins for 0.18, and the page about both."""

import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torchtext.data
import torchtext.datasets
import torchtext.vocab

from lit_sigsoftmax.data import EOS, UNK, CorpusDataModule, load_text_corpus
from lit_sigsoftmax.data.torchtext import from_torchtext

FILES = {"train": "the cat sat\n\n the  dog sat \n", "valid": "the dog\n", "test": "cat sat\nthe end\n"}
TRAIN = f"the cat sat {EOS} {EOS} the dog sat {EOS}".split()
PAGE = Path(__file__).parents[1] / "docs" / "torchtext.md"


class Vocab18:
    """What from_torchtext may use of torchtext.vocab.Vocab 0.18, and the methods that look alike."""

    def __init__(self, tokens):
        self._itos = list(tokens)

    def get_itos(self):
        return list(self._itos)

    def get_stoi(self):
        return {token: i for i, token in enumerate(self._itos)}

    def __len__(self):
        return len(self._itos)

    def __getitem__(self, token):
        return self._itos.index(token)


class Lines18:
    """A datapipe of torchtext 0.18: lines with their ends, known only by iterating."""

    def __init__(self, text):
        self._text = text

    def __iter__(self):
        return iter(self._text.splitlines(keepends=True))


def build_vocab_from_iterator(iterator, specials):
    """As in torchtext 0.18: specials, then by frequency, ties in alphabetical order."""
    counts = Counter(token for tokens in iterator for token in tokens)
    return Vocab18([*specials, *sorted(counts.keys() - set(specials), key=lambda token: (-counts[token], token))])


@pytest.fixture
def folder(tmp_path):
    for split, text in FILES.items():
        (tmp_path / f"{split}.txt").write_text(text)
    return tmp_path


def splits_06(folder, field, **options):
    files = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
    return torchtext.datasets.LanguageModelingDataset.splits(text_field=field, path=str(folder), **files, **options)


def lines_18():
    return [Lines18(FILES[split]) for split in ("train", "valid", "test")]


def decoded(corpus):
    return [corpus.vocabulary.decode(ids) for ids in (corpus.train, corpus.valid, corpus.test)]


def own_corpus(folder, min_count=2):
    paths = {split: folder / f"{split}.txt" for split in FILES}
    return load_text_corpus("own", paths, min_count=min_count, cache_dir=folder / "cache")


def test_dataset_of_06(folder):
    corpus = from_torchtext(*splits_06(folder, torchtext.data.Field()), name="tiny", min_count=2)
    assert corpus.name == "tiny"
    assert corpus.train.dtype == torch.int32
    assert decoded(corpus)[0] == [UNK if token in {"cat", "dog"} else token for token in TRAIN]
    assert corpus.fingerprint == own_corpus(folder).fingerprint


def test_dataset_of_06_without_eos_gets_one_at_its_end(folder):
    corpus = from_torchtext(*splits_06(folder, torchtext.data.Field(), newline_eos=False), min_count=2)
    assert decoded(corpus)[2] == [UNK, "sat", "the", UNK, EOS]


def test_dataset_of_06_with_many_examples(folder):
    field = torchtext.data.Field(lower=True)
    fields = [("text", field)]
    examples = [torchtext.data.Example.fromlist([line], fields) for line in ("The cat", "the")]
    dataset = torchtext.data.Dataset(examples, fields)
    assert decoded(from_torchtext(dataset, dataset, dataset))[0] == ["the", "cat", EOS, "the", EOS]


def test_bptt_iterator_and_vocab_of_06_keep_their_ids(folder):
    field = torchtext.data.Field()
    splits = splits_06(folder, field)
    field.build_vocab(splits[0])
    iterators = torchtext.data.BPTTIterator.splits(splits, batch_size=2, bptt_len=3)
    corpus = from_torchtext(*iterators, field.vocab)
    assert list(corpus.vocabulary.tokens) == field.vocab.itos
    assert field.vocab.itos[:2] == [UNK, "<pad>"]
    assert corpus.train.tolist() == [field.vocab.stoi[token] for token in TRAIN]
    batch = next(iter(iterators[0]))
    assert batch.text[:, 0].tolist() == corpus.train[:3].tolist()
    assert decoded(corpus)[2] == ["cat", "sat", EOS, "the", UNK, EOS]


def test_lines_of_18_without_torchtext(folder, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchtext"]:
        monkeypatch.setitem(sys.modules, module, None)  # any import of it fails
    corpus = from_torchtext(*lines_18(), min_count=2)
    assert corpus.fingerprint == own_corpus(folder).fingerprint


def test_vocab_of_18_keeps_its_ids():
    vocab = build_vocab_from_iterator([TRAIN], specials=[UNK, EOS])
    corpus = from_torchtext(*lines_18(), vocab=vocab)
    assert list(corpus.vocabulary.tokens) == vocab.get_itos() == [UNK, EOS, "sat", "the", "cat", "dog"]
    assert corpus.train.tolist() == [vocab[token] for token in TRAIN]
    assert decoded(corpus)[2] == ["cat", "sat", EOS, "the", UNK, EOS]


def test_both_generations_give_the_same_corpus(folder):
    vocab = torchtext.vocab.Vocab(Counter(TRAIN), specials=[UNK, EOS])
    old = from_torchtext(*splits_06(folder, torchtext.data.Field()), vocab=vocab)
    new = from_torchtext(*lines_18(), vocab=build_vocab_from_iterator([TRAIN], specials=[UNK, EOS]))
    assert old.fingerprint == new.fingerprint


def test_loaders_token_lists_files_and_plain_vocabularies(folder):
    expected = from_torchtext(*lines_18(), vocab=[UNK, EOS, "the"])
    assert decoded(expected)[1] == ["the", UNK, EOS]
    loaders = [torch.utils.data.DataLoader(list(lines)) for lines in lines_18()]
    lists = [[line.split() for line in lines] for lines in lines_18()]
    ended = [[(*tokens, EOS) for tokens in split] for split in lists]
    with (
        (folder / "train.txt").open() as train,
        (folder / "valid.txt").open() as valid,
        (folder / "test.txt").open() as test,
    ):
        for splits in (loaders, lists, ended, (train, valid, test)):
            corpus = from_torchtext(*splits, vocab=(UNK, EOS, "the"))
            assert corpus.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("train.txt", "the train split is 'train.txt', not a torchtext dataset"),
        (3, "the train split is 3"),
        ([torch.tensor([1, 2])], r"the train split holds tensor\(\[1, 2\]\): expected lines of text"),
        ([[1, 2]], r"holds \[1, 2\]"),
        ([SimpleNamespace(label="x")], "holds namespace"),
    ],
)
def test_a_split_of_another_kind(train, message):
    with pytest.raises(TypeError, match=message):
        from_torchtext(train, [], [])


@pytest.mark.parametrize("vocab", [{"the": 0, EOS: 1}, 7, [1, 2], "the"])
def test_a_vocabulary_of_another_kind(vocab):
    with pytest.raises(TypeError, match="expected a torchtext Vocab"):
        from_torchtext(*lines_18(), vocab=vocab)


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        (Vocab18([UNK, "the"]), "vocab has no '<eos>', which ends every line: build it with specials"),
        (torchtext.vocab.Vocab(Counter(["the"])), "vocab has no '<eos>'"),
        ([EOS, "the", "cat", "sat", "dog"], "the test split cannot be encoded: token 'end' is not in the vocabulary"),
        ([EOS, EOS, UNK], "occurs more than once"),
    ],
)
def test_a_vocabulary_that_does_not_fit(vocab, message):
    with pytest.raises(ValueError, match=message):
        from_torchtext(*lines_18(), vocab=vocab)


def test_a_word_that_only_the_test_split_has_needs_unk():
    with pytest.raises(ValueError, match="the test split cannot be encoded: token 'end'"):
        from_torchtext(*lines_18())


def test_an_empty_split():
    with pytest.raises(ValueError, match=r"the valid split of corpus 'torchtext' .* at least one token"):
        from_torchtext(["a b"], [], ["a"])


def test_the_real_penn_treebank(data_root, tmp_path):
    folder = data_root / "ptb"
    field = torchtext.data.Field()
    splits = torchtext.datasets.PennTreebank.splits(field, path=str(folder))
    corpus = from_torchtext(*splits)
    assert [len(corpus.train), len(corpus.valid), len(corpus.test)] == [929_589, 73_760, 82_430]
    paths = {split: folder / f"ptb.{split}.txt" for split in FILES}
    assert corpus.fingerprint == load_text_corpus("ptb", paths, cache_dir=tmp_path).fingerprint


def torchtext_18():
    """Stand-ins for the modules that the page imports from torchtext 0.18."""
    modules = {name: ModuleType(name) for name in ("torchtext", "torchtext.datasets", "torchtext.vocab")}
    modules["torchtext"].disable_torchtext_deprecation_warning = lambda: None
    modules["torchtext.datasets"].PennTreebank = lambda: tuple(lines_18())
    modules["torchtext.vocab"].build_vocab_from_iterator = build_vocab_from_iterator
    return modules


def test_the_page(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_SIGSOFTMAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my_corpus").symlink_to(folder)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    names = {}
    corpora = []
    for i, block in enumerate(blocks):
        with monkeypatch.context() as patch:
            if "disable_torchtext_deprecation_warning" in block:
                for name, module in torchtext_18().items():
                    patch.setitem(sys.modules, name, module)
            exec(compile(block, f"<block {i} of {PAGE.name}>", "exec"), names)
        data = names.pop("data", None)
        corpora.append(data.corpus if isinstance(data, CorpusDataModule) else names.pop("corpus", None))
    reader, dataset, iterators, datamodule, exported, imported = corpora
    assert reader.fingerprint == dataset.fingerprint == datamodule.fingerprint == own_corpus(folder).fingerprint
    assert iterators.vocabulary.tokens == (UNK, "<pad>", EOS, "sat", "the")
    assert exported is None
    assert imported.name == "penn_treebank"
    assert decoded(imported)[0] == TRAIN
