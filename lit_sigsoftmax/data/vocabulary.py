"""Vocabulary: which token is which row of the output layer."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["EOS", "UNK", "Vocabulary"]

EOS = "<eos>"
"""Ends every line, and stands before the first token of a corpus."""
UNK = "<unk>"
"""Stands for every token that is not in the vocabulary."""


class Vocabulary:
    """An immutable one-to-one map between tokens and the ids 0, 1, ..., V - 1.

    Args:
        tokens: The token of each id, in order. Must contain ``<eos>`` and nothing twice; ``<unk>`` is optional.

    Raises:
        ValueError: If ``<eos>`` is missing or a token occurs twice.

    Example:
        >>> vocabulary = Vocabulary.build("the cat <eos> the dog <eos>".split())
        >>> vocabulary.tokens
        ('the', 'cat', '<eos>', 'dog')
        >>> vocabulary.encode(["dog", "<eos>"])
        tensor([3, 2], dtype=torch.int32)
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tuple(tokens)
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        if len(self._ids) < len(self._tokens):
            twice = next(token for token, count in Counter(self._tokens).items() if count > 1)
            raise ValueError(f"a vocabulary holds every token once, but {twice!r} occurs more than once")
        if EOS not in self._ids:
            raise ValueError(f"a vocabulary must contain {EOS!r}, which ends every line and starts every corpus")

    @classmethod
    def build(cls, tokens: Iterable[str], min_count: int = 1) -> "Vocabulary":
        """The types of a text, in order of first appearance.

        Args:
            tokens: The text, normally the training split.
            min_count: Types that occur less often become ``<unk>``. Above 1 the vocabulary always has ``<unk>``.

        Raises:
            ValueError: If ``min_count`` is less than 1.
        """
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        types = {token if count >= min_count or token == EOS else UNK: None for token, count in Counter(tokens).items()}
        types[EOS] = None
        if min_count > 1:
            types[UNK] = None
        return cls(tuple(types))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token of each id."""
        return self._tokens

    @property
    def eos_id(self) -> int:
        """The id of ``<eos>``."""
        return self._ids[EOS]

    @property
    def unk_id(self) -> int | None:
        """The id of ``<unk>``, or None where the vocabulary has none."""
        return self._ids.get(UNK)

    def encode(self, tokens: Iterable[str]) -> Tensor:
        """The ids of tokens, those unknown as ``<unk>``.

        Returns:
            (N,) int32.

        Raises:
            ValueError: If a token is unknown and the vocabulary has no ``<unk>``.
        """
        unk = self.unk_id
        try:
            ids = [self._ids[token] if unk is None else self._ids.get(token, unk) for token in tokens]
        except KeyError as error:
            raise ValueError(
                f"token {error.args[0]!r} is not in the vocabulary, which has no {UNK!r} to stand for it: "
                f"build the vocabulary with min_count=2, or put {UNK!r} into the training text"
            ) from None
        return torch.tensor(ids, dtype=torch.int32)

    def decode(self, ids: Iterable[int] | Tensor) -> list[str]:
        """The tokens of ids, which are ints or a one-dimensional integer tensor."""
        return [self._tokens[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def __eq__(self, other: object) -> bool:
        return self._tokens == other._tokens if isinstance(other, Vocabulary) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._tokens)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens)"
