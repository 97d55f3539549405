"""Which runs a comparison is made of."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

__all__ = ["PlannedRun", "default_baseline", "grid", "parse_seeds", "plan", "tuning_runs"]

Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        activation: The output activation, a registered name or an import path.
        n_experts: The number of mixed distributions.
        seed: The seed of initial weights, data order and dropout.
        varied: Further keys of the recipe in which the arms differ, with this arm's values.
        tuned: Keys whose value each arm chooses for itself, with the value of this run.
    """

    activation: str
    n_experts: int
    seed: int
    varied: Settings = ()
    tuned: Settings = ()

    @property
    def arm(self) -> str:
        """What is compared: all runs that differ in their seed alone, as in ``sigsoftmax x4 hidden_size=200``."""
        return " ".join([f"{self.activation} x{self.n_experts}", *_short(self.varied, self.varied)])

    @property
    def name(self) -> str:
        """The run in words, as in ``sigsoftmax x4 seed 2``."""
        return " ".join([self.arm, *_short(self.tuned, (*self.varied, *self.tuned)), f"seed {self.seed}"])

    @property
    def arguments(self) -> list[str]:
        """The keys in which this run differs from the recipe, for the command line of ``fit``."""
        layer = [f"--model.activation={self.activation}", f"--model.n_experts={self.n_experts}"]
        further = [f"--{key}={value}" for key, value in (*self.varied, *self.tuned)]
        return [*layer, *further, f"--seed_everything={self.seed}"]


def plan(
    activations: Sequence[str],
    n_experts: Sequence[int],
    seeds: Sequence[int],
    vary: Mapping[str, Sequence[str]] | None = None,
) -> list[PlannedRun]:
    """Return every combination once, seed by seed, so that a study stopped early has all its layers.

    Args:
        activations: The output activations; one such as ``softmax x4`` brings its own mixture size.
        n_experts: The mixture sizes of the others.
        seeds: The seeds.
        vary: Further keys of the recipe with the values to combine.

    Example:
        >>> [run.arm for run in plan(["softmax", "sigsoftmax", "softmax x4"], [1], [0])]
        ['softmax x1', 'sigsoftmax x1', 'softmax x4']
    """
    layers = [layer for k in n_experts for layer in (_layer(name, k) for name in activations)]
    return list(
        dict.fromkeys(
            PlannedRun(activation, k, seed, varied)
            for seed in seeds
            for varied in grid(vary or {})
            for activation, k in layers
        )
    )


def _layer(name: str, n_experts: int) -> tuple[str, int]:
    own = re.fullmatch(r"(\S+) x([1-9]\d*)", name)
    return (own[1], int(own[2])) if own else (name, n_experts)


def grid(values: Mapping[str, Sequence[str]]) -> list[Settings]:
    """Return every combination of the values.

    Example:
        >>> grid({"optimizer.lr": ["1", "2"]})
        [(('optimizer.lr', '1'),), (('optimizer.lr', '2'),)]
    """
    return [tuple(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def tuning_runs(runs: Sequence[PlannedRun], tune: Mapping[str, Sequence[str]]) -> list[PlannedRun]:
    """Return the runs that choose each arm's values: its whole grid with the first seed."""
    first = [run for run in runs if run.seed == runs[0].seed]
    return [replace(run, tuned=values) for run in first for values in grid(tune)]


def default_baseline(runs: Sequence[PlannedRun]) -> str:
    """Return the first arm with softmax, or the first of all."""
    return next((run for run in runs if run.activation == "softmax"), runs[0]).arm


def parse_seeds(words: Sequence[str]) -> list[int]:
    """Read seeds such as ``0 1 2`` or ``0..4``, each once.

    Raises:
        ValueError: A word is neither, or a range is empty.

    Example:
        >>> parse_seeds(["0..2", "7"])
        [0, 1, 2, 7]
    """
    seeds: list[int] = []
    for word in words:
        first, dots, last = word.partition("..")
        expected = f"a seed is a number, or a range such as 0..4, not {word!r}"
        try:
            found = range(int(first), int(last) + 1) if dots else [int(first)]
        except ValueError:
            raise ValueError(expected) from None
        if not found:
            raise ValueError(f"{expected}, which ends before it begins")
        seeds += found
    return list(dict.fromkeys(seeds))


def _short(settings: Settings, among: Settings) -> list[str]:
    """Return each setting under the shortest end of its key that no other key among them has."""
    paths = [key.split(".") for key, _ in among]
    words = []
    for key, value in settings:
        path = key.split(".")
        ends = (path[-n:] for n in range(1, len(path)))
        end = next((end for end in ends if sum(other[-len(end) :] == end for other in paths) == 1), path)
        words.append(f"{'.'.join(end)}={value}")
    return words
