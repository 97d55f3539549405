"""Which runs a comparison is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PlannedRun", "parse_seeds", "plan"]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        activation: The output activation, a registered name or an import path.
        n_experts: The number of mixed distributions.
        seed: The seed of initial weights, data order and dropout.
    """

    activation: str
    n_experts: int
    seed: int

    @property
    def name(self) -> str:
        """The run in words, as in ``sigsoftmax x4 seed 2``."""
        return f"{self.activation} x{self.n_experts} seed {self.seed}"

    @property
    def arguments(self) -> list[str]:
        """The keys in which this run differs from the recipe, for the command line of ``fit``."""
        layer = [f"--model.activation={self.activation}", f"--model.n_experts={self.n_experts}"]
        return [*layer, f"--seed_everything={self.seed}"]


def plan(activations: Sequence[str], n_experts: Sequence[int], seeds: Sequence[int]) -> list[PlannedRun]:
    """Return every combination once, seed by seed, so that a study stopped early has all its layers."""
    return list(dict.fromkeys(PlannedRun(a, k, seed) for seed in seeds for k in n_experts for a in activations))


def parse_seeds(words: Sequence[str]) -> list[int]:
    """Read seeds such as ``0 1 2`` or ``0..4``, each once.

    Raises:
        ValueError: A word is neither.

    Example:
        >>> parse_seeds(["0..2", "7"])
        [0, 1, 2, 7]
    """
    seeds: list[int] = []
    for word in words:
        first, dots, last = word.partition("..")
        try:
            found = range(int(first), int(last) + 1) if dots else [int(first)]
        except ValueError:
            found = []
        if not found:
            raise ValueError(f"a seed is a number, or a range such as 0..4, not {word!r}")
        seeds += found
    return list(dict.fromkeys(seeds))
