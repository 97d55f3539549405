"""Corpora from the datasets, iterators and vocabularies of any torchtext, which is never imported."""

from collections.abc import Iterable, Iterator
from typing import Any

from lit_sigsoftmax.data.corpus import SPLITS, Corpus
from lit_sigsoftmax.data.vocabulary import EOS, Vocabulary

__all__ = ["from_torchtext"]


def from_torchtext(
    train: Any, valid: Any, test: Any, vocab: Any = None, *, name: str = "torchtext", min_count: int = 1
) -> Corpus:
    """Make a corpus from what torchtext gives.

    One rule for ``<eos>``: every line, token list or ``Example`` ends in it, so it is appended to those that do not. A
    ``LanguageModelingDataset`` of torchtext 0.6 has put it after every line already and is taken as it is.

    Args:
        train: The training split. An iterable of lines, which are split on white space (the datasets of torchtext 0.9
            and later, or an open text file); an iterable of token lists; a dataset of torchtext 0.6, which has
            ``examples`` with a ``text``; or an iterator or loader over one of these, which has a ``dataset``.
        valid: The validation split, likewise.
        test: The test split, likewise.
        vocab: Which token has which id, which it keeps: a ``Vocab`` with ``get_itos()`` (torchtext 0.10 and later) or
            ``itos`` (before), or a list of tokens. If None, the vocabulary is built from ``train``.
        name: What reports and tracking call the corpus.
        min_count: Without ``vocab``: types rarer than this in ``train`` become ``<unk>``.

    Raises:
        TypeError: If a split or ``vocab`` is none of these.
        ValueError: If a split is empty or has a token that cannot be encoded, or if ``vocab`` has no ``<eos>``.
    """
    splits = {split: list(_tokens(data, split)) for split, data in zip(SPLITS, (train, valid, test), strict=True)}
    vocabulary = Vocabulary.build(splits["train"], min_count) if vocab is None else _vocabulary(vocab)
    ids = []
    for split, tokens in splits.items():
        try:
            ids.append(vocabulary.encode(tokens))
        except ValueError as error:
            raise ValueError(f"the {split} split cannot be encoded: {error}") from None
    return Corpus(name, vocabulary, *ids)


def _tokens(data: Any, split: str) -> Iterator[str]:
    if not hasattr(data, "examples"):  # asked first: a dataset of torchtext 0.6 claims to have every other attribute
        data = getattr(data, "dataset", data)
    data = getattr(data, "examples", data)
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise TypeError(
            f"the {split} split is {data!r:.80}, not a torchtext dataset or iterator, lines of text or lists of tokens"
        )
    for item in data:
        tokens = getattr(item, "text", item)  # of an Example
        if isinstance(tokens, str):
            tokens = tokens.split()
        if not (isinstance(tokens, list | tuple) and all(isinstance(token, str) for token in tokens)):
            raise TypeError(
                f"the {split} split holds {tokens!r:.80}: expected lines of text, lists of tokens, or Examples with "
                "such a .text; ids must be turned back into tokens"
            )
        yield from tokens
        if not tokens or tokens[-1] != EOS:
            yield EOS


def _vocabulary(vocab: Any) -> Vocabulary:
    itos = vocab.get_itos() if hasattr(vocab, "get_itos") else getattr(vocab, "itos", vocab)
    if not (isinstance(itos, list | tuple) and all(isinstance(token, str) for token in itos)):
        raise TypeError(
            f"vocab is {vocab!r:.80}: expected a torchtext Vocab (with get_itos() or itos), a list of tokens, or None"
        )
    if EOS not in itos:
        raise ValueError(
            f"vocab has no {EOS!r}, which ends every line: build it with specials=['<unk>', '{EOS}'], or from text "
            f"that contains {EOS!r}"
        )
    return Vocabulary(itos)
