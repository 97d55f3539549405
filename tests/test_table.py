from types import SimpleNamespace

import pytest

from lit_sigsoftmax import OutputHead
from lit_sigsoftmax.compare.plan import PlannedRun, parse_seeds, plan
from lit_sigsoftmax.compare.table import collect, markdown, rows


def run(layer, test, status="FINISHED"):
    activation, n_experts = layer.rsplit(" x", 1)
    metrics = {"val/best_perplexity": 90.0, "train/tokens_per_second": 1000.0}
    return SimpleNamespace(
        info=SimpleNamespace(status=status),
        data=SimpleNamespace(
            tags={"activation": activation, "n_experts": n_experts},
            params={"parameters": "1234"},
            metrics=metrics if test is None else {**metrics, "test/perplexity": test},
        ),
    )


def test_table_is_mean_and_sample_deviation_over_finished_runs_lowest_first():
    runs = [
        run("softmax x1", 102.0),
        run("softmax x1", 98.0),
        run("sigsoftmax x1", 99.0),
        run("relu x1", 1.0, "FAILED"),
    ]
    arms = collect(runs)
    assert [arm.layer for arm in arms] == ["sigsoftmax x1", "softmax x1"]
    assert rows(arms)[1] == ("softmax x1", "2", "1,234", "90.00 ± 0.00", "100.00 ± 2.83", "1,000")
    assert "| sigsoftmax x1 | 1 | 1,234 | 90.00 | 99.00 | 1,000 |" in markdown(arms)


def test_a_diverged_seed_is_counted_and_spoils_no_mean():
    arms = collect([run("relu x1", None), run("softmax x1", 100.0), run("softmax x1", None)])
    assert [row[:2] + row[4:5] for row in rows(arms)] == [
        ("softmax x1", "1 (1 diverged)", "100.00"),
        ("relu x1", "0 (1 diverged)", "-"),
    ]


def test_plan_has_every_combination_once_seed_by_seed():
    assert plan(["softmax", "softmax", "relu"], [1], [4, 5]) == [
        PlannedRun("softmax", 1, 4),
        PlannedRun("relu", 1, 4),
        PlannedRun("softmax", 1, 5),
        PlannedRun("relu", 1, 5),
    ]


@pytest.mark.parametrize("words", [["x"], ["5..2"], ["1.."], ["1.5"]])
def test_seeds_that_are_none(words):
    with pytest.raises(ValueError, match=r"a seed is a number, or a range such as 0\.\.4, not"):
        parse_seeds(words)


def test_layers_that_differ_have_different_names():
    softplus = "torch.nn.Softplus"
    specs = [softplus, *({"class_path": softplus, "init_args": {"beta": beta}} for beta in (1, 2))]
    names = [OutputHead(2, 3, spec, 4).name for spec in specs]
    assert names == ["torch.nn.Softplus x4", "torch.nn.Softplus(beta=1) x4", "torch.nn.Softplus(beta=2) x4"]
