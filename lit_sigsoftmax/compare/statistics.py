"""Whether two output layers differ: over seeds, and over the test set within one pair of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

__all__ = ["Bootstrap", "Comparison", "block_bootstrap", "compare_with_baseline", "detectable_difference", "holm"]

# The permutation test goes through all 2^n exchanges of n pairs: 4,096 at the most.
_MOST_SEEDS_TO_PERMUTE = 12
_POWER = 0.8


@dataclass(frozen=True)
class Comparison:
    """One output layer against the baseline, over the seeds that both have.

    Attributes:
        layer: The output layer.
        baseline: What it is compared with.
        seeds: The seeds that both have: the pairs.
        mean: The layer's mean test perplexity over these seeds; NaN without a seed.
        sd: Its sample standard deviation; None with fewer than two seeds.
        difference: Mean of layer minus baseline, in perplexity: negative where the layer is better.
        interval: Confidence interval of the difference, for this comparison alone; None where no test can be made.
        t_p: Two-sided p of the paired t-test; None where no test can be made.
        permutation_p: Two-sided p of the exact paired permutation test; None with fewer than 2 or more than 12 seeds.
            It is at least 2 / 2^n: fewer than 6 seeds never show 5 % by it.
        adjusted_p: ``t_p`` after Holm's correction over all comparisons of the study: what decides.
        detectable: The smallest true difference in perplexity that so many seeds show four times in five; None where
            no test can be made.
        sentence: The result in words.
    """

    layer: str
    baseline: str
    seeds: tuple[int, ...]
    mean: float
    sd: float | None
    difference: float
    interval: tuple[float, float] | None = None
    t_p: float | None = None
    permutation_p: float | None = None
    adjusted_p: float | None = None
    detectable: float | None = None
    sentence: str = ""


@dataclass(frozen=True)
class Bootstrap:
    """How far two runs are apart on the test set.

    Attributes:
        difference: Mean loss of the one minus that of the baseline, in nats per token.
        interval: Its 95 % interval over resampled blocks of the test set.
    """

    difference: float
    interval: tuple[float, float]

    @property
    def perplexity_ratio(self) -> float:
        """The perplexity of the one over that of the baseline: the exponential of the difference."""
        return math.exp(self.difference)

    @property
    def perplexity_ratio_interval(self) -> tuple[float, float]:
        """The interval of the ratio."""
        return math.exp(self.interval[0]), math.exp(self.interval[1])


def compare_with_baseline(
    results: Mapping[str, Mapping[int, float]], baseline: str | Mapping[str, str], level: float = 0.05
) -> list[Comparison]:
    """Test every output layer against one of them, or each against its own, in pairs of the same seed.

    The pairs share data order, dropout masks and the initial weights of the same shape, so the tests are of the
    differences within pairs: a paired t-test, which decides after Holm's correction, and an exact permutation test.

    Args:
        results: Output layer to seed to test perplexity. A seed that diverged is left out of it.
        baseline: The layer that all others are compared with, or for each layer to compare the one that it is compared
            with. The correction is over all of them.
        level: The probability of finding any difference where there is none.

    Returns:
        One comparison for each layer but the baseline, in the order of ``results``, or of a mapping ``baseline``.

    Raises:
        ValueError: A baseline is not among the results, or a perplexity is not finite.
    """
    baselines = (
        {layer: baseline for layer in results if layer != baseline} if isinstance(baseline, str) else dict(baseline)
    )
    for base in [baseline] if isinstance(baseline, str) else baselines.values():
        if base not in results:
            raise ValueError(f"no results of the baseline {base!r}: there are {', '.join(results) or 'none'}")
    for layer, found in results.items():
        if bad := [seed for seed, value in found.items() if not math.isfinite(value)]:
            raise ValueError(f"{layer} has no finite perplexity for seed {bad[0]}: leave diverged seeds out")
    pairs = {layer: sorted(results[layer].keys() & results[base].keys()) for layer, base in baselines.items()}
    tested = sum(len(seeds) > 1 for seeds in pairs.values())
    compared = [
        _compare(
            Comparison(layer, baselines[layer], tuple(seeds), math.nan, None, math.nan),
            np.array([results[layer][seed] for seed in seeds]),
            np.array([results[baselines[layer]][seed] for seed in seeds]),
            level / max(tested, 1),
            level,
        )
        for layer, seeds in pairs.items()
    ]
    adjusted = iter(holm([one.t_p for one in compared if one.t_p is not None]))
    compared = [replace(one, adjusted_p=None if one.t_p is None else next(adjusted)) for one in compared]
    return [replace(one, sentence=_sentence(one, level)) for one in compared]


def _compare(
    comparison: Comparison, layer: NDArray[np.float64], base: NDArray[np.float64], corrected: float, level: float
) -> Comparison:
    n = len(layer)
    if n == 0:
        return comparison
    difference = float(np.mean(layer - base))
    comparison = replace(comparison, mean=float(np.mean(layer)), difference=difference)
    if n == 1:
        return comparison
    comparison = replace(comparison, sd=float(np.std(layer, ddof=1)))
    deviation = float(np.std(layer - base, ddof=1))
    # Rounding alone makes constant differences vary a little.
    if deviation <= 1e-12 * float(np.max(np.abs([layer, base]))):
        return comparison
    test = stats.ttest_rel(layer, base)
    interval = test.confidence_interval(1 - level)
    return replace(
        comparison,
        interval=(float(interval.low), float(interval.high)),
        t_p=float(test.pvalue),
        permutation_p=_permutation_p(layer, base) if n <= _MOST_SEEDS_TO_PERMUTE else None,
        detectable=detectable_difference(deviation, n, corrected),
    )


def _permutation_p(layer: NDArray[np.float64], base: NDArray[np.float64]) -> float:
    def mean_difference(a: NDArray[np.float64], b: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.mean(a - b, axis=axis)

    # n_resamples of infinity: all exchanges, each once.
    test = stats.permutation_test(
        (layer, base), mean_difference, permutation_type="samples", vectorized=True, n_resamples=np.inf
    )
    return float(test.pvalue)


def detectable_difference(deviation: float, n: int, level: float = 0.05, power: float = _POWER) -> float:
    """Return the true difference that a two-sided paired t-test finds with the given power (noncentral t).

    Args:
        deviation: Standard deviation of the differences within pairs.
        n: Number of pairs, at least 2.
        level: Significance level of the test.
        power: Probability of finding it.
    """
    degrees, critical = n - 1, stats.t.isf(level / 2, n - 1)

    def excess(shift: float) -> float:
        return float(stats.nct.sf(critical, degrees, shift)) - power

    # At a shift of the critical value the power is about a half; it grows with the shift.
    shift = optimize.brentq(excess, 0.0, 10 * critical)
    return float(shift) * deviation / math.sqrt(n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of a family of tests (Holm, 1979, A simple sequentially rejective multiple test procedure).

    SciPy corrects for the false discovery rate alone.

    Example:
        >>> holm([0.03, 0.01, 0.04])
        [0.06, 0.03, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _sentence(one: Comparison, level: float) -> str:
    n, percent = len(one.seeds), f"{100 * level:g} %"
    if n == 0:
        return f"no seed in common with {one.baseline}: nothing to compare"
    if n == 1:
        return f"1 seed in common with {one.baseline}: no test"
    if one.adjusted_p is None or one.detectable is None:
        return f"differs by {one.difference:.2f} with every seed: no test"
    if one.adjusted_p < level:
        better = "lower" if one.difference < 0 else "higher"
        exact = "" if one.permutation_p is None else f" by the t-test (permutation p {one.permutation_p:.2g})"
        return f"{better} than {one.baseline} by {abs(one.difference):.2f}, significant at {percent}{exact}; {n} seeds"
    return f"not significant at {percent}; {n} seeds can show differences above {one.detectable:.2f}"


def block_bootstrap(
    nll: ArrayLike, baseline_nll: ArrayLike, block: int = 500, resamples: int = 9999, seed: int = 0
) -> Bootstrap:
    """Compare two runs on the tokens of one test set, by a paired bootstrap over blocks of consecutive tokens.

    Blocks, because the losses of neighbouring tokens go together. The interval speaks of other text of this kind, for
    these two sets of weights; what another seed would give is the business of :func:`compare_with_baseline`.

    Args:
        nll: Shape (tokens,), loss of each test token in nats.
        baseline_nll: Shape (tokens,), the baseline's, of the same tokens in the same order.
        block: Tokens of a block; the last one may be shorter.
        resamples: How many test sets are drawn.
        seed: Seed of the drawing.

    Raises:
        ValueError: The losses are not two vectors of the same length, are not finite, or make fewer than two blocks.
    """
    layer, base = np.asarray(nll, dtype=np.float64), np.asarray(baseline_nll, dtype=np.float64)
    if layer.ndim != 1 or layer.shape != base.shape:
        raise ValueError(f"two vectors of losses of the same tokens are needed, not shapes {layer.shape}, {base.shape}")
    difference = layer - base
    if not np.isfinite(difference).all():
        raise ValueError(f"the losses of {int((~np.isfinite(difference)).sum())} tokens are not finite")
    if block < 1 or len(difference) <= block:
        raise ValueError(f"{len(difference)} tokens make no two blocks of {block}: make the blocks shorter")
    starts = np.arange(0, len(difference), block)
    sums = np.add.reduceat(difference, starts)
    sizes = np.diff(np.append(starts, len(difference)))

    def per_token(sums: NDArray[np.float64], sizes: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        return sums.sum(axis=axis) / sizes.sum(axis=axis)

    interval = stats.bootstrap(
        (sums, sizes),
        per_token,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=1000,  # keeps the memory small
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Bootstrap(float(difference.mean()), (float(interval.low), float(interval.high)))
