"""PythonDocs: clean text from the sources of Python, without repetition, dealt out by whole documents, built once."""

import re
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import pytest

from lit_sigsoftmax.data import EOS, UNK, cache_dir
from lit_sigsoftmax.recipes.python_docs import PythonDocs

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def fingerprint_and_files():
    fingerprint = PythonDocs().corpus.fingerprint
    return fingerprint, {file.name: file.stat().st_ino for file in cache_dir().rglob("*.txt")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The cache that two builders filled at the same time, and what each of them saw."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as monkeypatch, ThreadPoolExecutor(2) as pool:
        monkeypatch.setenv("LIT_SIGSOFTMAX_CACHE", str(folder))
        futures = [pool.submit(fingerprint_and_files) for _ in range(2)]
        return folder, [future.result() for future in futures]


@pytest.fixture
def docs(cache, monkeypatch):
    monkeypatch.setenv("LIT_SIGSOFTMAX_CACHE", str(cache[0]))
    return PythonDocs()


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A folder that stands for the standard library of the running Python."""
    folder = tmp_path / "lib"
    (folder / "pydoc_data").mkdir(parents=True)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_, **__: str(folder))
    monkeypatch.setenv("LIT_SIGSOFTMAX_CACHE", str(tmp_path / "cache"))
    return folder


def test_one_builds_while_the_other_waits_and_both_see_the_same(cache, docs):
    first, second = cache[1]
    assert first == second
    assert set(first[1]) == {"train.txt", "valid.txt", "test.txt"}
    assert fingerprint_and_files() == first


def test_size(docs):
    corpus = docs.corpus
    n_tokens = [len(split) for split in (corpus.train, corpus.valid, corpus.test)]
    assert 200_000 < sum(n_tokens) < 500_000
    assert [n / sum(n_tokens) for n in n_tokens] == pytest.approx([0.8, 0.1, 0.1], abs=0.015)
    assert 3000 < docs.vocab_size < 6000
    for split, limit in ((corpus.train, 0.03), (corpus.valid, 0.08), (corpus.test, 0.08)):
        rate = (split == corpus.vocabulary.unk_id).double().mean().item()
        assert 0.005 < rate < limit
        eos_rate = (split == corpus.vocabulary.eos_id).double().mean().item()
        assert 0.03 < eos_rate < 0.12  # sentences of 8 to 30 tokens


def test_it_is_english_in_the_manner_of_the_penn_treebank(docs):
    tokens = docs.corpus.vocabulary.tokens
    words = [token for token in tokens if token not in {EOS, UNK, "N"}]
    odd = [word for word in words if not re.fullmatch(r"'s|[^\W\d_A-Z]+('[^\W\d_A-Z]+)?|[.,;:!?()]", word)]
    assert odd == []
    assert {"the", "function", "returns", "N", "'s", "don't", ".", "("} <= set(tokens)
    text = docs.corpus.vocabulary.decode(docs.corpus.train)
    assert f"{EOS} return a string" in " ".join(text)


def test_no_sentence_occurs_twice(cache, docs):
    assert docs.corpus
    lines = [line for file in cache[0].rglob("*.txt") for line in file.read_text("utf-8").splitlines()]
    assert len(lines) > 10_000
    assert len(set(lines)) == len(lines)


def test_max_tokens_keeps_a_sample_in_proportion(docs):
    whole, part = docs.corpus, PythonDocs(max_tokens=60_000).corpus
    assert len(part.train) == 60_000
    for split in ("valid", "test"):
        assert len(getattr(part, split)) == pytest.approx(60_000 / len(whole.train) * len(getattr(whole, split)), abs=1)
    words = part.vocabulary.decode(part.train)
    assert min(words.count(word) for word in words[:300] if word not in {EOS, UNK}) >= 3
    assert len(part.vocabulary) < len(whole.vocabulary)
    assert part.fingerprint != whole.fingerprint
    # no topic word is far more frequent in the beginning than in the whole: documents are mixed
    whole_words = whole.vocabulary.decode(whole.train)
    for word in ("the", "class", "statement", "file"):
        ratio = words.count(word) / len(words) / (whole_words.count(word) / len(whole_words))
        assert 0.5 < ratio < 2
    assert PythonDocs(max_tokens=10**9).corpus.fingerprint == whole.fingerprint


def test_min_count_is_that_of_the_vocabulary(docs):
    assert len(PythonDocs(min_count=2).corpus.vocabulary) > len(docs.corpus.vocabulary)


def name_of(i):
    return LETTERS[i // 26] + LETTERS[i % 26]


def write_library(folder, n_modules=120):
    """Modules that fail when run, each with sentences of its own words and one that all share."""
    for i in range(n_modules):
        word = name_of(i)
        (folder / f"{word}.py").write_text(
            f'"""Word{word} begins. It\\u2019s shared 3.5 times by {word} x9.\n\n'
            "All have this.\n\n>>> print(prompt)\nprompted\n\nproduction ::= rule\n"
            f'"""\nraise RuntimeError("executed")\n\n\nclass C:\n    """The {word} class\n    goes on."""\n'
            f'    def f(self):\n        r"""Method {word}: see\n\n'
            f'        * item {word}\n        * os.path {word}\n        """\n'
        )
    (folder / "pydoc_data" / "topics.py").write_text(
        "# -*- coding: utf-8 -*-\ntopics = {'if': 'The if statement.\\n\\nAll have this.\\n'\n 'Topic text.\\n'}\n"
        "raise RuntimeError('executed')\n"
    )
    for skipped in ("test", "site-packages/pkg", "idlelib"):
        (folder / skipped).mkdir(parents=True)
        (folder / skipped / "module.py").write_text('"""Skipped text."""')


def test_sources_are_parsed_and_dealt_out_by_document(stdlib):
    write_library(stdlib)
    corpus = PythonDocs(min_count=2).corpus
    assert {"shared", "N", "'s", "item", "class"} <= set(corpus.vocabulary.tokens)
    files = sorted((stdlib.parent / "cache").rglob("*.txt"))
    by_split = {file.stem: file.read_text("utf-8").splitlines() for file in files}
    lines = [line for split in by_split.values() for line in split]
    for absent in ("executed", "skipped", "print", "production"):
        assert not any(absent in line for line in lines)
    assert lines.count("all have this .") == 1
    assert {"the if statement .", "topic text ."} <= set(lines)
    of_ab = [line for line in lines if re.search(r"\b(word)?ab\b", line)]
    assert of_ab == [
        "wordab begins .",
        "it 's shared N times by ab x N .",
        "the ab class goes on .",
        "method ab : see",
        "item ab",
        "os path ab",
    ]
    home = {}
    for split, split_lines in by_split.items():
        for line in split_lines:
            for word in re.findall(r"^(?:item|os path) (\w\w)$", line):
                assert home.setdefault(word, split) == split
    assert len(home) == 120
    assert {split: list(home.values()).count(split) for split in by_split} == {"train": 96, "valid": 12, "test": 12}


def test_changed_sources_are_read_again(stdlib):
    write_library(stdlib)
    before = PythonDocs().corpus.fingerprint
    assert PythonDocs().corpus.fingerprint == before
    (stdlib / "ab.py").write_text('"""Other other other other words."""')
    assert PythonDocs().corpus.fingerprint != before


def test_a_python_without_sources_is_one_clear_error(stdlib):
    with pytest.raises(FileNotFoundError, match=r"found 0 modules, pydoc_data/topics.py not among them"):
        PythonDocs().load_corpus()
    write_library(stdlib)
    (stdlib / "pydoc_data" / "topics.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"lib: found 120 modules, pydoc_data/topics.py not among them"):
        PythonDocs().load_corpus()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "data.max_tokens must be at least 1, got 0"),
        ({"min_count": 1}, "data.min_count must be at least 2, got 1"),
        ({"batch_size": 0}, "data.batch_size"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PythonDocs(**arguments)
