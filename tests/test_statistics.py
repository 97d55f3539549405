"""The statistics of a comparison, against SciPy, closed forms and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from lit_sigsoftmax.compare.statistics import block_bootstrap, compare_with_baseline, detectable_difference, holm

SOFTMAX = {0: 101.2, 1: 99.7, 2: 100.4, 3: 102.1, 4: 100.0}
RESULTS = {
    "softmax x1": SOFTMAX,
    "sigsoftmax x1": {0: 99.9, 1: 98.9, 2: 99.3, 3: 100.6, 4: 99.1},
    "relu x1": {4: 100.9, 3: 101.0, 2: 101.4, 1: 99.0, 0: 102.2},
    "sigmoid x1": {0: 101.4, 1: 99.5, 7: 50.0},
}


def compared(results=RESULTS, **options):
    return {one.layer: one for one in compare_with_baseline(results, "softmax x1", **options)}


@pytest.mark.parametrize("layer", ["sigsoftmax x1", "relu x1", "sigmoid x1"])
@pytest.mark.parametrize("level", [0.05, 0.1])
def test_the_tests_are_scipys_on_the_seeds_that_both_have(layer, level):
    one = compared(level=level)[layer]
    seeds = tuple(sorted(RESULTS[layer].keys() & SOFTMAX.keys()))
    a, b = ([found[seed] for seed in seeds] for found in (RESULTS[layer], SOFTMAX))
    expected = stats.ttest_rel(a, b)
    assert (one.seeds, one.baseline) == (seeds, "softmax x1")
    assert (one.mean, one.sd) == pytest.approx((np.mean(a), np.std(a, ddof=1)))
    assert one.difference == pytest.approx(np.mean(a) - np.mean(b))
    assert one.t_p == pytest.approx(expected.pvalue)
    assert one.interval == pytest.approx(tuple(expected.confidence_interval(1 - level)))


def test_the_permutation_test_counts_all_signs():
    # Five of five differences have one sign: only the given signs and their opposite are as extreme, 2 of 32.
    assert compared()["sigsoftmax x1"].permutation_p == pytest.approx(2 / 32)
    differences = np.array([RESULTS["relu x1"][seed] - SOFTMAX[seed] for seed in range(5)])
    signs = 1 - 2 * ((np.arange(32)[:, None] >> np.arange(5)) & 1)
    as_extreme = np.abs((signs * differences).mean(axis=1)) >= abs(differences.mean()) - 1e-12
    assert compared()["relu x1"].permutation_p == pytest.approx(as_extreme.mean())


def test_many_seeds_have_no_permutation_test():
    rng = np.random.default_rng(0)
    results = {name: dict(enumerate(100 + rng.normal(size=13))) for name in ("softmax x1", "relu x1")}
    one = compared(results)["relu x1"]
    assert one.permutation_p is None
    assert one.t_p is not None


def test_holm_against_its_definition_and_over_all_comparisons():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    found = compared()
    assert [one.adjusted_p for one in found.values()] == pytest.approx(holm([one.t_p for one in found.values()]))


def test_holm_is_over_all_comparisons_also_where_each_layer_has_a_baseline_of_its_own():
    layers = {f"{name} size={size}": seeds for size in (4, 8) for name, seeds in RESULTS.items()}
    baselines = {layer: f"softmax x1 size={layer[-1]}" for layer in layers if not layer.startswith("softmax")}
    found = compare_with_baseline(layers, baselines)
    assert [(one.layer, one.baseline) for one in found] == list(baselines.items())
    assert [one.adjusted_p for one in found] == pytest.approx(holm([one.t_p for one in found]))
    assert [one.t_p for one in found] == [one.t_p for one in compared().values()] * 2
    with pytest.raises(ValueError, match="no results of the baseline 'gone'"):
        compare_with_baseline(layers, {"relu x1 size=4": "gone"})


def test_the_sentence_says_what_came_out():
    found = compared()
    assert found["sigsoftmax x1"].sentence == (
        "lower than softmax x1 by 1.12, significant at 5 % by the t-test (permutation p 0.062); 5 seeds"
    )
    relu = found["relu x1"]
    assert relu.sentence == f"not significant at 5 %; 5 seeds can show differences above {relu.detectable:.2f}"
    worse = {name: {seed: -value for seed, value in found.items()} for name, found in RESULTS.items()}
    assert compared(worse)["sigsoftmax x1"].sentence.startswith("higher than softmax x1 by 1.12, significant")


def test_one_seed_gives_no_test():
    one = compared({"softmax x1": SOFTMAX, "relu x1": {3: 104.6}})["relu x1"]
    assert (one.mean, one.difference) == (104.6, pytest.approx(2.5))
    assert (one.sd, one.interval, one.t_p, one.permutation_p, one.adjusted_p, one.detectable) == (None,) * 6
    assert one.sentence == "1 seed in common with softmax x1: no test"


def test_no_common_seed_gives_nothing():
    one = compared({"softmax x1": SOFTMAX, "relu x1": {9: 104.6}})["relu x1"]
    assert math.isnan(one.difference)
    assert "no seed in common" in one.sentence


@pytest.mark.parametrize(("shift", "said"), [(0.0, "0.00"), (0.1, "0.10")])
@pytest.mark.filterwarnings("error")
def test_constant_differences_give_no_test(shift, said):
    one = compared({"softmax x1": SOFTMAX, "relu x1": {s: value + shift for s, value in SOFTMAX.items()}})["relu x1"]
    assert (one.t_p, one.interval, one.adjusted_p) == (None, None, None)
    assert one.sentence == f"differs by {said} with every seed: no test"


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_detectable_difference_has_the_power_that_it_promises(n):
    level, rng = 0.05, np.random.default_rng(n)
    shift = detectable_difference(2.0, n, level)
    samples = shift + 2.0 * rng.normal(size=(4000, n))
    found = stats.ttest_1samp(samples, 0, axis=1).pvalue < level
    assert found.mean() == pytest.approx(0.8, abs=0.025)


def test_a_layer_compared_with_itself_differs_in_5_of_100_studies():
    rng, studies, found = np.random.default_rng(1), 300, 0
    for _ in range(studies):
        results = {name: dict(enumerate(rng.normal(100, 1, size=4))) for name in ("softmax x1", "a", "b", "c")}
        found += any(one.adjusted_p < 0.05 for one in compared(results).values())
    # The family is held to 5 %: with no correction three tests would find something in 12 of 100.
    assert found / studies <= 0.07


def test_results_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"no results of the baseline 'x': there are softmax x1"):
        compare_with_baseline({"softmax x1": SOFTMAX}, "x")
    with pytest.raises(ValueError, match="relu x1 has no finite perplexity for seed 1"):
        compared({"softmax x1": SOFTMAX, "relu x1": {0: 1.0, 1: math.inf}})


# Within a pair of runs


def test_the_bootstrap_of_one_shift_is_that_shift():
    base = np.random.default_rng(0).exponential(5, size=10_050)
    found = block_bootstrap(base + 0.01, base, resamples=200)
    assert found.difference == pytest.approx(0.01)
    assert found.interval == pytest.approx((0.01, 0.01))
    assert found.perplexity_ratio == pytest.approx(math.exp(0.01))
    assert found.perplexity_ratio_interval == pytest.approx((math.exp(0.01),) * 2)


def test_the_bootstrap_allows_for_neighbours_that_go_together():
    # Every loss of a stretch of 100 tokens is off by the same amount: 200 independent values, not 20,000.
    rng = np.random.default_rng(3)
    base = rng.exponential(5, size=20_000)
    layer = base + np.repeat(rng.normal(0, 1, size=200), 100)
    narrow, wide = (block_bootstrap(layer, base, block=block, resamples=500) for block in (1, 500))
    width = 2 * 1.96 / math.sqrt(200)
    assert narrow.difference == wide.difference
    assert np.diff(wide.interval)[0] == pytest.approx(width, rel=0.35)
    assert np.diff(narrow.interval)[0] < width / 5


def test_the_bootstraps_interval_holds_the_truth_and_is_the_same_each_time():
    rng, inside = np.random.default_rng(5), 0
    for _ in range(100):
        difference = rng.normal(0.02, 1, size=3_030)
        found = block_bootstrap(difference, np.zeros(3_030), block=50, resamples=300)
        inside += found.interval[0] <= 0.02 <= found.interval[1]
    assert 88 <= inside <= 100
    assert found == block_bootstrap(difference, np.zeros(3_030), block=50, resamples=300)
    assert found != block_bootstrap(difference, np.zeros(3_030), block=50, resamples=300, seed=1)


@pytest.mark.parametrize(
    ("layer", "base", "message"),
    [
        (np.ones(5), np.ones(4), r"shapes \(5,\), \(4,\)"),
        (np.ones((2, 2)), np.ones((2, 2)), "two vectors"),
        (np.array([1.0, np.inf, 1.0]), np.ones(3), "1 tokens are not finite"),
        (np.ones(500), np.ones(500), "500 tokens make no two blocks of 500"),
    ],
)
def test_losses_that_cannot_be_compared(layer, base, message):
    with pytest.raises(ValueError, match=message):
        block_bootstrap(layer, base)
