"""Corpus: three splits of token ids over one vocabulary, read from text and cached."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lit_sigsoftmax.data.vocabulary import EOS, Vocabulary
from lit_sigsoftmax.storage import atomic_write, cache_dir, exclusive

__all__ = ["SPLITS", "Corpus", "cache_dir", "load_text_corpus", "read_tokens"]

SPLITS = ("train", "valid", "test")

# Part of the cache's key: raise it whenever the same text would be encoded or stored differently.
_FORMAT = "1"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as token ids.

    Args:
        name: What reports and tracking call the corpus.
        vocabulary: The vocabulary of all three splits.
        train: (N,) int32, the training split in reading order.
        valid: (N,) int32.
        test: (N,) int32.

    Raises:
        ValueError: If a split is empty or not of that form.
    """

    name: str
    vocabulary: Vocabulary
    train: Tensor
    valid: Tensor
    test: Tensor

    def __post_init__(self) -> None:
        for split in SPLITS:
            tokens = getattr(self, split)
            if tokens.dtype != torch.int32 or tokens.ndim != 1 or len(tokens) == 0:
                raise ValueError(
                    f"the {split} split of corpus {self.name!r} must be a one-dimensional int32 tensor with at least "
                    f"one token, got {tokens.dtype} of shape {tuple(tokens.shape)}"
                )

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that differ when a token, an id or the order differs: equal means the same task."""
        digest = hashlib.blake2b(digest_size=16)
        tokens = json.dumps(self.vocabulary.tokens).encode()  # unambiguous whatever a token contains
        for part in (tokens, *(getattr(self, split).numpy() for split in SPLITS)):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    @classmethod
    def from_tokens(
        cls, name: str, train: Iterable[str], valid: Iterable[str], test: Iterable[str], *, min_count: int = 1
    ) -> "Corpus":
        """Encode three splits with the vocabulary of ``train``.

        Args:
            name: What reports and tracking call the corpus.
            train: The tokens of the training split.
            valid: The tokens of the validation split.
            test: The tokens of the test split.
            min_count: Types rarer than this in ``train`` become ``<unk>``.

        Raises:
            ValueError: If a split is empty, or has a token that ``train`` lacks while there is no ``<unk>``.
        """
        train = list(train)
        vocabulary = Vocabulary.build(train, min_count)
        encoded = []
        for split, tokens in zip(SPLITS, (train, valid, test), strict=True):
            try:
                encoded.append(vocabulary.encode(tokens))
            except ValueError as error:
                raise ValueError(f"the {split} split of corpus {name!r}: {error}") from None
        return cls(name, vocabulary, *encoded)


def read_tokens(path: Path) -> list[str]:
    r"""The tokens of a text file: each line split on white space, then ``<eos>``, as in the papers on PTB and WikiText.

    Blank lines give ``<eos>`` too, and so does a last line without a newline. Lines end at ``\n`` alone; the ``\r`` of
    a Windows file is white space. A byte order mark is dropped: it would make a second type of the first word.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, or not UTF-8 text.
    """
    return _tokenize(path.read_bytes(), path)


def _tokenize(data: bytes, path: Path) -> list[str]:
    if not data:
        raise ValueError(f"{path} is empty: expected text, one sentence or paragraph a line")
    nul = data.find(0)
    if nul >= 0:
        raise ValueError(f"{path} is not a text file: it has a NUL byte at offset {nul}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason}); "
            "convert the file to UTF-8"
        ) from None
    tokens: list[str] = []
    for line in text.removeprefix("\ufeff").removesuffix("\n").split("\n"):
        tokens += line.split()
        tokens.append(EOS)
    return tokens


def load_text_corpus(
    name: str, paths: Mapping[str, Path], *, min_count: int = 1, cache_dir: Path | None = None
) -> Corpus:
    """Read and encode a corpus of three text files, or take the encoded form from the cache.

    The cache is keyed by the content of the files, so a changed file is never mistaken for the old one. One process
    builds it while others wait; a damaged entry is built again.

    Args:
        name: What reports and tracking call the corpus.
        paths: The file of each split: keys ``train``, ``valid`` and ``test``.
        min_count: Types rarer than this in the training file become ``<unk>``.
        cache_dir: Where encoded corpora are kept; :func:`cache_dir` if None.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not UTF-8 text, is empty, or has a token that cannot be encoded.
        OSError: If the cache cannot be written.
    """
    data = {split: paths[split].read_bytes() for split in SPLITS}
    cached = _cache_file(data, min_count, cache_dir)
    corpus = _load(name, cached)
    if corpus is None:
        with exclusive(cached):
            corpus = _load(name, cached)  # another process may have built it while this one waited
            if corpus is None:
                tokens = (_tokenize(data[split], paths[split]) for split in SPLITS)
                corpus = Corpus.from_tokens(name, *tokens, min_count=min_count)
                _save(corpus, cached)
    return corpus


def _cache_file(data: Mapping[str, bytes], min_count: int, folder: Path | None) -> Path:
    key = hashlib.blake2b(f"{_FORMAT} {min_count}".encode(), digest_size=16)
    for split in SPLITS:
        key.update(hashlib.blake2b(data[split]).digest())
    return (folder or cache_dir()) / "corpora" / f"{key.hexdigest()}.pt"


def _save(corpus: Corpus, path: Path) -> None:
    content = {split: getattr(corpus, split) for split in SPLITS}
    # one string: 33,000 separate ones take ten times as long to load. No token holds a newline.
    content |= {"tokens": "\n".join(corpus.vocabulary.tokens), "fingerprint": corpus.fingerprint}
    with atomic_write(path) as file:
        torch.save(content, file)


def _load(name: str, path: Path) -> Corpus | None:
    if not os.access(path, os.R_OK):
        return None
    try:
        content = torch.load(path, weights_only=True, mmap=True)
        vocabulary = Vocabulary(content["tokens"].split("\n"))
        corpus = Corpus(name, vocabulary, *(content[split] for split in SPLITS))
        if corpus.fingerprint == content["fingerprint"]:
            return corpus
        reason = "its content does not match its fingerprint"
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error)
    _log.warning("the cached corpus %s is damaged (%s) and is built again", path, reason.split("\n")[0])
    return None
