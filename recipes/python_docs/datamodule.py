"""English that every Python brings along: the language reference and the docstrings of the standard library."""

import ast
import hashlib
import logging
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from lit_sigsoftmax.data import Corpus, CorpusDataModule, cache_dir, read_tokens
from lit_sigsoftmax.data.corpus import SPLITS
from lit_sigsoftmax.storage import atomic_write, exclusive

__all__ = ["PythonDocs"]

# Part of the cache's key: raise it whenever the same sources would give another text.
_RULES = "1"

_TOPICS = "pydoc_data/topics.py"

# Not read: installed packages, tests, what distributions package apart or newer Pythons dropped, and tables of codes.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "distutils", "ensurepip", "idlelib", "lib2to3"}
_SKIPPED |= {"tkinter", "turtledemo", "turtle.py", "encodings", "__pycache__"}

# Of ten documents, the longest first: which go to validation (1) and to test (2).
_HELD_OUT = {4: 1, 5: 2}

_PARAGRAPH = re.compile(r"\n\s*\n")
_CODE = re.compile(r">>>|::=")  # an interactive session, a grammar rule
_SENTENCE = re.compile(r"(?<=[.!?:])['\")]*\s+(?=['\"(*]*[A-Z])|\n\s*[*-]\s")  # a sentence or an item of a list
_TOKEN = re.compile(r"(?P<number>\d\w*(?:[.,]\d\w*)*)|'s\b|[^\W\d_]+(?:'(?!s\b)[^\W\d_]+)?|[.,;:!?](?=[\s'\")]|$)|[()]")

Sentence = tuple[str, ...]
"""Its tokens, without ``<eos>``."""

_log = logging.getLogger(__name__)


class PythonDocs(CorpusDataModule):
    """Real English without a download: the language reference and the docstrings of Python's standard library.

    About 300,000 tokens, and 3,800 types in training, in the manner of the Penn Treebank: lower case, ``N`` for
    numbers, ``<unk>`` for rare words, one sentence a line. No sentence occurs twice, so none of validation or test is
    in training. Whole modules and topics are dealt out 8 : 1 : 1. The text is that of the running Python: it differs a
    little between versions, and the corpus's fingerprint tells. It is cached as plain text.

    Args:
        max_tokens: Keep so many training tokens, with the vocabulary of those alone, and as large a part of validation
            and test. All if None.
        min_count: Types rarer than this in the training split become ``<unk>``.
        **streams: The arguments of :class:`~lit_sigsoftmax.data.CorpusDataModule`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, max_tokens: int | None = None, min_count: int = 3, **streams: int) -> None:
        super().__init__(**streams)
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"data.max_tokens must be at least 1, got {max_tokens}")
        if min_count < 2:
            raise ValueError(
                f"data.min_count must be at least 2, got {min_count}: the held-out texts have words that training lacks"
            )
        self.max_tokens = max_tokens
        self.min_count = min_count

    def load_corpus(self) -> Corpus:
        """Read the documentation of the running Python.

        Raises:
            FileNotFoundError: If this Python was installed without its sources.
            OSError: If the cache cannot be written.
        """
        splits = [read_tokens(path) for path in _text_files(Path(sysconfig.get_path("stdlib")))]
        if self.max_tokens is not None and self.max_tokens < len(splits[0]):
            n_all = len(splits[0])
            splits = [tokens[: -(-len(tokens) * self.max_tokens // n_all)] for tokens in splits]
        return Corpus.from_tokens("python_docs", *splits, min_count=self.min_count)


def _text_files(stdlib: Path) -> list[Path]:
    """The cached text of each split, made by one process while others wait; keyed by the content of the sources."""
    sources = _read_sources(stdlib)
    key = hashlib.blake2b(_RULES.encode(), digest_size=16)
    for name, source in sources.items():
        key.update(f"{name} {len(source)} ".encode() + source)
    folder = cache_dir() / "python_docs" / key.hexdigest()
    paths = [folder / f"{split}.txt" for split in SPLITS]
    if not all(path.is_file() for path in paths):
        with exclusive(folder):
            if not all(path.is_file() for path in paths):
                _log.info("reading the documentation of Python %s into %s", platform.python_version(), folder)
                folder.mkdir(exist_ok=True)
                for path, sentences in zip(paths, _split(_documents(sources)), strict=True):
                    with atomic_write(path) as file:
                        file.writelines(f"{' '.join(sentence)}\n".encode() for sentence in sentences)
    return paths


def _read_sources(stdlib: Path) -> dict[str, bytes]:
    """The source of every module that is read, by its path from ``stdlib``, sorted."""
    paths: dict[str, Path] = {}
    for folder, folders, files in os.walk(stdlib):
        folders[:] = [name for name in folders if name not in _SKIPPED]  # site-packages alone may take a second
        for file in files:
            if file.endswith(".py") and file not in _SKIPPED:
                paths[Path(folder, file).relative_to(stdlib).as_posix()] = Path(folder, file)
    names = sorted(paths)
    if _TOPICS not in names or len(names) < 100:
        raise FileNotFoundError(
            f"the sources of the standard library are not all in {stdlib}: found {len(names)} modules, "
            f"{_TOPICS} {'' if _TOPICS in names else 'not '}among them. This Python was installed without them: "
            "use a complete installation, or another corpus"
        )
    return {name: paths[name].read_bytes() for name in names}


def _documents(sources: dict[str, bytes]) -> dict[str, list[Sentence]]:
    """The sentences of each topic and module, without those seen before: topics quote one another at length."""
    seen: set[Sentence] = set()
    documents: dict[str, list[Sentence]] = {}
    for name, texts in _texts(sources):
        document = documents[name] = []
        for sentence in chain.from_iterable(map(_sentences, texts)):
            if sentence not in seen:
                seen.add(sentence)
                document.append(sentence)
    return documents


def _texts(sources: dict[str, bytes]) -> Iterator[tuple[str, Iterable[str]]]:
    """Each document's name and the texts in it. The sources are parsed, never run."""
    for name, source in sources.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's opinion on invalid escapes
            tree = ast.parse(source, name)
        if name == _TOPICS:
            for topic, text in _topics(tree).items():
                yield f"topics/{topic}", [text]
        else:
            yield name, _docstrings(tree)


def _topics(tree: ast.Module) -> dict[str, str]:
    """The value of the only assignment in the module of topics, which is a literal."""
    assignment = next(node for node in tree.body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(assignment.value)
    return topics


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _sentences(text: str) -> Iterator[Sentence]:
    """The tokens of each sentence: lower-case words, ``N`` for numbers, and punctuation."""
    for paragraph in _PARAGRAPH.split(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")):
        for sentence in [] if _CODE.search(paragraph) else _SENTENCE.split(paragraph):
            tokens = tuple("N" if token["number"] else token[0] for token in _TOKEN.finditer(sentence.lower()))
            if tokens:
                yield tokens


def _split(documents: dict[str, list[Sentence]]) -> tuple[list[Sentence], ...]:
    """Deal documents out, longest first, so that each split gets long and short ones; then mix their order."""
    longest_first = sorted(documents, key=lambda name: (-sum(map(len, documents[name])), name))
    split = {name: _HELD_OUT.get(i % 10, 0) for i, name in enumerate(longest_first)}
    splits: tuple[list[Sentence], ...] = ([], [], [])
    # by a hash, and not by name, so that the first tokens of a split are a sample of it
    for name in sorted(documents, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        splits[split[name]].extend(documents[name])
    return splits
