import logging
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from lit_sigsoftmax.data import EOS, UNK, Corpus, Vocabulary, cache_dir, load_text_corpus, read_tokens
from lit_sigsoftmax.data import corpus as corpus_module
from lit_sigsoftmax.storage import atomic_write, exclusive

SPLITS = ("train", "valid", "test")
# Children inherit the parent's patches and imports
fork = multiprocessing.get_context("fork")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_SIGSOFTMAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def paths(tmp_path):
    texts = {"train": "the cat sat\nthe dog\n", "valid": "the cat\n", "test": "dog\n\n"}
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_text(text)
    return {split: tmp_path / f"{split}.txt" for split in SPLITS}


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """Counts the corpora encoded from text, in this process and its children."""
    journal = tmp_path / "builds"
    journal.touch()
    encode = Corpus.from_tokens

    def encode_and_note(*args, **kwargs):
        with journal.open("a") as file:
            file.write("x")
        time.sleep(0.1)  # long enough for the others to arrive
        return encode(*args, **kwargs)

    monkeypatch.setattr(Corpus, "from_tokens", encode_and_note)
    return lambda: len(journal.read_text())


def same(a, b):
    return a.vocabulary == b.vocabulary and all(torch.equal(getattr(a, split), getattr(b, split)) for split in SPLITS)


# The papers' convention


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (b"a b\nc\n", ["a", "b", EOS, "c", EOS]),
        (b"a\nb", ["a", EOS, "b", EOS]),
        (b"\na\n\n", [EOS, "a", EOS, EOS]),
        (b"\n", [EOS]),
        (b" a\t b \r\nc\r\n", ["a", "b", EOS, "c", EOS]),
        (b"\xef\xbb\xbfa\n", ["a", EOS]),
        ("é\u2028ü\x0bx\x85y\n".encode(), ["é", "ü", "x", "y", EOS]),
    ],
    ids=["lines", "no last newline", "blank lines", "one blank line", "windows", "byte order mark", "only \\n ends"],
)
def test_read_tokens(tmp_path, text, tokens):
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    assert read_tokens(path) == tokens


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "text.txt is empty"),
        (b"abc\xff\xfe", r"text.txt is not UTF-8: byte 0xff at offset 3 .*convert"),
        (b"\xef\xbb\xbfa\xc3", r"byte 0xc3 at offset 4"),
        (b"ab\x00cd", "text.txt is not a text file: it has a NUL byte at offset 2"),
    ],
    ids=["empty", "latin", "cut off", "binary"],
)
def test_read_tokens_refuses_what_is_no_text(tmp_path, data, message):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_tokens(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        read_tokens(tmp_path / "nowhere.txt")


# Corpus


def test_from_tokens_takes_the_vocabulary_of_train():
    corpus = Corpus.from_tokens("tiny", iter(["a", "b", "a", "<eos>"]), ["a"], ["b", "c"], min_count=2)
    assert corpus.vocabulary.tokens == ("a", UNK, EOS)
    assert [getattr(corpus, split).tolist() for split in SPLITS] == [[0, 1, 0, 2], [0], [1, 1]]
    assert corpus.train.dtype == torch.int32


def test_an_empty_split_is_named():
    with pytest.raises(ValueError, match=r"valid split of corpus 'tiny'.*shape \(0,\)"):
        Corpus.from_tokens("tiny", ["a"], [], ["a"])


def test_other_dtypes_are_refused():
    tokens = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"train split.*torch.int64"):
        Corpus("tiny", Vocabulary([EOS]), tokens.long(), tokens, tokens)


def test_the_fingerprint_tells_content_apart():
    corpus = Corpus.from_tokens("tiny", ["a", "b", EOS], ["a", "b"], ["b", "a"])
    other = [
        replace(corpus, vocabulary=Vocabulary(["b", "a", EOS])),
        replace(corpus, train=corpus.train[:2]),
        replace(corpus, valid=corpus.test, test=corpus.valid),
        # the same ids in a row, cut in another place
        replace(corpus, train=torch.cat([corpus.train, corpus.valid[:1]]), valid=corpus.valid[1:]),
    ]
    assert len({corpus.fingerprint, *(changed.fingerprint for changed in other)}) == 5
    assert replace(corpus, name="other").fingerprint == corpus.fingerprint
    assert len(corpus.fingerprint) <= 36  # MLflow's limit for a data set's digest
    assert set(corpus.fingerprint) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    ("file", "tokens", "types"),
    [
        ("ptb/ptb.{}.txt", (929_589, 73_760, 82_430), 10_000),
        ("wikitext-2/wiki.{}.tokens", (2_088_628, 217_646, 245_569), 33_278),
    ],
)
def test_published_counts(data_root, cache, file, tokens, types):
    paths = {split: data_root / file.format(split) for split in SPLITS}
    corpus = load_text_corpus("real", paths)
    assert tuple(len(getattr(corpus, split)) for split in SPLITS) == tokens
    assert len(corpus.vocabulary) == types
    assert corpus.vocabulary.decode(corpus.valid) == read_tokens(paths["valid"])
    assert same(corpus, load_text_corpus("real", paths))


# The cache


def test_a_corpus_is_encoded_once(cache, paths, builds):
    first = load_text_corpus("tiny", paths)
    second = load_text_corpus("renamed", paths)
    assert builds() == 1
    assert same(first, second)
    assert first.fingerprint == second.fingerprint
    assert (first.name, second.name) == ("tiny", "renamed")
    assert first.vocabulary.tokens == ("the", "cat", "sat", EOS, "dog")


def test_changed_content_is_encoded_again(cache, paths):
    load_text_corpus("tiny", paths)
    paths["train"].write_text("the cat sat\nthe cow dog\n")
    assert "cow" in load_text_corpus("tiny", paths).vocabulary
    assert UNK in load_text_corpus("tiny", paths, min_count=2).vocabulary


def test_the_cache_folder_can_be_given(cache, paths, tmp_path):
    load_text_corpus("tiny", paths, cache_dir=tmp_path / "elsewhere")
    assert list(tmp_path.glob("elsewhere/**/*.pt"))
    assert not cache.exists()


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_empty(path):
    path.write_bytes(b"")


def damage_text(path):
    path.write_text("not a cache")


def damage_other(path):
    torch.save({"tokens": 3}, path)


def damage_id(path):
    content = torch.load(path)
    content["valid"][0] += 1
    torch.save(content, path)


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_text, damage_other, damage_id])
def test_a_damaged_cache_is_built_again(cache, paths, builds, damage, caplog):
    corpus = load_text_corpus("tiny", paths)
    (file,) = cache.glob("**/*.pt")
    damage(file)
    with caplog.at_level(logging.WARNING):
        assert same(load_text_corpus("tiny", paths), corpus)
    assert builds() == 2
    assert str(file) in caplog.text
    caplog.clear()
    load_text_corpus("tiny", paths)
    assert builds() == 2
    assert not caplog.records


def test_of_several_processes_one_builds(cache, paths, builds):
    barrier, results = fork.Barrier(3), fork.Queue()

    def load():
        barrier.wait(10)
        results.put(load_text_corpus("tiny", paths).fingerprint)

    children = [fork.Process(target=load) for _ in range(3)]
    for child in children:
        child.start()
    fingerprints = {results.get(timeout=10) for _ in children}
    for child in children:
        child.join(10)
    assert fingerprints == {load_text_corpus("tiny", paths).fingerprint}
    assert builds() == 1


def test_a_builder_killed_while_writing_leaves_no_trouble(cache, paths, monkeypatch):
    half, stop = fork.Event(), fork.Event()
    save = torch.save

    def save_half(content, file):
        file.write(b"half a corpus")
        file.flush()
        half.set()
        stop.wait(10)

    monkeypatch.setattr(torch, "save", save_half)
    child = fork.Process(target=load_text_corpus, args=("tiny", paths))
    child.start()
    assert half.wait(10)
    os.kill(child.pid, signal.SIGKILL)
    child.join(10)
    monkeypatch.setattr(torch, "save", save)
    assert len(list(cache.glob("**/*.part"))) == 1
    assert load_text_corpus("tiny", paths).vocabulary.tokens[0] == "the"
    assert not list(cache.glob("**/*.part"))


def test_nothing_is_left_of_a_failed_write(tmp_path):
    def fail():
        with exclusive(tmp_path / "file"), atomic_write(tmp_path / "file") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {path.name for path in tmp_path.iterdir()} <= {"file.lock"}


def test_an_unwritable_cache_names_the_variable(paths, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIT_SIGSOFTMAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write to .*file.corpora .*set LIT_SIGSOFTMAX_CACHE"):
        load_text_corpus("tiny", paths)


def test_a_token_that_cannot_be_encoded_is_named(cache, paths):
    paths["test"].write_text("the cow\n")
    with pytest.raises(ValueError, match="'cow'"):
        load_text_corpus("tiny", paths)
    assert not list(cache.glob("**/*.p*t"))


def test_cache_dir(monkeypatch, tmp_path):
    for name in ("LIT_SIGSOFTMAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "lit_sigsoftmax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "lit_sigsoftmax"
    monkeypatch.setenv("LIT_SIGSOFTMAX_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"


def test_the_format_version_is_part_of_the_key(cache, paths, builds, monkeypatch):
    load_text_corpus("tiny", paths)
    monkeypatch.setattr(corpus_module, "_FORMAT", "next")
    load_text_corpus("tiny", paths)
    assert builds() == 2
