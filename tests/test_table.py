"""The table of a study, from runs in a real store."""

import csv
import io
from statistics import mean, stdev

import pytest
from report_helpers import write_run

from lit_sigsoftmax import OutputHead
from lit_sigsoftmax.compare.evidence import draw, read_evidence
from lit_sigsoftmax.compare.plan import PlannedRun, parse_seeds, plan
from lit_sigsoftmax.compare.results import read_study
from lit_sigsoftmax.compare.table import as_csv, as_latex, as_markdown, columns, rows

SOFTMAX, SIGSOFTMAX = {0: 100.0, 1: 104.0, 2: 99.0}, {0: 97.0, 1: 99.5, 2: 96.0}


@pytest.fixture(scope="module")
def told(workplace):
    """A study with a better layer, one that diverged, and one of which nothing finished."""
    with workplace() as store:
        for layer, found in (("softmax x1", SOFTMAX), ("sigsoftmax x1", SIGSOFTMAX)):
            for seed, test in found.items():
                write_run(store, layer, seed, test)
        write_run(store, "relu x4", 0, 300.0)
        write_run(store, "relu x4", 1, diverged="val/loss at step 3")
        write_run(store, "my_module.log_g x1", 0, status="failed")
        return store, read_study(store.client, ["demo"])


def test_cells(told):
    _, study = told
    cells = {row[0]: dict(zip(columns(study), row, strict=True)) for row in rows(study)}
    assert list(cells) == ["sigsoftmax x1", "softmax x1", "relu x4", "my_module.log_g x1"]
    softmax, sigsoftmax = (list(found.values()) for found in (SOFTMAX, SIGSOFTMAX))
    assert cells["softmax x1"] == {
        "output layer": "softmax x1",
        "seeds": "3",
        "params": "1,234",
        "val ppl": "101.00 ± 1.00",
        "test ppl": f"{mean(softmax):.2f} ± {stdev(softmax):.2f}",
        "Δ ppl": "baseline",
        "95 % interval": "-",
        "p": "-",
        "tokens/s": "2,000",
    }
    one = study.comparisons["sigsoftmax x1"]
    assert one.difference == pytest.approx(mean(sigsoftmax) - mean(softmax))
    assert cells["sigsoftmax x1"]["Δ ppl"] == f"{one.difference:+.2f}"
    assert cells["sigsoftmax x1"]["95 % interval"] == f"{one.interval[0]:+.2f} to {one.interval[1]:+.2f}"
    assert cells["sigsoftmax x1"]["p"] == f"{one.adjusted_p:.3f}"


def test_a_run_without_a_result_is_counted_and_spoils_no_mean(told):
    _, study = told
    cells = {row[0]: row for row in rows(study)}
    assert cells["relu x4"][1:5] == ("1 (1 diverged)", "1,234", "100.00", "300.00")
    assert cells["my_module.log_g x1"][1:5] == ("0 (1 failed)", "1,234", "-", "-")


def test_one_seed_gives_no_test(told):
    _, study = told
    cells = dict(zip(columns(study), next(row for row in rows(study) if row[0] == "relu x4"), strict=True))
    assert (cells["95 % interval"], cells["p"]) == ("-", "-")
    assert cells["Δ ppl"] == "+200.00"  # of the seed that both have
    assert "1 seed" in study.comparisons["relu x4"].sentence
    assert "no test" in study.comparisons["relu x4"].sentence


def test_csv_has_full_precision_and_empty_cells(told):
    _, study = told
    records = {record["arm"]: record for record in csv.DictReader(io.StringIO(as_csv(study)))}
    assert float(records["softmax x1"]["test_perplexity"]) == mean(SOFTMAX.values())
    assert float(records["sigsoftmax x1"]["holm_p"]) == study.comparisons["sigsoftmax x1"].adjusted_p
    assert records["sigsoftmax x1"]["seeds"] == "0 1 2"
    assert records["my_module.log_g x1"]["test_perplexity"] == records["relu x4"]["holm_p"] == ""
    assert {record["baseline"] for record in records.values()} == {"softmax x1"}


def test_markdown_and_latex_hold_the_same_cells(told):
    _, study = told
    lines = [line.strip("| ").split(" | ") for line in as_markdown(study).splitlines()]
    assert [tuple(line) for line in (lines[0], *lines[2:])] == [columns(study), *rows(study)]
    latex = as_latex(study)
    assert latex.count(" \\\\\n") == len(study.arms) + 1
    assert r"my\_module.log\_g x1 & 0 (1 failed)" in latex
    assert r"95 \% interval" in latex
    assert "±" not in latex


def test_the_rank_is_a_column_where_it_was_measured(store):
    write_run(store, "softmax x1", 0, 100.0, metrics={"test/log_prob_rank": 202.0, "test/effective_rank_1e-4": 23.0})
    study = read_study(store.client, ["demo"])
    cells = dict(zip(columns(study), rows(study)[0], strict=True))
    assert (cells["rank"], cells["eff. rank"]) == ("202", "23")


def test_a_rank_that_can_be_no_larger_is_marked(store):
    for layer, seed, rank in (
        ("softmax x1", 0, 202),
        ("softmax x1", 1, 203),
        ("relu x1", 0, 3000),
        ("relu x1", 1, 4096),
    ):
        metrics = {"test/log_prob_rank": rank, "test/log_prob_rank_limit": 4096, "test/effective_rank_1e-4": 23}
        write_run(store, layer, seed, 100.0, metrics=metrics, spectrum=[2.0, 1.0])
    study = read_study(store.client, ["demo"])
    place = columns(study).index("rank")
    assert {row[0]: row[place] for row in rows(study)} == {"softmax x1": "202", "relu x1": "≥ 3,548"}
    assert r"$\geq$ 3,548" in as_latex(study)
    records = {record["arm"]: record for record in csv.DictReader(io.StringIO(as_csv(study)))}
    assert (records["relu x1"]["log_prob_rank"], records["relu x1"]["log_prob_rank_limit"]) == ("3548.0", "4096.0")
    assert "relu x1, rank ≥ 3,548" in draw(study, read_evidence(store.client, study))["spectra"]


def test_each_value_of_what_is_varied_has_its_own_baseline(store):
    for size, test in ((8, 100.0), (64, 50.0)):
        for layer, gain in (("softmax x1", 0.0), ("sigsoftmax x1", 3.0)):
            write_run(store, layer, 0, test - gain, arm=f"{layer} hidden_size={size}")
    study = read_study(store.client, ["demo"])
    assert {name: (one.baseline, one.difference) for name, one in study.comparisons.items()} == {
        "sigsoftmax x1 hidden_size=8": ("softmax x1 hidden_size=8", -3.0),
        "sigsoftmax x1 hidden_size=64": ("softmax x1 hidden_size=64", -3.0),
    }
    assert [row[5] for row in rows(study)] == ["-3.00", "baseline", "-3.00", "baseline"]


def test_keys_with_the_same_last_part_are_told_apart(store):
    values = ["0", "0.2"]
    for run in plan(["softmax", "relu"], [1], [0], {"model.backbone.dropout": values, "model.dropout": values}):
        write_run(store, f"{run.activation} x1", 0, 100.0, arm=run.arm)
    study = read_study(store.client, ["demo"])
    assert len(study.comparisons) == 4
    assert {one.baseline.replace("softmax", "relu") for one in study.comparisons.values()} == set(study.comparisons)
    assert {tuple(arm.varied.items()) for arm in study.arms} == {
        (("backbone.dropout", one), ("model.dropout", two)) for one in values for two in values
    }


# Which runs, and what they are called


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
